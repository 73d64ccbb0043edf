"""Quantisation after training: the same model, written with fewer bits; nothing is trained.

float16, dynamic range, int8 and 16 x 8 are those of Jacob et al., https://arxiv.org/abs/1712.05877, and of TensorFlow
Lite; integers that are chosen layer by layer, and those of 4 bits, are written by ai-edge-quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fusion.compat import keras
from fusion.compression.base import (
    SMALL,
    Applied,
    Compressed,
    CompressionData,
    LayerPatterns,
    Method,
    chosen_layers,
    inputs_of,
    kernel_of,
    told,
)
from fusion.compression.measure import SIGNATURE, write_tflite
from fusion.config import Settings
from fusion.errors import GateError
from fusion.export.litert import Runner
from fusion.export.mixed import Numbers, Operation, Rule, operations, quantise, read_ranges
from fusion.export.tflite import Conversion, check_runs
from fusion.types import Features

CONVERTER_SMALL = 1024
"""TFLite's converter leaves kernels with fewer weights in float32 where it reads no ranges."""

COMPARED_ROWS = 32
"""Representative rows on which integers are compared with floats; ranges are read from all of them."""

FALLBACK: dict[str, Numbers] = {"FULLY_CONNECTED": "dynamic8"}
"""What an operation reckons in where integers with fixed ranges harm. Convolutions with ranges found at run time are
several times slower in LiteRT than those in floats, which they therefore return to."""

KERNEL_KINDS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "GATHER", "EMBEDDING_LOOKUP")
FOUR_BITS = ("FULLY_CONNECTED", "CONV_2D")
"""What LiteRT has 4-bit weights for."""


class Float16(Method):
    """Every weight in 16 bits; half the bytes, and the numbers change by a thousandth at most."""

    class Config(Settings):
        """Nothing to set."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        _check_float(subject)
        return replace(subject, conversion=Conversion("float16")), Applied()


class DynamicRange(Method):
    """Kernels in 8 bits, one scale a channel; activations are brought to 8 bits while the model runs."""

    class Config(Settings):
        """Nothing to set."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        _check_float(subject)
        chosen, alone = chosen_layers(subject.model, (), smallest=CONVERTER_SMALL)
        if not chosen:
            raise GateError(
                f"dynamic_range must find a kernel of at least {CONVERTER_SMALL} weights, as TFLite's converter asks; "
                "the model has none. Use int8 or float16."
            )
        return replace(subject, conversion=Conversion("dynamic")), Applied(alone)


