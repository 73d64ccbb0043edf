"""The processes of a cluster: who they are, that all of them are there, and what they have to agree on.

Each process learns its place from the environment variable TF_CONFIG, as TensorFlow's own strategies do. The places
meet before TensorFlow starts, because TensorFlow waits for a missing process without end and without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.compat import abort_exchanges, tf
from fusion.errors import ConfigError, EngineError, MachineError

TF_CONFIG = "TF_CONFIG"

_JOBS = ("chief", "worker", "ps")

_RETRY_SECONDS = 0.2

_PROBE_SECONDS = 2.0
"""Between two looks of a server whether its coordinator is still there."""

_GREETING_BYTES = 200

_GREETING_SECONDS = 2.0
"""How long a caller may take to say who it is; others wait behind it."""

ANSWER_SECONDS = 3600.0
"""Longest wait for the others in one call. A process that has died is noticed by its heartbeat, in seconds; this is for
one that lives and does nothing."""


@dataclass(frozen=True)
class Place:
    """The place of this process in a cluster.

    Attributes:
        jobs: addresses `host:port` of each job's tasks: chief, worker, ps.
        job: the job of this process.
        index: its number within the job.
    """

    jobs: dict[str, list[str]]
    job: str
    index: int

    @property
    def name(self) -> str:
        """What errors call this process, as in `worker 1`."""
        return f"{self.job} {self.index}"

    @property
    def address(self) -> str:
        """Its own `host:port`."""
        return self.jobs[self.job][self.index]

    @property
    def tasks(self) -> dict[str, str]:
        """The address of every process by name, the one that leads first: chief, workers, parameter servers."""
        return {f"{job} {index}": at for job in _JOBS for index, at in enumerate(self.jobs.get(job, []))}

    @property
    def rank(self) -> int:
        """Its number among all processes; 0 leads."""
        return list(self.tasks).index(self.name)

    @property
    def trainers(self) -> int:
        """Processes that train when all of them hold the model: chief and workers."""
        return len(self.jobs.get("chief", [])) + len(self.jobs.get("worker", []))


def find_place() -> Place | None:
    """The place that TF_CONFIG gives this process; None without TF_CONFIG. Raises ConfigError when it has a fault."""
    text = os.environ.get(TF_CONFIG)
    if not text:
        return None
    try:
        config = json.loads(text)
        jobs = {str(job): [str(address) for address in tasks] for job, tasks in config["cluster"].items()}
        place = Place(jobs, str(config["task"]["type"]), int(config["task"]["index"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _fault(f"'{text[:200]}' ({type(error).__name__}: {error})") from None
    strange = [job for job in (*jobs, place.job) if job not in _JOBS]
    if strange:
        raise _fault(f"the job '{strange[0]}'")
    if not 0 <= place.index < len(jobs.get(place.job, [])):
        raise _fault(f"the task {place.name}, which its cluster does not list")
    for address in place.tasks.values():
        if not re.fullmatch(r".+:\d{1,5}", address):
            raise _fault(f"the address '{address}'")
    return place


def _fault(received: str) -> ConfigError:
    return ConfigError(
        f"{TF_CONFIG} must hold a cluster of jobs out of {', '.join(_JOBS)} with addresses host:port, and the task of "
        f"this process; received {received}. tools/launch.py sets it for processes of one machine."
    )


# ---- the start -----------------------------------------------------------------------------------------------


def meet(place: Place, topic: str, seconds: float) -> None:
    """Returns in every process once all of them have called it.

    The leader listens at its own address, which TensorFlow takes over afterwards; the others call there.

    Args:
        place: of this process.
        topic: what all must have come for, such as the hash of the experiment.
        seconds: how long to wait.

    Raises:
        MachineError: a process did not come in time, or its address cannot be listened at.
        ConfigError: a process came for another topic.
    """
    deadline = time.monotonic() + seconds
    greeting = json.dumps([place.name, hashlib.sha256(topic.encode()).hexdigest()])
    if place.rank == 0:
        _receive(place, greeting, deadline, seconds)
    else:
        _call(place, greeting, deadline, seconds)


def _receive(place: Place, own: str, deadline: float, seconds: float) -> None:
    missing = set(place.tasks) - {place.name}
    callers: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(place))
        while missing:
            left = deadline - time.monotonic()
            try:
                listener.settimeout(max(0.01, left))
                caller = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                where = ", ".join(f"{name} ({place.tasks[name]})" for name in place.tasks if name in missing)
                raise MachineError(
                    f"all processes of the cluster must come within {seconds:g} s (strategy.start_seconds); still "
                    f"missing: {where}. Look at their output, then start all of them again."
                ) from None
            except OSError:  # the caller has gone already
                continue
            try:
                caller.settimeout(_GREETING_SECONDS)
                name, topic = json.loads(caller.recv(_GREETING_BYTES))
            except (OSError, ValueError, TypeError):
                continue  # a caller that is none of ours, such as a probe of the port
            if topic != json.loads(own)[1]:
                for other in (*callers, caller):
                    _answer(other, f"{name} has another one")
                raise _other_experiment(f"{name} has another one than {place.name}")
            missing.discard(name)
            callers.append(caller)
        for caller in callers:
            _answer(caller, "")


def _answer(caller: socket.socket, fault: str) -> None:
    with contextlib.suppress(OSError):  # it has gone: TensorFlow's heartbeat will say so
        caller.sendall(json.dumps(fault).encode())


def _other_experiment(received: str) -> ConfigError:
    return ConfigError(
        f"all processes of a cluster must run the same config with the same --set; {received}. Start all of them with "
        "the same command."
    )


def _listen(place: Place) -> socket.socket:
    host, _, port = place.address.rpartition(":")
    try:
        # The own name may resolve to an address that is not of this machine, as behind a service of Kubernetes.
        return socket.create_server(("" if host not in ("localhost", "127.0.0.1") else host, int(port)))
    except OSError as error:
        raise MachineError(
            f"{place.name} must be able to listen at {place.address}: {error.strerror or error}. End the program that "
            "has the port, or give another one in TF_CONFIG."
        ) from error


def _call(place: Place, greeting: str, deadline: float, seconds: float) -> None:
    leader, address = next(iter(place.tasks.items()))
    host, _, port = address.rpartition(":")
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, int(port)), timeout=min(left, 10.0)) as connection:
                connection.sendall(greeting.encode())
                connection.settimeout(left)
                fault = json.loads(connection.recv(_GREETING_BYTES))
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)
            continue
        if fault:
            raise _other_experiment(fault)
        return
    raise MachineError(
        f"{place.name} must meet {leader} at {address} within {seconds:g} s (strategy.start_seconds); it did not "
        "answer, or others did not come. Look at its output, then start all processes again."
    )


# ---- agreement -----------------------------------------------------------------------------------------------


def is_spread(strategy: Any) -> bool:
    """Whether several processes train one model in step, each holding a copy of it."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


