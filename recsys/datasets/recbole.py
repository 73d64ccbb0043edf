"""RecBole's atomic files: `NAME.inter`, `NAME.item`, tab-separated, with a header of `field:type`.

https://recbole.io/docs/user_guide/data/atomic_files.html; `NAME.train.inter`, `NAME.valid.inter` and
`NAME.test.inter` are read as a given split, as RecBole's `benchmark_filename` does.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pydantic

from fusion.config import Settings, expand_path
from fusion.errors import DataError
from recsys.datasets.tables import items_of, names_in, read_delimited, rename, require, typed_interactions
from recsys.schema import IMAGE, ITEM_ID, SPLIT, Tables

_TYPES = {"token", "token_seq", "float", "float_seq"}
_PARTS = ("train", "valid", "test")


class RecBole:
    """Reads a folder of atomic files."""

    class Config(Settings):
        """Where the atomic files are and what their fields are called."""

        path: str
        """The folder with the atomic files; environment variables and ~ are expanded."""
        name: str = ""
        """What stands before `.inter`; empty takes the folder's name, as RecBole does."""
        columns: dict[str, str] = pydantic.Field(default_factory=dict)
        """Our column names to the fields of the files, as in `{title: movie_title}`."""

    @staticmethod
    def read(config: RecBole.Config) -> Tables:
        """Reads interactions and, where they are there, items. Raises DataError."""
        folder = expand_path(config.path)
        name = config.name or folder.resolve().name
        interactions = typed_interactions(_interactions(folder, name, config.columns), f"{name}.inter")
        item_file = folder / f"{name}.item"
        items = items_of(interactions)
        if item_file.is_file():
            items = _read_atomic(item_file, config.columns)
            require(items, [ITEM_ID], item_file.name)
        return Tables(items.assign(**{IMAGE: ""}), name, interactions)


def _interactions(folder: Path, name: str, columns: dict[str, str]) -> pd.DataFrame:
    whole = folder / f"{name}.inter"
    if whole.is_file():
        return _read_atomic(whole, columns)
    by_part = {part: folder / f"{name}.{part}.inter" for part in _PARTS}
    there = {part: path for part, path in by_part.items() if path.is_file()}
    if not there:
        held = ", ".join(names_in(folder, 8)) if folder.is_dir() else "no such folder"
        raise DataError(
            f"a RecBole data set must have {whole}; found: {held or 'nothing'}. Set data.path or data.name."
        )
    tables = [_read_atomic(path, columns).assign(**{SPLIT: part}) for part, path in there.items()]
    return pd.concat(tables, ignore_index=True).fillna("")


def _read_atomic(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    table = read_delimited(path, "\t", "utf-8-sig", quoting=csv.QUOTE_NONE)
    fields = [str(field).rpartition(":") for field in table.columns]
    for name, _, kind in fields:
        if not name or kind not in _TYPES:
            raise DataError(
                f"each field of an atomic file must read name:type with one of {', '.join(sorted(_TYPES))}; "
                f"{path} has '{':'.join(part for part in (name, kind) if part)[:80]}'."
            )
    return rename(table.set_axis([name for name, _, _ in fields], axis=1), columns, path.name)
