"""Fields of JSON bodies: of each name the type that its value must have, and the requests that are read so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from serving.errors import InvalidRequest, unknown


def text(value: Any) -> str:
    """The value where it is text. Raises TypeError with what it must be, as all of these do."""
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def whole(value: Any) -> int:
    """A whole number; true and 3.0 are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise TypeError("a whole number of 64 bits")
    return value


def number(value: Any) -> float:
    """A number as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    try:
        return float(value)
    except OverflowError as error:
        raise TypeError("a number that is not that large") from error


def truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise TypeError("a list of texts")
    return tuple(value)


def wholes(value: Any) -> tuple[int, ...]:
    """A list of whole numbers."""
    if not isinstance(value, list):
        raise TypeError("a list of whole numbers")
    return tuple(whole(part) for part in value)


def objects(value: Any) -> list[Any]:
    """A list that is not empty; `checked` looks at its objects."""
    if not isinstance(value, list) or not value:
        raise TypeError("a list with at least one object")
    return value


def by_name(part: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """An object whose values are all of one kind."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise TypeError("an object")
        return {name: part(own) for name, own in value.items()}

    return read


Fields = Mapping[str, Callable[[Any], Any]]
WHICH: Fields = {"model": text, "version": whole, "label": text, "k": whole}
SIMILAR: Fields = {**WHICH, "item_id": text}
RECOMMEND: Fields = {
    **WHICH,
    "user_id": text,
    **dict.fromkeys(("history", "exclude", "include"), texts),
    "filters": by_name(texts),
    "diversity": number,
    "profile": text,
    "weights": by_name(number),
    "timeout_ms": number,
}
MODEL_CONFIG: Fields = {
    "name": text,
    "folder": text,
    "latest": whole,
    "versions": wholes,
    "labels": by_name(whole),
    "canary": number,
}


def checked(body: Any, fields: Fields) -> dict[str, Any]:
    """The fields of a body, each of its type. Raises InvalidRequest with what a field must be, or the nearest name."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"a body must be an object with {', '.join(fields)}.")
    for name in body:
        if name not in fields:
            raise InvalidRequest(f"a body has no such field; {unknown(name, fields)}.")
    found = {}
    for name, value in body.items():
        try:
            found[name] = fields[name](value)
        except TypeError as error:
            raise InvalidRequest(f"'{name}' must be {error}; received {json.dumps(value)[:60]}.") from error
    return found


def required(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """The fields, where all of these are there. Raises InvalidRequest."""
    if missing := [name for name in names if name not in fields]:
        raise InvalidRequest(f"a body must have '{missing[0]}'; it is missing.")
    return fields
