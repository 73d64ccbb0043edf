"""Training pairs (history, next item) for members that are trained with an in-batch softmax.

The history of a pair is what the user took, without the item that is to be predicted: the same shape of
question that the member will be asked, so a visitor and a trained user are no different to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from fusion.compat import keras, tf, tfrs
from fusion.types import Features, History, RunOptions
from recsys.collaborative.base import PADDING, TrainingData
from recsys.metrics import parse_metric


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


def in_batch_softmax(
    model: keras.Model, temperature: float = 1.0, accidental_hits: bool = True
) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """The loss `[b]` of TFRS's retrieval task: the other targets of the batch are the negatives, corrected for
    how often they are drawn (logQ, Yi et al. 2019) and without those that equal the target.

    `model` maps the batch, but for `probability`, to `user` `[b, D]` and `item` `[b, D]`.
    """
    task = tfrs().tasks.Retrieval(
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, reduction=keras.losses.Reduction.NONE),
        temperature=temperature,
        remove_accidental_hits=accidental_hits,
    )

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "probability"}
        vectors = model(inputs, training=True)
        return task(
            vectors["user"],
            vectors["item"],
            candidate_sampling_probability=batch["probability"],
            candidate_ids=batch["target"],
            compute_metrics=False,
        )

    return loss


def train_towers(
    model: keras.Model,
    scorer: Callable[[], tf.Module],
    data: TrainingData,
    pairs: Pairs,
    config: object,
    options: RunOptions,
) -> History:
    """Trains a pair of towers on `pairs`; after each epoch the scorer is measured on the validation users."""
    from fusion.training.trainer import fit  # the trainer is not needed where fitted members are only scored

    validate = data.validate
    return fit(
        model,
        in_batch_softmax(model, config.temperature),  # type: ignore[attr-defined]
        (len(pairs), pairs.gather),
        config.training,  # type: ignore[attr-defined]
        options,
        (lambda: validate(scorer())) if validate else None,
        data.monitor,
        parse_metric(data.monitor, "candidates").higher_is_better,
        drop_remainder=len(pairs) >= config.training.batch_size,  # type: ignore[attr-defined]
    )
