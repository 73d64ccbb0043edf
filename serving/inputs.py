"""Checks of what a request brings, and text as signatures take it. Imports no TensorFlow, so a phone can use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion.export.manifest import Manifest, Signature, TensorSpec
from serving.errors import InvalidRequest, LimitExceeded, UnknownSignature
from serving.limits import Limits

Arrays = dict[str, np.ndarray]
NO_TEXT = np.full((1, 1), b"", object)
"""An empty list of text; shared, so nobody may write to it."""
NO_TEXT.setflags(write=False)


def recommend_inputs(
    user_ids: Sequence[str] | None,
    histories: Sequence[Sequence[str]] | None,
    k: int,
    exclude: Sequence[Sequence[str]] | None,
    include: Sequence[Sequence[str]] | None,
    limits: Limits,
) -> dict[str, Any]:
    """The inputs of the signature `recommend` for B users, of lists that may be left out; padding stops at the limits.

    Raises InvalidRequest where users and histories are both left out, or lists differ in length.
    """
    lists = {"user_ids": user_ids, "histories": histories, "exclude": exclude, "include": include}
    lengths = {name: len(values) for name, values in lists.items() if values is not None}
    if user_ids is None and histories is None:
        raise InvalidRequest("a recommendation needs user ids or histories; received neither.")
    if len(set(lengths.values())) != 1:
        raise InvalidRequest(f"all lists must have one entry per user; received the lengths {lengths}.")
    rows = next(iter(lengths.values()))
    empty: list[list[str]] = [[]] * rows
    return {
        "user_id": list(user_ids) if user_ids is not None else [""] * rows,
        "history": pad_strings(histories if histories is not None else empty, limits.history),
        "k": np.full(rows, k, np.int64),
        "exclude": pad_strings(exclude if exclude is not None else empty, limits.exclude),
        "include": pad_strings(include if include is not None else empty, limits.include),
    }


def first_items(answer: Arrays, k: int) -> Arrays:
    """The lists of an answer, which are padded to `k_max`, cut to k items."""
    return {name: value if name == "known_user" else value[..., :k] for name, value in answer.items()}


def pad_strings(lists: Sequence[Sequence[str]], most: int) -> np.ndarray:
    """Lists of text as one object array `[B, L]` of UTF-8 bytes, padded with `b''`.

    L is the next power of two (at least 1), so that a serving graph meets few different shapes; beyond `most`, the
    limit of such lists, nothing is added.
    """
    padded = np.full((len(lists), _width(max(map(len, lists), default=0), most)), b"", object)
    for row, values in enumerate(lists):
        padded[row, : len(values)] = [_utf8(value, "the list") for value in values]
    return padded


def text_row(values: Sequence[bytes], most: int) -> np.ndarray:
    """One list of text as `pad_strings` gives it, of values that are UTF-8 already."""
    if not values:
        return NO_TEXT
    row = np.full((1, _width(len(values), most)), b"", object)
    row[0, : len(values)] = values
    return row


def _width(length: int, most: int) -> int:
    return max(length, min(1 << max(length - 1, 0).bit_length(), most))


def signature_of(manifest: Manifest, name: str) -> Signature:
    """The inputs and outputs of a signature. Raises UnknownSignature, with the names that there are."""
    if name not in manifest.signatures:
        known = ", ".join(sorted(manifest.signatures))
        raise UnknownSignature(f"the artifact has the signatures {known}; received '{name[:100]}'.")
    return manifest.signatures[name]


def check_inputs(specs: Mapping[str, TensorSpec], inputs: Mapping[str, Any], limits: Limits) -> Arrays:
    """The inputs as arrays of exactly the dtypes that the signature takes. Raises InvalidRequest or LimitExceeded."""
    missing, unknown = sorted(set(specs) - set(inputs)), sorted(set(inputs) - set(specs))
    if missing or unknown:
        received = f"missing {missing}" if missing else f"unknown {[name[:100] for name in unknown]}"
        raise InvalidRequest(f"the inputs must be {', '.join(sorted(specs))}; {received}.")
    arrays = {name: _array(name, inputs[name], spec, limits) for name, spec in specs.items()}
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidRequest(f"all inputs must have the same number of rows; received {sizes}.")
    total = sum(array.nbytes for array in arrays.values())
    if total > limits.total_bytes:
        raise LimitExceeded(f"a request must have at most {limits.total_bytes} bytes; received {total}.")
    return arrays


def _array(name: str, value: Any, spec: TensorSpec, limits: Limits) -> np.ndarray:
    try:
        array = np.asarray(value, object if spec.dtype == "string" else None)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"'{name}' must be an array; received rows of different lengths.") from error
    _check_shape(name, array, spec, limits)
    if spec.dtype == "string":
        return _strings(name, array, limits)
    array = _numbers(name, array, np.dtype(spec.dtype))
    if name == "k" and array.size and not 1 <= array.min() <= array.max() <= limits.k:
        raise LimitExceeded(f"'k' must be between 1 and {limits.k}; received {array.min()} to {array.max()}.")
    return array


def _check_shape(name: str, array: np.ndarray, spec: TensorSpec, limits: Limits) -> None:
    fits = array.ndim == len(spec.shape) and all(
        wanted in (None, size) for wanted, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or not array.ndim or not array.shape[0]:
        wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise InvalidRequest(f"'{name}' must have the shape [{wanted}] with at least one row; received {array.shape}.")
    if array.shape[0] > limits.rows:
        raise LimitExceeded(f"a request must have at most {limits.rows} rows; '{name}' has {array.shape[0]}.")
    longest = limits.length(name)
    if longest is not None and array.shape[1] > longest:
        raise LimitExceeded(f"'{name}' must have at most {longest} entries a row; received {array.shape[1]}.")


def _strings(name: str, array: np.ndarray, limits: Limits) -> np.ndarray:
    encoded = [_utf8(value, f"'{name}'") for value in array.ravel()]
    longest = max((len(value) for value in encoded), default=0)
    if longest > limits.id_bytes:
        raise LimitExceeded(f"every id must have at most {limits.id_bytes} bytes; one of '{name}' has {longest}.")
    result = np.empty(array.size, object)
    result[:] = encoded
    return result.reshape(array.shape)


def _utf8(value: Any, where: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} must hold text; received a {type(value).__name__}.")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{where} must hold valid Unicode; received {value!r:.60}.") from error


def _numbers(name: str, array: np.ndarray, wanted: np.dtype[Any]) -> np.ndarray:
    whole = array.dtype.kind in "iu" and wanted.kind in "iu"
    if whole and array.size and not (np.iinfo(wanted).min <= array.min() <= array.max() <= np.iinfo(wanted).max):
        raise InvalidRequest(f"'{name}' must fit {wanted}; received {array.min()} to {array.max()}.")
    if not whole and not np.can_cast(array.dtype, wanted, "same_kind"):
        raise InvalidRequest(f"'{name}' must be {wanted}; received {array.dtype}.")
    try:
        with np.errstate(over="raise"):
            return array.astype(wanted, copy=False)
    except FloatingPointError as error:
        raise InvalidRequest(f"'{name}' must fit {wanted}; received {np.abs(array).max():g}.") from error
