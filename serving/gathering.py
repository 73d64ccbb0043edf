"""Quick requests that come through an event loop, put together and computed on the loop itself.

To hand a call of the graph to a thread and its answers back costs more than a small call takes: the two threads take
turns at the interpreter, and each turn wakes the other. 16 clients of a small graph were answered 2,070 times a second
by a thread, and 2,790 times by the loop.

A loop hears of requests one by one, so it would compute each alone. While they keep coming it pays to wait until some
are there; a caller who is alone must not wait. Which it is, is learned from what came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

ENOUGH = 12
"""More are not waited for. What a graph reads, it reads once for all of them; from 16 rows on TensorFlow wakes other
threads."""
SILENCE_S = 0.001
"""After so long without another request those that wait are computed."""
LONGEST_PAUSE = 1024
"""The most batches until it is tried again whether waiting for one request more pays."""

Request = TypeVar("Request")


class Gathering(Generic[Request]):
    """Requests of one kind that wait for each other. Used from its event loop only.

    Now and then it waits for one request more than before. Where that one comes, the next is tried at once; where
    silence ends the waiting, it waits for as many as came, and twice as long passes until the next trial. So of a
    caller who is alone one request in 1,024 waits in vain.

    Args:
        loop: computes.
        compute: answers requests.
        most: that are waited for, if that is less than `ENOUGH`. More may come at a moment.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, compute: Callable[[list[Request]], None], most: int = ENOUGH
    ) -> None:
        self.loop = loop
        self._compute = compute
        self._enough = min(most, ENOUGH)
        self._requests: list[Request] = []
        self._latest = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._wanted, self._trial = 1, False
        self._pause = self._calm = 1  # batches between two trials, and until the next

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Takes a request, which is computed soon."""
        self._requests.append(request)
        self._latest = self.loop.time()
        if len(self._requests) == self._wanted:
            # Not now: others may be ready in the same turn of the loop.
            self.loop.call_soon(self._whole)
        elif len(self._requests) == 1:
            self._timer = self.loop.call_at(self._latest + SILENCE_S, self._silent)

    def _whole(self) -> None:
        """As many are there as were wanted."""
        if self._trial:
            self._pause = self._calm = 1
        self._calm -= 1
        self._trial = self._calm <= 0 and self._wanted < self._enough
        self._wanted += self._trial
        self._computed()

    def _silent(self) -> None:
        """Nobody may have come for a while."""
        if len(self._requests) >= self._wanted:  # they are computed in this turn
            return
        due = self._latest + SILENCE_S
        if self.loop.time() < due:
            self._timer = self.loop.call_at(due, self._silent)
            return
        self._wanted, self._trial = len(self._requests), False
        self._pause = self._calm = min(2 * self._pause, LONGEST_PAUSE)
        self._computed()

    def _computed(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        requests, self._requests = self._requests, []
        self._compute(requests)
