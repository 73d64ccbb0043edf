"""A cluster of processes on this machine: each gets its place in TF_CONFIG, and none outlives the call.

It needs no TensorFlow: the processes bring their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

_POLL_SECONDS = 0.1

GRACE_SECONDS = 30.0
"""How long the leader may go on after another process has failed: it finds out itself, and says it better."""

_END_SECONDS = 5.0
"""Between being asked to end and being ended."""

THREADS = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
"""Variables of the environment that say how many threads TensorFlow, and OpenMP and OpenBLAS, use."""

_PR_SET_PDEATHSIG = 1


def places(workers: int, ps: int = 0) -> dict[str, str]:
    """TF_CONFIG of each process by name, on free ports of the loopback interface; the first one leads.

    With parameter servers there is a chief beside the workers, else worker 0 leads.
    """
    sizes = {"chief": 1, "worker": workers, "ps": ps} if ps else {"worker": workers}
    with contextlib.ExitStack() as stack:  # all held until all are drawn, so that none is drawn twice
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(sum(sizes.values()))]
        ports = iter([held.getsockname()[1] for held in sockets])
    jobs = {job: [f"127.0.0.1:{next(ports)}" for _ in range(size)] for job, size in sizes.items()}
    return {
        f"{job} {index}": json.dumps({"cluster": jobs, "task": {"type": job, "index": index}})
        for job, size in sizes.items()
        for index in range(size)
    }


def threads_of(processes: int) -> int:
    """Threads of one of so many processes, which share the processors of this machine evenly; at least one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // processes)


def environment(processes: int, **values: str) -> dict[str, str]:
    """The environment of one of so many processes: ours, `values`, and its threads where ours does not name them."""
    threads = dict.fromkeys(THREADS, str(threads_of(processes)))
    return {**threads, **os.environ, **values}


@contextlib.contextmanager
def processes(
    command: Sequence[str], configs: Mapping[str, str], logs: Path
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Starts `command` once a place; the first one writes where we write, the others to `logs/<name>.log`.

    When the body ends, in whatever way, all processes are ended: asked first, and killed after some seconds. Those of
    Linux also end when this process is killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, config in configs.items():
            with open(logs / f"{name.replace(' ', '-')}.log", "wb") as log:
                started[name] = subprocess.Popen(
                    [*command],
                    stdin=subprocess.DEVNULL,
                    stdout=log if started else None,
                    stderr=log if started else None,
                    env=environment(len(configs), TF_CONFIG=config),
                    start_new_session=True,  # Ctrl-C is for us, who tell them in order
                    preexec_fn=end_with_parent,
                )
        yield started
    finally:
        end(started.values())


def end(running: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ends processes: SIGTERM, and SIGKILL for those that are still there after some seconds."""
    alive = [process for process in running if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + _END_SECONDS
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # TensorFlow keeps SIGTERM to itself while it waits for the others
            process.kill()
            process.wait()


def run_cluster(command: Sequence[str], workers: int, ps: int, logs: Path) -> int:
    """Runs `command` in all processes of a new cluster until its leader has ended; returns the exit code of the leader.

    A lost worker of parameter servers is told and missed by nobody else. Any other process that fails ends the cluster,
    with its exit code where the leader has not found out after `GRACE_SECONDS`.
    """
    configs = places(workers, ps)
    leader = next(iter(configs))
    with _signals_raise(), processes(command, configs, logs) as running:
        try:
            return _watch(running, leader, expendable=bool(ps), logs=logs)
        except KeyboardInterrupt:
            running[leader].send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[leader].wait(GRACE_SECONDS)
            raise


def _watch(running: Mapping[str, subprocess.Popen[bytes]], leader: str, *, expendable: bool, logs: Path) -> int:
    told: set[str] = set()
    failed, deadline = 0, None
    while (code := running[leader].poll()) is None:
        for name, process in running.items():
            ended = process.poll()
            if name in told or not ended:
                continue
            told.add(name)
            said = last_line(logs / f"{name.replace(' ', '-')}.log")
            print(f"{name} ended with exit code {ended}: {said}", file=sys.stderr, flush=True)
            if not (expendable and name.startswith("worker")):
                failed, deadline = failed or ended, deadline or time.monotonic() + GRACE_SECONDS
        if deadline and time.monotonic() > deadline:
            return _exit_code(failed)
        time.sleep(_POLL_SECONDS)
    if code < 0:
        print(f"{leader} was ended by signal {-code}", file=sys.stderr, flush=True)
    return _exit_code(code)


def _exit_code(code: int) -> int:
    """The exit code of a process as a shell tells it: 128 + n where signal n ended it."""
    return code if code >= 0 else 128 - code


def last_line(log: Path) -> str:
    """The last thing that a process wrote into its log."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1][:300] if text else "it wrote nothing"


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Makes a request to end run our `finally` blocks."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """In the child: end when the parent is killed, which then cannot end us itself."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
