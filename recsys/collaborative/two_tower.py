"""Two towers: one makes a vector of an item, the other one or several of a history; the score is their product.

Trained with the retrieval task of TensorFlow Recommenders. What an item is made of (its number, texts, images, columns,
aggregates) is chosen in the config; everything about a user is computed from the history, inside the graph.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.training.optimizers import Group
from fusion.training.precision import Precision, narrow, precision_scope, wide
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings
from fusion.types import History, RunOptions, derive_seed
from recsys.collaborative.base import (
    Decay,
    TrainingData,
    constant,
    padded_numbers,
    recency,
    with_padding_row,
)
from recsys.collaborative.content import principal_axes
from recsys.collaborative.features import FeatureSettings, check_contents, item_features
from recsys.collaborative.pairs import HistoryPairs, TowerMember, Towers, train_towers
from recsys.collaborative.tables import Table

BLOCK = 4096
"""Items whose vectors are made at a time."""
LOG_LENGTH = 5.0
"""log(1 + length) of a history is divided by this, so that it is about 1 for the longest."""
SHARPNESS = 4.0
"""Logits of attention at the start: cosines between an item and a direction, times this. At 1 all interests would
start, and then stay, alike."""


class TwoTower(TowerMember):
    """Item: id + features · P + MLP(id, features, aggregates). User: pooled rows + MLP(pooled rows, means, length).

    The straight part is a factorisation whose item vectors are sums of embeddings of everything known about an item
    (Kula 2015, "Metadata embeddings for user and item cold-start recommendations"), the pooled rows those of an
    asymmetric factorisation (Koren 2008); the MLPs add what is not a sum and start at zero (`hidden: []` leaves them
    out). Both sides start with the same projection P, so that the first scores are cosines of content.

    Cold items: in training the id of an item is replaced by that of *unknown*, and its aggregates by 0, for a share
    `id_dropout` of the pairs (DropoutNet, Volkovs et al. 2017); an item without training rows is given just these. The
    member is silent on cold items of which nothing is known.

    With `interests` above 1 the user has several vectors, each pooled with the weights of its own learned attention
    over the history, and an item's score is the largest of the products (ComiRec-SA, Cen et al. 2020), in training as
    in answers, so that a vector that nobody's target is near to learns to keep away from the others' items.
    """

    class Config(Settings):
        """Settings of the towers."""

        features: FeatureSettings = FeatureSettings()
        """What is known about an item beside its number."""
        dimensions: int = Field(64, ge=1, le=1024)
        """Length D of the vectors."""
        hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = (64,)
        """Widths of the hidden layers of each tower; none leaves the straight parts alone."""
        interests: int = Field(1, ge=1, le=8)
        """Vectors a user has."""
        id_dropout: float = Field(0.1, ge=0, lt=1)
        """Share of the pairs in which training takes the item for a cold one."""
        max_history: int = Field(128, ge=1, le=4096)
        """Items of a history that training looks at; scoring looks at all of them."""
        dropout: float = Field(0.2, ge=0, lt=1)
        """Share of the pooled history's entries, and of hidden units, that training silences."""
        l2: float = Field(0.0, ge=0)
        """Penalty on the embeddings of ids."""
        unit: bool = True
        """Scale the vectors of both sides to length 1, so that scores are cosines."""
        temperature: float = Field(0.1, gt=0)
        """Divides the scores in the softmax: about 0.1 for cosines, 1 for products of vectors of any length."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        training: TrainingSettings = TrainingSettings(epochs=20, batch_size=1024, learning_rate=0.003, patience=3)
        """The training loop."""

    reads_content = True

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ConfigError for a text feature without columns, and for encoders that would have to be trained."""
        check_contents(config.features.content)

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        towers = self.towers(data, options, self.config.training.precision)
        pairs = HistoryPairs(data.matrix, self.config.max_history, derive_seed(self.seed, "histories"))
        history = train_towers(self.model, self._scorer_now, data, pairs, self.config, options)
        towers.finish()
        return history

    def towers(self, data: TrainingData, options: RunOptions, precision: Precision = "float32") -> Towers:
        self.features = item_features(self.config.features, data, options, self.seed)
        self.trained = data.counts > 0
        self.speaks = self.trained | self.features.described
        with scope(options, precision):
            self.model, self.items = self._build()
        self.plain = (self.model, self.items) if precision == "float32" else self._plain()
        group = Group("towers", self.model.trainable_variables, self.config.training)
        return Towers(self.model, self.config.temperature, [group], self._finish)

    def _finish(self) -> None:
        self.learned = self._learned()

    # ---- the model that is trained ---------------------------------------------------------------------------

    def _plain(self) -> tuple[keras.Model, keras.Model]:
        """The same towers in float32, for what is kept."""
        with precision_scope("float32"):
            return self._build()

    def _build(self) -> tuple[keras.Model, keras.Model]:
        """What is trained, and of it the items' tower: numbers int32 `[b]` -> vectors `[b, D]`."""
        history = keras.Input((None,), dtype=tf.int32, name="history")
        target = keras.Input((), dtype=tf.int32, name="target")
        rows, width = len(self.trained) + 1, self.features.width
        features = keras.layers.Embedding(rows, width, trainable=False, name="features", dtype="float32")
        item = self._item_tower(features, target)
        users = self._user_tower(features, history)
        # The task scores [b, K, D] by the best of the K products, as the scorer does.
        user = users if self.config.interests > 1 else users[:, 0]
        model = keras.Model({"history": history, "target": target}, {"user": narrow(user), "item": narrow(item)})
        features.set_weights([with_padding_row(self.features.table)])
        return model, keras.Model(target, item)

    def _item_tower(self, features: keras.layers.Layer, target: tf.Tensor) -> tf.Tensor:
        """Item vectors `[b, D]` of item numbers `[b]`."""
        items, attributes = len(self.trained), self.features.attributes
        kept = self._dropout(self.config.id_dropout, "id")(tf.ones_like(target[:, None], tf.float32)) > 0
        known = kept & tf.gather(self.trained[:, None], target)
        own = self._ids(items + 1, "item_ids")(tf.where(known[:, 0], target, items))  # the last row is *unknown*
        read = features(target)
        described, aggregates = read[:, :attributes], read[:, attributes:] * tf.cast(known, tf.float32)
        straight = own
        if attributes:
            projection = keras.layers.Dense(
                self.config.dimensions,
                use_bias=False,
                kernel_initializer=keras.initializers.Constant(self._start()),
                name="item_projection",
            )
            straight += wide(projection(described))
        item = straight + self._mlp(tf.concat([own, described, aggregates], axis=-1), "item")
        return unit(item) if self.config.unit else item

    def _user_tower(self, features: keras.layers.Layer, history: tf.Tensor) -> tf.Tensor:
        """User vectors `[b, K, D]` of histories `[b, L]`."""
        numbers, weights = padded_numbers(history, len(self.trained)), recency(history, 1.0)
        ids = self._ids(len(self.trained) + 1, "history_ids")
        read = HistoryTable(features, self._start(), ids, self.features.statistics.shape[1], name="rows")(numbers)
        rows, statistics = read[..., : self.config.dimensions], read[..., self.config.dimensions :]
        weighted = weights[..., None]
        if self.config.interests > 1:
            weighted = attention(wide(self._directions()(unit(rows))), weights)
        pooled = self._dropout(self.config.dropout, "pooled")(pool_interests(rows, weighted))
        users = pooled + self._mlp(with_statistics(pooled, history_statistics(statistics, weights)), "user")
        return unit(users) if self.config.unit else users

    def _start(self) -> np.ndarray:
        """The projection `[G, D]` that both sides start with: it keeps cosines of the items' attributes."""
        width, dimensions = self.features.attributes, self.config.dimensions
        start = np.zeros((width, dimensions), np.float32)
        if width:
            axes = principal_axes(self.features.table[self.trained, :width], min(dimensions, width))
            start[:, : axes.shape[1]] = axes
        return start

    def _ids(self, rows: int, name: str) -> keras.layers.Embedding:
        deviation = 1.0 / np.sqrt(self.config.dimensions)
        return keras.layers.Embedding(
            rows,
            self.config.dimensions,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=deviation, seed=derive_seed(self.seed, name)),
            embeddings_regularizer=keras.regularizers.L2(self.config.l2) if self.config.l2 else None,
            name=name,
            dtype="float32",  # gathering and summing rows gains nothing from 16 bits
        )

    def _directions(self) -> keras.layers.Dense:
        seed = derive_seed(self.seed, "directions")
        start = keras.initializers.Orthogonal(gain=SHARPNESS, seed=seed)
        return keras.layers.Dense(self.config.interests, use_bias=False, kernel_initializer=start, name="directions")

    def _dropout(self, share: float, name: str) -> keras.layers.Dropout:
        seed = derive_seed(self.seed, "dropout", name)
        return keras.layers.Dropout(share, rng_type="stateful", force_generator=True, seed=seed, dtype="float32")

    def _mlp(self, inputs: tf.Tensor, name: str) -> tf.Tensor:
        """Hidden layers and a last one that starts at zero; 0 where there are no hidden layers."""
        if not self.config.hidden:
            return 0.0
        x = inputs
        for number, width in enumerate(self.config.hidden):
            start = keras.initializers.HeNormal(seed=derive_seed(self.seed, name, number))
            x = keras.layers.Dense(width, activation="relu", kernel_initializer=start, name=f"{name}_{number}")(x)
            x = self._dropout(self.config.dropout, f"{name}_{number}")(x)
        last = keras.layers.Dense(self.config.dimensions, kernel_initializer="zeros", name=f"{name}_last")
        return wide(last(x))

    # ---- what is kept of it ----------------------------------------------------------------------------------

    def _learned(self) -> dict[str, np.ndarray]:
        """The tables of all items and the layers over a history: what `state` returns but for `speaks`."""
        model, items = self.plain
        if model is not self.model:
            model.set_weights(self.model.get_weights())
        numbers = np.arange(len(self.trained), dtype=np.int32)
        blocks = [numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK)]
        vectors = [items(tf.constant(block), training=False).numpy() for block in blocks]
        rows = self.model.get_layer("rows").rows(self.trained)
        parts = [rows]
        if self.config.interests > 1:
            directions = self.model.get_layer("directions").get_weights()[0]
            parts.append(unit(tf.constant(rows)).numpy() @ directions)
        history = np.concatenate([*parts, self.features.statistics], axis=1)
        learned = {"item_table": np.concatenate(vectors), "history_table": history}
        for number, name in enumerate([*range(len(self.config.hidden)), "last"] if self.config.hidden else []):
            kernel, bias = self.model.get_layer(f"user_{name}").get_weights()
            learned |= {f"user/{number}/kernel": kernel, f"user/{number}/bias": bias}
        return learned

    def _scorer_now(self) -> tf.Module:
        return self._scorer_of(self._learned())

    def _scorer_of(self, learned: dict[str, np.ndarray]) -> TowerScorer:
        return TowerScorer(learned, self.config.interests, self.config.decay, unit=self.config.unit)

    def state(self) -> dict[str, np.ndarray]:
        return {**self.learned, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.speaks = state["speaks"]
        self.learned = {name: array for name, array in state.items() if name != "speaks"}

    def scorer(self) -> TowerScorer:
        return self._scorer_of(self.learned)


class HistoryTable(keras.layers.Layer):
    """Rows `[.., D + S]` of item numbers out of the table ids + attributes · P, with the items' statistics beside them.

    The table is made anew in each step: items × G × D multiplications, where projecting what stands in the histories
    would take as many for each of b × L places.
    """

    def __init__(
        self,
        features: keras.layers.Embedding,
        start: np.ndarray,
        ids: keras.layers.Embedding,
        statistics: int,
        **named: Any,
    ) -> None:
        super().__init__(**named)
        self.features, self.ids = features, ids
        self.start, self.statistics = start, statistics

    def build(self, input_shape: Any) -> None:
        for part in (self.features, self.ids):
            if not part.built:
                part.build(input_shape)
        if len(self.start):  # an empty variable crashes a process that trains with others
            self.projection = self.add_weight(
                name="projection", shape=self.start.shape, initializer=keras.initializers.Constant(self.start)
            )
        super().build(input_shape)

    def call(self, numbers: tf.Tensor) -> tf.Tensor:
        features, rows = self.features.embeddings, self.ids.embeddings
        if len(self.start):
            described = tf.cast(features[:, : len(self.start)], self.compute_dtype)
            rows = rows + wide(tf.matmul(described, tf.cast(self.projection, self.compute_dtype)))
        statistics = features[:, features.shape[1] - self.statistics :]
        return tf.gather(tf.concat([rows, statistics], axis=1), numbers)

    def rows(self, trained: np.ndarray) -> np.ndarray:
        """The table `[I, D]` for scoring; items that are not `trained` are without their ids, which learned nothing."""
        rows = self.ids.get_weights()[0][:-1] * trained[:, None]
        if not len(self.start):
            return rows
        return rows + self.features.get_weights()[0][:-1, : len(self.start)] @ self.projection.numpy()


class TowerScorer(tf.Module):
    """The user tower over a table of rows, and the product with the table of item vectors.

    Args:
        learned: `history_table` `[I, D + K + S]`: of each item the row, its logits of attention (for K > 1 only) and
            its statistics; `item_table` `[I, D]`; `user/N/kernel` and `user/N/bias`, the layers of the MLP, if any.
        interests: K.
        decay: what an item of a history counts relative to the one taken after it.
        unit: user vectors are scaled to length 1, as the items' are already.
    """

    def __init__(self, learned: dict[str, np.ndarray], interests: int, decay: float, *, unit: bool) -> None:
        super().__init__()
        self.item_table = Table(learned["item_table"], "item_table")
        self.history_table = Table(with_padding_row(learned["history_table"]), "history_table")
        self.mlp = Mlp(learned, "user")
        self.interests, self.decay, self.unit = interests, decay, unit

    def describe(self, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Histories `[B, L]` -> pooled rows `[B, K, D]` and statistics `[B, S + 1]`."""
        items, dimensions = self.item_table.shape
        read = self.history_table.rows(padded_numbers(history, items))
        rows, rest = read[..., :dimensions], read[..., dimensions:]
        weights = recency(history, self.decay)
        weighted = weights[..., None]
        if self.interests > 1:
            weighted, rest = attention(rest[..., : self.interests], weights), rest[..., self.interests :]
        return pool_interests(rows, weighted), history_statistics(rest, weights)

    def user(self, history: tf.Tensor) -> tf.Tensor:
        """User vectors `[B, K, D]`."""
        return self.of(*self.describe(history))

    def of(self, pooled: tf.Tensor, statistics: tf.Tensor) -> tf.Tensor:
        """The user vectors `[B, K, D]` of what `describe` found."""
        users = pooled + self.mlp(with_statistics(pooled, statistics)) if self.mlp.layers else pooled
        return unit(users) if self.unit else users

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        users = self.user(history)
        scores = self.item_table.dot(users[:, 0])
        for interest in range(1, self.interests):  # one after another: [B, K, I] would be K times the memory
            scores = tf.maximum(scores, self.item_table.dot(users[:, interest]))
        return scores


class Mlp(tf.Module):
    """Dense layers out of arrays `<prefix>/N/kernel` and `<prefix>/N/bias`, ReLU between them."""

    def __init__(self, arrays: dict[str, np.ndarray], prefix: str) -> None:
        super().__init__()
        count = sum(name.startswith(f"{prefix}/") and name.endswith("/kernel") for name in arrays)
        self.layers = [
            (constant(arrays[f"{prefix}/{n}/kernel"], tf.float32), constant(arrays[f"{prefix}/{n}/bias"], tf.float32))
            for n in range(count)
        ]

    def __call__(self, inputs: tf.Tensor) -> tf.Tensor:
        x = inputs
        for number, (kernel, bias) in enumerate(self.layers):
            x = tf.matmul(tf.nn.relu(x) if number else x, kernel) + bias
        return x


def attention(logits: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Logits `[B, L, K]`, weights `[B, L]` (0 for padding) -> weights `[B, L, K]`: softmax over L but for its sum."""
    masked = tf.where(weights[..., None] > 0, logits, -1e9)
    return tf.exp(masked - tf.reduce_max(masked, axis=1, keepdims=True)) * weights[..., None]


def pool_interests(rows: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """`[B, L, D]` and weights `[B, L, K]` -> `[B, K, D]`: `pool_history` for each column of weights."""
    total = tf.matmul(weights, rows, transpose_a=True)
    squares = tf.reduce_sum(weights * weights, axis=1)[..., None]
    return total * tf.math.rsqrt(tf.maximum(squares, 1e-12))


def history_statistics(statistics: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """What a history says about its user: means `[B, S]` of the items' statistics `[B, L, S]`, and its log length."""
    total = tf.reduce_sum(weights, axis=1, keepdims=True)
    mean = tf.reduce_sum(statistics * weights[..., None], axis=1) / tf.maximum(total, 1e-6)
    length = tf.reduce_sum(tf.cast(weights > 0, tf.float32), axis=1, keepdims=True)
    return tf.concat([mean, tf.math.log1p(length) / LOG_LENGTH], axis=1)


def with_statistics(pooled: tf.Tensor, statistics: tf.Tensor) -> tf.Tensor:
    """`[B, K, D]` and `[B, S]` -> `[B, K, D + S]`, the same statistics beside each interest."""
    repeated = tf.zeros_like(pooled[..., :1]) + statistics[:, None, :]
    return tf.concat([pooled, repeated], axis=-1)


def unit(vectors: tf.Tensor) -> tf.Tensor:
    """Vectors `[.., D]` over their length; what is next to nothing stays so."""
    return vectors * tf.math.rsqrt(tf.reduce_sum(vectors * vectors, axis=-1, keepdims=True) + 1e-12)
