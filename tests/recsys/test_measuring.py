"""Costs that are measured: memory while fitting, and users a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusion.compat import tf
from recsys.evaluation import history_rows
from recsys.measuring import PeakMemory, users_per_second
from worlds import World, fitted


def test_memory_that_was_given_back_counts() -> None:
    """200 MB that are written and freed inside the block are its peak; nothing costs next to nothing."""
    with PeakMemory(every=0.002) as memory:
        held = np.ones(25_000_000)
        assert held.sum() == 25_000_000
        del held
    assert 150e6 < memory.bytes < 400e6
    with PeakMemory() as nothing:
        pass
    assert nothing.bytes < 20e6


def test_the_peak_is_there_after_an_error() -> None:
    with pytest.raises(KeyError), PeakMemory() as memory:
        held = np.ones(10_000_000)
        raise KeyError(held.size)
    assert memory.bytes > 60e6


def test_a_slow_scorer_ranks_fewer_users_a_second(tmp_path: Path) -> None:
    """A member of the planted world, and the same one made to do a lot of useless work."""
    world = World.planted()
    scorer = fitted({"kind": "item_knn", "neighbours": 10}, world.training(tmp_path), tmp_path).scorer()
    histories = history_rows(world.asked().history, world.asked().users[:32])
    asked = []

    def slow(history: tf.Tensor) -> tf.Tensor:
        asked.append(history.shape)
        useless = tf.random.stateless_normal([600, 600], seed=history[0, :2])  # no constant, which would be folded away
        for _ in range(40):
            useless = tf.tanh(useless @ useless)
        return scorer(history) + 1e-30 * tf.reduce_sum(useless)

    fast, slowed = users_per_second(scorer, histories, seconds=0.3), users_per_second(slow, histories, seconds=0.3)
    assert fast > 3 * slowed > 0
    assert asked[0][0] == 32  # a block at a time, not a user
