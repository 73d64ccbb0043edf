"""Mean fusion: the arithmetic, geometric or rank mean of the members that speak. Learns no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from fusion.rules.base import MemberWeights, Rule, RuleSettings, given_weights
from fusion.rules.normalisation import Normalisation, exponential, over_candidates, ranks, speaking
from fusion.types import Context, Over

Mean = Literal["arithmetic", "geometric", "rank"]

OVER_CANDIDATES: dict[Mean, Normalisation] = {
    "arithmetic": "standardise",
    "geometric": "softmax",
    "rank": "rank",
}

ALL_CLASSES = 2**31 - 1
"""A length that `ranks` cuts to the number of classes."""


@keras.saving.register_keras_serializable("fusion")
class Average(Rule):
    """Mean over members.

    | mean       | classes                             | candidates                               |
    |------------|-------------------------------------|------------------------------------------|
    | arithmetic | of probabilities                    | of z-scores per user                     |
    | geometric  | of log-probabilities                | of log-softmax of z-scores / temperature |
    | rank       | of (C - r)/C, r = 0 for the best    | of (N - r)/N in a member's top N, else 0 |
    """

    class Config(RuleSettings):
        """Settings of the average."""

        mean: Mean = "arithmetic"
        """Which mean: arithmetic, geometric or rank."""
        weights: MemberWeights | None = None
        """A weight for each member; equal when not given."""
        temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
        """Geometric mean over candidates: what z-scores are divided by before the softmax."""
        top_n: int = Field(1000, ge=1)
        """Rank mean over candidates: how many of a member's best items get points."""
        doubt: float = Field(0.0, ge=0, allow_inf_nan=False)
        """Arithmetic mean over candidates: so many more members of mean weight are imagined, to whom every item is like
        any other. The word of one member alone then lifts an item less than the same word of many."""

        @pydantic.model_validator(mode="after")
        def _doubt_has_a_scale(self) -> Average.Config:
            if self.doubt and self.mean != "arithmetic":
                raise ValueError(f"the key doubt must go with mean arithmetic; received mean {self.mean}")
            return self

    config: Config

    def __init__(self, config: Config, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(config, members, over, **kwargs)
        self._weights = given_weights("average", config.weights, members)
        self.differentiable = config.mean != "rank"

    @classmethod
    def check(cls, config: Config, members: Sequence[str]) -> None:  # type: ignore[override]
        """As `Rule.check`; given weights must name the members."""
        super().check(config, members)
        given_weights("average", config.weights, members)

    def _shares(self) -> np.ndarray:
        return self._weights

    @property
    def in_logs(self) -> bool:
        """Whether the fused scores are means of log-probabilities."""
        return self.config.mean == "geometric"

    def scale(self, scores: Any, mask: Any = None) -> Any:
        """Probabilities, log-probabilities, z-scores or ranks, as the table of the class says."""
        config = self.config
        if self.over == "candidates":
            kind = OVER_CANDIDATES[config.mean]
            return over_candidates(kind, scores, mask, config.top_n, config.temperature)
        log_probabilities = self._log_probabilities(scores, mask)
        if config.mean == "rank":
            return ranks(log_probabilities, speaking(log_probabilities), ALL_CLASSES)
        return log_probabilities if self.in_logs else exponential(log_probabilities)

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """The mean's terms and bias."""
        terms, bias = self._weighted_mean(features, mask, self._weights)
        if self.config.doubt and self.over == "candidates":
            heard = tf.where(speaking(features, mask), self._weights[:, np.newaxis], 0.0)
            spoken = tf.reduce_sum(heard, axis=1, keepdims=True)
            # A z-score of 0 is what an item like any other has, so those imagined add to the divisor alone.
            imagined = self.config.doubt * self._weights[self._weights > 0].mean()
            terms *= spoken / (spoken + imagined)
        return terms, bias
