"""Sequential rules: what people take soon after what. The one member that reads the order of a history."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, NeighbourState, TrainingData
from recsys.collaborative.neighbours import strongest_of_rows


class SequentialRules(NeighbourState, Member):
    """weight(i, j) = sum over users of 1 / (steps from i to j) / (sqrt(n_i n_j) + shrinkage).

    The rules of Ludewig & Jannach 2018 ("Evaluation of session-based recommendation algorithms", SR), normalised
    like a cosine so that popular items do not follow everything. Pairs against the order of time count `backward`.
    In an answer the latest items of a history weigh most. Without times histories stand in the order of item numbers,
    which says nothing: the member is silent then.
    """

    class Config(Settings):
        """Settings of sequential rules."""

        window: int = Field(10, ge=1, le=200)
        """How many steps apart two items of a history may be."""
        backward: float = Field(0.5, ge=0, le=1)
        """What a pair counts in the direction against time."""
        decay: Decay = 0.9
        """What an item of a history counts in an answer, relative to the one taken after it."""
        shrinkage: float = Field(10.0, ge=0)
        """Added to the denominator: pulls weights that rest on few users toward zero."""
        neighbours: int = Field(200, ge=1, le=10_000)
        """How many followers of each item are kept."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        root = np.sqrt(data.counts.astype(np.float32))

        def normalised(rows: np.ndarray, columns: np.ndarray, sums: np.ndarray) -> np.ndarray:
            return sums / (root[rows] * root[columns] + self.config.shrinkage + 1e-12)

        ordered = in_order_of_time(data.matrix)
        items = data.matrix.shape[1]
        follows = self._follows(data.matrix) if ordered else sparse.csr_matrix((items, items), dtype=np.float32)
        self.index, self.weight, self.truncation = strongest_of_rows(follows, self.config.neighbours, normalised)
        self.speaks = (data.counts > 0) & ordered

    def _follows(self, matrix: sparse.csr_matrix) -> sparse.csr_matrix:
        """`[I, I]`: how often, and how closely, an item (column) comes after another one (row)."""
        items = matrix.shape[1]
        users = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        forward = sparse.csr_matrix((items, items), dtype=np.float32)
        for steps in range(1, self.config.window + 1):
            same = users[steps:] == users[:-steps]
            earlier, later = matrix.indices[:-steps][same], matrix.indices[steps:][same]
            weight = np.full(len(earlier), 1.0 / steps, np.float32)
            forward += sparse.csr_matrix((weight, (earlier, later)), shape=(items, items))
        return (forward + self.config.backward * forward.T).tocsr()


def in_order_of_time(matrix: sparse.csr_matrix) -> bool:
    """Whether histories have an order of their own: at least one is not in the order of item numbers."""
    users = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return bool(np.any((np.diff(matrix.indices) < 0) & (np.diff(users) == 0)))
