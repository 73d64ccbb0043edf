"""The versions that are being served: found, verified, loaded, warmed, handed out, and taken away again.

A model is a folder with numbered versions, which appear by rename (`fusion.export.manifest.publish`). A new version
takes over only when it has been verified, loaded and warmed, and the old one goes only after that and when its last
request is answered. What cannot be loaded stays out; why is told by `statuses`, and it is tried again after growing
pauses, or at once when its files change.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import enum
import fcntl
import functools
import gc
import json
import logging
import math
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fusion.export.manifest import Manifest
from serving.batching import Batcher, BatchSettings
from serving.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    NotPossible,
    Overloaded,
    ServingError,
    Unavailable,
    UnknownLabel,
    UnknownModel,
    unknown,
)
from serving.files import replace_text, stamp
from serving.graph import GRAPH_FILE, read_graph, signature_defs
from serving.inputs import Arrays
from serving.limits import Limits
from serving.members import asked_apart
from serving.metrics import METRICS, Labels
from serving.model_config import ModelConfig as ModelConfig
from serving.model_config import check_configs
from serving.model_config import version_folders as version_folders
from serving.predictor import CHANGING, Predictor
from serving.warmup import WARM_UP_S, warm_up

logger = logging.getLogger(__name__)

CANARY, STABLE = "canary", "stable"
"""Labels: of the version that gets a share of the requests that name neither version nor label, and of the one that
needs no trial any more."""
MEMORY_FACTOR = 1.2
"""A loaded SavedModel takes about this many times the bytes of its files; the number of TensorFlow Serving."""
GRAPH_FILES = (GRAPH_FILE, "variables/", "assets/")
CLOSE_S = 5.0
"""The longest that the end waits for a version that is just being loaded, or for an order."""

Called = Callable[["Servable", str, Arrays, Callable[[], Arrays], float], None]
"""Is told the version, the signature, its inputs, what gives its outputs or raises, and the seconds it took."""


class State(enum.IntEnum):
    """States of a version, with the numbers of `tensorflow.serving.ModelVersionStatus.State`."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclass(frozen=True)
class VersionStatus:
    """One version: its state, and why it is not available where something went wrong.

    Attributes:
        version: its number.
        state: one of State.
        error: one sentence, empty when all is well.
        grpc_code: the code of the error, `OK` without one.
        attempts: how often loading was tried and failed since the files last changed.
        warmed: requests of the warm-up file that were answered.
    """

    version: int
    state: State
    error: str = ""
    grpc_code: str = "OK"
    attempts: int = 0
    warmed: int = 0


@dataclass(frozen=True)
class Retries:
    """How often a version that cannot be loaded is tried: pauses double from `pause_s`, until `attempts` failed."""

    attempts: int = 5
    pause_s: float = 5.0


