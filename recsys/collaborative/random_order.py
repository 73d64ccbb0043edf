"""A random order of all items, the same for everybody: what a figure is worth is seen beside it."""

from __future__ import annotations

import numpy as np

from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import ConstantState, Member, TrainingData


class RandomOrder(ConstantState, Member):
    """Scores drawn from the seed. Reads nothing but the number of items."""

    class Config(Settings):
        """A random order has no settings."""

    @classmethod
    def depends_on_seed(cls, config: Config) -> bool:
        """It is nothing but its seed."""
        return True

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        self.scores = np.random.default_rng(self.seed).random(data.matrix.shape[1], np.float32)
        self.speaks = np.ones(len(self.scores), bool)
