"""A spectral graph filter without training: smoothing over shared users, and an ideal low-pass."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fusion.compat import tf
from fusion.config import Settings
from fusion.types import RunOptions, derive_seed
from recsys.collaborative.base import Decay, LowRankScorer, Member, NeighbourScorer, NeighbourState, TrainingData
from recsys.collaborative.neighbours import power_diagonal, strongest_of_product
from recsys.collaborative.svd import right_singular_vectors, root_rank


class SpectralFilter(NeighbourState, Member):
    """score = h (R~'R~ + low_pass Di^-1/2 V V' Di^1/2) with R~ = Du^-1/2 R Di^-1/2 and V its leading right singular
    vectors (GF-CF; Shen et al. 2021, "How powerful is graph convolution for recommendation?").

    D holds how many interactions users and items have. The linear filter R~'R~ is kept as each item's strongest
    neighbours without the item itself, the low-pass as two tables of `rank` columns. Both scale with the length
    of the history. `popularity_exponent` stands in place of the 1/2 of Di.

    The defaults are the published ones, for check-ins and purchases. A few hundred people who rated hundreds of films
    each were served better by an exponent of 0.3 to 0.4 with a low-pass of 1 to 3.
    """

    class Config(Settings):
        """Settings of the spectral filter."""

        rank: int | None = Field(None, ge=1, le=2048)
        """How many singular vectors pass, the higher frequencies being cut off; null for one and a half times the root
        of the number of users, or of items where those are fewer."""
        low_pass: float = Field(0.3, gt=0)
        """Weight of the ideal low-pass beside the linear filter."""
        popularity_exponent: float = Field(0.5, ge=0, le=1)
        """How much popular items count less in the normalised matrix; 1/2 is the symmetric normalisation."""
        neighbours: int = Field(200, ge=1, le=10_000)
        """How many neighbours of each item the linear filter keeps; the rest is the truncation loss."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        exponent = self.config.popularity_exponent
        normalised = power_diagonal(np.diff(data.matrix.indptr), -0.5) @ data.matrix.astype(np.float32)
        normalised = (normalised @ power_diagonal(data.counts, -exponent)).tocsr()
        self.index, self.weight, self.truncation = strongest_of_product(
            normalised.T.tocsr(), normalised, self.config.neighbours
        )
        rank = self.config.rank or root_rank(normalised.shape, 1.5)
        vectors = right_singular_vectors(normalised, rank, derive_seed(self.seed, "svd"))
        self.history_table = power_diagonal(data.counts, -exponent) @ vectors
        self.item_table = self.config.low_pass * (power_diagonal(data.counts, exponent) @ vectors)
        self.speaks = data.counts > 0

    def state(self) -> dict[str, np.ndarray]:
        return {**super().state(), "history_table": self.history_table, "item_table": self.item_table}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        super().load_state(state)
        self.history_table, self.item_table = state["history_table"], state["item_table"]

    def scorer(self) -> tf.Module:
        decay = self.config.decay
        return _Sum(
            NeighbourScorer(self.index, self.weight, decay), LowRankScorer(self.history_table, self.item_table, decay)
        )


class _Sum(tf.Module):
    """The sum of two scorers."""

    def __init__(self, linear: tf.Module, low_pass: tf.Module) -> None:
        super().__init__()
        self.linear, self.low_pass = linear, low_pass

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.linear(history) + self.low_pass(history)
