"""What all members of a ranking have in common: fitted once, then every user is scored from a history.

A user known to the system and a visitor with three liked items are answered by the same code: the history
is the only thing a scorer reads, so nothing has to be trained for a new user (fold-in).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import sparse

from fusion.compat import tf
from fusion.config import Part, Settings, content_hash
from fusion.types import History, RunOptions
from recsys.collaborative.tables import NeighbourLists, Table
from recsys.storage import arrays_hash, table_hash
from recsys.vocabulary import Vocabulary

PADDING = -1
"""Fills histories up to a common length; never an item number."""

Validator = Any
"""Called with a scorer, returns `{metric: value}` on the validation rows (see `recsys.evaluation`)."""


@dataclass(frozen=True)
class TrainingData:
    """What a member may see while it is fitted: training rows and the content of the catalogue, nothing else.

    Attributes:
        matrix: float32 `[U, I]` of ones, the positive interactions of the training part; the items of a user
            stand in the order in which they were taken, where the data has times.
        catalogue: one row per item in the order of numbers: text columns and `image`.
        cache: a folder for embeddings and decoded images, shared between runs.
        validate: for members that are trained in epochs, or None: scorer -> metrics on validation users.
        validation_hash: names the rows behind `validate`, for the cache of fitted members.
        monitor: the metric of `validate` that decides which epoch was best.
        item_ids: the items' ids by number; needed by members that start from the vectors of another run.
    """

    matrix: sparse.csr_matrix
    catalogue: pd.DataFrame
    cache: Path
    validate: Validator | None = None
    validation_hash: str = ""
    monitor: str = "ndcg@10"
    item_ids: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """How often each item was taken in training, int64 `[I]`."""
        return self.matrix.getnnz(axis=0).astype(np.int64)

    def fingerprint(self, part: Part) -> str:
        """Names everything that fitting `part` on this data depends on, for the cache of fitted members."""
        matrix = self.matrix
        validated = [self.validation_hash, self.monitor] if self.validate else None
        content = table_hash(self.catalogue) if part.registry[part.kind].reads_content else ""
        if self.item_ids is not None and getattr(part.config, "init_from", None):
            content += Vocabulary(self.item_ids).sha256()
        return content_hash([arrays_hash(matrix.indptr, matrix.indices, np.array(matrix.shape)), content, validated])


class Member(abc.ABC):
    """A submodel of a ranking. Subclasses fill `fit`, `state`, `load_state` and `scorer`.

    Attributes:
        Config: the settings class of the member.
        personal: False when every user gets the same scores (popularity).
        reads_content: True when fitting depends on texts or images of the catalogue.
    """

    Config: ClassVar[type[Settings]]
    personal: ClassVar[bool] = True
    reads_content: ClassVar[bool] = False
    averageable: ClassVar[bool] = False
    """Whether `state` holds what a gradient trained, or numbers linear in it, so that the mean of the states of copies
    is the state of the mean, see `recsys.soups`."""
    accelerations: ClassVar[tuple[str, ...]] = ("xla",)
    """Keys of the training loop that may be set, see `fusion.training.strategy.check_training`; `accumulate` is seldom
    among them, for a loss with negatives out of the batch needs the whole of it."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.speaks = np.zeros(0, bool)
        """bool `[I]`: the items about which the member can say something."""

    @classmethod  # noqa: B027  (most members have nothing to check)
    def check(cls, config: Any) -> None:
        """Raises ConfigError for what is wrong whatever the data holds."""

    @classmethod
    def fit_cost(cls, config: Any, users: int, items: int, positives: int) -> tuple[float, float]:
        """About how many floating-point operations `fit` takes beside epochs of training, and how many bytes beside
        what it learns; for `--dry-run`, there to tell a minute from an hour."""
        return 0.0, 0.0

    @classmethod
    def depends_on_seed(cls, config: Any) -> bool:
        """Whether another seed gives another member. Of members that are not trained by gradients few do."""
        return hasattr(config, "training")

    def renew_statistics(self, data: TrainingData) -> None:  # noqa: B027
        """After weights were averaged: nothing, for no member of a ranking has BatchNormalization."""

    @abc.abstractmethod
    def fit(self, data: TrainingData, options: RunOptions) -> History | None:
        """Learns from `data`; returns the history of members that are trained in epochs."""

    @abc.abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Everything that was learned, as arrays of numbers or unicode."""

    @abc.abstractmethod
    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """The inverse of `state`."""

    @abc.abstractmethod
    def scorer(self) -> tf.Module:
        """A module that maps histories int32 `[B, L]` (padded with -1) to scores float32 `[B, I]`."""

    def growing(self, spare: int) -> GrowingScorer | None:
        """The scorer with `spare` rows behind the catalogue for items that come later; None where the member cannot say
        anything about an item that it was not fitted with."""
        return None

    def contents(self) -> dict[str, Any]:
        """What the member read of the items, by name (`recsys.collaborative.content.Contents`): the artifact exports
        the encoders, and searches what they made by example."""
        return {}

    @property
    def parameters(self) -> int:
        """How many numbers the scorer holds."""
        return int(sum(array.size for array in self.state().values() if array.dtype.kind == "f"))


class GrowingScorer(tf.Module):
    """A scorer over the I items of a catalogue and N spare rows behind them, which new items take: histories int32
    `[B, L]` (padded with -1) -> scores float32 `[B, I + N]`."""

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError

    def add(self, numbers: tf.Tensor, embeddings: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Gives new items the rows of these numbers.

        Args:
            numbers: int32 `[n]`, all different, from I on.
            embeddings: by the name that `contents` gives them, float32 `[n, D]` of unit length, 0 of items without
                such content.

        Returns:
            bool `[n]`, about which of them the member can say something.
        """
        raise NotImplementedError


