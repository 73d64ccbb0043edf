"""A dense network over the columns of a table: numbers and categories `[B, ...]` -> one embedding each.

Cells are text until `prepare` reads them: numbers as float32, categories as integers. What was fitted on training rows
(ranges, means, deviations) stands in the graph as stock layers, so that a server cannot scale otherwise than training
did. Outliers are clipped at training quantiles; a missing number counts as the mean and raises a flag beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import pydantic

from fusion.compat import keras
from fusion.config import Settings
from fusion.errors import DataError
from fusion.initializers import Initializer, initializer
from fusion.registry import nearest
from fusion.submodels.base import Submodel
from fusion.types import Features, derive_seed

layers = keras.layers

MISSING = frozenset({"", "?", "na", "n/a", "nan", "none", "null"})
"""Cells that hold nothing, whatever their case."""

SILENT = 1e30
"""The variance given to what never varied in training: divided by its root nothing is left, whatever arrives later.
Weights behind such a column were never trained."""

STATE = ("categorical", "numeric", "scales", "vocabulary", "vocabulary_column")
LOW, HIGH, MEAN, VARIANCE, MISSED, MISSED_VARIANCE = range(6)
"""Rows of `scales`: the range kept, the moments of the numbers once it is scaled to 0..1, and of the flag."""


class Dense(Submodel):
    """Layers of Dense, activation and dropout over standardised numbers, flags and categories; none is a linear model.

    Values are a structured array `[N]` of text with one field a column, named as in the table. A column is numeric
    when all its training cells are numbers or missing, and of categories otherwise.
    """

    modality: ClassVar[Literal["text", "image", "tabular"]] = "tabular"

    class Config(Settings):
        """Settings of the dense network."""

        categorical: tuple[str, ...] = ()
        """Columns of categories that look like numbers; columns that hold text are categories by themselves."""
        widths: tuple[Annotated[int, pydantic.Field(ge=1, le=65536)], ...] = pydantic.Field((64, 64), max_length=16)
        """Units of each layer; the last is the length of the embedding. None: the embedding is the scaled columns."""
        activation: Literal["relu", "gelu", "tanh"] = "relu"
        """The non-linearity after each layer."""
        dropout: float = pydantic.Field(0.1, ge=0, lt=1)
        """Share of units dropped after each layer in training."""
        initializer: Initializer = "glorot_uniform"
        """How the weights of the layers start."""
        clip: float = pydantic.Field(0.01, ge=0, lt=0.5)
        """Numbers beyond these quantiles of training, at both ends, count as the quantile; 0 takes the extremes."""
        max_categories: int = pydantic.Field(100, ge=1, le=10_000)
        """Categories kept of each column, the most frequent ones; others and new ones are unknown: all zeros."""
        category_vectors: int = pydantic.Field(0, ge=0, le=1024)
        """Length of a trained vector for each category; 0 gives each category a column of its own (one-hot)."""

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._columns: _Columns | None = None

    @property
    def frozen(self) -> bool:
        """True without layers and vectors: what `adapt` fitted is not trained further."""
        return not self.config.widths and not self.config.category_vectors

    def adapt(self, values: Any) -> None:
        """Fits kinds of columns, ranges, moments and categories. Raises DataError for an unknown categorical column."""
        names = _names(values)
        for name in self.config.categorical:
            if name not in names:
                raise DataError(
                    f"categorical names the column '{name}', which the member does not read: {nearest(name, names)}"
                )
        self._columns = _Columns.fitted(values, self.config)
        self._encoder = None

    def prepare(self, values: Any, fixed_length: bool = False) -> Features:
        """Cells -> `numbers` and `missing` float32 `[N, C]`, `categories` int32 `[N, K]`, of those that there are."""
        columns = self._fitted()
        features: Features = {}
        if columns.numeric:
            numbers = np.stack([_numbers(_field(values, name)) for name in columns.numeric], axis=1)
            missing = np.isnan(numbers)
            low, high, mean = columns.scales[[LOW, HIGH, MEAN]]
            features["numbers"] = np.where(missing, low + mean * (high - low), numbers).astype(np.float32)
            features["missing"] = missing.astype(np.float32)
        if columns.vocabularies:
            ids, first = [], 0
            for name, known in columns.vocabularies.items():
                place = {category: first + number for number, category in enumerate(known, start=1)}
                ids.append([place.get(str(cell).strip(), first) for cell in _field(values, name)])
                first += len(known) + 1
            features["categories"] = np.array(ids, np.int32).reshape(len(ids), len(values)).T
        return features

    def unfreeze(self) -> list[keras.layers.Layer]:
        """All layers with weights but the fixed columns of categories."""
        for layer in self.encoder().layers:
            layer.trainable = layer.name != "one_hot"
        return [layer for layer in self.encoder().layers if layer.trainable_weights]

    def state(self) -> dict[str, np.ndarray]:
        """`numeric` str `[C]`, `scales` float64 `[6, C]`, `categorical` str `[K]`, `vocabulary` str `[M]` and the
        column of each of its categories, int32 `[M]`; empty before `adapt`."""
        if self._columns is None:
            return {}
        vocabularies = self._columns.vocabularies
        sizes = [len(known) for known in vocabularies.values()]
        return {
            "numeric": np.array(self._columns.numeric, np.str_),
            "scales": self._columns.scales,
            "categorical": np.array(list(vocabularies), np.str_),
            "vocabulary": np.array([category for known in vocabularies.values() for category in known], np.str_),
            "vocabulary_column": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `state` gave. Raises DataError when arrays are missing or do not fit each other."""
        shapes = {name: np.shape(array) for name, array in state.items()}
        if tuple(sorted(state)) != STATE or (
            shapes["scales"] != (6, *shapes["numeric"]) or shapes["vocabulary"] != shapes["vocabulary_column"]
        ):
            received = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "nothing"
            raise DataError(
                f"the state of a dense submodel must be {', '.join(STATE)} over the same columns; received {received}. "
                "Train the member again."
            )
        vocabularies: dict[str, tuple[str, ...]] = {}
        for number, name in enumerate(state["categorical"]):
            vocabularies[str(name)] = tuple(map(str, state["vocabulary"][state["vocabulary_column"] == number]))
        scales = np.asarray(state["scales"], np.float64)
        self._columns = _Columns(tuple(map(str, state["numeric"])), scales, vocabularies)
        self._encoder = None

    def _build(self) -> keras.Model:
        columns = self._fitted()
        inputs, parts = [], []
        if columns.numeric:
            numbers, missing = (
                layers.Input((len(columns.numeric),), name=name, dtype="float32") for name in ("numbers", "missing")
            )
            low, high, mean, variance, missed, missed_variance = columns.scales
            ranged = layers.Normalization(mean=low, variance=np.square(high - low), name="range")(numbers)
            clipped = layers.ReLU(max_value=1.0, name="clip")(ranged)
            parts.append(layers.Normalization(mean=mean, variance=variance, name="standardise")(clipped))
            parts.append(layers.Normalization(mean=missed, variance=missed_variance, name="flags")(missing))
            inputs += [numbers, missing]
        if columns.vocabularies:
            categories = layers.Input((len(columns.vocabularies),), dtype="int32", name="categories")
            parts.append(self._categories(categories, columns))
            inputs.append(categories)
        x = layers.Concatenate(name="columns")(parts) if len(parts) > 1 else parts[0]
        for number, width in enumerate(self.config.widths):
            x = self._layer(x, f"dense{number}", width)
        encoder = keras.Model(inputs, layers.Activation("linear", name="embedding", dtype="float32")(x), name="dense")
        self._set_categories(encoder, columns)
        return encoder

    def _categories(self, ids: Any, columns: _Columns) -> Any:
        """One-hot columns are an Embedding too, of the unit vectors; their sum over the columns is a stock layer."""
        rows = columns.categories + len(columns.vocabularies)
        if not self.config.category_vectors:
            units = layers.Embedding(rows, columns.categories, name="one_hot")(ids)
            return layers.GlobalAveragePooling1D(name="known_categories")(units)
        vectors = layers.Embedding(rows, self.config.category_vectors, name="category_vectors")(ids)
        return layers.Flatten(name="categories_side_by_side")(vectors)

    def _set_categories(self, encoder: keras.Model, columns: _Columns) -> None:
        """Unit vectors times the number of columns, which the mean divides by; unknown categories start at zero."""
        if not columns.vocabularies:
            return
        sizes = np.array([len(known) + 1 for known in columns.vocabularies.values()])
        unknown = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        known = np.setdiff1d(np.arange(sizes.sum()), unknown)
        vectors = self.config.category_vectors
        table = np.zeros((sizes.sum(), vectors or len(known)), np.float32)
        if vectors:
            rng = np.random.default_rng(derive_seed(self.seed, "dense", "categories"))
            table[known] = rng.normal(scale=vectors**-0.5, size=(len(known), vectors))
        else:
            table[known] = len(sizes) * np.eye(len(known))
        encoder.get_layer("category_vectors" if vectors else "one_hot").set_weights([table])

    def _layer(self, x: Any, name: str, width: int) -> Any:
        weights = initializer(self.config.initializer, derive_seed(self.seed, "dense", name))
        x = layers.Dense(width, kernel_initializer=weights, name=name)(x)
        x = layers.Activation(self.config.activation, name=f"{name}_{self.config.activation}")(x)
        if self.config.dropout == 0:
            return x
        # A stateful generator is a variable, which a checkpoint can hold.
        seed = derive_seed(self.seed, "dense", name, "dropout")
        return layers.Dropout(
            self.config.dropout, seed=seed, rng_type="stateful", force_generator=True, name=f"{name}_dropout"
        )(x)

    def _fitted(self) -> _Columns:
        if self._columns is None:
            raise DataError(
                "a dense submodel must be fitted before use; this one knows no columns. "
                "Call adapt(training rows), or load_state with what a trained one left."
            )
        return self._columns


