"""One worker process: fits the members that `recsys.workers` names, and says how each of them went."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from fusion.config import parse_part
from fusion.errors import EngineError
from fusion.training.local_cluster import end_with_parent
from recsys.workers import ERRORS, Portion

# What needs TensorFlow is imported where it is used: that takes seconds, in which the parent may be killed, and until
# `end_with_parent` has been called we would not know.


def main(folder: str, parent: str) -> None:
    """Answers each line of stdin by one on stdout until there is none left."""
    end_with_parent()
    if os.getppid() != int(parent):  # it went before we could ask to be told
        return
    from recsys.pipeline import TASKS
    from recsys.run import Run

    run = Run.open(Path(folder), quiet=True, as_trained=True)
    task = TASKS[run.experiment.task](run)
    with _own_stdout() as answers:
        for line in sys.stdin.buffer:
            answers.write(json.dumps(answer(task, json.loads(line)), default=float) + "\n")
            answers.flush()


def _own_stdout() -> IO[str]:
    """What was stdout, for answers alone: what libraries print goes where errors go."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def answer(task: Any, message: dict[str, Any]) -> dict[str, Any]:
    """Does a job, the message of `recsys.workers.Job`.

    Returns the `key` of the fitted member in the cache; of a search the `part` that it chose and its `trials`; or an
    `error` of `recsys.workers.ERRORS` with its `message`.
    """
    from recsys.pipeline import machine_faults

    name = message["member"]
    try:
        with machine_faults(task.run.folder.parent.parent):
            part = parse_part(task.experiment.members[name].registry, message["part"], name)
            if message["grid"]:
                chosen, trials = task.search(name, part, message["grid"])
                return {"part": chosen.dump(), "trials": [vars(trial) for trial in trials]}
            what, *numbers = message["rows"]
            data = task.portion_data(Portion(what, tuple(numbers)), name)
            return {"key": task.fit(name, part, data).folder.name}
    except EngineError as error:
        known = next(kind for kind in type(error).__mro__ if kind.__name__ in ERRORS)
        return {"error": known.__name__, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}".strip().rstrip(".")
        return {
            "error": EngineError.__name__,
            "message": f"members.{name}: unexpected {said[:300]}; please report it with what the log of the process "
            f"says, below {task.run.path('workers')}.",
        }


if __name__ == "__main__":
    main(*sys.argv[1:])
