"""Matrix factorisation trained in Keras: softmax with TensorFlow Recommenders, BPR, or hard negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.errors import ConfigError
from fusion.training.optimizers import Group
from fusion.training.precision import Precision, narrow
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings
from fusion.types import History, RunOptions, derive_seed
from recsys.collaborative.base import (
    Decay,
    EmbeddingScorer,
    TrainingData,
    pool_history,
    recency,
)
from recsys.collaborative.pairs import (
    HistoryPairs,
    NegativePairs,
    Sampling,
    TowerMember,
    Towers,
    pairwise,
    train_towers,
)
from recsys.collaborative.svd import right_singular_vectors
from recsys.collaborative.user_rows import PARTS, UserRows, pool_others, softmax_of_rows
from recsys.warm_starts import TableStart

Tables = tuple[tf.Tensor, tf.Tensor]
"""Vectors of items as parts of a history, and as candidates, each `[I, D]`."""


class MatrixFactorization(TowerMember):
    """Two embeddings an item: one as part of a history, one as a candidate (asymmetric factorisation, Koren 2008).

    The user's vector is pooled from the history, so there is no user table and nothing to learn for a new user.
    """

    class Config(Settings):
        """Settings of the factorisation."""

        factors: int = Field(64, ge=1, le=1024)
        """Length D of the vectors."""
        loss: Literal["softmax", "bpr", "warp"] = "softmax"
        """softmax: over the targets of the batch, corrected for how often they are drawn (logQ); bpr: each pair
        against negatives of its own (Rendle et al. 2009); warp: against the hardest of them, weighted by the rank
        that it points to (Weston et al. 2011)."""
        negatives: int = Field(16, ge=1, le=1000)
        """Negatives of a pair, for bpr and warp: items that its user did not take."""
        sampling: Sampling = "uniform"
        """How these are drawn: every item alike, or by popularity."""
        init: Literal["random", "svd"] = "random"
        """svd: both tables start as the item vectors of the truncated SVD of who took what."""
        max_history: int = Field(128, ge=1, le=4096)
        """Items of a history that training looks at; scoring looks at all of them."""
        together: int = Field(1, ge=1, le=1024)
        """Items of a user that are trained as one row, each foretold from the others, for softmax: many times as fast
        as 1, where each target brings a history of its own. A multiple of 4; joint training always takes pairs."""
        dropout: float = Field(0.2, ge=0, lt=1)
        """Share of the user vector's entries that training silences."""
        l2: float = Field(0.0, ge=0)
        """Penalty on the embeddings."""
        temperature: float = Field(1.0, gt=0)
        """Divides the scores in the softmax."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        init_from: str = ""
        """Another run's factorisation, as RUN/submodels/NAME: the items that both know start with its vectors."""
        training: TrainingSettings = TrainingSettings(epochs=20, batch_size=1024, learning_rate=0.005)
        """The training loop."""

    averageable = True
    start: TableStart | None = None

    @classmethod
    def check(cls, config: Any) -> None:
        if config.together > 1 and (config.loss != "softmax" or config.together % PARTS):
            raise ConfigError(
                f"together must be 1, or with loss softmax a multiple of {PARTS}; received {config.together} with loss "
                f"{config.loss}."
            )

    @classmethod
    def joins(cls, config: Any) -> bool:
        """Losses over negatives of one's own have no part in a softmax over the batch."""
        return bool(config.loss == "softmax")

    def start_from(self, start: TableStart) -> None:
        """Before `fit`: where `warm_start` of another one knows an item, its vectors are begun with."""
        self.start = start

    def warm_start(self, origin: str) -> TableStart:
        """What a new factorisation may start with; `origin` is for messages."""
        history, item = self.tables
        return TableStart(origin, {"history_table": history, "item_table": item}, self.speaks)

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        towers = self.towers(data, options, self.config.training.precision)
        history = self._train(data, options)
        towers.finish()
        return history

    def towers(self, data: TrainingData, options: RunOptions, precision: Precision = "float32") -> Towers:
        with scope(options, precision):
            self.model = self._build(data)
        self.speaks = data.counts > 0
        group = Group("tables", self.model.trainable_variables, self.config.training)
        return Towers(self.model, self.config.temperature, [group], self._finish)

    def _finish(self) -> None:
        self.tables = self._tables()

    def _train(self, data: TrainingData, options: RunOptions) -> History:
        config, seed = self.config, derive_seed(self.seed, "histories")
        if config.together > 1:
            return self._train_rows(data, options)
        if config.loss == "softmax":
            pairs = HistoryPairs(data.matrix, config.max_history, seed)
            return train_towers(self.model, self._scorer_now, data, pairs, config, options)
        drawn = NegativePairs(data.matrix, config.max_history, seed, config.negatives, config.sampling)
        loss = pairwise(self.model, config.loss, data.matrix.shape[1])
        return train_towers(self.model, self._scorer_now, data, drawn, config, options, loss)

    def _train_rows(self, data: TrainingData, options: RunOptions) -> History:
        """Several pairs of a user at once; a batch has as many pairs as it would have had rows."""
        config = self.config
        with scope(options, config.training.precision):
            items = keras.Input((config.together,), dtype=tf.int32, name="items")
            vectors = self.model.get_layer("vectors")({"history": items, "target": items})
            user = self.model.get_layer("silenced")(pool_others(vectors["history"], items))
            model = keras.Model({"items": items}, {"user": narrow(user), "item": narrow(vectors["target"])})
        training = config.training.model_copy(
            update={"batch_size": max(1, config.training.batch_size // config.together)}
        )
        rows = UserRows(data.matrix, config.together, derive_seed(self.seed, "rows"))
        loss = softmax_of_rows(model, config.temperature)
        of_rows = config.model_copy(update={"training": training})
        return train_towers(model, self._scorer_now, data, rows, of_rows, options, loss)

    def _build(self, data: TrainingData) -> keras.Model:
        table = _ItemVectors(
            self._start(data, "history_table"),
            self._start(data, "item_table"),
            self._propagation(data.matrix),
            keras.regularizers.L2(self.config.l2) if self.config.l2 else None,
            name="vectors",
            dtype="float32",  # rows and their sums; only products with them are in the precision of training
        )
        inputs = {
            "history": keras.Input((None,), dtype=tf.int32, name="history"),
            "target": keras.Input((), dtype=tf.int32, name="target"),
        }
        if self.config.loss != "softmax":
            inputs["negatives"] = keras.Input((self.config.negatives,), dtype=tf.int32, name="negatives")
        rows = table(inputs)
        user = pool_history(rows.pop("history"), recency(inputs["history"], 1.0), unit=False)
        user = keras.layers.Dropout(
            self.config.dropout,
            rng_type="stateful",
            force_generator=True,
            seed=derive_seed(self.seed, "dropout"),
            name="silenced",
            dtype="float32",
        )(user)
        vectors = {"user": user, "item": rows.pop("target"), **rows}
        return keras.Model(inputs, {name: narrow(tensor) for name, tensor in vectors.items()})

    def _start(self, data: TrainingData, name: str) -> np.ndarray:
        """The table `[I, D]` that training begins with: rows of length 1 in the mean, drawn or out of the SVD; or
        those of another run's member."""
        matrix, factors = data.matrix, self.config.factors
        items = matrix.shape[1]
        table = np.random.default_rng(derive_seed(self.seed, name)).normal(0.0, factors**-0.5, (items, factors))
        if self.config.init == "svd":
            vectors = right_singular_vectors(matrix, factors, derive_seed(self.seed, "svd"))
            table[:, : vectors.shape[1]] = vectors * np.sqrt(items / vectors.shape[1])
        table = table.astype(np.float32)
        return table if self.start is None else self.start.give(name, table, np.asarray(data.item_ids, object))

    def _propagation(self, matrix: sparse.csr_matrix) -> Callable[[tf.Tensor, tf.Tensor], Tables]:
        """What is done to the two tables before rows are looked up in them: here, nothing."""
        return lambda history, item: (history, item)

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        history, item = self.model.get_layer("vectors").tables()
        return np.asarray(history), np.asarray(item)

    def _scorer_now(self) -> tf.Module:
        return EmbeddingScorer(*self._tables(), unit=False, decay=self.config.decay)

    def state(self) -> dict[str, np.ndarray]:
        return {"history_table": self.tables[0], "item_table": self.tables[1], "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.tables = state["history_table"], state["item_table"]
        self.speaks = state["speaks"]

    def scorer(self) -> tf.Module:
        return EmbeddingScorer(*self.tables, unit=False, decay=self.config.decay)

    def roomy_scorer(self, spare: int) -> tf.Module:
        """The scorer with `spare` rows of zeros behind both of its tables."""
        history, item = (np.pad(table, [(0, spare), (0, 0)]) for table in self.tables)
        return EmbeddingScorer(history, item, unit=False, decay=self.config.decay)


class _ItemVectors(keras.layers.Layer):
    """Looks up item numbers in two tables that are learned: `history` in the first, all others in the second.

    Padding reads some row; whoever pools a history, or weighs negatives, gives it no weight.
    """

    def __init__(
        self,
        history: np.ndarray,
        item: np.ndarray,
        propagation: Callable[[tf.Tensor, tf.Tensor], Tables],
        regularizer: Any,
        **names: Any,
    ) -> None:
        super().__init__(**names)
        self.propagation = propagation
        self.history, self.item = (
            self.add_weight(name, table.shape, initializer=keras.initializers.Constant(table), regularizer=regularizer)
            for name, table in (("history_table", history), ("item_table", item))
        )

    def tables(self) -> Tables:
        return self.propagation(self.history, self.item)

    def call(self, numbers: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        history, item = self.tables()
        return {
            name: tf.gather(history if name == "history" else item, tf.maximum(value, 0))
            for name, value in numbers.items()
        }
