"""Fits a member once: what a config, its rows and the code have already made is taken from the cache."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fusion.config import Part, Settings, content_hash, parse_part
from fusion.errors import ConfigError, DataError
from fusion.files import atomic_folder, load_arrays, lock_folder, save_arrays, sha256_of
from fusion.progress import note
from fusion.registry import Registry
from fusion.training.cluster import is_spread, same_everywhere
from fusion.training.member import CLASSIFIERS
from fusion.types import History, RunOptions, derive_seed
from recsys.collaborative import MEMBERS
from recsys.measuring import PeakMemory
from recsys.run import code_version
from recsys.warm_starts import TableStart, items_of, source_of, split_of, verified


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
    start: dict[str, Any] | None = None
    """Where it started from another member: `from`, the arrays `taken` and `new`, and that member's `split`."""
    soup: dict[str, Any] | None = None
    """Of a mean of copies what `recsys.soups.fit_soup` found."""

    @property
    def recipe(self) -> Part:
        """The same for rows on which nothing may be validated: as many epochs as were best before."""
        history, config = self.history, self.part.config
        if history is None or not history.epochs or not hasattr(config, "training"):
            return self.part
        training = without_validation(config.training, history)
        return replace(self.part, config=config.model_copy(update={"training": training}))


SettingsT = TypeVar("SettingsT", bound=Settings)


def without_validation(training: SettingsT, history: History) -> SettingsT:
    """The training settings for rows on which nothing may be validated: as many epochs as were best before."""
    epochs = max(history.best_epoch, 0) + 1
    return training.model_copy(update={"epochs": epochs, "patience": 0, "target": None})


def fit_member(
    name: str, part: Part, data: FitData, seed: int, *, strategy: Any = None, quiet: bool = False, copy: int = 0
) -> Fitted:
    """The member `name` fitted on `data`, from the cache where it lies there.

    An interrupted training leaves its checkpoints in the cache and is continued by the next call. With `copy` from 1
    it starts as the member does and sees the rows in another order (`RunOptions.copy`).
    """
    folder = folder_of(name, part, data, seed, copy)
    work = data.cache / "work" / folder.name / (f"{name}_{copy + 1}" if copy else name)
    make_once([folder], work, lambda: _fit_into(folder, work, name, part, data, seed, strategy, quiet, copy), strategy)
    return load_fitted(folder, name, part.registry, seed)


def folder_of(name: str, part: Part, data: FitData, seed: int, copy: int = 0) -> Path:
    """Where the member lies in the cache once it is fitted; its name is the key."""
    return data.cache / "members" / _key(name, part, data, seed, copy)


def make_once(folders: Sequence[Path], work: Path, make: Callable[[], None], strategy: Any) -> None:
    """Calls `make`, which writes `folders` by way of `work`, unless they are there; in one process at a time.

    Processes that train in step either all have the same ones, or all make them, each in a cache of its own.
    """
    if _all_there(folders, work, strategy):
        return
    work.mkdir(parents=True, exist_ok=True)
    # The locked folder itself stays: another process may be waiting for its lock.
    with lock_folder(work.parent, wait=True):
        # Another process may have made them while we waited.
        if is_spread(strategy) or not all(folder.exists() for folder in folders):
            work.mkdir(exist_ok=True)
            make()
        shutil.rmtree(work, ignore_errors=True)


def _all_there(folders: Sequence[Path], work: Path, strategy: Any) -> bool:
    there = all(folder.exists() for folder in folders)
    if not is_spread(strategy):
        return there
    content = " ".join(sha256_of(folder / "state.npz") for folder in folders) if there else ""
    return same_everywhere(strategy, f"member {work.parent.name} {work.name}", content)


def _fit_into(
    folder: Path, work: Path, name: str, part: Part, data: FitData, seed: int, strategy: Any, quiet: bool, copy: int
) -> None:
    started = time.perf_counter()
    try:
        # Models are built in the scope of the strategy by the members: tables that only score are not to be spread.
        with PeakMemory() as memory:
            member = part.make(derive_seed(seed, "member", name))
            _start(member, part)
            options = RunOptions(derive_seed(seed, "training", name), work, strategy, quiet, copy=copy)
            history = member.fit(data, options)
    except DataError as error:
        raise DataError(f"members.{name}: {error}") from error
    took = {"seconds": time.perf_counter() - started, "peak_bytes": memory.bytes}
    _tell_start(name, member, quiet)
    keep_fitted(folder, work, part, member, history, took)