class _Columns:
    """What is known of the columns: scales float64 `[6, C]` of the numeric ones, categories of the others by name."""

    def __init__(
        self, numeric: tuple[str, ...], scales: np.ndarray, vocabularies: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.numeric, self.scales, self.vocabularies = numeric, scales, dict(vocabularies)

    @classmethod
    def fitted(cls, values: np.ndarray, config: Dense.Config) -> _Columns:
        """Fitted on training rows. Raises DataError when no column is left to learn from."""
        numeric: dict[str, np.ndarray] = {}
        vocabularies: dict[str, tuple[str, ...]] = {}
        for name in _names(values):
            numbers = None if name in config.categorical else _numbers(values[name])
            if numbers is not None and (np.isfinite(numbers) | _is_missing(values[name])).all():
                numeric[name] = _scales(numbers, config.clip)
            else:
                vocabularies[name] = _vocabulary(values[name], config.max_categories)
        scales = np.stack(list(numeric.values()), axis=1) if numeric else np.zeros((6, 0))
        return cls(tuple(numeric), scales, vocabularies)

    @property
    def categories(self) -> int:
        """Known categories of all columns."""
        return sum(map(len, self.vocabularies.values()))


def _names(values: Any) -> tuple[str, ...]:
    """The columns of a structured array; DataError for anything else."""
    names = getattr(getattr(values, "dtype", None), "names", None)
    if names is None:
        raise DataError(
            f"rows of a table must be a structured array with one field a column; received {type(values).__name__}. "
            "Read them with recsys.cells.read_cells."
        )
    return tuple(names)


def _field(values: np.ndarray, name: str) -> np.ndarray:
    names = _names(values)
    if name not in names:
        raise DataError(
            f"the rows must have the column '{name}', on which this member was trained: {nearest(name, names)}"
        )
    return values[name]


def _numbers(cells: np.ndarray) -> np.ndarray:
    """Cells as float64 `[N]`; NaN for what is no number that float32 can hold."""
    numbers = pd.to_numeric(pd.Series(cells, dtype="str"), errors="coerce").to_numpy(np.float64)
    return np.where(np.abs(numbers) <= np.finfo(np.float32).max, numbers, np.nan)


def _is_missing(cells: np.ndarray) -> np.ndarray:
    return np.array([str(cell).strip().lower() in MISSING for cell in cells], bool)


def _scales(numbers: np.ndarray, clip: float) -> np.ndarray:
    """The rows of `scales` for one column `[N]` with NaN where a number is missing."""
    present = numbers[~np.isnan(numbers)]
    missed = 1.0 - len(present) / max(len(numbers), 1)
    missed_variance = missed * (1.0 - missed) or SILENT
    if len(np.unique(present)) < 2:
        low = present[0] if len(present) else 0.0
        return np.array([low, low + max(1.0, abs(low)), 0.0, SILENT, missed, missed_variance])
    low, high = np.quantile(present, [clip, 1.0 - clip])
    if low == high:  # nearly all rows are equal: the quantiles would take away the few that are not
        low, high = present.min(), present.max()
    scaled = np.clip((present - low) / (high - low), 0.0, 1.0)
    return np.array([low, high, scaled.mean(), scaled.var(), missed, missed_variance])


def _vocabulary(cells: np.ndarray, at_most: int) -> tuple[str, ...]:
    """The most frequent categories, the missing one among them; of equal counts the first in the alphabet."""
    categories, counts = np.unique(np.char.strip(cells), return_counts=True)
    kept = np.lexsort([categories, -counts])[:at_most]
    return tuple(sorted(map(str, categories[kept])))
