"""Hybrid of content and collaboration: what an item says or shows foretells its collaborative vector.

Gantner et al. 2010, "Learning attribute-to-feature mappings for cold-start recommendations"; van den Oord et al. 2013,
"Deep content-based music recommendation" (there the mapping is a network; here it is linear in pretrained embeddings,
so that it has a closed form).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from fusion.compat import tf
from fusion.config import Settings, parse_part, part_of
from fusion.embeddings import take
from fusion.errors import ConfigError, DataError
from fusion.registry import nearest
from fusion.submodels import SUBMODELS
from fusion.types import History, RunOptions, derive_seed
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import GrowingScorer, Member, TrainingData, constant
from recsys.collaborative.content import Contents, embedding_table, read_content
from recsys.collaborative.features import check_contents, multi_hot, split_categories

VECTORS: dict[str, tuple[str, ...]] = {
    "ials": ("factors",),
    "matrix_factorization": ("history_table", "item_table"),
}
"""The kinds of members that can be a base, and which arrays of their state are tables of items, `[I, D]`."""

STRENGTHS = np.logspace(-3, 5, 33)
"""Penalties among which leave-one-out chooses."""
BIAS = "every item"
"""Beside the names of contents, what is said of an item whatever it holds."""
CATEGORIES = 10_000
"""Categories of one column that have a place of their own."""


class ReadContent(Settings):
    """One encoder over the items' text or image; used as it is."""

    encoder: part_of(SUBMODELS)  # type: ignore[valid-type]
    """The submodel that embeds an item: text_bert, text_tfidf, image_efficientnet, ..."""
    columns: tuple[str, ...] = ()
    """Text columns, joined in this order; unused for images."""