def _start(member: Any, part: Part) -> None:
    """Lets a new member start from the fitted one that `init_from` names, if it does."""
    folder = source_of(part)
    if folder is None:
        return
    kind = verified(folder)["kind"]
    registry = CLASSIFIERS if kind in CLASSIFIERS else MEMBERS
    if not hasattr(registry[kind], "warm_start"):
        raise ConfigError(
            "init_from must name a member that learns by gradient, of kind neural, content or matrix_factorization; "
            f"the one in {folder} is of kind {kind}."
        )
    source = load_fitted(folder, folder.name, registry, seed=0).member
    start = source.warm_start(part.config.init_from)
    if isinstance(start, TableStart):
        start.items = items_of(folder)
    member.start_from(start)


def _tell_start(name: str, member: Any, quiet: bool) -> None:
    start = getattr(member, "start", None)
    if start is not None:
        new = f"new are {', '.join(start.new)}" if start.new else "none is new"
        note(f"{name} started from {start.origin}: {len(start.taken)} arrays taken, {new}", quiet=quiet)


def _start_facts(member: Any, part: Part) -> dict[str, Any] | None:
    start, folder = getattr(member, "start", None), source_of(part)
    if start is None or folder is None:
        return None
    return {"from": start.origin, "taken": start.taken, "new": start.new, "split": split_of(folder)}


Train = Callable[[dict[str, Any], RunOptions], tuple[History, dict[str, Any]]]
"""Trains new members by name in place; returns what training did, and facts for the `member.json` of each."""


def fit_group(
    parts: Mapping[str, Part],
    recipe: Settings,
    train: Train,
    data: FitData,
    seed: int,
    *,
    beside: Mapping[str, Part] | None = None,
    strategy: Any = None,
    quiet: bool = False,
) -> dict[str, Fitted]:
    """Members trained together on `data` by `recipe`, from the cache where all lie there.

    What they learn may depend on members that are fitted `beside` them, on the same data.

    Each is kept as one that was fitted alone, with the history of the group and an equal share of its time. An
    interrupted training leaves its checkpoints in the cache and is continued by the next call.
    """
    keys = {name: _key(name, part, data, seed) for name, part in {**parts, **(beside or {})}.items()}
    group = content_hash([keys, recipe.model_dump(mode="json")])
    folders = {name: data.cache / "members" / content_hash([group, name]) for name in parts}
    work = data.cache / "work" / group / "joint"

    def make() -> None:
        started = time.perf_counter()
        with PeakMemory() as memory:
            members = {name: part.make(derive_seed(seed, "member", name)) for name, part in parts.items()}
            for name, part in parts.items():
                _start(members[name], part)
            options = RunOptions(derive_seed(seed, "training", *parts), work, strategy, quiet)
            history, facts = train(members, options)
        took = {"seconds": (time.perf_counter() - started) / len(parts), "peak_bytes": memory.bytes}
        for name, part in parts.items():
            _tell_start(name, members[name], quiet)
            keep_fitted(folders[name], work, part, members[name], history, took | facts)

    make_once([*folders.values()], work, make, strategy)
    return {name: load_fitted(folders[name], name, part.registry, seed) for name, part in parts.items()}


def keep_fitted(
    folder: Path, work: Path, part: Part, member: Any, history: History | None, took: Mapping[str, Any]
) -> None:
    """Writes a fitted member, and what is known of its training in `work`, in a way that `load_fitted` reads."""
    with atomic_folder(folder) as aside:
        save_arrays(aside / "state.npz", member.state())
        facts = {
            "kind": part.kind,
            "config": part.dump(),
            "sha256": sha256_of(aside / "state.npz"),
            "start": _start_facts(member, part),
            **took,
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
    return Fitted(
        member, part, folder, history, facts["seconds"], facts.get("peak_bytes"), facts.get("start"), facts.get("soup")
    )


def _key(name: str, part: Part, data: FitData, seed: int, copy: int = 0) -> str:
    recipe = {"name": name, "part": part.dump(), "seed": seed, "code": code_version()}
    if copy:
        recipe["copy"] = copy
    if source := source_of(part):
        recipe["init_from"] = sha256_of(source / "state.npz")
    return content_hash({**recipe, "data": data.fingerprint(part)})


def keep_copy(source: Path, target: Path) -> None:
    """The files of a folder, of a fitted member for example, in a run's own: hard links where the disk has them, else
    copies. They take the place of what stands there all at once. Raises MachineError when the machine refuses."""
    with atomic_folder(target) as aside:
        try:
            shutil.copytree(source, aside, copy_function=os.link, dirs_exist_ok=True)
        except OSError:
            shutil.rmtree(aside)  # a copy onto a link would write into the source
            shutil.copytree(source, aside)
