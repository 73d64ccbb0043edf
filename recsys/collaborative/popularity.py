"""Popularity: what everybody takes. The baseline that a personal member has to beat."""

from __future__ import annotations

import numpy as np

from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import ConstantState, Member, TrainingData


class Popularity(ConstantState, Member):
    """Score = log(1 + number of positive interactions in training), the same for every user."""

    class Config(Settings):
        """Popularity has no settings."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        self.scores = np.log1p(data.counts).astype(np.float32)
        self.speaks = data.counts > 0
