"""Asynchronous steps with parameter servers: each worker takes the newest weights, and sends its gradients when ready.

The coordinator gathers the batches and hands them to whichever worker is free, so the order of rows, the epochs, the
checkpoints and the history are those of every other run. What is not the same from run to run is which weights a step
saw: its gradient may be of weights that are up to `UNDER_WAY` calls a worker older than those it is added to (Dean et
al. 2012, "Large scale distributed deep networks"; the bound is that of Ho et al. 2013, stale synchronous parallel). A
step whose worker dies is done again by another one, and is then taken twice if the first had sent its gradients.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fusion.compat import tf
from fusion.training.batches import Block
from fusion.training.cluster import find_place

UNDER_WAY = 2
"""Calls a worker that may wait or run at once: one is done while the next is on its way."""


def is_asynchronous(strategy: Any) -> bool:
    """Whether steps are taken by workers of parameter servers."""
    return isinstance(strategy, tf.distribute.ParameterServerStrategy)


class Scheduler:
    """Lets the workers of a parameter-server strategy train on blocks, a bounded number of them at a time."""

    def __init__(self, strategy: Any) -> None:
        self._coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)  # one a strategy, however often made
        # TensorFlow's finalizer waits for the thread of each worker, and that of a lost one waits for it to come back.
        # An object that is referred to for ever is not finalized when the process ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._coordinator))
        place = find_place()
        self._bound = UNDER_WAY * len(place.jobs["worker"] if place else ())

    def results(self, calls: Iterable[tuple[Block, Callable[..., tf.Tensor]]]) -> Iterator[tuple[Block, np.ndarray]]:
        """Each block with the losses that its program returned, in the order of the calls.

        When it ends, all gradients have arrived. Errors of a program, and the loss of a parameter server, are raised;
        the loss of a worker is not one.
        """
        waiting: deque[tuple[Block, Any]] = deque()
        for block, program in calls:
            waiting.append((block, self._coordinator.schedule(program, args=(block.inputs, block.weights))))
            while len(waiting) >= self._bound:
                yield self._finished(*waiting.popleft())
        while waiting:
            yield self._finished(*waiting.popleft())
        self._coordinator.join()

    def _finished(self, block: Block, losses: Any) -> tuple[Block, np.ndarray]:
        return block, np.asarray(losses.fetch())
