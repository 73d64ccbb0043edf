"""What members that read a history as a sequence share: training windows, the loss, fitting, and the scorer.

A network turns the latest items of a history into a state after each of them. An item's score is the product of
its vector with the last state, plus its bias; training names, after each item, the one that the user took next.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.training.strategy import all_replicas, scope
from fusion.training.trainer import TrainingSettings
from fusion.types import Features, History, RunOptions, derive_seed
from recsys.collaborative.base import (
    PADDING,
    Member,
    TrainingData,
    constant,
    padded_numbers,
    with_padding_row,
)
from recsys.metrics import parse_metric

LOWEST = -1e9
"""Stands for minus infinity, which TFLite has no constant for."""


class SequenceSettings(Settings):
    """What all members of sequences are told."""

    dimensions: int = Field(64, ge=2, le=1024)
    """Length D of the vectors of items and states."""
    max_history: int = Field(50, ge=1, le=1024)
    """The latest items of a history that are read, in training and in answers."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Share of entries that training silences, in the vectors of a history and within the network."""
    negatives: int = Field(1024, ge=1, le=100_000)
    """Items that compete with the targets of a batch: drawn, or all that were taken where there are no more."""
    training: TrainingSettings = TrainingSettings(epochs=60, batch_size=64, learning_rate=0.003, patience=4)
    """The training loop; a row is a window of a user's history."""


