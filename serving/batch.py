"""Recommendations for many users as Parquet: one file, or a folder of shards that a stopped job goes on with.

A folder holds

    part-00000-of-00012.parquet ...   shards in the order of the users, each written aside, made durable, then renamed
    _job.json                         what is being made: hashes of artifact and users, and everything that was asked
    _users.parquet                    the users, so that a worker elsewhere needs only the folder and the artifact
    _SUCCESS                          the summary; there when every shard is

Names that begin with `_` are left out by readers of Parquet folders. A shard that stands there is whole and is not made
again; one that does not is made from its start. So every user is there exactly once, whenever a job was killed and
however often it was started again. Lists come from the artifact's own graph, and from the functions that answer online.

Columns: `user_id`, `rank` (from 1), `item_id`, `score`, and `contribution_<member>` for each member. Users whom the
artifact does not know get no rows and are named in the summary.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.export.manifest import FILE_NAME
from serving.catalogue import Catalogue
from serving.errors import InvalidRequest, NotPossible, NotWritable
from serving.inputs import Arrays, recommend_inputs
from serving.messages import BEST, RecommendRequest
from serving.recommending import (
    NOBODY,
    SIGNATURES,
    Shortlist,
    check,
    check_k,
    check_weights,
    reweighed,
    spread,
    student_of,
)

if TYPE_CHECKING:
    from serving.predictor import Predictor

JOB, USERS, SUCCESS, LOCK = "_job.json", "_users.parquet", "_SUCCESS", ".lock"
KEY = b"recommendations"
"""Under this key a shard's file says what it holds."""
SHARD_USERS = 10_000
MOST_STRINGS = 2**20
"""Ids of allowed and excluded items that one call may carry, all users of a block together."""

Progress = Callable[[int, int], None]
"""Called with (users done, users in all)."""


@dataclass(frozen=True)
class BatchSummary:
    """What a job wrote: rows, users with at least one row, ids that the artifact does not know, seconds of this run."""

    rows: int
    users: int
    unknown_users: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Block:
    """The lists of a few users."""

    asked: int
    table: pa.Table
    answered: int
    unknown: tuple[str, ...]


