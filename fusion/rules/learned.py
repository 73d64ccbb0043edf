"""Weights found by gradient: common ones, and departures from them for a class or for a segment of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from scipy.special import softmax

from fusion.compat import keras, tf
from fusion.rules.context import counted
from fusion.rules.fitting import CandidateLists, ClassRows
from fusion.rules.mixture import MixtureRule, MixtureSettings
from fusion.rules.normalisation import LARGEST
from fusion.types import Context, Over


@keras.saving.register_keras_serializable("fusion")
class Learned(MixtureRule):
    """A mean with weights `softmax(common + departures)`, learned by L-BFGS.

    The departures are those of the class (`per_class`) and of the segments that an example falls into: a number of
    the context is cut at quantiles of the rows of the fit (`segments`), so that, say, short histories may be judged
    by other members than long ones. The prior is hierarchical: departures are pulled to nothing, which leaves the
    common weights, and the common ones to equal weights, so that little data gives equal weights and a class or a
    segment with few rows the common ones. So does a number that is not known.
    """

    member_axes: ClassVar[Mapping[str, int | None]] = {"of_classes": 1, "of_segments": 1, "bounds": None}

    class Config(MixtureSettings):
        """Settings of the learned weights."""

        per_class: bool = False
        """Classes: weights of their own for each class."""
        segments: dict[str, Annotated[int, Field(ge=2, le=10)]] = Field(default_factory=dict, max_length=2)
        """Into how many segments of equally many rows a number of the context is cut, as in `{history_length: 3}`."""

    config: Config

    def __init__(self, config: Config, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(config, members, over, **kwargs)
        self._parameter("common", (len(self.members),))
        if config.segments:
            count = sum(config.segments.values())
            self._number("bounds", np.tile(np.array([-LARGEST, LARGEST], np.float32), (count, 1)))
            self._parameter("of_segments", (count, len(self.members)))

    def build(self, input_shape: Any) -> None:
        """Makes the weights of the classes."""
        self._number_classes(int(input_shape[-1]))
        super().build(input_shape)

    def _number_classes(self, classes: int) -> None:
        if self.over == "classes" and self.config.per_class and "of_classes" not in self._numbers:
            self._parameter("of_classes", (classes, len(self.members)))

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Rule.load_state`; the number of classes is taken from the state."""
        if np.ndim(state.get("of_classes", 0)) == 2:
            self._number_classes(len(state["of_classes"]))
        super().load_state(state)

    @classmethod
    def reads(cls, config: Config) -> tuple[str, ...]:  # type: ignore[override]
        """The numbers that are cut into segments."""
        return tuple(config.segments)

    def _member_logits(self, numbers: Mapping[str, Any], features: Any, speaks: Any, context: Context) -> Any:
        logits = numbers["common"][tf.newaxis, :, tf.newaxis]
        if "of_classes" in numbers:
            logits += tf.transpose(numbers["of_classes"])[tf.newaxis]
        at = 0
        for name, count in self.config.segments.items():
            inside = self._inside(context[name], self._numbers["bounds"][at : at + count])
            departures = tf.transpose(numbers["of_segments"][at : at + count])[tf.newaxis]  # [1, S, G]
            logits += tf.matmul(departures, tf.cast(inside, features.dtype))
            at += count
        return logits

    @staticmethod
    def _inside(values: Any, bounds: Any) -> Any:
        """The segment of each value, bool `[B, G, C]`; none for NaN, of which every comparison is false."""
        values = tf.cast(tf.convert_to_tensor(values), tf.float32)[:, tf.newaxis]
        return tf.logical_and(values > bounds[:, :1], values <= bounds[:, 1:])

    def _prepare(self, features: np.ndarray, speaks: np.ndarray, context: Context, weights: np.ndarray | None) -> None:
        if not self.config.segments:
            return
        bounds = []
        for name, count in self.config.segments.items():
            values = counted(context[name], weights)
            cuts = np.quantile(values, np.arange(1, count) / count) if values.size else np.zeros(count - 1)
            edges = np.array([-LARGEST, *cuts, LARGEST], np.float32)
            bounds.append(np.stack([edges[:-1], edges[1:]], axis=1))
        self._numbers["bounds"].assign(np.concatenate(bounds))

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        self._number_classes(rows.logits.shape[2])
        return {**super()._fit_classes(rows, seed), **self._segments()}

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        return {**super()._fit_candidates(lists, seed), **self._segments()}

    def _segments(self) -> dict[str, Any]:
        """For the report: up to which value each segment goes, and the weights in it when all members speak."""
        found: dict[str, list[dict[str, Any]]] = {}
        common, at = self._numbers["common"].numpy(), 0
        for name, count in self.config.segments.items():
            found[name] = []
            for row in range(at, at + count):
                top = float(self._numbers["bounds"][row, 1])
                weights = softmax(common + self._numbers["of_segments"].numpy()[row])
                found[name].append({"up_to": top if top < LARGEST else None, "weights": self._by_member(weights)})
            at += count
        return {"segments": found} if found else {}
