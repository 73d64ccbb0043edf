"""Trains members of a ranking together, by the gradient of their fused scores, and leaves each as if trained alone.

One graph holds every member that is trained on pairs (a history, the item to be found): factorisation, content, two
towers. The others of the batch's targets are the negatives, for the fused scores as for each member's own
(Covington et al. 2016, "Deep Neural Networks for YouTube Recommendations"; one loss over wide and deep parts: Cheng
et al. 2016, "Wide & Deep Learning for Recommender Systems"). Members without a gradient, or with a loss of their own
kind (EASE, kNN, sequences), have no part in that loss: they are fitted one by one, and meet the others in the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import keras, tf
from fusion.config import Part
from fusion.errors import ConfigError
from fusion.rules import RULES
from fusion.training.joint import JointSettings
from fusion.training.optimizers import Group, OptimizerSettings
from fusion.training.strategy import scope
from fusion.training.trainer import LoopSettings, fit
from fusion.types import Features, History, RunOptions, derive_seed
from recsys.collaborative.base import TrainingData, constant
from recsys.collaborative.pairs import NEVER, HistoryPairs, TowerMember, Towers, in_batch_cross_entropy
from recsys.core import MemberScores, RankingCore
from recsys.metrics import parse_metric

SHARPNESS = 2.0
"""What fused z-scores are multiplied by at the start of training, which then learns it."""


class JointTraining(LoopSettings, JointSettings):
    """How members are trained: each by itself, or those that are trained on pairs through their fused scores."""

    batch_size: int = Field(512, ge=2)
    """Pairs of a step; the targets of the others are the negatives of each."""
    weights: Literal["equal", "learned"] = "equal"
    """What members count in the fused scores while they are trained."""


def together(members: Mapping[str, Part], settings: JointTraining) -> dict[str, Part]:
    """The members that are trained in one graph: none where each is trained by itself."""
    if settings.mode == "separate":
        return {}
    return {name: part for name, part in members.items() if _joins(part)}


def _joins(part: Part) -> bool:
    kind = part.registry[part.kind]
    return issubclass(kind, TowerMember) and kind.joins(part.config)


def check_joint(members: Mapping[str, Part], settings: JointTraining) -> None:
    """Raises ConfigError where joint training has fewer than two members to train."""
    joined = together(members, settings)
    if settings.mode == "joint" and len(joined) < 2:
        raise ConfigError(
            "training.mode joint needs two members that are trained on pairs with a softmax (matrix_factorization, "
            f"light_gcn, two_tower, content with scorer trained); received {', '.join(joined) or 'none'}. "
            "Add one, or take mode separate."
        )


def train_jointly(
    members: Mapping[str, TowerMember], settings: JointTraining, data: TrainingData, options: RunOptions
) -> tuple[History, dict[str, float]]:
    """Trains members in place; returns what training did, and what each member counted in the fused scores.

    After each epoch the fused scores are measured on the validation users, and the best epoch is kept.
    """
    towers = {
        name: member.towers(data, replace(options, directory=options.directory / name))
        for name, member in members.items()
    }
    with scope(options):
        model = JointModel(towers, np.stack([member.speaks for member in members.values()]), settings, options.seed)
    validate = data.validate

    def measure() -> dict[str, float]:
        for tower in towers.values():
            tower.finish()
        return validate(_fused(members, model.weights_by_name())) if validate else {}

    pairs = JointPairs(data.matrix, _longest(members), derive_seed(options.seed, "histories"), towers)
    history = fit(
        model,
        model.objective,
        (len(pairs), pairs.gather),
        settings,
        options,
        measure if validate else None,
        data.monitor,
        parse_metric(data.monitor, "candidates").higher_is_better,
        drop_remainder=len(pairs) >= settings.batch_size,
        groups=model.groups(towers),
    )
    for tower in towers.values():
        tower.finish()
    return history, model.weights_by_name()


def _fused(members: Mapping[str, TowerMember], weights: dict[str, float]) -> RankingCore:
    """The members as they are now under the rule that training fuses them by."""
    average = RULES["average"]
    return RankingCore(MemberScores(members), average(average.Config(weights=weights), list(members), "candidates"))


def _longest(members: Mapping[str, TowerMember]) -> int:
    """Items of a history that training looks at: as many as any of the members wants."""
    return max((getattr(member.config, "max_history", 1) for member in members.values()), default=1)


class JointPairs(HistoryPairs):
    """Pairs with all that any of the members reads: `user`, `history`, and `<member>/<input>` of the targets."""

    def __init__(self, matrix: sparse.csr_matrix, max_history: int, seed: int, towers: Mapping[str, Towers]) -> None:
        super().__init__(matrix, max_history, seed)
        self.readers = {name: tower.gather for name, tower in towers.items()}

    def gather(self, positions: np.ndarray) -> Features:
        batch = {"user": self.users[positions], **super().gather(positions)}
        for name, read in self.readers.items():
            batch |= {f"{name}/{key}": array for key, array in read(batch["target"]).items()}
        return batch


class JointModel(keras.Model):
    """The towers of several members, and what each counts in the fused scores. Made in the scope of the strategy.

    A member's in-batch scores are standardised for each pair over the candidates that it speaks about, and their
    weighted mean over the members that speak is multiplied by a sharpness that is learned: over the candidates of a
    batch the same as the rule `average` over the catalogue.

    Args:
        towers: the members by name.
        speaks: bool `[S, I]`, the items about which each member says something.
        settings: weights, auxiliary losses and dropout.
        seed: of the dropout of members.
    """

    def __init__(self, towers: Mapping[str, Towers], speaks: np.ndarray, settings: JointTraining, seed: int) -> None:
        super().__init__(name="joint")
        self.names, self.settings = list(towers), settings
        self.parts = [tower.model for tower in towers.values()]
        self.temperatures = [tower.temperature for tower in towers.values()]
        self.speaks = constant(speaks.astype(np.float32), tf.float32, "speaks")
        self.sharpness = self.add_weight("sharpness", (), initializer=keras.initializers.Constant(np.log(SHARPNESS)))
        learned = settings.weights == "learned"
        self.preference = self.add_weight("preference", (len(towers),), initializer="zeros", trainable=learned)
        self.silenced = keras.layers.Dropout(
            settings.member_dropout, rng_type="stateful", force_generator=True, seed=derive_seed(seed, "members")
        )
        self.silenced.build(None)  # its random state has to be there before a checkpoint is read

    def groups(self, towers: Mapping[str, Towers]) -> list[Group]:
        """Each member's own optimizers, and one for the fusion."""
        own = [replace(g, name=f"{name}/{g.name}") for name, tower in towers.items() for g in tower.groups]
        fusion = [variable for variable in (self.sharpness, self.preference) if variable.trainable]
        return [*own, Group("fusion", fusion, OptimizerSettings(learning_rate=0.01))]

    def weights_by_name(self) -> dict[str, float]:
        """What each member counts; they sum to 1."""
        return dict(zip(self.names, tf.nn.softmax(self.preference).numpy().astype(float), strict=True))

    def call(self, batch: dict[str, tf.Tensor], training: bool = False) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Each member's scores `[b, b]` of the batch's targets, and which of these it speaks about, `[S, b]`."""
        scores = []
        for name, model, temperature in zip(self.names, self.parts, self.temperatures, strict=True):
            own = {key.removeprefix(f"{name}/"): tensor for key, tensor in batch.items()}
            vectors = model({key: own[key] for key in model.input_names}, training=training)
            scores.append(_products(vectors["user"], vectors["item"]) / temperature)
        return scores, tf.gather(self.speaks, batch["target"], axis=1)

    def fuse(self, scores: list[tf.Tensor], speaks: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The fused scores `[b, b]`."""
        stacked = tf.stack(scores, axis=1)  # [b, S, b]
        heard = self._heard(tf.shape(stacked)[0], training)[:, :, None] * speaks
        share = tf.nn.softmax(self.preference)[:, None] * heard
        total = tf.reduce_sum(share * _standardised(stacked, speaks), axis=1)
        return tf.exp(self.sharpness) * total / tf.maximum(tf.reduce_sum(share, axis=1), 1e-6)

    def objective(self, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """The loss `[b]`: `fused` times that of the fused scores, and `auxiliary` times the sum of the members' own."""
        (scores, speaks), settings = self(batch, training=True), self.settings
        fused = in_batch_cross_entropy(self.fuse(scores, speaks, training=True), batch)
        own = [
            in_batch_cross_entropy(score + NEVER * (1.0 - known), batch) * known
            for score, known in zip(scores, tf.unstack(speaks), strict=True)
        ]
        return settings.fused * fused + settings.auxiliary * tf.reduce_sum(tf.stack(own), axis=0)

    def _heard(self, size: tf.Tensor, training: bool) -> tf.Tensor:
        """1 for the members that are heard about each pair, `[b, S]`: in training not all, but one at least."""
        kept = tf.cast(self.silenced(tf.ones([size, len(self.names)]), training=training) > 0, tf.float32)
        return tf.maximum(kept, 1.0 - tf.reduce_max(kept, axis=1, keepdims=True))


def _products(user: tf.Tensor, item: tf.Tensor) -> tf.Tensor:
    """Scores `[b, b]` of users `[b, D]`, or of the best of their vectors `[b, K, D]`, with items `[b, D]`."""
    users = user[:, None] if user.shape.rank == 2 else user
    return tf.reduce_max(tf.tensordot(users, item, [[2], [1]]), axis=1)


def _standardised(scores: tf.Tensor, speaks: tf.Tensor) -> tf.Tensor:
    """Scores `[b, S, b]` less their mean, over their deviation, both of the candidates that a member speaks about."""
    count = tf.maximum(tf.reduce_sum(speaks, axis=1), 1.0)[:, None]
    centred = scores - tf.reduce_sum(scores * speaks, axis=2, keepdims=True) / count
    variance = tf.reduce_sum(centred * centred * speaks, axis=2, keepdims=True) / count
    return centred * tf.math.rsqrt(variance + 1e-6)
