"""What the stackers that are not linear share: the linear one, and on top of it a correction that starts at zero."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.rules.base import Rule
from fusion.rules.context import fit_scale, standardised
from fusion.rules.fitting import CandidateLists, ClassRows, list_wise_loss
from fusion.rules.shapley import ShapleyRule
from fusion.rules.stacker import Stacker, stack
from fusion.types import Context, derive_seed

SHORTLIST, DRAWN = 24, 8
"""Classes of a row that a correction is fitted on: the likeliest ones, and some drawn from the rest for all of it."""


@dataclass(frozen=True)
class Lists:
    """What a correction is fitted on, over classes and over candidates alike: each row asks for its positives.

    Attributes:
        inputs: float32 `[N, D, K]`, see `CorrectedStacker`.
        linear: float32 `[N, K]`, the linear score that is to be corrected.
        voiced: bool `[N, K]`, a member speaks.
        positives: bool `[N, K]`.
        weights: float64 `[N, K]`, how many entries each one stands for.
        counts: float64 `[N]`, weights of the rows.
    """

    inputs: np.ndarray
    linear: np.ndarray
    voiced: np.ndarray
    positives: np.ndarray
    weights: np.ndarray
    counts: np.ndarray

    def losses(self, correction: Any) -> np.ndarray:
        """List-wise cross-entropy of each row, float64 `[N]`, the correction `[N, K]` added to the linear score."""
        fused = tf.constant(self.linear + np.asarray(correction), tf.float64)
        return list_wise_loss(fused, self.voiced, self.positives, tf.constant(self.weights)).numpy()

    def mean(self, losses: np.ndarray) -> float:
        """The mean over rows, weighted."""
        return float(np.average(losses, weights=self.counts))

    def take(self, rows: np.ndarray) -> Lists:
        """Some of the rows, by number."""
        return Lists(**{name: values[rows] for name, values in vars(self).items()})


class CorrectedStacker(ShapleyRule, Stacker):
    """The linear stacker plus a correction by a model of all members together, so that who is right may depend on what
    the others say, on who speaks, and on the context that `passthrough` names.

    A model over each class or candidate alone, the same for all of them. It reads, for each: every member's features
    (log-probabilities less that of a uniform guess over classes), 0 where the member is silent, a flag for each member
    that speaks, the linear score, and the standardised context. It is fitted on the residual of the linear stacker by
    the same list-wise cross-entropy, step by step from zero. The step that is best on rows held out for it is kept, and
    none unless it is better there by more than one standard error: without anything to be gained, this is the linear
    stacker. Fitted with member dropout, so that subsets of members are no news.

    The score of nobody is 0, over classes the bias: contributions sum to what is sorted by.
    """

    class Config(Stacker.Config):
        """Settings that corrections share."""

        passthrough: tuple[str, ...] = ()
        """Names of the context that the correction reads, such as popularity or words."""
        held_out: float = Field(0.25, ge=0.05, le=0.9)
        """Share of the rows on which the correction is judged instead of fitted."""
        max_rows: int = Field(2000, ge=10)
        """Rows that the correction is fitted and judged on; more are drawn from at random."""

    config: Config

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        if self.config.passthrough:
            self._number("scale", np.tile(np.array([0.0, 1.0], np.float32), (len(self.config.passthrough), 1)))

    @classmethod
    def reads(cls, config: Config) -> tuple[str, ...]:  # type: ignore[override]
        """What `passthrough` names."""
        return config.passthrough

    def restricted(self, names: Collection[str]) -> Rule:
        """This rule for all of its members; ConfigError for some of them, because the correction counts on them all."""
        if set(names) < set(self.members):
            raise ConfigError(
                f"a rule of this kind serves all of its members ({', '.join(self.members)}); asked for "
                f"{', '.join(names) or 'none'}. Silence the others by the mask, or fit it again over fewer members."
            )
        return super().restricted(names)

    # ---- what a correction defines

    def _correction(self, inputs: Any) -> Any:
        """`[B, C]` of the inputs `[B, D, C]`; 0 everywhere before the fit."""
        raise NotImplementedError

    def _start(self) -> None:
        """Sets the correction to zero."""
        raise NotImplementedError

    def _grow(self, train: Lists, held: Lists, seed: int) -> tuple[int, int]:
        """Fits the correction on `train` and keeps the step that is best on `held`; its number, and that of the last
        one that was tried."""
        raise NotImplementedError

    # ---- what they share

    @property
    def _inputs_of(self) -> list[str]:
        """Whose each of the D inputs is, by name: a member's, of the linear score, of the context."""
        blocks = self.features_per_member + 1  # the last one are the flags
        return [*self.members * blocks, "linear score", *self.config.passthrough]

    def score(self, features: Any, speaks: Any, context: Context | None) -> Any:
        """The linear score, corrected where anybody speaks."""
        linear = self._linear(features, speaks)
        correction = self._correction(self._inputs(features, speaks, linear, context))
        return linear + tf.where(tf.reduce_any(speaks, axis=1), correction, 0.0)

    def _linear(self, features: Any, speaks: Any) -> Any:
        """What the linear stacker says, `[B, C]`."""
        numbers = self._numbers
        terms, _ = stack(features, speaks, numbers["weights"], numbers["influence"], numbers["compensation"])
        linear = tf.reduce_sum(terms, axis=1)
        return linear + numbers["bias"] if self.over == "classes" else linear

    def _inputs(self, features: Any, speaks: Any, linear: Any, context: Context | None) -> Any:
        """Float32 `[B, D, C]` in the order of `_inputs_of`."""
        shape = tf.shape(features)
        if self.over == "classes":
            features += tf.math.log(tf.cast(shape[2], tf.float32))
        heard = tf.tile(speaks, [1, self.features_per_member, 1])
        parts = [tf.where(heard, features, 0.0), tf.cast(speaks, tf.float32), linear[:, tf.newaxis]]
        if self.config.passthrough:
            known = self._context(context)
            parts.append(standardised(known, self.config.passthrough, self._numbers["scale"], [shape[0], shape[2]]))
        return tf.concat(parts, axis=1)

    # ---- fitting

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        report = super()._fit_classes(rows, seed)
        chosen = self._some_rows(len(rows.labels), seed)
        spoken, counts = rows.speaks[chosen], rows.weights[chosen]
        features = self._log_probabilities(tf.constant(rows.logits[chosen]), tf.constant(spoken)).numpy()
        positives = np.arange(features.shape[2]) == rows.labels[chosen, None]
        context = {name: values[chosen] for name, values in rows.context.items()}
        self._fit_scale(context, None)

        def lists(heard: np.ndarray) -> Lists:
            speaks = np.broadcast_to(heard[:, :, None], features.shape)
            whole = self._lists(features, speaks, positives, np.ones(positives.shape), counts, context)
            return shorten(whole, np.random.default_rng(derive_seed(seed, "classes")))

        return {**report, **self._correct(lists(self._dropped(spoken, seed)), lists(spoken), seed)}

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        report = super()._fit_candidates(lists, seed)
        chosen = self._some_rows(len(lists.positives), seed)
        speaks, weights = lists.speaks[chosen], lists.weights[chosen]
        context = {name: values[chosen] for name, values in lists.context.items()}
        self._fit_scale(context, weights)

        def made(heard: np.ndarray) -> Lists:
            positives, counts = lists.positives[chosen], np.ones(len(chosen))
            return self._lists(lists.features[chosen], heard, positives, weights, counts, context)

        dropped = speaks & self._dropped(np.any(speaks, axis=2), seed)[:, :, None]
        return {**report, **self._correct(made(dropped), made(speaks), seed)}

    def _some_rows(self, count: int, seed: int) -> np.ndarray:
        """Numbers of at most `max_rows` rows, in an order drawn at random."""
        return np.random.default_rng(derive_seed(seed, "rows")).permutation(count)[: self.config.max_rows]

    def _fit_scale(self, context: Context, weights: np.ndarray | None) -> None:
        if self.config.passthrough:
            self._numbers["scale"].assign(fit_scale(context, self.config.passthrough, weights))

    def _lists(
        self,
        features: np.ndarray,
        speaks: np.ndarray,
        positives: np.ndarray,
        weights: np.ndarray,
        counts: np.ndarray,
        context: Context,
    ) -> Lists:
        """What the correction is to see and to learn from, of rows on which `speaks` `[N, S, K]` are heard."""
        heard = tf.constant(speaks)
        linear = self._linear(tf.constant(features), heard)
        inputs = self._inputs(tf.constant(features), heard, linear, context)
        return Lists(inputs.numpy(), linear.numpy(), np.any(speaks, axis=1), positives, weights, counts)

    def _correct(self, dropped: Lists, given: Lists, seed: int) -> dict[str, Any]:
        """Fits the correction to rows with members silenced, judges it on others as they are, and keeps it or not."""
        first = max(1, round(self.config.held_out * len(given.counts)))
        held, train = given.take(np.arange(first)), dropped.take(np.arange(first, len(given.counts)))
        self._start()
        steps, tried = self._grow(train, held, seed) if len(train.counts) else (0, 0)
        before = given.losses(0.0)
        after = given.losses(self._correction(tf.constant(given.inputs)).numpy())
        gains = (before - after)[:first]
        gain, error = held.mean(gains), float(gains.std() / np.sqrt(first))
        if not gain > error:
            self._start()
            steps, after = 0, before
        return {
            "loss_after": given.mean(after),
            "correction": {"steps": steps, "tried": tried, "held_out_gain": gain, "standard_error": error},
        }


def shorten(lists: Lists, random: np.random.Generator) -> Lists:
    """The same with at most `SHORTLIST` + `DRAWN` entries and the positives in each row: the best by the linear score,
    and some of the rest that stand for all of it."""
    if lists.linear.shape[1] <= SHORTLIST + DRAWN + 1:
        return lists
    rows = np.arange(len(lists.linear))[:, None]
    # Positives, then the likeliest, then the rest in an order drawn at random.
    order = np.argsort(np.where(lists.positives, -np.inf, -lists.linear), axis=1, kind="stable")
    rest = order[:, 1 + SHORTLIST :]
    drawn = np.take_along_axis(rest, np.argsort(random.random(rest.shape), axis=1)[:, :DRAWN], axis=1)
    kept = np.concatenate([order[:, : 1 + SHORTLIST], drawn], axis=1)
    weights = lists.weights[rows, kept]
    weights[:, 1 + SHORTLIST :] *= rest.shape[1] / DRAWN
    inputs = np.take_along_axis(lists.inputs, kept[:, None, :], axis=2)
    return Lists(
        inputs, lists.linear[rows, kept], lists.voiced[rows, kept], lists.positives[rows, kept], weights, lists.counts
    )
