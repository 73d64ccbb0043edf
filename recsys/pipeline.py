"""One config from raw tables to an exported artifact: the stages in order, each finished one left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.config import read_config
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
