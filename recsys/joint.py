"""Trains members of a ranking together, by the gradient of their fused scores, and leaves each as if trained alone.

One graph holds every member that is trained on pairs (a history, the item to be found): factorisation, content, two
towers. The others of the batch's targets are the negatives, for the fused scores as for each member's own
(Covington et al. 2016, "Deep Neural Networks for YouTube Recommendations"; one loss over wide and deep parts: Cheng
et al. 2016, "Wide & Deep Learning for Recommender Systems"). Members without a gradient, or with a loss of their own
kind (EASE, kNN, sequences), are fitted one by one; those that `constants` names are heard in the fused scores, so that
the others learn what these leave over, and the rest meets the others in the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import keras, tf
from fusion.config import Part
from fusion.errors import ConfigError
from fusion.registry import nearest
from fusion.rules import RULES
from fusion.training.batches import Rows
from fusion.training.conflict import Conflict
from fusion.training.joint import JointSettings, check_shares
from fusion.training.optimizers import Group, OptimizerSettings, apart
from fusion.training.strategy import StrategySettings, all_replicas, check_training, scope
from fusion.training.trainer import LoopSettings, fit
from fusion.types import Features, History, RunOptions, derive_seed
from recsys.collaborative.base import PADDING, TrainingData, constant
from recsys.collaborative.content import share_encoders
from recsys.collaborative.pairs import NEVER, HistoryPairs, TowerMember, Towers, in_batch_cross_entropy, products
from recsys.core import MemberScores, RankingCore
from recsys.joint_constants import Constants
from recsys.metrics import parse_metric

SHARPNESS = 2.0
"""What fused z-scores are multiplied by at the start of training, which then learns it."""


class JointTraining(LoopSettings, JointSettings):
    """How members are trained: each by itself, or those that are trained on pairs through their fused scores."""

    batch_size: int = Field(512, ge=2)
    """Pairs of a step; the targets of the others are the negatives of each."""
    weights: Literal["equal", "learned"] = "equal"
    """What members count in the fused scores while they are trained."""
    constants: tuple[str, ...] = ()
    """Members that are not trained here and are heard in the fused scores all the same. Each is fitted for each fold
    once more, and scores every batch; those of items × items score the whole catalogue for it."""
    constant_folds: int = Field(2, ge=2, le=20)
    """Folds of users for the members in `constants`: what they say of a user was fitted without that user."""


def together(members: Mapping[str, Part], settings: JointTraining) -> dict[str, Part]:
    """The members that are trained in one graph: none where each is trained by itself."""
    if settings.mode == "separate":
        return {}
    return {name: part for name, part in members.items() if _joins(part)}


def _joins(part: Part) -> bool:
    kind = part.registry[part.kind]
    return issubclass(kind, TowerMember) and kind.joins(part.config)


def check_joint(members: Mapping[str, Part], settings: JointTraining) -> None:
    """Raises ConfigError where joint training has fewer than two members to train, for constants that are not there or
    are trained themselves, and for encoders that cannot be shared."""
    joined = together(members, settings)
    check_shares(members, joined)
    if settings.mode == "joint" and len(joined) < 2:
        raise ConfigError(
            "training.mode joint needs two members that are trained on pairs with a softmax (matrix_factorization, "
            f"light_gcn, two_tower, content with scorer trained); received {', '.join(joined) or 'none'}. "
            "Add one, or take mode separate."
        )
    for name in settings.constants:
        if settings.mode == "separate":
            raise ConfigError("training.constants must go with training.mode joint; received mode separate.")
        if name not in members:
            raise ConfigError(f"training.constants: no member '{name}': {nearest(name, members)}")
        if name in joined:
            raise ConfigError(
                f"training.constants must name members that are not trained together; '{name}' is. Leave it out."
            )


def check_joint_loop(members: Mapping[str, Part], settings: JointTraining, strategy: StrategySettings) -> None:
    """Raises ConfigError for keys of the loop that one of the members trained together, a constant or the strategy
    cannot do."""
    for name, part in together(members, settings).items():
        try:
            check_training(settings, part.registry[part.kind].accelerations, strategy)
        except ConfigError as error:
            raise ConfigError(f"training.mode joint with members.{name}, of kind {part.kind}: {error}") from None
    if settings.xla and settings.constants:
        raise ConfigError(
            "training.xla must be left out with training.constants, whose scorers XLA does not compile; received "
            f"{', '.join(settings.constants)}. Leave one of the two out."
        )


def train_jointly(
    members: Mapping[str, TowerMember],
    settings: JointTraining,
    data: TrainingData,
    options: RunOptions,
    constants: Constants | None = None,
) -> tuple[History, dict[str, Any]]:
    """Trains members in place.

    After each epoch the fused scores are measured on the validation users, and the best epoch is kept. Members of one
    `share` are given one encoder.

    Returns:
        The history: the metric of the fused scores, and after each epoch on one batch of training pairs
        `conflict/<member>` and `conflict/<a>+<b>`, see `fusion.training.conflict`. And facts of the training: what each
        member counted in the fused scores (`weights`), and the trained `parameters`, each counted once.
    """
    share_encoders(members, data)
    towers = {
        name: member.towers(data, replace(options, directory=options.directory / name), settings.precision)
        for name, member in members.items()
    }
    speaks = np.stack([member.speaks for member in members.values()])
    with scope(options):
        model = JointModel(towers, speaks, settings, options.seed, constants)
    pairs = JointPairs(data.matrix, _longest(members), derive_seed(options.seed, "histories"), towers, constants)
    rows = Rows(len(pairs), pairs.gather)
    parts = {name: tower.model for name, tower in towers.items()}
    conflict = Conflict(model, model.losses_of, parts, rows, settings.batch_size, options) if data.validate else None
    everybody = {**members, **(constants.whole if constants else {})}

    def measure() -> dict[str, float]:
        assert data.validate is not None and conflict is not None
        for tower in towers.values():
            tower.finish()
        return {**data.validate(_fused(everybody, model.weights_by_name())), **conflict()}

    history = fit(
        model,
        model.objective,
        rows,
        settings,
        options,
        measure if data.validate else None,
        data.monitor,
        parse_metric(data.monitor, "candidates").higher_is_better,
        drop_remainder=len(pairs) >= settings.batch_size,
        groups=model.groups(towers),
    )
    for tower in towers.values():
        tower.finish()
    count = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    return history, {"joint": {"weights": model.weights_by_name(), "parameters": count}}


def _fused(members: Mapping[str, Any], weights: dict[str, float]) -> RankingCore:
    """The members as they are now under the rule that training fuses them by."""
    average = RULES["average"]
    return RankingCore(MemberScores(members), average(average.Config(weights=weights), list(members), "candidates"))


def _longest(members: Mapping[str, TowerMember]) -> int:
    """Items of a history that training looks at: as many as any of the members wants."""
    return max((getattr(member.config, "max_history", 1) for member in members.values()), default=1)


class JointPairs(HistoryPairs):
    """Pairs with all that any of the members reads: `user`, `history`, `<member>/<input>` of the targets, and `fold` of
    the user where there are constants."""

    def __init__(
        self,
        matrix: sparse.csr_matrix,
        max_history: int,
        seed: int,
        towers: Mapping[str, Towers],
        constants: Constants | None = None,
    ) -> None:
        super().__init__(matrix, max_history, seed)
        self.readers = {name: tower.gather for name, tower in towers.items()}
        self.constants = constants

    def gather(self, positions: np.ndarray) -> Features:
        batch = {"user": self.users[positions], **super().gather(positions)}
        for name, read in self.readers.items():
            batch |= {f"{name}/{key}": array for key, array in read(batch["target"]).items()}
        if self.constants:
            batch["fold"] = self.constants.fold_of[batch["user"]]
            # Scorers expect padding at the end, and the target has left a gap.
            last = np.argsort(batch["history"] == PADDING, axis=1, kind="stable")
            batch["history"] = np.take_along_axis(batch["history"], last, axis=1)
        return batch


@dataclass(frozen=True)
class Said:
    """What members say of candidates, C of them, the batch's own targets first.

    Attributes:
        scores: by member, first those that are trained, float32 `[b, C]`.
        speaks: float32 `[b, S, C]`, 1 where a member speaks.
        candidates: their `target` int32 `[C]` and `probability` float32 `[C]`.
    """

    scores: list[tf.Tensor]
    speaks: tf.Tensor
    candidates: dict[str, tf.Tensor]


class JointModel(keras.Model):
    """The towers of several members, and what each counts in the fused scores. Made in the scope of the strategy.

    A member's in-batch scores are standardised for each pair over the candidates that it speaks about, and their
    weighted mean over the members that speak is multiplied by a sharpness that is learned: over the candidates of a
    batch the same as the rule `average` over the catalogue. A candidate about which nobody is heard is none.

    Args:
        towers: the members by name.
        speaks: bool `[S, I]`, the items about which each member says something.
        settings: weights, auxiliary losses and dropout.
        seed: of the dropout of members.
        constants: members that are heard without being trained.
    """

    def __init__(
        self,
        towers: Mapping[str, Towers],
        speaks: np.ndarray,
        settings: JointTraining,
        seed: int,
        constants: Constants | None = None,
    ) -> None:
        super().__init__(name="joint")
        self.names, self.settings = [*towers, *(constants.whole if constants else ())], settings
        self.parts = [tower.model for tower in towers.values()]
        self.temperatures = [tower.temperature for tower in towers.values()]
        self.constants = constants
        self.speaks = constant(speaks.astype(np.float32), tf.float32, "speaks")
        self.sharpness = self.add_weight("sharpness", (), initializer=keras.initializers.Constant(np.log(SHARPNESS)))
        learned = settings.weights == "learned"
        self.preference = self.add_weight("preference", (len(self.names),), initializer="zeros", trainable=learned)
        self.silenced = keras.layers.Dropout(
            settings.member_dropout, rng_type="stateful", force_generator=True, seed=derive_seed(seed, "members")
        )
        self.silenced.build(None)  # its random state has to be there before a checkpoint is read

    def groups(self, towers: Mapping[str, Towers]) -> list[Group]:
        """Each member's own optimizers, and one for the fusion; what members share is moved by the first of them."""
        own = [replace(g, name=f"{name}/{g.name}") for name, tower in towers.items() for g in tower.groups]
        fusion = [variable for variable in (self.sharpness, self.preference) if variable.trainable]
        return apart([*own, Group("fusion", fusion, OptimizerSettings(learning_rate=0.01))])

    def weights_by_name(self) -> dict[str, float]:
        """What each member counts; they sum to 1."""
        return dict(zip(self.names, tf.nn.softmax(self.preference).numpy().astype(float), strict=True))

    def said(self, batch: dict[str, tf.Tensor], training: bool = False, alone: bool = False) -> Said:
        """What the members say of the batch's targets: of all replicas', as for members that are trained by themselves
        (`recsys.collaborative.pairs.in_batch_softmax`), or, `alone`, of this batch's."""

        def gathered(rows: tf.Tensor) -> tf.Tensor:
            return rows if alone else all_replicas(rows)

        candidates = {name: gathered(batch[name]) for name in ("target", "probability")}
        scores = []
        for name, model, temperature in zip(self.names, self.parts, self.temperatures, strict=False):
            own = {key.removeprefix(f"{name}/"): tensor for key, tensor in batch.items()}
            vectors = model({key: own[key] for key in model.input_names}, training=training)
            scores.append(products(vectors["user"], gathered(vectors["item"])) / temperature)
        heard = tf.gather(self.speaks, candidates["target"], axis=1)
        speaks = tf.tile(heard[None], [tf.shape(batch["target"])[0], 1, 1])
        if self.constants is not None:
            said, answered = self.constants.said(batch["history"], batch["fold"], candidates["target"])
            scores += tf.unstack(said, num=len(self.constants.whole), axis=1)
            speaks = tf.concat([speaks, answered], axis=1)
        return Said(scores, speaks, candidates)

    def fuse(self, said: Said, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """The fused scores `[b, C]`, and 1 where anybody is heard about a candidate."""
        stacked = tf.stack(said.scores, axis=1)  # [b, S, C]
        heard = self._heard(tf.shape(stacked)[0], training)[:, :, None] * said.speaks
        share = tf.nn.softmax(self.preference)[:, None] * heard
        total = tf.reduce_sum(share * _standardised(stacked, said.speaks), axis=1)
        weight = tf.reduce_sum(share, axis=1)
        fused = tf.exp(self.sharpness) * tf.math.divide_no_nan(total, weight)
        return fused, tf.reduce_max(heard, axis=1)

    def objective(self, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """The loss `[b]`: `fused` times that of the fused scores, and `auxiliary` times the sum of the members' own."""
        said, settings = self.said(batch, training=True), self.settings
        own = tf.reduce_sum(self.own_losses(said, batch), axis=0)
        return settings.fused * self.fused_loss(said, batch, True) + settings.auxiliary * own

    def losses_of(self, batch: dict[str, tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Sums over a batch, whole in each replica, of the loss of the fused scores, all members being heard, and of
        each member's own."""
        said = self.said(batch, training=True, alone=True)
        own = tf.reduce_sum(self.own_losses(said, batch), axis=1)
        return tf.reduce_sum(self.fused_loss(said, batch, False)), tf.unstack(own, num=len(self.parts))

    def fused_loss(self, said: Said, batch: dict[str, tf.Tensor], training: bool) -> tf.Tensor:
        """The loss `[b]` of the fused scores."""
        fused, heard = self.fuse(said, training)
        return _in_batch(fused, heard, batch, said.candidates)

    def own_losses(self, said: Said, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """The loss of each member that is trained, `[S, b]`; 0 for targets about which it is silent."""
        known = tf.unstack(said.speaks, num=len(self.names), axis=1)
        losses = [
            _in_batch(scores, speaks, batch, said.candidates)
            for scores, speaks, _ in zip(said.scores, known, self.parts, strict=False)
        ]
        return tf.stack(losses)

    def _heard(self, size: tf.Tensor, training: bool) -> tf.Tensor:
        """1 for the members that are heard about each pair, `[b, S]`: in training not all, but one at least."""
        kept = tf.cast(self.silenced(tf.ones([size, len(self.names)]), training=training) > 0, tf.float32)
        return tf.maximum(kept, 1.0 - tf.reduce_max(kept, axis=1, keepdims=True))


def _in_batch(
    scores: tf.Tensor, heard: tf.Tensor, batch: dict[str, tf.Tensor], candidates: dict[str, tf.Tensor]
) -> tf.Tensor:
    """The loss `[b]` over the candidates that are heard of, `[b, C]`; 0 for a target that is not."""
    losses = in_batch_cross_entropy(scores + NEVER * (1.0 - heard), batch["target"], candidates)
    return losses * tf.linalg.diag_part(heard[:, : tf.shape(heard)[0]])


def _standardised(scores: tf.Tensor, speaks: tf.Tensor) -> tf.Tensor:
    """Scores `[b, S, C]` less their mean, over their deviation, both of the candidates that a member speaks about."""
    count = tf.maximum(tf.reduce_sum(speaks, axis=2, keepdims=True), 1.0)
    centred = scores - tf.reduce_sum(scores * speaks, axis=2, keepdims=True) / count
    variance = tf.reduce_sum(centred * centred * speaks, axis=2, keepdims=True) / count
    return centred * tf.math.rsqrt(variance + 1e-6)
