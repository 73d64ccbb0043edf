"""One server: models behind the gRPC door and the REST door, in one process or in several that share the ports.

The supervisor of several workers starts them, starts a dead one anew, and passes on the order to stop. To stop means:
say `not ready`, take no new requests, finish those inside within a limit, and end with 0.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fusion.export.manifest import EngineError, MachineError
from serving.ports import reserved
from serving.rest_guard import ACCESS
from serving.settings import ServerSettings

logger = logging.getLogger(__name__)

RESTARTS, RESTART_WINDOW_S = 5, 60.0
"""A server whose workers die more often than so in such a time gives up: a restart does not mend what is wrong."""
Announce = Callable[[dict[str, Any]], None]


def serve(settings: ServerSettings, announce: Announce) -> None:
    """Serves until SIGTERM or SIGINT. Must be called in the main thread.

    Args:
        settings: what and how.
        announce: is told the ports, models and processes once everything answers.

    Raises:
        GateError: no version of any model can be loaded.
        MachineError: a port is taken, or workers keep dying.
        ServingError: certificates or tokens cannot be used.
    """
    with reserved(settings) as ours:
        if settings.workers > 1:
            _Supervisor(ours).run(announce)
        else:
            from serving.worker import Worker  # here, since it brings TensorFlow

            Worker(ours, None).run(announce)


# ---- several processes ---------------------------------------------------------------------------------------


class _Supervisor:
    """Starts workers, and one anew where one dies.

    Args:
        settings: with the ports as numbers.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
        self._workers: dict[Any, Connection] = {}
        self._deaths: deque[float] = deque()
        self._stopping = self._interrupted = False

    def run(self, announce: Announce) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        shared = Path(tempfile.mkdtemp(prefix="serving-"))
        try:
            for _ in range(self._settings.workers):
                self._start(shared)
            answers = [self._first_word(process) for process in list(self._workers)]
            if all(answers):
                pids = [process.pid for process in self._workers]
                announce({**answers[0], "processes": pids})
            elif self._interrupted:
                raise KeyboardInterrupt  # nothing was served yet, so there is nothing to drain
            while not self._stopping:
                self._watch(shared)
        finally:
            self._end()
            shutil.rmtree(shared, ignore_errors=True)

    def _stop(self, number: int, _: Any) -> None:
        self._stopping = True
        self._interrupted = number == signal.SIGINT

    def _start(self, shared: Path) -> None:
        ours, theirs = self._spawn.Pipe(duplex=False)
        process = self._spawn.Process(target=_work, args=(self._settings, shared, theirs), name="serving-worker")
        with _interrupts_wait():
            process.start()
        theirs.close()
        self._workers[process] = ours

    def _first_word(self, process: Any) -> dict[str, Any]:
        """What a worker announces; {} when the server is told to stop first. Raises the error that it could not start
        with."""
        while not self._stopping:
            if wait([self._workers[process]], timeout=0.2):
                try:
                    word = self._workers[process].recv()
                except EOFError:
                    if self._stopping:  # the order to stop may reach all processes at once
                        break
                    raise MachineError(
                        "a worker must start; it died before it answered. See its last lines above."
                    ) from None
                if isinstance(word, EngineError):
                    raise word
                found: dict[str, Any] = word
                return found
        return {}

    def _watch(self, shared: Path) -> None:
        """Waits a moment for a death."""
        wait([process.sentinel for process in self._workers], timeout=0.2)
        for process in [process for process in self._workers if process.exitcode is not None]:
            self._workers.pop(process).close()
            if self._stopping:
                continue
            logger.error("worker %s ended with %s; another one starts", process.pid, process.exitcode)
            now = time.monotonic()
            self._deaths.append(now)
            while now - self._deaths[0] > RESTART_WINDOW_S:
                self._deaths.popleft()
            if len(self._deaths) > RESTARTS:
                raise MachineError(
                    f"workers must stay alive; {len(self._deaths)} died within {RESTART_WINDOW_S:g} s. See the log."
                )
            self._start(shared)

    def _end(self) -> None:
        for process in self._workers:
            process.terminate()
        limit = time.monotonic() + self._settings.drain_s + 5
        for process in self._workers:
            process.join(max(limit - time.monotonic(), 0.1))
            if process.exitcode is None:
                logger.error("worker %s did not end in time", process.pid)
                process.kill()
                process.join()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Blocks SIGINT, also in the processes that are started meanwhile. A terminal sends Ctrl-C to all of them, and one
    that still imports would answer with a traceback: it is for the supervisor, who tells the others."""
    resource_tracker.ensure_running()  # otherwise the first start would do that, and unblock SIGINT after it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(settings: ServerSettings, shared: Path, told: Connection) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until it serves
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    from serving.worker import Worker  # here, so that the supervisor does without TensorFlow

    configure_logging()
    try:
        Worker(settings, shared).run(told.send)
    except EngineError as error:
        with contextlib.suppress(OSError):  # nobody listens any more once the first word was said
            told.send(error)
        sys.exit(error.exit_code)


# ---- logs ------------------------------------------------------------------------------------------


def configure_logging() -> None:
    """One JSON object a line on stderr; never what a request brought."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("h5py", "tensorflow", "absl", "grpc", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
        }
        if record.name == ACCESS.name:  # is JSON already
            return json.dumps({**line, **json.loads(record.getMessage())})
        line["message"] = record.getMessage()
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
