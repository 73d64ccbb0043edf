"""A chain of methods over one model: measured before and after, and refused where it changed nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusion.compat import keras
from fusion.compression.base import Applied, Compressed, CompressionData, Method, check_representative, told
from fusion.compression.codebooks import coded_bytes
from fusion.compression.measure import Measures, measure
from fusion.config import Part
from fusion.errors import ConfigError, DataError, EngineError, GateError, MachineError
from fusion.submodels.standardized import folded


@dataclass(frozen=True)
class Step:
    """What one method of a chain did."""

    part: Part
    applied: Applied
    seconds: float

    def dump(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **self.part.dump(),
            "left_alone": self.applied.left_alone,
            "facts": self.applied.facts,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Outcome:
    """What a recipe made of a model.

    Attributes:
        compressed: the result.
        tflite: the bytes of its `.tflite`, which is what `after` was measured with.
        before, after: of the model as it was, in float32, and of the result.
        steps: what each method did.
    """

    compressed: Compressed
    tflite: bytes
    before: Measures
    after: Measures
    steps: list[Step]

    @property
    def drop(self) -> float:
        """How much quality was lost on the validation rows; negative where there is more than before."""
        lost = self.before.quality - self.after.quality
        return lost if self.after.higher_is_better else -lost

    def dump(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "steps": [step.dump() for step in self.steps],
            "before": self.before.dump(),
            "after": self.after.dump(),
            "drop": self.drop,
        }


def compress(model: keras.Model, steps: Sequence[Part], data: CompressionData) -> Outcome:
    """Applies the methods one after the other.

    Args:
        model: as `fusion.compression.base` describes it; it stays as it is. Standardised kernels are folded first, or
            what is set to zero would be moved again.
        steps: methods with their settings.
        data: what they are applied with.

    Raises:
        ConfigError, GateError: as the methods do; a GateError where one of them changed nothing, or the `.tflite`
            cannot be written or run.
        DataError: the representative set is empty or holds NaN.
    """
    if not steps:
        raise ConfigError("a recipe must have at least one step; received none.")
    check_representative(data.representative)
    subject = Compressed(folded(model))
    before, _ = measure(subject, data)
    done = []
    for number, part in enumerate(steps):
        started = time.perf_counter()
        changed, applied = _apply(part, subject, data.for_step(number, part, subject.model))
        _check_changed(part, subject, changed, applied)
        done.append(Step(part, applied, time.perf_counter() - started))
        subject = changed
    after, tflite = measure(subject, data)
    return Outcome(subject, tflite, before, after, done)


def _apply(part: Part, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
    """One step; bytes of codes that an earlier one counted are counted anew where it moved the weights."""
    method: Method = part.make()
    try:
        changed, applied = method.apply(subject, data)
    except EngineError as error:
        kind = next(
            kind for kind in (ConfigError, DataError, GateError, MachineError, EngineError) if isinstance(error, kind)
        )
        raise kind(f"{part.kind}: {error}") from error
    counted = changed.coded_bytes is not None and changed.coded_bytes == subject.coded_bytes
    if counted and not _same_weights(subject.model, changed.model):
        changed = replace(changed, coded_bytes=coded_bytes(changed.model, changed.huffman))
    return changed, applied


def _check_changed(part: Part, before: Compressed, after: Compressed, applied: Applied) -> None:
    """A method that does nothing must not look like one that did something."""
    same_weights = _same_weights(before.model, after.model)
    same_layers = _described(before.model) == _described(after.model)
    same_form = before.conversion == after.conversion and before.coded_bytes == after.coded_bytes
    if same_weights and same_layers and same_form:
        alone = told(applied.left_alone)
        raise GateError(
            f"{part.kind} must make something of the model smaller; it changed nothing"
            f"{f' ({alone})' if alone else ''}. Leave it out, or choose other layers or settings."
        )


def _same_weights(before: keras.Model, after: keras.Model) -> bool:
    return len(before.weights) == len(after.weights) and all(
        old.shape == new.shape and np.array_equal(old, new)
        for old, new in zip(before.get_weights(), after.get_weights(), strict=True)
    )


def _described(model: keras.Model) -> list[tuple[type, str]]:
    return [(type(layer), repr(layer.get_config())) for layer in model.layers]


def untouched(model: keras.Model, data: CompressionData) -> Outcome:
    """A model that no method is applied to, measured like all others; its `.tflite` is in float32."""
    subject = Compressed(folded(model))
    found, tflite = measure(subject, data)
    return Outcome(subject, tflite, found, found, [])
