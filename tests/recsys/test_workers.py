"""Members fitted by several processes at a time: the processes, what they are told, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from command_line import ROOT, Ended, alive, children, refusal, run_tool, start_tool, until
from fusion.config import parse
from fusion.errors import ConfigError, DataError, EngineError, MachineError
from fusion.files import load_arrays
from fusion.training.local_cluster import THREADS, threads_of
from fusion.training.member import ClassifierMember
from fusion.training.sklearn_member import SklearnMember
from recsys.classification_task import ClassificationTask
from recsys.collaborative.ease import Ease
from recsys.collaborative.matrix_factorization import MatrixFactorization
from recsys.collaborative.popularity import Popularity
from recsys.pipeline import TASKS
from recsys.plan import WORKER_BYTES, describe, plan
from recsys.ranking_task import RankingTask
from recsys.run import Run
from recsys.settings import parse_experiment
from recsys.worker import answer
from recsys.workers import TRAINING, Job, work
from worlds import member_part

# ---- processes, which only pretend to fit --------------------------------------------------------------------

PRETEND = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from fusion.training.local_cluster import end_with_parent
end_with_parent()
for line in sys.stdin.buffer:
    name = json.loads(line)["member"]
    with open("begun", "a") as file:
        print(name, os.getpid(), os.environ["TF_NUM_INTRAOP_THREADS"], file=file, flush=True)
    said = {{"key": name}}
    exec(json.loads(line)["part"]["does"])
    print(json.dumps(said), flush=True)
"""
"""A worker that does what its part says, and answers that it has fitted the member."""


def job(name: str, does: str = "", seconds: float = 0.0) -> Job:
    part: Any = SimpleNamespace(dump=lambda: {"does": does})
    return Job(name, part, TRAINING, name, seconds)


def pretended(jobs: Sequence[Job], processes: int, folder: Path) -> list[dict[str, Any]]:
    return work(jobs, processes, folder, quiet=True, start=lambda _: [sys.executable, "-c", PRETEND])


def begun() -> list[tuple[str, int, str]]:
    """Name, process and threads of what has begun, in the order in which it did."""
    path = Path("begun")
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(name, int(pid), threads) for name, pid, threads in lines]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in THREADS:
        monkeypatch.delenv(variable, raising=False)


def test_the_longest_are_begun_first_and_answers_come_in_order(tmp_path: Path) -> None:
    """I4: two at a time, each with its share of the processors; never more processes than there are fits."""
    both = "while len(open('begun').readlines()) < 2: time.sleep(0.01)"  # whoever is first waits for a second one
    jobs = [job("short", both, 1.0), job("long", both, 9.0), job("middle", both, 5.0)]
    assert pretended(jobs, 2, tmp_path) == [{"key": "short"}, {"key": "long"}, {"key": "middle"}]
    told = begun()
    assert {told[0][0], told[1][0]} == {"long", "middle"} and told[2][0] == "short"
    assert len({pid for _, pid, _ in told}) == 2 and not any(alive(pid) for _, pid, _ in told)
    assert {threads for *_, threads in told} == {str(threads_of(2))}
    assert pretended([job("one")], 8, tmp_path) == [{"key": "one"}] and begun()[3][2] == str(threads_of(1))
    assert pretended([], 2, tmp_path) == [] and len(begun()) == 4


def test_an_error_keeps_its_words_and_kind_and_ends_the_others(tmp_path: Path) -> None:
    """I4: as if it had been raised here."""
    bad = "while len(open('begun').readlines()) < 2: time.sleep(0.01)\n"
    bad += "said = {'error': 'DataError', 'message': 'members.bad: no rows.'}"
    with pytest.raises(DataError, match=r"^members\.bad: no rows\.$"):
        pretended([job("bad", bad), job("sleeper", "time.sleep(60)")], 2, tmp_path)
    assert len(begun()) == 2 and not any(alive(pid) for _, pid, _ in begun())


