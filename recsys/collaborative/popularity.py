"""Popularity: what everybody takes. The baseline that a personal member has to beat."""

from __future__ import annotations

import numpy as np

from fusion.compat import tf
from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import Member, TrainingData, constant


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
        return _Constant(self.scores)


class _Constant(tf.Module):
    def __init__(self, scores: np.ndarray) -> None:
        super().__init__()
        self.scores = constant(scores, tf.float32, "popularity")

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return tf.zeros([tf.shape(history)[0], 1]) + self.scores
