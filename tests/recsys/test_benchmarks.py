"""Benchmarks: what they time is right, and they stand without the peer and without members that are not there."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from scipy import sparse

from command_line import run_tool
from fusion.errors import ConfigError
from recsys import benchmarks, pipeline_benchmark
from recsys.benchmarks import World, measure_world, recall, user_and_item_vectors
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import PADDING
from recsys.pipeline_benchmark import measure_pipelines
from recsys.tower_benchmark import measure_towers


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "in_own_process", lambda function, *arguments: function(*arguments))


def test_world_of_gowallas_size_has_its_counts() -> None:
    world = World.made("gowalla-size")
    assert world.train.shape == (29_858, 40_981)
    assert abs(world.train.nnz - 810_128) < 8_000 and abs(world.test.nnz - 217_242) < 4_000
    assert world.train.multiply(world.test).nnz == 0
    with pytest.raises(ConfigError, match="did you mean 'small-size'"):
        World.made("smal-size")


def test_recall_by_hand() -> None:
    """Of two held-out items one is listed, of one none; the third user has nothing held out."""
    test = sparse.csr_matrix(np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], np.float32))
    world = World(sparse.csr_matrix((3, 4), dtype=np.float32), test)
    assert recall(world, np.array([[2, 3], [0, 3], [0, 1]])) == pytest.approx(0.25)


def test_vectors_are_the_member_itself() -> None:
    """What is timed beside the peer are the scores that members give."""
    world = World.made("small-size")
    member = MEMBERS["ials"](MEMBERS["ials"].Config(factors=8, epochs=2))
    benchmarks._fit(member, world.train)
    users, items = user_and_item_vectors(member, world.train)
    for user in (0, 17, 599):
        taken = world.train[user].indices[None].astype(np.int32)
        padded = np.pad(taken, [(0, 0), (0, 3)], constant_values=PADDING)
        np.testing.assert_allclose(member.scorer()(padded)[0], items @ users[user], rtol=1e-4, atol=1e-5)


def test_a_world_is_measured_beside_the_peer() -> None:
    """A5: time, memory, throughput and quality of ours and of the peer in one run."""
    pytest.importorskip("implicit")
    measured = measure_world("small-size", ["item_knn", "no_such"], factors=8, epochs=2, rounds=1, k=10)
    assert measured["skipped"] == ["no_such is not registered"] and list(measured["members"]) == ["item_knn"]
    for system in ("ours", "implicit"):
        assert measured["als"][system]["epoch_s"] > 0 and measured["top_k"]["users_per_s"][system] > 0
    assert measured["als"]["ours"]["recall@10"] > 3 * 10 / 900, "far above chance"
    assert measured["als"]["speed_ratio"] > 0 and measured["top_k"]["speed_ratio"] > 0
    assert measured["top_k"]["share_of_top_k_alone"] > 0
    figures = measured["members"]["item_knn"]
    assert (
        figures["recall@10"] > 3 * 10 / 900
        and figures["fit_s"] > 0
        and figures["fit_cpu_s"] > 0
        and figures["users_per_s"] > 0
    )


def test_without_the_peer_ours_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    measured = json.loads(
        run_tool("benchmark", "--world", "small-size", "--factors", 8, "--epochs", 1, "--rounds", 1, "--json",
                 "--members").out
    )  # fmt: skip
    assert "implicit is not installed" in measured["skipped"][0] and measured["members"] == {}
    assert list(measured["als"]) == ["ours"] and "speed_ratio" not in measured["top_k"]


def test_command_line_takes_one_of_world_and_command() -> None:
    assert run_tool("benchmark").code == 2
    assert "small-size" in run_tool("benchmark", "--world", "moon-size").err


def test_text_shows_every_number() -> None:
    text = benchmarks.as_text({"a": {"b": 1.25, "c": 12345}, "name": "x", "skipped": ["y is not there"], "none": {}})
    assert [line.split() for line in text.splitlines()] == [
        ["a"], ["b", "1.25"], ["c", "12,345"], ["name", "x"], ["skipped:", "y", "is", "not", "there"],
    ]  # fmt: skip


def test_the_factorisation_is_measured_beside_tfrs() -> None:
    """A5: ours and TFRS's two towers, in turns, over the same pairs; two epochs are enough to beat chance."""
    measured = json.loads(run_tool("benchmark", "towers", "--on", "small-size", "--factors", 8, "--epochs", 2,
                                   "--json").out)  # fmt: skip
    for system in ("ours", "tfrs", "tfrs_cached"):
        assert measured[system]["samples_per_s"] > 0 and measured[system]["recall@20"] > 20 / 900, "above chance"
        assert measured[system]["recall@20"] == max(measured[system]["by_epoch"].values())
        assert set(measured[system]["by_epoch"]) == {"1", "2"}
    assert measured["tfrs"]["speed_ratio"] > 0 and measured["tfrs_cached"]["speed_ratio"] > 0
    with pytest.raises(ConfigError, match="epochs must be 2 or more"):
        measure_towers("small-size", epochs=1)


def test_input_and_model_are_measured_apart_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """F12: rows a second of batches, steps and both, by the training loop of a member of each kind."""
    monkeypatch.setattr(pipeline_benchmark, "EXAMPLES", 96)
    measured = json.loads(run_tool("benchmark", "pipeline", "--cases", "factorisation", "image", "--on", "small-size",
                                   "--rounds", 1, "--seconds", 0.1, "--json").out)  # fmt: skip
    for case in ("factorisation", "image"):
        found = measured[case]
        assert found["both"] > 0 and found["ratio"] == pytest.approx(found["pipeline"] / found["model"])
        assert found["ratio"] >= 2 and 0 <= found["input_wait"] < 1
    assert measured["image"]["decoded_per_s"] > 0 and measured["factorisation"]["batch"] == 1024
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        measure_pipelines(["imag"])
