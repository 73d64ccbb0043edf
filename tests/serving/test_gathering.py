"""Which requests wait for each other on an event loop, on a loop whose clock the test moves."""

from types import SimpleNamespace

import pytest

from serving.gathering import ENOUGH, LONGEST_PAUSE, SILENCE_S, Gathering


class Loop:
    """What a Gathering uses of an event loop."""

    def __init__(self):
        self.now, self.ready, self.timers = 0.0, [], []

    def time(self):
        return self.now

    def call_soon(self, callback):
        self.ready.append(callback)

    def call_at(self, when, callback):
        timer = SimpleNamespace(when=when, callback=callback, cancelled=False)
        timer.cancel = lambda: setattr(timer, "cancelled", True)
        self.timers.append(timer)
        return timer

    def turn(self, seconds=0.0):
        """Time passes, then what is ready runs, and the timers that are due."""
        self.now += seconds
        ready, self.ready = self.ready, []
        due = [timer for timer in self.timers if timer.when <= self.now]
        self.timers = [timer for timer in self.timers if timer.when > self.now]
        for callback in ready:
            callback()
        for timer in due:
            if not timer.cancelled:
                timer.callback()


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def batches():
    return []


@pytest.fixture
def gathering(loop, batches):
    return Gathering(loop, batches.append)


def answered(loop, gathering, batches, callers, rounds, gap=SILENCE_S / 20):
    """Callers who ask one after another, and again when they are answered; the sizes of the batches."""
    del batches[:]
    waiting = 0
    for _ in range(rounds):
        if waiting < callers:
            gathering.add("request")
            waiting += 1
        before = len(batches)
        loop.turn(gap)
        waiting -= sum(map(len, batches[before:]))
    return [len(batch) for batch in batches]


def test_who_is_alone_hardly_ever_waits(loop, gathering, batches):
    """A request is computed in the next turn; trials whether waiting pays become rare."""
    waited = []
    for number in range(4 * LONGEST_PAUSE):
        gathering.add(number)
        loop.turn()
        if not batches:
            waited.append(number)
            loop.turn(SILENCE_S)
        assert batches.pop() == [number] and not batches
    assert waited[:4] == [1, 4, 9, 18] and len(waited) < 14
    assert len([number for number in waited if number >= 2 * LONGEST_PAUSE]) == 2


def test_many_callers_are_computed_together(loop, gathering, batches):
    sizes = answered(loop, gathering, batches, callers=16, rounds=1000)
    assert sizes[:3] == [1, 2, 3] and set(sizes[ENOUGH:]) == {ENOUGH}


def test_no_more_are_waited_for_than_may_be_computed_together(loop, batches):
    few = Gathering(loop, batches.append, most=4)
    sizes = answered(loop, few, batches, callers=16, rounds=1000)
    assert max(sizes) == 4 and set(sizes[4:]) == {4}


def test_three_callers_are_not_kept_waiting_for_a_fourth(loop, gathering, batches):
    answered(loop, gathering, batches, callers=16, rounds=1000)
    loop.turn(2 * SILENCE_S)
    start = loop.now
    sizes = answered(loop, gathering, batches, callers=3, rounds=3000)
    assert set(sizes[2:]) == {3}
    in_vain = (loop.now - start - len(sizes) * 3 * SILENCE_S / 20) / SILENCE_S
    assert in_vain < 12  # and nearly a thousand batches


def test_what_is_ready_in_one_turn_is_computed_together(loop, gathering, batches):
    for number in range(5):
        gathering.add(number)
    assert len(gathering) == 5
    loop.turn()
    assert batches == [[0, 1, 2, 3, 4]] and len(gathering) == 0


def test_silence_counts_from_the_latest(loop, gathering, batches):
    answered(loop, gathering, batches, callers=16, rounds=1000)
    loop.turn(2 * SILENCE_S)
    del batches[:]
    for number in range(3):
        gathering.add(number)
        loop.turn(0.9 * SILENCE_S)
    assert not batches
    loop.turn(0.2 * SILENCE_S)
    assert batches == [[0, 1, 2]]
