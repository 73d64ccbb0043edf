"""Trains classification members together, through the rule that fuses them, and leaves each as if trained alone.

All members step on the same batch. The loss is the cross-entropy of the fused output over the members that speak, plus
an auxiliary cross-entropy of each member's own output (one loss over wide and deep parts: Cheng et al. 2016,
arXiv:1606.07792; auxiliary classifiers: Szegedy et al. 2015, arXiv:1409.4842). The rule is trained through as it stands
before it is fitted: temperatures 1, equal or given weights. What a rule learns, it learns later, out of fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Part, Settings, content_hash
from fusion.embeddings import concatenate
from fusion.errors import ConfigError, DataError
from fusion.registry import nearest
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.training.batches import Rows
from fusion.training.conflict import Conflict
from fusion.training.member import ClassifierMember
from fusion.training.optimizers import Group, OptimizerSettings, apart
from fusion.training.separate import (
    ClassifierLoop,
    Examples,
    classification_metrics,
    cross_entropy,
    groups_of,
    in_batches,
    trained_rows,
)
from fusion.training.strategy import scope
from fusion.training.trainer import fit
from fusion.types import Context, Features, History, RunOptions, derive_seed

_LABEL, _MASK, _CONTEXT = "label", "mask", "context/"

LEAST = 1e-30
"""A fused probability below this counts as this in the loss: its logarithm stays finite."""


class JointSettings(Settings):
    """Joint or separate, and what joint training weighs, in either task."""

    mode: Literal["separate", "joint"] = "separate"
    """separate: each member by its own settings; joint: all that have a gradient in one graph, by these."""
    processes: int = Field(default=1, ge=1, le=64)
    """separate: members that are fitted at a time, each in a process with its share of the processors and a TensorFlow
    of its own in memory; 1 fits them one after the other in this process."""
    fused: float = Field(default=1.0, ge=0)
    """Weight of the loss of the fused output."""
    auxiliary: float = Field(default=0.5, ge=0)
    """Weight of each member's own loss; 0 trains through the fused output alone."""
    member_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Chance that the fused output of a training row is made without a member; somebody always speaks."""

    @pydantic.model_validator(mode="after")
    def _something_to_learn(self) -> JointSettings:
        if not self.fused and not self.auxiliary:
            raise ValueError("one of the keys fused and auxiliary must be above 0; received 0 for both")
        return self


class JointClassifierTraining(ClassifierLoop, JointSettings):
    """How members are trained: each by itself, or all through their fused output.

    In joint training each member keeps the optimizer of its own `training`, with learning rates by block, momentum,
    weight decay and the epochs in which blocks join; epochs, batches, schedule and stopping are these.
    """

    epochs: int = Field(default=30, ge=1)
    """Passes over the training rows, at most."""
    rule: str = ""
    """Name of the rule that is trained through; empty: the first one that has a gradient."""
    optimizers: dict[str, OptimizerSettings] = Field(default_factory=dict)
    """Optimizers by member, in place of those of the members' own `training`."""


def together(members: Mapping[str, Part], settings: JointClassifierTraining) -> dict[str, Part]:
    """The members that are trained in one graph: none where each is trained by itself.

    Members without a gradient (scikit-learn estimators) are trained by themselves in any case, and meet the others in
    the rules.
    """
    if settings.mode == "separate":
        return {}
    return {name: part for name, part in members.items() if part.registry[part.kind].differentiable}


def check_joint(members: Mapping[str, Part], rules: Mapping[str, Part], settings: JointClassifierTraining) -> None:
    """Raises ConfigError for what joint training cannot do with these members and rules, and for unknown names."""
    for name in settings.optimizers:
        if name not in members:
            raise ConfigError(f"training.optimizers: no member '{name}': {nearest(name, members)}")
    joined = together(members, settings)
    check_shares(members, joined)
    if settings.mode == "separate":
        return
    if len(joined) < 2:
        raise ConfigError(
            "training.mode joint needs two members that learn by gradient (kind neural); received "
            f"{', '.join(joined) or 'none'}. Add one, or take mode separate."
        )
    joint_rule(settings, rules, list(members), list(joined))


def check_shares(members: Mapping[str, Part], joined: Mapping[str, Part]) -> None:
    """Raises ConfigError for members that would share an encoder and are trained apart, or want another encoder."""
    first: dict[str, str] = {}
    for name, part in members.items():
        word = getattr(part.config, "share", "")
        if not word:
            continue
        if name not in joined:
            raise ConfigError(
                f"members.{name}.share: an encoder is shared in joint training alone, for in separate training each "
                f"member moves its own; received '{word}'. Set training.mode joint, or leave share out."
            )
        other = first.setdefault(word, name)
        if members[other].config.encoder.dump() != part.config.encoder.dump():
            raise ConfigError(
                f"members that share an encoder must have equal settings of it; those of {name} and {other}, which "
                f"share '{word}', differ. Write them once under encoders, as in 'encoders: {{{word}: ...}}'."
            )


