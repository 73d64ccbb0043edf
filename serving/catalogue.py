"""The items and users of one artifact as its tables have them: ids, titles, attributes to filter by, and item vectors;
behind them the new items that joined since, and without those that were withdrawn.

Each file is read once, when it is first needed; nothing is read again until another version is loaded.
"""

from __future__ import annotations

import copy
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
PROJECTIONS = "item_projections.npz"
"""By content, the matrix that makes item vectors of embeddings of unit length."""
ITEM_ID, USER_ID, TITLE, IMAGE = "item_id", "user_id", "title", "image"
ADDED = "added"
"""What the column of pictures has of a new item with one: its picture is no file of the artifact."""
MOST_VALUES = 200
"""Columns with more different values than this are not offered as filters: a person cannot choose from them."""

Rows = dict[str, np.ndarray]
"""By value of a column, the rows of the items that have it."""


class Catalogue:
    """What is known of the items of the artifact in `folder`. An artifact without tables has an empty catalogue.

    Never changes: `with_items`, `without` and `with_again` return another one. Safe to use from several threads.

    Attributes:
        gone: rows of the items that were withdrawn. Histories know them, and nothing else does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gone: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._columns: dict[str, Rows] = {}
        self._pictures: dict[int, bytes] = {}

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
    def trained(self) -> int:
        """How many items the artifact itself has; new ones are behind them."""
        return int(self.items.num_rows)

    @property
    def count(self) -> int:
        """How many items there are to be found."""
        return len(self.item_ids) - len(self.gone)

    @property
    def added(self) -> list[str]:
        """Ids of the new items, those that are withdrawn among them."""
        new = enumerate(self.item_ids[self.trained :], self.trained)
        return [item for row, item in new if self.rows[item] == row]

    @property
    def withdrawn(self) -> list[str]:
        """Ids of the items that are withdrawn."""
        return [self.item_ids[row] for row in sorted(self.gone) if self.rows[self.item_ids[row]] == row]

    def offers(self, item_id: str) -> bool:
        """Whether there is such an item, and it is not withdrawn."""
        return item_id in self.rows and self.rows[item_id] not in self.gone

    def has_room_for(self, item_id: str) -> bool:
        """Whether a new item may have this id: nobody has it, or a new item that was withdrawn."""
        return item_id not in self.rows or (not self.offers(item_id) and self.rows[item_id] >= self.trained)

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

    @cached_property
    def _new_vectors(self) -> np.ndarray:
        """Of new items, by row behind the artifact's own; none to begin with."""
        return np.zeros((0, 0 if self._vectors is None else self._vectors.shape[1]), np.float32)

    @cached_property
    def _projections(self) -> dict[str, np.ndarray]:
        if not (self.folder / PROJECTIONS).is_file():
            return {}
        with np.load(self.folder / PROJECTIONS, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def vectors(self, item_ids: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 `[N, D]` of known items, zeros for an item that has none.

        Raises InvalidRequest when the artifact has no vectors.
        """
        if self._vectors is None:
            raise InvalidRequest("'diversity' must be 0: this artifact has no item vectors; export the run again.")
        # An item that is being added may be in an answer before it is in the table.
        rows = np.array([self.rows.get(item, -1) for item in item_ids], np.int64)
        found = np.zeros((len(rows), self._vectors.shape[1]), np.float32)
        known, new = (rows >= 0) & (rows < len(self._vectors)), rows >= self.trained
        found[known] = self._vectors[rows[known]]
        found[new] = self._new_vectors[rows[new] - self.trained]
        return _unit(found)

    def with_items(
        self,
        items: Sequence[Mapping[str, Any]],
        embeddings: Mapping[str, np.ndarray] | None = None,
        pictures: Sequence[bytes | None] = (),
    ) -> Catalogue:
        """This catalogue with new items behind the others. What reads this one goes on undisturbed.

        Args:
            items: each with an `item_id` and the cells of some columns; others than those of the catalogue are left
                out. An id for which there is no room must not stand among them.
            embeddings: by content float32 `[N, D]`, 0 of items without it, of which their vectors are made.
            pictures: of each item, where there are any.

        Raises as `check` does.
        """
        ids = [str(item[ITEM_ID]) for item in items]
        places = range(len(self.item_ids), len(self.item_ids) + len(ids))
        return self._but(
            trained=self.trained,
            items=pa.concat_tables([self.items, pa.table(self.check(items), self.items.schema)]),
            item_ids=[*self.item_ids, *ids],
            rows={**self.rows, **dict(zip(ids, places, strict=True))},
            titles=[*self.titles, *(str(item.get(TITLE) or "") if TITLE in self.columns else "" for item in items)],
            _new_vectors=np.concatenate([self._new_vectors, self._projected(len(ids), embeddings or {})]),
            _pictures={**self._pictures, **{row: found for row, found in zip(places, pictures, strict=False) if found}},
        )

    def without(self, item_ids: Collection[str]) -> Catalogue:
        """This catalogue where these items are withdrawn; those that are not known are passed over."""
        return self._but(gone=self.gone.union(self.rows[item] for item in item_ids if item in self.rows))

    def with_again(self, item_ids: Collection[str]) -> Catalogue:
        """This catalogue where these items are not withdrawn."""
        return self._but(gone=self.gone.difference(self.rows[item] for item in item_ids if item in self.rows))

    def _but(self, **changed: Any) -> Catalogue:
        other = copy.copy(self)
        other.__dict__.pop("choices", None)
        other.__dict__.update(changed, _columns={})
        return other

    def _projected(self, count: int, embeddings: Mapping[str, np.ndarray]) -> np.ndarray:
        """The vectors `[count, D]` of new items, 0 where the artifact does not say how they are made."""
        found = np.zeros((count, self._new_vectors.shape[1]), np.float32)
        if self._vectors is not None:
            for name, projection in self._projections.items():
                if name in embeddings:
                    found += _unit(embeddings[name]) @ projection
        return found

    def check(self, items: Sequence[Mapping[str, Any]]) -> list[pa.Array]:
        """The cells of new items as columns of the catalogue's types. Raises InvalidRequest where one does not fit."""
        return [_cells(items, field) for field in self.items.schema]

    def allowed(self, filters: Mapping[str, Collection[str]]) -> list[str]:
        """Ids of the items that have, in every column named, one of its values.

        Numbers and truth values are written as text (`1995`, `true`); an item with a list has each of its values.
        Raises InvalidRequest for a column that the items do not have.
        """
        keep = self._offered()
        for column, values in filters.items():
            rows = self._rows(column)
            has = np.zeros_like(keep)
            for value in values:
                has[rows.get(value, [])] = True
            keep &= has
        return [self.item_ids[row] for row in np.flatnonzero(keep)]

    def _offered(self) -> np.ndarray:
        """bool by row: not withdrawn."""
        offered = np.ones(len(self.item_ids), bool)
        offered[list(self.gone)] = False
        return offered

    @cached_property
    def choices(self) -> dict[str, list[str]]:
        """By column, the values to filter by, for columns that have few: between 2 and MOST_VALUES."""
        offered = self._offered()
        columns = {name: self._rows(name) for name in self.columns if name not in (TITLE, IMAGE)}
        if self.gone:
            columns = {name: {v: r for v, r in rows.items() if offered[r].any()} for name, rows in columns.items()}
        return {name: sorted(rows) for name, rows in columns.items() if 2 <= len(rows) <= MOST_VALUES}

    def search(self, text: str, limit: int) -> list[str]:
        """Ids of the first `limit` items whose title, or id, contains the text, in any case."""
        wanted = text.casefold()
        found: list[str] = []
        for row, (item, title) in enumerate(zip(self.item_ids, self.titles, strict=True)):
            if len(found) == limit:
                break
            if row not in self.gone and (wanted in title.casefold() or wanted in item.casefold()):
                found.append(item)
        return found

    def described(self, item_id: str) -> dict[str, Any]:
        """The item's columns by name, without empty ones; nothing for an item that is unknown or withdrawn."""
        if not self.offers(item_id):
            return {}
        row = self.rows[item_id]
        values = {name: self.items.column(name)[row].as_py() for name in self.columns}
        if row in self._pictures:
            values[IMAGE] = ADDED
        return {name: value for name, value in values.items() if value not in (None, "", [])}

    def picture(self, item_id: str) -> bytes | None:
        """The picture that a new item brought; None of others, whose pictures are files."""
        return self._pictures.get(self.rows[item_id]) if self.offers(item_id) else None

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
    """A column of new items; of pictures it holds paths in the artifact's folder, where a new item has none."""
    values = [None if field.name == IMAGE else item.get(field.name) for item in items]
    try:
        if pa.types.is_nested(field.type) and any(isinstance(value, str) for value in values):
            raise TypeError("a text is no list")  # Arrow would take its letters
        return pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"'{field.name}' must be of the column's type, {field.type}; {error}.") from error


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows `[N, D]` scaled to the length 1; those of zeros stay as they are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return unit


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
