"""Where the images of a table lie: templates such as `posters/{item_id}.jpg` into paths below one folder.

Nothing is opened here; decoding is done by `fusion.images`.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from fusion.errors import ConfigError, DataError
from fusion.registry import nearest


def safe_relative(path: str) -> bool:
    """Whether a path stays below the folder that it is joined to: not absolute and without `..`."""
    return not path.startswith("/") and ".." not in path.split("/")


def check_template(template: str) -> str:
    """Returns a template that is a safe path with plain `{column}` fields; raises ConfigError otherwise."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"an image template must read like 'posters/{{item_id}}.jpg'; '{template}': {error}."
        ) from None
    plain = all(name is None or (name and not spec and not conversion) for _, name, spec, conversion in fields)
    if not plain or not safe_relative(template):
        raise ConfigError(
            "an image template must be a path below the data folder with plain {column} fields, as in "
            f"'posters/{{item_id}}.jpg'; received '{template}'."
        )
    return template


def locate(table: pd.DataFrame, templates: Sequence[str], aliases: Mapping[str, str], folder: Path) -> list[str]:
    """For each row the path of its image by the first template whose file exists, or '' when none does.

    `aliases` maps the source's column names to ours, so that a template may use either. Raises DataError when
    a template names a column that is not there, or a cell leads out of the folder.
    """
    existing = _Existing(folder)
    found = [""] * len(table)
    for template in templates:
        for row, path in enumerate(_fill(template, table, aliases)):
            if not found[row] and path:
                found[row] = existing.path(path)
    return found


def _fill(template: str, table: pd.DataFrame, aliases: Mapping[str, str]) -> Iterable[str]:
    """The template with each row's cells in it; '' for rows in which one of the cells is empty."""
    parts = list(string.Formatter().parse(template))
    names = [aliases.get(name, name) for _, name, _, _ in parts if name]
    for name in names:
        if name not in table:
            raise DataError(
                f"the image template '{template}' needs a column '{name}': {nearest(name, map(str, table.columns))}"
            )
    literals = [literal for literal, _, _, _ in parts] + [""] * (len(names) + 1 - len(parts))
    if not names:
        return [template] * len(table)
    rows = zip(*(table[name] for name in names), strict=True)
    return ["".join(_interleave(literals, cells)) if all(cells) else "" for cells in rows]


def _interleave(literals: Sequence[str], cells: Sequence[str]) -> Iterable[str]:
    for literal, cell in zip(literals, (*cells, ""), strict=True):
        yield literal
        yield cell


class _Existing:
    """Answers which files exist by listing each folder once; asking per file is slow on network disks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[str, frozenset[str]] = {}

    def path(self, relative: str) -> str:
        if not safe_relative(relative):
            raise DataError(
                f"an image must lie below the data folder {self._folder}; received {relative[:120]!r}. "
                "Write paths relative to the folder, without '..'."
            )
        parent, _, name = relative.rpartition("/")
        if parent not in self._listed:
            self._listed[parent] = self._names(parent)
        return os.path.join(self._folder, relative) if name in self._listed[parent] else ""

    def _names(self, parent: str) -> frozenset[str]:
        try:
            with os.scandir(self._folder / parent) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in an id
            return frozenset()
        except OSError as error:
            raise DataError(f"the image folder {self._folder / parent} must be readable: {error.strerror}.") from None
