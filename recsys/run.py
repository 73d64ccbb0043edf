"""The run's folder, which is the bus: every stage reads what earlier ones left and writes a part of its own.

Layout: `<root>/<name>/<time>/`, `latest` beside it links to the newest; what runs share lies in `<root>/.cache/`.
A folder is continued when its config is the same and it did not finish.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fusion.config import merge, parse_yaml
from fusion.errors import ConfigError, MachineError
from fusion.files import lock_folder, write_atomically

CONFIG, STATE = "config.yaml", "run.json"
PACKAGES = (
    "tensorflow", "tf-keras", "tensorflow-recommenders", "tensorflow-model-optimization", "numpy", "scipy",
    "scikit-learn", "pandas", "ai-edge-litert",
)  # fmt: skip


class Run:
    """One run of one experiment.

    Attributes:
        folder: of this run.
        experiment: the checked settings.
        quiet: no progress on stderr.
    """

    def __init__(self, folder: Path, experiment: Any, *, quiet: bool = False) -> None:
        self.folder = folder
        self.experiment = experiment
        self.quiet = quiet

    @property
    def cache(self) -> Path:
        """What runs of one root share: embeddings, decoded images, fitted members."""
        return self.folder.parent.parent / ".cache"

    @classmethod
    def start(
        cls, experiment: Any, root: Path, *, fresh: bool = False, resume: bool = False, quiet: bool = False
    ) -> Run:
        """The unfinished run of the same config, or a new one. The resolved config is its first file.

        `fresh` always makes a new one; `resume` never does, and raises ConfigError when there is nothing to continue.
        """
        home = root / experiment.name
        _make_folder(home)
        unfinished = None if fresh else _unfinished(home, experiment.hash())
        if unfinished:
            return cls(unfinished, experiment, quiet=quiet)
        if resume:
            raise ConfigError(
                f"--resume needs an unfinished run of this very config below {home}; there is none. "
                "Leave it out to start one, or give the same --set and --run-dir as before."
            )
        folder = _new_folder(home)
        run = cls(folder, experiment, quiet=quiet)
        text = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(folder / CONFIG, text)
        write_atomically(folder / "environment.json", json.dumps(environment(), indent=2))
        run._write_state({"config_hash": experiment.hash(), "status": "running", "stages": {}})
        _link_latest(home, folder)
        return run

    @classmethod
    def open(
        cls, folder: Path, *, quiet: bool = False, export: dict[str, Any] | None = None, as_trained: bool = False
    ) -> Run:
        """A run that exists, by its folder or by `<root>/<name>/latest`; `export` overrides keys of its export.

        Its devices are those of this machine, unless it is opened `as_trained`, to take part in its training.
        """
        from recsys.settings import parse_experiment

        config = folder / CONFIG
        if not config.is_file():
            raise ConfigError(
                f"a run's folder must hold {CONFIG}; {folder} does not. Give the folder that a run printed."
            )
        settings = parse_yaml(config.read_text(encoding="utf-8"), str(config))
        # What is left to do needs no cluster, and perhaps another machine than the one that trained.
        if not as_trained:
            settings.pop("strategy", None)
        experiment = parse_experiment(merge(settings, {"export": export or {}}))
        return cls(folder.resolve(), experiment, quiet=quiet)

    @property
    def state(self) -> dict[str, Any]:
        """Status, and seconds and peak of memory of each finished stage."""
        path = self.folder / STATE
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"a run's folder must hold {STATE}; {path} cannot be read ({error}). "
                "Start the experiment anew with tools/train.py --fresh."
            ) from None

    def _write_state(self, state: dict[str, Any]) -> None:
        write_atomically(self.folder / STATE, json.dumps(state, indent=2))

    def set(self, **values: Any) -> None:
        """Writes facts of the run into its state file."""
        self._write_state({**self.state, **values})

    def done(self, stage: str) -> bool:
        """Whether a stage has finished."""
        return stage in self.state["stages"]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, notes the process's peak of memory, and marks it finished, unless it raises."""
        if not self.quiet:
            print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        yield
        state = self.state
        seconds = round(time.perf_counter() - started, 2)
        state["stages"][name] = {"seconds": seconds, "peak_bytes": peak_bytes()}
        self._write_state(state)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time holds the folder."""
        with lock_folder(self.folder):
            yield

    def path(self, *parts: str) -> Path:
        """A path below the run's folder; its parent is made."""
        result = self.folder.joinpath(*parts)
        result.parent.mkdir(parents=True, exist_ok=True)
        return result


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MachineError(
            f"the run's folder must be writable; {folder} is not ({error.strerror}). Choose another with --run-dir."
        ) from None


def _new_folder(home: Path) -> Path:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        folder = home / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise MachineError(f"a run needs a folder of its own; a hundred named {stamp} exist in {home}. Try again.")


def _unfinished(home: Path, config_hash: str) -> Path | None:
    for folder in sorted((f for f in home.iterdir() if f.is_dir() and not f.is_symlink()), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if state.get("config_hash") == config_hash and state.get("status") != "finished":
                return folder
    return None


def _link_latest(home: Path, folder: Path) -> None:
    aside = home / f".latest-{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name, target_is_directory=True)
    os.replace(aside, home / "latest")


def environment() -> dict[str, Any]:
    """What the run ran on: Python, platform, processors, versions."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions,
    }


def peak_bytes() -> int:
    """Most memory that this process has held at once so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


FITTING = ("recsys/collaborative", "fusion/submodels", "fusion/training", "fusion/embeddings.py", "fusion/images.py")
COMPRESSING = (
    "fusion/compression", "fusion/export", "recsys/compressed_classes.py", "recsys/compressed_rankings.py",
    "recsys/ranking_student.py", "recsys/collaborative/tables.py",
)  # fmt: skip


@functools.cache
def code_version() -> str:
    """SHA-256 of the sources that decide what fitting leaves: a cached member is valid for the code that made it."""
    return _digest_of(FITTING)


@functools.cache
def compressing_version() -> str:
    """SHA-256 of the sources that decide, beside those of `code_version`, what compression leaves. Apart from these,
    because a member that was fitted stays valid whatever is done to it later."""
    return _digest_of(COMPRESSING)


def _digest_of(places: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    home = Path(__file__).resolve().parent.parent
    for place in places:
        sources = [home / place] if place.endswith(".py") else sorted((home / place).rglob("*.py"))
        for source in sources:
            digest.update(source.relative_to(home).as_posix().encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()
