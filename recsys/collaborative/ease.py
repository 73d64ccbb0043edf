"""EASE: the closed-form item × item regression, kept as each item's largest weights."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import linalg, sparse

from fusion.config import Settings
from fusion.errors import MachineError
from fusion.progress import progress
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, NeighbourState, TrainingData, join_blocks, largest_by_row
from recsys.collaborative.local_regression import (
    Neighbours,
    assembled,
    by_history_item,
    gram_matrix,
    groups_of,
    nearest_by_correlation,
    refuse_beyond_limit,
    scope_of,
    solved,
    submatrix,
)

BLOCK = 1024
LIMIT_BYTES = 1_500_000_000
SHARED = 16
"""Candidates of the sparse solution for each item of a group; fewer are solved faster, but are less near to each."""
NEAREST = 64
"""Nearest items of each item by which groups and what they are regressed on are chosen; with longer lists what is
near to many items displaces what is nearest to one."""


class Ease(NeighbourState, Member):
    """B = I - P diag(1 / diag P) with P = (X'X + l2 I)^-1 (Steck 2019, "Embarrassingly Shallow Autoencoders").

    Dense: where there are fewer users than items, P comes from the smaller users × users system by the Woodbury
    identity: P = (I - X' (XX' + l2 I)^-1 X) / l2, so the cost is cubic in the smaller side.

    Sparse: groups of items that are alike are regressed on the `candidates` items nearest to the group, by
    B = I - P diag(1 / diag P) of that part of X'X (Steck 2019, "Markov Random Fields for Collaborative Filtering",
    whose sparse approximation shares the parts of neighbouring items in the same way). With all items as candidates it
    is the dense solution; with fewer the cost grows with the catalogue instead of its cube.

    Raises MachineError where dense matrices or kept neighbours would exceed 1.5 GB, or sparse ones 6 GB.
    """

    class Config(Settings):
        """Settings of EASE."""

        l2: float = Field(200.0, gt=0)
        """Strength of the ridge penalty."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        neighbours: int = Field(500, ge=1, le=50_000)
        """How many weights of each item are kept, the largest by magnitude; the rest is the truncation loss."""
        solver: Literal["auto", "dense", "sparse"] = "auto"
        """dense is exact; sparse takes each item's nearest; auto is dense where that fits into 1.5 GB."""
        candidates: int = Field(1000, ge=1, le=20_000)
        """On how many items each item is regressed by the sparse solver."""

    @classmethod
    def fit_cost(cls, config: Any, users: int, items: int, positives: int) -> tuple[float, float]:
        """A dense inverse of the smaller side, or a system for every three items (the median size of a group)."""
        if _solver(config, users, items) == "dense":
            side = min(users, items)
            return 2.0 * side**3 + 2.0 * side * items**2, 4.0 * side**2 + 4.0 * users * items
        return items / 3 * min(config.candidates, items) ** 3 / 3, 8.0 * positives**2 / users

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        users, items = data.matrix.shape
        keep = min(self.config.neighbours, items)
        solver = _solver(self.config, users, items)
        _refuse_beyond_limit(users, items, keep, solver)
        fit = self._dense if solver == "dense" else self._sparse
        self.index, self.weight, self.truncation = fit(data.matrix.astype(np.float32), keep, options)
        self.speaks = data.counts > 0

    def _dense(self, matrix: sparse.csr_matrix, keep: int, options: RunOptions) -> tuple[np.ndarray, np.ndarray, float]:
        users, items = matrix.shape
        inverse_rows = _by_users if users < items else _by_items
        rows_of, diagonal = inverse_rows(matrix, self.config.l2)
        blocks = []
        for start in range(0, items, BLOCK):
            rows = slice(start, min(start + BLOCK, items))
            weights = -rows_of(rows) / diagonal[None, :]
            weights[np.arange(len(weights)), np.arange(rows.start, rows.stop)] = 0.0
            blocks.append(largest_by_row(weights, keep))
        return join_blocks(blocks)

    def _sparse(
        self, matrix: sparse.csr_matrix, keep: int, options: RunOptions
    ) -> tuple[np.ndarray, np.ndarray, float]:
        items = matrix.shape[1]
        candidates = min(self.config.candidates, items)
        refuse_beyond_limit(matrix, candidates, "EASE")
        gram = gram_matrix(matrix)
        neighbours = nearest_by_correlation(gram, matrix.shape[0], min(candidates, NEAREST))
        groups = groups_of(neighbours, gram.diagonal(), max(1, candidates // SHARED))
        parts = []
        with progress("ease", total=items, unit="items", quiet=options.quiet) as bar:
            for part in solved(groups, lambda group: _regression(group, gram, neighbours, candidates, self.config.l2)):
                parts.append(part)
                bar.advance(len(part[0]))
        return by_history_item(assembled(parts, items), keep)


def _solver(config: Ease.Config, users: int, items: int) -> str:
    if config.solver != "auto":
        return config.solver
    return "dense" if _dense_bytes(users, items) <= LIMIT_BYTES else "sparse"


def _dense_bytes(users: int, items: int) -> int:
    return min(users, items) * items * 4  # the user side holds [U, I], not [I, I]


def _refuse_beyond_limit(users: int, items: int, keep: int, solver: str) -> None:
    """Raises MachineError; what the sparse solver needs beside its answer is refused where it is known."""
    dense = _dense_bytes(users, items) if solver == "dense" else 0
    needed = max(items * keep * 8, dense)
    if needed > LIMIT_BYTES:
        remedy = "Lower neighbours" if needed > dense else "Take solver: sparse"
        raise MachineError(
            f"EASE must fit into {LIMIT_BYTES / 1e9} GB; {users} users and {items} items with {keep} neighbours need "
            f"{needed / 1e9:.1f} GB. {remedy}, raise cleaning.k_core_items, or take item_knn."
        )


def _regression(
    group: np.ndarray, gram: sparse.csr_matrix, neighbours: Neighbours, candidates: int, l2: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regressions of a group: its items `[g]`, what each is regressed on `[g, n]` and the weights `[g, n]`."""
    scope = scope_of(group, neighbours, candidates)
    own = np.searchsorted(scope, group)
    system = submatrix(gram, scope)
    system[np.diag_indices_from(system)] += l2
    unit = np.zeros((len(scope), len(group)), np.float32)
    unit[own, np.arange(len(group))] = 1.0
    inverse = linalg.solve(system, unit, assume_a="pos", overwrite_a=True, overwrite_b=True, check_finite=False)
    weights = -inverse / inverse[own, np.arange(len(group))]
    weights[own, np.arange(len(group))] = 0.0
    return group, np.broadcast_to(scope.astype(np.int32), weights.T.shape), weights.T


def _by_items(matrix: sparse.csr_matrix, l2: float):  # type: ignore[no-untyped-def]
    gram = (matrix.T @ matrix).toarray()
    gram[np.diag_indices_from(gram)] += l2
    inverse = linalg.inv(gram, overwrite_a=True, check_finite=False)
    return (lambda rows: inverse[rows]), np.diag(inverse).copy()


def _by_users(matrix: sparse.csr_matrix, l2: float):  # type: ignore[no-untyped-def]
    gram = (matrix @ matrix.T).toarray()
    gram[np.diag_indices_from(gram)] += l2
    kernel = linalg.inv(gram, overwrite_a=True, check_finite=False)  # [U, U]
    dense = matrix.toarray()
    projected = kernel @ dense  # [U, I]
    items = matrix.T.tocsr()
    diagonal = (1.0 - np.einsum("ui,ui->i", dense, projected)) / l2

    def rows_of(rows: slice) -> np.ndarray:
        block = -(items[rows] @ projected)
        block[np.arange(len(block)), np.arange(rows.start, rows.stop)] += 1.0
        return block / l2

    return rows_of, diagonal
