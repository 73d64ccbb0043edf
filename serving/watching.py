"""Every call of a model, seen by the monitor of its version; what an alarm leads to is done by `serving.actions`.

Whatever door a question comes through, it ends in a call of a signature: there it is watched, and the statistics are
kept by a thread of their own, so that no answer waits for them. When that thread cannot follow, calls go uncounted.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion.export.baseline import Baseline, Series, of_classes, of_lists
from serving.actions import CLOSE_S, Handler, Watch, ended
from serving.errors import ServingError
from serving.inputs import Arrays
from serving.metrics import METRICS, Labels
from serving.monitoring import Alarm, Monitor, Observation

if TYPE_CHECKING:
    from serving.model_store import Servable

logger = logging.getLogger(__name__)

LISTS, CLASSES = ("recommend", "fuse"), ("serving_default",)
"""The signatures that are watched, by kind of artifact."""
WAITING = 10_000
"""Calls that may wait to be counted."""

Answer = Callable[[], Arrays]
"""Gives the outputs of a call, or raises what it failed with."""


class _Call(NamedTuple):
    model: str
    version: int
    folder: Path
    members: tuple[str, ...]
    signature: str
    inputs: Arrays
    answer: Answer
    seconds: float


class Watching:
    """The monitors of all versions that answer.

    Args:
        watch: how closely, and what is done about alarms.
        do: actions by model: `rollback` and `drop_member`, as `serving.actions.Handler` takes them, but with the
            model's name first.
        served: the versions of a model that are available now; others are forgotten when a new one comes.
    """

    def __init__(
        self, watch: Watch, do: Mapping[str, Callable[..., object]], served: Callable[[str], Collection[int]]
    ) -> None:
        self._watch, self._do, self._served = watch, do, served
        self._monitors: Mapping[tuple[str, int], Monitor] = {}  # replaced by the thread, never changed
        self._handlers: dict[str, Handler] = {}
        self._calls: queue.Queue[_Call | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="watching", daemon=True)
        self._thread.start()
        self._unwatch = METRICS.watch(self._gauges)

    def called(self, servable: Servable, signature: str, inputs: Arrays, answer: Answer, seconds: float) -> None:
        """Notes a call that has ended; returns at once.

        Args:
            servable: what was called.
            signature, inputs: with what, already checked.
            answer: gives its outputs, or raises.
            seconds: from question to answer.
        """
        manifest = servable.predictor.manifest
        if signature not in (CLASSES if manifest.kind == "classifier" else LISTS):
            return
        which = servable.name, servable.version, servable.folder  # not the version itself, which might be leaving
        call = _Call(*which, manifest.members, signature, inputs, answer, seconds)
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            METRICS.count("serving_unwatched", (servable.name,))

    def report(self) -> dict[str, Any]:
        """The monitors' reports by `model/version`."""
        return {f"{name}/{version}": monitor.report() for (name, version), monitor in self._monitors.items()}

    def _gauges(self) -> Iterator[tuple[str, Labels, float]]:
        """How far each series is from training, of every version whose window is full."""
        for which, found in self.report().items():
            model, _, version = which.rpartition("/")
            for series, distances in found["drift"].items():
                for measure, distance in distances.items():
                    yield "serving_drift", (model, version, series, measure), distance

    def close(self, within_s: float = CLOSE_S) -> None:
        """Ends after what waits is counted and acted upon, or without it once so many seconds have passed."""
        self._unwatch()
        limit = time.monotonic() + within_s
        if not ended(self._thread, self._calls, within_s):
            logger.error("the calls that wait to be counted take too long; they are left")
        for handler in list(self._handlers.values()):
            handler.close(max(limit - time.monotonic(), 0.0))

    def _monitor(self, call: _Call) -> Monitor:
        key = call.model, call.version
        known = self._monitors.get(key)
        if known is not None:
            return known
        if call.model not in self._handlers:
            self._handlers[call.model] = self._handler(call.model)
        alarmed = self._alarmed(call.model, self._handlers[call.model])
        monitor = Monitor(Baseline.read(call.folder), self._watch.monitor, alarmed, version=call.version)
        left = {other: kept for other, kept in self._monitors.items() if other[1] in self._served(other[0])}
        self._monitors = {**left, key: monitor}
        return monitor

    def _handler(self, model: str) -> Handler:
        do = {name: (lambda *given, act=act: act(model, *given)) for name, act in self._do.items()}
        return Handler(self._watch.rules, do)

    @staticmethod
    def _alarmed(model: str, handler: Handler) -> Callable[[Alarm], None]:
        def alarmed(alarm: Alarm) -> None:
            METRICS.count("serving_alarms", (model, alarm.kind, alarm.series))
            handler(alarm)

        return alarmed

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                _count(call, self._monitor(call))
            except Exception:  # a fault in counting must not end the thread that counts
                logger.exception("a call of %s could not be counted", call.signature)


def _count(call: _Call, monitor: Monitor) -> None:
    milliseconds = 1000 * call.seconds
    try:
        outputs = call.answer()
    except (CancelledError, asyncio.CancelledError):  # of a thread's future, and of an event loop's
        return  # nobody waits for the answer any more
    except ServingError as error:
        if error.http_status >= 500:  # others are the caller's own fault
            monitor.observe(Observation(milliseconds=milliseconds, failed=True))
        return
    monitor.observe_all(_series(call, outputs), milliseconds)


def _series(call: _Call, outputs: Arrays) -> Series:
    if call.signature in CLASSES:
        return of_classes(outputs["probabilities"], call.inputs["mask"], call.members)
    return of_lists(call.inputs["history"], outputs, call.members)
