"""Trimming: units that say nothing are taken out, and every output stays what it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fusion.compression.anatomy import Constants, Mixer, Response
from fusion.compression.base import Applied, Compressed, CompressionData, Method
from fusion.compression.surgery import Anatomy, Place, changed_layers, facts_of, rebuild
from fusion.config import Settings
from fusion.errors import GateError


class Trim(Method):
    """Takes out channels that are constant, such as those of a filter of zeros, and channels that nobody reads.

    What a constant channel gave to the layers after it goes into their biases, so that the answers are the same to
    float precision; nothing is trained. A constant other than zero stays where the next convolution pads with zeros,
    because it is no constant at the borders. Pruning leaves such channels behind.
    """

    class Config(Settings):
        """Trimming has no settings: what can go without a trace goes."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """The model without its dead units. Raises GateError where there is none."""
        anatomy = Anatomy.of(subject.model)
        readers = list(_readers(anatomy))
        dead = _dead(anatomy, readers)
        if not dead.any():
            raise GateError(
                "trimming must find channels that are constant, or that nobody reads; the model has none. "
                "Prune it first, or leave trimming out."
            )
        model = rebuild(anatomy, ~dead, _shifts(readers, dead))
        changed = changed_layers(subject.model, model)
        alone = {
            layer.name: "has no channel that is constant or that nobody reads"
            for layer in subject.model.layers
            if layer.weights and layer.name not in changed
        }
        return replace(subject, model=model), Applied(alone, facts_of(anatomy, model))


@dataclass(frozen=True)
class _Reader:
    """A layer that mixes channels, how it answers to each, and which of them are constant."""

    place: Place
    response: Response
    constants: Constants

    @property
    def foldable(self) -> np.ndarray:
        """Input channels whose part can go into the biases, bool `[I]`."""
        return self.response.foldable(self.constants)


def _readers(anatomy: Anatomy) -> Iterator[_Reader]:
    """Follows constants from the input to the output."""
    made: dict[str, Constants] = {}
    for place in anatomy.places:
        name, read = place.layer.name, [made[source] for source in place.sources]
        made[name] = place.kind.constants(place.layer, read) if place.kind else np.full(len(place.made), np.nan)
        if isinstance(place.kind, Mixer):
            yield _Reader(place, place.kind.response(place.layer), read[0])


def _dead(anatomy: Anatomy, readers: list[_Reader]) -> np.ndarray:
    """The units that can go, bool `[units]`: every layer that mixes channels can fold each of theirs, or has zeros for
    it in all outputs that stay. At least one unit of each tensor stays."""
    free = np.ones(anatomy.units, bool)
    free[list(anatomy.held)] = False
    dead, found = np.zeros(anatomy.units, bool), -1
    while dead.sum() > found:  # without a unit that goes, others may have nobody left who reads them
        found, missed = int(dead.sum()), np.zeros(anatomy.units, bool)
        for reader in readers:
            read = reader.response.used[:, ~dead[reader.place.made]].any(axis=1)
            missed[reader.place.read[0][read & ~reader.foldable]] = True
        dead = free & ~missed
    for place in anatomy.places:
        if len(place.made) and dead[place.made].all():
            dead[place.made[0]] = False
    return dead


def _shifts(readers: list[_Reader], dead: np.ndarray) -> dict[str, np.ndarray]:
    """By layer, what the constant channels that go gave to its outputs `[O]`."""
    shifts = {}
    for reader in readers:
        gone = dead[reader.place.read[0]] & reader.foldable
        shift = reader.response.added(reader.constants, gone)
        if shift[~dead[reader.place.made]].any():
            shifts[reader.place.layer.name] = shift
    return shifts
