"""What a tabular member reads: some columns of a table, as text, in one array."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fusion.errors import DataError
from fusion.registry import nearest
from recsys.schema import IMAGE, ITEM_ID, LABEL, SPLIT

_NOT_READ = (IMAGE, ITEM_ID, LABEL, SPLIT)


def read_cells(table: pd.DataFrame, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The cells of some columns as a structured array `[N]` of text, one field a column, and the rows that hold any.

    Args:
        columns: names, or patterns as in `pixel_*`; `*` is every column but label, id, image and split.

    Raises DataError for a name or pattern that no column has.
    """
    names = _matching(table, columns)
    cells = {name: table[name].fillna("").astype(str).str.strip().to_numpy(object) for name in names}
    longest = {name: max([1, *map(len, column)]) for name, column in cells.items()}
    values = np.empty(len(table), dtype=[(name, f"U{size}") for name, size in longest.items()])
    for name, column in cells.items():
        values[name] = column
    return values, np.any([column != "" for column in cells.values()], axis=0)


def _matching(table: pd.DataFrame, patterns: Sequence[str]) -> list[str]:
    """Columns in the order of the patterns, and of the table within one; each once."""
    readable = [str(name) for name in table.columns if name not in _NOT_READ]
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [pattern] if pattern in readable else fnmatch.filter(readable, pattern)
        if not matching:
            raise DataError(f"the table has no column '{pattern}': {nearest(pattern, readable)}")
        found |= dict.fromkeys(matching)
    return list(found)
