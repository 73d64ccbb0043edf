"""Every call of a model, seen by the monitor of its version; what an alarm leads to is done by `serving.actions`.

Whatever door a question comes through, it ends in a call of a signature: there it is watched, and the statistics are
kept by a thread of their own, so that no answer waits for them. When that thread cannot follow, calls go uncounted.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion.export.baseline import Baseline, Series, of_classes, of_lists
from serving.actions import Handler, Watch
from serving.errors import ServingError
from serving.inputs import Arrays
from serving.metrics import METRICS
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
    monitor: Monitor
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
    """

    def __init__(self, watch: Watch, do: Mapping[str, Callable[..., object]]) -> None:
        self._watch, self._do = watch, do
        self._lock = threading.Lock()
        self._monitors: dict[tuple[str, int], Monitor] = {}
        self._handlers: dict[str, Handler] = {}
        self._calls: queue.Queue[_Call | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="watching", daemon=True)
        self._thread.start()

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
        call = _Call(self._monitor(servable), manifest.members, signature, inputs, answer, seconds)
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            METRICS.count("serving_unwatched", (servable.name,))

    def report(self) -> dict[str, Any]:
        """The monitors' reports by `model/version`."""
        with self._lock:
            monitors = dict(self._monitors)
        return {f"{name}/{version}": monitor.report() for (name, version), monitor in monitors.items()}

    def close(self) -> None:
        """Ends after what waits is counted and acted upon."""
        self._calls.put(None)
        self._thread.join()
        for handler in self._handlers.values():
            handler.close()

    def _monitor(self, servable: Servable) -> Monitor:
        key = servable.name, servable.version
        with self._lock:
            if key not in self._monitors:
                for other in [known for known in self._monitors if known[0] == key[0]][:-1]:
                    del self._monitors[other]  # the version before the last one does not come back
                if servable.name not in self._handlers:
                    self._handlers[servable.name] = self._handler(servable.name)
                handler = self._handlers[servable.name]
                baseline = Baseline.read(servable.folder)
                self._monitors[key] = Monitor(baseline, self._watch.monitor, self._alarmed(servable.name, handler))
            return self._monitors[key]

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
                _count(call)
            except Exception:  # a fault in counting must not end the thread that counts
                logger.exception("a call of %s could not be counted", call.signature)


def _count(call: _Call) -> None:
    milliseconds = 1000 * call.seconds
    try:
        outputs = call.answer()
    except (CancelledError, asyncio.CancelledError):  # of a thread's future, and of an event loop's
        return  # nobody waits for the answer any more
    except ServingError as error:
        if error.http_status >= 500:  # others are the caller's own fault
            call.monitor.observe(Observation(milliseconds=milliseconds, failed=True))
        return
    call.monitor.observe_all(_series(call, outputs), milliseconds)


def _series(call: _Call, outputs: Arrays) -> Series:
    if call.signature in CLASSES:
        return of_classes(outputs["probabilities"], call.inputs["mask"], call.members)
    return of_lists(call.inputs["history"], outputs, call.members)
