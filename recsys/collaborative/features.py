"""Features of items for towers and cross networks: content embeddings, columns of the catalogue, aggregates.

Whatever is fitted here (principal axes, vocabularies, means and deviations, aggregates) is fitted on training rows: the
content of items that stand in no training row is transformed and teaches nothing. Users have no features of their own;
theirs are means over the items of a history, so that a visitor has them too.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import sparse

from fusion.config import Settings, part_of
from fusion.embeddings import take
from fusion.errors import ConfigError, DataError
from fusion.registry import nearest
from fusion.submodels import SUBMODELS
from fusion.types import RunOptions, derive_seed
from recsys.collaborative.base import TrainingData
from recsys.collaborative.content import embedding_table, principal_axes, read_content

BLOCK = 1024
"""Rows of the item × item co-occurrences that are held at a time."""
RECENT = 0.75
"""From this quantile of its user's history on an interaction counts as recent."""
MOST_DEVIATIONS = 3.0
"""Standardised numbers are cut to so many deviations: one blockbuster must not decide about a layer."""


class ContentFeature(Settings):
    """One encoder over the items' text or image; frozen, because a tower does not train it."""

    encoder: part_of(SUBMODELS)  # type: ignore[valid-type]
    """The submodel that embeds an item: text_bert, text_tfidf, image_efficientnet, ..."""
    columns: tuple[str, ...] = ()
    """Text columns, joined in this order; unused for images."""
    dimensions: int = Field(64, ge=1, le=4096)
    """How many principal axes of the embeddings are kept."""


class FeatureSettings(Settings):
    """What is known about an item beside its number."""

    content: dict[str, ContentFeature] = Field(default_factory=dict)
    """Encoders by name."""
    numeric: tuple[str, ...] = ()
    """Columns of the catalogue that hold a number; also embeddings that came with the data, one column each."""
    categories: tuple[str, ...] = ()
    """Columns of the catalogue that hold one or several categories."""
    separator: str = Field("|", min_length=1)
    """What stands between two categories."""
    frequent_categories: int = Field(64, ge=0, le=10_000)
    """So many of the most frequent categories of each column have a place of their own."""
    hash_buckets: int = Field(8, ge=1, le=10_000)
    """The rarer ones, and those never seen in training, share so many places."""
    aggregates: bool = True
    """Use what the training interactions say about an item: popularity, recency, its users and its company."""


@dataclass(frozen=True)
class ItemFeatures:
    """The features of all items, scaled to be of like size.

    Attributes:
        table: float32 `[I, F]`: content of each encoder, columns of the catalogue, aggregates, in this order.
            Rows of content have length 1, or 0 where there is nothing to read; aggregates of cold items are 0.
        widths: how many columns each encoder has, then the catalogue, then the aggregates.
        described: bool `[I]`: some text, image or column says something about the item.
    """

    table: np.ndarray
    widths: tuple[int, ...]
    described: np.ndarray

    @property
    def width(self) -> int:
        """F, the columns of the table; at least 1, which is 0 everywhere when nothing was asked for."""
        return self.table.shape[1]

    @property
    def attributes(self) -> int:
        """G, the leading columns that cold items have too: all but the aggregates."""
        return sum(self.widths[:-1])

    @property
    def statistics(self) -> np.ndarray:
        """float32 `[I, S]`: the columns whose means over a history describe a user (catalogue and aggregates)."""
        return self.table[:, sum(self.widths[:-2]) :]


def check_contents(contents: Mapping[str, Any]) -> None:
    """Raises ConfigError for a text encoder without columns and for an encoder that would have to be trained."""
    for name, feature in contents.items():
        part = feature.encoder
        modality = part.registry[part.kind].modality
        if modality != "image" and not feature.columns:
            raise ConfigError(f"the {modality} content '{name}' must name its columns, as in 'columns: [title]'.")
        if not part.make(0).frozen:
            raise ConfigError(
                f"the content '{name}' must have an encoder that is used as it is; {part.kind} would be trained here. "
                "Set fine_tune: 0, take a pretrained encoder, or make it a content member of its own."
            )