class ContentRegression(Member):
    """A collaborative base gives warm items their vectors; ridge regression on content gives cold items theirs.

    Users are folded in as the base does it, so a visitor's vector comes from what was taken, and cold items are ranked
    among themselves and among warm ones by one product. Speaks about every item that is warm or has any content.

    Features of an item are the embeddings of all encoders and its categories, each block centred on the training items
    and scaled to a mean squared length of 1; what an item lacks is taken for average. All training items weigh the
    same: weights by count were tried and made cold items worse.
    """

    class Config(Settings):
        """Settings of the regression."""

        base: part_of(MEMBERS) = Field(default_factory=lambda: parse_part(MEMBERS, {"kind": "ials"}, "base"))  # type: ignore[valid-type]
        """The collaborative member whose item vectors are foretold: ials or matrix_factorization."""
        content: dict[str, ReadContent] = Field(min_length=1)
        """Encoders by name."""
        categories: tuple[str, ...] = ()
        """Columns of the catalogue that hold one or several categories."""
        separator: str = Field("|", min_length=1)
        """What stands between two categories."""
        l2: float | None = Field(None, gt=0)
        """Strength of the ridge penalty; none chooses it by leave-one-out on the training items."""
        shrinkage: float = Field(0.0, ge=0)
        """A prediction counts as much as so many interactions: a warm item's vector is the mean of both. 0 keeps it."""

    reads_content = True

    def __init__(self, config: Any, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.base = config.base.make(derive_seed(seed, "base"))
        self.encoders = {n: c.encoder.make(derive_seed(seed, "encoder", n)) for n, c in config.content.items()}
        self.tables: dict[str, np.ndarray] = {}
        self.available: dict[str, np.ndarray] = {}
        self.mappings: dict[str, np.ndarray] = {}
        """By content, what it adds to the vectors of an item, float32 `[D + 1, T]`: T is the length of a row of all
        tables of the base side by side, and the last row is added wherever there is such content. Under BIAS `[1, T]`,
        what all items have. Empty for members that were fitted by older code."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ConfigError for a base without item vectors, text without columns, an encoder to be trained."""
        if config.base.kind not in VECTORS:
            raise ConfigError(
                f"the base must be a member with vectors of items, one of {', '.join(VECTORS)}; received "
                f"'{config.base.kind}'."
            )
        check_contents(config.content)

    @classmethod
    def depends_on_seed(cls, config: Any) -> bool:
        """As its base does: the regression itself is solved exactly."""
        return bool(config.base.registry[config.base.kind].depends_on_seed(config.base.config))

    def fit(self, data: TrainingData, options: RunOptions) -> History | None:
        warm = data.counts > 0
        features, described = self._features(data, warm, options)
        history = self.base.fit(data, options)
        state = self.base.state()
        trust = (data.counts / (data.counts + max(self.config.shrinkage, 1e-9)))[:, None]
        fitted = []
        for name in VECTORS[self.config.base.kind]:
            mapping = fit_ridge(features[warm], state[name][warm], self.config.l2)
            state[name] = (trust * state[name] + (1.0 - trust) * mapping(features)).astype(np.float32)
            fitted.append(mapping)
        self._keep_mappings(fitted, warm)
        self.speaks = warm | (described & warm.any())
        self.base.load_state({**state, "speaks": self.speaks})
        return history

    def _features(self, data: TrainingData, warm: np.ndarray, options: RunOptions) -> tuple[np.ndarray, np.ndarray]:
        """Everything that content says about the items, float64 `[I, F]`, and about which it says anything."""
        blocks, described = [], np.zeros(len(warm), bool)
        for name, content in self.config.content.items():
            encoder = self.encoders[name]
            values, available = read_content(encoder, content.columns, data)
            encoder.adapt(take(values, np.flatnonzero(available & warm)))
            label = f"{options.directory.name}/{name}"
            self.tables[name] = embedding_table(encoder, values, available, data, options, label)
            self.available[name] = available
            described |= available
            blocks.append(balanced(self.tables[name], available, warm))
        for column in self.config.categories:
            if column not in data.catalogue:
                raise DataError(f"the catalogue has no column '{column}': {nearest(column, data.catalogue.columns)}")
            categories = split_categories(data.catalogue[column], self.config.separator)
            encoded = multi_hot(categories, warm, CATEGORIES, 1)[:, :-1]  # one never seen in training says nothing
            known = encoded.max(axis=1, initial=0.0) > 0.0
            described |= known
            blocks.append(balanced(encoded, known, warm))
        return np.concatenate(blocks, axis=1), described

    def _keep_mappings(self, fitted: Sequence[Ridge], warm: np.ndarray) -> None:
        """What new items need of the regression: `balanced` and the mapping of each content in one. Of categories they
        have none, which is the average."""
        weights, start = np.concatenate([mapping.weights for mapping in fitted], axis=1), 0
        for name, table in self.tables.items():
            mean, length = balance(table, self.available[name], warm)
            part = (
                weights[start : start + table.shape[1]] / length
                if length
                else np.zeros((table.shape[1], weights.shape[1]))
            )
            self.mappings[name] = np.concatenate([part, -(mean @ part)[None]]).astype(np.float32)
            start += table.shape[1]
        self.mappings[BIAS] = np.concatenate([mapping.bias for mapping in fitted])[None].astype(np.float32)

    def growing(self, spare: int) -> GrowingScorer | None:
        return GrowingRegression(self.base.roomy_scorer(spare), self.mappings) if self.mappings else None

    def state(self) -> dict[str, np.ndarray]:
        result = {f"base/{name}": array for name, array in self.base.state().items()}
        for name, encoder in self.encoders.items():
            result[f"content/{name}/embeddings"] = self.tables[name]
            result[f"content/{name}/available"] = self.available[name]
            result |= {f"encoder/{name}/{key}": array for key, array in encoder.state().items()}
        result |= {f"mapping/{name}": array for name, array in self.mappings.items()}
        return {**result, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.speaks = state["speaks"]
        self.base.load_state(_below(state, "base/"))
        self.mappings = _below(state, "mapping/")
        for name, encoder in self.encoders.items():
            self.tables[name] = state[f"content/{name}/embeddings"]
            self.available[name] = state[f"content/{name}/available"]
            encoder.load_state(_below(state, f"encoder/{name}/"))

    def scorer(self) -> tf.Module:
        return self.base.scorer()

    def contents(self) -> dict[str, Contents]:
        return {
            name: Contents(encoder, self.config.content[name].columns, self.tables[name], self.available[name])
            for name, encoder in self.encoders.items()
        }


class GrowingRegression(GrowingScorer):
    """The scorer of the base, whose new items get the vectors that the regression foretells.

    Args:
        scorer: with spare rows.
        mappings: as the member keeps them.
    """

    def __init__(self, scorer: Any, mappings: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.scorer = scorer
        self.mappings = {name: constant(array, tf.float32, "new_item_mapping") for name, array in mappings.items()}

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.scorer(history)

    def add(self, numbers: tf.Tensor, embeddings: Mapping[str, tf.Tensor]) -> tf.Tensor:
        vectors = tf.repeat(self.mappings[BIAS], tf.size(numbers), axis=0)
        described = tf.zeros(tf.shape(numbers), tf.bool)
        for name, embedding in embeddings.items():
            there = tf.reduce_any(embedding != 0.0, axis=1)
            read = tf.concat([embedding, tf.cast(there, tf.float32)[:, None]], axis=1)
            vectors += tf.matmul(read, self.mappings[name])
            described |= there
        width = self.scorer.item_table.shape[1]  # a base of one table has the same vectors in both places
        self.scorer.history_table.write(numbers, vectors[:, :width])
        self.scorer.item_table.write(numbers, vectors[:, -width:])
        return described


def _below(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def balanced(table: np.ndarray, available: np.ndarray, warm: np.ndarray) -> np.ndarray:
    """Rows `[I, F]` less the mean of the available warm ones, over the root of these rows' mean squared length.

    Blocks of features then weigh alike whatever their width; rows that are not available are 0, which is the mean.
    """
    mean, length = balance(table, available, warm)
    return (table - mean) * available[:, None] / length if length else np.zeros(table.shape)


def balance(table: np.ndarray, available: np.ndarray, warm: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean `[F]` of the available warm rows, and the root of the mean squared length of what is left of them; 0
    where there are none, or nothing is left."""
    fitted = table[available & warm].astype(np.float64)
    if not len(fitted):
        return np.zeros(table.shape[1]), 0.0
    mean = fitted.mean(axis=0)
    length = float(np.sqrt(np.square(fitted - mean).sum(axis=1).mean()))
    return mean, length if length > 1e-9 else 0.0


@dataclass(frozen=True)
class Ridge:
    """A fitted linear mapping: features `[N, F]` -> `[N, D]`.

    Attributes:
        weights: `[F, D]`.
        bias: `[D]`.
        l2: the penalty.
        loss: mean squared leave-one-out error over the variance of the targets; 1 is what their mean achieves.
    """

    weights: np.ndarray
    bias: np.ndarray
    l2: float
    loss: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return features @ self.weights + self.bias


def fit_ridge(features: np.ndarray, targets: np.ndarray, l2: float | None = None) -> Ridge:
    """min |Y - X W - 1 b'|^2 + l2 |W|^2 with a free bias b, for X `[N, F]`, Y `[N, D]`.

    Without `l2` the strength with the smallest leave-one-out error is taken, which one decomposition of X gives for all
    strengths: a row's error without it is its residual over 1 - h, h its leverage (Allen 1974, PRESS). Of fewer than
    two rows nothing can be learned but their mean.
    """
    mean = targets.mean(axis=0, dtype=np.float64) if len(targets) else np.zeros(targets.shape[1])
    if len(targets) < 2:
        return Ridge(np.zeros((features.shape[1], targets.shape[1])), mean, l2 or 0.0, 1.0)
    centre = features.mean(axis=0)
    x, y = features - centre, targets - mean
    values, axes = np.linalg.eigh(x.T @ x)
    values, turned = np.maximum(values, 0.0), x @ axes
    projected, squared = turned.T @ y, np.square(turned)

    def left_out(strength: float) -> float:
        inverse = 1.0 / (values + strength)
        leverage = np.minimum(squared @ inverse + 1.0 / len(y), 1.0 - 1e-9)
        residual = y - turned @ (inverse[:, None] * projected)
        return float(np.square(residual / (1.0 - leverage)[:, None]).sum())

    losses = {strength: left_out(strength) for strength in ([l2] if l2 else STRENGTHS.tolist())}
    best = min(losses, key=lambda strength: losses[strength])
    weights = axes @ (projected / (values + best)[:, None])
    variance = float(np.square(y).sum())
    return Ridge(weights, mean - centre @ weights, best, losses[best] / variance if variance > 0 else 1.0)
