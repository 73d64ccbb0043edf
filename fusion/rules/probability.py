"""Probability fusion: a weighted mean of calibrated members, weights ≥ 0 that sum to 1, given or fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field
from scipy.special import log_softmax as numpy_log_softmax
from scipy.special import softmax as numpy_softmax

from fusion.compat import keras, tf
from fusion.errors import ConfigError
from fusion.rules.base import MemberWeights, given_weights, weighted_mean
from fusion.rules.fitting import CandidateLists, ClassRows, RowLoss, list_wise_loss, minimise
from fusion.rules.scaled import ScaledRule, ScaledSettings
from fusion.types import Context, Over

ITERATIONS = 5000
"""Of the weight update over classes; it stops earlier when no weight moves by 1e-9."""

SCALES = (-7.0, 7.0)
"""Bounds of the logarithm of the scale of fused candidates; perfect lists would send it to infinity."""

LOGARITHMS = (-10.0, 10.0)
"""Bounds of the logarithms of weights over candidates, for a shrinkage of 0."""


@keras.saving.register_keras_serializable("fusion")
class Probability(ScaledRule):
    """Weighted mean: of calibrated probabilities over classes, of normalised scores over candidates.

    Weights that are not given are fitted. Classes: the log-loss of the mixture, convex in the weights, by EM
    (where members are silent on some rows, by its generalisation, see `mixture_weights`). Candidates: the
    list-wise softmax cross-entropy of `scale · Σ w·z`; the scale is fitted along and then dropped, for it
    changes no order. Both are pulled to equal weights as if `shrinkage` more rows had been seen on which all
    members were equally right (a Dirichlet prior): much with little data, nothing with plenty.
    """

    learned = True

    class Config(ScaledSettings):
        """Settings of the weighted mean."""

        weights: MemberWeights | None = None
        """A weight for each member, sum 1; fitted when not given."""
        shrinkage: float = Field(10.0, ge=0, allow_inf_nan=False)
        """How many rows of equal weights the fit imagines beside the real ones; 0 trusts the data alone."""

    config: Config

    def __init__(self, config: Config, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(config, members, over, **kwargs)
        self._number("weights", given_weights("probability", config.weights, members))

    @classmethod
    def check(cls, config: Config, members: Sequence[str]) -> None:  # type: ignore[override]
        """As `Rule.check`; given weights must name the members and sum to 1 (to a thousandth)."""
        super().check(config, members)
        given_weights("probability", config.weights, members)
        total = 1.0 if config.weights is None else sum(config.weights.values())
        if abs(total - 1.0) > 1e-3:
            raise ConfigError(
                f"the weights of the rule 'probability' must sum to 1; received a sum of {total:g}. "
                "Divide them by it, or use the rule 'average', which does."
            )

    def _shares(self) -> np.ndarray:
        return self._numbers["weights"].numpy()

    def _learns(self) -> bool:
        return self.config.weights is None or super()._learns()

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """The weighted mean's terms and bias."""
        return self._weighted_mean(features, mask, self._numbers["weights"])

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        report = super()._fit_classes(rows, seed)
        if self.config.weights is None:
            self._numbers["weights"].assign(np.full(len(self.members), 1.0 / len(self.members)))
            before = self._log_loss(rows)
            weights, iterations = mixture_weights(self._picked(rows), rows, self.config.shrinkage)
            self._numbers["weights"].assign(weights)
            report = {"loss_before": before, "loss_after": self._log_loss(rows), "iterations": iterations}
        return {**report, "weights": self._by_member(self._numbers["weights"].numpy())}

    def _picked(self, rows: ClassRows) -> np.ndarray:
        """The calibrated probability that each member gives to the true class, float64 `[N, S]`, 0 where silent."""
        calibrated = self._log_probabilities(tf.constant(rows.logits), tf.constant(rows.speaks)).numpy()
        picked = np.take_along_axis(calibrated, rows.labels[:, None, None], axis=2)[:, :, 0]
        return np.exp(np.where(rows.speaks, picked, -np.inf).astype(np.float64))

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        if self.config.weights is not None:
            return super()._fit_candidates(lists, seed)
        members, pull = len(self.members), self.config.shrinkage / len(self.members)
        rows = (lists.features, lists.speaks, lists.positives, lists.weights)

        def of_rows(parameters: Any, features: Any, speaks: Any, positives: Any, weights: Any) -> Any:
            terms, voiced = weighted_mean(features, speaks, tf.nn.softmax(parameters[:members]))
            fused = tf.exp(parameters[members]) * tf.reduce_sum(terms, axis=1)
            return list_wise_loss(fused, voiced, positives, weights)

        def penalty(steps: np.ndarray) -> tuple[float, np.ndarray]:
            logs = numpy_log_softmax(steps[:members])
            return -pull * logs.sum(), np.append(pull * (members * np.exp(logs) - 1.0), 0.0)

        loss, every = RowLoss(of_rows, rows), np.eye(members + 1)
        equal = minimise(loss, rows, np.zeros(members + 1), every[members:], [SCALES])
        fitted = minimise(loss, rows, equal.parameters, every, [*[LOGARITHMS] * members, (None, None)], penalty)
        self._numbers["weights"].assign(numpy_softmax(fitted.parameters[:members]))
        return {
            "loss_before": loss.mean(equal.parameters, rows)[0],
            "loss_after": loss.mean(fitted.parameters, rows)[0],
            "iterations": equal.iterations + fitted.iterations,
            "weights": self._by_member(self._numbers["weights"].numpy()),
        }


def mixture_weights(picked: np.ndarray, rows: ClassRows, shrinkage: float) -> tuple[np.ndarray, int]:
    """Weights on the simplex that minimise `-Σ log(Σ w·p / Σ w)`, sums over the members that speak on a row.

    Each step moves to the minimum of a bound that touches the loss (Lange, Hunter & Yang 2000), so the loss
    never rises; when all members speak on all rows it is EM for mixture weights, and the loss is convex.

    Args:
        picked: `[N, S]` probability of the true class by each member.
        rows: who speaks, and the weights of rows.
        shrinkage: pseudo-rows shared equally by the members.

    Returns:
        weights `[S]` that sum to 1, and the number of steps.
    """
    said = rows.speaks.astype(np.float64)
    likely = np.maximum(picked, 1e-300) * said
    members = said.shape[1]
    weights = np.full(members, 1.0 / members)
    steps = 0
    while steps < ITERATIONS:
        steps += 1
        responsible = likely * weights
        responsible *= (rows.weights / responsible.sum(axis=1))[:, None]
        exposure = (said * (rows.weights / (said @ weights))[:, None]).sum(axis=0)
        moved = (responsible.sum(axis=0) + shrinkage / members) / np.maximum(exposure + shrinkage, 1e-300)
        moved /= moved.sum()
        settled = np.abs(moved - weights).max() < 1e-9
        weights = moved
        if settled:
            break
    return weights, steps
