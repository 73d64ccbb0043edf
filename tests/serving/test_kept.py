"""Answers that are kept, and never beyond a change (O13)."""

import asyncio
import threading

import numpy as np
import pytest

from fusion.export.manifest import Signature, TensorSpec
from serving.batching import Batcher, BatchSettings
from serving.kept import LARGEST_ANSWER, LARGEST_QUESTION, Kept
from serving.metrics import METRICS


def question(*ids, k=1):
    return {"ids": np.array([list(ids)], object), "k": np.array([k])}


def answer(n):
    return {"n": np.array([n])}


@pytest.fixture
def changes():
    return [0]


@pytest.fixture
def kept(changes):
    return Kept(2, lambda: changes[0])


def test_what_was_asked_longest_ago_leaves(kept):
    keys = [kept.key("count", question(b"a", k=k)) for k in (1, 2, 3)]
    kept.put(keys[0], answer(1))
    kept.put(keys[1], answer(2))
    assert kept.get(keys[0])["n"] == 1
    kept.put(keys[2], answer(3))
    assert [kept.get(key) is not None for key in keys] == [True, False, True] and len(kept) == 2


def test_questions_differ_by_signature_values_and_shapes(kept):
    asked = [
        ("count", question(b"a", b"b")),
        ("other", question(b"a", b"b")),
        ("count", question(b"ab", b"")),
        ("count", question(b"a", b"b", k=2)),
        ("count", {"x": np.zeros((1, 2, 3))}),
        ("count", {"x": np.zeros((1, 3, 2))}),
    ]
    assert len({kept.key(*given) for given in asked}) == len(asked)


def test_several_rows_and_large_ones_are_not_kept(kept):
    assert kept.key("count", {"k": np.zeros(2)}) is None
    assert kept.key("count", question(b"a" * (LARGEST_QUESTION + 1))) is None
    assert kept.key("embed", {"x": np.zeros((1, LARGEST_QUESTION))}) is None
    key = kept.key("count", question(b"a"))
    kept.put(key, {"n": np.zeros((1, LARGEST_ANSWER))})
    kept.put(key, {"n": np.array([[b"a" * LARGEST_ANSWER]], object)})
    assert kept.get(key) is None


def test_what_is_kept_cannot_be_written_and_holds_no_batch(kept):
    batch, key = np.arange(100), kept.key("count", question(b"a"))
    kept.put(key, {"n": batch[3:4]})
    batch[3] = 0
    found = kept.get(key)["n"]
    assert found == [3] and found.base is None
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_nothing_outlives_a_change(kept, changes):
    """Also not what was being computed while the graph changed."""
    before, under_way = (kept.key("count", question(b"a", k=k)) for k in (1, 2))
    kept.put(before, answer(1))
    changes[0] += 1
    kept.put(under_way, answer(2))
    assert len(kept) == 0
    assert [kept.get(kept.key("count", question(b"a", k=k))) for k in (1, 2)] == [None, None]


class Graph:
    def __init__(self):
        self.calls = 0

    def __call__(self, signature, arrays):
        self.calls += len(arrays["k"])
        return {"n": arrays["k"] + 1}


def test_a_batcher_asks_its_graph_once(changes):
    """From threads and on an event loop; another version, or one that keeps nothing, has answers of its own. What the
    graph took is counted by model (O12), and kept answers take nothing."""
    graph, spec = Graph(), Signature({}, {"n": TensorSpec("int64", (None,))})
    batcher = Batcher(graph, {"count": spec}, BatchSettings(keep=8), "kept-toy", lambda: changes[0])
    seen = METRICS.value("serving_kept_answers", ("kept-toy",))
    taken = METRICS.value(":tensorflow:serving:runtime_latency", ("kept-toy",))
    try:
        for _ in range(3):
            assert batcher.submit("count", question(b"a")).result(5)["n"].tolist() == [2]
        assert graph.calls == 1

        async def asked():
            return await batcher.soon("count", question(b"a"))

        assert asyncio.run(asked())["n"].tolist() == [2] and graph.calls == 1
        assert METRICS.value("serving_kept_answers", ("kept-toy",)) == seen + 3
        changes[0] += 1
        assert batcher.submit("count", question(b"a")).result(5)["n"].tolist() == [2] and graph.calls == 2
        assert METRICS.value(":tensorflow:serving:runtime_latency", ("kept-toy",)) == taken + 2
    finally:
        batcher.close()
    plain = Batcher(graph, {"count": spec}, BatchSettings(), "plain-toy")
    for _ in range(2):
        plain.submit("count", question(b"a")).result(5)
    plain.close()
    assert graph.calls == 4


def test_many_threads_share_what_is_kept(kept):
    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 5, 300):
            key = kept.key("count", question(b"a", k=int(number)))
            found = kept.get(key)
            assert found is None or found["n"] == number
            kept.put(key, answer(int(number)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 2