class SettledScorer(GrowingScorer):
    """The scorer of a member that knows the items it was fitted with alone: it is silent about new ones and passes
    over those in histories."""

    def __init__(self, scorer: tf.Module, items: int, spare: int) -> None:
        super().__init__()
        self.scorer, self.items, self.spare = scorer, items, spare

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        scores = self.scorer(tf.where(history < self.items, history, PADDING))
        return tf.pad(scores, [[0, 0], [0, self.spare]])

    def add(self, numbers: tf.Tensor, embeddings: Mapping[str, tf.Tensor]) -> tf.Tensor:
        return tf.zeros(tf.shape(numbers), tf.bool)


def constant(values: np.ndarray, dtype: Any = None, name: str | None = None) -> tf.Variable:
    """A table of a scorer. A variable and not a constant: constants would be written into the graph itself,
    which protobuf limits to 2 GB."""
    return tf.Variable(values, trainable=False, dtype=dtype, name=name)


def with_padding_row(table: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """The table `[I, ...]` with one more row at the end, for the padding of histories."""
    return np.concatenate([table, np.full((1, *table.shape[1:]), fill, table.dtype)])


def padded_numbers(history: tf.Tensor, items: int) -> tf.Tensor:
    """Histories with -1 turned into the number of the padding row."""
    return tf.where(history < 0, items, history)


Decay = Annotated[float, Field(gt=0, le=1)]
"""What an item of a history counts, relative to the one taken after it; 1 forgets nothing."""


def recency(history: tf.Tensor, decay: float) -> tf.Tensor:
    """Weights float32 `[B, L]` of the items of histories: decay^n, n being how many were taken later; 0 for padding."""
    known = tf.cast(history >= 0, tf.float32)
    if decay == 1.0:
        return known
    later = tf.cumsum(known, axis=1, exclusive=True, reverse=True)
    return known * tf.pow(decay, later)


class EmbeddingScorer(tf.Module):
    """Score = <user, item>, the user being the weighted sum of the history's rows over the root of its length.

    Used by factorisation and by content members, which differ only in where their tables come from.
    """

    def __init__(self, history_table: np.ndarray, item_table: np.ndarray, *, unit: bool, decay: float = 1.0) -> None:
        super().__init__()
        self.history_table = Table(with_padding_row(history_table), "history_table")
        self.item_table = Table(item_table, "item_table")
        self.unit = unit
        self.decay = decay

    def user(self, history: tf.Tensor) -> tf.Tensor:
        """User vectors `[B, D]`."""
        rows = self.history_table.rows(padded_numbers(history, self.item_table.shape[0]))  # [B, L, D]
        return pool_history(rows, recency(history, self.decay), unit=self.unit)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.item_table.dot(self.user(history))

    def at(self, history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Scores of some items alone, `[B, N]` for item numbers `[B, N]`."""
        return products_at(self.user(history), self.item_table, items)


def pool_history(rows: tf.Tensor, weights: tf.Tensor, *, unit: bool) -> tf.Tensor:
    """`[B, L, D]` and weights `[B, L]` -> `[B, D]`: the weighted sum over the root of the sum of squared weights
    (SVD++, Koren 2008: keeps the variance of long and short histories equal), or the unit vector in its direction."""
    total = tf.reduce_sum(rows * weights[..., None], axis=1)
    if unit:
        return total * tf.math.rsqrt(tf.reduce_sum(total * total, axis=-1, keepdims=True) + 1e-12)
    return total * tf.math.rsqrt(tf.maximum(tf.reduce_sum(weights * weights, axis=1, keepdims=True), 1e-6))


class LowRankScorer(tf.Module):
    """Score = sum over the history of <history row, item row>: a product of histories with a matrix of low rank.

    Unlike `EmbeddingScorer` it divides by nothing, so that its scores grow with the history as those of
    `NeighbourScorer` do, beside which it can stand in a sum.
    """

    def __init__(self, history_table: np.ndarray, item_table: np.ndarray, decay: float = 1.0) -> None:
        super().__init__()
        self.history_table = Table(with_padding_row(history_table), "history_table")
        self.item_table = Table(item_table, "item_table")
        self.decay = decay

    def user(self, history: tf.Tensor) -> tf.Tensor:
        """User vectors `[B, D]`."""
        rows = self.history_table.rows(padded_numbers(history, self.item_table.shape[0]))  # [B, L, D]
        return tf.reduce_sum(rows * recency(history, self.decay)[..., None], axis=1)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.item_table.dot(self.user(history))

    def at(self, history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Scores of some items alone, `[B, N]` for item numbers `[B, N]`."""
        return products_at(self.user(history), self.item_table, items)


def products_at(users: tf.Tensor, item_table: Table, items: tf.Tensor) -> tf.Tensor:
    """Inner products of user vectors `[B, D]` with the rows `[B, N]` of a table."""
    return tf.squeeze(tf.matmul(item_table.rows(items), users[..., None]), -1)


class ConstantScorer(tf.Module):
    """The same scores for every history."""

    def __init__(self, scores: np.ndarray) -> None:
        super().__init__()
        self.scores = constant(scores, tf.float32, "scores")

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return tf.zeros([tf.shape(history)[0], 1]) + self.scores


class ConstantState:
    """The learned half of members that score all users alike: one array `[I]`."""

    personal = False
    scores: np.ndarray
    speaks: np.ndarray

    def state(self) -> dict[str, np.ndarray]:
        return {"scores": self.scores, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.scores, self.speaks = state["scores"], state["speaks"]

    def scorer(self) -> tf.Module:
        return ConstantScorer(self.scores)


class NeighbourScorer(tf.Module):
    """Score of an item = sum of its weights in the neighbour lists of the history's items.

    Recent items weigh more where `decay` is below 1.
    """

    def __init__(self, index: np.ndarray, weight: np.ndarray, decay: float = 1.0) -> None:
        super().__init__()
        self.items = index.shape[0]
        self.decay = decay
        self.lists = NeighbourLists(index, weight)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        # Lists of items alone: histories are padded to the longest of a batch, so that most of them may be padding.
        places = tf.where(history >= 0)  # [P, 2]
        neighbours, weights = self.lists.of(tf.gather_nd(history, places))  # [P, N]
        cells = neighbours + tf.cast(places[:, :1], tf.int32) * self.items
        weights *= tf.gather_nd(recency(history, self.decay), places)[:, None]
        batch = tf.shape(history)[0]
        summed = tf.math.unsorted_segment_sum(tf.reshape(weights, [-1]), tf.reshape(cells, [-1]), batch * self.items)
        return tf.reshape(summed, [batch, self.items])


class NeighbourState:
    """The learned half of members that keep each item's top-N neighbours: two arrays `[I, N]`."""

    config: Any
    index: np.ndarray
    weight: np.ndarray
    speaks: np.ndarray
    truncation: float

    def state(self) -> dict[str, np.ndarray]:
        return {
            "index": self.index,
            "weight": self.weight,
            "speaks": self.speaks,
            "truncation": np.asarray(self.truncation, np.float32),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.index, self.weight, self.speaks = state["index"], state["weight"], state["speaks"]
        self.truncation = float(state["truncation"])

    def scorer(self) -> tf.Module:
        return NeighbourScorer(self.index, self.weight, self.config.decay)


def largest_by_row(block: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The `keep` entries of largest magnitude in each row: index, weight, and the share of magnitude lost."""
    if keep >= block.shape[1]:
        index = np.broadcast_to(np.arange(block.shape[1], dtype=np.int32), block.shape)
        return np.ascontiguousarray(index), block.astype(np.float32), 0.0
    magnitude = np.abs(block)
    index = np.argpartition(magnitude, -keep, axis=1)[:, -keep:].astype(np.int32)
    index.sort(axis=1)  # a fixed order, so that equal inputs give equal files
    weight = np.take_along_axis(block, index, axis=1).astype(np.float32)
    total = float(magnitude.sum())
    return index, weight, 1.0 - float(np.abs(weight).sum()) / total if total else 0.0


def join_blocks(blocks: list[tuple[np.ndarray, np.ndarray, float]]) -> tuple[np.ndarray, np.ndarray, float]:
    """Row blocks of `largest_by_row` put together; the lost share is their mean weighted by rows."""
    rows = np.array([len(index) for index, _, _ in blocks])
    lost = float(np.average([lost for _, _, lost in blocks], weights=rows))
    return np.concatenate([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks]), lost