@pytest.mark.parametrize(
    ("does", "kind", "words"),
    [
        ("print('no memory', file=sys.stderr); os.kill(os.getpid(), 9)", MachineError, r"m ended by signal 9 \(no mem"),
        ("sys.exit(3)", MachineError, r"m ended with exit code 3 \(it wrote nothing\)"),
        ("said = {'key': 'another'}", EngineError, "must see the code and the data that its run began with"),
    ],
    ids=["killed", "gone", "other code"],
)
def test_a_worker_that_does_not_do_its_job_is_told(
    does: str, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    """I4: one sentence, and no waiting for what will not come."""
    with pytest.raises(kind, match=words):
        pretended([job("m", does)], 2, tmp_path)


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    """I4: Ctrl-C while both are at work."""

    def interrupt() -> None:
        until(lambda: len(begun()) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pretended([job("a", "time.sleep(60)"), job("b", "time.sleep(60)")], 2, tmp_path)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert not any(alive(pid) for _, pid, _ in begun())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has gone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_takes_its_workers_along(number: signal.Signals, tmp_path: Path) -> None:
    """I4: kill -9 and kill, which run none of our code."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from types import SimpleNamespace
from recsys.workers import TRAINING, Job, work
part = SimpleNamespace(dump=lambda: {{"does": "time.sleep(60)"}})
jobs = [Job(name, part, TRAINING, name, 0.0) for name in "ab"]
work(jobs, 2, Path("."), quiet=True, start=lambda _: [sys.executable, "-c", {PRETEND!r}])
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until(lambda: len(begun()) == 2)
        parent.send_signal(number)
    until(lambda: not any(alive(pid) for _, pid, _ in begun()))


MAKE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from fusion.files import lock_making
open(sys.argv[1], "w").close()
with lock_making("table.npy"):
    if not Path("table.npy").exists():
        while not Path("both").exists(): time.sleep(0.01)
        with open("made", "a") as file: print(sys.argv[1], file=file)
        Path("table.npy").touch()
"""


def test_what_two_workers_want_is_made_by_one_of_them(tmp_path: Path) -> None:
    """I4: embeddings that two members share; the lock does not stay."""
    makers = [subprocess.Popen([sys.executable, "-c", MAKE, name]) for name in ("one", "two")]
    until(lambda: Path("one").exists() and Path("two").exists())
    Path("both").touch()
    assert [maker.wait(60) for maker in makers] == [0, 0]
    assert len(Path("made").read_text().splitlines()) == 1
    assert not list(tmp_path.glob("*.lock"))


# ---- what a worker is told, done in this process ----------------------------------------------------------------


def test_what_goes_wrong_in_a_worker_travels_as_a_name_and_a_sentence(tmp_path: Path) -> None:
    """I4: kinds of our errors as they are, faults of the machine as elsewhere, anything else with its log."""

    def raises(error: Exception) -> dict[str, Any]:
        def fit(*_: Any) -> None:
            raise error

        part = member_part({"kind": "popularity"})
        experiment = SimpleNamespace(members={"m": part})
        run = SimpleNamespace(folder=tmp_path / "name/time", path=tmp_path.joinpath)
        task = SimpleNamespace(experiment=experiment, run=run, fit=fit, portion_data=lambda *_: None)
        return answer(task, {"member": "m", "part": part.dump(), "rows": ["train"], "grid": {}})

    with pytest.raises(ConfigError) as found:  # of a class below ConfigError, which no table lists
        parse(Ease.Config, {"l3": 1})
    assert raises(found.value) == {"error": "ConfigError", "message": str(found.value)}
    assert raises(MemoryError("no more"))["error"] == "MachineError"
    said = raises(ZeroDivisionError("by zero"))
    assert said["error"] == "EngineError" and "members.m: unexpected ZeroDivisionError: by zero;" in said["message"]


def ranking(processes: int, **settings: Any) -> Any:
    config = {
        "name": "spread",
        "data": {"kind": "planted", "users": 100, "items": 60},
        "members": {"popularity": {"kind": "popularity"}, "ease": {"kind": "ease"}},
        "tuning": {"ease": {"l2": [20.0, 5.0]}},
        "rules": {"average": {"kind": "average"}},
        "evaluation": {"metrics": ["ndcg@10"], "samples": 100, "refit": True},
        "export": {"enabled": False},
        "training": {"processes": processes},
        **settings,
    }
    return parse_experiment(config)


def classification(processes: int) -> Any:
    encoder = {"kind": "text_tfidf", "dimensions": 8}
    training = {"epochs": 2, "batch_size": 64, "learning_rate": 0.05}
    linear = {"kind": "sklearn", "encoder": encoder, "columns": ["note"], "estimator": {"kind": "linear_svm"}}
    return parse_experiment(
        {
            "name": "spread",
            "task": "classification",
            "data": {"kind": "planted_classes", "examples": 160, "image_size": 8},
            "split": {"strategy": "stratified", "validation": 0.2, "test": 0.2},
            "members": {"text": {"encoder": encoder, "columns": ["text"], "training": training}, "note": linear},
            "rules": {"average": {"kind": "average"}},
            "training": {"processes": processes},
        }
    )


@pytest.fixture
def only_ahead(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """Jobs are done here, by another task on the same folder, as a worker has it; outside them nothing may be fitted.

    Gives the members and rows of each call.
    """
    calls: list[list[tuple[str, str]]] = []
    working: list[bool] = []

    def work_here(jobs: Sequence[Job], processes: int, folder: Path, **_: Any) -> list[dict[str, Any]]:
        assert processes == 2
        run = Run.open(folder, quiet=True, as_trained=True)
        task = TASKS[run.experiment.task](run)
        working.append(True)
        said = [answer(task, json.loads(json.dumps(each.message))) for each in jobs]
        working.clear()
        assert all(one.get("key", "") == each.key for one, each in zip(said, jobs, strict=True)), said
        calls.append([(each.name, each.portion.what) for each in jobs])
        return said

    def watched(kind: Any) -> Callable[..., Any]:
        original = kind.fit

        def fit(self: Any, data: Any, options: Any) -> Any:
            assert working, "fitted in this process"
            return original(self, data, options)

        return fit

    monkeypatch.setattr("recsys.stages.work", work_here)
    for kind in (Popularity, Ease, ClassifierMember, SklearnMember):
        monkeypatch.setattr(kind, "fit", watched(kind))
    return calls


def test_every_fit_of_a_ranking_is_done_ahead(only_ahead: list[list[tuple[str, str]]], tmp_path: Path) -> None:
    """I4: searches, the members, those of all folds at once, and those for the test part; the rest is in the cache."""
    run = Run.start(ranking(2), tmp_path, quiet=True)
    task = RankingTask(run)
    task.data()
    task.train()
    assert [trial["value"] for trial in task.trials["ease"]] == [20.0, 5.0]
    task._out_of_fold_scores({})
    names = ["popularity", "ease"]
    assert list(task.test_members) == names
    train, folds, again = only_ahead
    assert train == [(name, "train") for name in names]
    assert folds == [(name, "fold") for name in names] * 2
    assert again == [(name, "parts") for name in names]
    task.train()
    assert only_ahead[3] == [("ease", "train")], "a search goes through its fits again; they are in the cache"


def test_every_fit_of_a_classification_is_done_ahead(only_ahead: list[list[tuple[str, str]]], tmp_path: Path) -> None:
    """I4: the same of classes, up to the fit on every row that is exported."""
    task = ClassificationTask(Run.start(classification(2), tmp_path, quiet=True))
    task.data()
    task.train()
    assert task._out_of_fold_logits()[0].shape == (len(task.rows(0)), 2, len(task.classes))
    task.fuse()
    assert set(task.ensemble("average").members) == {"text", "note"}
    assert only_ahead[0] == [("text", "train"), ("note", "train")]
    assert only_ahead[1] == [("text", "fold"), ("note", "fold")] * 2
    assert only_ahead[-1] == [("text", "parts"), ("note", "parts")]


# ---- real ones --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_leave_the_bits_that_one_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I4: with as many threads, to the bit, and the same search; nothing is fitted in this process.

    What BLAS inverts for EASE depends in its last digits on what else this process has done with it.
    """
    factors = {"kind": "matrix_factorization", "factors": 4, "training": {"epochs": 1, "batch_size": 128}}
    members = {"popularity": {"kind": "popularity"}, "ease": {"kind": "ease"}, "factors": factors}

    def trained(processes: int) -> RankingTask:
        task = RankingTask(Run.start(ranking(processes, members=members), tmp_path / str(processes), quiet=True))
        task.data()
        task.train()
        return task

    def forbidden(*_: Any) -> None:
        raise AssertionError("fitted in this process")

    one = trained(1)
    for variable in THREADS:  # this process has begun with as many as there are processors
        monkeypatch.setenv(variable, str(threads_of(1)))
    for kind in (Popularity, Ease, MatrixFactorization):
        monkeypatch.setattr(kind, "fit", forbidden)
    two = trained(2)
    assert one.trials == two.trials
    for name in members:
        paths = [task.run.path("submodels", name, "state.npz") for task in (one, two)]
        if name == "ease":
            state, other = map(load_arrays, paths)
            for key, array in state.items():
                np.testing.assert_allclose(other[key], array, rtol=1e-4, atol=1e-6)
        else:
            assert paths[0].read_bytes() == paths[1].read_bytes(), name


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small experiment from tables to the artifact, of members that are trained in steps and others."""
    for variable in THREADS:
        monkeypatch.setenv(variable, str(threads_of(1)))
    training = {"epochs": 2, "batch_size": 128}
    config = {
        "name": "spread",
        "data": {"kind": "planted", "users": 100, "items": 60},
        "members": {
            "popularity": {"kind": "popularity"},
            "ease": {"kind": "ease"},
            "factors": {"kind": "matrix_factorization", "factors": 4, "training": training},
            "vae": {"kind": "mult_vae", "hidden": 8, "latent": 4, "training": training},
        },
        "tuning": {"ease": {"l2": [20.0, 5.0]}},
        "rules": {"average": {"kind": "average"}, "probability": {"kind": "probability"}},
        "evaluation": {"metrics": ["ndcg@10"], "samples": 100, "refit": True},
        "strategy": {"placement": {"factors": "CPU:1"}},
    }
    path = tmp_path / "whole.yaml"
    path.write_text(json.dumps(config))
    return path


def ended(tool: subprocess.Popen[str]) -> Ended:
    try:
        out, err = tool.communicate(timeout=1500)
    finally:
        tool.kill()
    return Ended(tool.returncode, out, err)


def trained(config: Path, runs: Path, *arguments: object) -> Ended:
    return ended(start_tool("train", config, "--run-dir", runs, "--json", *arguments))


@pytest.mark.slow
def test_whole_runs_are_equal_and_fail_alike(whole: Path, tmp_path: Path) -> None:
    """I4, I5: every member of every fit to the bit, the same figures; and one sentence where a member cannot be."""
    reports, states = [], []
    for processes in (1, 2):
        runs = tmp_path / str(processes)
        run = trained(whole, runs, "--set", f"training.processes={processes}")
        assert run.code == 0, run.err
        reports.append(json.loads(run.out))
        states.append({path.parent.name: path.read_bytes() for path in runs.glob(".cache/members/*/state.npz")})
    assert len(states[0]) >= 5 + 3 * 4 and states[0] == states[1]
    assert reports[0]["members"] == reports[1]["members"] and reports[0]["rules"] == reports[1]["rules"]
    said = []
    for processes in (1, 2):
        bad = ["--set", "members.bad={kind: category_popularity, column: genre}", "--quiet"]
        run = trained(whole, tmp_path / "bad", *bad, "--set", f"training.processes={processes}")
        said.append(refusal(run, 3))
    assert said[0] == said[1] and said[0].startswith("members.bad: ")


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_worker_and_goes_on(whole: Path, tmp_path: Path) -> None:
    """I4: Ctrl-C while workers fit; the same command finishes the run."""
    given = ("--run-dir", tmp_path / "runs", "--json", "--set", "training.processes=2")
    tool = start_tool("train", whole, *given)
    until(lambda: len(children(tool.pid)) == 2, 300)
    workers = children(tool.pid)
    tool.send_signal(signal.SIGINT)
    assert ended(tool).code == 130
    assert not any(alive(pid) for pid in workers)
    again = ended(start_tool("train", whole, *given, "--resume"))
    assert again.code == 0 and set(json.loads(again.out)["members"]) == {"popularity", "ease", "factors", "vae"}


# ---- settings -----------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_with_the_processes(tmp_path: Path) -> None:
    """I4: shorter but not than its slowest member, and with more in memory."""
    slow = {"kind": "matrix_factorization", "factors": 4, "training": {"epochs": 200, "batch_size": 16}}
    members = {"a": slow, "b": slow, "c": {"kind": "popularity"}}
    one, two, many = (plan(ranking(processes, members=members, tuning={}), tmp_path) for processes in (1, 2, 8))
    assert (one["processes"], two["processes"], many["processes"]) == (1, 2, 3)
    if threads_of(1) >= 2:
        each = one["fits_per_member"] * one["members"]["a"]["fit_s"]
        assert one["estimated_s"] == round(20 + 2 * each) and two["estimated_s"] == round(20 + each)
    assert one["estimated_bytes"] + 2 * WORKER_BYTES < two["estimated_bytes"] < many["estimated_bytes"]
    assert "fits of tuning, 2 at a time:" in describe(two)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.mode=joint"], "must be 1 with training.mode joint, where one graph holds the members; received 2"),
        (["strategy.kind=multi_worker"], "kind multi_worker, whose processes train every member together; received 2"),
        (["strategy.kind=parameter_server"], "kind parameter_server, whose processes train every member together"),
        (["strategy.kind=tpu"], "kind tpu, because a TPU belongs to one process; received 2"),
        (["training.processes=0"], "training.processes: input should be greater than or equal to 1"),
        (["strategy.placement={txet: CPU:0}"], "names the unknown member 'txet': did you mean 'text'?"),
        (
            ["strategy.placement={ease: CPU:0}"],
            "members that are trained in steps; 'ease' (ease) is reckoned on the CPU",
        ),
        (["strategy.placement={text: GPU:3}"], "strategy.placement must be on this machine; GPU:3 is not. It has"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: list[str], words: str, tmp_path: Path) -> None:
    """I4, I5: before any data is read, and why."""
    given = [part for setting in ("training.processes=2", *settings) for part in ("--set", setting)]
    ended = run_tool("train", ROOT / "configs/smoke.yaml", "--run-dir", tmp_path, "--quiet", *given)
    assert words in refusal(ended, 2)
    assert list(tmp_path.iterdir()) == []
