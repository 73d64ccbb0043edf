"""Tables of names: a part is one file and one line in a table of strings, imported only when it is used."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fusion.errors import ConfigError


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known one, or the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are {', '.join(known) or 'none'}."


class Registry(Mapping[str, Any]):
    """Maps a name to `module:attribute`, and imports the module on first use.

    >>> rules = Registry("rule", {"average": "fusion.rules.average:Average"})
    >>> rules["averige"]
    Traceback (most recent call last):
    fusion.errors.ConfigError: unknown rule 'averige': did you mean 'average'?
    """

    def __init__(self, what: str, table: dict[str, str]) -> None:
        self.what = what
        self._table = table

    def __getitem__(self, name: str) -> Any:
        if name not in self._table:
            raise ConfigError(f"unknown {self.what} '{name}': {nearest(name, self._table)}")
        module, _, attribute = self._table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)
