"""How fast a served recommender answers: beside a bare echo of the same messages by the same kind of server, and beside
a loop over the same graph in one process. They take turns in one run, so that a busy machine slows all of them alike.

The load comes from a process of its own: so many clients, each with a connection of its own and one call under way,
all on one event loop, of requests made in advance and answers that are counted and not parsed. Everything is on the
loopback.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pyarrow.parquet as pq

from serving.client import wire
from serving.messages import BEST

if TYPE_CHECKING:
    from serving.predictor import Predictor

REQUESTS = 512
"""Different requests, of so many users."""
START_S = 180.0
"""The longest that a process may take to be ready."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Otherwise all channels of a process to one address share a connection, and so one worker."""
OURS, ECHO, LOOP = "ours", "echo", "in-process loop"


def measure_serving(
    artifact: Path,
    *,
    clients: int = 16,
    seconds: float = 60.0,
    rounds: int = 6,
    k: int = 10,
    workers: int = 1,
    profile: str = BEST,
    keep: int | None = None,
) -> dict[str, Any]:
    """Calls of `fusion.RecommendationService/Recommend` per second, and their latencies.

    Args:
        artifact: the folder of a recommender's artifact.
        clients: calls under way at once.
        seconds: of load for each of the two servers, in all.
        rounds: turns that these are cut into.
        k: items of a list.
        workers: processes of each of the two servers, which share its port.
        profile: that is asked for; the loop always asks the whole ensemble.
        keep: answers that our server keeps for questions that come again, as all do here; None keeps none.

    Returns for `ours` and `echo` `calls_per_s` (median of the rounds), `p50_ms`, `p95_ms`, `p99_ms`, `calls`, `failed`;
    for the loop `calls_per_s`; and `share_of_echo`, the median over rounds of ours to echo.
    """
    from serving.predictor import (
        Predictor,  # here, so that the processes of the load and the echo do without TensorFlow
    )

    users = pq.read_table(artifact / "users.parquet", columns=["user_id"]).column("user_id").to_pylist()
    chosen = [users[place] for place in np.random.default_rng(0).integers(0, len(users), REQUESTS)]
    asked = [_request(user, k, profile) for user in chosen]
    turn = seconds / rounds
    found: dict[str, list[_Load]] = {OURS: [], ECHO: []}
    loops = []
    predictor = Predictor.load(artifact)
    with _process(_serve, str(artifact), workers, keep) as port, _echoes(_answer(port, asked[0]), workers) as echo_port:
        ports = {OURS: port, ECHO: echo_port}
        for name in ports:
            _loaded(ports[name], asked, clients, min(turn, 2.0))  # connections and caches
        for turns in range(rounds):
            for name in (OURS, ECHO) if turns % 2 == 0 else (ECHO, OURS):
                found[name].append(_loaded(ports[name], asked, clients, turn))
            loops.append(_loop(predictor, chosen, k, turn / 4))
    ratios = [ours.rate / echo.rate for ours, echo in zip(found[OURS], found[ECHO], strict=True)]
    return {
        "clients": clients,
        "k": k,
        "workers": workers,
        "profile": profile,
        "kept_answers": keep,
        **{name: _summary(loads) for name, loads in found.items()},
        LOOP: {"calls_per_s": round(float(np.median(loops)))},
        "share_of_echo": float(np.median(ratios)),
    }


def as_text(result: dict[str, Any]) -> str:
    """The figures for people."""
    asked = f"{result['clients']} clients, k = {result['k']}, profile {result['profile']}"
    kept = f", {result['kept_answers']:,} answers kept" if result["kept_answers"] else ""
    lines = [f"{asked}, {result['workers']} process(es){kept}"]
    for name in (OURS, ECHO):
        found = result[name]
        lines.append(
            f"{name:>16}: {found['calls_per_s']:,} calls/s; p50 {found['p50_ms']:.2f}, p95 {found['p95_ms']:.2f}, "
            f"p99 {found['p99_ms']:.2f} ms; {found['calls']:,} calls, {found['failed']} failed"
        )
    lines.append(f"{LOOP:>16}: {result[LOOP]['calls_per_s']:,} calls/s")
    lines.append(f"ours is {result['share_of_echo']:.0%} of the bare echo (median of the rounds)")
    return "\n".join(lines)


