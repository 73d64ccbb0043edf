"""EASE: the closed-form item × item regression, kept as each item's largest weights."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy import linalg, sparse

from fusion.config import Settings
from fusion.errors import MachineError
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, NeighbourState, TrainingData, join_blocks, largest_by_row

BLOCK = 1024
LIMIT_BYTES = 1_500_000_000


class Ease(NeighbourState, Member):
    """B = I - P diag(1 / diag P) with P = (X'X + l2 I)^-1 (Steck 2019, "Embarrassingly Shallow Autoencoders").

    Where there are fewer users than items, P comes from the smaller users × users system by the Woodbury
    identity: P = (I - X' (XX' + l2 I)^-1 X) / l2, so the cost is cubic in the smaller side. Refuses a
    catalogue whose dense matrix, or whose kept neighbours, would exceed 1.5 GB.
    """

    class Config(Settings):
        """Settings of EASE."""

        l2: float = Field(200.0, gt=0)
        """Strength of the ridge penalty."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        neighbours: int = Field(500, ge=1, le=50_000)
        """How many weights of each item are kept, the largest by magnitude; the rest is the truncation loss."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        users, items = data.matrix.shape
        keep = min(self.config.neighbours, items)
        _refuse_beyond_limit(users, items, keep)
        inverse_rows = _by_users if users < items else _by_items
        rows_of, diagonal = inverse_rows(data.matrix.astype(np.float32), self.config.l2)
        blocks = []
        for start in range(0, items, BLOCK):
            rows = slice(start, min(start + BLOCK, items))
            weights = -rows_of(rows) / diagonal[None, :]
            weights[np.arange(len(weights)), np.arange(rows.start, rows.stop)] = 0.0
            blocks.append(largest_by_row(weights, keep))
        self.index, self.weight, self.truncation = join_blocks(blocks)
        self.speaks = data.counts > 0


def _refuse_beyond_limit(users: int, items: int, keep: int) -> None:
    needed = max(items * keep * 8, min(users, items) * items * 4)  # the user side holds [U, I], not [I, I]
    if needed > LIMIT_BYTES:
        raise MachineError(
            f"EASE must fit into {LIMIT_BYTES / 1e9} GB; {users} users and {items} items with {keep} neighbours need "
            f"{needed / 1e9:.1f} GB. Lower neighbours, raise cleaning.k_core_items, or take item_knn."
        )


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
