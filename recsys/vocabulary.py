"""External ids and their row numbers, both ways; kept on the disk as one JSON string a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from fusion.errors import DataError

UNKNOWN = -1
"""The number of an id that is not in the vocabulary."""


class Vocabulary:
    """Distinct ids in a fixed order; the number of an id is its place.

    >>> items = Vocabulary(["tt01", "tt07"])
    >>> items.numbers(["tt07", "no such film"]).tolist()
    [1, -1]
    >>> items.ids([0]).tolist()
    ['tt01']
    """

    def __init__(self, ids: Iterable[str]) -> None:
        """Raises DataError when an id stands twice or is not a string."""
        self._ids = np.array(list(ids), dtype=object)
        strange = next((i for i in self._ids if not isinstance(i, str)), None)
        if strange is not None:
            raise DataError(f"ids of a vocabulary must be strings; received {strange!r}.")
        self._index = pd.Index(self._ids, dtype=object)
        if not self._index.is_unique:
            twice = self._index[self._index.duplicated()][0]
            raise DataError(f"an id may stand once in a vocabulary; received {twice!r} twice.")

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, external_id: object) -> bool:
        return external_id in self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and np.array_equal(self._ids, other._ids)

    __hash__ = None  # type: ignore[assignment]  # as of any container that compares by content

    @property
    def all_ids(self) -> np.ndarray:
        """Every id by number, object `[N]` of str; a copy."""
        return self._ids.copy()

    def numbers(self, ids: Iterable[str]) -> np.ndarray:
        """The numbers of ids, int32 `[N]`, `UNKNOWN` for those that are not here."""
        found: np.ndarray = self._index.get_indexer(pd.Index(list(ids), dtype=object))
        return found.astype(np.int32)

    def ids(self, numbers: Iterable[int] | np.ndarray) -> np.ndarray:
        """The ids of numbers, object `[N]`; raises IndexError for a number that is none of them."""
        places = np.asarray(numbers, dtype=np.int64)
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"numbers must lie in 0..{len(self) - 1}; received {places.min()}..{places.max()}.")
        found: np.ndarray = self._ids[places]
        return found

    def sha256(self) -> str:
        """SHA-256 (hex) of the ids in their order."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes one JSON string a line, ASCII only, so that any id survives any editor."""
        path.write_text(self._text(), encoding="ascii")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads what `save` wrote; raises DataError when a line is not a JSON string."""
        try:
            lines = path.read_text(encoding="ascii").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the vocabulary {path} must be readable: {error}.") from error
        try:
            return cls(json.loads(line) for line in lines)
        except json.JSONDecodeError as error:
            raise DataError(f"each line of the vocabulary {path} must be a JSON string: {error}.") from None

    def _text(self) -> str:
        return "".join(json.dumps(external_id) + "\n" for external_id in self._ids)