def share_encoders(members: Mapping[str, ClassifierMember]) -> None:
    """Gives members of one `share` the submodel of the first of them: one object, one set of weights."""
    first: dict[str, ClassifierMember] = {}
    for member in members.values():
        if member.config.share:
            member.submodel = first.setdefault(member.config.share, member).submodel


def joint_rule(
    settings: JointClassifierTraining, rules: Mapping[str, Part], members: Sequence[str], joined: Sequence[str]
) -> str:
    """The name of the rule that is trained through.

    Args:
        settings: may name the rule.
        rules: by name.
        members: all that the rules fuse.
        joined: those of them that are trained together.

    Raises:
        ConfigError: there is no such rule, it has no gradient, or it cannot do without the other members.
    """
    made = {name: _new_rule(rules, name, members) for name in ([settings.rule] if settings.rule else rules)}
    for name, rule in made.items():
        if rule.differentiable:
            _check_cut(name, rule, joined)
            return name
    kinds = ", ".join(dict.fromkeys(rules[name].kind for name in made))
    raise ConfigError(
        f"training.mode joint needs a rule with a gradient to train through; received {kinds}, which "
        f"{'has' if len(made) == 1 else 'have'} none. Add a rule of kind average, probability or stacker, which is "
        "trained through, and keep these for afterwards."
    )


def _check_cut(name: str, rule: Rule, joined: Sequence[str]) -> None:
    try:
        rule.restricted(joined)
    except ConfigError:
        raise ConfigError(
            f"training.mode joint needs a rule that can do with the members that are trained together, "
            f"{', '.join(joined)}; '{name}' counts on all of {', '.join(rule.members)}. Name "
            "another one in training.rule, such as one of kind average."
        ) from None


def _new_rule(rules: Mapping[str, Part], name: str, members: Sequence[str]) -> Rule:
    if name not in rules:
        raise ConfigError(f"training.rule: no rule '{name}': {nearest(name, rules)}")
    return RULES[rules[name].kind](rules[name].config, members, "classes")


@dataclass(frozen=True)
class JointRows:
    """Labelled rows that all members step on.

    Attributes:
        values: by member, what it reads, of just those rows that it can read.
        mask: bool [N, S]: which rows those are; somebody can read each row.
        labels: class numbers, int [N].
        context: what the rule reads beside, float32 [N, 1] by name.
    """

    values: Mapping[str, Any]
    mask: np.ndarray
    labels: np.ndarray
    context: Context

    def check(self, classes: int, part: str) -> None:
        """Raises DataError when values, mask and labels do not fit together."""
        if self.mask.shape != (len(self.labels), len(self.values)) or not self.mask.any(axis=1).all():
            raise DataError(
                f"the mask of the {part} rows must be [{len(self.labels)}, {len(self.values)}] with a member for each "
                f"row; received {list(self.mask.shape)}."
            )
        for position, (name, values) in enumerate(self.values.items()):
            try:
                Examples(values, self.labels[self.mask[:, position]]).check(classes, part)
            except DataError as error:
                raise DataError(f"members.{name}: {error}") from error


@dataclass(frozen=True)
class JointData:
    """What members may see while they are trained together.

    Attributes:
        train: labelled training rows.
        validation: rows that decide on the best epoch; None where nothing may be validated.
        classes: C.
        cache: folder for embeddings.
        hash: names rows, labels and content, for the cache of fitted members.
    """

    train: JointRows
    validation: JointRows | None
    classes: int
    cache: Path
    hash: str

    def fingerprint(self, part: Any) -> str:
        """Names what fitting `part` on this data depends on."""
        return content_hash([self.hash, self.classes])


