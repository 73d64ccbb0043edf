"""Integers operation by operation: a float32 `.tflite` rewritten by rules, with ai-edge-quantizer.

TensorFlow's converter quantises a whole graph or nothing of it, and has no integers of 4 bits. What reckons in which
numbers is written here as rules over the names of operations, which contain the names of the layers they come from.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fusion.errors import GateError

Numbers = Literal["float32", "int8", "dynamic8", "dynamic4"]
"""What an operation reckons in. int8: weights and activations in 8 bits, with ranges read beforehand; dynamic8 and
dynamic4: weights in 8 or 4 bits, and activations are brought to 8 bits by ranges that are found while it runs."""

Ranges = dict[str, Any]
"""Of activations by tensor, as ai-edge-quantizer keeps them."""


@dataclass(frozen=True)
class Rule:
    """What operations are to reckon in.

    Attributes:
        numbers: these.
        operation: TFLite's name of the operation, such as FULLY_CONNECTED; * stands for all.
        pattern: regular expression, searched in the names of the operation's outputs.
        block: so many weights along the input share a scale; 0: all of an output channel. Of dynamic4 only.
    """

    numbers: Numbers
    operation: str = "*"
    pattern: str = ".*"
    block: Literal[0, 32, 64] = 0


class Operation(NamedTuple):
    """One operation of a graph: TFLite's name of its kind, and the name of its first output."""

    kind: str
    name: str


def operations(tflite: bytes) -> list[Operation]:
    """The operations of the first graph of a file, in the order in which they run."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    model = schema.Model.GetRootAs(tflite)
    graph = model.Subgraphs(0)
    found = []
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        kind = kinds[model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()]
        found.append(Operation(kind, graph.Tensors(operator.Outputs(0)).Name().decode()))
    return found


def each_row(features: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """One row after the other `[1, ...]`, by the names of the inputs."""
    for row in range(len(next(iter(features.values())))):
        yield {name: array[row : row + 1] for name, array in features.items()}


def read_ranges(tflite: bytes, representative: Mapping[str, np.ndarray]) -> Ranges:
    """The least and largest value of each activation over representative rows; of a file with one signature.

    Raises GateError without rows.
    """
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer.calibrator import CalibrationMode, Calibrator
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    if not representative:
        raise GateError("integers with fixed ranges need representative rows to read them from; received none.")
    (signature,) = Interpreter(model_content=tflite).get_signature_list()
    with _quietly():
        reader = Calibrator(
            tflite,
            num_threads=1,
            mode=CalibrationMode.CALIBRATION_PROFILER_BASED,
            qsv_update_func=min_max_update,  # a moving average, which it takes otherwise, cuts off what is rare
        )
        reader.calibrate({signature: list(each_row(representative))}, _recipe([Rule("int8")]))
    return reader.get_model_qsvs()


def quantise(tflite: bytes, rules: Sequence[Rule], ranges: Ranges) -> bytes:
    """A float32 file with what the rules say in integers; inputs and outputs of the graph keep their dtypes.

    Args:
        tflite: the file.
        rules: of several that fit an operation, the last one counts; one that its kind cannot do is passed over.
        ranges: of `read_ranges`, which rules of int8 need.

    Raises GateError when the rules cannot be carried out together.
    """
    from ai_edge_quantizer.quantizer import Quantizer

    recipe = _recipe(rules)
    with _quietly():
        quantiser = Quantizer(tflite, recipe.get_quantization_recipe())
        try:
            given = ranges if quantiser.need_calibration else None
            result = quantiser.quantize(given, enable_progress_bar=False, enable_progress_report=False)
        except (ValueError, RuntimeError, KeyError) as error:
            raise GateError(
                f"the rules must give a graph that LiteRT knows; ai-edge-quantizer answered: "
                f"{' '.join(str(error).split())[-300:]}. Choose other layers."
            ) from error
    return bytes(result.quantized_model)


def _recipe(rules: Sequence[Rule]) -> Any:
    from ai_edge_quantizer.qtyping import QuantGranularity
    from ai_edge_quantizer.recipe_manager import AlgorithmName, RecipeManager

    grain = {0: "CHANNELWISE", 32: "BLOCKWISE_32", 64: "BLOCKWISE_64"}
    recipe = RecipeManager()
    for rule in rules:
        if rule.numbers == "float32":
            recipe.add_quantization_config(rule.pattern, rule.operation, None, AlgorithmName.NO_QUANTIZE)
        elif rule.numbers == "int8":
            recipe.add_static_config(rule.pattern, rule.operation, activation_num_bits=8, weight_num_bits=8)
        else:
            bits = {"dynamic8": 8, "dynamic4": 4}[rule.numbers]
            recipe.add_dynamic_config(rule.pattern, rule.operation, bits, QuantGranularity[grain[rule.block]])
    for end in ("INPUT", "OUTPUT"):  # by a pattern of its own, because a pattern has one place in the order
        recipe.add_quantization_config("", end, None, AlgorithmName.NO_QUANTIZE)
    return recipe


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars and the interpreter's advice on debugging."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
