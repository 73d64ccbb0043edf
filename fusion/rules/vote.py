"""Vote fusion: the majority's class, or Borda and reciprocal-rank points of rankings. Learns no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.rules.base import MemberWeights, Rule, RuleSettings, given_weights
from fusion.rules.normalisation import list_length, silence, speaking, speaking_candidates, spread_by_rank
from fusion.types import Context, Over

RESOLUTION = 1e-5
"""Sums of votes closer than this share of all weights are a tie."""

TIE_BREAK = 1e-2
"""Most that mean probabilities add: enough for float32 to tell them apart to 1e-5, and the same for every
subset of up to 25 equal members."""


@keras.saving.register_keras_serializable("fusion")
class Vote(Rule):
    """Votes of the members that speak, each with its weight.

    Classes: a member votes for its most probable class (of equal ones the lower number). The class with the
    largest share of the votes wins; between tied classes the one with the higher mean probability. The fused
    score is `(1 - e)·share of votes + e·mean probability`, e so small that it decides ties and nothing else.

    Candidates: a member gives points to its top N items and 0 to the rest, and the fused score is the mean of
    the points: `borda` N, N-1, ... 1; `reciprocal_rank` 1/(k + rank), rank from 1 (Cormack et al. 2009).
    """

    differentiable = False

    class Config(RuleSettings):
        """Settings of the vote."""

        method: Literal["borda", "reciprocal_rank"] = "reciprocal_rank"
        """Candidates: how places become points."""
        k: float = Field(60.0, ge=0, allow_inf_nan=False)
        """Candidates: what `reciprocal_rank` adds to the rank; the larger, the less first ranks stand out."""
        top_n: int = Field(1000, ge=1)
        """Candidates: how many of a member's best items get points."""
        weights: MemberWeights | None = None
        """A weight for each member's vote; equal when not given."""

    config: Config

    def __init__(self, config: Config, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(config, members, over, **kwargs)
        self._weights = given_weights("vote", config.weights, members)
        # A quarter of the smallest difference of two sums of votes cannot overturn one.
        self._tie_break = min(TIE_BREAK, smallest_margin(self._weights) / 4.0)

    @classmethod
    def check(cls, config: Config, members: Sequence[str]) -> None:  # type: ignore[override]
        """As `Rule.check`; given weights must name the members."""
        super().check(config, members)
        given_weights("vote", config.weights, members)

    def _shares(self) -> np.ndarray:
        return self._weights

    def scale(self, scores: Any, mask: Any = None) -> Any:
        """Classes: log-probabilities; candidates: points of the places."""
        if self.over == "classes":
            return self._log_probabilities(scores, mask)
        places = list_length(scores, self.config.top_n)
        rank = tf.cast(tf.range(places), tf.float32) + 1.0
        if self.config.method == "borda":
            points = tf.cast(places, tf.float32) + 1.0 - rank
        else:
            points = 1.0 / (self.config.k + rank)
        return spread_by_rank(scores, speaking_candidates(scores, mask), points)

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """The mean of ballots or of points."""
        return self._weighted_mean(self._ballots(features) if self.over == "classes" else features, mask, self._weights)

    def _ballots(self, log_probabilities: Any) -> Any:
        """One vote a member, with a little of its probabilities to break ties, `[B, S, C]`."""
        speaks = speaking(log_probabilities)
        known = tf.where(speaks, log_probabilities, 0.0)
        choice = tf.one_hot(tf.argmax(known, axis=2, output_type=tf.int32), tf.shape(known)[2])
        return silence((1.0 - self._tie_break) * choice + self._tie_break * tf.exp(known), speaks)


def smallest_margin(weights: np.ndarray) -> float:
    """The smallest positive difference between the votes of two classes, whoever votes for which.

    That is the least positive |sum of c·w| with each c in {-1, 0, 1}.

    Args:
        weights: `[S]`, ≥ 0, sum 1.

    Returns:
        At least `RESOLUTION`; smaller differences count as ties.

    >>> round(smallest_margin(np.array([0.5, 0.3, 0.2])), 6)
    0.1
    """
    sums = np.zeros(1)
    for weight in weights.astype(np.float64):
        reached = np.concatenate([sums, np.abs(sums + weight), np.abs(sums - weight)])
        # Merging sums that are the same but for rounding keeps equal weights from growing as 3^S.
        _, first = np.unique(np.round(reached * 1e6), return_index=True)
        sums = reached[first]
    return float(sums[sums > RESOLUTION].min())
