"""What members share that regress every item on a part of the catalogue: on the items that are taken with it.

The item × item matrix of a large catalogue does not fit as a dense matrix, and its inverse even less. Its nonzero
cells do, and an item's weights hang almost only on the items nearest to it. So the catalogue is cut into groups of
items that are alike, and the regressions of a group share one small dense system (the shared blocks of the sparse
approximation in Steck 2019, "Markov Random Fields for Collaborative Filtering") or are cut out of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from scipy import sparse
from threadpoolctl import ThreadpoolController

from fusion.errors import MachineError
from recsys.collaborative.neighbours import strongest_of_rows

LIMIT_BYTES = 6_000_000_000
"""What the item × item matrix, and what the weights of all regressions, may take while a member is fitted."""
CELL_BYTES = 8
"""Of a sparse matrix: a float32 and the number of its column."""
MOST_THREADS = 8
"""Systems that are held at once, whatever the machine has."""

Task = TypeVar("Task")
Result = TypeVar("Result")
Neighbours = tuple[np.ndarray, np.ndarray]
"""Item numbers int32 `[I, n]`, ascending, and how near they are, float32; short rows hold their own number and 0."""


def refuse_beyond_limit(matrix: sparse.csr_matrix, candidates: int, member: str) -> None:
    """Raises MachineError where the sparse item × item matrix or the weights of all regressions might not fit."""
    users, items = matrix.shape
    lengths = np.diff(matrix.indptr).astype(np.float64)
    cells = min(float(lengths @ lengths), float(items) ** 2)  # an upper bound: pairs of several users count once
    regressions = 2.0 * items * min(candidates, items)  # by item that is predicted, and by item of the history
    needed = max(cells, regressions) * CELL_BYTES
    if needed > LIMIT_BYTES:
        remedy = "Lower candidates" if regressions > cells else "Raise cleaning.k_core_items"
        raise MachineError(
            f"{member} must fit into {LIMIT_BYTES / 1e9:g} GB while it is fitted; {users} users and {items} items with "
            f"{min(candidates, items)} candidates may need {needed / 1e9:.1f} GB. {remedy}, or take item_knn."
        )


def gram_matrix(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """How many users took both: float32 `[I, I]` of `[U, I]`, numbers of columns ascending."""
    matrix = matrix.astype(np.float32)
    gram = (matrix.T.tocsr() @ matrix).tocsr()
    gram.sort_indices()
    return gram


def nearest_by_cosine(gram: sparse.csr_matrix, keep: int) -> Neighbours:
    """The `keep` items with the largest cosine to each item, the item itself left out: all with whom it was taken,
    where `keep` allows."""
    scale = (1.0 / np.sqrt(np.maximum(gram.diagonal(), 1.0))).astype(np.float32)
    index, cosine, _ = strongest_of_rows(gram, keep, lambda rows, columns, cells: cells * scale[rows] * scale[columns])
    return index, cosine


def nearest_by_correlation(gram: sparse.csr_matrix, users: int, keep: int) -> Neighbours:
    """The `keep` items with the largest squared correlation to each item, which is the share of its variance that
    they explain; those that are taken with it less often than by chance are left out.

    Steck (2019) cuts the matrix by correlation as well. By cosine, popular items are near to all others, and the
    approximation that rests on it lost more on both data sets where it was tried: up to four times as much.
    """
    counts = gram.diagonal()
    scale = (1.0 / np.sqrt(np.maximum(counts * (1.0 - counts / users), 0.5))).astype(np.float32)
    counts = counts.astype(np.float32)

    def explained(rows: np.ndarray, columns: np.ndarray, cells: np.ndarray) -> np.ndarray:
        above_chance = np.maximum(cells - counts[rows] * counts[columns] / np.float32(users), np.float32(0))
        return (above_chance * scale[rows] * scale[columns]) ** 2

    index, share, _ = strongest_of_rows(gram, keep, explained)
    return index, share


def groups_of(neighbours: Neighbours, counts: np.ndarray, size: int) -> list[np.ndarray]:
    """The catalogue cut into groups of at most `size` item numbers: a leader, the most popular item that is left,
    and of the items near to it the nearest that are left."""
    index, nearness = neighbours
    free = np.ones(len(index), bool)
    groups = []
    for leader in np.argsort(-counts, kind="stable"):
        if not free[leader]:
            continue
        free[leader] = False
        near = np.flatnonzero(free[index[leader]] & (nearness[leader] > 0))
        near = near[np.argsort(-nearness[leader, near], kind="stable")[: size - 1]]
        followers = index[leader, near]
        free[followers] = False
        groups.append(np.concatenate([[leader], followers]))
    return groups


def scope_of(group: np.ndarray, neighbours: Neighbours, size: int) -> np.ndarray:
    """The `size` items on which a group is regressed, ascending: itself, and those nearest to all of it together."""
    index, nearness = neighbours
    total = np.bincount(index[group].ravel(), nearness[group].ravel(), minlength=len(index))
    total[group] = np.inf
    return np.sort(np.argsort(-total, kind="stable")[:size])


def submatrix(gram: sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
    """The rows and columns of the given items, dense `[n, n]`."""
    return gram[numbers][:, numbers].toarray()


def solved(tasks: Sequence[Task], solve: Callable[[Task], Result]) -> Iterator[Result]:
    """`solve` of every task, in their order, on all processors.

    Each processor has a system of its own, on which LAPACK takes one thread: small systems do not gain by more,
    and threads that wait for each other lose much on a busy machine.
    """
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    with ThreadpoolController().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(solve, tasks)


def by_history_item(regressions: sparse.csr_matrix, keep: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Regressions `[I, I]`, a row for each item that is predicted, as lists for each item of a history: the numbers
    `[I, keep]` of the items that it speaks for most, its weights for them, and the share of magnitude that was cut.

    Short lists are filled up with the number of their own item and weight 0.
    """
    weights = regressions.T.tocsr()
    items = weights.shape[0]
    index = np.repeat(np.arange(items, dtype=np.int32)[:, None], keep, axis=1)
    weight = np.zeros((items, keep), np.float32)
    for item in range(items):
        row = slice(weights.indptr[item], weights.indptr[item + 1])
        columns, values = weights.indices[row], weights.data[row]
        if len(values) > keep:
            largest = np.sort(np.argpartition(-np.abs(values), keep - 1)[:keep])
            columns, values = columns[largest], values[largest]
        index[item, : len(columns)], weight[item, : len(values)] = columns, values
    total = float(np.abs(weights.data).sum(dtype=np.float64))
    kept = float(np.abs(weight).sum(dtype=np.float64))
    return index, weight, max(0.0, 1.0 - kept / total) if total else 0.0


def assembled(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], items: int) -> sparse.csr_matrix:
    """Regressions of groups put together, `[I, I]`: parts of rows `[g]`, of columns `[g, n]` and weights `[g, n]`.

    Every item stands in exactly one part; weights of 0 are left out.
    """
    lengths = np.zeros(items, np.int64)
    for rows, _, weights in parts:
        lengths[rows] = np.count_nonzero(weights, axis=1)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    columns, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    for rows, numbers, weights in parts:
        used = weights != 0
        within = np.cumsum(used, axis=1) - 1
        cells = (starts[rows][:, None] + within)[used]
        columns[cells], values[cells] = numbers[used], weights[used]
    return sparse.csr_matrix((values, columns, starts), shape=(items, items))
