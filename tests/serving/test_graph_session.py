"""The session that calls an artifact's graph: the same answers with any cores, from many threads, and nothing kept."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fusion.compat import tf
from serving.graph_session import GraphSession
from serving.worker import _graph_cores


def asked(users):
    rows = len(users)
    nothing = np.full((rows, 1), b"", object)
    lists = {"history": nothing, "exclude": nothing, "include": nothing}
    return {"user_id": np.array(users, object), "k": np.full(rows, 3, np.int32), **lists}


def test_equals_tensorflow_function(artifact):
    """O1 O4: a session gives, array by array, what the loaded function gives, whatever the cores."""
    function = tf.saved_model.load(str(artifact)).signatures["recommend"]
    users = [b"u1", b"nobody", b"u0"]
    expected = function(**{name: tf.constant(value) for name, value in asked(users).items()})
    for cores in (None, 1, 2):
        found = GraphSession(artifact, cores).run("recommend", asked(users))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == expected[name].numpy().dtype
            np.testing.assert_array_equal(value, expected[name].numpy())


def test_threads_share_it(artifact):
    session = GraphSession(artifact)
    users = [[b"u1"], [b"nobody"], [b"u0"]] * 20
    alone = [session.run("recommend", asked(one))["scores"] for one in users[:3]]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: session.run("recommend", asked(one))["scores"], users))
    for place, scores in enumerate(together):
        np.testing.assert_array_equal(scores, alone[place % 3])


def test_a_folder_without_a_graph(tmp_path):
    with pytest.raises((OSError, RuntimeError)):
        GraphSession(tmp_path)


def test_it_leaves_when_nobody_holds_it(artifact):
    """O11: an unloaded version gives its variables back."""
    session = GraphSession(artifact)
    session.run("recommend", asked([b"u1"]))
    inner = weakref.ref(session._session)
    del session
    gc.collect()
    assert inner() is None


@pytest.mark.parametrize(("cores", "workers", "expected"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 2, 3), (2, 4, 1)])
def test_the_doors_keep_a_core(monkeypatch, cores, workers, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert _graph_cores(workers) == expected