class Servable:
    """A loaded version. Safe to use from any thread; valid while it is leased.

    Attributes:
        name, version: of the model.
        predictor: the artifact.
        folder: where its files lie.
        warmed: requests of the warm-up file that were answered.
    """

    def __init__(
        self,
        name: str,
        version: int,
        predictor: Predictor,
        folder: Path,
        settings: BatchSettings,
        called: Called | None = None,
    ) -> None:
        self._called = called
        self.name = name
        self.version = version
        self.predictor = predictor
        self.folder = folder
        self.warmed = 0
        self._batcher = Batcher(predictor.run, predictor.manifest.signatures, settings, name, lambda: predictor.changes)

    def submit(self, signature: str, arrays: Arrays, deadline: float | None = None) -> Future[Arrays]:
        """Puts checked inputs into the queue (`Predictor.check`, `Batcher.submit`). Raises Forbidden for those that
        change the model."""
        _check_changes_nothing(signature)
        started = time.monotonic()
        future = self._batcher.submit(signature, arrays, deadline)
        self._watch(future, signature, arrays, started)
        return future

    def soon(self, signature: str, arrays: Arrays) -> asyncio.Future[Arrays] | None:
        """As `submit`, on the running event loop, where that is quick; None where it is not (`Batcher.soon`)."""
        _check_changes_nothing(signature)
        started = time.monotonic()
        future = self._batcher.soon(signature, arrays)
        if future is not None:
            self._watch(future, signature, arrays, started)
        return future

    def aside(self, signature: str, arrays: Arrays) -> Arrays:
        """The outputs for checked inputs, computed at once and beside the queue, in which what hangs keeps everybody
        waiting. Raises as `Predictor.run` does."""
        future: Future[Arrays] = Future()
        self._watch(future, signature, arrays, time.monotonic())
        try:
            future.set_result(self.predictor.run(signature, arrays))
        except ServingError as error:
            future.set_exception(error)
        return future.result()

    def _watch(
        self, future: Future[Arrays] | asyncio.Future[Arrays], signature: str, arrays: Arrays, started: float
    ) -> None:
        called = self._called
        if called is not None:
            future.add_done_callback(
                lambda done: called(self, signature, arrays, done.result, time.monotonic() - started)
            )

    def call(self, signature: str, inputs: Mapping[str, Any], deadline: float | None = None) -> Arrays:
        """The outputs of one signature by name, computed together with what else waits.

        Args:
            signature: its name.
            inputs: every input, as arrays or nested lists (`Predictor.predict`).
            deadline: `time.monotonic()` until which to wait; None waits as long as it takes.

        Raises what `Predictor.predict` raises, Overloaded for a full queue, DeadlineExceeded.
        """
        future = self.submit(signature, self.predictor.check(signature, inputs), deadline)
        try:
            return future.result(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        except FutureTimeout as error:
            future.cancel()
            raise DeadlineExceeded("the deadline passed before the model answered.") from error

    @functools.cached_property
    def signature_defs(self) -> dict[str, Any]:
        """`SignatureDef` by name, as the file has them. Raises ArtifactRefused when the file has gone meanwhile."""
        known = signature_defs(read_graph(self.folder))
        return {name: known[name] for name in self.predictor.manifest.signatures}

    @property
    def waiting(self) -> int:
        """How many requests are in the queue."""
        return self._batcher.depth

    def close(self) -> None:
        """Answers what waits and ends the threads."""
        self._batcher.close()


def _check_changes_nothing(signature: str) -> None:
    if signature in CHANGING:
        raise Forbidden(f"'{signature}' is for administrators: ask the door of administration (/v1/admin/items).")


@dataclass(eq=False)
class _Version:
    number: int
    folder: Path
    state: State = State.START
    error: ServingError | None = None
    servable: Servable | None = None
    leases: int = 0
    attempts: int = 0
    again_at: float = 0.0  # time.monotonic()
    fingerprint: int = 0  # of the files that could not be loaded

    def status(self) -> VersionStatus:
        warmed = self.servable.warmed if self.servable else 0
        if self.error is None:
            return VersionStatus(self.number, self.state, warmed=warmed)
        sentence = str(self.error).replace(str(self.folder), f"version {self.number}")  # a status shows no paths
        return VersionStatus(self.number, self.state, sentence, self.error.grpc_code, self.attempts, warmed)


@dataclass(eq=False)
class _Model:
    config: ModelConfig
    versions: dict[int, _Version] = field(default_factory=dict)
    withdrawn: set[int] = field(default_factory=set)  # by a rollback
    dropped: frozenset[str] = frozenset()  # members
    calls: int = 0  # without version and label, to share them out

    def available(self) -> list[int]:
        return sorted(number for number, version in self.versions.items() if version.state == State.AVAILABLE)

    def allows(self, number: int) -> bool:
        return number not in self.withdrawn and (not self.config.versions or number in self.config.versions)

    def at_once(self) -> int | None:
        """How many versions are served at once; None for all that are allowed."""
        return self.config.latest if self.config.versions is None else None


class ModelStore:
    """Loads, hands out and unloads the versions of models. Safe to use from any thread.

    Nothing is loaded before `poll` is called; `start` calls it again and again in a thread.

    Args:
        models: what to serve.
        limits: how large requests may be.
        batching: how requests are put together.
        retries: how often a version that does not load is tried.
        shared: a file through which the processes of one server tell each other of changes that were ordered by
            `reload`, `assign_label`, `rollback`, `drop_member` and `restore_member`; None for a single process.
        free_memory: bytes that a new version may take.
        called: told of every call that has ended, see `serving.watching.Watching.called`.
        prepare: gets a new version when it is loaded and warm, before it takes over; see `serving.new_items`.
        warm_up_s: the longest that the warm-up of a version may take.

    Raises InvalidRequest for a list that names a model twice or contradicts itself.
    """

    def __init__(
        self,
        models: Sequence[ModelConfig],
        limits: Limits | None = None,
        batching: BatchSettings | None = None,
        retries: Retries | None = None,
        shared: Path | None = None,
        free_memory: Callable[[], int] | None = None,
        called: Called | None = None,
        prepare: Callable[[Servable], None] | None = None,
        warm_up_s: float = WARM_UP_S,
    ) -> None:
        check_configs(models)
        self._warm_up_s = warm_up_s
        self._called, self._prepare = called, prepare
        self._limits, self._batching = limits or Limits(), batching or BatchSettings()
        self._retries, self._shared = retries or Retries(), shared
        self._free_memory = free_memory or available_memory
        self._models = {config.name: _Model(config) for config in models}
        self._leaving: list[tuple[str, _Version]] = []
        self._lock = threading.RLock()  # of everything that is read by requests; held for moments
        self._work = threading.RLock()  # of loading and unloading; held for as long as it takes
        self._wake = threading.Event()
        self._closed = self._draining = False
        self._seen_shared: tuple[int, ...] = ()
        self._thread: threading.Thread | None = None
        self._unwatch = METRICS.watch(self._gauges)

    # ---- requests ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self, name: str = "", version: int | None = None, label: str = "", key: str = "") -> Iterator[Servable]:
        """A loaded version, which stays loaded for as long as the context lasts.

        Args:
            name: of the model; may be empty where only one is served.
            version: its number. With neither version nor label it is the newest one that is available, or the canary.
            label: its label.
            key: requests with the same key, such as a user, meet the canary always or never; without a key each one
                is counted.

        Raises UnknownModel, UnknownLabel, InvalidRequest, Unavailable when the store is closed.
        """
        with self._lock:
            chosen = self._choose(name, version, label, key)
            chosen.leases += 1
        try:
            assert chosen.servable is not None  # it is available
            yield chosen.servable
        finally:
            with self._lock:
                chosen.leases -= 1
                idle = not chosen.leases and chosen.state == State.UNLOADING
            if idle:
                self._wake.set()

    def names(self) -> list[str]:
        """Names of the models, in the order of the configuration."""
        with self._lock:
            return list(self._models)

    @property
    def ready(self) -> bool:
        """Whether every model has a version that is available."""
        with self._lock:
            return not self._draining and all(model.available() for model in self._models.values())

    def drain(self) -> None:
        """From now on `ready` is false, so that balancers look for another server; requests are still answered."""
        self._draining = True

    def statuses(self, name: str, version: int | None = None) -> list[VersionStatus]:
        """What is known of the versions of a model, or of one of them, newest first. Raises UnknownModel."""
        with self._lock:
            model = self._model(name)
            found = [model.versions[n].status() for n in sorted(model.versions, reverse=True) if version in (None, n)]
        if version is not None and not found:
            raise UnknownModel(f"Could not find version {version} of model {name}")
        return found

    def labels(self, name: str) -> dict[str, int]:
        """The labels of a model whose versions are available. Raises UnknownModel."""
        with self._lock:
            model = self._model(name)
            return {label: n for label, n in model.config.labels.items() if n in model.available()}

    def served(self, name: str) -> frozenset[int]:
        """The versions of a model that are available; empty where the model has just gone."""
        with self._lock:
            model = self._models.get(name)
            return frozenset() if model is None else frozenset(model.available())

    def dropped(self, name: str) -> frozenset[str]:
        """The members that answers of a model are made without; empty where the model has just gone."""
        model = self._models.get(name)
        return frozenset() if model is None else model.dropped

    def _model(self, name: str) -> _Model:
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name not in self._models:  # in the words of TensorFlow Serving, which its clients compare
            raise UnknownModel(f"Servable not found for request: Latest({name[:100]})")
        return self._models[name]

    def _choose(self, name: str, version: int | None, label: str, key: str) -> _Version:
        if self._closed:
            raise Unavailable("the server is stopping; ask another one.")
        if version is not None and label:
            raise InvalidRequest("a request names a version or a label; received both.")
        model = self._model(name)
        available = model.available()
        if label:
            number = model.config.labels.get(label)
            if number not in available:
                raise UnknownLabel(f"Unrecognized servable version label: {label[:100]}")
        elif version is not None:
            number = version
            if number not in available:
                raise UnknownModel(f"Servable not found for request: Specific({model.config.name}, {version})")
        else:
            number = self._unnamed(model, available, key)
        return model.versions[number]

    def _unnamed(self, model: _Model, available: list[int], key: str) -> int:
        """The newest version; where a share goes to a canary, that or the newest of the others."""
        if not available:
            raise UnknownModel(f"Servable not found for request: Latest({model.config.name})")
        labels, share = model.config.labels, model.config.canary
        unproven = available[-1] if labels.get(STABLE) != available[-1] else None
        canary = labels.get(CANARY, unproven)
        others = [number for number in available if number != canary]
        if not share or canary not in available or not others:
            return available[-1]
        if key:
            return canary if zlib.crc32(key.encode("utf-8", "surrogatepass")) / 2**32 < share else others[-1]
        model.calls += 1  # the share of any stretch of calls differs from the wanted one by less than one call
        return canary if int(model.calls * share) > int((model.calls - 1) * share) else others[-1]

    # ---- orders --------------------------------------------------------------------------------------------------

    def reload(self, models: Sequence[ModelConfig]) -> None:
        """Serves exactly `models` from now on, as `HandleReloadConfigRequest` means it; returns when they answer.

        A model that is new, or whose folder changed, is loaded before anything is given up; where that fails nothing
        changes. Rollbacks are forgotten; members that were dropped stay out while the model keeps its folder.

        Raises:
            InvalidRequest: the list contradicts itself.
            NotPossible: a new model has no version that loads, or a label's version is not available.
        """
        check_configs(models)
        with self._ordered():
            fresh = self._loaded_first(models)
            with self._lock:
                gone = [model for model in self._models.values() if model not in fresh.values()]
                self._models = fresh
                for model in gone:
                    self._leave(model, model.available())
            try:
                for config in models:
                    self._follow(fresh[config.name], config)
            finally:
                self._release_idle()

    def _follow(self, model: _Model, config: ModelConfig) -> None:
        """Serves a model as it is configured now; its labels move once their versions are available."""
        with self._lock:
            model.config = dataclasses.replace(config, labels=model.config.labels)
            model.withdrawn = set()
        self._align(model)
        for label, number in config.labels.items():
            self._check_label(model, label, number)
        with self._lock:
            model.config = config

    def _loaded_first(self, models: Sequence[ModelConfig]) -> dict[str, _Model]:
        """Models by name: those that are served from the same folder as they are, others newly loaded."""
        fresh: dict[str, _Model] = {}
        for config in models:
            old = self._models.get(config.name)
            if old is not None and old.config.folder == config.folder:
                fresh[config.name] = old
                continue
            model = fresh[config.name] = _Model(dataclasses.replace(config, labels={}))
            self._align(model)
            if not model.available():
                reasons = "; ".join(v.status().error for v in model.versions.values()) or "there is no version"
                for other in fresh.values():
                    if other not in self._models.values():
                        self._leave(other, other.available())
                self._release_idle()
                raise NotPossible(f"every new model must load; '{config.name}' does not: {reasons}")
        return fresh

    def assign_label(self, name: str, label: str, version: int) -> None:
        """From now on `label` means this version. Raises UnknownModel, and NotPossible when it is not available."""
        with self._ordered(), self._lock:
            model = self._model(name)
            self._check_label(model, label, version)
            model.config = dataclasses.replace(model.config, labels={**model.config.labels, label: version})

    def rollback(self, name: str, leave: int | None = None) -> int:
        """Goes back to the version before the newest one that is available, or before the version to leave, and returns
        the number of the newest one that is served then.

        The earlier version takes over at once where it is loaded, and is loaded first where it is not. What is left
        stays out until `reload`; a version that is published later is served as usual.

        Args:
            name: of the model.
            leave: the version that is meant. Several processes, or rules, may want to leave the same one: where it is
                served no longer, nothing is done. One that this process is yet to load stays out as well. Without a
                number it is the newest one that is available here, with all after it.

        Raises UnknownModel, and NotPossible when no earlier version can be loaded.
        """
        with self._ordered():
            model = self._model(name)
            available = model.available()
            if not available:
                raise NotPossible(f"'{name}' has no version that is available, so there is nothing to go back from.")
            found = self._find(model)
            newest = available[-1]
            to_come = {number for number in found if number > newest and model.allows(number)}
            if leave is not None and leave not in to_come.union(available):
                return newest
            first, last = (newest, math.inf) if leave is None else (leave, leave)
            for number in sorted((n for n in found if n < first and model.allows(n)), reverse=True):
                if self._ready(model, number, at_once=True):
                    with self._lock:
                        model.withdrawn |= {later for later in found if number < later <= last}
                    self._align(model)
                    return max(model.available(), default=number)
            raise NotPossible(f"'{name}' has no version before {first} that can be loaded.")

    def drop_member(self, name: str, member: str) -> None:
        """From now on answers of a model are made without this member, whatever the version, until `restore_member`.

        Raises UnknownModel; InvalidRequest when no version has such a member; NotPossible when a version would be left
        without members, or cannot do without one of them.
        """
        with self._ordered(), self._lock:
            model = self._model(name)
            dropped = model.dropped | {member}
            for manifest in self._with_member(model, member):
                if not asked_apart(manifest) or dropped.issuperset(manifest.members):
                    raise NotPossible(
                        f"'{member}' can be left out only where another member stays, of an artifact with the "
                        f"signatures that ask members one by one; of {', '.join(manifest.members)} these are out: "
                        f"{', '.join(sorted(model.dropped)) or 'none'}."
                    )
            model.dropped = dropped

    def restore_member(self, name: str, member: str) -> None:
        """Takes back `drop_member`. Raises UnknownModel, and InvalidRequest when there is no such member."""
        with self._ordered(), self._lock:
            model = self._model(name)
            if member not in model.dropped:
                self._with_member(model, member)
            model.dropped -= {member}

    @staticmethod
    def _with_member(model: _Model, member: str) -> list[Manifest]:
        """What the available versions that have this member say about themselves."""
        servables = [model.versions[number].servable for number in model.available()]
        manifests = [servable.predictor.manifest for servable in servables if servable is not None]
        found = [manifest for manifest in manifests if member in manifest.members]
        if not found:
            known = sorted({name for manifest in manifests for name in manifest.members})
            raise InvalidRequest(f"a member of '{model.config.name}' must be named; {unknown(member, known)}.")
        return found

    def _check_label(self, model: _Model, label: str, version: int) -> None:
        if version not in model.available():
            raise NotPossible(
                f"a label can be given only to a version that is available; version {version} of "
                f"'{model.config.name}', which is to be '{label[:100]}', is not."
            )

    # ---- loading and unloading -----------------------------------------------------------------------------------

    def start(self, interval_s: float = 1.0) -> None:
        """Polls in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, args=(interval_s,), name="model-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes no more requests, answers those that were accepted, and unloads everything but what hangs."""
        with self._lock:
            if self._closed:
                return
            self._closed = self._draining = True
        self._wake.set()
        limit = time.monotonic() + CLOSE_S
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        held = self._work.acquire(timeout=max(limit - time.monotonic(), 0.0))
        if not held:
            logger.error("a version that is being loaded, or an order, takes too long; it is left behind")
        try:
            with self._lock:
                for model in self._models.values():
                    self._leave(model, model.available())
                leaving, self._leaving = self._leaving, []
            for name, version in leaving:
                self._release(name, version)
        finally:
            if held:
                self._work.release()
        self._unwatch()

    def poll(self) -> None:
        """Looks once for new and vanished versions, loads what is due, and releases what nobody uses any more."""
        with self._work:
            self._hear()
            for model in list(self._models.values()):
                self._align(model)
            self._release_idle()

    def _run(self, interval_s: float) -> None:
        while not self._closed:
            try:
                self.poll()
            except Exception:  # the thread must outlive whatever a disk or a library comes up with
                logger.exception("looking for versions failed; it is tried again")
            self._wake.wait(interval_s)
            self._wake.clear()

    def _find(self, model: _Model) -> dict[int, Path]:
        """Version folders on disk by number; also notes new ones, and forgets vanished ones that are not in use."""
        found = version_folders(model.config.folder)
        with self._lock:
            for number, folder in found.items():
                if number not in model.versions:
                    model.versions[number] = _Version(number, folder)
            for number in set(model.versions) - set(found):
                if model.versions[number].state in (State.START, State.END):
                    del model.versions[number]
        return found

    def _align(self, model: _Model) -> None:
        """Serves what the configuration wants, as far as it can be loaded; never gives up the last one that answers."""
        wanted: list[int] = []
        for number in sorted(filter(model.allows, self._find(model)), reverse=True):
            if len(wanted) == model.at_once():
                break
            if self._ready(model, number):
                wanted.append(number)
        if wanted:
            with self._lock:
                self._leave(model, [number for number in model.available() if number not in wanted])

    def _ready(self, model: _Model, number: int, at_once: bool = False) -> bool:
        """Whether the version answers; loads it where that is due."""
        version = model.versions[number]
        with self._lock:
            if version.state == State.UNLOADING and version.servable is not None:  # wanted again, and still there
                self._leaving.remove((model.config.name, version))
                version.state = State.AVAILABLE
            if version.state == State.AVAILABLE:
                return True
        if self._closed:
            return False
        if version.error is not None:
            changed = fingerprint(version.folder) != version.fingerprint
            if changed:
                version.attempts = 0
            if not (changed or at_once or time.monotonic() >= version.again_at):
                return False
        return self._load(model.config.name, version)

    def _load(self, name: str, version: _Version) -> bool:
        started, marks = time.monotonic(), fingerprint(version.folder)
        with self._lock:
            version.state = State.LOADING
        try:
            servable = self._loaded(name, version)
        except ServingError as error:
            self._failed(name, version, error, marks)
            return False
        except Exception as error:
            logger.exception("version %s of '%s' cannot be loaded", version.number, name)
            self._failed(name, version, ServingError(f"unexpected {type(error).__name__} while loading."), marks)
            return False
        with self._lock:
            version.servable, version.state, version.error, version.attempts = servable, State.AVAILABLE, None, 0
        if gc.get_freeze_count():
            gc.freeze()  # a full collection walks through a graph for .2 s and more, in which nobody is answered
        logger.info("'%s' version %s serves after %.1f s", name, version.number, time.monotonic() - started)
        return True

    def _loaded(self, name: str, version: _Version) -> Servable:
        """Verified, loaded and warmed."""
        needed, free = memory_needed(version.folder), self._free_memory()
        if needed > free:
            raise Overloaded(
                f"version {version.number} of '{name}' needs about {needed / 1e6:,.0f} MB of memory; "
                f"{free / 1e6:,.0f} MB are free. Serve fewer versions at once, or give the machine more."
            )
        predictor = Predictor.load(version.folder, self._limits, self._batching.cores)
        servable = Servable(name, version.number, predictor, version.folder, self._batching, self._called)
        try:
            servable.warmed = warm_up(version.folder, servable.call, self._warm_up_s)
            if self._prepare is not None:
                self._prepare(servable)
            if self._closed:  # without waiting for this version; nobody would take it away again
                raise Unavailable("the server is stopping; ask another one.")
        except BaseException:
            servable.close()
            raise
        return servable

    def _failed(self, name: str, version: _Version, error: ServingError, marks: int) -> None:
        METRICS.count("serving_load_failures", (name,))
        with self._lock:
            version.state, version.error, version.fingerprint = State.END, error, marks
            version.attempts += 1
            pause = self._retries.pause_s * 2 ** (version.attempts - 1)
            version.again_at = time.monotonic() + pause if version.attempts < self._retries.attempts else math.inf
        logger.warning("'%s' version %s is not served: %s", name, version.number, version.status().error)
        release_memory()

    def _leave(self, model: _Model, numbers: Sequence[int]) -> None:
        """Hands these versions out no more; what is leased is finished."""
        for number in numbers:
            model.versions[number].state = State.UNLOADING
            self._leaving.append((model.config.name, model.versions[number]))

    def _release_idle(self) -> None:
        with self._lock:
            idle = [(name, version) for name, version in self._leaving if not version.leases]
            self._leaving = [entry for entry in self._leaving if entry not in idle]
        for name, version in idle:
            self._release(name, version)

    def _release(self, name: str, version: _Version) -> None:
        """Never on a thread that answers requests: freeing a large model takes a while."""
        servable, version.servable = version.servable, None
        if servable is not None:
            servable.close()
        del servable
        version.state = State.END
        release_memory()
        logger.info("'%s' version %s was unloaded", name, version.number)

    def _gauges(self) -> Iterator[tuple[str, Labels, float]]:
        with self._lock:
            for name, model in self._models.items():
                for number, version in model.versions.items():
                    yield "serving_version_state", (name, str(number)), float(version.state)
                    if version.servable is not None:
                        yield "serving_queue_depth", (name, str(number)), float(version.servable.waiting)

    # ---- several processes ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _ordered(self) -> Iterator[None]:
        """Around an order: what other processes were ordered is done first, and they are told afterwards. One process
        at a time, or of two orders at the same moment the first would be overwritten."""
        with self._work, self._alone():
            self._hear()
            try:
                yield
            finally:
                self._tell()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._shared is None:
            yield
            return
        with self._shared.with_suffix(".lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # until it is closed, or the process has died
            yield

    def _tell(self) -> None:
        """Writes what was ordered, for the other processes and for those that start later. The file lives no longer
        than the server, so it need not outlive the machine."""
        if self._shared is None:
            return
        with self._lock:
            content = [
                {
                    **dataclasses.asdict(m.config),
                    "folder": str(m.config.folder),
                    "withdrawn": sorted(m.withdrawn),
                    "dropped": sorted(m.dropped),
                }
                for m in self._models.values()
            ]
        replace_text(self._shared, json.dumps(content))
        self._seen_shared = stamp(self._shared)

    def _hear(self) -> None:
        """Does what another process was ordered to do."""
        if self._shared is None or (seen := stamp(self._shared)) == self._seen_shared:
            return
        orders = json.loads(self._shared.read_text(encoding="utf-8"))
        fresh = {}
        for order in orders:
            withdrawn, dropped = set(order.pop("withdrawn")), frozenset(order.pop("dropped"))
            versions = None if order["versions"] is None else tuple(order["versions"])
            config = ModelConfig(**{**order, "folder": Path(order["folder"]), "versions": versions})
            old = self._models.get(config.name)
            model = old if old is not None and old.config.folder == config.folder else _Model(config)
            with self._lock:
                model.config, model.withdrawn, model.dropped = config, withdrawn, dropped
            self._align(model)  # before an old one of its name goes
            fresh[config.name] = model
        with self._lock:
            for model in self._models.values():
                if model not in fresh.values():
                    self._leave(model, model.available())
            self._models = fresh
        self._seen_shared = seen  # not before: what could not be read or done is tried again, or would be lost


def fingerprint(folder: Path) -> int:
    """A number that changes when files of the folder appear, vanish or are written."""
    marks = []
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it may vanish meanwhile, which is a change as well
                status = os.stat(os.path.join(root, name), follow_symlinks=False)
                marks.append((root, name, status.st_size, status.st_mtime_ns))
    return hash(tuple(sorted(marks)))


def memory_needed(folder: Path) -> int:
    """Bytes that the artifact is going to take, from the sizes of the files that TensorFlow loads."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.relative_to(folder).as_posix().startswith(GRAPH_FILES):
                with contextlib.suppress(OSError):
                    total += path.stat().st_size
    return int(MEMORY_FACTOR * total)


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container where that has less."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such control group, or the limit is `max`
        return free


def release_memory() -> None:
    """Gives what was freed back to the system; glibc keeps it otherwise. What is frozen is collected, too."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
