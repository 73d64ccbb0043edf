"""The items and users of one artifact as its tables have them: ids, titles, attributes to filter by, and item vectors.

Each file is read once, when it is first needed; nothing is read again until another version is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import InvalidRequest, unknown

ITEMS, USERS, VECTORS = "items.parquet", "users.parquet", "item_vectors.npy"
ITEM_ID, USER_ID, TITLE, IMAGE = "item_id", "user_id", "title", "image"
MOST_VALUES = 200
"""Columns with more different values than this are not offered as filters: a person cannot choose from them."""

Rows = dict[str, np.ndarray]
"""By value of a column, the rows of the items that have it."""


class Catalogue:
    """What is known of the items of the artifact in `folder`. An artifact without tables has an empty catalogue.

    Safe to use from several threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._columns: dict[str, Rows] = {}

    @cached_property
    def items(self) -> pa.Table:
        """The table of items, one row each."""
        return _table(self.folder / ITEMS, ITEM_ID)

    @cached_property
    def item_ids(self) -> list[str]:
        """The id of each row of `items`."""
        return _texts(self.items, ITEM_ID)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row by item id."""
        return {item: row for row, item in enumerate(self.item_ids)}

    @cached_property
    def titles(self) -> list[str]:
        """The title of each row, '' where there is none."""
        return _texts(self.items, TITLE) if TITLE in self.columns else [""] * len(self.item_ids)

    @cached_property
    def user_ids(self) -> list[str]:
        """Ids of the users that the artifact knows."""
        return _texts(_table(self.folder / USERS, USER_ID), USER_ID)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the items beside the id."""
        return [name for name in self.items.column_names if name != ITEM_ID]

    @cached_property
    def _vectors(self) -> np.ndarray | None:
        path = self.folder / VECTORS
        return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None

    @property
    def has_vectors(self) -> bool:
        """Whether `vectors` answers."""
        return self._vectors is not None

    def vectors(self, item_ids: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 `[N, D]` of known items, zeros for an item that has none, as new items have.

        Raises InvalidRequest when the artifact has no vectors.
        """
        if self._vectors is None:
            raise InvalidRequest("'diversity' must be 0: this artifact has no item vectors; export the run again.")
        # An item that is being added may be in an answer before it is in the table.
        rows = np.array([self.rows.get(item, len(self._vectors)) for item in item_ids], np.int64)
        there = rows < len(self._vectors)
        found = np.zeros((len(rows), self._vectors.shape[1]), np.float32)
        found[there] = self._vectors[rows[there]]
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        unit: np.ndarray = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
        return unit

    def with_items(self, items: Sequence[Mapping[str, Any]]) -> Catalogue:
        """This catalogue with new items behind the others, each with an `item_id` and the cells of some columns; others
        than those of the catalogue are left out. What reads this one goes on undisturbed. Raises as `check` does.
        """
        known, new = self.items, Catalogue(self.folder)
        new.items = pa.concat_tables([known, pa.table(self.check(items), known.schema)])
        ids = [str(item[ITEM_ID]) for item in items]
        new.item_ids = [*self.item_ids, *ids]
        new.rows = {**self.rows, **{item: row for row, item in enumerate(ids, len(self.item_ids))}}
        new.titles = [*self.titles, *(str(item.get(TITLE) or "") if TITLE in self.columns else "" for item in items)]
        return new

    def check(self, items: Sequence[Mapping[str, Any]]) -> list[pa.Array]:
        """The cells of new items as columns of the catalogue's types. Raises InvalidRequest where one does not fit."""
        return [_cells(items, field) for field in self.items.schema]

    def allowed(self, filters: Mapping[str, Collection[str]]) -> list[str]:
        """Ids of the items that have, in every column named, one of its values.

        Numbers and truth values are written as text (`1995`, `true`); an item with a list has each of its values.
        Raises InvalidRequest for a column that the items do not have.
        """
        keep = np.ones(len(self.item_ids), bool)
        for column, values in filters.items():
            rows = self._rows(column)
            has = np.zeros_like(keep)
            for value in values:
                has[rows.get(value, [])] = True
            keep &= has
        return [self.item_ids[row] for row in np.flatnonzero(keep)]

    @cached_property
    def choices(self) -> dict[str, list[str]]:
        """By column, the values to filter by, for columns that have few: between 2 and MOST_VALUES."""
        offered = {name: sorted(self._rows(name)) for name in self.columns if name not in (TITLE, IMAGE)}
        return {name: values for name, values in offered.items() if 2 <= len(values) <= MOST_VALUES}

    def search(self, text: str, limit: int) -> list[str]:
        """Ids of the first `limit` items whose title, or id, contains the text, in any case."""
        wanted = text.casefold()
        found: list[str] = []
        for item, title in zip(self.item_ids, self.titles, strict=True):
            if len(found) == limit:
                break
            if wanted in title.casefold() or wanted in item.casefold():
                found.append(item)
        return found

    def described(self, item_id: str) -> dict[str, Any]:
        """The item's columns by name, without empty ones; nothing for an unknown item."""
        row = self.rows.get(item_id)
        if row is None:
            return {}
        values = {name: self.items.column(name)[row].as_py() for name in self.columns}
        return {name: value for name, value in values.items() if value not in (None, "", [])}

    def title(self, item_id: str) -> str:
        """The item's title, '' when it has none or is unknown."""
        row = self.rows.get(item_id)
        return "" if row is None else self.titles[row]

    def _rows(self, column: str) -> Rows:
        if column not in self.columns:
            raise InvalidRequest(f"'filters' must name columns of the items; {unknown(column, self.columns)}.")
        with self._lock:
            if column not in self._columns:
                self._columns[column] = _rows_by_value(self.items.column(column))
            return self._columns[column]


def _table(path: Path, id_column: str) -> pa.Table:
    return pq.read_table(path) if path.is_file() else pa.table({id_column: pa.array([], pa.string())})


def _cells(items: Sequence[Mapping[str, Any]], field: pa.Field) -> pa.Array:
    """A column of new items; pictures lie in the artifact's folder, where a new item has none."""
    values = [None if field.name == IMAGE else item.get(field.name) for item in items]
    try:
        if pa.types.is_nested(field.type) and any(isinstance(value, str) for value in values):
            raise TypeError("a text is no list")  # Arrow would take its letters
        return pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"'{field.name}' must be of the column's type, {field.type}; {error}.") from error


def _texts(table: pa.Table, column: str) -> list[str]:
    return [value or "" for value in table.column(column).cast(pa.string()).to_pylist()]


def _rows_by_value(column: pa.ChunkedArray) -> Rows:
    array = column.combine_chunks()
    rows = np.arange(len(array))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        rows, array = pc.list_parent_indices(array).to_numpy(), pc.list_flatten(array)
    coded = pc.dictionary_encode(array.cast(pa.string()))
    there = pc.is_valid(coded).to_numpy(zero_copy_only=False)
    codes, rows = coded.indices.drop_null().to_numpy(), rows[there]
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary)))
    return dict(zip(coded.dictionary.to_pylist(), np.split(rows[order], ends[:-1]), strict=False))
