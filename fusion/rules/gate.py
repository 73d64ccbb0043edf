"""A mixture of experts: weights that depend on the example, by a linear gate or a small network over what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.rules.context import fit_scale, standardised
from fusion.rules.fitting import CandidateLists, ClassRows
from fusion.rules.mixture import MixtureRule, MixtureSettings
from fusion.types import Context, Over, derive_seed

CONTEXT: dict[Over, tuple[str, ...]] = {"classes": ("words",), "candidates": ("history_length", "popularity")}
"""What a gate reads when its settings name nothing."""


@keras.saving.register_keras_serializable("fusion")
class Gate(MixtureRule):
    """A mean with weights `softmax(W·x + b)` over the members that speak.

    It is the gate of Jacobs et al. 1991, "Adaptive mixtures of local experts", over experts that stay as they are.
    x is what is known of the row, or of the candidate: the context, less its mean and over its deviation (0 where it
    is unknown); for each member 1 where it is silent; and, over classes, how sure each member is, its largest
    calibrated probability. With `hidden` units `tanh(A·x + a)` stands in place of x.
    """

    class Config(MixtureSettings):
        """Settings of the gate."""

        context: tuple[str, ...] | None = None
        """What it reads of an example; history_length and popularity of candidates, words of classes when not given."""
        confidence: bool = True
        """Classes: it reads how sure each member is."""
        hidden: int = Field(0, ge=0, le=256)
        """Units of the hidden layer; 0 is a linear gate."""

    config: Config
    member_axes: ClassVar[Mapping[str, int | None]] = {"scale": None, "hidden": None, "hidden_bias": None}

    def __init__(self, config: Config, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        if config.context is None:
            config = config.model_copy(update={"context": CONTEXT[over]})
        super().__init__(config, members, over, **kwargs)
        self._scaled = list(self.reads(config))
        if over == "classes" and config.confidence:
            self._scaled += [f"confidence of {name}" for name in self.members]
        self._inputs = [*self._scaled, *[f"silence of {name}" for name in self.members]]
        if self._scaled:
            self._number("scale", np.tile(np.array([0.0, 1.0], np.float32), (len(self._scaled), 1)))
        wide = len(self._inputs)
        if config.hidden:
            self._parameter("hidden", (config.hidden, wide))
            self._parameter("hidden_bias", (config.hidden, 1))
            wide = config.hidden
        self._parameter("gate", (len(self.members), wide))
        self._parameter("gate_bias", (len(self.members), 1))

    @classmethod
    def reads(cls, config: Config) -> tuple[str, ...]:  # type: ignore[override]
        """The context; nothing before it is known what the gate is over."""
        return config.context or ()

    def _member_logits(self, numbers: Mapping[str, Any], features: Any, speaks: Any, context: Context) -> Any:
        inputs = tf.cast(self._read(features, speaks, context), features.dtype)  # [B, X, C]
        if self.config.hidden:
            inputs = tf.tanh(tf.matmul(numbers["hidden"][tf.newaxis], inputs) + numbers["hidden_bias"])
        return tf.matmul(numbers["gate"][tf.newaxis], inputs) + numbers["gate_bias"]

    def _read(self, features: Any, speaks: Any, context: Context) -> Any:
        """What the gate reads, float32 `[B, X, 1]` over classes and `[B, X, C]` over candidates."""
        if self.over == "classes":
            speaks = speaks[:, :, :1]
        silent = tf.cast(tf.logical_not(speaks), tf.float32)
        if not self._scaled:
            return silent
        values = {**context, **self._confidence(features, speaks)}
        known = standardised(values, self._scaled, self._numbers["scale"], tf.shape(silent[:, 0]))
        return tf.concat([known, silent], axis=1)

    def _confidence(self, features: Any, speaks: Any) -> dict[str, Any]:
        """The largest probability of each member, `[B, 1]`, NaN where silent."""
        if self.over == "candidates" or not self.config.confidence:
            return {}
        largest = tf.cast(tf.reduce_max(tf.where(speaks, features, 0), axis=2), tf.float32)
        largest = tf.where(speaks[:, :, 0], largest, np.float32("nan"))
        return {f"confidence of {name}": largest[:, s : s + 1] for s, name in enumerate(self.members)}

    def _prepare(self, features: np.ndarray, speaks: np.ndarray, context: Context, weights: np.ndarray | None) -> None:
        if not self._scaled:
            return
        values = {**context, **self._confidence(tf.constant(features), tf.constant(speaks))}
        self._numbers["scale"].assign(fit_scale(values, self._scaled, weights))

    def _cut(self, name: str, values: np.ndarray, places: list[int]) -> np.ndarray:
        """As `Rule._cut`. The members that are left out are silent for good, which becomes part of the bias."""
        layer = "hidden" if self.config.hidden else "gate"
        silence, read = len(self._scaled), len(self.reads(self.config))
        confidence = [read + s for s in places] if silence > read else []
        kept = [*range(read), *confidence]
        if name == "scale":
            return values[kept]
        if name == layer:
            values = values[:, [*kept, *[silence + s for s in places]]]
        if name == f"{layer}_bias":
            gone = [silence + s for s in range(len(self.members)) if s not in places]
            values = values + self._numbers[layer].numpy()[:, gone].sum(axis=1, keepdims=True)
        return super()._cut(name, values, places)

    def _start(self, seed: int) -> dict[str, np.ndarray]:
        start = super()._start(seed)
        if self.config.hidden:
            # Drawn by name, so that the order of members does not matter; the layer behind starts at 0.
            draws = [
                np.random.default_rng(derive_seed(seed, "hidden", name)).normal(size=self.config.hidden)
                for name in self._inputs
            ]
            start["hidden"] = np.stack(draws, axis=1) / np.sqrt(len(draws))
        return start

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        return {**super()._fit_classes(rows, seed), **self._coefficients()}

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        return {**super()._fit_candidates(lists, seed), **self._coefficients()}

    def _coefficients(self) -> dict[str, Any]:
        """For the report: how much each input of a linear gate speaks for a member."""
        if self.config.hidden:
            return {}
        gate = self._numbers["gate"].numpy()
        return {"coefficients": {name: self._by_member(gate[:, x]) for x, name in enumerate(self._inputs)}}
