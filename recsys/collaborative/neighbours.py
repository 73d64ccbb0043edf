"""Neighbour lists out of sparse matrices: the strongest entries of each row, in blocks, on all processors.

Item × item matrices of large catalogues are sparse products that would not fit as a whole, dense or not; members
keep the largest weights of each row only.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import sparse

from fusion.errors import MachineError

BLOCK_WORK = 4_000_000
"""Multiplications of one block of rows: its product has at most so many entries, of about 50 bytes each."""
MOST_THREADS = 8
"""Blocks that are held at once, whatever the machine has: SciPy's products let go of Python's lock."""

LIMIT_BYTES = 1_500_000_000
"""The largest lists that a member may export."""

Neighbours = tuple[np.ndarray, np.ndarray, float]
"""Column numbers int32 `[I, N]` in ascending order, weights float32 `[I, N]`, share of the sum of weights that was cut.

Where a row has fewer than N entries, it is filled up with its own number and weight 0.
"""

Weigh = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Turns entries into weights: row numbers, column numbers and entries, each `[n]` -> weights float32 `[n]`."""


def strongest_of_product(
    left: sparse.csr_matrix, right: sparse.csr_matrix, keep: int, weigh: Weigh | None = None
) -> Neighbours:
    """The `keep` largest weights of each row of `left @ right` (float32 `[I, K]`, `[K, I]`) beside its diagonal.

    Entries and weights must not be negative; among equal weights the smaller column numbers are kept. The result
    depends neither on the number of threads nor on how rows fall into blocks. Raises MachineError for lists beyond
    1.5 GB.
    """
    lengths = np.diff(right.indptr).astype(np.int64)
    work = np.concatenate([[0], np.cumsum(lengths[left.indices])])[left.indptr]
    return _strongest(lambda rows: left[rows] @ right, work, keep, weigh)


def strongest_of_rows(matrix: sparse.csr_matrix, keep: int, weigh: Weigh | None = None) -> Neighbours:
    """As `strongest_of_product`, of a float32 matrix `[I, I]` that is there already."""
    return _strongest(lambda rows: matrix[rows], matrix.indptr, keep, weigh)


def _strongest(
    rows_of: Callable[[slice], sparse.csr_matrix], work: np.ndarray, keep: int, weigh: Weigh | None
) -> Neighbours:
    items = len(work) - 1
    keep = min(keep, items)
    if items * keep * 8 > LIMIT_BYTES:
        raise MachineError(
            f"lists of neighbours must fit into {LIMIT_BYTES / 1e9} GB; {items} items with {keep} each need "
            f"{items * keep * 8 / 1e9:.1f} GB. Lower neighbours, or raise cleaning.k_core_items."
        )
    index, weight = np.empty((items, keep), np.int32), np.empty((items, keep), np.float32)

    def fill(rows: slice) -> float:
        block = rows_of(rows)
        numbers = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), np.diff(block.indptr))
        weights = weigh(numbers, block.indices, block.data) if weigh else block.data
        weights = np.where(numbers == block.indices, 0.0, weights).astype(np.float32)
        index[rows], weight[rows] = _largest(block.indptr, block.indices, weights, keep, rows.start)
        return float(weights.sum(dtype=np.float64))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        total = sum(pool.map(fill, _blocks(work)))
    return index, weight, 1.0 - float(weight.sum(dtype=np.float64)) / total if total else 0.0


def _blocks(work: np.ndarray) -> Iterator[slice]:
    """Rows in blocks of at most `BLOCK_WORK`, given the work before each row; at least one row each."""
    start = 0
    while start < len(work) - 1:
        stop = int(np.searchsorted(work, work[start] + BLOCK_WORK, side="right")) - 1
        yield slice(start, max(stop, start + 1))
        start = max(stop, start + 1)


_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def _largest(
    indptr: np.ndarray, columns: np.ndarray, weights: np.ndarray, keep: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and weights `[rows, keep]` of the largest weights of sparse rows, of which the first has number `first`.

    Weight and column become one integer, the bits of a non-negative float being in the order of its value: no two
    are equal then, so that which ones are kept is never up to the selection, which differs between processors.
    """
    keys = weights.view(np.uint32).astype(np.uint64) << _HALF | _LOW - columns.astype(np.uint64)
    chosen = np.zeros((len(indptr) - 1, keep), np.uint64)
    for row, (start, stop) in enumerate(itertools.pairwise(indptr)):
        of_row = keys[start:stop]
        if len(of_row) > keep:
            of_row.partition(len(of_row) - keep)
            of_row = of_row[-keep:]
        chosen[row, : len(of_row)] = of_row
    kept = chosen >> _HALF
    own = np.arange(first, first + len(chosen), dtype=np.uint64)[:, None]
    by_column = np.sort(np.where(kept > 0, _LOW - (chosen & _LOW), own) << _HALF | kept, axis=1)
    return (by_column >> _HALF).astype(np.int32), by_column.astype(np.uint32).view(np.float32)


def power_diagonal(degrees: np.ndarray, exponent: float) -> sparse.dia_matrix:
    """diag(degrees^exponent), float32; 0 where the degree is 0, whatever the exponent."""
    powers = np.maximum(degrees, 1).astype(np.float64) ** exponent
    return sparse.diags(np.where(degrees > 0, powers, 0.0).astype(np.float32))
