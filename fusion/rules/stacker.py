"""The learned stacker: a linear model over the members' calibrated scores, fitted out of fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from fusion.compat import keras, tf
from fusion.rules.base import Rule, RuleSettings
from fusion.rules.fitting import (
    CandidateLists,
    ClassRows,
    RowLoss,
    class_loss,
    drop_members,
    list_wise_loss,
    minimise,
)
from fusion.rules.normalisation import over_candidates, speaking
from fusion.types import Context, Over

Feature = Literal["standardise", "rank", "log_rank"]

LEVELS = (0.01, 100.0)
"""Bounds of the common level that equal weights are given before they are told apart."""

NUMBERS = ("weights", "bias", "influence", "compensation")
"""What a fit finds, in the order of its vector of parameters."""


@keras.saving.register_keras_serializable("fusion")
class Stacker(Rule):
    """A sum over members of learned weights, of any sign, times calibrated log-probabilities or features.

    Classes: multinomial logistic regression with one weight per member (`per_class`: one per member and
    class) and a bias per class. Candidates: list-wise softmax regression on the features of each member.
    Weights are shrunk (L2) toward equal weights at the level that fits best.

    It learns from out-of-fold scores only: a member's scores on rows it was fitted on are better than it is,
    and weights learned there go to whoever overfits most.

    Where members are silent, the terms of the others are multiplied by `(Σ influence of all / Σ influence of
    those that speak)^c`. A member's influence is the spread of its terms in the fit (its coefficient alone
    misleads: a member calibrated to near uniform keeps a large one). With c = 1 weights are renormalised as
    in the other rules; with c = 0 a silent member counts as indifferent. c in [0, 1] is learned, and shrunk
    to 1: an item on which only a weak member speaks must not outshout items that everybody has judged.
    Member dropout in the fit shows it all subsets.
    """

    learned = True
    member_axes: ClassVar[Mapping[str, int | None]] = {"weights": 1, "bias": None}

    class Config(RuleSettings):
        """Settings of the stacker."""

        features: tuple[Feature, ...] = Field(("standardise", "log_rank"), min_length=1)
        """Candidates: what the model sees of each member; weights are shrunk to equal ones on the first."""
        per_class: bool = False
        """Classes: a weight for each member and class instead of one for each member."""
        shrinkage: float = Field(10.0, gt=0, allow_inf_nan=False)
        """Strength of the pull to equal weights, on the loss summed over rows: it fades as rows grow."""
        member_dropout: float = Field(0.2, ge=0, lt=1)
        """Chance that the fit silences a member on a row; the last voice of a row is never silenced."""
        top_n: int = Field(1000, ge=1)
        """Candidates: how many of a member's best items have a rank."""

        @field_validator("features")
        @classmethod
        def _distinct(cls, features: tuple[Feature, ...]) -> tuple[Feature, ...]:
            if len(set(features)) < len(features):
                raise ValueError("a feature may be named once")
            return features

    config: Config

    def __init__(self, config: Config, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(config, members, over, **kwargs)
        self._number("compensation", np.ones((), np.float32))
        self._number("influence", np.full(len(self.members), 1.0 / len(self.members), np.float32))
        if over == "candidates":
            self._number("weights", self._equal_weights(1).astype(np.float32))

    def build(self, input_shape: Any) -> None:
        """Makes the weights that depend on the number of classes."""
        if self.over == "classes":
            self._number_classes(int(input_shape[-1]))
        super().build(input_shape)

    def _number_classes(self, classes: int) -> None:
        if "bias" in self._numbers:
            return
        wide = classes if self.config.per_class else 1
        self._number("weights", self._equal_weights(wide).astype(np.float32))
        self._number("bias", np.zeros(classes, np.float32))

    @property
    def in_logs(self) -> bool:
        """Fused scores are log-probabilities up to a constant."""
        return True

    def _learns(self) -> bool:
        return True

    @property
    def _features(self) -> tuple[str, ...]:
        return self.config.features if self.over == "candidates" else ("log_probability",)

    @property
    def features_per_member(self) -> int:
        """One log-probability of a class, or the chosen features of a candidate."""
        return len(self._features)

    def _equal_weights(self, wide: int) -> np.ndarray:
        """1/S on the first feature, 0 on the others, `[F, S, 1 or C]`."""
        weights = np.zeros((self.features_per_member, len(self.members), wide))
        weights[0] = 1.0 / len(self.members)
        return weights

    def scale(self, scores: Any, mask: Any = None) -> Any:
        """Classes: log-probabilities `[B, S, C]`; candidates: feature after feature, `[B, F·S, C]`."""
        if self.over == "classes":
            return self._log_probabilities(scores, mask)
        features = [over_candidates(kind, scores, mask, self.config.top_n, 1.0) for kind in self.config.features]
        return features[0] if len(features) == 1 else tf.concat(features, axis=1)

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """The learned terms, and the bias of classes where a member speaks."""
        speaks = speaking(features[:, : len(self.members)], mask)
        numbers = self._numbers
        terms, voiced = stack(features, speaks, numbers["weights"], numbers["influence"], numbers["compensation"])
        bias = self._voiceless(voiced, tf.shape(features)[2])
        if self.over == "classes":
            bias += tf.where(voiced, numbers["bias"], 0.0)
        return terms, bias

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Rule.load_state`; the number of classes is taken from the state."""
        if self.over == "classes" and "bias" in state and np.ndim(state["bias"]) == 1:
            self._number_classes(len(state["bias"]))
        super().load_state(state)

    # ---- fitting

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        classes = rows.logits.shape[2]
        self._number_classes(classes)
        self._fit_calibration(rows)
        calibrated = self._log_probabilities(tf.constant(rows.logits), tf.constant(rows.speaks)).numpy()

        def of_rows(parameters: Any, features: Any, speaks: Any, labels: Any, counts: Any) -> Any:
            weights, bias, influence, compensation = self._unpack(parameters, classes)
            terms, _ = stack(features, speaks[:, :, tf.newaxis], weights, influence, compensation)
            return counts * class_loss(tf.reduce_sum(terms, axis=1) + bias, labels)

        rows_as_given = (calibrated, rows.speaks, rows.labels, rows.weights)
        dropped = (calibrated, self._dropped(rows.speaks, seed), rows.labels, rows.weights)
        return self._regress(RowLoss(of_rows, dropped), rows_as_given, dropped, classes)

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        def of_rows(parameters: Any, features: Any, speaks: Any, positives: Any, counts: Any) -> Any:
            weights, _, influence, compensation = self._unpack(parameters, 0)
            terms, voiced = stack(features, speaks, weights, influence, compensation)
            return list_wise_loss(tf.reduce_sum(terms, axis=1), voiced, positives, counts)

        kept = lists.speaks & self._dropped(np.any(lists.speaks, axis=2), seed)[:, :, None]
        rows_as_given = (lists.features, lists.speaks, lists.positives, lists.weights)
        dropped = (lists.features, kept, lists.positives, lists.weights)
        return self._regress(RowLoss(of_rows, dropped), rows_as_given, dropped, 0)

    def _regress(
        self, loss: RowLoss, rows: Sequence[np.ndarray], dropped: Sequence[np.ndarray], classes: int
    ) -> dict[str, Any]:
        """Finds the level of equal weights, the weights around it, then the compensation; keeps them.

        The first two steps leave silent members at 0, which makes the loss convex. The compensation is a step
        of its own because influence has a cusp at 0 that no weight would cross on the way to its sign.

        Args:
            rows: what the report's losses are of; dropped: the same with members silenced, to learn from.
        """
        equal = self._equal_weights(classes if self.config.per_class else 1)
        influence, last = np.full(len(self.members), 1.0 / len(self.members)), equal.size + classes
        start = np.concatenate([np.zeros(last), influence, [0.0]])
        every, strength = np.eye(len(start)), self.config.shrinkage / 2.0

        def penalty(steps: np.ndarray) -> tuple[float, np.ndarray]:
            return strength * float(steps @ steps), 2.0 * strength * steps

        towards_equal = np.concatenate([equal.ravel(), np.zeros(len(start) - equal.size)])
        level = minimise(loss, dropped, start, towards_equal[None, :], [LEVELS])
        fitted = minimise(loss, dropped, level.parameters, every[:last], penalty=penalty)
        parameters = fitted.parameters.copy()
        weights = parameters[: equal.size].reshape(equal.shape)
        parameters[last:] = [*_spread_of_terms(rows[0], rows[1], weights), 1.0]
        final = minimise(loss, dropped, parameters, every[-1:], [(-1.0, 0.0)], penalty)

        learned = self._unpack(final.parameters.astype(np.float32), classes)
        for name, value in zip(NUMBERS, learned, strict=True):
            if name in self._numbers:
                self._numbers[name].assign(value)
        level.parameters[-1] = 1.0
        return {
            "loss_before": loss.mean(level.parameters, rows)[0],
            "loss_after": loss.mean(final.parameters, rows)[0],
            "iterations": level.iterations + fitted.iterations + final.iterations,
            **self._coefficients(),
        }

    def _unpack(self, parameters: Any, classes: int) -> tuple[Any, Any, Any, Any]:
        """One vector as `NUMBERS`: `[F, S, 1 or C]`, `[C]` (nothing over candidates), `[S]` and a scalar."""
        wide, members = classes if self.config.per_class and classes else 1, len(self.members)
        shape = (self.features_per_member, members, wide)
        size = int(np.prod(shape))
        weights, rest = tf.reshape(parameters[:size], shape), parameters[size:]
        return weights, rest[:classes], rest[classes : classes + members], rest[classes + members]

    def _dropped(self, spoken: np.ndarray, seed: int) -> np.ndarray:
        return drop_members(spoken, self.members, self.config.member_dropout, seed)

    def _coefficients(self) -> dict[str, Any]:
        """What was learned, for the report: influence as `weights`, and the coefficients with their signs."""
        coefficients = self._numbers["weights"].numpy().mean(axis=2)
        return {
            "weights": self._by_member(self._numbers["influence"].numpy()),
            "coefficients": {
                feature: self._by_member(values) for feature, values in zip(self._features, coefficients, strict=True)
            },
            "compensation": float(self._numbers["compensation"].numpy()),
        }


def _spread_of_terms(features: np.ndarray, speaks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Standard deviation of each member's terms within rows, over the entries that it speaks on, `[S]`.

    Args:
        features: `[N, F·S, C]`; speaks: bool `[N, S]` or `[N, S, C]`; weights: `[F, S, 1 or C]`.
    """
    members = weights.shape[1]
    spreads = np.zeros(members)
    for s in range(members):
        said = np.broadcast_to(speaks[:, s].reshape(len(features), -1), features[:, s].shape)
        terms = sum(np.where(said, features[:, f * members + s], 0) * w[s] for f, w in enumerate(weights))
        count = np.maximum(said.sum(axis=1, keepdims=True), 1)
        centred = np.where(said, terms - terms.sum(axis=1, keepdims=True, where=said) / count, 0)
        spreads[s] = np.sqrt(np.square(centred).sum() / max(said.sum(), 1))
    return spreads


def stack(features: Any, speaks: Any, weights: Any, influence: Any, compensation: Any) -> tuple[Any, Any]:
    """The stacker's terms, and where they are defined; the same code when fitting and when serving.

    Args:
        features: `[B, F·S, C]`, all members' first feature first; anything where silent.
        speaks: bool, broadcastable to `[B, S, C]`.
        weights: `[F, S, 1 or C]`.
        influence: `[S]`, ≥ 0; compensation: scalar c in [0, 1]; see `Stacker`.

    Returns:
        terms `[B, S, C]`, 0 where silent; voiced, bool `[B, C]`: a member with influence speaks.
    """
    members = weights.shape[1]
    zero, one = tf.zeros([], features.dtype), tf.ones([], features.dtype)
    terms = sum(
        tf.where(speaks, features[:, f * members : (f + 1) * members], zero) * weights[f]
        for f in range(weights.shape[0])
    )
    influence = tf.cast(influence, features.dtype)[:, tf.newaxis]
    spoken = tf.reduce_sum(tf.where(speaks, influence, zero), axis=1, keepdims=True)  # [B, 1, 1 or C]
    voiced = spoken > 0
    missing = tf.reduce_sum(influence) / tf.where(voiced, spoken, one)
    factor = tf.where(voiced, tf.pow(tf.where(voiced, missing, one), compensation), zero)
    return terms * factor, voiced[:, 0]
