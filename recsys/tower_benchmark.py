"""The factorisation member beside the plain two-tower model of TensorFlow Recommenders: samples a second, and recall.

Both have vectors of one width, batches of one size, the same optimiser and the same loss (in-batch softmax, logQ, no
accidental hits). The peer is written as its tutorial does: two embeddings, `tfrs.Model`, `fit` on a `tf.data` pipeline.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from fusion.compat import keras, tf, tfrs
from fusion.errors import ConfigError
from fusion.types import RunOptions
from recsys import retrieval
from recsys.benchmarks import World, recall, user_and_item_vectors
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import TrainingData
from recsys.collaborative.pairs import Pairs

LEARNING_RATE = 0.005
MONITOR = "ndcg@10"
PEER = "tfrs"


def measure_towers(name: str, *, factors: int = 64, batch: int = 1024, epochs: int = 8, k: int = 20) -> dict[str, Any]:
    """Samples a second and recall@k of `matrix_factorization` and of TFRS's two towers, on a world in `WORLDS`.

    Both are trained for `epochs` epochs, in turns: after each of ours the peer takes one. The first epoch, in which
    graphs are traced, is not timed; the ratio is the median over the others. Raises ConfigError for fewer than two.
    """
    if epochs < 2:
        raise ConfigError(f"epochs must be 2 or more, because the first is not timed; received {epochs}.")
    world = World.made(name)
    peer = _Peer(world.train, factors, batch)
    ours, seconds = _train_in_turns(world.train, peer, factors, batch, epochs)
    samples = {"ours": _samples_of_ours(world.train, batch), PEER: peer.samples}
    vectors = {"ours": user_and_item_vectors(ours, world.train), PEER: peer.vectors()}
    rates = {system: [samples[system] / taken for taken in seconds[system][1:]] for system in seconds}
    result: dict[str, Any] = {"world": name, "settings": {"factors": factors, "batch": batch, "epochs": epochs, "k": k}}
    for system, tables in vectors.items():
        lists = retrieval.score_blocks(*tables, world.train, k)[1]
        result[system] = {"samples_per_s": max(rates[system]), f"recall@{k}": recall(world, lists)}
    return {**result, "speed_ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates[PEER], strict=True))}


def _train_in_turns(
    matrix: sparse.csr_matrix, peer: _Peer, factors: int, batch: int, epochs: int
) -> tuple[Any, dict[str, list[float]]]:
    """Our fitted member, and the seconds of every epoch of both."""
    seconds: dict[str, list[float]] = {"ours": [], PEER: []}
    began = time.perf_counter()

    def turn(_: tf.Module) -> dict[str, float]:
        """What the member takes for validation: the end of its epoch, and the peer's turn."""
        nonlocal began
        seconds["ours"].append(time.perf_counter() - began)
        seconds[PEER].append(peer.epoch())
        began = time.perf_counter()
        return {MONITOR: float(len(seconds[PEER]))}  # it rises, so that the last epoch is kept

    kind = MEMBERS["matrix_factorization"]
    training = {"epochs": epochs, "batch_size": batch, "learning_rate": LEARNING_RATE}
    member = kind(kind.Config(factors=factors, dropout=0.0, training=training))
    with tempfile.TemporaryDirectory() as folder:
        items = pd.DataFrame(index=range(matrix.shape[1]))
        data = TrainingData(matrix, items, Path(folder), turn, monitor=MONITOR)
        member.fit(data, RunOptions(seed=0, directory=Path(folder), quiet=True))
    return member, seconds


def _samples_of_ours(matrix: sparse.csr_matrix, batch: int) -> int:
    """Pairs of an epoch: those of users with two items or more, in full batches."""
    return len(Pairs(matrix)) // batch * batch


class _Peer:
    """Two embeddings and TFRS's retrieval task, trained by Keras."""

    def __init__(self, matrix: sparse.csr_matrix, factors: int, batch: int) -> None:
        pairs = matrix.tocoo()
        counts = np.bincount(pairs.col, minlength=matrix.shape[1]) / matrix.nnz
        columns = {
            "user": pairs.row.astype(np.int32),
            "item": pairs.col.astype(np.int32),
            "probability": counts[pairs.col].astype(np.float32),
        }
        data = tf.data.Dataset.from_tensor_slices(columns).shuffle(matrix.nnz, seed=0)
        self.data = data.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
        self.samples = matrix.nnz // batch * batch
        self.model = _two_towers(matrix.shape, factors)
        self.model.compile(optimizer=keras.optimizers.Adam(LEARNING_RATE))

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