def train_jointly(
    members: Mapping[str, ClassifierMember],
    rule: Rule,
    data: JointData,
    settings: JointClassifierTraining,
    options: RunOptions,
    seeds: Mapping[str, int],
) -> tuple[History, dict[str, Any]]:
    """Trains new members in place, in one graph, through `rule`; the rule is not changed.

    A frozen encoder gives embeddings once and only its head is trained; of one that is trained in part, what leaves the
    frozen part is kept. Members that hold one and the same submodel share its weights. On one device the result is
    decided by the seeds, bit by bit; with more than two members on one trained encoder it is not, for TensorFlow adds
    three gradients or more in no fixed order.

    Args:
        members: by name, in the order of the rule's members.
        rule: a new differentiable rule, made in the scope of `options.strategy`.
        data: the rows.
        settings: how to train.
        options: seed (of the order of rows), directory, strategy, quiet.
        seeds: of each member's head, as `RunOptions.seed` is in separate training.

    Returns:
        The history: the metrics of the fused output, `accuracy/<member>`, and after each epoch on one batch of training
        rows `conflict/<member>`, the cosine of the gradients of fused and own loss on the member's weights, and
        `conflict/<a>+<b>`, that of two members' own losses on the weights that they share. And facts of the training:
        the `rule`, and the trained `parameters`, each counted once.

    Raises:
        DataError: rows, labels and mask do not fit together.
    """
    data.train.check(data.classes, "training")
    if data.validation is not None:
        data.validation.check(data.classes, "validation")
    _adapt(members, data.train)
    with scope(options):
        parts = {name: member.build(data.classes, seeds[name]) for name, member in members.items()}
        model = JointModel(parts, rule, data.classes, settings, options.seed)
    training = _prepared(members, data.train, data, options, varied=True)
    watch = None
    if data.validation is not None:
        held = _prepared(members, data.validation, data, options)
        watch = _Watch(model, settings, training, held, data.validation, options)
    history = fit(
        model,
        model.objective,
        training,
        settings,
        options,
        watch,
        settings.monitor,
        higher_is_better=settings.monitor == "accuracy",
        groups=_groups(parts, members, settings),
    )
    count = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    return history, {"joint": {"rule": rule.name, "parameters": count}}


def _groups(
    parts: Mapping[str, keras.Model], members: Mapping[str, ClassifierMember], settings: JointClassifierTraining
) -> list[Group]:
    """What moves the variables of each member, as its own `training` would alone, but for the optimizer where another
    one is given; what members share is moved by the first of them."""
    groups: list[Group] = []
    for name, part in parts.items():
        training = members[name].config.training
        if name in settings.optimizers:
            training = training.model_copy(update=dict(settings.optimizers[name]))
        own = groups_of(members[name].submodel, part, training) or [Group("", part.trainable_variables, training)]
        groups += [replace(group, name=f"{name}/{group.name}".rstrip("/")) for group in own]
    return apart(groups)


# ---- the rows ------------------------------------------------------------------------------------------------


def _prepared(
    members: Mapping[str, ClassifierMember], rows: JointRows, data: JointData, options: RunOptions, varied: bool = False
) -> Rows:
    """The rows as the trained parts read them: `<member>/<input>`, `label`, `mask` and `context/<name>`; `varied` by
    the members' augmentation."""
    readers: dict[str, Rows] = {}
    for name, member in members.items():
        at = replace(options, directory=options.directory / name)
        how = member.config.augmentation if varied else None
        readers[name] = trained_rows(member.submodel, rows.values[name], data.cache / "embeddings", at, how)
    places = {name: _places(rows.mask[:, s], readers[name].n) for s, name in enumerate(members)}
    rest = {_LABEL: np.asarray(rows.labels, np.int32), _MASK: rows.mask}
    rest |= {f"{_CONTEXT}{name}": np.asarray(values, np.float32) for name, values in rows.context.items()}

    def gather(numbers: np.ndarray) -> Features:
        batch = {name: array[numbers] for name, array in rest.items()}
        for name, reader in readers.items():
            own = reader.gather(places[name][numbers])
            batch |= {f"{name}/{key}": array for key, array in own.items()}
        return batch

    lengths = [reader.lengths[places[name]] for name, reader in readers.items() if reader.lengths is not None]
    return Rows(len(rows.labels), gather, np.sum(lengths, axis=0) if lengths else None)


def _adapt(members: Mapping[str, ClassifierMember], rows: JointRows) -> None:
    """Fits what encoders fit before training; a shared one on the values of all that share it."""
    users: dict[int, list[str]] = {}
    for name, member in members.items():
        users.setdefault(id(member.submodel), []).append(name)
    for names in users.values():
        members[names[0]].submodel.adapt_to(concatenate([rows.values[name] for name in names]))


def _places(known: np.ndarray, count: int) -> np.ndarray:
    """Where each row's value stands among the `count` that a member can read, int64 [N].

    A row without one reads another's: nobody hears the answer, and the statistics of BatchNormalization stay those of
    true values, which they would not with blank ones.
    """
    places = np.arange(len(known)) % count
    places[known] = np.arange(count)
    return places


# ---- the graph -----------------------------------------------------------------------------------------------


