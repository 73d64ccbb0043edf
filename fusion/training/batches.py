"""Feeds the training loop: the order of rows as a function of (seed, epoch), and batches gathered ahead.

The order of an epoch is a permutation that is drawn anew from its number, so the whole position in the data is two
integers, which a checkpoint can hold.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np

from fusion.compat import tf
from fusion.errors import DataError
from fusion.types import Features

_AHEAD = 2
"""Blocks gathered ahead per worker."""

_BLOCK_BYTES = 16 << 20
"""A block of several batches is not made larger than this."""


class Rows(NamedTuple):
    """Rows that are gathered on demand, out of a memory map or of files.

    Attributes:
        n: number of rows.
        gather: takes row numbers int64 [b] and returns named arrays with the leading axis b. It is called from worker
            threads, and in their order when there is one worker.
    """

    n: int
    gather: Callable[[np.ndarray], Features]


def as_rows(data: Mapping[str, np.ndarray] | tuple[int, Callable[[np.ndarray], Features]]) -> Rows:
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


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The row numbers of an epoch in the order of training, int64 [n]."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@dataclass(frozen=True)
class BatchPlan:
    """How n rows are cut into the batches of an epoch.

    Attributes:
        n: number of rows.
        batch_size: rows of a batch over all replicas.
        replicas: devices that share a batch.
        drop_remainder: leave out the rows after the last full batch (another set of rows each epoch).
    """

    n: int
    batch_size: int
    replicas: int
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
    """Consecutive batches of one size.

    Attributes:
        start: position of the first batch in the epoch.
        inputs: named tensors [steps, batch, ...].
        weights: float32 [steps, batch], 1 / rows of the batch, and 0 for rows that only fill it up.
    """

    start: int
    inputs: dict[str, tf.Tensor]
    weights: tf.Tensor

    @property
    def steps(self) -> int:
        return int(self.weights.shape[0])


class Feed:
    """The batches of one epoch from a position on, gathered by threads while the model trains.

    Use it as a context manager; `next_block` returns None when the epoch, or the stretch up to `stop`, is over.
    """

    def __init__(
        self, rows: Rows, plan: BatchPlan, order: np.ndarray, start: int, stop: int, workers: int
    ) -> None:
        self._rows, self._plan, self._order = rows, plan, order
        self._next, self._stop = start, stop
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="feed")
        self._ahead = _AHEAD * workers
        self._pending: deque[Future[Block]] = deque()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next_block(self, steps: int) -> Block | None:
        """The next batches; `steps` is how many of them the blocks begun now should hold."""
        while len(self._pending) < self._ahead and self._next < self._stop:
            count = self._count(steps)
            self._pending.append(self._pool.submit(self._block, self._next, count))
            self._next += count
        return self._pending.popleft().result() if self._pending else None

    def _count(self, steps: int) -> int:
        if self._next >= self._plan.full:
            return 1  # the shorter last batch has a shape of its own
        return min(steps, self._plan.full - self._next, self._stop - self._next)

    def _block(self, start: int, count: int) -> Block:
        size = self._plan.batch_size
        numbers = self._order[start * size : (start + count) * size]
        real = min(size, len(numbers))
        # A short batch is filled up to a multiple of the replicas with repeated rows of weight 0, because
        # every replica must get as many rows. They do enter the statistics of BatchNormalization.
        filled = math.ceil(real / self._plan.replicas) * self._plan.replicas
        numbers = np.resize(numbers, count * filled) if filled != real else numbers
        weights = np.zeros((count, filled), np.float32)
        weights[:, :real] = 1.0 / real
        with tf.device("/CPU:0"):  # each replica fetches its own slice
            inputs = {
                name: tf.convert_to_tensor(np.reshape(array, (count, filled, *array.shape[1:])))
                for name, array in self._rows.gather(numbers).items()
            }
            return Block(start, inputs, tf.convert_to_tensor(weights))


def most_steps_per_block(rows: Rows, batch_size: int, limit: int) -> int:
    """How many batches a block may hold so that it stays small, from the size of one row."""
    row = rows.gather(np.zeros(1, np.int64))
    row_bytes = sum(array.nbytes for array in row.values())
    return int(np.clip(_BLOCK_BYTES // max(1, row_bytes * batch_size), 1, limit))
