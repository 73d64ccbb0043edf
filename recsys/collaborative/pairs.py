"""Training pairs (history, next item), and the losses for members that are trained on them.

The history of a pair is what the user took, without the item that is to be predicted: the same shape of
question that the member will be asked, so a visitor and a trained user are no different to it. The negatives of a
pair are the other targets of its batch (softmax), or items that its user never took (BPR, WARP).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from scipy import sparse

from fusion.compat import keras, tf, tfrs
from fusion.training.optimizers import Group
from fusion.training.precision import Precision, wide
from fusion.training.strategy import all_replicas
from fusion.types import Features, History, RunOptions
from recsys.collaborative.base import PADDING, Member, TrainingData
from recsys.metrics import parse_metric


class PairSource(Protocol):
    """Pairs that are gathered in batches by position; `target` and `probability` are always among them."""

    def __len__(self) -> int: ...

    def gather(self, positions: np.ndarray) -> Features:
        """Named arrays with the leading axis b."""


class Pairs:
    """All (user, positive item) pairs of a matrix, gathered in batches by position.

    `gather(positions)` -> `user` and `target` int32 `[b]`, and `probability` float32 `[b]`: how often the target is
    drawn as a negative, for the logQ correction. Users with one item are left out: without the target there is no
    history.
    """

    def __init__(self, matrix: sparse.csr_matrix) -> None:
        lengths = np.diff(matrix.indptr)
        useful = lengths >= 2
        self.users = np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.where(useful, lengths, 0))
        self.targets = matrix.indices[np.repeat(useful, lengths)].astype(np.int32)
        counts = np.bincount(self.targets, minlength=matrix.shape[1]).astype(np.float64)
        self.probability = (counts / max(counts.sum(), 1.0)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, positions: np.ndarray) -> Features:
        targets = self.targets[positions]
        return {"user": self.users[positions], "target": targets, "probability": self.probability[targets]}


class HistoryPairs(Pairs):
    """Pairs with the items of the history itself: `history` int32 `[b, L]` padded with -1, in place of `user`."""

    def __init__(self, matrix: sparse.csr_matrix, max_history: int, seed: int) -> None:
        super().__init__(matrix)
        self.histories = padded_histories(matrix, max_history, seed)

    def gather(self, positions: np.ndarray) -> Features:
        batch = super().gather(positions)
        histories = self.histories[batch.pop("user")]
        return {"history": np.where(histories == batch["target"][:, None], PADDING, histories), **batch}


Sampling = Literal["uniform", "popularity"]

REDRAWS = 4
"""Rounds in which negatives that the user took are drawn again; what is left then has no part in the loss."""


class NegativePairs(HistoryPairs):
    """Pairs with `negatives` int32 `[b, N]`: items that the user did not take, -1 where none was found.

    They are drawn for each batch anew, so that a pair meets others in every epoch, and decided by the seed and the
    rows of the batch, so that a run that was interrupted draws them again.
    """

    def __init__(
        self, matrix: sparse.csr_matrix, max_history: int, seed: int, negatives: int, sampling: Sampling
    ) -> None:
        super().__init__(matrix, max_history, seed)
        self.seed, self.count, self.items = seed, negatives, matrix.shape[1]
        rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
        self.taken = np.sort(rows * self.items + matrix.indices)
        # A negative is an entry of this list: each item once, or as often as it was taken.
        self.source = (np.unique(matrix.indices) if sampling == "uniform" else matrix.indices).astype(np.int32)

    def gather(self, positions: np.ndarray) -> Features:
        random = np.random.default_rng([self.seed, len(positions), *positions[:8].tolist()])
        users = np.repeat(self.users[positions], self.count)
        negatives = np.full(len(users), PADDING, np.int32)
        for _ in range(1 + REDRAWS):
            missing = np.flatnonzero(negatives == PADDING)
            drawn = self.source[random.integers(0, len(self.source), len(missing))]
            negatives[missing] = np.where(self._took(users[missing], drawn), PADDING, drawn)
        return {**super().gather(positions), "negatives": negatives.reshape(len(positions), self.count)}

    def _took(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        cells = users.astype(np.int64) * self.items + items
        return self.taken[np.minimum(np.searchsorted(self.taken, cells), len(self.taken) - 1)] == cells


def padded_histories(matrix: sparse.csr_matrix, max_history: int, seed: int) -> np.ndarray:
    """Histories of all rows int32 `[U, L]`, padded with -1; of longer ones a fixed random part."""
    lengths = np.diff(matrix.indptr)
    width = int(min(max_history, max(lengths.max(initial=1), 1)))
    result = np.full((matrix.shape[0], width), PADDING, np.int32)
    random = np.random.default_rng(seed)
    short = lengths <= width
    within = np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], lengths)
    rows = np.repeat(np.arange(matrix.shape[0]), lengths)
    keep = np.repeat(short, lengths)
    result[rows[keep], within[keep]] = matrix.indices[keep]
    for row in np.flatnonzero(~short):
        items = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
        result[row] = random.choice(items, width, replace=False)
    return result


NEVER = -1e9
"""Added to a score, it leaves the candidate without a share in the softmax."""

Loss = Callable[[dict[str, tf.Tensor]], tf.Tensor]
"""Takes a batch of pairs, returns the loss of each, `[b]`."""


def in_batch_softmax(model: keras.Model, temperature: float = 1.0) -> Loss:
    """The loss `[b]` of TFRS's retrieval task: the other targets of the batch are the negatives, corrected for
    how often they are drawn (logQ, Yi et al. 2019) and without those that equal the target.

    Under several replicas these are the targets of the whole batch, not of the replica's share: two devices then learn
    what one does, for an exchange of `[b, D]` a step.

    `model` maps the batch, but for `probability`, to `user` `[b, D]`, or several of a user `[b, K, D]`, of which the
    nearest counts, and `item` `[b, D]`. Vectors of 16 bits, which the task does not take, are multiplied as they are;
    what is made of their products is float32.
    """
    task = tfrs().tasks.Retrieval(
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, reduction=keras.losses.Reduction.NONE),
        temperature=temperature,
        remove_accidental_hits=True,
    )

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "probability"}
        vectors = model(inputs, training=True)
        item = all_replicas(vectors["item"])
        candidates = {name: all_replicas(batch[name]) for name in ("target", "probability")}
        if item.dtype != tf.float32:
            scores = products(vectors["user"], item) / temperature
            return in_batch_cross_entropy(scores, batch["target"], candidates)
        return task(
            vectors["user"],
            item,
            candidate_sampling_probability=candidates["probability"],
            candidate_ids=candidates["target"],
            compute_metrics=False,
        )

    return loss


def products(user: tf.Tensor, item: tf.Tensor) -> tf.Tensor:
    """Scores float32 `[b, C]` of users `[b, D]`, or of the best of their vectors `[b, K, D]`, with items `[C, D]`;
    multiplied in the type of the vectors."""
    users = user[:, None] if user.shape.rank == 2 else user
    return tf.reduce_max(wide(tf.tensordot(users, item, [[2], [1]])), axis=1)


def in_batch_cross_entropy(logits: tf.Tensor, target: tf.Tensor, candidates: dict[str, tf.Tensor]) -> tf.Tensor:
    """The loss `[b]` of `in_batch_softmax` for scores of any kind.

    Args:
        logits: `[b, C]`, candidates by column.
        target: item numbers `[b]`; candidate i is the target of row i.
        candidates: their `target` `[C]` and `probability` `[C]`.
    """
    corrected = logits - tf.math.log(tf.clip_by_value(candidates["probability"], 1e-6, 1.0))
    hits = tf.cast(target[:, None] == candidates["target"][None, :], tf.float32)
    hits -= tf.eye(tf.shape(target)[0], tf.shape(logits)[1])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(tf.shape(target)[0]), corrected + NEVER * hits)


PairwiseKind = Literal["bpr", "warp"]


def pairwise(model: keras.Model, kind: PairwiseKind, items: int) -> Loss:
    """The loss `[b]` of a pair against its own negatives; those of -1 do not count, and a pair without any costs 0.

    bpr: the mean of -log sigmoid(positive - negative) (Rendle et al. 2009, "BPR", eq. 4).

    warp: weight(rank) · max(0, 1 - positive + hardest negative), where rank is the share of negatives within the
    margin, times the `items` of the catalogue, and weight(rank) = log(1 + rank), the sum of 1/n of WSABIE (Weston et
    al. 2011, eq. 2) but for a constant. Where WSABIE draws negatives until one is within the margin, N are drawn.

    `model` maps the batch, but for `probability`, to `user` `[b, D]`, `item` `[b, D]` and `negatives` `[b, N, D]`.
    """

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        vectors = model({name: value for name, value in batch.items() if name != "probability"}, training=True)
        positive = tf.reduce_sum(wide(vectors["user"]) * wide(vectors["item"]), axis=-1, keepdims=True)
        above = wide(tf.squeeze(tf.matmul(vectors["negatives"], vectors["user"][..., None]), -1)) - positive  # [b, N]
        known = tf.cast(batch["negatives"] >= 0, tf.float32)
        count = tf.maximum(tf.reduce_sum(known, axis=1), 1.0)
        if kind == "bpr":
            return tf.reduce_sum(tf.nn.softplus(above) * known, axis=1) / count
        violation = tf.nn.relu(1.0 + above) * known
        rank = tf.reduce_sum(tf.cast(violation > 0, tf.float32), axis=1) / count * float(items)
        return tf.math.log1p(rank) * tf.reduce_max(violation, axis=1)

    return loss


@dataclass(frozen=True)
class Towers:
    """A member that is trained on pairs, as joint training sees it: scores are products of users and items.

    Attributes:
        model: `user` and `target` int32 `[b]`, `history` int32 `[b, L]` and what `gather` gives, or some of them ->
            `user` `[b, D]` or `[b, K, D]` (the best of K products counts), and `item` `[b, D]`, in the type that they
            are multiplied in.
        temperature: divides the products in the softmax.
        groups: which optimizer moves which variables.
        finish: makes the member what its weights now say; called when it is to be measured, and at the end.
        gather: item numbers int `[b]` -> what else the model reads of the targets.
    """

    model: keras.Model
    temperature: float
    groups: Sequence[Group]
    finish: Callable[[], None]
    gather: Callable[[np.ndarray], Features] = lambda items: {}


class TowerMember(Member):
    """A member that can be trained alone, or with others by the gradient of their fused scores (`recsys.joint`)."""

    accelerations: ClassVar[tuple[str, ...]] = ("precision", "xla")

    @classmethod
    def joins(cls, config: Any) -> bool:
        """Whether the settings allow training with others."""
        return True

    @abc.abstractmethod
    def towers(self, data: TrainingData, options: RunOptions, precision: Precision = "float32") -> Towers:
        """The member as it starts training with others, in `precision`; its variables are made in the scope of the
        strategy."""


def train_towers(
    model: keras.Model,
    scorer: Callable[[], tf.Module],
    data: TrainingData,
    pairs: PairSource,
    config: object,
    options: RunOptions,
    loss: Loss | None = None,
) -> History:
    """Trains a pair of towers on `pairs`, with an in-batch softmax unless `loss` is given; after each epoch the
    scorer is measured on the validation users."""
    from fusion.training.trainer import fit  # the trainer is not needed where fitted members are only scored

    validate = data.validate
    return fit(
        model,
        loss or in_batch_softmax(model, config.temperature),  # type: ignore[attr-defined]
        (len(pairs), pairs.gather),
        config.training,  # type: ignore[attr-defined]
        options,
        (lambda: validate(scorer())) if validate else None,
        data.monitor,
        parse_metric(data.monitor, "candidates").higher_is_better,
        drop_remainder=len(pairs) >= config.training.batch_size,  # type: ignore[attr-defined]
    )
