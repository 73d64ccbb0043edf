"""Micro-batching: requests that wait at the same moment are computed together.

A worker takes the oldest request and whatever waits beside it that fits into one call of the graph. A lone client is
therefore answered at once, and the batch grows by itself while the graph is busy. The queue is bounded: what does not
fit is refused at once with the time after which to come back. Nobody waits for company there.

Calls of the graph that are known to be quick are computed on the event loop that asks (`soon`), without a thread; on it
a few wait for each other while others keep coming (`serving.gathering`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.export.manifest import Signature
from serving.errors import DeadlineExceeded, Overloaded, ServingError, Unavailable
from serving.gathering import Gathering
from serving.inputs import Arrays
from serving.kept import Kept, Key
from serving.limits import check_bounds
from serving.metrics import METRICS

logger = logging.getLogger(__name__)

Run = Callable[[str, Arrays], Arrays]

ALIKE = 16
"""Lists of text up to this width are padded to one width and computed together; wider ones only with those of the same
power of two, so that nobody pays for the longest list of somebody else."""
CLOSE_S = 10.0
"""The longest that a call of the graph is waited for at the end: one that hangs must not keep a server from stopping
or other versions from being loaded."""
FIRST_GUESS_S = 0.05
"""What a batch is assumed to take before one was measured."""
QUICK_S = 0.002
"""Batches that take less may be computed on an event loop: nobody else on it waits for longer."""
MOST_KINDS = 64
"""Of so many signatures with shapes it is known how long they take: the latest ones."""


@dataclass(frozen=True)
class BatchSettings:
    """How requests are put together and computed.

    Attributes:
        max_rows: most rows of one call of the graph. A request with more is computed alone.
        queue: most requests that wait, for one version of one model.
        threads: calls of the graph at once. TensorFlow uses all its cores in one call, so one is usually best.
        cores: that TensorFlow keeps busy; None is all.
        keep: answers that are kept for whoever asks the same again (`serving.kept`), for one version; None keeps none.
            Most have some 10 kB, none above 64 kB.
    """

    max_rows: int = 64
    queue: int = 256
    threads: int = 1
    cores: int | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(eq=False)
class _Entry:
    signature: str
    arrays: Arrays
    rows: int
    key: tuple[object, ...]
    deadline: float | None
    future: Future[Arrays] | asyncio.Future[Arrays]
    since: float
    question: Key | None = None
    """Under which its answer is kept."""


class Batcher:
    """The queue and the worker threads of one loaded version. Safe to use from any thread.

    Args:
        run: computes one signature on checked arrays whose first axis is the rows.
        signatures: by name, the inputs and outputs.
        settings: how much is put together.
        name: of the model, for messages, metrics and the threads.
        changes: how often the graph has changed; kept answers of before are forgotten.
    """

    def __init__(
        self,
        run: Run,
        signatures: Mapping[str, Signature],
        settings: BatchSettings,
        name: str,
        changes: Callable[[], int] = int,
    ) -> None:
        self._run = run
        self._kept = None if settings.keep is None else Kept(settings.keep, changes)
        self._settings = settings
        self._name = name
        self._paddable = {signature for signature, spec in signatures.items() if _fixed_outputs(spec)}
        self._waiting: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = FIRST_GUESS_S  # of a batch, smoothed
        self._kinds = threading.Lock()
        self._seconds_of: dict[tuple[object, ...], float] = {}  # by kind of request (`_key`), the latest last
        self._gathered: dict[tuple[object, ...], Gathering[_Entry]] = {}
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{name}-{number}", daemon=True)
            for number in range(settings.threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, signature: str, arrays: Arrays, deadline: float | None = None) -> Future[Arrays]:
        """Puts one request into the queue; its answer or error comes through the future.

        A future that is cancelled while it waits is never computed.

        Args:
            signature: its name.
            arrays: its inputs, checked (`Predictor.check`).
            deadline: `time.monotonic()` after which nobody waits for the answer any more.

        Raises Overloaded when the queue is full, Unavailable when the version is being unloaded.
        """
        future: Future[Arrays] = Future()
        entry = self._entry(signature, arrays, deadline, future)
        if self._answered(entry):
            return future
        late: list[_Entry] = []
        try:
            with self._changed:
                if self._closed:
                    raise self._unloaded()
                if len(self._waiting) >= self._settings.queue:
                    late = self._make_room()
                if len(self._waiting) >= self._settings.queue:
                    raise self._overloaded()
                self._waiting.append(entry)
                self._changed.notify()
        finally:
            for other in late:
                _wanted(other)  # tells whoever waits for it that it is late; not under the lock, which they may need
        return future

    def soon(self, signature: str, arrays: Arrays) -> asyncio.Future[Arrays] | None:
        """Puts one row to those that are computed together on the running event loop, where calls of its kind are known
        to be quick; what is kept is answered at once. None where they are not, and where the queue is full: `submit`
        it. One loop at a time may ask.

        A future that is cancelled while it waits is never computed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Arrays] = loop.create_future()
        entry = self._entry(signature, arrays, None, future)
        if self._answered(entry):
            return future
        quick = entry.rows == 1 and self._seconds_of.get(entry.key, math.inf) < QUICK_S
        if not quick or self._closed or self.depth >= self._settings.queue:
            return None
        gathering = self._gathered.get(entry.key)
        if gathering is None or gathering.loop is not loop:
            gathering = self._gathered[entry.key] = Gathering(loop, self._compute_here, self._settings.max_rows)
        gathering.add(entry)
        return future

    def _entry(self, signature: str, arrays: Arrays, deadline: float | None, future: Any) -> _Entry:
        rows = len(next(iter(arrays.values())))
        entry = _Entry(signature, arrays, rows, self._key(signature, arrays), deadline, future, time.monotonic())
        if self._kept is not None:
            entry.question = self._kept.key(signature, arrays)
        return entry

    def _answered(self, entry: _Entry) -> bool:
        """Whether the answer was kept; it then has it."""
        if self._kept is None or entry.question is None or self._closed:
            return False
        answer = self._kept.get(entry.question)
        if answer is None:
            return False
        METRICS.count("serving_kept_answers", (self._name,))
        entry.future.set_result(answer)
        return True

    def _compute_here(self, entries: list[_Entry]) -> None:
        """On an event loop."""
        left = [entry for entry in entries if not entry.future.done()]
        for start in range(0, len(left), self._settings.max_rows):  # each has one row
            self._compute(left[start : start + self._settings.max_rows])

    def _make_room(self) -> list[_Entry]:
        """Takes out of the queue what nobody waits for any more; returns it."""
        now = time.monotonic()
        gone = [e for e in self._waiting if e.future.cancelled() or (e.deadline is not None and now >= e.deadline)]
        self._waiting = deque(entry for entry in self._waiting if entry not in gone)
        return gone

    @property
    def depth(self) -> int:
        """How many requests wait."""
        return len(self._waiting) + sum(map(len, tuple(self._gathered.values())))

    def close(self, within_s: float = CLOSE_S) -> None:
        """Answers what waits and ends the threads; one that hangs is left alone, and what waits behind it refused."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        limit = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(limit - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in self._threads):
            logger.error("a call of '%s' hangs; it is left behind", self._name)
        with self._changed:
            left, self._waiting = self._waiting, deque()
        for entry in left:
            if _wanted(entry):
                entry.future.set_exception(self._unloaded())

    def _unloaded(self) -> Unavailable:
        return Unavailable(f"this version of '{self._name}' is being unloaded; send the request again.")

    def _overloaded(self) -> Overloaded:
        batches = 1 + len(self._waiting) / (self._settings.max_rows * self._settings.threads)
        pause = round(max(batches * self._seconds, 0.001), 3)
        return Overloaded(
            f"the queue of '{self._name}' is full: {len(self._waiting)} of {self._settings.queue} requests wait; "
            f"come back in {pause:g} s.",
            retry_after=pause,
        )

    def _key(self, signature: str, arrays: Arrays) -> tuple[object, ...]:
        """Requests with the same key can be computed in one call."""
        if signature not in self._paddable:
            return (signature, *[array.shape[1:] for array in arrays.values()])
        return (signature, *[_width(array) if _is_list(array) else array.shape[1:] for array in arrays.values()])

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            batch = [entry for entry in batch if _wanted(entry)]
            if batch:
                self._compute(batch)
            del batch  # or the last answer would live until the next request comes

    def _next(self) -> list[_Entry] | None:
        """The oldest entry and those that fit to it, in the order of their arrival; None at the end."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            first = self._waiting.popleft()
            batch, rows, left = [first], first.rows, deque[_Entry]()
            while self._waiting and rows < self._settings.max_rows:
                entry = self._waiting.popleft()
                if entry.key == first.key and rows + entry.rows <= self._settings.max_rows:
                    batch.append(entry)
                    rows += entry.rows
                else:
                    left.append(entry)
            self._waiting.extendleft(reversed(left))
            return batch

    def _compute(self, batch: list[_Entry]) -> None:
        started = time.monotonic()
        rows = sum(entry.rows for entry in batch)
        try:
            answers = self._together(batch, rows)
        except Exception as error:
            self._alone(batch, error)
        else:
            for entry, answer in zip(batch, answers, strict=True):
                if self._kept is not None and entry.question is not None:
                    self._kept.put(entry.question, answer)
                entry.future.set_result(answer)
            self._took(batch[0].key, time.monotonic() - started)  # what is refused says nothing of what is answered
        seconds = time.monotonic() - started
        self._seconds += 0.1 * (seconds - self._seconds)
        METRICS.batch(self._name, rows, seconds, started - batch[0].since)

    def _took(self, kind: tuple[object, ...], seconds: float) -> None:
        """Remembers how long a batch of one kind took."""
        with self._kinds:
            before = self._seconds_of.pop(kind, seconds)
            self._seconds_of[kind] = before + 0.1 * (seconds - before)  # behind those that came earlier
            if len(self._seconds_of) > MOST_KINDS:
                del self._seconds_of[next(iter(self._seconds_of))]

    def _together(self, batch: list[_Entry], rows: int) -> list[Arrays]:
        first = batch[0]
        if len(batch) == 1:
            return [self._run(first.signature, first.arrays)]
        merged = {name: _joined([entry.arrays[name] for entry in batch]) for name in first.arrays}
        answer = self._run(first.signature, merged)
        short = [name for name, value in answer.items() if len(value) != rows]
        if short:
            raise ServingError(f"'{first.signature}' must answer {rows} rows; '{short[0]}' has another number.")
        parts, start = [], 0
        for entry in batch:
            parts.append({name: value[start : start + entry.rows] for name, value in answer.items()})
            start += entry.rows
        return parts

    def _alone(self, batch: list[_Entry], error: Exception) -> None:
        """One request of a batch may have spoilt it for the others: each is computed again by itself."""
        for entry in batch:
            if len(batch) > 1:
                try:
                    entry.future.set_result(self._run(entry.signature, entry.arrays))
                    continue
                except Exception as own:
                    error = own
            entry.future.set_exception(_ours(error))


