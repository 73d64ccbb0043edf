"""Channel pruning: cuts the weakest channels out of a model and builds it anew, smaller and faster everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.compression.anatomy import Maker, Normalised
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    FineTuned,
    LayerPatterns,
    Method,
    chosen_layers,
    inputs_of,
    told,
)
from fusion.compression.masks import fine_tune_sparse
from fusion.compression.surgery import Anatomy, Place, facts_of, rebuild
from fusion.errors import GateError
from fusion.training.averaging import latest_statistics, set_statistics, statistics_of
from fusion.types import derive_seed

layers = keras.layers

LEAST_KEPT = 0.1
"""Share of its units that a group keeps where the model as a whole is cut: a layer with next to none would stop
everything that passes through it (Tanaka et al. 2020, https://arxiv.org/abs/2006.05467)."""

TAYLOR_BATCHES, STATISTICS_BATCHES = 8, 16
"""Batches over which the importance by `taylor` is averaged, and those that new statistics are estimated from."""


class Channels(Method):
    """Cuts whole channels: filters of convolutions, hidden units of dense layers, heads of attention.

    Channels that meet in an addition, a multiplication or a head are cut together. The answer of the model and what it
    reads stay as wide as they are, and so does everything that meets a layer which needs all channels, such as a
    LayerNormalization.

    BatchNormalization, frozen or not, then gets the statistics of training rows in the smaller model (Li et al. 2020,
    https://arxiv.org/abs/2007.02491), and all layers are trained, also those that were frozen or lost nothing, with the
    zeros of pruned kernels kept. Scales and offsets of a frozen BatchNormalization stay.
    """

    class Config(FineTuned):
        """Settings of channel pruning."""

        ratio: float = Field(0.5, gt=0, lt=1)
        """Share of the channels that are cut, before rounding."""
        scope: Literal["group", "global"] = "group"
        """Whether each group of layers that belong together loses this share of its channels, or the model as a whole,
        in which a channel is compared with the mean of its group."""
        score: Literal["l1", "l2", "batch_norm", "taylor", "random"] = "l1"
        """What a channel counts for. l1, l2: the norm of the kernels that make it (Li et al. 2017, arXiv:1608.08710);
        batch_norm: the scale of its BatchNormalization (Liu et al. 2017, arXiv:1708.06519); taylor: what the loss
        loses without it, to first order (Molchanov et al. 2019, arXiv:1906.10771), over training rows; random:
        a number drawn by lot, as a baseline."""
        multiple: int = Field(8, ge=1, le=256)
        """Layers keep a multiple of this many channels, which kernels of processors are made for; groups that are no
        wider are left alone."""
        layers: LayerPatterns = ()
        """Which layers lose channels that they make; a group is cut where all of its layers are among them. None: all
        that can."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """The smaller model, fine-tuned. Raises as `Method.apply`."""
        model, alone, facts = self.cut(subject.model, data)
        estimate_statistics(model, data, self.config.training.batch_size)
        fine_tune_sparse(model, data, self.config.training)
        return replace(subject, model=model), Applied(alone, facts)

    def cut(self, model: keras.Model, data: CompressionData) -> tuple[keras.Model, dict[str, str], dict[str, object]]:
        """The smaller model before fine-tuning, the layers left alone and why, and the facts."""
        anatomy = Anatomy.of(model)
        _, not_asked = chosen_layers(model, self.config.layers, smallest=1)
        scores = _scores(anatomy, self.config.score, self.config.training.batch_size, data)
        groups, reasons = _groups(anatomy, scores, set(not_asked), self.config.multiple)
        kept = np.ones(anatomy.units, bool)
        for group, wanted in zip(groups, self._wanted(groups, scores), strict=True):
            count = rounded(wanted, len(group.units), group.size, self.config.multiple)
            weakest_first = group.units[np.argsort(scores[group.units], kind="stable")]
            kept[weakest_first[: len(group.units) - count]] = False
            if count == len(group.units):
                reasons |= dict.fromkeys(group.units.tolist(), "keeps all of its channels at this ratio and multiple")
        alone = _left_alone(anatomy, kept, reasons)
        if kept.all():
            why = told(alone)
            raise GateError(
                f"channel pruning must find channels to cut; there are none ({why}). "
                "Raise ratio, lower multiple, or choose other layers."
            )
        smaller = rebuild(anatomy, kept)
        return smaller, alone, facts_of(anatomy, smaller)

    def _wanted(self, groups: list[Group], scores: np.ndarray) -> list[float]:
        """How many units each group should keep, before rounding."""
        if self.config.scope == "group" or not groups:
            return [(1.0 - self.config.ratio) * len(group.units) for group in groups]
        # Kernels of different sizes have norms of different sizes, so a unit is compared with the mean of its group.
        relative = [scores[group.units] / (scores[group.units].mean() or 1.0) for group in groups]
        sizes = np.concatenate([np.full(len(group.units), group.size) for group in groups])
        weakest_first = np.argsort(np.concatenate(relative), kind="stable")
        stays = np.ones(len(sizes), bool)
        stays[weakest_first[np.cumsum(sizes[weakest_first]) <= self.config.ratio * sizes.sum()]] = False
        parts = np.split(stays, np.cumsum([len(each) for each in relative])[:-1])
        return [max(float(part.sum()), LEAST_KEPT * len(part)) for part in parts]


@dataclass(frozen=True)
class Group:
    """Units that the same layers make.

    Attributes:
        units: numbers of the units, int64 `[U]`.
        size: how many channels of each of these layers a unit has: 1, or those of a head of attention.
    """

    units: np.ndarray
    size: int


def rounded(wanted: float, units: int, size: int, multiple: int) -> int:
    """How many of a group's units stay, so that their channels are a multiple; at least one multiple, at most all.

    >>> [rounded(wanted, 32, 1, 8) for wanted in (1, 11, 12, 20, 32)], rounded(5, 12, 64, 8)
    ([8, 8, 16, 24, 32], 5)
    """
    step = multiple // math.gcd(multiple, size)
    return min(units, step * max(1, math.floor(wanted / step + 0.5)))


# ---- what belongs together --------------------------------------------------------------------------------------


def _groups(
    anatomy: Anatomy, scores: np.ndarray, not_asked: set[str], multiple: int
) -> tuple[list[Group], dict[int, str]]:
    """The groups that can be cut, and by unit of the others why not."""
    makers: dict[int, list[Place]] = {}
    for place in anatomy.places:
        if place.makes:
            for unit in np.unique(place.made).tolist():
                makers.setdefault(unit, []).append(place)
    together: dict[tuple[str, ...], list[int]] = {}
    reasons = dict(anatomy.held)
    for unit, made_by in makers.items():
        if unit not in reasons:
            together.setdefault(tuple(place.layer.name for place in made_by), []).append(unit)
    groups = []
    for names, units in together.items():
        group = Group(np.array(units), int((makers[units[0]][0].made == units[0]).sum()))
        reason = _why_not(group, names, scores, not_asked, multiple)
        if reason is None:
            groups.append(group)
        reasons |= dict.fromkeys(units, reason) if reason else {}
    return groups, reasons


def _why_not(
    group: Group, names: tuple[str, ...], scores: np.ndarray, not_asked: set[str], multiple: int
) -> str | None:
    others = [name for name in names if name in not_asked]
    if others:
        beside = "" if len(others) == len(names) else f"belongs to a group with {others[0]}, which is "
        return f"{beside}not among the layers that were asked for"
    if rounded(0, len(group.units), group.size, multiple) == len(group.units):
        return f"has only {len(group.units) * group.size} channels"
    if np.isnan(scores[group.units]).any():
        return "has no BatchNormalization with a scale to be scored by"
    return None


def _left_alone(anatomy: Anatomy, kept: np.ndarray, reasons: dict[int, str]) -> dict[str, str]:
    """By layer with weights that loses none of them, why."""
    alone = {}
    for place in anatomy.places:
        cut = not all(kept[units].all() for units in (*place.read, place.made))
        if not place.layer.weights or (place.kind and cut):
            continue
        alone[place.layer.name] = place.refusal or reasons[int(place.made[0])]
    return alone


# ---- what a channel counts for ----------------------------------------------------------------------------------


def _scores(anatomy: Anatomy, score: str, batch_size: int, data: CompressionData) -> np.ndarray:
    """What each unit counts for, float64 `[units]`: the sum over the channels of all layers that make it.

    NaN where there is nothing to tell it by.
    """
    if score == "random":
        return np.random.default_rng(derive_seed(data.options.seed, "channels")).random(anatomy.units)
    if score == "batch_norm":
        return _summed(anatomy, _scales(anatomy), np.nan)
    makers = [place for place in anatomy.places if place.makes]
    kernels = [place.kind.kernel(place.layer) for place in makers if isinstance(place.kind, Maker)]
    if score == "taylor":
        importance = _taylor(anatomy.model, kernels, batch_size, data)
    else:
        order = {"l1": 1, "l2": 2}[score]
        importance = [np.linalg.norm(_columns(np.asarray(kernel)), order, axis=0) for kernel in kernels]
    return _summed(anatomy, zip(makers, importance, strict=True), 0.0)


def _summed(anatomy: Anatomy, scored: Iterator[tuple[Place, np.ndarray]], start: float) -> np.ndarray:
    """Adds up the scores of channels by unit; `start` is the score of units without any."""
    sums, counts = np.zeros(anatomy.units), np.zeros(anatomy.units)
    for place, scores in scored:
        np.add.at(sums, place.made, scores)
        np.add.at(counts, place.made, 1)
    return np.where(counts > 0, sums, start)


def _scales(anatomy: Anatomy) -> Iterator[tuple[Place, np.ndarray]]:
    for place in anatomy.places:
        if isinstance(place.kind, Normalised) and place.layer.gamma is not None:
            yield place, np.abs(np.asarray(place.layer.gamma))


def _columns(kernel: np.ndarray) -> np.ndarray:
    """A kernel with one column for each channel that it makes."""
    return kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)


def _taylor(model: keras.Model, kernels: list[tf.Variable], batch_size: int, data: CompressionData) -> list[np.ndarray]:
    """By kernel, the mean over batches of the square of the sum of gradient times weight over each channel."""

    @tf.function(reduce_retracing=True)
    def gradients(batch: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(kernels)  # also those that are frozen
            loss = tf.reduce_mean(data.loss(model(inputs_of(model, batch), training=False), batch))
        found = tape.gradient(loss, kernels, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(gradient) for gradient in found]  # those of tables of embeddings are sparse

    weights = [_columns(np.asarray(kernel)) for kernel in kernels]
    sums = [np.zeros(columns.shape[1]) for columns in weights]
    batches = _batches(data, batch_size, TAYLOR_BATCHES)
    for batch in batches:
        for total, columns, gradient in zip(sums, weights, gradients(batch), strict=True):
            total += (columns * _columns(np.asarray(gradient))).sum(axis=0) ** 2 / len(batches)
    return sums


# ---- training rows ----------------------------------------------------------------------------------------------


def estimate_statistics(model: keras.Model, data: CompressionData, batch_size: int) -> None:
    """Gives every BatchNormalization the mean and variance of what it reads on training rows, drawn at random."""
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    trainable = [layer.trainable for layer in norms]
    for layer in norms:
        layer.trainable = True  # a frozen one would use the statistics that it has

    @tf.function(reduce_retracing=True)
    def statistics(batch: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        model(inputs_of(model, batch), training=True)
        return [variable.read_value() for variable in statistics_of(norms)]

    with latest_statistics(norms):
        found = [statistics(batch) for batch in _batches(data, batch_size, STATISTICS_BATCHES)]
    set_statistics(norms, [np.stack(parts) for parts in zip(*found, strict=True)])
    for layer, was in zip(norms, trainable, strict=True):
        layer.trainable = was


def _batches(data: CompressionData, batch_size: int, most: int) -> list[dict[str, tf.Tensor]]:
    """Up to `most` full batches of training rows, drawn at random; all rows as one where they are fewer."""
    order = np.random.default_rng(derive_seed(data.options.seed, "channels")).permutation(data.rows.n)
    size = min(batch_size, len(order))
    return [
        {name: tf.constant(array) for name, array in data.rows.gather(np.sort(order[start : start + size])).items()}
        for start in range(0, len(order) - size + 1, size)[:most]
    ]
