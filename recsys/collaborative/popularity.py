"""Popularity: what everybody takes. The baseline that a personal member has to beat."""

from __future__ import annotations

import numpy as np

from fusion.compat import tf
from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import ConstantScorer, Member, TrainingData


class Popularity(Member):
    """Score = log(1 + number of positive interactions in training), the same for every user."""

    class Config(Settings):
        """Popularity has no settings."""

    personal = False

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        self.scores = np.log1p(data.counts).astype(np.float32)
        self.speaks = data.counts > 0

    def state(self) -> dict[str, np.ndarray]:
        return {"scores": self.scores, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.scores, self.speaks = state["scores"], state["speaks"]

    def scorer(self) -> tf.Module:
        return ConstantScorer(self.scores)
