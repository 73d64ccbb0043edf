"""Clusters of processes on this machine: what is started ends, in every case. Slow: whole experiments over them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import ROOT, Ended, alive, children, finished_runs, run_tool, start_tool, until
from fusion.training import local_cluster
from fusion.training.local_cluster import environment, places, processes, run_cluster

ROLE = "import json, os, signal, sys, time; task = json.loads(os.environ['TF_CONFIG'])['task']; "
ROLE += "name = f\"{task['type']} {task['index']}\"; "


def script(**roles: str) -> list[str]:
    """A command that does what its role says; the roles not named sleep."""
    words = {name.replace("_", " "): code for name, code in roles.items()}
    return [sys.executable, "-c", f"{ROLE}exec({words!r}.get(name, 'time.sleep(60)'))"]


def test_every_process_gets_a_place_of_its_own() -> None:
    """I1, I2: free ports, nobody twice; processors are shared evenly (I4)."""
    configs = [json.loads(config) for config in places(2, ps=2).values()]
    addresses = [address for tasks in configs[0]["cluster"].values() for address in tasks]
    assert len(set(addresses)) == 5 and all(address.startswith("127.0.0.1:") for address in addresses)
    assert [config["task"]["type"] for config in configs] == ["chief", "worker", "worker", "ps", "ps"]
    assert all(config["cluster"] == configs[0]["cluster"] for config in configs)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert environment(cpus or 1)["TF_NUM_INTRAOP_THREADS"] == "1"
    assert environment(1)["TF_NUM_INTRAOP_THREADS"] == str(cpus) and environment(1, TF_CONFIG="x")["TF_CONFIG"] == "x"


def test_the_leader_decides_how_it_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its output is ours and its exit code too; the others, still asleep, are ended."""
    started = time.monotonic()
    command = script(worker_0="print('hello'); sys.exit(7)", worker_1="print('aside', flush=True); time.sleep(60)")
    assert run_cluster(command, 2, 0, tmp_path) == 7
    assert time.monotonic() - started < 20
    assert capfd.readouterr().out == "hello\n"


def test_a_failed_worker_ends_the_cluster(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader gets time to find out; then the code is that of the worker."""
    monkeypatch.setattr(local_cluster, "GRACE_SECONDS", 0.5)
    assert run_cluster(script(worker_1="print('error: no disk'); sys.exit(5)"), 2, 0, tmp_path) == 5
    assert "worker 1 ended with exit code 5: error: no disk" in capfd.readouterr().err


def test_a_lost_worker_of_parameter_servers_is_told_and_missed_by_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: the others do its work."""
    monkeypatch.setattr(local_cluster, "GRACE_SECONDS", 0.0)
    command = script(worker_0="os.kill(os.getpid(), 9)", chief_0="time.sleep(1.5)")
    assert run_cluster(command, 2, 1, tmp_path) == 0
    assert "worker 0 ended with exit code -9" in capfd.readouterr().err


def test_the_exit_code_is_of_what_ended_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: not that of a worker that was lost before and not missed; a signal is told as shells do."""
    monkeypatch.setattr(local_cluster, "GRACE_SECONDS", 0.2)
    lost = "os.kill(os.getpid(), 9)"
    assert run_cluster(script(worker_0=lost, ps_0="time.sleep(1); sys.exit(5)"), 1, 1, tmp_path) == 5
    assert run_cluster(script(ps_0=lost), 1, 1, tmp_path) == 128 + 9


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in our own code ends all of them, also one that does not want to."""
    monkeypatch.setattr(local_cluster, "_END_SECONDS", 0.5)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf', 'w'); time.sleep(60)"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        with processes(script(worker_1=deaf), places(2), tmp_path / "logs") as running:
            until(lambda: (tmp_path / "deaf").exists())
            raise ZeroDivisionError
    assert [process.returncode for process in running.values()] == [-signal.SIGTERM, -signal.SIGKILL]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has gone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_tool(number: signal.Signals, tmp_path: Path) -> None:
    """I1: killed with -9 or asked to end, the tool leaves no process that trains."""
    tool = start_tool("launch", ROOT / "configs/smoke.yaml", "--run-dir", tmp_path, "--quiet")
    try:
        until(lambda: len(children(tool.pid)) == 2)
        started = children(tool.pid)
        tool.send_signal(number)
        tool.wait(30)
        until(lambda: not any(alive(pid) for pid in started))
    finally:
        tool.kill()
        tool.communicate()


def test_numbers_of_processes_are_checked() -> None:
    for arguments in (["--workers", 0], ["--ps", -1]):
        assert run_tool("launch", ROOT / "configs/smoke.yaml", *arguments).code == 2


# ---- experiments ---------------------------------------------------------------------------------------------

KERAS = {
    "factorization": {"kind": "matrix_factorization", "factors": 8},
    "rows": {"kind": "matrix_factorization", "factors": 8, "together": 4},
    "bpr": {"kind": "matrix_factorization", "factors": 8, "loss": "bpr"},
    "light_gcn": {"kind": "light_gcn", "factors": 8},
    "two_tower": {"kind": "two_tower"},
    "mult_vae": {"kind": "mult_vae", "hidden": 16, "latent": 8},
    "gru4rec": {"kind": "gru4rec", "dimensions": 8},
    "sasrec": {"kind": "sasrec", "dimensions": 8},
    "node2vec": {"kind": "node2vec"},
    "dcn": {"kind": "dcn"},
    "text": {"kind": "content", "columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 8}},
    "image": {"kind": "content", "encoder": {"kind": "image_cnn", "image_size": 16, "widths": [4]}},
}
"""Every member of a ranking that is trained by gradient, small."""


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """All of them over a tiny planted world."""
    training = {"epochs": 1, "batch_size": 64}
    experiment = {
        "name": "all",
        "task": "recommendation",
        "data": {"kind": "planted", "users": 80, "items": 60},
        "members": {
            "popularity": {"kind": "popularity"},
            **{name: {**settings, "training": training} for name, settings in KERAS.items()},
        },
        "rules": {"average": {"kind": "average"}},
        "evaluation": {"metrics": ["ndcg@10"], "samples": 100},
        "export": {"enabled": False},
    }
    path = tmp_path / "all.yaml"
    path.write_text(json.dumps(experiment))
    yield path


def trained(tool: str, config: Path, runs: Path, *arguments: object) -> dict[str, Any]:
    """The members of the report of a finished run."""
    process = start_tool(tool, config, "--run-dir", runs, "--quiet", "--json", *arguments)
    try:
        out, err = process.communicate(timeout=1500)
    finally:
        process.terminate()
        process.wait(30)
    ended = Ended(process.returncode, out, err)
    assert ended.code == 0, ended.err
    assert len(finished_runs(runs)) == 1
    return json.loads(out)["members"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("train", ["--set", "strategy.kind=mirrored", "--set", "strategy.devices=[CPU:0, CPU:1]"]),
        ("launch", ["--workers", 2]),
        ("launch", ["--workers", 2, "--ps", 1, "--set", "strategy.min_shard_bytes=1024"]),
    ],
    ids=["mirrored", "multi_worker", "parameter_server"],
)
def test_every_strategy_trains_every_keras_member(
    tool: str, arguments: list[object], config: Path, tmp_path: Path
) -> None:
    """I1, I2: whole experiments over real processes, next to a member without a gradient."""
    members = trained(tool, config, tmp_path / "runs", *arguments)
    assert set(members) == {"popularity", *KERAS}
    assert all(0 <= member["ndcg@10"]["value"] <= 1 for member in members.values())
