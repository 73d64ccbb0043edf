"""Random walks of three steps over who took what: P3alpha, RP3beta, and link propagation with free exponents."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, NeighbourState, TrainingData
from recsys.collaborative.neighbours import power_diagonal, strongest_of_product


class RP3Beta(NeighbourState, Member):
    """weight(j, i) = d_j^-a sum over the users v of both of d_v^-b d_i^-c, where d counts the interactions of an
    item or a user: the chance of walking from item j of the history over a user to item i, made less for the popular.

    a = b = alpha and c = 0 is P3alpha (Cooper et al. 2014, "Random walks in recommender systems: exact computation
    and simulations"), a = b = alpha and c = beta is RP3beta (Paudel et al. 2017, "Updatable, accurate, diverse, and
    scalable recommendations for interactive applications"), three exponents of their own are the linkage
    score of Fu et al. 2022 ("Revisiting neighborhood-based link prediction for collaborative filtering", LinkProp;
    without the degree of who asks, which does not change their ranking). The step back to item j is left out.
    """

    class Config(Settings):
        """Settings of the random walk."""

        history_exponent: float = Field(0.5, ge=0, le=2)
        """a: how much a popular item of the history counts less; 1 divides by how often it was taken."""
        user_exponent: float = Field(0.5, ge=0, le=2)
        """b: how much a user who took many items counts less as a way between two of them."""
        popularity_exponent: float = Field(0.45, ge=0, le=2)
        """c: how much an item that is asked about loses by its popularity; 0 leaves the popular ahead."""
        neighbours: int = Field(200, ge=1, le=10_000)
        """How many items are kept that each item leads to."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        matrix, config = data.matrix.astype(np.float32), self.config
        user_degrees, item_degrees = np.diff(matrix.indptr), data.counts
        to_users = power_diagonal(item_degrees, -config.history_exponent) @ matrix.T
        to_users = (to_users @ power_diagonal(user_degrees, -config.user_exponent)).tocsr()
        to_items = (matrix @ power_diagonal(item_degrees, -config.popularity_exponent)).tocsr()
        self.index, self.weight, self.truncation = strongest_of_product(to_users, to_items, config.neighbours)
        self.speaks = item_degrees > 0
