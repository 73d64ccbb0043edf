"""Micro-batching with a fake graph in numpy: what is put together, what is not, and who gets which answer."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from fusion.export.manifest import Signature, TensorSpec
from serving import batching
from serving.batching import ALIKE, Batcher, BatchSettings
from serving.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServingError, Unavailable

TEXTS = TensorSpec("string", (None, None))
SIGNATURES = {
    "count": Signature({"ids": TEXTS, "k": TensorSpec("int32", (None,))}, {"n": TensorSpec("int64", (None,))}),
    "widths": Signature({"ids": TEXTS}, {"lengths": TensorSpec("int64", (None, None))}),
}


class Graph:
    """Counts the ids of a row and adds k; k = 13 spoils the whole call. `widths` answers one number for each id.

    While `gate` is closed a call waits, so that a test decides what queues up behind it.
    """

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.calls = []

    def __call__(self, signature, arrays):
        self.entered.release()
        assert self.gate.wait(5)
        self.calls.append((signature, len(arrays["ids"])))
        if signature == "widths":
            return {"lengths": np.vectorize(len, otypes=[np.int64])(arrays["ids"])}
        if (arrays["k"] == 13).any():
            raise InvalidRequest("13 is not a number")
        return {"n": (arrays["ids"] != b"").sum(axis=1) + arrays["k"]}


@pytest.fixture
def graph():
    return Graph()


@pytest.fixture
def make(graph):
    made = []

    def build(**settings):
        made.append(Batcher(graph, SIGNATURES, BatchSettings(**settings), "toy"))
        return made[-1]

    yield build
    graph.gate.set()
    for batcher in made:
        batcher.close()


def texts(*rows):
    array = np.full((len(rows), max(map(len, rows), default=0)), b"", object)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array


def request(*rows, k=0):
    return {"ids": texts(*rows), "k": np.full(len(rows), k, np.int32)}


def held(graph, batcher):
    """A first request that is being computed until the gate opens."""
    graph.gate.clear()
    first = batcher.submit("count", request([b"first"]))
    assert graph.entered.acquire(timeout=5)
    return first


def test_a_lone_request_is_answered_at_once(make, graph):
    """O13: nobody waits for company."""
    batcher = make()
    assert batcher.submit("count", request([b"a", b"b"], k=5)).result(5)["n"].tolist() == [7]
    assert graph.calls == [("count", 1)]


def test_what_waits_is_computed_together_and_everybody_gets_their_rows(make, graph):
    batcher = make()
    first = held(graph, batcher)
    others = [batcher.submit("count", request([b"x"] * n, [b"y"], k=n)) for n in (0, 1, 3, 16)]
    assert batcher.depth == 4
    graph.gate.set()
    assert first.result(5)["n"].tolist() == [1]
    assert [f.result(5)["n"].tolist() for f in others] == [[0, 1], [2, 2], [6, 4], [32, 17]]
    assert graph.calls == [("count", 1), ("count", 8)]


def test_no_batch_has_more_rows_than_allowed_and_the_oldest_goes_first(make, graph):
    batcher = make(max_rows=4)
    first = held(graph, batcher)
    sizes = [3, 2, 1, 6]
    futures = [batcher.submit("count", request(*[[b"a"]] * size)) for size in sizes]
    graph.gate.set()
    assert [len(f.result(5)["n"]) for f in (first, *futures)] == [1, *sizes]
    assert graph.calls == [("count", 1), ("count", 4), ("count", 2), ("count", 6)]  # 3 + 1, 2, and 6 alone


def test_only_alike_requests_share_a_call(make, graph):
    batcher = make()
    held(graph, batcher)
    narrow, wide = request([b"a"]), request([b"a"] * 1000)
    futures = [batcher.submit("count", arrays) for arrays in (narrow, wide, narrow, wide)]
    lists = [batcher.submit("widths", {"ids": texts(row)}) for row in ([b"ab"], [b"a", b"abc"], [b"abcd"])]
    graph.gate.set()
    assert [int(f.result(5)["n"][0]) for f in futures] == [1, 1000, 1, 1000]
    assert [f.result(5)["lengths"].tolist() for f in lists] == [[[2]], [[1, 3]], [[4]]]  # nothing padded
    assert sorted(graph.calls[1:]) == [("count", 2), ("count", 2), ("widths", 1), ("widths", 2)]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(make, graph):
    """O10: load is shed with a sentence."""
    batcher = make(queue=2)
    held(graph, batcher)
    waiting = [batcher.submit("count", request([b"a"])) for _ in range(2)]
    started = time.monotonic()
    with pytest.raises(
        Overloaded, match=r"queue of 'toy' is full: 2 of 2 requests wait; come back in 0\.\d+ s"
    ) as info:
        batcher.submit("count", request([b"a"]))
    assert time.monotonic() - started < 0.5
    assert 0 < info.value.retry_after < 1
    graph.gate.set()
    assert [f.result(5)["n"].tolist() for f in waiting] == [[1], [1]]


def test_late_and_cancelled_requests_are_never_computed(make, graph):
    batcher = make()
    held(graph, batcher)
    late = batcher.submit("count", request([b"a"]), deadline=time.monotonic() + 0.02)
    gone = batcher.submit("count", request([b"a"]))
    kept = batcher.submit("count", request([b"a"]), deadline=time.monotonic() + 60)
    assert gone.cancel()
    time.sleep(0.03)
    graph.gate.set()
    assert kept.result(5)["n"].tolist() == [1]
    with pytest.raises(DeadlineExceeded, match="while the request waited"):
        late.result(5)
    with pytest.raises(CancelledError):
        gone.result(5)
    assert graph.calls == [("count", 1), ("count", 1)]


def test_one_bad_request_does_not_spoil_the_others(make, graph):
    batcher = make()
    held(graph, batcher)
    futures = [batcher.submit("count", request([b"a"], k=k)) for k in (1, 13, 2)]
    graph.gate.set()
    assert futures[0].result(5)["n"].tolist() == [2]
    assert futures[2].result(5)["n"].tolist() == [3]
    with pytest.raises(InvalidRequest, match="13 is not"):
        futures[1].result(5)


def test_a_fault_of_the_graph_becomes_an_error_of_ours_and_the_thread_lives_on(make):
    batcher = make()
    with pytest.raises(ServingError, match="unexpected KeyError"):
        batcher.submit("count", {"ids": texts([b"a"])}).result(5)  # no k
    assert batcher.submit("count", request([b"a"])).result(5)["n"].tolist() == [1]


def test_closing_answers_what_waits_and_ends_the_threads(make, graph):
    batcher = make(threads=2)
    before = {thread for thread in threading.enumerate() if thread.name.startswith("batch-toy")}
    assert len(before) == 2
    held(graph, batcher)
    graph.entered = threading.Semaphore(0)
    futures = [batcher.submit("count", request([b"a"] * n)) for n in (1, 40, 80)]
    graph.gate.set()
    batcher.close()
    assert [f.result(0)["n"].tolist() for f in futures] == [[1], [40], [80]]
    assert not any(thread.is_alive() for thread in before)
    with pytest.raises(Unavailable, match="being unloaded"):
        batcher.submit("count", request([b"a"]))


def known_as_quick(batcher, width=1):
    for _ in range(3):
        batcher.submit("count", request([b"a"] * width)).result(5)


def test_quick_requests_are_computed_on_the_loop(make, graph):
    """Only of kinds that are known to be quick; each gets its own answer or error, and whoever left none."""
    batcher = make()

    async def asked():
        assert batcher.soon("count", request([b"a"])) is None  # nothing is known yet
        known_as_quick(batcher)
        assert batcher.soon("count", request([b"a"] * (ALIKE + 1))) is None  # of wide ones
        known_as_quick(batcher, ALIKE + 1)
        del graph.calls[:]
        given = ((1, 0), (2, 13), (3, 5), (4, 0), (ALIKE + 1, 0))
        futures = [batcher.soon("count", request([b"a"] * n, k=k)) for n, k in given]
        futures[3].cancel()
        assert batcher.depth == 5
        return await asyncio.gather(*futures, return_exceptions=True)

    one, spoilt, three, gone, wide = asyncio.run(asked())
    assert [answer["n"].tolist() for answer in (one, three, wide)] == [[1], [8], [ALIKE + 1]]
    assert isinstance(spoilt, InvalidRequest) and isinstance(gone, asyncio.CancelledError)
    assert [rows for _, rows in graph.calls] == [3, 1, 1, 1, 1]  # what 13 spoils is computed one by one; the wide one
    assert batcher.depth == 0


def test_what_is_not_quick_goes_to_the_thread(make, graph, monkeypatch):
    batcher = make(queue=1)
    known_as_quick(batcher)

    async def taken(*rows):
        return batcher.soon("count", request(*rows)) is not None

    async def taken_beside_another():
        batcher.soon("count", request([b"a"]))
        return await taken([b"a"])

    assert asyncio.run(taken([b"a"]))
    assert not asyncio.run(taken([b"a"], [b"a"]))
    assert not asyncio.run(taken_beside_another())
    monkeypatch.setattr(batching, "QUICK_S", 0.0)
    assert not asyncio.run(taken([b"a"]))
    monkeypatch.undo()
    assert asyncio.run(taken([b"a"]))
    batcher.close()
    assert not asyncio.run(taken([b"a"]))


def test_kinds_whose_time_is_known_are_bounded(make, monkeypatch):
    """Shapes are the caller's choice; they must neither fill the memory nor keep what comes later from being known."""
    monkeypatch.setattr(batching, "MOST_KINDS", 2)
    batcher = make()
    for width in (1, ALIKE + 1, 2 * ALIKE + 1):
        known_as_quick(batcher, width)

    async def taken(width):
        return batcher.soon("count", request([b"a"] * width)) is not None

    assert [asyncio.run(taken(width)) for width in (1, ALIKE + 1, 2 * ALIKE + 1)] == [False, True, True]


