"""What every fusion rule promises; a rule itself is a file beside this one and a line in `RULES`.

A rule is a Keras layer over the members' scores `[B, S, C]` and a mask. It is additive: the fused score is
the sum over members of terms `[B, S, C]` plus a bias, so the terms *are* the contributions. It is defined for
every non-empty subset of members: weights are renormalised over the members that speak on a candidate (or
on a row of classes), a weight of zero is the same as leaving the member out, and the order of members does
not matter. Where no member speaks, a candidate gets -inf (sorted last) and a row of classes is uniform.

Scores go through `scale`, each member by itself; `guarded`, which silences a member that has gone wrong on a row
(`fusion.rules.guard`); and `weigh` or `fuse`. The first two together are `normalise`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.errors import ConfigError, DataError
from fusion.registry import nearest
from fusion.rules.calibration import CALIBRATIONS, Method
from fusion.rules.fitting import CandidateLists, ClassRows, candidate_lists, class_rows, list_wise_loss
from fusion.rules.guard import (
    FEWEST,
    candidate_distances,
    class_distances,
    fit_guard,
    guarding,
    implausible,
    spread,
)
from fusion.rules.normalisation import LARGEST, exponential, silence, speaking, speaking_rows
from fusion.types import Context, Over

MemberWeights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
"""A weight for each member by name."""


class RuleSettings(Settings):
    """Settings that all rules have."""

    calibration: Method = "temperature"
    """Classes: how members are calibrated on held-out logits before use: none, temperature, platt or isotonic."""
    guard: bool | None = None
    """Whether a member is taken as silent on rows on which it lies implausibly far from all others. Not given: in rules
    that are fitted anyway, where three members or more have influence. true: in any rule, which is then fitted for it
    on held-out scores; and where only two members have influence, a third stays as their witness."""
    guard_quantile: float = Field(0.995, ge=0.5, lt=1)
    """The share of the held-out rows on which a member's distance to the others counts as normal."""


