"""A random order of all items, the same for everybody: what a figure is worth is seen beside it."""

from __future__ import annotations

import numpy as np

from fusion.compat import tf
from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import ConstantScorer, Member, TrainingData


class RandomOrder(Member):
    """Scores drawn from the seed. Reads nothing but the number of items."""

    class Config(Settings):
        """A random order has no settings."""

    personal = False

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        self.scores = np.random.default_rng(self.seed).random(data.matrix.shape[1], np.float32)
        self.speaks = np.ones(len(self.scores), bool)

    def state(self) -> dict[str, np.ndarray]:
        return {"scores": self.scores, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.scores, self.speaks = state["scores"], state["speaks"]

    def scorer(self) -> tf.Module:
        return ConstantScorer(self.scores)
