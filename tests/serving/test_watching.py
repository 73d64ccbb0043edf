"""P1, P2, P3: calls are counted by version beside the traffic, and alarms reach what the server can do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pytest

from fusion.export.baseline import Baseline, of_classes, of_lists
from serving.actions import Watch
from serving.errors import InvalidRequest, ServingError
from serving.metrics import METRICS
from serving.watching import Watching

MEMBERS = ("text", "taste")
RULES = {
    "monitor": {"window": 100, "every": 20},
    "rules": [
        {"when": "rate", "series": "silent_text", "do": [{"drop_member": "text"}]},
        {"when": "errors", "do": ["rollback"]},
    ],
}


def lists(rng, rows, *, text=True):
    """Inputs and outputs of `recommend`; without `text` that member adds nothing."""
    shares = rng.random((rows, 2, 3))
    shares[:, 0] *= text
    answer = {
        "item_ids": np.full((rows, 3), b"a", object),
        "scores": shares.sum(axis=1),
        "contributions": shares,
        "known_user": np.ones(rows, bool),
    }
    return {"history": np.full((rows, 2), b"x", object)}, answer


@pytest.fixture
def served(tmp_path):
    """A version with a baseline, and the list of what alarms did."""
    inputs, answer = lists(np.random.default_rng(0), 1000)
    baseline = Baseline.of(of_lists(inputs["history"], answer, MEMBERS))
    (tmp_path / "baseline.json").write_text(json.dumps(baseline.as_json()), encoding="utf-8")
    manifest = SimpleNamespace(kind="recommender", members=MEMBERS)
    servable = SimpleNamespace(name="films", version=3, folder=tmp_path, predictor=SimpleNamespace(manifest=manifest))
    return servable, []


def watching(done, served=(3,)):
    do = {
        "rollback": lambda model, version: done.append(f"rollback {model} {version}"),
        "drop_member": lambda model, name: done.append(f"{model} without {name}"),
    }
    return Watching(Watch.model_validate(RULES), do, lambda model: served)


def test_a_member_that_falls_silent_is_dropped(served):
    """P2, P3: within two hundred calls; whoever asks gets the alarm by name."""
    servable, done = served
    watched, rng = watching(done), np.random.default_rng(1)
    before = METRICS.value("serving_alarms", ("films", "rate", "silent_text"))
    for call in range(60):
        inputs, answer = lists(rng, 5, text=call < 20)
        watched.called(servable, "recommend", inputs, lambda answer=answer: answer, 0.003)
        watched.called(servable, "similar_items", {}, lambda: {}, 0.003)  # not watched
    watched.close()
    assert done == ["films without text"]
    report = watched.report()["films/3"]
    assert report["requests"] == 300 and "rate:silent_text" in report["alarms"]
    assert report["rates"]["silent_text"] == {"now": 1.0, "training": 0.0}
    assert METRICS.value("serving_alarms", ("films", "rate", "silent_text")) == before + 1


def test_distances_from_training_are_gauges(served):
    """P2: of versions whose window is full, as long as there is a watch."""
    servable, done = served
    watched = watching(done)
    inputs, answer = lists(np.random.default_rng(6), 60)
    for rows in (60, 120):
        watched.called(servable, "recommend", inputs, lambda: answer, 0.003)
        wait_for(lambda rows=rows: watched.report().get("films/3", {}).get("requests") == rows)
        text = METRICS.text().decode()
        assert ('serving_drift{model_name="films"' in text) == (rows == 120)
    for measure, distance in watched.report()["films/3"]["drift"]["top_score"].items():
        line = f'serving_drift{{model_name="films",version="3",series="top_score",measure="{measure}"}} {distance:.17g}'
        assert line in text.splitlines()
    watched.close()
    assert 'serving_drift{model_name="films"' not in METRICS.text().decode()


def test_only_faults_of_ours_are_errors(served):
    servable, done = served
    watched = watching(done)

    def fails(error):
        def answer():
            raise error

        return answer

    for error in (InvalidRequest("their fault"), CancelledError(), asyncio.CancelledError()):
        for _ in range(100):
            watched.called(servable, "recommend", {}, fails(error), 0.001)
    inputs, answer = lists(np.random.default_rng(2), 1)
    for _ in range(100):
        watched.called(servable, "recommend", inputs, lambda: answer, 0.003)
    wait_for(lambda: watched.report().get("films/3", {}).get("requests") == 100)
    assert done == []
    for _ in range(60):
        watched.called(servable, "fuse", {}, fails(ServingError("our fault")), 0.001)
    watched.close()
    assert done == ["rollback films 3"]


def test_a_call_that_cannot_be_counted_stops_nothing(served, caplog):
    servable, done = served
    watched = watching(done)
    watched.called(servable, "recommend", {}, lambda: {"scores": "nonsense"}, 0.001)
    inputs, answer = lists(np.random.default_rng(3), 2)
    watched.called(servable, "recommend", inputs, lambda: answer, 0.001)
    watched.close()
    assert "could not be counted" in caplog.text
    assert watched.report()["films/3"]["requests"] == 2


def test_classifications_are_watched(served):
    """P1: the confidence, and inputs that are missing."""
    servable, done = served
    servable.predictor.manifest.kind = "classifier"
    series = of_classes(np.tile([0.9, 0.1], (50, 1)), np.ones((50, 2)), MEMBERS)
    (servable.folder / "baseline.json").write_text(json.dumps(Baseline.of(series).as_json()), encoding="utf-8")
    watched = watching(done)
    answer = {"probabilities": np.array([[0.9, 0.1]] * 100)}
    mask = np.array([[0.0, 1.0]] * 100)
    watched.called(servable, "serving_default", {"mask": mask}, lambda: answer, 0.001)
    watched.close()
    assert done == ["films without text"]


def test_calls_that_cannot_be_followed_are_counted_as_such(served, monkeypatch):
    """P1: the queue is bounded; what does not fit is lost to the statistics and to nobody else."""
    servable, done = served
    monkeypatch.setattr("serving.watching.WAITING", 1)
    watched, hold = watching(done), threading.Event()
    before = METRICS.value("serving_unwatched", ("films",))
    inputs, answer = lists(np.random.default_rng(5), 1)

    def slow():
        hold.wait(20)
        return answer

    for _ in range(10):
        watched.called(servable, "recommend", inputs, slow, 0.001)
    assert METRICS.value("serving_unwatched", ("films",)) >= before + 8
    hold.set()
    watched.close()
    assert 1 <= watched.report()["films/3"]["requests"] <= 2


def test_versions_have_monitors_of_their_own(served):
    servable, done = served
    watched = watching(done, served=(4, 5))
    inputs, answer = lists(np.random.default_rng(4), 1)
    for version in (3, 4, 5):
        servable.version = version
        watched.called(servable, "recommend", inputs, lambda: answer, 0.001)
    watched.close()
    assert list(watched.report()) == ["films/4", "films/5"]


def test_versions_that_are_served_side_by_side_fill_their_windows(served, monkeypatch):
    """P1: however many take turns; their baselines are read once each, and not where calls are answered."""
    servable, done = served
    reads, read = [], Baseline.read
    monkeypatch.setattr(Baseline, "read", lambda folder: reads.append(threading.current_thread().name) or read(folder))
    watched = watching(done, served=(3, 4, 5))
    inputs, answer = lists(np.random.default_rng(4), 1)
    for call in range(90):
        servable.version = 3 + call % 3
        watched.called(servable, "recommend", inputs, lambda: answer, 0.001)
    watched.close()
    assert {name: found["requests"] for name, found in watched.report().items()} == {
        "films/3": 30,
        "films/4": 30,
        "films/5": 30,
    }
    assert reads == ["watching"] * 3


def test_the_end_does_not_wait_for_ever(served, monkeypatch, caplog):
    """P1: also where the queue is full, so that not even the order to end has a place in it."""
    servable, done = served
    monkeypatch.setattr("serving.watching.WAITING", 1)
    watched, hold = watching(done), threading.Event()
    for _ in range(10):
        watched.called(servable, "recommend", {}, lambda: hold.wait(20), 0.001)
    started = time.monotonic()
    watched.close(0.05)
    assert time.monotonic() - started < 2 and "they are left" in caplog.text
    hold.set()


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()
