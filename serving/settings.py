"""What an operator decides about a server. Imports no TensorFlow, so that a supervisor of workers stays small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from serving.actions import Watch
from serving.batching import BatchSettings
from serving.limits import Limits, check_bounds
from serving.model_config import ModelConfig
from serving.rest_guard import RestSettings
from serving.security import Tls

if TYPE_CHECKING:
    from serving.new_items import Reader


@dataclass(frozen=True)
class GrpcSettings:
    """How the door behaves; each number is above 0.

    Attributes:
        max_message_bytes: of one request or answer.
        timeout_s: the longest that a call may take, also for callers that give no deadline.
        calls: under way at once; more are refused. Each may hold one request.
        threads: calls with long lists, filters or many bytes that are worked on at once.
        queue: such calls that may wait for a thread.
    """

    max_message_bytes: int = 64 * 2**20
    timeout_s: float = 60.0
    calls: int = 1000
    threads: int = 16
    queue: int = 256

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class ServerSettings:
    """What a server serves, and how.

    Attributes:
        models: what to serve.
        host: the address of both doors; loopback unless an operator says otherwise.
        grpc_port, rest_port: 0 takes a free one.
        admin_port: of the door for administration, None without it; it needs `admin_tokens`.
        workers: processes that share the ports.
        drain_s: how long requests may take to finish once the server is told to stop.
        poll_s: how often versions are looked for.
        tokens, admin_tokens: files of who may ask, and who may administer (`serving.security`).
        tls: certificates of all doors.
        watch: how closely calls are watched, and what alarms lead to; None does not watch.
        feedback: the folder of the log that `/v1/feedback` writes; None takes no feedback.
        items_journal: the folder in which new items are kept, None without them; it needs `item_reader`.
        item_reader: makes what reads texts and images of new items, of an artifact's folder; a function of a module.
        limits, batching, grpc, rest: bounds of requests, batches and doors.
    """

    models: tuple[ModelConfig, ...]
    host: str = "127.0.0.1"
    grpc_port: int = 8500
    rest_port: int = 8501
    admin_port: int | None = None
    workers: int = 1
    drain_s: float = 20.0
    poll_s: float = 1.0
    tokens: Path | None = None
    admin_tokens: Path | None = None
    tls: Tls | None = None
    watch: Watch | None = None
    feedback: Path | None = None
    items_journal: Path | None = None
    item_reader: Callable[[Path], Reader] | None = None
    limits: Limits = field(default_factory=Limits)
    batching: BatchSettings = field(default_factory=BatchSettings)
    grpc: GrpcSettings = field(default_factory=GrpcSettings)
    rest: RestSettings = field(default_factory=RestSettings)

    @property
    def ports(self) -> dict[str, int]:
        """The ports by door."""
        ports = {"grpc": self.grpc_port, "rest": self.rest_port}
        return ports if self.admin_port is None else {**ports, "admin": self.admin_port}
