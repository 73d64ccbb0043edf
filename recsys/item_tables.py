"""What an artifact tells of its items beside their scores: attributes to filter by, and vectors to spread lists by."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from fusion.errors import ConfigError
from fusion.files import save_arrays, write_atomically
from fusion.registry import nearest
from recsys.collaborative.content import Contents
from recsys.schema import IMAGE, ITEM_ID, TITLE, Interactions
from recsys.thumbnails import Picture, small_jpegs

if TYPE_CHECKING:
    from recsys.settings import ExportSettings

ITEMS, VECTORS, PICTURES = "items.parquet", "item_vectors.npy", "pictures"
PROJECTIONS = "item_projections.npz"
_BLOCK = 256
"""Pictures that are in memory at once."""
LONGEST = 256
"""Bytes of a cell; columns with longer ones are texts to read and not attributes to filter by, unless asked for."""
SEPARATOR = "|"
"""Between several values in a cell, as in `Comedy|Drama`; such columns become lists."""
DIMENSIONS = 64
"""Length of an item's vector."""
MOST_USERS = 20_000
"""Users out of whom vectors are made where nothing else is known of the items."""


def check_attributes(asked: Sequence[str] | None, catalogue: pd.DataFrame) -> None:
    """Raises ConfigError where `export.attributes` names what is no column of the items to filter by."""
    columns = _filterable(catalogue)
    for name in asked or ():
        if name not in columns:
            raise ConfigError(
                f"export.attributes must name columns of the items, beside id, title and image; received '{name}': "
                f"{nearest(name, columns)}"
            )


def _filterable(catalogue: pd.DataFrame) -> list[str]:
    return [str(name) for name in catalogue.columns if name not in (ITEM_ID, TITLE, IMAGE)]


def attributes(catalogue: pd.DataFrame, asked: Sequence[str] | None) -> pd.DataFrame:
    """The columns to filter by: those asked for, or all whose cells are short; lists where cells hold several values,
    nothing (None) where they are empty. Columns without any value are left out."""
    found = {}
    for name in _filterable(catalogue) if asked is None else asked:
        column = catalogue[name].astype(object).where(catalogue[name].astype(str) != "", None)
        texts = column.dropna().astype(str)
        if not len(texts) or (asked is None and max(len(text.encode()) for text in texts) > LONGEST):
            continue
        several = texts.str.contains(SEPARATOR, regex=False).any()
        found[name] = column.map(_values, na_action="ignore") if several else column
    return pd.DataFrame(found, index=catalogue.index)


def _values(cell: Any) -> list[str]:
    return [value.strip() for value in str(cell).split(SEPARATOR) if value.strip()]


class ItemVectors(NamedTuple):
    """A vector for each item.

    Attributes:
        rows: float16 `[I, D]` of unit length, D at most 64.
        made_of: in words.
        projections: by content float32 `[E, D]`: an item's embeddings, each of unit length, times these, summed and
            scaled to unit length, are its vector. Empty where vectors are made of who took what.
    """

    rows: np.ndarray
    made_of: str
    projections: dict[str, np.ndarray]


def item_vectors(contents: Mapping[str, Contents], history: sparse.csr_matrix) -> ItemVectors:
    """Vectors of the items, by which lists are spread.

    Cosines of the vectors come near to those of the embeddings of all contents side by side, of which the vectors are
    the truncated singular value decomposition; an item of which there is no content has zeros. Without any content it
    is the decomposition of who took what, each item's column scaled to unit length.

    Args:
        contents: by name, as they are exported.
        history: `[U, I]` positives.
    """
    distinct = {(content.encoder.fingerprint(), content.columns): name for name, content in contents.items()}
    tables = {name: contents[name].table for name in distinct.values()}
    if tables:
        matrix, made_of = np.hstack(list(tables.values())), ", ".join(tables)
        known = np.flatnonzero(matrix.any(axis=1))
    else:
        users = np.random.default_rng(0).permutation(history.shape[0])[:MOST_USERS]
        matrix, made_of = normalize(history[np.sort(users)].T.tocsr()), "who took what"
        known = np.flatnonzero(matrix.getnnz(axis=1))
    left, strength, right = randomized_svd(matrix, min(DIMENSIONS, *matrix.shape), random_state=0)
    vectors = np.zeros_like(left)  # of nothing it makes rounding, which must not be scaled up
    vectors[known] = (left * strength)[known]
    ends = np.cumsum([table.shape[1] for table in tables.values()])
    parts = np.split(right.T.astype(np.float32), ends[:-1]) if tables else []
    return ItemVectors(normalize(vectors).astype(np.float16), made_of, dict(zip(tables, parts, strict=True)))


def write_pictures(folder: Path, pictures: Sequence[Picture], side: int) -> list[str | None]:
    """Writes each picture as a JPEG of at most `side` pixels below `pictures/`; returns the paths within the folder,
    None where there is no picture or none that can be used."""
    (folder / PICTURES).mkdir()
    paths: list[str | None] = []
    for start in range(0, len(pictures), _BLOCK):
        for row, jpeg in enumerate(small_jpegs(pictures[start : start + _BLOCK], side), start):
            path = f"{PICTURES}/{row:07d}.jpg"
            if jpeg:
                (folder / path).write_bytes(jpeg.content)
            paths.append(path if jpeg else None)
    return paths


def write_item_tables(
    folder: Path,
    data: Interactions,
    settings: ExportSettings,
    contents: Mapping[str, Contents],
    history: sparse.csr_matrix,
) -> dict[str, Any]:
    """Writes `items.parquet` (id, title, attributes) and `item_vectors.npy`, with rows in the order of numbers, and
    pictures; where new items may join, also `item_projections.npz`, which makes vectors of them.

    Returns what the manifest says of them.
    """
    found = attributes(data.catalogue, settings.attributes)
    titles = data.catalogue[[column for column in data.catalogue.columns if column == TITLE]]
    table = pd.concat([titles, found], axis=1)
    table.insert(0, ITEM_ID, data.item_ids)
    if settings.pictures and IMAGE in data.catalogue:
        table[IMAGE] = write_pictures(folder, list(data.catalogue[IMAGE]), settings.pictures)
    write_atomically(folder / ITEMS, table.to_parquet(index=False))
    vectors, content = item_vectors(contents, history), io.BytesIO()
    np.save(content, vectors.rows, allow_pickle=False)
    write_atomically(folder / VECTORS, content.getvalue())
    told = {"file": VECTORS, "dtype": "float16", "shape": list(vectors.rows.shape), "made_of": vectors.made_of}
    if settings.spare_items and vectors.projections:
        save_arrays(folder / PROJECTIONS, vectors.projections)
        told["projections"] = PROJECTIONS
    lists = {name: "list" if found[name].map(lambda cell: isinstance(cell, list)).any() else "text" for name in found}
    return {"attributes": lists, "vectors": told}
