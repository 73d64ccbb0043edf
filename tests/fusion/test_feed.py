"""What lies between the threads that gather batches and the loop that trains on them: a bounded queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.training.batches import AHEAD, BatchPlan, Block, Feed, Rows
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import Features, History, RunOptions

N, BATCH = 48, 4
LONG = 10.0
"""Seconds after which a thread is taken to have been forgotten."""


class Gathering:
    """Rows that are their own numbers, and a note of every batch that is gathered."""

    def __init__(self, before: Callable[[int], None] = lambda first: None) -> None:
        self.begun: list[int] = []
        self._before = before
        self.rows = Rows(N, self._gather)

    def _gather(self, numbers: np.ndarray) -> Features:
        self.begun.append(int(numbers[0]))
        self._before(int(numbers[0]))
        return {"row": numbers}

    def feed(self, workers: int, stop: int = N // BATCH) -> Feed:
        return Feed(self.rows, BatchPlan(N, BATCH, 1, True), np.arange(N), 0, stop, workers)


def rows_of(blocks: list[Block]) -> list[int]:
    return [int(row) for block in blocks for row in block.inputs["row"].numpy().ravel()]


def eventually(condition: Callable[[], bool]) -> bool:
    ends = time.monotonic() + LONG
    while not condition() and time.monotonic() < ends:
        time.sleep(0.001)
    return condition()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.mark.parametrize("workers", [1, 2])
def test_producers_wait_for_a_slow_trainer(workers: int) -> None:
    """I3: back-pressure: however long the trainer takes, no more than a bound is gathered ahead of it."""
    gathering, bound = Gathering(), AHEAD * workers
    with gathering.feed(workers) as feed:
        for taken in range(1, 4):
            assert len(feed.next_blocks(steps=1)) == 1
            ahead = bound + taken - 1  # of which the bound was there when this one was asked for
            assert eventually(lambda ahead=ahead: len(gathering.begun) == ahead)
            time.sleep(0.02)
            assert len(gathering.begun) == ahead


def test_batches_are_gathered_while_the_trainer_works() -> None:
    """I3: the next batch is begun, and done, without being asked for."""
    second = threading.Event()
    gathering = Gathering(lambda first: second.set() if first == BATCH else None)
    with gathering.feed(workers=1) as feed:
        feed.next_blocks(steps=1)
        assert second.wait(LONG)


def test_order_is_that_of_the_epoch_whichever_thread_is_faster() -> None:
    """I3: the first batch is finished last, and comes first; each row comes once, however many steps a task holds."""
    others = threading.Event()
    gathering = Gathering(lambda first: others.wait(LONG) if first == 0 else others.set() if first == BATCH else None)
    with gathering.feed(workers=2) as feed:
        found = rows_of(feed.next_blocks(steps=1))
        for steps in (3, 1, 2, 50, 50):
            found += rows_of(feed.next_blocks(steps))
        while blocks := feed.next_blocks(5):
            found += rows_of(blocks)
        assert found == list(range(N)) and feed.next_blocks(1) == []


def test_an_error_of_a_producer_reaches_the_trainer_where_its_batch_would_have_come() -> None:
    """I3: what was gathered before it is not lost, and no thread is."""

    def fail(first: int) -> None:
        if first == 2 * BATCH:
            raise OSError("the disk has gone")

    with Gathering(fail).feed(workers=2) as feed:
        assert rows_of(feed.next_blocks(1) + feed.next_blocks(1)) == list(range(2 * BATCH))
        with pytest.raises(OSError, match="the disk has gone"):
            feed.next_blocks(1)
    assert threads() == []


def test_an_early_end_leaves_no_thread_and_no_work() -> None:
    """I3: a trainer that stops, by Ctrl-C or an error, takes its producers with it."""
    gathering = Gathering(lambda first: time.sleep(0.01))
    with pytest.raises(KeyboardInterrupt), gathering.feed(workers=2) as feed:
        feed.next_blocks(1)
        assert threads()
        raise KeyboardInterrupt
    begun = len(gathering.begun)
    assert threads() == [] and begun < N // BATCH
    time.sleep(0.03)
    assert len(gathering.begun) == begun


def test_waiting_is_counted_where_it_happens() -> None:
    """F12: seconds without a batch, of a slow producer; of a slow trainer hardly any."""
    with Gathering(lambda first: time.sleep(0.05)).feed(workers=1, stop=3) as feed:
        while feed.next_blocks(1):
            pass
        assert 0.15 <= feed.waited
    with Gathering().feed(workers=1, stop=3) as feed:
        feed.next_blocks(1)
        first = feed.waited
        assert eventually(lambda: all(future.done() for future in feed._pending))
        feed.next_blocks(1)
        assert feed.waited - first < 0.05


# ---- each row counts once -------------------------------------------------------------------------------------


def counting_model() -> keras.Model:
    """One weight a row, which a step of it lowers by exactly 1 when the rate is the size of the batch."""
    row = keras.Input((), dtype=tf.int64, name="row")
    weight = keras.layers.Embedding(N, 1, embeddings_initializer="zeros")(row)
    return keras.Model(row, keras.layers.Reshape(())(weight))


def count(gathering: Gathering, directory: Path, model: keras.Model) -> History:
    training = TrainingSettings(
        epochs=3, batch_size=BATCH, optimizer="sgd", learning_rate=float(BATCH), checkpoint_steps=5, workers=2
    )
    options = RunOptions(seed=1, directory=directory, quiet=True)
    return fit(model, lambda batch: model(batch["row"], training=True), gathering.rows, training, options, None)


def test_each_row_counts_once_an_epoch_though_it_is_delivered_again_after_an_interruption(tmp_path: Path) -> None:
    """I3: at-least-once delivery, and its effect exactly once: a checkpoint takes back what is delivered again."""
    asked: list[int] = []

    def interrupt(first: int) -> None:
        asked.append(first)
        if len(asked) == 16 + 19:  # 16 rows are looked at beforehand; then the 19th of 36 batches
            raise KeyboardInterrupt

    first, second, model = Gathering(interrupt), Gathering(), counting_model()
    with pytest.raises(KeyboardInterrupt):
        count(first, tmp_path, counting_model())
    history = count(second, tmp_path, model)
    np.testing.assert_array_equal(model.get_weights()[0].ravel(), np.full(N, -3.0))
    assert len(first.begun) + len(second.begun) - 32 > 3 * N // BATCH, "some batches were gathered twice"
    assert len(history.epochs) == 3 and history.samples < 3 * N
    assert 0 <= history.pace()["input_wait"] < 1 < history.pace()["samples_per_s"]
