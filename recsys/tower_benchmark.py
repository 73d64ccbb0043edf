"""The factorisation member beside the plain two-tower model of TensorFlow Recommenders: samples a second, and recall.

Both have vectors of one width, batches of as many pairs, Adagrad, and the in-batch softmax with logQ and without
accidental hits. The peer is written as its tutorial does: two embeddings, `tfrs.Model`, `fit` on a `tf.data` pipeline,
and Adagrad with the tutorial's rate of 0.1 (Adam, whose step goes over whole tables, took it three times as long). Ours
trains rows of a user's items (`recsys.collaborative.user_rows`), at a rate of its own.

The peer runs twice: with rows that are dealt into other batches in each epoch, as ours are, and with the batches of the
first epoch kept in memory (`cache` after `batch`), as the tutorial does, which spares it its input pipeline.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from fusion.compat import keras, tf, tfrs
from fusion.errors import ConfigError
from fusion.types import RunOptions
from recsys import retrieval
from recsys.benchmarks import World, recall
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import TrainingData
from recsys.collaborative.user_rows import UserRows

TOGETHER = 8
"""Items of a row of ours."""
PEERS = ("tfrs", "tfrs_cached")
LEARNING_RATES = {"ours": 0.05, **dict.fromkeys(PEERS, 0.1)}
MONITOR = "ndcg@10"


def measure_towers(name: str, *, factors: int = 64, batch: int = 1024, epochs: int = 5, k: int = 20) -> dict[str, Any]:
    """Samples a second and recall@k of `matrix_factorization` and of TFRS's two towers, on a world in `WORLDS`.

    All are trained for `epochs` epochs, in turns: after each of ours the peers take one. The first epoch, in which
    graphs are traced, is not timed; the ratios are medians over the others. Recall is measured after every epoch, and
    the best epoch counts, as it would where validation stops the training: both forget with the epochs after it.
    Raises ConfigError for fewer than two epochs.
    """
    if epochs < 2:
        raise ConfigError(f"epochs must be 2 or more, because the first is not timed; received {epochs}.")
    world = World.made(name)
    peers = {name: _Peer(world.train, factors, batch, cached=name == "tfrs_cached") for name in PEERS}
    samples = {"ours": _samples_of_ours(world.train, batch), **{name: peer.samples for name, peer in peers.items()}}
    seconds, recalls = _train_in_turns(world, peers, factors, batch, epochs, k)
    rates = {system: [samples[system] / taken for taken in seconds[system][1:]] for system in seconds}
    settings = {"factors": factors, "batch": batch, "epochs": epochs, "optimizer": "adagrad", "together": TOGETHER}
    result: dict[str, Any] = {"world": name, "settings": settings}
    for system in seconds:
        result[system] = {
            "learning_rate": LEARNING_RATES[system],
            "samples_per_s": max(rates[system]),
            f"recall@{k}": max(recalls[system]),
            "by_epoch": {str(epoch + 1): value for epoch, value in enumerate(recalls[system])},
        }
    for name in PEERS:
        result[name]["speed_ratio"] = statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
    return result


def _train_in_turns(
    world: World, peers: Mapping[str, _Peer], factors: int, batch: int, epochs: int, k: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds of every epoch of all, and recall@k after it."""
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    recalls: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    began = time.perf_counter()

    def turn(scorer: tf.Module) -> dict[str, float]:
        """What the member takes for validation: the end of its epoch, and the peers' turn."""
        nonlocal began
        seconds["ours"].append(time.perf_counter() - began)
        vectors = {"ours": _vectors(scorer, world.train)}
        for name, peer in peers.items():
            seconds[name].append(peer.epoch())
            vectors[name] = peer.vectors()
        for name, tables in vectors.items():
            recalls[name].append(recall(world, retrieval.score_blocks(*tables, world.train, k)[1]))
        began = time.perf_counter()
        return {MONITOR: recalls["ours"][-1]}

    kind = MEMBERS["matrix_factorization"]
    training = {
        "epochs": epochs,
        "batch_size": batch,
        "optimizer": "adagrad",
        "learning_rate": LEARNING_RATES["ours"],
        "initial_accumulator": 0.1 / batch**2,  # the peer's loss is a sum over the batch, ours a mean
    }
    member = kind(kind.Config(factors=factors, dropout=0.0, together=TOGETHER, training=training))
    with tempfile.TemporaryDirectory() as folder:
        items = pd.DataFrame(index=range(world.train.shape[1]))
        data = TrainingData(world.train, items, Path(folder), turn, monitor=MONITOR)
        member.fit(data, RunOptions(seed=0, directory=Path(folder), quiet=True))
    return seconds, recalls


def _vectors(scorer: Any, matrix: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Of users `[U, D]`, pooled from whole histories, and of items `[I, D]`."""
    history, item = scorer.history_table.numpy()[:-1], scorer.item_table.numpy()  # the last row is that of the padding
    roots = np.sqrt(np.maximum(np.diff(matrix.indptr), 1))[:, None]
    return (matrix @ history / roots).astype(np.float32), item


def _samples_of_ours(matrix: sparse.csr_matrix, batch: int) -> int:
    """Pairs of an epoch: the items of all rows of full batches."""
    rows = UserRows(matrix, TOGETHER, seed=0)
    used = len(rows) // (batch // TOGETHER) * (batch // TOGETHER)
    return int(rows.pairs * used / len(rows))


class _Peer:
    """Two embeddings and TFRS's retrieval task, trained by Keras."""

    def __init__(self, matrix: sparse.csr_matrix, factors: int, batch: int, *, cached: bool) -> None:
        pairs = matrix.tocoo()
        counts = np.bincount(pairs.col, minlength=matrix.shape[1]) / matrix.nnz
        columns = {
            "user": pairs.row.astype(np.int32),
            "item": pairs.col.astype(np.int32),
            "probability": counts[pairs.col].astype(np.float32),
        }
        data = tf.data.Dataset.from_tensor_slices(columns).shuffle(matrix.nnz, seed=0)
        batches = data.batch(batch, drop_remainder=True)
        self.data = (batches.cache() if cached else batches).prefetch(tf.data.AUTOTUNE)
        self.samples = matrix.nnz // batch * batch
        self.model = _two_towers(matrix.shape, factors)
        self.model.compile(optimizer=keras.optimizers.Adagrad(LEARNING_RATES["tfrs"]))

    def epoch(self) -> float:
        """Seconds of one epoch."""
        started = time.perf_counter()
        self.model.fit(self.data, epochs=1, verbose=0)
        return time.perf_counter() - started

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Of users `[U, D]` and of items `[I, D]`."""
        return self.model.user.get_weights()[0], self.model.item.get_weights()[0]


def _two_towers(shape: tuple[int, int], factors: int) -> keras.Model:
    """As in the retrieval tutorial of TensorFlow Recommenders, over numbers instead of strings."""
    recommenders: Any = tfrs()

    class TwoTowers(recommenders.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = (keras.layers.Embedding(rows, factors) for rows in shape)
            self.task = recommenders.tasks.Retrieval(remove_accidental_hits=True)

        def compute_loss(self, features: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
            return self.task(
                self.user(features["user"]),
                self.item(features["item"]),
                candidate_sampling_probability=features["probability"],
                candidate_ids=features["item"],
                compute_metrics=False,
            )

    return TwoTowers()
