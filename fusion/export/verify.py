"""Compares what two forms of one model answer (Keras, SavedModel, TFLite) for the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusion.errors import GateError


def compare(
    reference: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    tolerance: float,
    what: str,
    exceptions: float = 0.0,
) -> dict[str, Any]:
    """The largest absolute difference between two sets of named outputs, and where it is.

    Equal infinities differ by 0, and so do two NaNs; an infinity or NaN against anything else differs by infinity.
    Text must be equal (a difference counts as 1).

    Args:
        reference, other: arrays by name; names and shapes must be the same.
        tolerance: largest difference that passes; 1e-5 is right for float32.
        what: which two forms are compared, for the message.
        exceptions: share of the numbers that may differ by more. Rules over ranks need a few: two scores that
            differ by less than float32 resolves may swap places, and a place is worth more than the tolerance.

    Returns `{"what", "rows", "tolerance", "largest_difference", "where", "exceptions"}`; `where` is like
    `scores[3, 17]`, `exceptions` the share of numbers that differ by more than the tolerance.

    Raises GateError when more numbers than that differ by more than the tolerance, when names or shapes differ, and
    when there is nothing to compare.
    """
    if not reference or set(reference) != set(other):
        raise GateError(f"{what}: both must have the same outputs; received {sorted(reference)} and {sorted(other)}.")
    largest, where, rows, beyond, numbers = 0.0, "", 0, 0, 0
    for name, expected in reference.items():
        differences = _differences(np.asarray(expected), np.asarray(other[name]), f"{what}: '{name}'")
        rows = max(rows, len(differences))
        beyond += int(np.count_nonzero(~(differences <= tolerance)))
        numbers += differences.size
        if differences.max() >= largest:
            place = np.unravel_index(int(differences.argmax()), differences.shape)
            largest, where = float(differences.max()), f"{name}[{', '.join(str(int(index)) for index in place)}]"
    if beyond > exceptions * numbers:
        raise GateError(
            f"{what}: answers must agree within {tolerance:g}; {beyond} of {numbers} numbers do not, and the largest "
            f"difference is {largest:.3g} at {where}."
        )
    return {
        "what": what,
        "rows": rows,
        "tolerance": tolerance,
        "largest_difference": largest,
        "where": where,
        "exceptions": beyond / numbers,
    }


def _differences(expected: np.ndarray, found: np.ndarray, what: str) -> np.ndarray:
    if expected.shape != found.shape or expected.ndim == 0 or expected.size == 0:
        raise GateError(f"{what} must have the same shape [B, ...] with rows; {expected.shape} and {found.shape}.")
    if expected.dtype.kind in "SUO" or found.dtype.kind in "SUO":
        return (_text(expected) != _text(found)).astype(np.float64)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    return np.where(same, 0.0, np.where(np.isfinite(difference), difference, np.inf))


def _text(values: np.ndarray) -> np.ndarray:
    """Bytes and text as text, so that a string tensor equals the list that it was made from."""
    decoded = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else str(v) for v in values.ravel()]
    return np.array(decoded, object).reshape(values.shape)