def item_features(settings: FeatureSettings, data: TrainingData, options: RunOptions, seed: int) -> ItemFeatures:
    """Reads and scales everything that `settings` names. Raises DataError for a column that is not there."""
    trained = data.counts > 0
    blocks, described = [], np.zeros(len(trained), bool)
    for name, feature in settings.content.items():
        block = _content(name, feature, data, trained, options, derive_seed(seed, "encoder", name))
        described |= block.any(axis=1)
        blocks.append(block)
    columns, has_columns = _columns(settings, data.catalogue, trained)
    aggregates = np.zeros((len(trained), 0), np.float32)
    if settings.aggregates:
        aggregates = standardised(item_aggregates(data.matrix).to_numpy(), trained)
    if not any(block.shape[1] for block in (*blocks, columns, aggregates)):
        aggregates = np.zeros((len(trained), 1), np.float32)
    blocks += [columns, aggregates]
    table = np.concatenate(blocks, axis=1).astype(np.float32)
    return ItemFeatures(table, tuple(block.shape[1] for block in blocks), described | has_columns)


# ---- aggregates ----------------------------------------------------------------------------------------------


def item_aggregates(matrix: sparse.csr_matrix) -> pd.DataFrame:
    """What training interactions `[U, I]` say about each item, float64 `[I, 6]`; 0 for an item without any.

    - `share`: of the users who took it;
    - `log_popularity`: log(1 + how many did);
    - `position`: mean place in its users' histories, 0 the oldest and 1 the newest item (data without times come in the
      order of numbers, where this says nothing);
    - `recent_share`: how much of it fell into the newest quarter of a history;
    - `log_history`: mean log(1 + length) of its users' histories: do beginners take it, or connoisseurs;
    - `company`: entropy, in nats, of what else its users took: low in a niche, high for what goes with anything.
    """
    users, items = matrix.shape
    lengths = np.diff(matrix.indptr)
    owner = np.repeat(np.arange(users), lengths)
    place = np.arange(matrix.nnz) - matrix.indptr[owner]
    quantile = (place + 0.5) / np.maximum(lengths[owner], 1)
    count = np.bincount(matrix.indices, minlength=items).astype(np.float64)

    def mean_of(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(matrix.indices, values, minlength=items)
        return np.divide(sums, count, out=np.zeros(items), where=count > 0)

    return pd.DataFrame(
        {
            "share": count / max(users, 1),
            "log_popularity": np.log1p(count),
            "position": mean_of(quantile),
            "recent_share": mean_of((quantile >= RECENT).astype(np.float64)),
            "log_history": mean_of(np.log1p(lengths[owner])),
            "company": _company(matrix),
        }
    )


def _company(matrix: sparse.csr_matrix) -> np.ndarray:
    """Entropy `[I]` of the co-occurrences of each item with the others: log T - sum(c log c) / T, T their total."""
    by_item = matrix.T.tocsr().astype(np.float64)
    result = np.zeros(matrix.shape[1])
    for start in range(0, len(result), BLOCK):
        together = (by_item[start : start + BLOCK] @ matrix).tocoo()
        other = together.col != together.row + start
        rows, counts = together.row[other], together.data[other]
        size = together.shape[0]
        total = np.bincount(rows, counts, minlength=size)
        weighted = np.bincount(rows, counts * np.log(counts), minlength=size)
        safe = np.maximum(total, 1.0)
        result[start : start + size] = np.where(total > 0, np.log(safe) - weighted / safe, 0.0)
    return result


def standardised(values: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Columns `[I, N]` less the mean of `trained` items over their deviation, cut to 3; 0 for other items and NaN."""
    scaled = _scaled(values, trained)
    scaled[~trained] = 0.0
    return scaled


def _scaled(values: np.ndarray, trained: np.ndarray) -> np.ndarray:
    known = np.where(np.isfinite(values[trained]), values[trained], np.nan)
    usable = np.isfinite(known).any(axis=0)
    mean, deviation = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    mean[usable], deviation[usable] = np.nanmean(known[:, usable], axis=0), np.nanstd(known[:, usable], axis=0)
    scaled = np.divide(values - mean, deviation, out=np.zeros(values.shape), where=deviation > 1e-9)
    return np.clip(np.where(np.isfinite(scaled), scaled, 0.0), -MOST_DEVIATIONS, MOST_DEVIATIONS).astype(np.float32)


# ---- columns of the catalogue --------------------------------------------------------------------------------


def _columns(settings: FeatureSettings, catalogue: pd.DataFrame, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and categories `[I, N]`, and which items have any; each of the two kinds has rows of length about 1."""
    for column in (*settings.numeric, *settings.categories):
        if column not in catalogue:
            raise DataError(f"the catalogue has no column '{column}': {nearest(column, catalogue.columns)}")
    known = np.zeros(len(catalogue), bool)
    blocks: list[np.ndarray] = [np.zeros((len(catalogue), 0), np.float32)]
    if settings.numeric:
        values = np.stack(
            [pd.to_numeric(catalogue[c], errors="coerce").to_numpy(np.float64) for c in settings.numeric], axis=1
        )
        known |= np.isfinite(values).any(axis=1)
        blocks.append(_scaled(values, trained) / np.float32(np.sqrt(len(settings.numeric))))
    for column in settings.categories:
        encoded = multi_hot(
            split_categories(catalogue[column], settings.separator),
            trained,
            settings.frequent_categories,
            settings.hash_buckets,
        )
        known |= encoded.any(axis=1)
        blocks.append(encoded)
    return np.concatenate(blocks, axis=1), known


def split_categories(column: pd.Series, separator: str) -> list[list[str]]:
    """The categories of each row without doubles; none where the cell is empty."""
    texts = column.fillna("").astype(str)
    return [list(dict.fromkeys(part.strip() for part in text.split(separator) if part.strip())) for text in texts]


def multi_hot(categories: list[list[str]], trained: np.ndarray, frequent: int, buckets: int) -> np.ndarray:
    """`[I, min(frequent, found) + buckets]`: equal entries for an item's categories, rows of length 1 or 0.

    The categories most frequent among `trained` items have columns of their own; all others share `buckets` columns by
    the remainder of their CRC-32 (the hashing trick, Weinberger et al. 2009; Python's own hash differs between runs).
    """
    counts = Counter(name for row, seen in zip(categories, trained, strict=True) if seen for name in row)
    chosen = sorted(counts, key=lambda name: (-counts[name], name))[:frequent]
    places = {name: place for place, name in enumerate(chosen)}
    result = np.zeros((len(categories), len(places) + buckets), np.float32)
    for row, names in zip(result, categories, strict=True):
        for name in names:
            row[places.get(name, len(places) + zlib.crc32(name.encode()) % buckets)] = 1.0
    return unit_rows(result)


# ---- content -------------------------------------------------------------------------------------------------


def _content(
    name: str, feature: ContentFeature, data: TrainingData, trained: np.ndarray, options: RunOptions, seed: int
) -> np.ndarray:
    """Embeddings of one encoder on the leading principal axes of the trained items, rows of length 1 or 0."""
    encoder = feature.encoder.make(seed)
    values, available = read_content(encoder, feature.columns, data)
    fitted = trained & available
    encoder.adapt(take(values, np.flatnonzero(fitted)))
    vectors = embedding_table(encoder, values, available, data, options, f"{options.directory.name}/{name}")
    # A mean that all items share would make them all alike: of images it is most of the vector.
    vectors[available] -= vectors[fitted].mean(axis=0) if fitted.any() else 0.0
    axes = principal_axes(vectors[fitted], min(feature.dimensions, vectors.shape[1]))
    return unit_rows(vectors @ axes)


def unit_rows(table: np.ndarray) -> np.ndarray:
    """Rows over their length; rows of zeros stay."""
    return (table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)).astype(np.float32)
