"""Starts a new model from the weights of a fitted one: arrays of layers of the same name, where the shapes agree.

How far weights carry over to another task: Yosinski et al. 2014 (arXiv:1411.1792). Who reads the files of the fitted
model is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusion.compat import keras
from fusion.errors import ConfigError

if TYPE_CHECKING:
    from fusion.submodels.base import Submodel


class WarmStart:
    """What a fitted member gives to a new one, and what became of it.

    Args:
        origin: where it comes from, for messages.
        encoder: the fitted member's.
        model: its layers, those of the encoder among them.

    Attributes:
        origin: as given.
        adapted: what the encoder adapted, by name, as its vocabulary; empty where it adapts nothing.
        taken: arrays of the new model that have their numbers from here, as `layer/array`.
        new: the others, which start as they would have without.
    """

    def __init__(self, origin: str, encoder: Submodel, model: keras.Model) -> None:
        self.origin = origin
        self.adapted = encoder.state()
        self.taken: list[str] = []
        self.new: list[str] = []
        self._identity = _identity(encoder)
        self._weights = {layer.name: layer.get_weights() for layer in model.layers if layer.weights}

    def check(self, encoder: Submodel) -> None:
        """Raises ConfigError for an encoder that cannot take what the fitted one adapted."""
        if self.adapted and _identity(encoder) != self._identity:
            raise ConfigError(
                f"the encoder in {self.origin} adapted {', '.join(sorted(self.adapted))} to its training rows, which "
                f"only one of the same kind and settings can take; this {type(encoder).__name__} is another. Give the "
                "member the same encoder, or another init_from."
            )

    def give_encoder(self, layers: Sequence[keras.layers.Layer]) -> None:
        """As `give`; raises ConfigError where an encoder has weights and none of them is taken."""
        before = len(self.taken)
        self.give(layers)
        if any(layer.weights for layer in layers) and len(self.taken) == before:
            raise ConfigError(
                f"some weights of {self.origin} must fit the encoder by the name of their layer and by shape; none "
                f"does: it has {_first(self._weights)}, ..., and the encoder needs {', '.join(self.new[:2])}, .... "
                "Name a member with the same kind of encoder in init_from."
            )

    def give(self, layers: Sequence[keras.layers.Layer]) -> None:
        """Puts the weights of equally named layers in place where the shapes agree, and remembers what it did."""
        for layer in layers:
            kept = self._weights.get(layer.name, [])
            for position, variable in enumerate(layer.weights):
                name = f"{layer.name}/{variable.name.rpartition('/')[2].partition(':')[0]}"
                if position < len(kept) and kept[position].shape == tuple(variable.shape):
                    variable.assign(kept[position])
                    self.taken.append(name)
                else:
                    self.new.append(f"{name} {list(variable.shape)}")


def _identity(encoder: Submodel) -> tuple[str, Any]:
    settings = encoder.config.model_dump(mode="json", exclude=set(encoder.not_in_fingerprint))
    return type(encoder).__name__, settings


def _first(weights: dict[str, Any]) -> str:
    named = [f"{name} {list(array.shape)}" for name, arrays in weights.items() for array in arrays[:1]]
    return ", ".join(named[:2]) or "none"