class SequenceMember(Member):
    """A member whose network reads the order of a history. Subclasses fill `_states`.

    Where the data have no times, histories are in the order of item numbers, and such a member is of no use.
    """

    config: Any
    length: int
    model: keras.Model
    averageable = True
    accelerations = ()
    """How many targets a batch has depends on its windows, and XLA wants to know before; states are sums over steps."""

    @abc.abstractmethod
    def _states(self, vectors: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
        """Item vectors `[B, N, D]` and bool `[B, N]`, False for padding (which stands in front) -> states `[B, N, D]`.

        The state after an item must depend on that item and earlier ones alone.
        """

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        """Trains the network on windows of all histories; DataError where nobody took two items."""
        from fusion.training.trainer import fit  # the trainer is not needed where fitted members are only scored

        validate = data.validate
        self.speaks = data.counts > 0
        longest = int(np.diff(data.matrix.indptr).max(initial=1))
        self.length = min(self.config.max_history, longest)  # steps further back would never be trained
        with scope(options):
            self._build(len(self.speaks))
        # Where the biases would go first: what little data there are then serve to learn the vectors.
        self.model.get_layer("bias").set_weights([np.log1p(data.counts, dtype=np.float32)[:, None]])
        windows = Windows(data.matrix, self.length, self.config, derive_seed(self.seed, "windows"))
        scorer = self.scorer()  # one for all epochs: it reads the variables, and its network is traced once
        return fit(
            self.model,
            next_item_softmax(self.model, windows),
            (len(windows), windows.gather),
            self.config.training,
            options,
            (lambda: validate(scorer)) if validate else None,
            data.monitor,
            parse_metric(data.monitor, "candidates").higher_is_better,
            drop_remainder=len(windows) >= self.config.training.batch_size,  # negatives are those of a whole batch
        )

    def _build(self, items: int) -> None:
        history = keras.Input((self.length,), dtype=tf.int32, name="history")
        candidate = keras.Input((), dtype=tf.int32, name="candidate")
        width = self.config.dimensions
        start = keras.initializers.RandomNormal(stddev=width**-0.5, seed=derive_seed(self.seed, "items"))
        table = keras.layers.Embedding(items, width, embeddings_initializer=start, name="items")
        bias = keras.layers.Embedding(items, 1, embeddings_initializer="zeros", name="bias")
        known = history >= 0
        # Scaled to entries of unit variance, which layers expect; as candidates the vectors stay of about unit length.
        vectors = table(tf.maximum(history, 0)) * tf.cast(known, tf.float32)[..., None] * width**0.5
        states = self._states(self._dropout(vectors, "items"), known)
        outputs = {"state": states, "item": table(candidate), "bias": bias(candidate)}
        self.model = keras.Model({"history": history, "candidate": candidate}, outputs)
        self.encoder = keras.Model(history, states)

    def _dropout(self, vectors: tf.Tensor, name: str) -> tf.Tensor:
        # A stateful generator is a variable, which a checkpoint can hold.
        layer = keras.layers.Dropout(
            self.config.dropout,
            seed=derive_seed(self.seed, "dropout", name),
            rng_type="stateful",
            force_generator=True,
            name=f"{name}_dropout",
        )
        return layer(vectors)

    def _dense(self, vectors: tf.Tensor, units: int, name: str, **settings: Any) -> tf.Tensor:
        start = keras.initializers.GlorotUniform(seed=derive_seed(self.seed, name))
        return keras.layers.Dense(units, kernel_initializer=start, name=name, **settings)(vectors)

    def state(self) -> dict[str, np.ndarray]:
        weights = {f"weights/{number:04d}": weight for number, weight in enumerate(self.model.get_weights())}
        return {"length": np.asarray(self.length, np.int32), "speaks": self.speaks, **weights}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.length, self.speaks = int(state["length"]), state["speaks"]
        self._build(len(self.speaks))
        self.model.set_weights([state[name] for name in sorted(state) if name.startswith("weights/")])

    def scorer(self) -> tf.Module:
        table, bias = (self.model.get_layer(name).embeddings for name in ("items", "bias"))
        return SequenceScorer(self.encoder, table, bias, self.speaks, self.length)


class SequenceScorer(tf.Module):
    """Scores all items by the state after the latest items of a history, passing over those that training never saw."""

    def __init__(
        self, encoder: keras.Model, table: tf.Variable, bias: tf.Variable, speaks: np.ndarray, length: int
    ) -> None:
        super().__init__()
        self.length = length
        self.item_table, self.item_bias = table, bias
        self.speaks = constant(with_padding_row(speaks.astype(np.float32)), tf.float32, "speaks")
        # The variables without the model, of which the SavedModel would keep every layer's functions.
        self.kept = encoder.variables
        spec = [tf.TensorSpec([None, length], tf.int32)]
        self.encode = tf.function(lambda history: encoder(history, training=False)[:, -1], input_signature=spec)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        known = tf.gather(self.speaks, padded_numbers(history, self.item_table.shape[0])) > 0.0
        state = self.encode(latest_items(tf.where(known, history, PADDING), self.length))
        return tf.matmul(state, self.item_table, transpose_b=True) + self.item_bias[:, 0]


def latest_items(history: tf.Tensor, length: int) -> tf.Tensor:
    """Histories int32 `[B, L]`, padded with -1 anywhere -> their latest items `[B, length]`, padded in front."""
    padded = tf.pad(history, [[0, 0], [length, 0]], constant_values=PADDING)
    place = tf.where(padded >= 0, tf.range(tf.shape(padded)[1]), PADDING)
    latest_first = tf.math.top_k(place, length).indices
    return tf.reverse(tf.gather(padded, latest_first, batch_dims=1), axis=[1])


class Windows:
    """Training rows: histories cut from their end into windows of at most `length` items, with a target after each.

    `gather(positions)` -> `history` and `target` int32 `[b, length]`, padded in front with -1, and, where fewer than
    all items compete, `negative` int32 `[b, n]`, drawn by a generator that the rows of the batch decide, so that a
    resumed run draws the same.

    Attributes:
        items: int32 `[C]`, the items of training, which may be negatives.
        probability: float32 `[I]`, how often each is drawn: half by popularity and half uniformly (mixed negative
            sampling, Yang et al. 2020).
        drawn: how many negatives a row brings; 0 where all items compete.
        targets: mean number of targets of a window.
    """

    def __init__(self, matrix: sparse.csr_matrix, length: int, config: SequenceSettings, seed: int) -> None:
        self._order = matrix.indices.astype(np.int32)
        self._length, self._seed = length, seed
        first, last = matrix.indptr[:-1].astype(np.int64), matrix.indptr[1:].astype(np.int64)
        inputs = np.maximum(last - first - 1, 0)  # the last item of a history is a target only
        windows = -(-inputs // length)
        number = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)  # 0 is a user's latest
        self._stop = np.repeat(last, windows) - 1 - number * length
        self._start = np.maximum(self._stop - length, np.repeat(first, windows))
        self.targets = float(inputs.sum() / max(len(self), 1))
        counts = matrix.getnnz(axis=0)
        self.items = np.flatnonzero(counts).astype(np.int32)
        mixed = counts / max(counts.sum(), 1) + (counts > 0) / max(len(self.items), 1)
        self.probability = (mixed / 2).astype(np.float32)
        self._cumulated = np.cumsum(mixed[self.items] / 2)
        self.drawn = 0 if len(self.items) <= config.negatives else -(-config.negatives // config.training.batch_size)

    def __len__(self) -> int:
        return len(self._stop)

    def gather(self, positions: np.ndarray) -> Features:
        start, stop = self._start[positions, None], self._stop[positions, None]
        cells = stop + np.arange(-self._length, 0)
        inside = cells >= start
        cells = np.where(inside, cells, start)
        batch = {
            "history": np.where(inside, self._order[cells], PADDING),
            "target": np.where(inside, self._order[cells + 1], PADDING),
        }
        if self.drawn:
            random = np.random.default_rng([self._seed, *positions])
            share = random.random((len(positions), self.drawn)) * self._cumulated[-1]
            batch["negative"] = self.items[np.searchsorted(self._cumulated, share, side="right")]
        return batch


def next_item_softmax(model: keras.Model, windows: Windows) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """The loss `[b]` of a batch of windows: a softmax of each target against the negatives of the whole batch, also
    where several replicas share it.

    For the score s_t of a target and n negatives j, drawn with probability q: log(e^s_t + sum_j e^s_j / (n q_j)) - s_t,
    the importance-sampled softmax (Bengio & Senecal 2008; dividing by q is the logQ correction); with all items as
    negatives it is the softmax itself. As in a ranking, items of the history are no candidates, nor is the target its
    own negative. A row's losses are summed and divided by the mean number of targets of all rows.
    """
    probability = tf.constant(windows.probability)

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        history, present = batch["history"], batch["target"] >= 0
        row, target = tf.where(present)[:, 0], tf.boolean_mask(batch["target"], present)  # [T]
        # [C]
        negative = tf.reshape(all_replicas(batch["negative"]), [-1]) if windows.drawn else tf.constant(windows.items)
        answer = model({"history": history, "candidate": tf.concat([target, negative], axis=0)}, training=True)
        state, item, bias = tf.boolean_mask(answer["state"], present), answer["item"], answer["bias"][:, 0]
        own = tf.reduce_sum(state * item[: tf.size(target)], axis=1) + bias[: tf.size(target)]
        others = tf.matmul(state, item[tf.size(target) :], transpose_b=True) + bias[tf.size(target) :]  # [T, C]
        if windows.drawn:
            others -= tf.math.log(tf.cast(tf.size(negative), tf.float32) * tf.gather(probability, negative))
        taken = tf.reduce_any(history[:, :, None] == negative, axis=1)  # [b, C]
        excluded = tf.gather(taken, row) | (target[:, None] == negative)
        scores = tf.concat([own[:, None], tf.where(excluded, LOWEST, others)], axis=1)
        each = tf.reduce_logsumexp(scores, axis=1) - own
        return tf.math.unsorted_segment_sum(each, row, tf.shape(history)[0]) / windows.targets

    return loss
