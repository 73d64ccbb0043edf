"""Feeds the training loop: the order of rows as a function of (seed, epoch), and batches gathered ahead.

The order of an epoch is a permutation that is drawn anew from its number, so the whole position in the data is two
integers, which a checkpoint can hold.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np

from fusion.compat import tf
from fusion.errors import DataError
from fusion.types import Features

AHEAD = 2
"""Tasks per worker that are begun before the first of them is taken."""

_TASK_BYTES = 16 << 20
"""Several batches are gathered as one task only up to this size."""

_SAMPLES = 16
"""Rows looked at to learn which axes vary."""

_SORTED_BATCHES = 32
"""Batches whose rows are sorted by length together; other rows meet in each epoch, because they are drawn anew."""


class Rows(NamedTuple):
    """Rows that are gathered on demand, out of a memory map or of files.

    Attributes:
        n: number of rows.
        gather: takes row numbers int64 [b] and returns named arrays with the leading axis b; once per batch, from
            worker threads. Other axes may differ from batch to batch, as when texts are padded to the longest.
        lengths: int [n], for rows of unequal length: rows of similar length then share a batch.
    """

    n: int
    gather: Callable[[np.ndarray], Features]
    lengths: np.ndarray | None = None


def as_rows(data: Mapping[str, np.ndarray] | Rows | tuple[int, Callable[[np.ndarray], Features]]) -> Rows:
    """Named arrays of equal length, or (n, gather), as `Rows`. Raises DataError when there is nothing to read."""
    if isinstance(data, Mapping):
        lengths = {name: len(array) for name, array in data.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"training arrays must be of one length; received {lengths or 'none'}.")
        arrays = dict(data)
        rows = Rows(next(iter(lengths.values())), lambda i: {name: array[i] for name, array in arrays.items()})
    else:
        rows = Rows(*data)
    if rows.n < 1:
        raise DataError("training needs at least one row; received none.")
    return rows


def epoch_order(seed: int, epoch: int, n: int, lengths: np.ndarray | None = None, batch_size: int = 1) -> np.ndarray:
    """The row numbers of an epoch in the order of training, int64 [n].

    With `lengths` [n] the full batches among each `_SORTED_BATCHES` are drawn first, then sorted by length, so that
    little of a batch is padding; and at last the batches are shuffled. The rows after the last full batch stay last.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(n)
    if lengths is None:
        return order
    full = n // batch_size * batch_size
    window = _SORTED_BATCHES * batch_size
    for start in range(0, full, window):
        drawn = order[start : min(start + window, full)]
        order[start : start + len(drawn)] = drawn[np.argsort(lengths[drawn], kind="stable")]
    order[:full] = random.permutation(order[:full].reshape(-1, batch_size)).reshape(-1)
    return order


@dataclass(frozen=True)
class BatchPlan:
    """How n rows are cut into the batches of an epoch.

    Attributes:
        n: number of rows.
        batch_size: rows of a batch over all replicas.
        shares: equal parts that a batch must have: one a device, or several where it accumulates gradients.
        drop_remainder: leave out the rows after the last full batch (another set of rows each epoch).
    """

    n: int
    batch_size: int
    shares: int
    drop_remainder: bool

    @property
    def full(self) -> int:
        """Full batches of an epoch."""
        return self.n // self.batch_size

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.full if self.drop_remainder else math.ceil(self.n / self.batch_size)

    def rows_until(self, position: int) -> int:
        """Rows in the first `position` batches."""
        return min(position * self.batch_size, self.n)


@dataclass(frozen=True)
class Block:
    """Consecutive batches of one shape.

    Attributes:
        inputs: named tensors [steps, batch, ...].
        weights: float32 [steps, batch], 1 / rows of the batch, and 0 for rows that only fill it up.
    """

    inputs: dict[str, tf.Tensor]
    weights: tf.Tensor

    @property
    def steps(self) -> int:
        return int(self.weights.shape[0])

    @property
    def samples(self) -> int:
        """Rows of all its batches, those that only fill one up among them."""
        return self.steps * int(self.weights.shape[1])

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in self.inputs.values())


