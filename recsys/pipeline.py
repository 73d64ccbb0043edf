"""One config from raw tables to an exported artifact: the stages in order, each finished one left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusion.config import read_config
from fusion.errors import ConfigError, MachineError
from fusion.files import writing
from fusion.registry import Registry
from fusion.training.cluster import lost_processes, same_everywhere
from fusion.training.strategy import make_strategy, own_folder
from recsys.run import Run
from recsys.settings import parse_experiment
from recsys.warm_starts import check_sources

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


def run_experiment(
    experiment: Any, root: str | Path = "runs", *, fresh: bool = False, resume: bool = False, quiet: bool = False
) -> Run:
    """Runs all stages in a run's folder below `root`, or continues an unfinished run of the same config.

    `fresh` and `resume` insist on the one or the other, see `Run.start`. The processes of a cluster all call it; what
    those write that do not lead lies in `.workers` below `root`.

    Returns the run; its `report.json`, `report.html` and `export/` are then complete.
    """
    with machine_faults(Path(root)), lost_processes():
        check_sources(experiment.members)
        make_strategy(experiment.strategy, topic=experiment.hash())
        folder = own_folder(experiment.strategy, Path(root))
        run = Run.start(experiment, folder, fresh=fresh, resume=resume, quiet=quiet)
        with run.locked():
            run_stages(run)
    return run


def run_stages(run: Run, again: Sequence[str] = ()) -> None:
    """Runs what is not finished yet, and the stages named in `again`."""
    task = TASKS[run.experiment.task](run)
    run.set(status="running")
    try:
        for stage in task.STAGES:
            if stage in again or not _done_everywhere(run, stage):
                with run.stage(stage):
                    getattr(task, stage)()
    except BaseException as error:
        with contextlib.suppress(MachineError):  # a full disk is told by the error itself
            run.set(status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    run.set(status="finished")


def _done_everywhere(run: Run, stage: str) -> bool:
    """Whether the stage has finished in all processes of a cluster, which do every stage together or not at all."""
    strategy = make_strategy(run.experiment.strategy)
    return same_everywhere(strategy, f"stage {stage}", "done" if run.done(stage) else "")


def rerun(run: Run, stages: Sequence[str]) -> None:
    """Runs stages of a finished run once more, on what the earlier ones left. ConfigError when those are missing."""
    order = TASKS[run.experiment.task].STAGES
    missing = [stage for stage in order[: order.index(stages[0])] if not run.done(stage)]
    if missing:
        raise ConfigError(
            f"the stage {stages[0]} needs what {missing[0]} leaves; {run.folder} did not get that far. "
            "Run tools/train.py with its config again to continue it."
        )
    with machine_faults(run.folder), run.locked():
        run_stages(run, again=stages)


FULL = ("No space left on device", "File too large", "Disk quota exceeded", "Read-only file system")
"""How TensorFlow's own writers, whose errors have no number, say that the disk refuses."""


@contextlib.contextmanager
def machine_faults(folder: Path) -> Iterator[None]:
    """Turns what a full disk or a full memory raises anywhere below into a MachineError."""
    from fusion.compat import tf

    try:
        with writing(folder):
            yield
    except MemoryError as error:
        raise _out_of_memory(error) from error
    except tf.errors.ResourceExhaustedError as error:
        raise (_refused(folder, error) if _is_full(error) else _out_of_memory(error)) from error
    except tf.errors.OpError as error:
        if not _is_full(error):
            raise
        raise _refused(folder, error) from error


def _is_full(error: Exception) -> bool:
    return any(words in str(error) for words in FULL)


def _refused(folder: Path, error: Exception) -> MachineError:
    words = next(words for words in FULL if words in str(error))
    return MachineError(f"{folder} must have room to write; received '{words}'. Free some space, then run again.")


def _out_of_memory(error: Exception) -> MachineError:
    first = (str(error).splitlines() or ["no more memory"])[0][:200]
    return MachineError(
        f"the run must fit into memory; received '{first}'. Use a smaller batch_size, fewer items "
        "(cleaning.k_core_items) or a machine with more."
    )
