"""One process of a server: the models, and both doors on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from fusion.export.manifest import GateError
from serving.errors import ConfigurationRefused
from serving.feedback import FeedbackLog
from serving.grpc_server import GrpcDoor
from serving.items_journal import ItemsJournal
from serving.metrics import METRICS
from serving.model_store import ModelStore, Servable
from serving.new_items import NewItems
from serving.ports import bind
from serving.recommending import Recommending
from serving.rest_guard import uvicorn_config
from serving.rest_server import admin_app, app
from serving.security import Tokens
from serving.settings import ServerSettings
from serving.watching import Watching

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 1.0
MAY_HANG = ("recommend", "rest", "batch-", "model-store", "watching", "alarms")
"""Beginnings of the names of threads that may be left behind in a model, or in what an alarm led to."""
Announce = Callable[[dict[str, Any]], None]


class Worker:
    """Both doors of one process.

    Args:
        settings: with the ports as numbers.
        shared: a folder that the processes of this server share, None for a single one.
    """

    def __init__(self, settings: ServerSettings, shared: Path | None) -> None:
        self._settings, self._shared = settings, shared
        self._parent = os.getppid()
        self._new_items: NewItems | None = None
        self._tokens = None if settings.tokens is None else Tokens(settings.tokens)
        self._admin_tokens = None if settings.admin_tokens is None else Tokens(settings.admin_tokens)
        if settings.tls is not None:
            settings.tls.check()
        if settings.items_journal is not None and settings.item_reader is None:
            raise ConfigurationRefused(
                "a server that keeps new items must be told what reads them; it has an 'items_journal', and no "
                "'item_reader'."
            )

    def run(self, announce: Announce) -> None:
        """Loads the models, opens the doors, and serves until a signal."""
        settings = self._settings
        orders = None if self._shared is None else self._shared / "orders.json"
        if self._shared is not None:
            METRICS.share(self._shared)
        gc.freeze()  # what the libraries brought stays; collecting it again and again would make requests wait
        with contextlib.ExitStack() as open_parts:
            batching = settings.batching
            if batching.cores is None:
                batching = dataclasses.replace(batching, cores=_graph_cores(settings.workers))
            watching = self._watching()
            called = None if watching is None else watching.called
            self._store = ModelStore(
                settings.models, settings.limits, batching, shared=orders, called=called, prepare=self._prepare
            )
            open_parts.callback(self._store.close)
            self._recommending = Recommending(self._store)
            if settings.items_journal is not None and settings.item_reader is not None:
                journal = ItemsJournal(settings.items_journal)
                self._new_items = NewItems(self._store, self._recommending, journal, settings.item_reader)
                open_parts.callback(self._new_items.close)
            if watching is not None:
                open_parts.callback(watching.close)
            self._store.poll()
            _check_any(self._store)
            asyncio.run(self._serve(watching, announce))
        _leave_hung_threads()

    def _prepare(self, version: Servable) -> None:
        if self._new_items is not None:
            self._new_items.prepare(version)

    def _watching(self) -> Watching | None:
        """What watches the calls; alarms may roll a model back, and leave out a member."""
        if self._settings.watch is None:
            return None
        do: dict[str, Callable[..., object]] = {
            "rollback": lambda model, version: self._store.rollback(model, version),
            "drop_member": lambda model, member: self._store.drop_member(model, member),
        }
        return Watching(self._settings.watch, do, lambda model: self._store.served(model))

    async def _serve(self, watching: Watching | None, announce: Announce) -> None:
        settings, shared = self._settings, self._shared is not None
        store, recommending = self._store, self._recommending
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        credentials = None if settings.tls is None else settings.tls.grpc_credentials()
        door = GrpcDoor(store, recommending, settings.grpc, credentials, self._tokens, self._admin_tokens)
        feedback = None if settings.feedback is None else FeedbackLog(settings.feedback)
        apps = {"rest": app(store, recommending, settings.rest, self._tokens, feedback=feedback)}
        if settings.admin_port is not None and self._admin_tokens is not None:
            apps["admin"] = admin_app(store, self._admin_tokens, settings.rest, self._new_items)
        opened: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []
        try:
            await door.start(settings.host, settings.grpc_port, shared)
            for name, found in apps.items():
                opened.append(await self._open(name, found))
            store.start(settings.poll_s)
            if self._new_items is not None:
                self._new_items.start()
            models = {name: [s.version for s in store.statuses(name)] for name in store.names()}
            announce({"ports": settings.ports, "models": models, "processes": [os.getpid()]})
            await self._until(stop)
        finally:
            store.drain()
            await asyncio.gather(door.stop(settings.drain_s), *(_closed(server, task) for server, task in opened))
            if feedback is not None:
                feedback.close()

    async def _open(self, name: str, found: Any) -> tuple[uvicorn.Server, asyncio.Task[None]]:
        settings = self._settings
        config = uvicorn_config(found, settings.rest, settings.host, settings.ports[name], settings.tls)
        config.timeout_graceful_shutdown = max(round(settings.drain_s), 1)
        server = _Uvicorn(config)
        listening = bind(settings.host, settings.ports[name], shared=self._shared is not None)
        task = asyncio.create_task(server.serve([listening]))
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        if task.done():
            task.result()
        return server, task

    async def _until(self, stop: asyncio.Event) -> None:
        """Waits for the order to stop; writes the numbers for the other processes; a worker does not outlive its
        supervisor."""
        while not stop.is_set() and (self._shared is None or os.getppid() == self._parent):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), HOUSEKEEPING_S)
            METRICS.save()


def _graph_cores(workers: int) -> int:
    """What one of so many processes leaves to its graphs: its share of the cores but one, on which its doors run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // workers - 1, 1)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: one order stops both doors."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _closed(server: uvicorn.Server, task: asyncio.Task[None]) -> None:
    server.should_exit = True
    await task


def _check_any(store: ModelStore) -> None:
    """Raises GateError when nothing at all can be served."""
    reasons = []
    for name in store.names():
        statuses = store.statuses(name)
        if any(not status.error for status in statuses):
            return
        reasons += [f"'{name}': {status.error}" for status in statuses] or [f"'{name}' has no version in its folder."]
    raise GateError(f"a server needs at least one version that loads; {' '.join(reasons)}")


def _leave_hung_threads() -> None:
    """Ends the process although threads hang: Python would wait for some of them for ever, and take TensorFlow apart
    under the others. All that had to be answered has been."""
    hung = [thread for thread in threading.enumerate() if thread.name.startswith(MAY_HANG)]
    if hung:
        logger.warning("%d threads still work or wait; the process ends without them", len(hung))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