class Feed:
    """The batches of one epoch from `start` to `stop`, gathered by threads while the model trains.

    Between the threads and whoever trains lies a bounded queue: of a slow trainer at most `AHEAD` tasks a worker lie
    waiting, because a task is begun when one is taken. Batches come in the order of the epoch, each once, whichever
    thread was faster, and an error of a thread is raised where its batch would have come.

    Use it as a context manager; `next_blocks` returns an empty list when all are handed out. After the context no
    thread is left, whether or not all batches were taken.

    Attributes:
        waited: seconds in which `next_blocks` had nothing to hand out yet.
    """

    def __init__(self, rows: Rows, plan: BatchPlan, order: np.ndarray, start: int, stop: int, workers: int) -> None:
        self._rows, self._plan, self._order = rows, plan, order
        self._next, self._stop = start, stop
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="feed")
        self._ahead = AHEAD * workers
        self._pending: deque[Future[list[Block]]] = deque()
        self.waited = 0.0

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next_blocks(self, steps: int) -> list[Block]:
        """The next batches, in blocks of one shape; `steps` is how many batches the tasks begun now should take."""
        while len(self._pending) < self._ahead and self._next < self._stop:
            until = min(self._next + steps, self._stop)
            self._pending.append(self._pool.submit(self._blocks, range(self._next, until)))
            self._next = until
        if not self._pending:
            return []
        began = time.monotonic()
        blocks = self._pending.popleft().result()
        self.waited += time.monotonic() - began
        return blocks

    def _blocks(self, positions: range) -> list[Block]:
        # Gathered batch by batch, not as one: what a batch holds, down to its padding, must not depend on how many
        # steps a call happens to take.
        batches = [self._batch(position) for position in positions]
        with tf.device("/CPU:0"):  # each replica fetches its own slice
            return [_stack(list(alike)) for _, alike in itertools.groupby(batches, _shapes)]

    def _batch(self, position: int) -> tuple[Features, np.ndarray]:
        size, shares = self._plan.batch_size, self._plan.shares
        numbers = self._order[position * size : (position + 1) * size]
        # A short batch is filled up to a multiple of the shares with repeated rows of weight 0, because
        # every replica must get as many rows. They do enter the statistics of BatchNormalization.
        filled = math.ceil(len(numbers) / shares) * shares
        weights = np.zeros(filled, np.float32)
        weights[: len(numbers)] = 1.0 / len(numbers)
        return self._rows.gather(np.resize(numbers, filled)), weights


def _shapes(batch: tuple[Features, np.ndarray]) -> list[tuple[int, ...]]:
    features, weights = batch
    return [weights.shape, *(features[name].shape for name in features)]


def _stack(batches: list[tuple[Features, np.ndarray]]) -> Block:
    return Block(
        {name: tf.convert_to_tensor(np.stack([features[name] for features, _ in batches])) for name in batches[0][0]},
        tf.convert_to_tensor(np.stack([weights for _, weights in batches])),
    )


@dataclass(frozen=True)
class RowShapes:
    """What a few rows tell about all of them.

    Attributes:
        shapes: by name, the shape of a row; None where it varies.
        bytes: the most that a row takes.
    """

    shapes: dict[str, tuple[int | None, ...]]
    bytes: int

    @classmethod
    def of(cls, rows: Rows) -> RowShapes:
        """Looks at rows evenly spread over the data."""
        samples = [rows.gather(np.array([number])) for number in np.linspace(0, rows.n - 1, _SAMPLES).astype(np.int64)]
        shapes = {name: array.shape[1:] for name, array in samples[0].items()}
        for sample in samples[1:]:
            shapes = {name: common_shape(shapes[name], array.shape[1:]) for name, array in sample.items()}
        return cls(shapes, max(sum(array.nbytes for array in sample.values()) for sample in samples))

    def most_steps(self, batch_size: int, limit: int) -> int:
        """How many batches may be gathered as one task without holding too much memory."""
        return int(np.clip(_TASK_BYTES // max(1, self.bytes * batch_size), 1, limit))


def common_shape(a: Sequence[int | None], b: Sequence[int | None]) -> tuple[int | None, ...]:
    """The shape that both have, with None where they differ."""
    return tuple(left if left == right else None for left, right in zip(a, b, strict=True))