def test_what_is_refused_is_not_known_to_be_quick(make):
    """A refusal takes no time; what would have been answered may take long."""
    batcher = make()
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            batcher.submit("count", request([b"a"], k=13)).result(5)

    async def taken():
        return batcher.soon("count", request([b"a"])) is not None

    assert not asyncio.run(taken())
    known_as_quick(batcher)
    assert asyncio.run(taken())


def test_batches_on_the_loop_have_at_most_so_many_rows(make, graph):
    batcher = make(max_rows=4)
    known_as_quick(batcher)
    del graph.calls[:]

    async def asked():
        return await asyncio.gather(*[batcher.soon("count", request([b"a"], k=k)) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8)])

    assert [answer["n"].item() for answer in asyncio.run(asked())] == list(range(1, 10))
    assert [rows for _, rows in graph.calls] == [4, 4, 1]


def test_settings_below_one_are_refused():
    for name in ("max_rows", "queue", "threads"):
        with pytest.raises(ValueError, match=f"'{name}' must be above 0"):
            BatchSettings(**{name: 0})


def test_many_clients_get_the_answers_of_single_calls(make):
    batcher = make(max_rows=16, threads=2)
    random = np.random.default_rng(0)
    sizes = random.integers([0, 14], 40, size=(200, 2))

    def ask(pair):
        width, k = map(int, pair)
        return batcher.submit("count", request([b"a"] * width, [b"b"], k=k)).result(10)["n"].tolist()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, sizes))
    assert answers == [[width + k, 1 + k] for width, k in sizes.tolist()]


def test_a_call_that_hangs_does_not_keep_the_batcher_from_closing(make, graph, caplog):
    batcher = make()
    graph.gate.clear()
    hung = batcher.submit("widths", {"ids": np.array([[b"a"]], object)})
    assert graph.entered.acquire(timeout=5)
    behind = batcher.submit("widths", {"ids": np.array([[b"b"]], object)})
    batcher.close(within_s=0.05)
    with pytest.raises(Unavailable, match="is being unloaded"):
        behind.result(0)
    assert not hung.done() and "hangs" in caplog.text
    graph.gate.set()
    assert hung.result(5)["lengths"].tolist() == [[1]]
