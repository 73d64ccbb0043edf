"""One config trained several times, with other seeds or other values of a key: how much of a figure is chance."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.errors import ConfigError
from recsys.compare import Side, pool, read_side


def run_variations(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    over: Sequence[str] = (),
    root: Path = Path("runs"),
    fresh: bool = False,
    quiet: bool = False,
) -> Side:
    """Trains one config with several seeds, and with each of several values of a key, and pools the runs.

    Every run is one of its own below `<root>/<name>_compare/`, without an export. Finished ones of the same settings
    are taken as they are (`fresh` runs them anew), unfinished ones are continued, and members come from the cache where
    their settings and rows are the same. The split has a seed of its own and stays as it is.

    Args:
        config: the experiment, a YAML file.
        overrides: `KEY=VALUE`, for all runs.
        seeds: how many seeds, from the config's own upwards.
        over: `KEY=VALUE,VALUE,...`; several are combined with each other.
        root: where runs and the cache lie.

    Raises ConfigError for what is wrong in any of the variations, before the first of them starts.
    """
    from recsys.pipeline import load_experiment, run_experiment

    base = load_experiment(config, overrides)
    settings = [f"name={base.name[:33]}_compare", "export.enabled=false"]
    experiments = {
        " ".join(changes) or base.name: load_experiment(config, [*overrides, *settings, *changes])
        for changes in _variations(base.seed, seeds, over)
    }
    sides = []
    for number, (label, experiment) in enumerate(experiments.items(), 1):
        folder = None if fresh else _finished(root / experiment.name, experiment.hash())
        if not quiet:
            state = f"already in {folder}" if folder else "running"
            print(f"{number} of {len(experiments)}: {label}, {state}", file=sys.stderr, flush=True)
        if folder is None:
            folder = run_experiment(experiment, root, fresh=fresh, quiet=quiet).folder
        sides.append(read_side(folder, label))
    return pool(sides, base.name)


def _variations(seed: int, seeds: int, over: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each run."""
    axes = [_parse_over(text) for text in over]
    if seeds > 1:
        axes.append([f"seed={seed + number}" for number in range(seeds)])
    return list(itertools.product(*axes))


def _parse_over(text: str) -> list[str]:
    key, _, listed = text.partition("=")
    values = [value.strip() for value in listed.strip().removeprefix("[").removesuffix("]").split(",")]
    if not key or not all(values):
        raise ConfigError(f"--over takes KEY=VALUE,VALUE,..., as in data.fold.test=1,2,3,4,5; received '{text}'.")
    return [f"{key}={value}" for value in values]


def _finished(home: Path, config_hash: str) -> Path | None:
    """The newest finished run of these settings."""
    for path in sorted(home.glob("*/run.json"), reverse=True):
        if not path.parent.is_symlink():
            state = _state(path)
            if state.get("config_hash") == config_hash and state.get("status") == "finished":
                return path.parent
    return None


def _state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is being written, or broken: not finished in any case
        return {}
    return state