class _Load:
    """What one turn of load met: latencies in seconds of answered calls, failures, and how long it took."""

    def __init__(self, latencies: np.ndarray, failed: int, seconds: float) -> None:
        self.latencies, self.failed, self.rate = latencies, failed, len(latencies) / seconds


def _summary(loads: Sequence[_Load]) -> dict[str, Any]:
    latencies = 1000 * np.concatenate([load.latencies for load in loads])
    p50, p95, p99 = (float(value) for value in np.percentile(latencies, [50, 95, 99]))
    return {
        "calls_per_s": round(float(np.median([load.rate for load in loads]))),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "calls": len(latencies),
        "failed": sum(load.failed for load in loads),
    }


def _request(user: str, k: int, profile: str) -> bytes:
    request: Any = wire.RecommendRequest(user_id=user, k=k, profile=profile)
    return bytes(request.SerializeToString())


def _answer(port: int, request: bytes) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return bytes(channel.unary_unary(wire.RECOMMEND)(request, timeout=START_S))


def _loop(predictor: Predictor, users: Sequence[str], k: int, seconds: float) -> float:
    """Calls per second of one caller, one user each, in this process."""
    started, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < seconds or not calls:
        predictor.recommend([users[calls % len(users)]], k=k)
        calls += 1
    return calls / took


# ---- processes -----------------------------------------------------------------------------------------------


@contextmanager
def _process(target: Callable[..., None], *given: Any) -> Iterator[int]:
    """Runs `target(*given, pipe)` in a process of its own, which sends a port once it is ready; ends it afterwards."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(*given, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise TimeoutError(f"a server of the benchmark was not ready after {START_S:g} s")
        yield ours.recv()
    finally:
        process.terminate()
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(artifact: str, workers: int, keep: int | None, pipe: Connection) -> None:
    from serving.batching import BatchSettings
    from serving.model_config import named_models
    from serving.server import serve
    from serving.settings import ServerSettings

    models = tuple(named_models(Path(artifact)))
    batching = BatchSettings(keep=keep)
    settings = ServerSettings(models, grpc_port=0, rest_port=0, workers=workers, batching=batching)
    serve(settings, lambda facts: pipe.send(facts["ports"]["grpc"]))


@contextmanager
def _echoes(answer: bytes, workers: int) -> Iterator[int]:
    """The port of so many processes of `_echo`."""
    with ExitStack() as processes:
        port = 0
        for _ in range(workers):
            port = processes.enter_context(_process(_echo, answer, port))
        yield port


def _echo(answer: bytes, port: int, pipe: Connection) -> None:
    """A server of the same kind that answers every question with the same bytes."""

    async def echoed(data: bytes, context: Any) -> bytes:
        return answer

    async def run() -> None:
        server = grpc.aio.server()
        service, _, method = wire.RECOMMEND.strip("/").partition("/")
        handler = grpc.unary_unary_rpc_method_handler(echoed)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        pipe.send(server.add_insecure_port(f"127.0.0.1:{port}"))  # grpcio lets processes share a port
        await server.start()
        await server.wait_for_termination()

    asyncio.run(run())


def _loaded(port: int, asked: Sequence[bytes], clients: int, seconds: float) -> _Load:
    """One turn of load, from a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_ask, args=(port, asked, clients, seconds, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds + START_S):
            raise TimeoutError("the load of the benchmark did not end")
        latencies, failed, took = ours.recv()
    finally:
        process.join(30)
    return _Load(np.frombuffer(latencies), failed, took)


def _ask(port: int, asked: Sequence[bytes], clients: int, seconds: float, pipe: Connection) -> None:
    pipe.send(asyncio.run(_all_clients(port, asked, clients, seconds)))


async def _all_clients(port: int, asked: Sequence[bytes], clients: int, seconds: float) -> tuple[bytes, int, float]:
    latencies: list[float] = []
    failed = 0
    async with AsyncExitStack() as channels:
        started = time.perf_counter()

        async def client(place: int) -> None:
            nonlocal failed
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION)
            call = (await channels.enter_async_context(channel)).unary_unary(wire.RECOMMEND)
            while (before := time.perf_counter()) - started < seconds:
                try:
                    await call(asked[place % len(asked)], timeout=30)
                    latencies.append(time.perf_counter() - before)
                except grpc.aio.AioRpcError:
                    failed += 1
                place += clients

        await asyncio.gather(*(client(place) for place in range(clients)))
        took = time.perf_counter() - started
    return np.array(latencies).tobytes(), failed, took
