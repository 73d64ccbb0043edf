"""One config from raw tables to an exported artifact: the stages in order, each finished one left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.config import read_config
from fusion.errors import ConfigError
from fusion.registry import Registry
from recsys.run import Run
from recsys.settings import parse_experiment

TASKS = Registry(
    "task",
    {
        "recommendation": "recsys.ranking_task:RankingTask",
        "classification": "recsys.classification_task:ClassificationTask",
    },
)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The checked settings of a config file; ConfigError names the first fault."""
    return parse_experiment(read_config(path, overrides))


def run_experiment(experiment: Any, root: str | Path = "runs", *, fresh: bool = False, quiet: bool = False) -> Run:
    """Runs all stages in a run's folder below `root`, or continues an unfinished run of the same config.

    Returns the run; its `report.json`, `report.html` and `export/` are then complete.
    """
    run = Run.start(experiment, Path(root), fresh=fresh, quiet=quiet)
    with run.locked():
        run_stages(run)
    return run


def run_stages(run: Run, again: Sequence[str] = ()) -> None:
    """Runs what is not finished yet, and the stages named in `again`."""
    task = TASKS[run.experiment.task](run)
    for stage in task.STAGES:
        if stage in again or not run.done(stage):
            with run.stage(stage):
                getattr(task, stage)()
    run.set(status="finished")


def rerun(run: Run, stages: Sequence[str]) -> None:
    """Runs stages of a finished run once more, on what the earlier ones left. ConfigError when those are missing."""
    order = TASKS[run.experiment.task].STAGES
    missing = [stage for stage in order[: order.index(stages[0])] if not run.done(stage)]
    if missing:
        raise ConfigError(
            f"the stage {stages[0]} needs what {missing[0]} leaves; {run.folder} did not get that far. "
            "Run tools/train.py with its config again to continue it."
        )
    with run.locked():
        run_stages(run, again=stages)