@contextlib.contextmanager
def answered(strategy: Any) -> Iterator[None]:
    """Ends what the body exchanges with the other processes where they have not answered after `ANSWER_SECONDS`.

    TensorFlow has a time limit of its own, which lets a thread sleep for each exchange until the limit has passed:
    twenty for a step, so that after some hundred steps a process could start no more of them.
    """
    if not is_spread(strategy):
        yield
        return
    said = f"no answer from the other processes within {ANSWER_SECONDS:g} s"
    limit = threading.Timer(ANSWER_SECONDS, abort_exchanges, [said])
    limit.daemon = True
    limit.start()
    try:
        yield
    finally:
        limit.cancel()


def exchange(strategy: Any, what: str, values: Sequence[int]) -> np.ndarray:
    """What every process says, int64 `[processes, n]` in order of rank; without a cluster its own values alone.

    All processes must call it for the same things in the same order. Raises EngineError where they do not, because
    each of them would wait for something else from then on.
    """
    own = np.asarray([_number(what), *values], np.int64)
    if not is_spread(strategy):
        return own[None, 1:]

    def gather() -> tf.Tensor:
        return tf.distribute.get_replica_context().all_gather(tf.constant(own[None]), axis=0)

    with answered(strategy):
        said = strategy.experimental_local_results(strategy.run(gather))[0].numpy()
    said = said[:: len(strategy.extended.worker_devices)]  # each process speaks once, not each of its devices
    for rank, topic in enumerate(said[:, 0]):
        if topic != said[0, 0]:
            raise EngineError(
                f"all processes must do the same work in the same order; process {rank} is not at '{what}' when "
                "another one is. Remove the folder .workers in the run folder and start all of them again."
            )
    return said[:, 1:]


def same_everywhere(strategy: Any, what: str, content: str) -> bool:
    """Whether `content` is the same, and not empty, in all processes."""
    said = exchange(strategy, what, [_number(content) if content else 0])
    return bool(said[0, 0]) and bool((said == said[0, 0]).all())


def chiefs(strategy: Any, what: str, values: Sequence[float]) -> list[float]:
    """The values of the process that leads, to the bit: what decides must be equal even where machines are not."""
    bits = np.asarray(values, np.float64).view(np.int64)
    return exchange(strategy, what, bits.tolist())[0].view(np.float64).tolist()


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


# ---- the end -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turns what TensorFlow raises when another process of the cluster is gone into a MachineError that names it."""
    try:
        yield
    except (tf.errors.OpError, RuntimeError) as error:
        place = find_place()
        if place is None or not re.search(r"/job:\w+|heartbeat|Collective ops is aborted", str(error)):
            raise
        named = re.findall(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)", str(error))
        others = dict.fromkeys(f"{job} {task}" for job, task in named if f"{job} {task}" != place.name)
        raise MachineError(
            f"all processes of the cluster must live until the end; {next(iter(others), 'another process')} was lost: "
            f"{_reason(str(error))}. Start all processes again to continue from the last checkpoint."
        ) from error


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if re.search(r"unhealthy|aborted|heartbeat|unavailable", line)]
    return (lines or [text.strip().splitlines()[0]])[-1][:160].rstrip(".:")


def serve(place: Place, seconds: float) -> None:
    """Works for a coordinator, as its worker or parameter server, until that has gone.

    Raises MachineError when the coordinator does not begin within so many seconds: it may have ended after the meeting.
    """
    cluster = tf.train.ClusterSpec(place.jobs)
    config = tf.compat.v1.ConfigProto()
    # A worker that waits for a parameter server holds a thread; with fewer threads than workers, all may wait.
    config.inter_op_parallelism_threads = max(place.trainers + 1, os.cpu_count() or 1)
    # Kept in a name, because the server ends with its object.
    server = tf.distribute.Server(cluster, place.job, place.index, protocol="grpc", config=config)
    host, _, port = place.jobs["chief"][0].rpartition(":")
    met, missed, deadline = False, 0, time.monotonic() + seconds
    while missed < 3:
        try:
            with socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS):
                met, missed = True, 0
        except OSError:
            missed += met
            if not met and time.monotonic() > deadline:
                raise MachineError(
                    f"chief 0 must begin within {seconds:g} s (strategy.start_seconds); nobody answers at "
                    f"{place.jobs['chief'][0]}. Look at its output, then start all processes again."
                ) from None
        time.sleep(_PROBE_SECONDS)
    del server