class JointModel(keras.Model):
    """The trained parts of all members and the rule over them. Made in the scope of the strategy.

    Args:
        parts: by member, named inputs -> `logits` [b, C].
        rule: a differentiable rule over the members.
        classes: C.
        settings: weights of the losses, dropout of members, label smoothing.
        seed: of the dropout of members.
    """

    def __init__(
        self,
        parts: Mapping[str, keras.Model],
        rule: Rule,
        classes: int,
        settings: JointClassifierTraining,
        seed: int,
    ) -> None:
        super().__init__(name="joint")
        self.names, self.settings = tuple(parts), settings
        self.parts = list(parts.values())
        self.rule = rule
        self.silenced = keras.layers.Dropout(
            settings.member_dropout, rng_type="stateful", force_generator=True, seed=derive_seed(seed, "members")
        )
        context = {name: tf.zeros([1, 1]) for name in rule.reads(rule.config)}
        rule(tf.zeros([1, len(self.names), classes]), context=context)  # makes the numbers that depend on C
        self.silenced.build(None)  # makes its random state, which checkpoints hold

    def call(self, batch: dict[str, tf.Tensor], training: bool = False) -> list[tf.Tensor]:
        """The members' logits, each float32 [b, C]."""
        logits = []
        for name, part in zip(self.names, self.parts, strict=True):
            own = {key: batch[f"{name}/{key}"] for key in part.input_names}
            logits.append(tf.cast(part(own, training=training)["logits"], tf.float32))
        return logits

    def fuse(self, logits: Sequence[tf.Tensor], batch: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Logarithms of the fused probabilities up to a constant a row, [b, C]."""
        context = {k.removeprefix(_CONTEXT): tensor for k, tensor in batch.items() if k.startswith(_CONTEXT)}
        mask = self._heard(batch[_MASK], training)
        fused = self.rule(tf.stack(logits, axis=1), mask=mask, context=context)
        return fused if self.rule.in_logs else tf.math.log(tf.maximum(self.rule.probabilities(fused), LEAST))

    def objective(self, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """The loss [b]: `fused` times that of the fused output, plus `auxiliary` times the sum of the members' own."""
        logits, settings = self(batch, training=True), self.settings
        losses = settings.auxiliary * self.own_losses(logits, batch)
        if settings.fused:
            losses = tf.concat([losses, settings.fused * self.fused_loss(logits, batch, True)[:, None]], axis=1)
        return tf.reduce_sum(losses, axis=1)

    def losses_of(self, batch: dict[str, tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Sums over a batch of the loss of the fused output, all members being heard, and of each member's own."""
        logits = self(batch, training=True)
        own = tf.reduce_sum(self.own_losses(logits, batch), axis=0)
        return tf.reduce_sum(self.fused_loss(logits, batch, False)), tf.unstack(own)

    def fused_loss(self, logits: Sequence[tf.Tensor], batch: dict[str, tf.Tensor], training: bool) -> tf.Tensor:
        """Cross-entropy of the fused output, [b]."""
        return cross_entropy(batch[_LABEL], self.fuse(logits, batch, training), self.settings.label_smoothing)

    def own_losses(self, logits: Sequence[tf.Tensor], batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """Cross-entropy of each member, [b, S]; 0 where it has nothing to read."""
        losses = [cross_entropy(batch[_LABEL], own, self.settings.label_smoothing) for own in logits]
        return tf.stack(losses, axis=1) * tf.cast(batch[_MASK], tf.float32)

    def _heard(self, mask: tf.Tensor, training: bool) -> tf.Tensor:
        """The mask bool [b, S] less the members that dropout silences; all are heard where it would leave none."""
        kept = self.silenced(tf.ones(tf.shape(mask)), training=training) > 0
        left = tf.logical_and(mask, kept)
        return tf.where(tf.reduce_any(left, axis=1, keepdims=True), left, mask)


class _Watch:
    """What is measured after each epoch: called without arguments, returns named figures."""

    def __init__(
        self,
        model: JointModel,
        settings: JointClassifierTraining,
        training: Rows,
        held: Rows,
        validation: JointRows,
        options: RunOptions,
    ) -> None:
        self._model, self._settings, self._held = model, settings, held
        self._labels, self._mask = validation.labels, validation.mask
        self._score = tf.function(self._scores, reduce_retracing=True)
        parts = dict(zip(model.names, model.parts, strict=True))
        self._conflict = Conflict(model, model.losses_of, parts, training, settings.batch_size, options)

    def __call__(self) -> dict[str, float]:
        return {**self._metrics(), **self._conflict()}

    def _scores(self, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """Logits of the members and then of the fused output, [b, S + 1, C]."""
        logits = self._model(batch, training=False)
        return tf.stack([*logits, self._model.fuse(logits, batch)], axis=1)

    def _metrics(self) -> dict[str, float]:
        scores = in_batches(self._score, self._held, self._settings.batch_size)
        metrics = classification_metrics(scores[:, -1], self._labels)
        for position, name in enumerate(self._model.names):
            known = self._mask[:, position]
            found = classification_metrics(scores[known, position], self._labels[known])
            metrics[f"accuracy/{name}"] = found["accuracy"]
        return metrics
