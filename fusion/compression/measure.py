"""What a model costs and what it is worth, measured on the `.tflite` that is shipped and not on a simulation of it."""

from __future__ import annotations

import functools
import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fusion.compat import keras, tf
from fusion.compression.base import SMALL, Answer, Compressed, CompressionData, input_names, inputs_of, kernel_of
from fusion.compression.flops import count_flops
from fusion.export.litert import Runner
from fusion.export.tflite import check_runs, convert
from fusion.types import Features

SIGNATURE = "serving_default"
"""Of every `.tflite` that is written here."""

THREADS = (1, 2)
"""Of LiteRT, with which the latency is measured."""

LATENCY_SECONDS = 0.5
"""What one latency is measured for, if that makes at least `FEWEST_CALLS` calls and no more than `MOST_CALLS`."""
FEWEST_CALLS, MOST_CALLS, WARM_UP = 20, 400, 3


@dataclass(frozen=True)
class Measures:
    """Figures of one model.

    Attributes:
        metric, higher_is_better: what the quality is, and which way it is good.
        quality: mean over the validation rows, answered by the `.tflite` in LiteRT.
        values: of each row `[n]`, NaN where undefined; not in `dump`.
        bytes: `raw` (weights of the Keras model), `gzip` (the same, compressed), `tflite`, `tflite_gzip`, and `coded`
            where a method made a code of its own.
        zeros: share of zeros over all kernels of at least `SMALL` weights, 0 to 1.
        distinct: distinct values of each such kernel, by layer.
        flops: floating-point operations of one row; multiply and add are two.
        latency: milliseconds of one row, p50 and p95, by where it ran: `litert_1` and `litert_2` (threads), and
            `savedmodel`.
        tensors: constants of the `.tflite` by dtype: their number, bytes, and the share of zeros.
    """

    metric: str
    higher_is_better: bool
    quality: float
    values: np.ndarray = field(compare=False, repr=False)
    bytes: dict[str, int]
    zeros: float
    distinct: dict[str, int]
    flops: int
    latency: dict[str, dict[str, float]]
    tensors: dict[str, dict[str, float]]

    def dump(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "values"}


def measure(compressed: Compressed, data: CompressionData) -> tuple[Measures, bytes]:
    """Writes the `.tflite` of the model and measures it; batch 1, inputs of the shapes of `data.representative`.

    Raises GateError when the file cannot be written, or does not run in LiteRT.
    """
    function = serving_function(compressed.model, data.representative)
    tflite = write_tflite(compressed, data.representative, function)
    row = {name: data.representative[name][:1] for name in input_names(compressed.model)}
    check_runs(tflite, row, SIGNATURE)
    values = data.judge(litert_answer(tflite))
    kernels = dict(_kernels(compressed.model))
    weights = b"".join(np.ascontiguousarray(weight).tobytes() for weight in compressed.model.get_weights())
    sizes = {
        "raw": len(weights),
        "gzip": _gzipped(weights),
        "tflite": len(tflite),
        "tflite_gzip": _gzipped(tflite),
    }
    if compressed.coded_bytes is not None:
        sizes["coded"] = compressed.coded_bytes
    measures = Measures(
        metric=data.metric,
        higher_is_better=data.higher_is_better,
        quality=float(np.nanmean(values)),
        values=values,
        bytes=sizes,
        zeros=_share_of_zeros(list(kernels.values())),
        distinct={name: len(np.unique(kernel)) for name, kernel in kernels.items()},
        flops=count_flops(function),
        latency=_latencies(function, tflite, row),
        tensors=constants(tflite),
    )
    return measures, tflite


