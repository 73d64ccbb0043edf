"""Batch jobs: the same answers as one by one, each user exactly once, whole files only."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fake_predictor
from fake_predictor import FakePredictor, fake_artifact, job_of
from serving import batch
from serving.batch import Job, Lists, recommend_all
from serving.errors import InvalidRequest, NotPossible, NotWritable
from serving.messages import RecommendRequest
from serving.predictor import Predictor
from serving.recommending import Recommending

ROOT = Path(__file__).parents[2]
USERS = ["u0", "nobody", "u 2", "u1"]


@pytest.fixture(scope="module")
def predictor(artifact):
    return Predictor.load(artifact)


@pytest.fixture
def plain(tmp_path):
    return fake_artifact(tmp_path / "artifact")


def fake_lists(artifact, **settings):
    return Lists(FakePredictor(), artifact, RecommendRequest(k=3), **settings)


def whole(folder):
    """The table of a finished folder as readers of Parquet see it, in the order of the shards."""
    assert (folder / "_SUCCESS").is_file()
    return pq.read_table(folder).to_pandas()


def expected(count):
    """What a job over that many users must hold, worked out apart."""
    return [
        (f"u{user}", rank + 1, f"i{(user + rank) % 8}") for user in range(count) if user % 7 > 0 for rank in range(3)
    ]


def rows(table):
    return list(zip(table.user_id, table["rank"], table.item_id, strict=True))


@pytest.mark.parametrize("block", [1, 2, 100])
def test_equals_single_answers(predictor, artifact, tmp_path, block):
    """O16: every known user once, in order, whatever the block; unknown ones are named."""
    seen = []
    lists = Lists(predictor, artifact, RecommendRequest(k=3), block)
    summary = recommend_all(lists, USERS, tmp_path / "recs.parquet", lambda *done: seen.append(done))
    table = pq.read_table(tmp_path / "recs.parquet").to_pandas()
    assert list(table) == ["user_id", "rank", "item_id", "score", "contribution_place", "contribution_history"]
    assert (summary.rows, summary.users, summary.unknown_users) == (9, 3, ("nobody",)) and len(table) == 9
    assert table.user_id.tolist() == [user for user in ("u0", "u 2", "u1") for _ in range(3)]
    for user, rows in table.groupby("user_id"):
        answer = predictor.recommend(user_ids=[user], k=3)
        assert rows.item_id.tolist() == [item.decode() for item in answer["item_ids"][0]]
        assert rows["rank"].tolist() == [1, 2, 3]
        assert rows.score.tolist() == answer["scores"][0].tolist()
        assert rows.score.tolist() == (rows.contribution_place + rows.contribution_history).tolist()
    assert seen[-1] == (4, 4) and len(seen) == -(-4 // block)
    assert os.listdir(tmp_path) == ["recs.parquet"]


class OneServable:
    """A store with one version, as the doors have it."""

    name, version = "toy", 1

    def __init__(self, predictor, folder):
        self.predictor, self.folder = predictor, folder

    @contextlib.contextmanager
    def lease(self, *_):
        yield self

    def call(self, signature, inputs, deadline=None):
        return self.predictor.predict(signature, inputs)


@pytest.mark.parametrize(
    "asked",
    [
        {"k": 4},
        {"k": 2, "exclude": ("i1", "nothing")},
        {"k": 3, "include": ("i2", "i3", "ä ö")},
        {"k": 3, "filters": {"title": ("Three", "Four", "Zero")}},
        {"k": 3, "filters": {"title": ("Three", "Four")}, "include": ("i3", "i5"), "exclude": ("i5",)},
        {"k": 3, "filters": {"title": ("No such",)}},
        {"k": 2, "diversity": 0.9},
        {"k": 2, "weights": {"history": 0.0, "place": 2.0}, "diversity": 0.5},
    ],
)
def test_filters_and_scores_are_those_of_the_doors(artifact, tmp_path, asked):
    """O16: nothing differs between a batch job and the online answers for the same question."""
    folder = tmp_path / "1"
    shutil.copytree(artifact, folder)
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.save(folder / "item_vectors.npy", vectors)
    predictor = Predictor.load(artifact)
    online = Recommending(OneServable(predictor, folder))
    request = RecommendRequest(**asked)
    recommend_all(Lists(predictor, folder, request), USERS, tmp_path / "recs.parquet")
    batch_rows = pq.read_table(tmp_path / "recs.parquet").to_pylist()
    online_rows = []
    for user in USERS:
        answer = online.recommend(dataclasses.replace(request, user_id=user))
        for rank, item in enumerate(() if answer.unknown_user else answer.items, start=1):
            shares = {f"contribution_{name}": item.contributions.get(name, 0.0) for name in predictor.members}
            online_rows.append({"user_id": user, "rank": rank, "item_id": item.item_id, "score": item.score, **shares})
    assert batch_rows == online_rows
    assert bool(online_rows) == (asked.get("filters") != {"title": ("No such",)})


def test_a_file_that_is_not_finished_leaves_the_old_one(predictor, artifact, tmp_path):
    path = tmp_path / "recs.parquet"
    path.write_text("old")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recommend_all(Lists(predictor, artifact, RecommendRequest(k=3), 1), ["u0", "u1"], path, stop)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["recs.parquet"]


def test_what_a_killed_call_left_is_removed_and_what_is_written_is_not(plain, tmp_path):
    """Another call may be writing the same file; whoever ends last has it."""
    path, inner = tmp_path / "recs[1].parquet", []
    for name in (".recs[1].parquet.abc.partial", ".recs1.parquet.abc.partial", ".other.parquet.abc.partial"):
        (tmp_path / name).write_text("left by a killed call")

    def meanwhile(*_):
        if not inner:
            inner.append(None)
            inner.append(recommend_all(fake_lists(plain), ["u3"], path))

    summary = recommend_all(fake_lists(plain, block=1), ["u1", "u2"], path, meanwhile)
    assert (summary.users, inner[1].users) == (2, 1) and pq.read_table(path).num_rows == 6
    left = {".recs1.parquet.abc.partial", ".other.parquet.abc.partial"}
    assert set(os.listdir(tmp_path)) == {"artifact", "recs[1].parquet"} | left


def test_a_long_list_of_allowed_items_beside_filters_is_quick(tmp_path, monkeypatch):
    """It is hashed once, not for every item of the catalogue."""

    class Once(str):
        hashes = 0

        def __hash__(self):
            Once.hashes += 1
            return super().__hash__()

    artifact = fake_artifact(tmp_path / "artifact")
    pq.write_table(pa.table({"item_id": fake_predictor.ITEMS, "title": ["x"] * 8}), artifact / "items.parquet")
    include = tuple(Once(item) for item in fake_predictor.ITEMS[:3])
    lists = Lists(FakePredictor(), artifact, RecommendRequest(k=3, include=include, filters={"title": ("x",)}))
    assert lists._include == ["i0", "i1", "i2"] and Once.hashes == 3


def test_bad_questions_and_folders_are_refused(predictor, artifact, tmp_path):
    lists = Lists(predictor, artifact, RecommendRequest(k=3))
    for wrong in ([], ["u0", "u0"]):
        with pytest.raises(InvalidRequest, match="each id once"):
            recommend_all(lists, wrong, tmp_path / "recs.parquet")
        with pytest.raises(InvalidRequest, match="each id once"):
            Job(tmp_path / "job", artifact, wrong, RecommendRequest())
    with pytest.raises(NotWritable, match="must be writable"):
        recommend_all(lists, ["u0"], tmp_path / "missing" / "recs.parquet")
    for request, sentence in (
        (RecommendRequest(profile="fast"), "must have the signature 'recommend_fast'"),
        (RecommendRequest(filters={"titel": ("x",)}), "did you mean 'title'"),
        (RecommendRequest(diversity=2), "between 0 and 1"),
        (RecommendRequest(weights={"nobody": 1.0}), "must name members"),
        (RecommendRequest(k=0), "'k' must be between 1 and 4; received 0"),
        (RecommendRequest(k=-5, diversity=0.5), "'k' must be between 1 and 4; received -5"),
        (RecommendRequest(k=5, weights={"place": 2.0}), "'k' must be between 1 and 4; received 5"),
    ):
        with pytest.raises(InvalidRequest, match=sentence):
            Lists(predictor, artifact, request)


def test_shards_are_in_the_order_of_the_users_and_summed_up(plain, tmp_path):
    """O16: 12 users a shard; readers of Parquet folders see lists and nothing else."""
    seen = []
    with job_of(tmp_path / "out", plain, count=40, shard_users=12) as job:
        summary = job.run(fake_lists(plain, block=5), lambda *done: seen.append(done))
    names = sorted(name for name in os.listdir(tmp_path / "out") if name.startswith("part"))
    assert names == [f"part-0000{number}-of-00004.parquet" for number in range(4)]
    assert rows(whole(tmp_path / "out")) == expected(40)
    assert (summary.rows, summary.users) == (len(expected(40)), len(expected(40)) // 3)
    assert summary.unknown_users == tuple(f"u{number}" for number in range(0, 40, 7))
    assert seen[-1] == (40, 40) and [done for done, _ in seen] == sorted({done for done, _ in seen})
    told = json.loads((tmp_path / "out/_SUCCESS").read_text())
    assert told["unknown_users"] == list(summary.unknown_users) and told["shards"] == 4
    first = pq.read_table(tmp_path / "out" / names[1]).to_pandas()
    assert set(first.user_id) == {user for user, _, _ in expected(24)} - {user for user, _, _ in expected(12)}


def test_a_finished_job_is_not_made_again(plain, tmp_path):
    lists = fake_lists(plain)
    for calls in (4, 0):
        with job_of(tmp_path / "out", plain, count=40) as job:
            assert job.done() == (0 if calls else 40)
            summary = job.run(lists)
        assert len(lists._predictor.calls) == calls and summary.rows == len(expected(40))
        lists._predictor.calls.clear()


def test_another_job_in_the_folder_is_refused_with_what_differs(plain, tmp_path):
    with job_of(tmp_path / "out", plain):
        pass
    others = {
        "request": lambda: job_of(tmp_path / "out", plain, k=4),
        "users": lambda: job_of(tmp_path / "out", plain, count=61),
        "shard_users": lambda: job_of(tmp_path / "out", plain, shard_users=11),
    }
    for key, other in others.items():
        with pytest.raises(NotPossible, match=f"holds another job, whose '{key}' is"), other():
            pass
    (plain / "manifest.json").write_text('{"artifact": 2}')
    with pytest.raises(NotPossible, match="'artifact'"), job_of(tmp_path / "out", plain):
        pass
    (tmp_path / "out/_job.json").write_text("{")
    with pytest.raises(NotPossible, match="cannot be read"), job_of(tmp_path / "out", plain):
        pass


def test_one_process_a_folder(plain, tmp_path):
    with job_of(tmp_path / "out", plain):
        with pytest.raises(NotPossible, match="another process"), job_of(tmp_path / "out", plain):
            pass
    with filelock.FileLock(tmp_path / "out/.lock", timeout=0):  # it was given back
        pass


def test_shards_that_are_damaged_or_of_another_job_are_made_again(plain, tmp_path):
    out = tmp_path / "out"
    with job_of(out, plain) as job:
        job.run(fake_lists(plain))
    first, second, third = (out / f"part-0000{number}-of-00006.parquet" for number in range(3))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    pq.write_table(pa.table({"user_id": ["x"]}), third)
    (out / ".part-00005-of-00006.parquet.abc.partial").write_text("left by a killed job")
    with job_of(out, plain) as job:
        assert job.missing() == [0, 1, 2] and job.done() == 30
        job.run(fake_lists(plain))
    assert rows(whole(out)) == expected(60) and not list(out.glob(".*partial"))


def test_killed_at_any_moment_each_user_is_there_once(plain, tmp_path):
    """O16: SIGKILL again and again, at random moments; then the job ends as one that was never killed."""
    out, draw, kills = tmp_path / "out", random.Random(0), 0
    program = [sys.executable, fake_predictor.__file__, str(out), str(plain), "120", "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        with subprocess.Popen(program, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout.readline() == b"started\n"
            time.sleep(draw.uniform(0.02, 0.12))
            kills += process.poll() is None
            process.kill()
        made = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
        for path in out.glob("part-*"):
            assert pq.read_metadata(path).num_rows >= 0  # whole, whenever it was
    assert kills >= 2 and not (out / "_SUCCESS").exists()
    with job_of(out, plain, count=120) as job:
        assert 0 < len(job.missing()) <= 12 - len(made)
        job.run(fake_lists(plain))
    assert rows(whole(out)) == expected(120)
    assert all((out / name).stat().st_mtime_ns == when for name, when in made.items())  # what was done stayed


MOMENTS = ["ParquetWriter.write_table", "ParquetWriter.close", "fsync", "replace"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_leaves_whole_shards_only(plain, tmp_path, monkeypatch, moment):
    """O16: whichever step meets it; with room again, the job goes on."""
    out, owner = tmp_path / "out", os if "." not in moment else pq.ParquetWriter
    with job_of(out, plain) as job:
        real, left = getattr(owner, moment.rpartition(".")[2]), [5]

        def full(*arguments, **settings):
            left[0] -= 1
            if left[0] == -1:  # once: pyarrow closes what it could not close when it is thrown away
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **settings)

        monkeypatch.setattr(owner, moment.rpartition(".")[2], full)
        with pytest.raises(NotWritable, match="No space left on device"):
            job.run(fake_lists(plain))
        monkeypatch.undo()
        done = sorted(path.name for path in out.glob("part-*"))
        assert 0 < len(done) < 6 and not list(out.glob(".*partial")) and not (out / "_SUCCESS").exists()
        assert all(job._held(number) is not None for number in range(len(done)))
        job.run(fake_lists(plain))
    assert rows(whole(out)) == expected(60)


def test_a_limit_of_the_system_on_the_size_of_files(plain, tmp_path):
    """The kernel itself refuses, in the middle of a file."""
    bound = resource.getrlimit(resource.RLIMIT_FSIZE)
    with job_of(tmp_path / "out", plain, count=3000, shard_users=3000) as job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, bound[1]))
        try:
            with pytest.raises(NotWritable, match="File too large"):
                job.run(fake_lists(plain))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, bound)
    assert not list((tmp_path / "out").glob("part-*")) and not list((tmp_path / "out").glob(".part*"))


def test_a_worker_needs_the_folder_and_the_artifact_alone(artifact, tmp_path):
    """O16: what a pipeline calls makes the same shards as the job itself."""
    out, filters = tmp_path / "out", {"title": ("Zero", "Three", "Four")}
    request = RecommendRequest(k=3, exclude=("i1",), filters=filters)
    with Job(out, artifact, USERS, request, 3) as job:
        for number in job.missing():
            batch.make_shard(number, str(out), str(artifact))
        assert job.missing() == []
        summary = job.run(Lists(Predictor.load(artifact), artifact, request))
    recommend_all(Lists(Predictor.load(artifact), artifact, request), USERS, tmp_path / "one.parquet")
    assert whole(out).equals(pq.read_table(tmp_path / "one.parquet").to_pandas())
    assert summary.unknown_users == ("nobody",)
    shutil.copytree(artifact, tmp_path / "other")
    (tmp_path / "other/manifest.json").write_text("{}")
    with pytest.raises(NotPossible, match="is not the artifact"):
        batch.make_shard(0, str(out), str(tmp_path / "other"))


def test_beam_makes_the_same_shards(artifact, tmp_path):
    """O16: the pipeline on Beam's own runner, in this process."""
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install '.[batch]'")
    with Job(tmp_path / "out", artifact, USERS, RecommendRequest(k=3), 2) as job:
        summary = job.run_on_beam()
    recommend_all(Lists(Predictor.load(artifact), artifact, RecommendRequest(k=3)), USERS, tmp_path / "one.parquet")
    assert whole(tmp_path / "out").equals(pq.read_table(tmp_path / "one.parquet").to_pandas())
    assert summary.unknown_users == ("nobody",)


def test_without_beam_a_sentence_says_how_to_install_it(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with job_of(tmp_path / "out", plain) as job:
        with pytest.raises(NotPossible, match=r"pip install '\.\[batch\]'"):
            job.run_on_beam()
        with pytest.raises(NotPossible, match="must hold 6 shards; it has 0"):
            job._finish(time.perf_counter())
