"""Members asked one by one, side by side, so that one that fails or hangs costs its own share of the answer only.

The way round a fault. While all is well the one signature `recommend` is faster; it runs its members in parallel within
the graph.

Nobody waits here beyond the deadline: what may hang runs in a thread of its own, and the caller goes when its time is
over. The thread cannot be stopped. Of a `CancellationManager` TensorFlow 2.21 asks in loops only, a chain of other
operations runs to its end, and the one way to hand it to a function is a global that all threads share. So threads are
counted instead: while too many hang, nothing new is started.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import numpy as np

from fusion.export.manifest import Manifest
from serving.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServingError, Unavailable
from serving.inputs import Arrays

PREFIX, FUSE = "member_", "fuse"
WHO = ("user_id", "history")
"""The inputs of `recommend` that members get; the others are for `fuse`."""
SILENT = "had nothing to say"
"""Why a member is not in the answer that was asked in vain: no fault, an unknown user for instance."""
LEAST_S = 0.005
"""With less time than this nobody is asked: it takes as long to start a thread for each member."""
FAIR_S = 0.1
"""Who waited less says nothing about the model: a caller in a hurry must not get it paused for the others."""

Call = Callable[[str, Arrays], Arrays]
"""Signature and checked inputs -> outputs, at once and beside all other calls: `Servable.aside`."""


def asked_apart(manifest: Manifest) -> bool:
    """Whether an artifact has the signatures that ask its members one by one."""
    return FUSE in manifest.signatures and all(PREFIX + name in manifest.signatures for name in manifest.members)


def gone_round(manifest: Manifest, signature: str) -> bool:
    """Whether a signature is one that others stand in for where it fails or hangs."""
    return asked_apart(manifest) and (signature in ("recommend", FUSE) or signature.startswith(PREFIX))


class Breaker:
    """Keeps callers from what keeps failing (circuit breaker, M. Nygard, Release It!, 2007).

    Closed, every call passes. After `failures` in a row it is open: none passes for `pause_s` seconds. Then it is half
    open: one call passes and decides, and until it has, at most one more passes after each further pause.
    """

    def __init__(self, failures: int, pause_s: float) -> None:
        self._failures, self._pause_s = failures, pause_s
        self._lock = threading.Lock()
        self._failed = 0
        self._closed_at = 0.0

    def allows(self) -> bool:
        """Whether this caller may call. Who is allowed says afterwards how it went."""
        with self._lock:
            if self._failed < self._failures:
                return True
            now = time.monotonic()
            if now < self._closed_at:
                return False
            self._closed_at = now + self._pause_s
            return True

    def succeeded(self) -> None:
        """Closes."""
        with self._lock:
            self._failed = 0

    def failed(self, error: ServingError, waited_s: float) -> None:
        """Opens, when it was not the first time. What one request brought, or was too short for, does not count.

        Args:
            error: what came instead of an answer.
            waited_s: how long it was waited for.
        """
        if isinstance(error, InvalidRequest) or (isinstance(error, DeadlineExceeded) and waited_s < FAIR_S):
            return
        with self._lock:
            self._failed += 1
            self._closed_at = time.monotonic() + self._pause_s


@dataclass(frozen=True)
class Spoken:
    """What members said: scores float32 `[1, S, I]`, NaN where they are silent, and why some said nothing at all."""

    scores: np.ndarray
    reasons: Mapping[str, str]


class Members:
    """The members of one loaded version.

    Args:
        names: in the order of axis S.
        places: requests that are answered so at once; others wait for a place, for each asks all members at the
            same time, past the queue. A member that hangs keeps at most twice as many threads, and `fuse` as many.
        failures, pause_s: of each member's Breaker, and of that of `fuse`.
    """

    def __init__(self, names: tuple[str, ...], places: int = 4, failures: int = 3, pause_s: float = 10.0) -> None:
        self.names = names
        self._places = threading.BoundedSemaphore(places)
        self._threads = {name: threading.BoundedSemaphore(2 * places) for name in names}
        self._breakers = {name: Breaker(failures, pause_s) for name in names}
        self._fuse = Breaker(failures, pause_s)

    def answer(
        self,
        call: Call,
        inputs: Arrays,
        members_until: float,
        deadline: float,
        without: Collection[str] = (),
    ) -> tuple[Arrays, Mapping[str, str]]:
        """What `fuse` makes of the answers of the members, and by member that is not in it why.

        Args:
            call: of one signature.
            inputs: of `recommend`, checked.
            members_until: `time.monotonic()` until which members are waited for.
            deadline: and until which `fuse` is.
            without: members that are not asked.

        Raises Overloaded without a place, Unavailable when nobody can be asked, the error of a member when none of
        them answers, that of `fuse`, and DeadlineExceeded when the time is over.
        """
        if not self._fuse.allows():
            raise Unavailable("members are not asked one by one for a while, since their answers could not be fused.")
        left = members_until - time.monotonic()
        if left < LEAST_S:
            raise DeadlineExceeded("the deadline passed, or nearly so, before members could be asked.")
        if not self._places.acquire(timeout=left / 2):  # the other half is for the members
            raise Overloaded("too many requests wait for members that are asked one by one; try again.", 1.0)
        try:
            spoken = self._ask(call, {name: inputs[name] for name in WHO}, members_until, without)
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("the deadline passed before the members had answered.")
        except BaseException:
            self._places.release()
            raise
        # From here on the place belongs to the thread: `fuse` that hangs keeps it.
        fused = _in_thread(lambda: call(FUSE, {**inputs, "scores": spoken.scores}), FUSE, self._places.release)
        return self._fused(fused, deadline), spoken.reasons

    def _fused(self, fused: Future[Arrays], deadline: float) -> Arrays:
        started = time.monotonic()
        answer = _result(fused, deadline - started)
        if isinstance(answer, ServingError):
            self._fuse.failed(answer, time.monotonic() - started)
            raise answer
        self._fuse.succeeded()
        return answer

    def _ask(self, call: Call, who: Arrays, until: float, without: Collection[str]) -> Spoken:
        """Asks every member but those of `without` and those that are paused or busy, and waits for them."""
        reasons: dict[str, str] = {}
        asked: dict[str, Future[Arrays]] = {}
        for name in self.names:
            if name in without:
                reasons[name] = "was taken out"
            elif not self._breakers[name].allows():
                reasons[name] = "is paused, since it kept failing"
            elif not self._threads[name].acquire(blocking=False):
                reasons[name] = "is still busy with earlier requests"
            else:
                ask = partial(call, PREFIX + name, who)
                asked[name] = _in_thread(ask, f"member-{name}", self._threads[name].release)
        if not asked:
            raise Unavailable("no member can be asked now: all are paused, busy or were taken out; try again.")
        said = self._said(asked, until, reasons)
        silent = np.full_like(next(iter(said.values())), np.nan)
        return Spoken(np.stack([said.get(name, silent) for name in self.names], axis=1), reasons)

    def _said(
        self, asked: Mapping[str, Future[Arrays]], until: float, reasons: dict[str, str]
    ) -> dict[str, np.ndarray]:
        """Scores by member that answered in time; notes why the others did not. Raises the error of one of them when
        none did."""
        started = time.monotonic()
        wait(asked.values(), max(until - started, 0))
        waited = time.monotonic() - started
        said: dict[str, np.ndarray] = {}
        failure: ServingError = DeadlineExceeded("no member answered in time; allow more time, or try again.")
        for name, future in asked.items():
            answer = _result(future, 0)
            if isinstance(answer, ServingError):
                self._breakers[name].failed(answer, waited)
                late = isinstance(answer, DeadlineExceeded)
                reasons[name] = "did not answer in time" if late else "failed"
                failure = failure if late else answer
                continue
            self._breakers[name].succeeded()
            said[name] = answer["scores"]
            if not np.isfinite(said[name]).any():
                reasons[name] = SILENT
        if not said:
            raise failure
        return said


def _in_thread(call: Callable[[], Arrays], name: str, ended: Callable[[], object]) -> Future[Arrays]:
    """What `call` returns, or the ServingError that it fails with, from a thread. `ended` is called when it has ended,
    which may be never.

    A thread of its own, not one of a pool: a pool waits for a hanging call when the process ends.
    """
    future: Future[Arrays] = Future()

    def work() -> None:
        try:
            answer, failure = call(), None
        except ServingError as error:
            failure = error
        except Exception as error:  # whatever it is, it must not take the others along
            failure = ServingError(f"'{name}' failed: {type(error).__name__}.")
        ended()  # before anybody who asks for a place next hears of the answer
        if failure is None:
            future.set_result(answer)
        else:
            future.set_exception(failure)

    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as error:  # the system gives no more threads
        ended()
        raise Overloaded("the machine has no thread left for this request; try again.", 1.0) from error
    return future


def _result(future: Future[Arrays], seconds: float) -> Arrays | ServingError:
    """What came within so many seconds; DeadlineExceeded, as a value, when nothing did."""
    try:
        return future.result(max(seconds, 0))
    except TimeoutError:
        return DeadlineExceeded("the deadline passed before the answers of the members were fused.")
    except ServingError as error:
        return error
