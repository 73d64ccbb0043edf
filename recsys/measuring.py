"""What fitting holds in memory, and how many users a second a scorer ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from fusion.compat import tf
from recsys import retrieval
from recsys.collaborative.base import PADDING


class PeakMemory:
    """Measures what a block of code holds at most, beyond what the process held when it began.

    The resident set is read every `every` seconds by a thread: what is there for less may be missed, and what was freed
    before but not given back to the system is used again unseen. Sizes from some megabytes on are right.

    >>> with PeakMemory() as memory:
    ...     block = bytearray(50_000_000)
    >>> 45_000_000 < memory.bytes < 200_000_000
    True
    """

    def __init__(self, every: float = 0.02) -> None:
        self.every = every
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(self.every):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)


def users_per_second(
    score: Callable[[tf.Tensor], tf.Tensor], histories: np.ndarray, k: int = 20, seconds: float = 1.0
) -> float:
    """Users a second for whom the whole catalogue is scored, what they have seen left out, and the best k are taken.

    Args:
        score: histories int32 `[B, L]` to scores float32 `[B, I]`, as a member's scorer or a `RankingCore`.
        histories: int32 `[B, L]` padded with -1: one block of typical users, scored again and again.
        k: items per user.
        seconds: for how long, after one call that traces; at least one more call is made.
    """

    def best(block: tf.Tensor, seen: tf.Tensor) -> Any:
        return retrieval.top_k(retrieval.exclude(score(block), seen), k)

    call = tf.function(best, reduce_retracing=True)
    rows, places = np.nonzero(histories != PADDING)
    seen = tf.constant(np.stack([rows, histories[rows, places]], axis=1).astype(np.int32))
    block = tf.constant(histories.astype(np.int32))
    call(block, seen)[1].numpy()
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        call(block, seen)[1].numpy()
        calls += 1
    return calls * len(histories) / (time.perf_counter() - started)
