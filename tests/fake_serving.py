"""A store with one small recommender of plain numpy, whose members can be made to fail, hang or say nothing."""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.export.manifest import FileEntry, Manifest, Signature, TensorSpec, write_manifest
from serving.errors import DeadlineExceeded, InvalidRequest, NotPossible, ServingError, UnknownModel
from serving.inputs import Arrays, check_inputs, signature_of
from serving.limits import Limits
from serving.model_store import ModelConfig, State, VersionStatus

ITEMS = [f"i{n}" for n in range(8)]
USERS = ["u0", "u1", "ü 2"]
K_MAX = 6
MEMBERS = ("likes", "text", "image")
REPORT = b"<!doctype html><title>films</title>"
POSTER = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""A picture of one pixel."""
IDS = {"user_id": TensorSpec("string", (None,)), "history": TensorSpec("string", (None, None))}
ASKED = {
    **IDS,
    "k": TensorSpec("int32", (None,)),
    "exclude": TensorSpec("string", (None, None)),
    "include": TensorSpec("string", (None, None)),
}


def signatures(fast: bool) -> dict[str, Signature]:
    def listed(members: int) -> dict[str, TensorSpec]:
        return {
            "item_ids": TensorSpec("string", (None, K_MAX)),
            "scores": TensorSpec("float32", (None, K_MAX)),
            "contributions": TensorSpec("float32", (None, members, K_MAX)),
            "known_user": TensorSpec("bool", (None,)),
        }

    said = {"scores": TensorSpec("float32", (None, len(ITEMS)))}
    all_said = {"scores": TensorSpec("float32", (None, len(MEMBERS), len(ITEMS)))}
    found = {name: spec for name, spec in listed(3).items() if name != "known_user"}
    scored = TensorSpec("float32", (None, None))
    pair = {"x": TensorSpec("float32", (None, 2)), "y": TensorSpec("int32", (None,))}
    return {
        "serving_default": Signature({"history": IDS["history"], "candidates": IDS["history"]}, {"scores": scored}),
        "sum": Signature({"x": TensorSpec("float32", (None, 2))}, {"y": TensorSpec("float32", (None,))}),
        "odds": Signature({"x": TensorSpec("float32", (None, 2))}, {"probabilities": TensorSpec("float32", (None, 2))}),
        "pair": Signature(pair, {"sums": TensorSpec("float32", (None,)), "text_bytes": TensorSpec("string", (None,))}),
        "echo": Signature({"text": TensorSpec("string", (None,))}, {"text": TensorSpec("string", (None,))}),
        "recommend": Signature(ASKED, listed(3)),
        **({"recommend_fast": Signature(ASKED, listed(1))} if fast else {}),
        "similar_items": Signature({"item_id": IDS["user_id"], "k": ASKED["k"]}, found),
        **{f"member_{name}": Signature(IDS, said) for name in MEMBERS},
        "fuse": Signature({**ASKED, **all_said}, listed(3)),
    }


class Model:
    """The part of a `Predictor` that doors use."""

    def __init__(self, manifest: Manifest, limits: Limits) -> None:
        self.manifest, self.limits = manifest, limits


class FakeServable:
    """Members score item n by how near it is to places of their own; user u<n> has taken item n.

    Attributes:
        faults: by member or signature, 'raise', 'invalid', 'nan', 'hang' (until its deadline, where it is given one) or
            'stuck' (whatever the deadline); what hangs does so until `released` is set, or for 10 s.
        seconds: how long each member takes.
        calls: how often each signature was called.
    """

    def __init__(
        self, folder: Path, name: str = "films", version: int = 1, fast: bool = True, files: Any = None
    ) -> None:
        self.name, self.version, self.folder = name, version, folder
        self.predictor = Model(
            Manifest(
                kind="recommender",
                members=MEMBERS,
                signatures=signatures(fast),
                metrics={"ndcg@10": 0.25},
                profiles={"fast": {"member": "pupil"}},
                files=files or {},
            ),
            Limits(k=K_MAX, history=64, exclude=64, include=64, filters=8, id_bytes=64),
        )
        self.faults: dict[str, str] = {}
        self.seconds = 0.0
        self.calls: Counter[str] = Counter()
        self.released = threading.Event()

    def call(self, signature: str, inputs: Mapping[str, Any], deadline: float | None = None) -> Arrays:
        self.calls[signature] += 1
        spec = signature_of(self.predictor.manifest, signature)
        arrays = check_inputs(spec.inputs, inputs, self.predictor.limits)
        self._fail(signature, deadline)
        if signature == "serving_default":
            return {"scores": np.vectorize(len, [np.float32])(arrays["candidates"])}
        if signature == "odds":
            return {"probabilities": arrays["x"] / arrays["x"].sum(axis=1, keepdims=True)}
        if signature == "sum":
            return {"y": arrays["x"].sum(axis=1)}
        if signature == "pair":
            text = [b"\xff\0" + bytes([n]) for n in range(len(arrays["y"]))]
            return {"sums": arrays["x"].sum(axis=1) + arrays["y"], "text_bytes": np.array(text, object)}
        if signature == "echo":
            return arrays
        if signature == "similar_items":
            answer = self._listed({**arrays, "history": arrays["item_id"][:, None]}, self._said(arrays, deadline))
            answer.pop("known_user")
            return answer
        if signature.startswith("member_"):
            return {"scores": self._member(signature.removeprefix("member_"), arrays, deadline)}
        if signature == "recommend_fast":
            return self._listed(arrays, self._said(arrays, deadline)[:, :1])
        return self._listed(arrays, arrays["scores"] if signature == "fuse" else self._said(arrays, deadline))

    def submit(self, signature: str, inputs: Mapping[str, Any], deadline: float | None = None) -> Future[Arrays]:
        """`call` in a thread of its own."""
        future: Future[Arrays] = Future()

        def work() -> None:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(self.call(signature, inputs, deadline))
            except ServingError as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def aside(self, signature: str, arrays: Arrays) -> Arrays:
        return self.call(signature, arrays)

    def _fail(self, name: str, deadline: float | None) -> None:
        fault = self.faults.get(name)
        if fault == "raise":
            raise ServingError(f"'{name}' failed in /secret/path.")
        if fault == "invalid":
            raise InvalidRequest(f"'{name}' cannot answer these inputs.")
        if fault == "hang":
            self.released.wait(10 if deadline is None else max(deadline - time.monotonic(), 0))
            raise DeadlineExceeded(f"'{name}' did not answer in time.")
        if fault == "stuck":
            self.released.wait(10)

    def _member(self, name: str, arrays: Arrays, deadline: float | None) -> np.ndarray:
        self._fail(name, deadline)
        time.sleep(self.seconds)
        place = 2.0 * MEMBERS.index(name)
        rows = len(next(iter(arrays.values())))
        scores = np.tile(-np.abs(np.arange(len(ITEMS)) - place) - 1, (rows, 1)).astype(np.float32)
        return np.full_like(scores, np.nan) if self.faults.get(name) == "nan" else scores

    def _said(self, arrays: Arrays, deadline: float | None) -> np.ndarray:
        return np.stack([self._member(name, arrays, deadline) for name in MEMBERS], axis=1)

    def _listed(self, arrays: Arrays, said: np.ndarray) -> Arrays:
        rows = len(said)
        said = np.where(np.isfinite(said), said, 0)
        answer = {
            "item_ids": np.full((rows, K_MAX), b"", object),
            "scores": np.zeros((rows, K_MAX), np.float32),
            "contributions": np.zeros((rows, said.shape[1], K_MAX), np.float32),
            "known_user": np.zeros(rows, bool),
        }
        for row in range(rows):
            texts = {
                name: [v.decode() for v in np.atleast_1d(values[row])]
                for name, values in arrays.items()
                if values.dtype == object
            }
            user = texts.get("user_id", [""])[0]
            answer["known_user"][row] = user in USERS
            hidden = {f"i{USERS.index(user)}"} if user in USERS else set()
            hidden |= set(texts["history"]) | set(texts.get("exclude", []))
            allowed = set(texts.get("include", [])) - {""} or set(ITEMS)
            fused = said[row].sum(axis=0)
            best = [n for n in np.argsort(-fused, kind="stable") if ITEMS[n] in allowed - hidden]
            best = best[: min(arrays["k"][row], K_MAX)]
            answer["item_ids"][row, : len(best)] = [ITEMS[n].encode() for n in best]
            answer["scores"][row, : len(best)] = fused[best]
            answer["contributions"][row, :, : len(best)] = said[row][:, best]
        return answer


class FakeStore:
    """One model with the interface of `serving.model_store.ModelStore` that the doors use."""

    def __init__(self, servable: FakeServable) -> None:
        self.servable = servable
        self.given = {"stable": servable.version}
        self.out: frozenset[str] = frozenset()
        self.leases = 0
        self.ready = True
        self.orders: list[Any] = []

    def names(self) -> list[str]:
        return [self.servable.name]

    def statuses(self, name: str, version: int | None = None) -> list[VersionStatus]:
        with self.lease(name, version):
            return [VersionStatus(self.servable.version, State.AVAILABLE, warmed=2)]

    def labels(self, name: str) -> dict[str, int]:
        return self.given

    def assign_label(self, name: str, label: str, version: int) -> None:
        with self.lease(name, version):
            self.given[label] = version

    def drop_member(self, name: str, member: str) -> None:
        with self.lease(name):
            self.out |= {member}

    def restore_member(self, name: str, member: str) -> None:
        with self.lease(name):
            self.out -= {member}

    def dropped(self, name: str) -> frozenset[str]:
        return self.out

    def rollback(self, name: str, leave: int | None = None) -> int:
        if leave not in (None, self.servable.version):
            return self.servable.version
        raise NotPossible(f"'{name}' has no version before 1 that can be loaded.")

    def reload(self, models: Sequence[ModelConfig]) -> None:
        self.orders.append(list(models))

    @contextmanager
    def lease(
        self, name: str = "", version: int | None = None, label: str = "", key: str = ""
    ) -> Iterator[FakeServable]:
        if name not in ("", self.servable.name):
            raise UnknownModel(f"this server has the model {self.servable.name}; received '{name[:100]}'.")
        wanted = self.given.get(label) if label else version
        if (label or version is not None) and wanted != self.servable.version:
            raise UnknownModel(f"'{self.servable.name}' has the version {self.servable.version}.")
        self.leases += 1
        try:
            yield self.servable
        finally:
            self.leases -= 1


def write_tables(folder: Path) -> Mapping[str, FileEntry]:
    """Items with attributes and vectors, users, a poster, and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    items = {
        "item_id": ITEMS,
        "title": [f"Film {n}" if n != 3 else None for n in range(8)],
        "language": ["en", "en", "fr", "fr", "de", None, "en", "fr"],
        "year": [1990, 1991, 1990, 1991, 1990, 1991, None, 1990],
        "seen": [True, False] * 4,
        "genres": [["war", "love"], ["love"], [], None, ["war"], ["war"], ["love"], ["sea"]],
        "image": ["posters/i0.png", *[None] * 7],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    pq.write_table(pa.table({"user_id": USERS}), folder / "users.parquet")
    # i0 and i1 are the same, i6 has none, the others stand at right angles.
    vectors = np.eye(8, dtype=np.float32)
    vectors[1], vectors[6] = 2 * vectors[0], 0
    np.save(folder / "item_vectors.npy", vectors)
    (folder / "posters").mkdir(exist_ok=True)
    (folder / "posters" / "i0.png").write_bytes(POSTER)
    (folder / "report.html").write_bytes(REPORT)
    return write_manifest(folder, Manifest(kind="recommender", members=MEMBERS)).files