class Int16x8(Method):
    """Weights in 8 bits and activations in 16, with ranges read from representative rows; for networks whose
    activations 8 bits are too coarse for. Slower than int8: LiteRT has plain kernels for it only."""

    class Config(Settings):
        """Nothing to set."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        _check_float(subject)
        changed = replace(subject, conversion=Conversion("int16x8", data.representative))
        try:
            check_runs(write_tflite(changed, data.representative), _rows(subject.model, data, 1), SIGNATURE)
        except GateError as error:
            norms = [x.name for x in subject.model.layers if isinstance(x, keras.layers.LayerNormalization)]
            known = f" LiteRT has no layer normalisation in 16 x 8 bits, and the model has {norms[0]}." if norms else ""
            raise GateError(f"the model must run with activations in 16 bits; {error}{known} Use int8.") from error
        return changed, Applied()


class Int8(Method):
    """Weights and activations in 8 bits, with ranges read from representative rows, where that does no harm.

    First all operations are made integer. Where the outputs then differ from those in floats by more than
    `agreement` allows, operations without a kernel (normalisation, softmax, sums) go back to floats, and as many layers
    with a kernel as possible stay integer: each is tried alone, and from the least harmful on they are taken together
    as far as the agreement holds. The others keep 8-bit weights with activations in floats (`Dense`), or go back to
    floats.
    """

    class Config(Settings):
        """What is asked of the result."""

        agreement: float = Field(0.99, gt=0, le=1)
        """The least mean cosine between the outputs of integers and floats over representative rows."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        _check_float(subject)
        trial = _Trial(subject, data)
        whole = (Rule("int8"),)
        reached = trial.agreement(whole)
        facts: dict[str, Any] = {"agreement_all_int8": round(reached, 6)}
        rules: tuple[Rule, ...] = whole
        alone: dict[str, str] = {}
        if reached < self.config.agreement:
            rules, reached, alone, more = self._mixed(subject.model, trial, reached)
            facts |= more
        facts["agreement"] = round(reached, 6)
        return replace(subject, conversion=_mixed(rules, data)), Applied(alone, facts)

    def _mixed(
        self, model: keras.Model, trial: _Trial, whole: float
    ) -> tuple[tuple[Rule, ...], float, dict[str, str], dict[str, Any]]:
        """Rules for single layers, the agreement that they reach, and what is not integer."""
        places = kernel_operations(trial.tflite, model)

        def rules_for(integer: Sequence[str]) -> tuple[Rule, ...]:
            return tuple(
                _rule("int8" if name in integer else FALLBACK.get(place.kind, "float32"), place)
                for name, place in places.items()
            )

        harm = {name: trial.agreement(rules_for([name])) for name in places}
        order = sorted(places, key=lambda name: -harm[name])
        count, reached = _most(len(order), lambda n: trial.agreement(rules_for(order[:n])), self.config.agreement)
        if count == 0:
            raise GateError(
                f"int8 must agree with the float model to {self.config.agreement} (mean cosine over representative "
                f"rows); no layer could be made integer: alone {order[0]} agrees to {harm[order[0]]:.6f}."
                " Lower agreement, or use dynamic_range."
                if order
                else "int8 must find layers with a kernel in the graph; the model has none. Use float16."
            )
        alone = _without_kernels(model, places, whole)
        others = {name: places[name].kind for name in order[count:]}
        for name, kind in others.items():
            if kind not in FALLBACK:
                alone[name] = f"stays in float32: with fixed ranges alone it agrees to {harm[name]:.6f} with the floats"
        dynamic = sorted(name for name, kind in others.items() if kind in FALLBACK)
        facts = {"int8_layers": count, "ranges_at_run_time": {name: round(harm[name], 6) for name in dynamic}}
        return rules_for(order[:count]), reached, alone, facts