def serving_function(model: keras.Model, representative: Features) -> Any:
    """The model in inference mode as a concrete function: batch 1, fixed shapes, named inputs and output."""
    specs = {
        name: tf.TensorSpec((1, *representative[name].shape[1:]), representative[name].dtype, name=name)
        for name in input_names(model)
    }
    output = model.output_names[0].removeprefix("quant_")  # TFMOT's prefix of layers that it wraps

    @tf.function(input_signature=[specs])
    def serve(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {output: model(inputs, training=False)}

    return serve.get_concrete_function()


def write_tflite(compressed: Compressed, representative: Features, function: Any = None) -> bytes:
    """The `.tflite` of a model; `function` is its `serving_function`, where there is one already.

    Raises GateError as `convert` does.
    """
    function = function or serving_function(compressed.model, representative)
    # The variables without the model: its layers' own functions would be written as well, which nobody calls.
    owner = tf.Module()
    owner.kept = compressed.model.variables
    conversion = compressed.conversion
    if conversion.representative is not None:
        conversion = replace(conversion, representative=inputs_of(compressed.model, conversion.representative))
    return convert({SIGNATURE: function}, owner, conversion)


def litert_answer(tflite: bytes) -> Answer:
    """A `.tflite` of batch 1 with one output as an `Answer`."""
    runner = Runner(tflite, SIGNATURE, threads=max(THREADS))
    (output,) = runner.outputs

    def answer(features: Features) -> np.ndarray:
        return runner.row_by_row({name: features[name] for name in runner.inputs})[output]

    return answer


# ---- bytes ---------------------------------------------------------------------------------------------------


def _gzipped(content: bytes) -> int:
    return len(gzip.compress(content, compresslevel=6, mtime=0))


def _kernels(model: keras.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Kernels that are not small, by layer; also of layers in a wrapper of TFMOT."""
    for layer in model.layers:
        kernel = kernel_of(getattr(layer, "layer", layer))
        if kernel is not None and int(np.prod(kernel.shape)) >= SMALL:
            yield layer.name, np.asarray(kernel)


def _share_of_zeros(arrays: list[np.ndarray]) -> float:
    size = sum(array.size for array in arrays)
    return float(sum(array.size - np.count_nonzero(array) for array in arrays) / size) if size else 0.0


def constants(tflite: bytes) -> dict[str, dict[str, float]]:
    """Constant tensors of a `.tflite` by dtype: how many, their bytes, and the share of zeros among their values.

    An integer is zero where it stands for zero, which is at its zero point. Of 4-bit numbers two share a byte.
    """
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name.lower() for name, code in vars(schema.TensorType).items() if not name.startswith("_")}
    model = schema.Model.GetRootAs(tflite)
    found: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            stored = _stored(model.Buffers(tensor.Buffer()), tflite)
            if stored.size == 0 or tensor.Buffer() in seen:
                continue
            seen.add(tensor.Buffer())
            dtype = names[tensor.Type()]
            found.setdefault(dtype, []).append(_centred(stored, dtype, tensor.Quantization()))
            sizes[dtype] = sizes.get(dtype, 0) + stored.size
    return {
        dtype: {"tensors": len(arrays), "bytes": sizes[dtype], "zeros": round(_share_of_zeros(arrays), 4)}
        for dtype, arrays in sorted(found.items())
    }


def _stored(buffer: Any, tflite: bytes) -> np.ndarray:
    """The bytes of a buffer; ai-edge-quantizer lays large ones behind the graph, where an offset points to."""
    if buffer.DataLength():
        return buffer.DataAsNumpy()
    return np.frombuffer(tflite, np.uint8, count=buffer.Size(), offset=buffer.Offset())


def _centred(stored: np.ndarray, dtype: str, quantisation: Any) -> np.ndarray:
    """The numbers of a buffer less their zero point (one for the whole tensor; kernels by channel have none)."""
    if dtype == "int4":
        numbers = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8)
    elif hasattr(np, dtype):
        numbers = stored.view(dtype)
    else:
        numbers = stored
    points = quantisation.ZeroPointAsNumpy() if quantisation is not None and quantisation.ZeroPointLength() == 1 else 0
    return numbers - points if np.any(points) else numbers


# ---- time ----------------------------------------------------------------------------------------------------


def _latencies(function: Any, tflite: bytes, row: Features) -> dict[str, dict[str, float]]:
    asked = {name: tf.constant(array) for name, array in row.items()}
    found = {f"litert_{n}": latency(functools.partial(Runner(tflite, SIGNATURE, n), row)) for n in THREADS}
    found["savedmodel"] = latency(lambda: function(**asked))
    return found


def latency(call: Callable[[], Any], calls: int | None = None) -> dict[str, float]:
    """Milliseconds of a call, p50 and p95, after some that do not count; as many calls as `LATENCY_SECONDS` allow
    where no number is given."""
    for _ in range(WARM_UP):
        started = time.perf_counter()
        call()
        once = time.perf_counter() - started
    if calls is None:
        calls = int(np.clip(LATENCY_SECONDS / max(once, 1e-6), FEWEST_CALLS, MOST_CALLS))
    seconds = np.empty(calls)
    for number in range(calls):
        started = time.perf_counter()
        call()
        seconds[number] = time.perf_counter() - started
    p50, p95 = np.percentile(seconds * 1000.0, [50, 95])
    return {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3)}
