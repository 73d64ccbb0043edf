"""What rules share that weigh the members by a softmax over those that speak: the mean, and how it is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from fusion.compat import tf
from fusion.rules.base import softmax_mean
from fusion.rules.fitting import CandidateLists, ClassRows, Minimum, RowLoss, drop_members, list_wise_loss, minimise
from fusion.rules.normalisation import Normalisation, speaking
from fusion.rules.scaled import ScaledRule, ScaledSettings
from fusion.types import Context, Over

LEAST = 1e-30
"""Probabilities below count as this much in the loss, so that its logarithm stays finite."""


class MixtureSettings(ScaledSettings):
    """Settings of rules that fit the weights of a mean by gradient."""

    normalisation: Normalisation = "standardise"
    """Candidates: the scale on which members are mixed: standardise, rank, log_rank, softmax or none."""
    shrinkage: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Strength of the pull to equal weights, on the loss summed over rows: it fades as rows grow."""
    member_dropout: float = Field(0.2, ge=0, lt=1)
    """Chance that the fit silences a member on a row; the last voice of a row is never silenced."""


class MixtureRule(ScaledRule):
    """A mean over the members that speak, with weights `softmax(logits)` that may differ from entry to entry.

    A rule says what its parameters are and which logits they give. All parameters at their start mean equal
    weights, and the fit pulls each one back there: `shrinkage / 2 · Σ (parameter - start)²` is added to the loss
    summed over rows (a Gaussian prior). Classes: the log-loss of the mixture. Candidates: the list-wise softmax
    cross-entropy of the mean times a scale, which is fitted along and then dropped, for it changes no order; its
    logarithm is pulled with a strength of 1, or a few perfect lists would make it and all slopes endless.

    The pull is strong by default, because the rows of the fit are never quite those that come later: on three rankings
    of 650 to 950 users NDCG@10 on validation was as high as with a tenth of it, or higher, though the tenth lowered
    the loss of the fit far more.
    """

    learned = True
    config: MixtureSettings

    def __init__(self, config: MixtureSettings, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(config, members, over, **kwargs)
        self._sizes: dict[str, tuple[int, ...]] = {}

    # ---- what a rule of this kind defines

    def _member_logits(self, numbers: Mapping[str, Any], features: Any, speaks: Any, context: Context) -> Any:
        """Logits of the members, broadcastable to `[B, S, C]`, in the dtype of the features.

        Args:
            numbers: the parameters by name, as `_parameter` made them.
            features: `[B, S, C]` of `normalise`; speaks: bool, broadcastable to it.
            context: what `reads` names.
        """
        raise NotImplementedError

    def _prepare(self, features: np.ndarray, speaks: np.ndarray, context: Context, weights: np.ndarray | None) -> None:
        """Fits what is not learned by gradient, such as the scale of the context.

        Args:
            weights: `[N, K]` over candidates, 0 for padding; None over classes.
        """

    def _start(self, seed: int) -> dict[str, np.ndarray]:
        """The parameters from which the fit starts and to which it is pulled; equal weights."""
        return {name: np.zeros(shape) for name, shape in self._sizes.items()}

    # ---- what they share

    def _learns(self) -> bool:
        return True

    def _parameter(self, name: str, shape: tuple[int, ...]) -> None:
        """Makes a parameter that is learned by gradient; 0 until then."""
        self._number(name, np.zeros(shape, np.float32))
        self._sizes[name] = shape

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """The mean's terms and bias."""
        speaks = speaking(features, mask)
        logits = self._member_logits(self._numbers, features, speaks, self._context(context))
        terms, voiced = softmax_mean(features, speaks, logits)
        return terms, self._voiceless(voiced, tf.shape(features)[2])

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        self._fit_calibration(rows)
        features = self.scale(tf.constant(rows.logits), tf.constant(rows.speaks)).numpy()
        speaks = rows.speaks[:, :, None]
        self._prepare(features, speaks, rows.context, None)

        def of_rows(parameters: Any, features: Any, speaks: Any, labels: Any, counts: Any, *context: Any) -> Any:
            fused, _ = self._fused(parameters, features, speaks, context)
            total = tf.reduce_sum(fused, axis=1)  # not 1 where weights differ from class to class
            return -counts * tf.math.log(tf.maximum(tf.gather(fused, labels, batch_dims=1) / total, LEAST))

        dropped = self._dropped(rows.speaks, seed)[:, :, None]
        arrays = (features, dropped, rows.labels, rows.weights, *rows.context.values())
        loss, start = RowLoss(of_rows, arrays), self._flat(self._start(seed))
        every, strength = np.eye(len(start)), self.config.shrinkage
        fitted = minimise(loss, arrays, start, every, penalty=lambda steps: _pull(steps, strength))
        self._keep(fitted.parameters)
        return self._report(loss, (features, speaks, *arrays[2:]), start, fitted)

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        self._prepare(lists.features, lists.speaks, lists.context, lists.weights)

        def of_rows(parameters: Any, features: Any, speaks: Any, positives: Any, weights: Any, *context: Any) -> Any:
            fused, voiced = self._fused(parameters[:-1], features, speaks, context)
            return list_wise_loss(tf.exp(parameters[-1]) * fused, voiced, positives, weights)

        dropped = lists.speaks & self._dropped(np.any(lists.speaks, axis=2), seed)[:, :, None]
        arrays = (lists.features, dropped, lists.positives, lists.weights, *lists.context.values())
        loss, start = RowLoss(of_rows, arrays), np.append(self._flat(self._start(seed)), 0.0)
        every = np.eye(len(start))
        equal = minimise(loss, arrays, start, every[-1:], penalty=lambda steps: _pull(steps, 1.0))
        strength = np.append(np.full(len(start) - 1, self.config.shrinkage), 1.0)
        fitted = minimise(loss, arrays, equal.parameters, every, penalty=lambda steps: _pull(steps, strength))
        self._keep(fitted.parameters[:-1])
        return self._report(loss, (lists.features, lists.speaks, *arrays[2:]), equal.parameters, fitted)

    def _fused(self, parameters: Any, features: Any, speaks: Any, context: Sequence[Any]) -> tuple[Any, Any]:
        """The mean `[n, C]` and where it is defined, from a vector of parameters; when fitting."""
        named = dict(zip(self.reads(self.config), context, strict=True))
        logits = self._member_logits(self._named(parameters), features, speaks, named)
        terms, voiced = softmax_mean(features, speaks, logits)
        return tf.reduce_sum(terms, axis=1), voiced

    def _dropped(self, spoken: np.ndarray, seed: int) -> np.ndarray:
        return drop_members(spoken, self.members, self.config.member_dropout, seed)

    def _flat(self, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([numbers[name].ravel() for name in self._sizes])

    def _named(self, parameters: Any) -> dict[str, Any]:
        """One vector cut into the parameters by name."""
        sizes = [int(np.prod(shape)) for shape in self._sizes.values()]
        parts = tf.split(parameters, sizes)
        return {name: tf.reshape(part, self._sizes[name]) for name, part in zip(self._sizes, parts, strict=True)}

    def _keep(self, parameters: np.ndarray) -> None:
        for name, value in self._named(tf.constant(parameters, tf.float32)).items():
            self._numbers[name].assign(value)

    def _report(
        self, loss: RowLoss, arrays: Sequence[np.ndarray], equal: np.ndarray, fitted: Minimum
    ) -> dict[str, Any]:
        """Losses and mean weights over rows as they were given; `history` is of what was minimised, members dropped."""
        features, speaks, _, _, *context = arrays
        named = dict(zip(self.reads(self.config), context, strict=True))
        logits = self._member_logits(self._numbers, tf.constant(features), tf.constant(speaks), named)
        shares = softmax_mean(tf.ones_like(features), tf.constant(speaks), logits)[0].numpy()
        shares = shares.sum(axis=(0, 2), dtype=np.float64)
        return {
            "loss_before": loss.mean(equal, arrays)[0],
            "loss_after": loss.mean(fitted.parameters, arrays)[0],
            "iterations": fitted.iterations,
            "history": fitted.history,
            "weights": self._by_member(shares / shares.sum()),
        }


def _pull(steps: np.ndarray, strength: Any) -> tuple[float, np.ndarray]:
    """The penalty `Σ strength / 2 · step²` and its gradient; strength a number or `[d]`."""
    return float(np.sum(strength * steps**2) / 2.0), strength * steps
