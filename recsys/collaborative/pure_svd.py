"""PureSVD: a history projected onto the leading singular vectors of who took what."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fusion.compat import tf
from fusion.config import Settings
from fusion.types import RunOptions, derive_seed
from recsys.collaborative.base import Decay, LowRankScorer, Member, TrainingData
from recsys.collaborative.neighbours import power_diagonal
from recsys.collaborative.svd import right_singular_vectors, root_rank


class PureSVD(Member):
    """score = h V V', V being the leading right singular vectors of the matrix, and h the history as ones and zeros
    (Cremonesi et al. 2010, "Performance of recommender algorithms on top-N recommendation tasks").

    The columns of the matrix are divided by their item's count to the power of `popularity_exponent` before the
    decomposition (EigenRec, Nikolakopoulos et al. 2019, with d = 1 - 2 x the exponent): with 0 this is PureSVD.
    """

    class Config(Settings):
        """Settings of PureSVD."""

        rank: int | None = Field(None, ge=1, le=2048)
        """How many singular vectors are kept; null for half the root of the number of users, or of items."""
        popularity_exponent: float = Field(0.0, ge=0, le=1)
        """How much popular items count less in the decomposition: 0 not at all, 0.5 all items the same."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        scaled = data.matrix @ power_diagonal(data.counts, -self.config.popularity_exponent)
        rank = self.config.rank or root_rank(scaled.shape, 0.5)
        self.vectors = right_singular_vectors(scaled.tocsr(), rank, derive_seed(self.seed, "svd"))
        self.speaks = data.counts > 0

    def state(self) -> dict[str, np.ndarray]:
        return {"vectors": self.vectors, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.vectors, self.speaks = state["vectors"], state["speaks"]

    def scorer(self) -> tf.Module:
        return LowRankScorer(self.vectors, self.vectors, self.config.decay)
