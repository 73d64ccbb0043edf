"""Classify and Regress as JSON: examples become `tf.Example`, as in TensorFlow Serving's REST API; results, lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorflow.core.example.example_pb2 import Example
from tensorflow.core.example.feature_pb2 import Feature
from tensorflow_serving.apis.input_pb2 import Input

from fusion.export.manifest import Signature
from serving.errors import InvalidRequest, unknown
from serving.inputs import Arrays
from serving.json_tensors import decoded
from serving.tf_examples import classified, regressed

EXAMPLES, CONTEXT = "examples", "context"


def input_of(body: Mapping[str, Any], signature: Signature) -> Input:
    """The message of `{"examples": [{FEATURE: VALUE or LIST}, ...], "context": {FEATURE: ...}}`.

    A feature gets the type of the input of its name, so that 1 is a float where the signature takes floats. Raises
    InvalidRequest for features that the signature does not take, and for values of another type.
    """
    rows, context = body.get(EXAMPLES), body.get(CONTEXT, {})
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in [*rows, context]):
        raise InvalidRequest("'examples' must be a list of objects, and 'context' one object, of features by name.")
    given = Input()
    given.example_list_with_context.context.CopyFrom(_example(context, signature))
    given.example_list_with_context.examples.extend(_example(row, signature) for row in rows)
    return given


def classes(folder: Path, signature: Signature) -> Callable[[Arrays], Any]:
    """Makes `[[[label, score], ...], ...]` of an answer. Raises InvalidRequest for what does not classify."""
    make = classified(folder, signature)
    return lambda answer: [
        [[found.label, found.score] for found in row.classes] for row in make(answer).classifications
    ]


def values(folder: Path, signature: Signature) -> Callable[[Arrays], Any]:
    """Makes `[value, ...]` of an answer. Raises InvalidRequest for what does not regress."""
    make = regressed(folder, signature)
    return lambda answer: [found.value for found in make(answer).regressions]


def _example(row: Mapping[str, Any], signature: Signature) -> Example:
    example = Example()
    for name, value in row.items():
        if name not in signature.inputs:
            raise InvalidRequest(f"the signature takes no such feature; {unknown(name, signature.inputs)}.")
        _fill(example.features.feature[name], _flat(decoded(value)), name, signature.inputs[name].dtype)
    return example


def _fill(feature: Feature, found: list[Any], name: str, dtype: str) -> None:
    try:
        if dtype == "string":
            feature.bytes_list.value.extend(v if isinstance(v, bytes) else v.encode("utf-8") for v in found)
        elif dtype.startswith("float"):
            feature.float_list.value.extend(found)
        else:
            feature.int64_list.value.extend(found)
    except (TypeError, AttributeError, ValueError) as error:
        raise InvalidRequest(f"the feature '{name}' must hold values of the type {dtype}.") from error


def _flat(value: Any) -> list[Any]:
    return [inner for part in value for inner in _flat(part)] if isinstance(value, list) else [value]