class Rule(keras.layers.Layer):
    """Base of the rules.

    Attributes:
        config: the settings.
        members: names in the order of axis S.
        over: what axis C runs over, `classes` or `candidates`.
        additive: of a class: a member's term needs no other member's scores but for who speaks, so that terms may be
            made for all candidates at once. Rules that are not derive from `fusion.rules.shapley.ShapleyRule`.
        learned: of a class: rules of this kind learn weights when none are given; of an object: `fit` has
            something to do (weights, or the calibration of members over classes).
        differentiable: of a class or an object: fused scores have a gradient with respect to the members' scores, so
            that members may be trained through the rule as it stands before it is fitted.
        falls_back: of a class: where no member with influence speaks, the others answer.
        member_axes: of a class: which axis of a learned number is S, or None, where it is not the first one that is
            as long as S.

    Raises:
        ConfigError: as `check` does.
    """

    Config: ClassVar[type[RuleSettings]] = RuleSettings
    additive: ClassVar[bool] = True
    learned: bool = False
    differentiable: bool = True
    falls_back: ClassVar[bool] = False
    member_axes: ClassVar[Mapping[str, int | None]] = {}

    def __init__(self, config: RuleSettings, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        self.check(config, members)
        super().__init__(**{"dtype": "float32", "trainable": False, **kwargs})
        self.config = config
        self.members = tuple(members)
        self.over: Over = over
        self.learned = self._learns() or (config.guard is True and len(self.members) >= FEWEST)
        self._numbers: dict[str, Any] = {}
        self._guarding: list[int] = []  # places of the members among which the guard looks
        self._calibration = CALIBRATIONS[config.calibration if over == "classes" else "none"]
        self._number_calibration(None)

    # ---- what a rule defines

    @property
    def in_logs(self) -> bool:
        """Over classes: whether fused scores are log-probabilities up to a constant."""
        return False

    @property
    def features_per_member(self) -> int:
        """F: how many numbers `normalise` gives of each member and candidate."""
        return 1

    @classmethod
    def reads(cls, config: RuleSettings) -> tuple[str, ...]:
        """Names of the context that a rule with these settings needs; most need none."""
        return ()

    def scale(self, scores: Any, mask: Any = None) -> Any:
        """The members' scores on one scale, each member by itself: `[B, S, C]`, NaN where silent.

        A rule with F features per member returns `[B, F·S, C]`.
        """
        raise NotImplementedError

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """Terms `[B, S, C]`, 0 where silent, and the bias `[B, C]`, -inf for candidates without a voice."""
        raise NotImplementedError

    def _shares(self) -> np.ndarray:
        """How much each member counts, `[S]`, 0 for those without influence; all count unless a rule says otherwise."""
        return np.ones(len(self.members))

    def _learns(self) -> bool:
        return self.over == "classes" and self.config.calibration != "none"

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        """Calibrates the members; rules with weights go on from here."""
        before = self._log_loss(rows)
        self._fit_calibration(rows)
        return {"loss_before": before, "loss_after": self._log_loss(rows), "iterations": 1}

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        """Learns nothing but the guard; rules with weights have more to do."""
        given = tf.constant(lists.features), tf.constant(lists.speaks), lists.context
        fused, voiced = self.fuse(*given), tf.constant(lists.speaks.any(axis=1))
        losses = list_wise_loss(
            tf.where(voiced, fused, 0.0), voiced, tf.constant(lists.positives), tf.constant(lists.weights, tf.float32)
        )
        loss = float(np.mean(losses))
        return {"loss_before": loss, "loss_after": loss, "iterations": 0}

    # ---- what all rules share

    def normalise(self, scores: Any, mask: Any = None) -> Any:
        """The members' scores on one scale, `[B, S, C]`, NaN where silent or silenced by the guard.

        Over candidates this needs the whole catalogue; the result may then be cut to some candidates and
        handed to `fuse` or `fit`. A rule with F features per member returns `[B, F·S, C]`.
        """
        return self.guarded(self.scale(scores, mask), scores, mask)

    def guarded(self, features: Any, scores: Any, mask: Any = None) -> Any:
        """The features `[B, F·S, C]` that `scale` gave, NaN where the guard silences a member.

        Args:
            features: over the whole catalogue; NaN or masked where silent.
            scores, mask: what they were made of; over candidates only the mask is read.
        """
        if not self._guarding:
            return features
        trusted = tf.logical_not(self._silenced(features, scores, mask))[:, :, tf.newaxis]
        return silence(features, tf.tile(trusted, [1, self.features_per_member, 1]))

    def heard(self, scores: Any, mask: Any = None) -> Any:
        """Who the rule listens to: speaks, and is not silenced by the guard; bool `[B, S, C]`."""
        speaks = speaking(scores, mask) if self.over == "candidates" else speaking_rows(scores, mask)
        speaks = tf.broadcast_to(speaks, tf.shape(scores))
        if not self._guarding:
            return speaks
        silenced = self._silenced(self.scale(scores, mask), scores, mask)
        return tf.logical_and(speaks, tf.logical_not(silenced)[:, :, tf.newaxis])

    def distances(self, features: Any, scores: Any, mask: Any = None) -> Any:
        """How far apart the members are on each row, `[B, S, S]`: what the guard looks at (`fusion.rules.guard`).

        The arguments are those of `guarded`.
        """
        return self._distances(features, scores, mask, list(range(len(self.members))))

    @property
    def guards(self) -> bool:
        """Whether a fit may find a guard: it is wanted, and there are members enough."""
        return self.learned and self.config.guard is not False and len(self.members) >= FEWEST

    def build(self, input_shape: Any) -> None:
        """Makes the numbers that depend on how many classes there are."""
        self._number_calibration(int(input_shape[-1]) if self.over == "classes" else None)
        super().build(input_shape)

    @classmethod
    def check(cls, config: RuleSettings, members: Sequence[str]) -> None:
        """Checks the settings against the members' names, before any data is read.

        Raises:
            ConfigError: no member, a name that stands twice, or weights that do not fit the members.
        """
        repeated = sorted({name for name in members if list(members).count(name) > 1})
        if not members or repeated:
            raise ConfigError(
                f"the rule '{cls.__name__.lower()}' needs members with distinct names; received "
                f"{f'{repeated[0]!r} twice' if repeated else 'none'}. Correct the list of members."
            )

    def fuse(self, features: Any, mask: Any = None, context: Context | None = None) -> Any:
        """The fused score `[B, C]` of normalised features."""
        terms, bias = self.weigh(features, mask, context)
        return tf.reduce_sum(terms, axis=1) + bias

    def call(self, scores: Any, mask: Any = None, context: Context | None = None) -> Any:
        """The fused score, float32 `[B, C]`.

        Args:
            scores: `[B, S, C]`: logits for classes, the members' own scores for candidates.
            mask: None, `[B, S]` or broadcastable to `[B, S, C]`; False silences, and so does a score that is
                not finite.
            context: what `reads` names; others are ignored.
        """
        return self.fuse(self.normalise(scores, mask), mask, context)

    def contributions(self, scores: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """What each member adds, `[B, S, C]`, and the bias, `[B, C]`; their sum is the fused score."""
        return self.weigh(self.normalise(scores, mask), mask, context)

    def probabilities(self, fused: Any) -> Any:
        """Probabilities `[B, C]` of the fused scores of classes; ValueError over candidates."""
        if self.over != "classes":
            raise ValueError("probabilities are defined over classes; this rule fuses candidates.")
        if self.in_logs:
            return tf.nn.softmax(fused, axis=1)
        return fused / tf.reduce_sum(fused, axis=1, keepdims=True)

    def calibrated(self, scores: Any, mask: Any = None) -> Any:
        """Classes: the calibrated probabilities of each member, `[B, S, C]`, NaN where silent."""
        return exponential(self._log_probabilities(scores, mask))

    def fit(
        self,
        features: np.ndarray,
        mask: np.ndarray | None,
        labels: np.ndarray,
        weights: np.ndarray | None = None,
        context: Context | None = None,
        *,
        distances: np.ndarray | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Learns what the rule learns, on scores that the members gave to rows they were not fitted on.

        Members know the rows they were fitted on by heart; weights learned there would go to whoever
        overfits most.

        Args:
            features: classes: raw logits `[N, S, C]`; candidates: `normalise` over the whole catalogue, cut
                to K candidates a user, `[N, F·S, K]`.
            mask: None, `[N, S]`, or broadcastable to `[N, S, C]` (`[N, S, K]`).
            labels: classes: int `[N]`; candidates: bool `[N, K]`, the positives.
            weights: classes: of the rows, `[N]`; candidates: how many candidates each stands for, `[N, K]`.
            context: what `reads` names, `[N, 1]` or `[N, K]`.
            distances: candidates: what `distances` gave for these users over the whole catalogue, `[N, S, S]`; without
                them there is no guard.
            seed: of whatever is drawn at random.

        Returns:
            `loss_before`, `loss_after` (mean log-loss, or mean list-wise cross-entropy), `iterations`,
            `rows`, and by member `weights`, `temperatures` where the rule has them; `guard` as `fit_guard`
            reports; JSON-able.

        Raises:
            DataError: shapes do not fit, or no row is usable.
            TypeError: the rule has nothing to learn (`learned` is False).
        """
        if not self.learned:
            raise TypeError(f"the rule '{type(self).__name__.lower()}' as configured has nothing to learn.")
        self._check_members(features)
        self._number_guard(wanted=False)  # what is learned here is learned unguarded
        if self.over == "classes":
            rows = class_rows(features, mask, labels, weights, self._context(context))
            report = self._fit_classes(rows, seed)
            if "temperatures" in self._numbers:
                report["temperatures"] = self._by_member(self._numbers["temperatures"].numpy())
            if self.guards:
                distances = self.distances(None, tf.constant(rows.logits), tf.constant(rows.speaks)).numpy()
                report["guard"] = self._fit_guard(distances)
            return {**report, "rows": len(rows.labels)}
        lists = candidate_lists(features, mask, labels, weights, len(self.members), self._context(context))
        report = self._fit_candidates(lists, seed)
        if self.guards and distances is not None:
            report["guard"] = self._fit_guard(np.asarray(distances))
        return {**report, "rows": len(lists.positives)}

    def state(self) -> dict[str, np.ndarray]:
        """The learned numbers by name; empty for a rule without any."""
        return {name: variable.numpy() for name, variable in self._numbers.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes back what `state` gave; DataError when names or shapes differ or a number is not finite."""
        self._number_calibration(self._calibration.classes(state))
        self._number_guard(wanted="guard" in state)
        if set(state) != set(self._numbers):
            raise DataError(
                f"the state of the rule '{type(self).__name__.lower()}' must hold {sorted(self._numbers)}; "
                f"received {sorted(state)}. Fit the rule again."
            )
        for name, variable in self._numbers.items():
            value = np.asarray(state[name])
            if value.shape != tuple(variable.shape) or not np.isfinite(value).all():
                raise DataError(
                    f"'{name}' of the rule '{type(self).__name__.lower()}' must be finite numbers of shape "
                    f"{tuple(variable.shape)}; received shape {value.shape}. Fit the rule again."
                )
            variable.assign(value)
        self._guarding = guarding(self._numbers["guard"].numpy()) if "guard" in self._numbers else []

    def used(self) -> tuple[str, ...]:
        """Names of the members with any influence, in the order of axis S; a witness of the guard is one of them."""
        shares = self._shares()
        return tuple(name for s, name in enumerate(self.members) if shares[s] > 0 or s in self._guarding)

    def restricted(self, names: Collection[str]) -> Rule:
        """The same rule over some of its members; over those of `used()` it is the whole with the others silent.

        The order of the members stays; learned numbers are cut along S, given weights are divided by their sum.

        Raises:
            ConfigError: a name that is not of this rule, or none at all.
        """
        unknown = sorted(set(names) - set(self.members))
        if unknown:
            raise ConfigError(f"the rule has no member '{unknown[0]}': {nearest(unknown[0], self.members)}")
        places = [place for place, name in enumerate(self.members) if name in names]
        if len(places) == len(self.members):
            return self
        kept, config = [self.members[place] for place in places], self.config
        given = getattr(config, "weights", None)
        if isinstance(given, Mapping):
            total = sum(given[name] for name in kept) or 1.0
            config = config.model_copy(update={"weights": {name: given[name] / total for name in kept}})
        rule = type(self)(config, kept, self.over, name=self.name)
        rule.load_state({name: self._cut(name, values, places) for name, values in self.state().items()})
        return rule

    def _cut(self, name: str, values: np.ndarray, places: list[int]) -> np.ndarray:
        """The part of a learned number that is of some members."""
        first = 0 if values.shape[:1] == (len(self.members),) else None
        axis = self.member_axes.get(name, first)
        return values if axis is None else values.take(places, axis=axis)

    def get_config(self) -> dict[str, Any]:
        """What Keras needs to make the layer again; `from_config` is its inverse."""
        config = self.config.model_dump(mode="json")
        return {**super().get_config(), "config": config, "members": list(self.members), "over": self.over}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rule:
        """The layer described by `get_config`, without its learned numbers."""
        return cls(**{**config, "config": cls.Config.model_validate(config["config"])})

    # ---- helpers of the rules

    def _number(self, name: str, value: np.ndarray) -> Any:
        """A learned number that is part of `state`."""
        variable = self.add_weight(
            name=name, shape=value.shape, initializer=keras.initializers.Constant(value), trainable=False
        )
        self._numbers[name] = variable
        return variable

    def _context(self, context: Context | None) -> Context:
        """The part of the context that this rule reads; DataError when something is missing."""
        names = self.reads(self.config)
        missing = sorted(set(names) - set(context or {}))
        if missing:
            raise DataError(
                f"the rule '{type(self).__name__.lower()}' reads {', '.join(names)}; {', '.join(missing)} is not "
                f"given. Pass context, or leave it out of the rule's settings."
            )
        return {name: (context or {})[name] for name in names}

    def _check_members(self, features: np.ndarray) -> None:
        expected = len(self.members) * self.features_per_member
        if np.ndim(features) != 3 or features.shape[1] != expected:
            raise DataError(
                f"axis 1 of [N, S, C] must have {expected} rows for the members {', '.join(self.members)}; "
                f"received {np.shape(features)}. Stack the scores in the order of the members."
            )

    def _by_member(self, values: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.members, values, strict=True)}

    def _log_probabilities(self, scores: Any, mask: Any) -> Any:
        """Calibrated log-probabilities of classes, `[B, S, C]`, NaN where silent."""
        speaks = speaking_rows(scores, mask)
        known = self._calibration.scores(tf.where(speaks, scores, 0.0), self._numbers)
        return silence(tf.nn.log_softmax(known, axis=2), speaks)

    def _voiceless(self, voiced: Any, classes: Any) -> Any:
        """The bias `[B, C]` of entries without a voice: -inf for candidates, uniform for classes; else 0."""
        if self.over == "candidates":
            # log(0), because the LiteRT converter writes a constant -inf as the lowest finite number.
            return tf.math.log(tf.cast(voiced, tf.float32))
        count = tf.cast(classes, tf.float32)
        return tf.where(voiced, 0.0, -tf.math.log(count) if self.in_logs else 1.0 / count)

    def _weighted_mean(self, features: Any, mask: Any, weights: Any) -> tuple[Any, Any]:
        """`weigh` of the rules that are a mean over the members that speak; weights `[S]`."""
        terms, voiced = weighted_mean(features, speaking(features, mask), weights)
        return terms, self._voiceless(voiced, tf.shape(features)[2])

    def _number_calibration(self, classes: int | None) -> None:
        """Makes the numbers of the calibration that are not there yet; None while nothing tells how many classes."""
        for name, value in self._calibration.identity(len(self.members), classes).items():
            if name not in self._numbers:
                self._number(name, value)

    def _silenced(self, features: Any, scores: Any, mask: Any) -> Any:
        """Whom the guard silences, bool `[B, S]`."""
        places = self._guarding
        found = implausible(self._distances(features, scores, mask, places), tf.gather(self._numbers["guard"], places))
        return spread(found, places, len(self.members))

    def _distances(self, features: Any, scores: Any, mask: Any, places: list[int]) -> Any:
        """Distances between the members at these places, `[B, s, s]`."""
        if self.over == "classes":
            logs = tf.gather(self._log_probabilities(scores, mask), places, axis=1)
            return class_distances(logs, speaking_rows(logs))
        first = tf.gather(features, places, axis=1)  # of a rule with several features, the first of each member
        return candidate_distances(first, tf.gather(speaking(features[:, : len(self.members)], mask), places, axis=1))

    def _fit_guard(self, distances: np.ndarray) -> dict[str, Any]:
        """Learns what distances `[N, S, S]` are normal; what `fit_guard` reports."""
        config, shares = self.config, self._shares()
        normal, report = fit_guard(distances, self.members, shares, config.guard_quantile, witness=config.guard is True)
        if report["members"]:
            self._number_guard(wanted=True)
            self._numbers["guard"].assign(normal)
            self._guarding = guarding(normal)
        return report

    def _number_guard(self, *, wanted: bool) -> None:
        """Makes the guard's number, or forgets it: a rule that was not fitted for a guard has none."""
        if not wanted:
            self._guarding = []
            self._numbers.pop("guard", None)
        elif "guard" not in self._numbers:
            self._number("guard", np.zeros(len(self.members), np.float32))

    def _fit_calibration(self, rows: ClassRows) -> None:
        """Calibrates each member on the rows on which it speaks; one that never does is left as it is."""
        classes = rows.logits.shape[2]
        self._number_calibration(classes)
        numbers = self._calibration.identity(len(self.members), classes)
        for s, said in enumerate(rows.speaks.T):
            if said.any():
                fitted = self._calibration.fit(rows.logits[said, s], rows.labels[said], rows.weights[said])
                for name, value in fitted.items():
                    numbers[name][s] = value
        for name, value in numbers.items():
            self._numbers[name].assign(value)

    def _log_loss(self, rows: ClassRows) -> float:
        """Mean log-loss of the rule as it stands."""
        fused = self(tf.constant(rows.logits), mask=tf.constant(rows.speaks), context=rows.context)
        fused = self.probabilities(fused).numpy()
        picked = fused[np.arange(len(rows.labels)), rows.labels].astype(np.float64)
        return float(-np.average(np.log(np.maximum(picked, 1e-15)), weights=rows.weights))


def weighted_mean(values: Any, speaks: Any, weights: Any) -> tuple[Any, Any]:
    """The terms of the mean over the members that speak, and where that mean is defined.

    Args:
        values: `[B, S, C]`, anything where silent.
        speaks: bool `[B, S, C]`.
        weights: `[S]`, or broadcastable to `[B, S, C]`; ≥ 0.

    Returns:
        terms `[B, S, C]`, 0 where silent; voiced, bool `[B, C]`: a member of positive weight speaks.
    """
    weights = tf.convert_to_tensor(weights)
    if weights.shape.rank == 1:
        weights = weights[:, tf.newaxis]
    zero = tf.zeros([], weights.dtype)
    total = tf.reduce_sum(tf.where(speaks, weights, zero), axis=1, keepdims=True)
    voiced = total > 0
    terms = tf.where(speaks, values, zero) * weights / tf.where(voiced, total, tf.ones([], weights.dtype))
    return terms, voiced[:, 0]


def softmax_mean(values: Any, speaks: Any, logits: Any) -> tuple[Any, Any]:
    """`weighted_mean` by `softmax(logits)` over the members that speak; logits broadcastable to `[B, S, C]`."""
    # Less the largest of those that speak: a silent member's weight must not make theirs vanish.
    heard = tf.where(speaks, logits, tf.constant(-LARGEST, logits.dtype))
    return weighted_mean(values, speaks, tf.exp(heard - tf.reduce_max(heard, axis=1, keepdims=True)))


def given_weights(rule: str, weights: Mapping[str, float] | None, members: Sequence[str]) -> np.ndarray:
    """Weights of a config in the order of the members, float32 `[S]`, sum 1; equal when none are given.

    Raises:
        ConfigError: an unknown member, a member without a weight, or no weight above zero.
    """
    if weights is None:
        return np.full(len(members), 1.0 / max(len(members), 1), np.float32)
    for name in weights:
        if name not in members:
            hint = nearest(name, members)
            raise ConfigError(f"the rule '{rule}' weighs the unknown member '{name}': {hint}")
    missing = [name for name in members if name not in weights]
    if missing:
        raise ConfigError(
            f"the weights of the rule '{rule}' must name every member; '{missing[0]}' is missing. "
            "Give it a weight (0 leaves it out), or give no weights at all."
        )
    values = np.array([weights[name] for name in members], np.float64)
    if values.sum() <= 0:
        raise ConfigError(
            f"the rule '{rule}' needs a member with a weight above 0; received 0 for {', '.join(members)}. "
            "Raise one of them, or give no weights at all."
        )
    return (values / values.sum()).astype(np.float32)
