"""Members fitted several at a time: worker processes leave them in the cache, where the run then finds them.

A worker is this program with a TensorFlow of its own, so about 0.7 GB before it holds any data, and takes some seconds
to start. It reads the run's folder as the earlier stages left it (`recsys/worker.py`) and is given one piece of work
after the other, a line of JSON each. It differs from fitting in this process in nothing but the number of threads,
which is its share of the processors where the environment does not say otherwise
(`fusion.training.local_cluster.THREADS`). With as many threads the bits are the same; with other numbers of them sums
may be rounded otherwise. Members that share work among Python threads (iALS, neighbours) start as many as there are
processors in any case.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fusion.config import Part
from fusion.errors import ConfigError, DataError, EngineError, GateError, MachineError
from fusion.progress import note, progress
from fusion.training.local_cluster import end, environment, last_line
from recsys.tuning import Grid

ERRORS = {error.__name__: error for error in (EngineError, ConfigError, DataError, GateError, MachineError)}
"""By name, which is how an error travels."""

LOGS = "workers"
"""Folder of a run for what its workers write on their stderr."""


@dataclass(frozen=True)
class Portion:
    """Rows that members are fitted on, in words that mean the same in every process.

    Attributes:
        what: train, the training rows, validated on the validation rows; fold, the training rows without those of a
            fold; parts, all rows of some parts of the split.
        numbers: of the fold, or of the parts.
    """

    what: Literal["train", "fold", "parts"]
    numbers: tuple[int, ...] = ()


TRAINING = Portion("train")


@dataclass(frozen=True)
class Job:
    """What one worker does in one go: it fits a member, or searches for its settings, which fits it too.

    Attributes:
        name: of the member.
        part: its settings; of a search those that it starts with.
        portion: the rows.
        key: under which the cache keeps the fitted member; empty for a search.
        seconds: about how long it takes; the longest are begun first.
        grid: what the search tries; without any it is a fit.
    """

    name: str
    part: Part
    portion: Portion
    key: str
    seconds: float
    grid: Grid = field(default_factory=dict)

    @property
    def message(self) -> dict[str, Any]:
        """What a worker is told."""
        rows = [self.portion.what, *self.portion.numbers]
        return {"member": self.name, "part": self.part.dump(), "rows": rows, "grid": self.grid}


def command(folder: Path) -> list[str]:
    """Starts a worker for the run in `folder`."""
    # -P: what lies in the current folder is none of our modules.
    return [sys.executable, "-P", "-m", "recsys.worker", str(folder), str(os.getpid())]


def work(
    jobs: Sequence[Job],
    processes: int,
    folder: Path,
    *,
    quiet: bool = False,
    start: Callable[[Path], list[str]] = command,
) -> list[dict[str, Any]]:
    """Has the jobs done by at most so many processes at a time, and returns what each answered, in their order.

    When it returns or raises there is no process left; killed, it takes them along where the system is Linux, and
    elsewhere they end with what they are doing.

    Args:
        jobs: any number; none starts no process.
        processes: at most; never more than there are jobs.
        folder: of the run.
        quiet: no progress.
        start: gives the command of a worker.

    Raises:
        EngineError: or the kind of it that fitting raised in a worker, in the same words. The other processes are
            ended then; what they have finished is kept.
        MachineError: a process was ended by something else, as for want of memory.
    """
    if not jobs:
        return []
    answers: dict[int, dict[str, Any]] = {}
    waiting = deque(sorted(range(len(jobs)), key=lambda number: -jobs[number].seconds))
    with (
        progress("members", len(jobs), "fits", quiet=quiet) as bar,
        _started(min(processes, len(jobs)), start(folder), folder / LOGS) as workers,
        selectors.DefaultSelector() as selector,
    ):
        for worker in workers:
            worker.take(waiting[0], jobs[waiting.popleft()])
            selector.register(worker.answers, selectors.EVENT_READ, worker)
        while len(answers) < len(jobs):
            for ready, _ in selector.select():
                worker = ready.data
                done, answers[worker.number] = worker.answer()
                bar.advance(1)
                if waiting:
                    worker.take(waiting[0], jobs[waiting.popleft()])
                else:
                    selector.unregister(worker.answers)
                    worker.dismiss()
                busy = [other.job.name for other in workers if other.job]
                note(f"members: {done.name} is fitted; under way: {', '.join(busy) or 'none'}", quiet=quiet)
    return [answers[number] for number in range(len(jobs))]


class _Worker:
    """A process and what it is doing."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.log = process, log
        self.orders, self.answers = process.stdin, process.stdout
        self.number = -1
        self.job: Job | None = None

    def take(self, number: int, job: Job) -> None:
        """Gives it a job. A process that has gone meanwhile says nothing here: its answer, an end of file, does."""
        self.number, self.job = number, job
        with contextlib.suppress(BrokenPipeError):
            self.orders.write(json.dumps(job.message).encode() + b"\n")
            self.orders.flush()

    def answer(self) -> tuple[Job, dict[str, Any]]:
        """The job, and what it says of it; raises what went wrong there."""
        job = self.job
        assert job is not None
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise self._lost(job)
        answer = json.loads(line)
        if "error" in answer:
            raise ERRORS[answer["error"]](answer["message"])
        if job.key and answer["key"] != job.key:
            raise EngineError(
                f"a worker process must see the code and the data that its run began with; the member {job.name} "
                "was fitted by others. Leave the program's files alone while it runs, and start it again."
            )
        return job, answer

    def dismiss(self) -> None:
        """Lets it end: there is nothing left to do, and its memory is of use to others."""
        self.job = None
        self.orders.close()

    def close(self) -> None:
        """Closes what leads to a process that has ended."""
        for pipe in (self.orders, self.answers):
            with contextlib.suppress(BrokenPipeError):  # a job that it did not take any more
                pipe.close()

    def _lost(self, job: Job) -> MachineError:
        code = self.process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return MachineError(
            f"the processes that fit members must live until they have; that of {job.name} ended {how} "
            f"({last_line(self.log)}). Lower training.processes where memory is short, and run again to continue."
        )


@contextlib.contextmanager
def _started(count: int, start: Sequence[str], logs: Path) -> Iterator[list[_Worker]]:
    """So many workers, which have ended when the body has, however it ends."""
    logs.mkdir(parents=True, exist_ok=True)
    ours = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = environment(count, PYTHONPATH=os.pathsep.join(ours))
    workers: list[_Worker] = []
    try:
        for number in range(count):
            log = logs / f"{number}.log"
            with open(log, "wb") as errors:
                process = subprocess.Popen(
                    [*start],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=values,
                    start_new_session=True,  # Ctrl-C is for us, who end them
                )
            workers.append(_Worker(process, log))
        yield workers
    finally:
        end(worker.process for worker in workers)
        for worker in workers:
            worker.close()