def _wanted(entry: _Entry) -> bool:
    """Whether somebody still waits for it; answers those whose time is over."""
    assert isinstance(entry.future, Future)
    if not entry.future.set_running_or_notify_cancel():
        return False
    if entry.deadline is not None and time.monotonic() >= entry.deadline:
        entry.future.set_exception(DeadlineExceeded("the deadline passed while the request waited in the queue."))
        return False
    return True


def _ours(error: Exception) -> ServingError:
    if isinstance(error, ServingError):
        return error
    return ServingError(f"unexpected {type(error).__name__}: {error}")


def _fixed_outputs(signature: Signature) -> bool:
    """Whether no output has an axis, beside the rows, that could follow the width of an input."""
    return all(None not in spec.shape[1:] for spec in signature.outputs.values())


def _is_list(array: np.ndarray) -> bool:
    return array.dtype == object and array.ndim == 2


def _width(array: np.ndarray) -> int:
    width: int = array.shape[1]
    return ALIKE if width <= ALIKE else 1 << (width - 1).bit_length()


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Rows below each other; lists of text are padded with b'' to the widest."""
    if not _is_list(arrays[0]) or len({array.shape[1] for array in arrays}) == 1:
        return np.concatenate(arrays)
    joined = np.full((sum(map(len, arrays)), max(array.shape[1] for array in arrays)), b"", object)
    start = 0
    for array in arrays:
        joined[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return joined