class Int4(Method):
    """Kernels of `Dense` and convolutions in 4 bits; other kernels in 8, or as they are."""

    class Config(Settings):
        """Which layers, and what becomes of the others."""

        layers: LayerPatterns = ()
        """Layers in 4 bits, by name or pattern; none: all that LiteRT has 4-bit kernels for."""
        rest: Literal["int8", "float32"] = "int8"
        """What the kernels of the other layers are kept in."""
        block_size: Literal[0, 32, 64] = 0
        """So many weights of a Dense kernel, along its input, share a scale; 0: all those of an output."""
        min_weights: int = Field(SMALL, ge=1)
        """Smaller kernels are not brought to 4 bits."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        _check_float(subject)
        places = kernel_operations(write_tflite(subject, data.representative), subject.model)

        def able(layer: keras.layers.Layer) -> str | None:
            kind = places[layer.name].kind if layer.name in places else "such"
            return None if kind in FOUR_BITS else f"LiteRT has no 4-bit weights for {kind} operations"

        chosen, alone = chosen_layers(subject.model, self.config.layers, able, self.config.min_weights)
        if not chosen:
            raise GateError(f"int4 must find a layer for 4 bits; {_told(alone)}. Use int8.")
        four = {layer.name: self._block(layer) for layer in chosen}
        rules = []
        for name, place in places.items():
            if name in four:
                rules.append(replace(_rule("dynamic4", place), block=four[name]))
            elif self.config.rest == "int8":
                rules.append(_rule(FALLBACK.get(place.kind, "int8"), place))
                alone[name] = f"in 8 bits: {alone[name]}"
        facts = {"int4_layers": sorted(four), "block_size": self.config.block_size}
        return replace(subject, conversion=_mixed(tuple(rules), data)), Applied(alone, facts)

    def _block(self, layer: keras.layers.Layer) -> Literal[0, 32, 64]:
        """Blocks must fill the input of a Dense kernel; convolutions have none."""
        size: Literal[0, 32, 64] = self.config.block_size
        return size if size and isinstance(layer, keras.layers.Dense) and layer.kernel.shape[0] % size == 0 else 0


class _Trial:
    """A model in float32, and how well rules of integers agree with it."""

    def __init__(self, subject: Compressed, data: CompressionData) -> None:
        self.tflite = write_tflite(replace(subject, conversion=Conversion()), data.representative)
        self._ranges = read_ranges(self.tflite, inputs_of(subject.model, data.representative))
        self._rows = _rows(subject.model, data, COMPARED_ROWS)
        self._expected = self._answers(self.tflite)

    def agreement(self, rules: Sequence[Rule]) -> float:
        """Mean cosine of the outputs, row by row; an output of length 0 agrees with nothing."""
        found, expected = self._answers(quantise(self.tflite, rules, self._ranges)), self._expected
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        return float(np.mean((found * expected).sum(axis=1) / np.maximum(lengths, 1e-12)))

    def _answers(self, tflite: bytes) -> np.ndarray:
        (answers,) = Runner(tflite, SIGNATURE).row_by_row(self._rows).values()
        return answers.reshape(len(answers), -1).astype(np.float64)


def kernel_operations(tflite: bytes, model: keras.Model) -> dict[str, Operation]:
    """The operation that each layer with a kernel has become, in the order in which they run.

    The converter joins what it fuses into one name, `model/a_relu/Relu;model/a_conv/Conv2D`, and gives the last
    operation the name of the output instead.
    """
    kernels = {layer.name for layer in model.layers if kernel_of(layer) is not None}
    found: dict[str, Operation] = {}
    for operation in operations(tflite):
        if operation.kind not in KERNEL_KINDS:
            continue
        parts = [part for part in re.split("[;/]", operation.name) if part in kernels]
        if not parts and operation.name.startswith("StatefulPartitionedCall"):
            parts = [name for name in model.output_names if name in kernels]
        if parts:
            found.setdefault(parts[0], operation)
    return found


def _rule(numbers: Numbers, place: Operation) -> Rule:
    return Rule(numbers, place.kind, f"^{re.escape(place.name)}(;|$)")


def _mixed(rules: tuple[Rule, ...], data: CompressionData) -> Conversion:
    return Conversion("mixed", data.representative, rules)


def _most(total: int, agreement: Callable[[int], float], least: float) -> tuple[int, float]:
    """The most layers, in their order, with which the agreement is kept, by bisection; and that agreement."""
    low, high, reached = 0, total, 0.0
    while low < high:
        middle = (low + high + 1) // 2
        found = agreement(middle)
        if found >= least:
            low, reached = middle, found
        else:
            high = middle - 1
    return low, reached


def _without_kernels(model: keras.Model, places: dict[str, Operation], whole: float) -> dict[str, str]:
    """Layers with weights that no operation with a kernel has taken in, as it does BatchNormalization."""
    taken = {part for place in places.values() for part in re.split("[;/]", place.name)} | set(places)
    reason = f"stays in float32: with all operations in integers the outputs agree to {whole:.6f} only"
    return {layer.name: reason for layer in model.layers if layer.weights and layer.name not in taken}


def _check_float(subject: Compressed) -> None:
    """Raises GateError where an earlier step has said already what the file is to be written in."""
    if subject.conversion.mode != "float32":
        raise GateError(
            f"the numbers of a file are chosen once; an earlier step chose {subject.conversion.mode}. "
            "Keep one of the two steps."
        )


def _rows(model: keras.Model, data: CompressionData, count: int) -> Features:
    return {name: array[:count] for name, array in inputs_of(model, data.representative).items()}


def _told(alone: dict[str, str]) -> str:
    return told(alone) or "the model has no weights"
