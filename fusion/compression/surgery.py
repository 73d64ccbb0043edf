"""Takes channels out of a functional model: what belongs together is found, and a smaller model is built anew.

Every channel of every tensor gets a number; channels that meet in an addition, a multiplication or a head of attention
become one *unit*, which is cut at all of its places or at none. So skip connections, depthwise convolutions,
concatenations and squeeze-and-excite need no case of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.compat import keras, tf
from fusion.compression.anatomy import Channels, Kind, Ledger, Maker, kind_of


@dataclass(frozen=True)
class Place:
    """A layer with the units of its channels.

    Attributes:
        kind: how the layer treats channels; None where it needs all of them.
        refusal: why it does.
        sources: the layer that made each tensor that it reads.
        read: for each of these tensors, the unit of each channel, int64 `[C]`.
        made: the unit of each channel that it makes.
    """

    layer: keras.layers.Layer
    kind: Kind | None
    refusal: str
    sources: tuple[str, ...]
    read: tuple[np.ndarray, ...]
    made: np.ndarray

    @property
    def makes(self) -> bool:
        """Whether its channels are its own."""
        return isinstance(self.kind, Maker)


@dataclass(frozen=True)
class Anatomy:
    """A model and its units.

    Attributes:
        model: the model.
        places: its layers, each after those that it reads.
        units: how many units there are.
        held: by unit, why it cannot be cut.
    """

    model: keras.Model
    places: tuple[Place, ...]
    units: int
    held: dict[int, str]

    @classmethod
    def of(cls, model: keras.Model) -> Anatomy:
        """Finds the units of a functional model; its inputs and its output stay as wide as they are."""
        ledger, wired = Ledger(), []
        channels: dict[int, Channels] = {}
        nodes = list(_nodes(model))
        calls = [id(node.layer) for node in nodes]
        for node in nodes:
            read = tuple(channels[id(tensor)] for tensor in node.keras_inputs)
            kind, refusal = kind_of(node) if read else (None, "is the model's input")
            if calls.count(id(node.layer)) > 1:
                kind, refusal = None, "is used more than once"
            made = kind.wire(node, read, ledger) if kind else _untouchable(node, read, refusal, ledger)
            channels |= {id(tensor): made for tensor in tf.nest.flatten(node.outputs)}
            sources = tuple(tensor.node.layer.name for tensor in node.keras_inputs)
            wired.append((node.layer, kind, refusal, sources, read, made))
        for tensor in model.outputs:
            ledger.hold(channels[id(tensor)], "shares channels with the model's output")
        unit, held = ledger.units()
        places = tuple(
            Place(layer, kind, refusal, sources, tuple(unit[each] for each in read), unit[made])
            for layer, kind, refusal, sources, read, made in wired
        )
        return cls(model, places, int(unit.max(initial=-1)) + 1, held)


def _nodes(model: keras.Model) -> Iterator[Any]:
    """The calls of layers that the model is made of, each after those that it reads."""
    # Walked from the outputs, because a layer may have been called in other models too, as those of a head are.
    waiting, done = [tensor.node for tensor in model.outputs], set()
    while waiting:
        node = waiting[-1]
        before = [tensor.node for tensor in node.keras_inputs if id(tensor.node) not in done]
        if id(node) in done or before:
            waiting = waiting[:-1] if id(node) in done else waiting + before
            continue
        done.add(id(waiting.pop()))
        yield node


def _untouchable(node: Any, read: Sequence[Channels], refusal: str, ledger: Ledger) -> Channels:
    """What a layer makes that needs all of its channels; what it reads has to stay too."""
    widths = [tensor.shape[-1] or 0 for tensor in tf.nest.flatten(node.outputs) if tensor.shape.rank]
    made = ledger.fresh(max(widths, default=0))
    for channels in (*read, made):
        ledger.hold(channels, f"shares channels with {node.layer.name}, which {refusal}")
    return made


def rebuild(anatomy: Anatomy, kept: np.ndarray, shifts: Mapping[str, np.ndarray] | None = None) -> keras.Model:
    """A new model with the units that stay alone; each layer has the weights that it had for them.

    Args:
        anatomy: of the model, which stays as it is.
        kept: bool `[units]`; those that are held must be among them, and at least one of each tensor.
        shifts: by layer that mixes channels, what is added to its biases `[made]` before it is cut; a layer without
            biases gets some.
    """
    shifts = shifts or {}
    places = {place.layer.name: place for place in anatomy.places}

    def resized(layer: keras.layers.Layer) -> keras.layers.Layer:
        return type(layer).from_config(layer.get_config() | _settings(places[layer.name], kept, shifts))

    copy = keras.models.clone_model(anatomy.model, clone_function=resized)
    for name, place in places.items():
        weights = place.layer.get_weights()
        if name in shifts:
            weights = _shifted(place.layer, weights, shifts[name])
        if place.kind and weights:
            weights = place.kind.cut(weights, [kept[units] for units in place.read], kept[place.made])
        copy.get_layer(name).set_weights(weights)
    return copy


def _settings(place: Place, kept: np.ndarray, shifts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What of a layer's settings changes."""
    before, after = len(place.made), int(kept[place.made].sum())
    changed = place.kind.settings(place.layer, before, after) if place.kind and after < before else {}
    return changed | ({"use_bias": True} if place.layer.name in shifts else {})


def _shifted(layer: keras.layers.Layer, weights: list[np.ndarray], shift: np.ndarray) -> list[np.ndarray]:
    if layer.use_bias:
        return [*weights[:-1], (weights[-1] + shift).astype(np.float32)]
    return [*weights, shift.astype(np.float32)]


def changed_layers(before: keras.Model, after: keras.Model) -> list[str]:
    """Layers whose weights have other shapes than they had."""
    return [
        layer.name
        for layer in before.layers
        if [weight.shape for weight in layer.weights]
        != [weight.shape for weight in after.get_layer(layer.name).weights]
    ]


def facts_of(anatomy: Anatomy, after: keras.Model) -> dict[str, Any]:
    """What was cut: the `channels` before and after by layer that makes them, and the `parameters` of the models."""
    channels = {
        place.layer.name: [len(place.made), int(after.get_layer(place.layer.name).output_shape[-1])]
        for place in anatomy.places
        if place.makes
    }
    return {
        "channels": {name: counts for name, counts in channels.items() if counts[0] != counts[1]},
        "parameters": [anatomy.model.count_params(), after.count_params()],
    }
