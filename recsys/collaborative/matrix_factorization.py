"""Matrix factorisation trained in Keras with the retrieval task of TensorFlow Recommenders."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings
from fusion.types import History, RunOptions, derive_seed
from recsys.collaborative.base import (
    Decay,
    EmbeddingScorer,
    Member,
    TrainingData,
    padded_numbers,
    pool_history,
    recency,
)
from recsys.collaborative.pairs import HistoryPairs, train_towers


class MatrixFactorization(Member):
    """Two embeddings an item: one as part of a history, one as a candidate (asymmetric factorisation, Koren 2008).

    The user's vector is pooled from the history, so there is no user table and nothing to learn for a new user.
    Trained with an in-batch softmax with logQ correction.
    """

    class Config(Settings):
        """Settings of the factorisation."""

        factors: int = Field(64, ge=1, le=1024)
        """Length D of the vectors."""
        max_history: int = Field(128, ge=1, le=4096)
        """Items of a history that training looks at; scoring looks at all of them."""
        dropout: float = Field(0.2, ge=0, lt=1)
        """Share of the user vector's entries that training silences."""
        l2: float = Field(0.0, ge=0)
        """Penalty on the embeddings."""
        temperature: float = Field(1.0, gt=0)
        """Divides the scores in the softmax."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        training: TrainingSettings = TrainingSettings(epochs=20, batch_size=1024, learning_rate=0.005)
        """The training loop."""

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        items = data.matrix.shape[1]
        with scope(options):
            self.model = self._build(items)
        self.speaks = data.counts > 0
        pairs = HistoryPairs(data.matrix, self.config.max_history, derive_seed(self.seed, "histories"))
        history = train_towers(self.model, self._scorer_now, data, pairs, self.config, options)
        self.tables = self._tables()
        return history

    def _build(self, items: int) -> keras.Model:
        history = keras.Input((None,), dtype=tf.int32, name="history")
        target = keras.Input((), dtype=tf.int32, name="target")
        rows = self._embedding(items + 1, "history_table")(padded_numbers(history, items))
        user = pool_history(rows, recency(history, 1.0), unit=False)
        user = keras.layers.Dropout(
            self.config.dropout, rng_type="stateful", force_generator=True, seed=derive_seed(self.seed, "dropout")
        )(user)
        item = self._embedding(items, "item_table")(target)
        return keras.Model({"history": history, "target": target}, {"user": user, "item": item})

    def _embedding(self, rows: int, name: str) -> keras.layers.Embedding:
        deviation = 1.0 / np.sqrt(self.config.factors)
        return keras.layers.Embedding(
            rows,
            self.config.factors,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=deviation, seed=derive_seed(self.seed, name)),
            embeddings_regularizer=keras.regularizers.L2(self.config.l2) if self.config.l2 else None,
            name=name,
        )

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        history = self.model.get_layer("history_table").get_weights()[0][:-1]
        return history, self.model.get_layer("item_table").get_weights()[0]

    def _scorer_now(self) -> tf.Module:
        history, item = self._tables()
        return EmbeddingScorer(history, item, unit=False, decay=self.config.decay)

    def state(self) -> dict[str, np.ndarray]:
        return {"history_table": self.tables[0], "item_table": self.tables[1], "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.tables = state["history_table"], state["item_table"]
        self.speaks = state["speaks"]

    def scorer(self) -> tf.Module:
        return EmbeddingScorer(*self.tables, unit=False, decay=self.config.decay)
