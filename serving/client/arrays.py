"""What callers give as inputs, as numpy arrays of the types that the wire has."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InvalidRequest

NAMES: dict[str, type[Any]] = {
    "DT_FLOAT": np.float32,
    "DT_DOUBLE": np.float64,
    "DT_INT32": np.int32,
    "DT_UINT8": np.uint8,
    "DT_INT16": np.int16,
    "DT_INT8": np.int8,
    "DT_INT64": np.int64,
    "DT_BOOL": np.bool_,
    "DT_UINT16": np.uint16,
    "DT_HALF": np.float16,
    "DT_UINT32": np.uint32,
    "DT_UINT64": np.uint64,
    "DT_STRING": np.object_,
}
"""numpy's type by the name that metadata use."""
_NUMBERS = {np.dtype(kind) for kind in NAMES.values() if kind is not np.object_}


def as_array(name: str, value: Any) -> np.ndarray:
    """The value of the input `name` as an array. Numbers that are not in an array already become float32 and int32, as
    TensorFlow makes them; text becomes objects. Raises InvalidRequest for anything else."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidRequest(f"'{name}' must be an array; received rows of different lengths.") from error
    if array.dtype.kind in "US" or array.dtype == object:
        texts = np.asarray(value, object)
        strange = [type(one).__name__ for one in texts.flat if not isinstance(one, (str, bytes))]
        if strange:
            raise InvalidRequest(f"'{name}' must hold numbers, booleans or text; received a {strange[0]}.")
        _check_unicode(name, texts)
        return texts
    if not isinstance(value, (np.ndarray, np.generic)):
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        elif array.dtype == np.int64 and (array == array.astype(np.int32)).all():
            array = array.astype(np.int32)
    if array.dtype not in _NUMBERS:
        raise InvalidRequest(f"'{name}' must hold numbers, booleans or text; received {array.dtype}.")
    return array


def _check_unicode(name: str, texts: np.ndarray) -> None:
    try:
        for one in texts.flat:
            if isinstance(one, str):
                one.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"'{name}' must hold valid Unicode; received {error.object!r:.80}.") from error
