"""Fits a member once: what a config, its rows and the code have already made is taken from the cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fusion.config import Part, content_hash, parse_part
from fusion.errors import DataError
from fusion.files import atomic_folder, load_arrays, lock_folder, save_arrays
from fusion.registry import Registry
from fusion.types import History, RunOptions, derive_seed
from recsys.measuring import PeakMemory
from recsys.run import code_version


class FitData(Protocol):
    """What members are fitted on, of either task."""

    @property
    def cache(self) -> Path:
        """Where what runs share lies."""

    def fingerprint(self, part: Part) -> str:
        """Names everything that fitting `part` on this data depends on."""


@dataclass(frozen=True)
class Fitted:
    """A fitted member, the settings it was fitted with, where it lies, and what fitting it took."""

    member: Any
    part: Part
    folder: Path
    history: History | None
    seconds: float
    peak_bytes: int | None = None
    """Most memory that fitting held beyond what the process held before; None for members fitted by older code."""

    @property
    def recipe(self) -> Part:
        """The same for rows on which nothing may be validated: as many epochs as were best before."""
        history, config = self.history, self.part.config
        if history is None or not history.epochs or not hasattr(config, "training"):
            return self.part
        epochs = max(history.best_epoch, 0) + 1
        training = config.training.model_copy(update={"epochs": epochs, "patience": 0, "target": None})
        return replace(self.part, config=config.model_copy(update={"training": training}))


def fit_member(name: str, part: Part, data: FitData, seed: int, *, strategy: Any = None, quiet: bool = False) -> Fitted:
    """The member `name` fitted on `data`, from the cache where it lies there.

    An interrupted training leaves its checkpoints in the cache and is continued by the next call.
    """
    key = _key(name, part, data, seed)
    folder = data.cache / "members" / key
    work = data.cache / "work" / key / name
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        # The locked folder itself stays: another process may be waiting for its lock.
        with lock_folder(work.parent, wait=True):
            if not folder.exists():  # another process may have fitted it while we waited
                work.mkdir(exist_ok=True)
                _fit_into(folder, work, name, part, data, seed, strategy, quiet)
            shutil.rmtree(work, ignore_errors=True)
    return load_fitted(folder, name, part.registry, seed)


def _fit_into(
    folder: Path, work: Path, name: str, part: Part, data: FitData, seed: int, strategy: Any, quiet: bool
) -> None:
    started = time.perf_counter()
    try:
        # The scope is where its variables have to be made.
        with PeakMemory() as memory, strategy.scope() if strategy else contextlib.nullcontext():
            member = part.make(derive_seed(seed, "member", name))
            history = member.fit(data, RunOptions(derive_seed(seed, "training", name), work, strategy, quiet))
    except DataError as error:
        raise DataError(f"members.{name}: {error}") from error
    seconds = time.perf_counter() - started
    with atomic_folder(folder) as aside:
        save_arrays(aside / "state.npz", member.state())
        facts = {
            "kind": part.kind,
            "config": part.dump(),
            "seconds": seconds,
            "peak_bytes": memory.bytes,
            "parameters": member.parameters,
            "history": asdict(history) if history else None,
            "truncation_loss": getattr(member, "truncation", None),
        }
        (aside / "member.json").write_text(json.dumps(facts, indent=2, default=float), encoding="utf-8")
        for events in work.rglob("events.out.tfevents.*"):
            shutil.copy(events, aside)


def load_fitted(folder: Path, name: str, registry: Registry, seed: int) -> Fitted:
    """A fitted member out of its folder, with the settings that are written there."""
    facts = json.loads((folder / "member.json").read_text(encoding="utf-8"))
    part = parse_part(registry, facts["config"], name)
    member = part.make(derive_seed(seed, "member", name))
    member.load_state(load_arrays(folder / "state.npz"))
    history = History(**facts["history"]) if facts["history"] else None
    return Fitted(member, part, folder, history, facts["seconds"], facts.get("peak_bytes"))


def _key(name: str, part: Part, data: FitData, seed: int) -> str:
    recipe = {"name": name, "part": part.dump(), "seed": seed, "code": code_version()}
    return content_hash({**recipe, "data": data.fingerprint(part)})


def keep_copy(source: Path, target: Path) -> None:
    """The files of a fitted member in a run's own folder: hard links where the disk has them, else copies."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