class Lists:
    """The lists of many users, by one request that holds for all of them.

    Args:
        predictor: the loaded artifact.
        folder: the artifact's folder, where its items are.
        request: what everybody is asked with; its user, history, time and model play no part.
        block: users of one call of the graph.

    Raises InvalidRequest for a request that the artifact cannot answer, LimitExceeded for a `k` beyond its limits.
    """

    def __init__(self, predictor: Predictor, folder: Path, request: RecommendRequest, block: int = 1024) -> None:
        check(request)
        self._predictor, self._request = predictor, request
        self._signature = SIGNATURES[request.profile]
        if self._signature not in predictor.manifest.signatures:
            raise InvalidRequest(f"the artifact must have the signature '{self._signature}' for '{request.profile}'.")
        self._names = predictor.members if request.profile == BEST else (student_of(predictor.manifest),)
        check_weights(request.weights, self._names)
        self._catalogue = Catalogue(folder)
        self._include = self._allowed()
        check_k(request.k, predictor.limits)
        strings = max(len(self._include), len(request.exclude), 1)
        self._rows = max(1, min(block, predictor.limits.rows, MOST_STRINGS // strings))
        self._longer = bool(request.weights) or request.diversity > 0
        columns = {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}
        columns |= {f"contribution_{name}": pa.float32() for name in self._names}
        self.schema = pa.schema(list(columns.items()))

    def _allowed(self) -> list[str]:
        """The only items that may be returned; an empty list allows all."""
        wanted = list(self._request.include)
        if not self._request.filters:
            return wanted
        found, chosen = self._catalogue.allowed(self._request.filters), set(wanted)
        return [item for item in found if not chosen or item in chosen] or [NOBODY]

    def blocks(self, user_ids: Sequence[str]) -> Iterator[Block]:
        """The users' lists, some users at once, in their order."""
        for start in range(0, len(user_ids), self._rows):
            ids = np.asarray(user_ids[start : start + self._rows], object)
            answer = self._answer(ids)
            there = (answer["item_ids"] != b"") & answer["known_user"][:, None]
            unknown = tuple(ids[~answer["known_user"]])
            yield Block(len(ids), self._table(ids, answer, there), int(there.any(axis=1).sum()), unknown)

    def _answer(self, ids: np.ndarray) -> Arrays:
        """`item_ids` and `scores` `[B, k]`, `contributions` `[B, S, k]`, `known_user` `[B]`."""
        request = self._request
        k = self._predictor.limits.k if self._longer else request.k
        exclude, include = [list(request.exclude)] * len(ids), [self._include] * len(ids)
        asked = recommend_inputs(list(ids), None, k, exclude, include, self._predictor.limits)
        answer = self._predictor.predict(self._signature, asked)
        if self._longer:
            return self._rearranged(answer)
        return {name: value if name == "known_user" else value[..., : request.k] for name, value in answer.items()}

    def _rearranged(self, answer: Arrays) -> Arrays:
        """Weights and diversity, which are applied to one list after the other."""
        users, members, k = len(answer["item_ids"]), len(self._names), self._request.k
        result = {
            "item_ids": np.full((users, k), b"", object),
            "scores": np.full((users, k), -np.inf, np.float32),
            "contributions": np.zeros((users, members, k), np.float32),
            "known_user": answer["known_user"],
        }
        factors = [self._request.weights.get(name, 1.0) for name in self._names]
        for row, items in enumerate(answer["item_ids"]):
            there = items != b""
            ids = [item.decode("utf-8") for item in items[there]]
            best = Shortlist(ids, answer["scores"][row][there], answer["contributions"][row][:, there])
            if self._request.weights:
                best = reweighed(best, factors)
            if self._request.diversity:
                best = best.at(spread(best.scores, self._catalogue.vectors(best.item_ids), self._request))
            count = min(k, len(best.item_ids))
            result["item_ids"][row, :count] = [item.encode("utf-8") for item in best.item_ids[:count]]
            result["scores"][row, :count] = best.scores[:count]
            result["contributions"][row, :, :count] = best.contributions[:, :count]
        return result

    def _table(self, ids: np.ndarray, answer: Arrays, there: np.ndarray) -> pa.Table:
        """One row per recommended item; places beyond a user's last item and unknown users have none."""
        row, place = np.nonzero(there)
        contributions = answer["contributions"][row, :, place]
        columns = [
            pa.array(ids[row], pa.string()),
            pa.array((place + 1).astype(np.int32)),
            pa.array([item.decode("utf-8") for item in answer["item_ids"][row, place]], pa.string()),
            pa.array(answer["scores"][row, place]),
            *(pa.array(contributions[:, member]) for member in range(len(self._names))),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


def recommend_all(
    lists: Lists, user_ids: Sequence[str], out_parquet: str | Path, progress: Progress | None = None
) -> BatchSummary:
    """Writes the lists of all users into one file, which takes its name only when it is complete. What an earlier call
    left that was killed is removed.

    Args:
        lists: makes them.
        user_ids: each id once.
        out_parquet: the file; one that stands there already is replaced at the end.
        progress: called after every block.

    Raises InvalidRequest for an empty or repeated list of users, NotWritable when the file cannot be written.
    """
    _check_users(user_ids)
    started = time.perf_counter()

    def advance(done: int) -> None:
        if progress:
            progress(done, len(user_ids))

    _clear(Path(out_parquet))
    held = _write(Path(out_parquet), lists, user_ids, {}, advance)
    return BatchSummary(held["rows"], held["answered"], tuple(held["unknown"]), time.perf_counter() - started)


class Job:
    """A folder of shards that is being made; a context manager, in which nobody else works in the folder.

    Args:
        folder: where; made when it is not there.
        artifact: the artifact's folder.
        user_ids: each id once.
        request: what everybody is asked with.
        shard_users: users of one shard; what is lost when a job is killed is at most one shard.

    Raises InvalidRequest for an empty or repeated list of users, NotPossible when the folder holds another job or
    another process works in it, NotWritable when it cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        artifact: str | Path,
        user_ids: Sequence[str],
        request: RecommendRequest,
        shard_users: int = SHARD_USERS,
    ) -> None:
        _check_users(user_ids)
        self.folder, self.artifact, self.users = Path(folder), Path(artifact), user_ids
        count = -(-len(user_ids) // shard_users)
        self.shards = [f"part-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
        self._content = _content(self.artifact, user_ids, request, shard_users)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Job:
        with self._stack, _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / LOCK)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise NotPossible(
                    f"{self.folder} is being written to by another process; wait until it ends."
                ) from None
            self._stack.callback(lock.release)
            self._claim()
            for path in self.folder.glob(".*.partial"):  # of a job that was killed
                path.unlink()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _claim(self) -> None:
        """Says in the folder what it is for, or checks that it is for this."""
        path = self.folder / JOB
        if not path.exists():
            _write_table(self.folder / USERS, pa.table({"user_id": pa.array(self.users, pa.string())}))
            _write_text(path, json.dumps(self._content, indent=1))
            return
        there = _read_json(path)
        for key, value in self._content.items():
            if there.get(key) != value:
                raise NotPossible(
                    f"{self.folder} holds another job, whose '{key}' is {there.get(key)!r:.80}, not {value!r:.80}. "
                    "Choose another folder, or remove this one."
                )

    def missing(self) -> list[int]:
        """Numbers of the shards that have to be made."""
        return [number for number in range(len(self.shards)) if self._held(number) is None]

    def done(self) -> int:
        """Users whose shards are there."""
        return len(self.users) - sum(len(_part(self.users, self._content, number)) for number in self.missing())

    def _held(self, number: int) -> dict[str, Any] | None:
        """What a shard says about itself; None when it is not there, or not a shard of this job."""
        try:
            metadata = pq.read_metadata(self.folder / self.shards[number]).metadata or {}
            held = json.loads(metadata[KEY])
        except (OSError, pa.ArrowInvalid, KeyError, ValueError):
            return None
        return held if held.get("job") == _digest(self._content) else None

    def run(self, lists: Lists, progress: Progress | None = None) -> BatchSummary:
        """Makes the missing shards in this process, one after the other."""
        started = time.perf_counter()
        before = self.done()
        for number in self.missing():
            part = _part(self.users, self._content, number)

            def advance(done: int, before: int = before) -> None:
                if progress:
                    progress(before + done, len(self.users))

            _write_shard(self.folder, self.shards[number], lists, part, self._content, advance)
            before += len(part)
        return self._finish(started)

    def run_on_beam(self, options: Sequence[str] = ()) -> BatchSummary:
        """Makes the missing shards as an Apache Beam pipeline, one element each, by the function that `run` calls.

        Folder and artifact must be seen by all workers under their paths here. A shard that Beam makes twice is renamed
        twice to the same content.

        Args:
            options: Beam's own, such as `--runner=FlinkRunner`; without any it runs here.

        Raises NotPossible when Beam is not installed.
        """
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ModuleNotFoundError as error:
            raise NotPossible(
                "the engine 'beam' needs the package apache-beam; install it with: pip install '.[batch]'. "
                "The engine 'local' needs nothing."
            ) from error
        started = time.perf_counter()
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            numbers = pipeline | "missing shards" >> beam.Create(self.missing()) | beam.Reshuffle()
            _ = numbers | "lists" >> beam.Map(make_shard, str(self.folder.resolve()), str(self.artifact.resolve()))
        return self._finish(started)

    def _finish(self, started: float) -> BatchSummary:
        shards = [self._held(number) for number in range(len(self.shards))]
        held = [shard for shard in shards if shard is not None]
        if len(held) < len(shards):
            raise NotPossible(f"{self.folder} must hold {len(shards)} shards; it has {len(held)}. Start the job again.")
        unknown = tuple(user for shard in held for user in shard["unknown"])
        rows, users = (sum(shard[name] for shard in held) for name in ("rows", "answered"))
        summary = BatchSummary(rows, users, unknown, time.perf_counter() - started)
        content = {"rows": rows, "users": users, "unknown_users": unknown, "shards": len(shards)}
        with _writing(self.folder):
            _write_text(self.folder / SUCCESS, json.dumps(content))
        return summary


def make_shard(number: int, folder: str, artifact: str) -> None:
    """Makes one shard of the job in `folder`, from what the folder says: what a worker of Beam does."""
    content = _read_json(Path(folder) / JOB)
    lists, users = _loaded(folder, artifact)
    name = f"part-{number:05d}-of-{-(-len(users) // content['shard_users']):05d}.parquet"
    _write_shard(Path(folder), name, lists, _part(users, content, number), content, lambda _: None)


_LOADING = threading.Lock()


def _loaded(folder: str, artifact: str) -> tuple[Lists, list[str]]:
    with _LOADING:  # a process may have several workers
        return _load(folder, artifact)


@functools.lru_cache(maxsize=1)
def _load(folder: str, artifact: str) -> tuple[Lists, list[str]]:
    """What the shards of a job share, loaded once a process."""
    from serving.predictor import Predictor

    content = _read_json(Path(folder) / JOB)
    if content["artifact"] != _file_digest(Path(artifact)):
        raise NotPossible(f"{artifact} is not the artifact that the job in {folder} was begun with.")
    request = RecommendRequest(**content["request"])
    users = pq.read_table(Path(folder) / USERS).column("user_id").to_pylist()
    return Lists(Predictor.load(artifact), Path(artifact), request), users


# ---- what a job is -------------------------------------------------------------------------------------------


def _content(artifact: Path, user_ids: Sequence[str], request: RecommendRequest, shard_users: int) -> dict[str, Any]:
    """All that decides what the shards hold, as JSON has it."""
    asked = asdict(request)
    for name in ("user_id", "history", "timeout_ms", "model", "version", "label"):
        del asked[name]
    users = hashlib.sha256("\0".join(user_ids).encode("utf-8")).hexdigest()
    content = {"artifact": _file_digest(artifact), "users": users, "shard_users": shard_users, "request": asked}
    return dict(json.loads(json.dumps(content)))


def _file_digest(artifact: Path) -> str:
    """The artifact's hash: its manifest lists the hash of every other file."""
    return hashlib.sha256((artifact / FILE_NAME).read_bytes()).hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def _part(user_ids: Sequence[str], content: dict[str, Any], number: int) -> Sequence[str]:
    size = content["shard_users"]
    return user_ids[number * size : (number + 1) * size]


def _check_users(user_ids: Sequence[str]) -> None:
    if not len(user_ids) or len(set(user_ids)) != len(user_ids):
        raise InvalidRequest("a batch job needs a list of users with each id once; it is empty or repeats some.")


# ---- files ---------------------------------------------------------------------------------------------------


def _write_shard(
    folder: Path,
    name: str,
    lists: Lists,
    user_ids: Sequence[str],
    content: dict[str, Any],
    advance: Callable[[int], None],
) -> None:
    _write(folder / name, lists, user_ids, {"job": _digest(content)}, advance)


def _write(
    path: Path, lists: Lists, user_ids: Sequence[str], facts: dict[str, Any], advance: Callable[[int], None]
) -> dict[str, Any]:
    """Writes a file of lists whole or not at all, and returns what it says about itself."""
    held: dict[str, Any] = {**facts, "rows": 0, "answered": 0, "unknown": []}
    done = 0
    with _aside(path) as partial, pq.ParquetWriter(partial, lists.schema) as writer:
        for block in lists.blocks(user_ids):
            writer.write_table(block.table)
            held["rows"] += block.table.num_rows
            held["answered"] += block.answered
            held["unknown"].extend(block.unknown)
            done += block.asked
            advance(done)
        writer.add_key_value_metadata({KEY: json.dumps(held).encode("utf-8")})
    return held


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Gives a hidden name beside `path`, which takes its place, durably, when the body ends without an error."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    with _writing(path):
        try:
            with open(partial, "xb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)  # until we end, however: `_clear` leaves it alone
                yield partial
                os.fsync(handle.fileno())
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # or a power cut could undo the rename
        finally:
            os.close(folder)


def _clear(path: Path) -> None:
    """Removes what calls that were killed left beside `path`; what somebody still writes is locked."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), open(partial, "rb") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def _write_text(path: Path, text: str) -> None:
    with _aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _write_table(path: Path, table: pa.Table) -> None:
    with _aside(path) as partial:
        pq.write_table(table, partial)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise NotPossible(f"{path} must say what job the folder holds; it cannot be read ({error}).") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWritable(f"{path} must be writable; the system answered '{error.strerror or error}'.") from error
