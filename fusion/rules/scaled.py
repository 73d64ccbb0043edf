"""What rules share that weigh the members' calibrated probabilities or scaled scores, whatever finds the weights."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fusion.rules.base import Rule, RuleSettings
from fusion.rules.normalisation import Normalisation, exponential, over_candidates


class ScaledSettings(RuleSettings):
    """Settings of the scale on which members are put side by side."""

    normalisation: Normalisation = "log_rank"
    """Candidates: the scale on which members are mixed: standardise, rank, log_rank, softmax or none."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Candidates: what z-scores are divided by before the softmax."""
    top_n: int = Field(1000, ge=1)
    """Candidates: how many of a member's best items have a rank."""


class ScaledRule(Rule):
    """A rule over probabilities of classes, or over candidates on the scale that `normalisation` names."""

    config: ScaledSettings

    def scale(self, scores: Any, mask: Any = None) -> Any:
        """Classes: calibrated probabilities; candidates: as the key `normalisation` says."""
        if self.over == "classes":
            return exponential(self._log_probabilities(scores, mask))
        config = self.config
        return over_candidates(config.normalisation, scores, mask, config.top_n, config.temperature)
