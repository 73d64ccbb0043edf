"""The client: four calls to one or several equal servers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np

from .errors import InvalidRequest
from .messages import ItemList, Model, RecommendRequest, SimilarRequest, VersionStatus
from .replicas import Replicas
from .retrying import Caller, RetryPolicy
from .security import TLS, is_loopback, split

MAX_MESSAGE_BYTES = 64 * 2**20
"""As large as our servers let a request be. gRPC's own limit of answers, 4 MB, is met by a few thousand scores."""
LONGEST_SECONDS = 1e6
"""The longest time of a call, eleven days: clocks and sockets have limits of their own, each another one."""


class Door(Protocol):
    """One server behind one transport. `timeout` is in seconds; errors are ClientErrors."""

    def recommend(self, request: RecommendRequest, timeout: float) -> ItemList: ...
    def similar(self, request: SimilarRequest, timeout: float) -> ItemList: ...
    def predict(
        self, model: Model, signature: str, inputs: Mapping[str, Any], timeout: float
    ) -> dict[str, np.ndarray]: ...
    def status(self, model: Model, timeout: float) -> list[VersionStatus]: ...
    def close(self) -> None: ...


class Client:
    """Calls one of several equal servers; thread-safe, to be made once and kept.

    Each call has a deadline that holds for all its tries. A server that is not there is left alone for a while and the
    next one asked; one that is overloaded is asked again after a random wait, within a budget (`RetryPolicy`). One that
    hangs costs a call half of its time, where another server could answer.

    Args:
        targets: `host:port` of each server, for gRPC usually port 8500, for HTTP 8501.
        transport: `grpc`, or `http` where only HTTP gets through; both answer the same.
        token: bearer token. Without TLS it is only shown to this machine itself.
        tls: None for plain text.
        timeout: seconds that a call may take, all tries together, unless the call says otherwise; at most a million.
        retry: when calls are made again.
        model: the model, version or label that calls mean unless they say otherwise.
        max_message_bytes: of a request and of an answer; the server has limits of its own.

    Raises ValueError for targets, numbers or certificates that cannot be meant. Calls raise a ClientError, the same
    over both transports: InvalidRequest, before anything is sent, for numbers, text and versions that cannot be meant.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        transport: Literal["grpc", "http"] = "grpc",
        token: str = "",
        tls: TLS | None = None,
        timeout: float = 10.0,
        retry: RetryPolicy | None = None,
        model: Model | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self.targets = tuple([targets] if isinstance(targets, str) else targets)
        self.transport = transport
        self.timeout = timeout
        self.model = model or Model()
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets must name at least one server, and each once; received {list(self.targets)}.")
        if not 0 < timeout <= LONGEST_SECONDS or max_message_bytes <= 0:
            raise ValueError(
                f"timeout and size must be above 0, and timeout at most {LONGEST_SECONDS:,.0f} seconds; "
                f"received {timeout} and {max_message_bytes}."
            )
        for target in self.targets:
            split(target)
            if token and tls is None and not is_loopback(target):
                raise ValueError(f"a token must not travel in plain text; give tls=TLS() to reach {target}.")
        door = _door(transport)
        doors = [(target, door(target, token, tls, max_message_bytes)) for target in self.targets]
        self._replicas = Replicas[Door](doors)
        self._caller = Caller[Door](self._replicas, retry or RetryPolicy())

    def recommend(
        self,
        user_id: str = "",
        *,
        history: Iterable[str] = (),
        k: int = 10,
        exclude: Iterable[str] = (),
        include: Iterable[str] = (),
        filters: Mapping[str, Iterable[str]] | None = None,
        diversity: float = 0.0,
        profile: Literal["best", "fast"] = "best",
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        model: Model | None = None,
    ) -> ItemList:
        """The best items for a user, by id, by a history, or by both.

        Args:
            user_id: of the training data, or empty.
            history: item ids that the user took, oldest first; added to what is stored of a known user.
            k: how many items.
            exclude: items that must not be returned.
            include: the only items that may be returned; empty allows all.
            filters: by column of the artifact's items, the values that an item must have one of.
            diversity: 0 sorts by score alone; up to 1 the list is spread out.
            profile: `best` asks all members, `fast` their student.
            weights: by member, a factor of its contribution; members that are not named keep 1.
            timeout: seconds.
            model: which model, version or label.

        Raises a ClientError.
        """
        request = RecommendRequest(
            model=self._which(model, 1),
            user_id=_text("user_id", user_id),
            history=_ids("history", history),
            k=_whole("k", k),
            exclude=_ids("exclude", exclude),
            include=_ids("include", include),
            filters={_text("filters", name): _ids(name, values) for name, values in _mapping("filters", filters)},
            diversity=_number("diversity", diversity),
            profile=_text("profile", profile),
            weights={_text("weights", name): _number(name, factor) for name, factor in _mapping("weights", weights)},
        )
        return self._caller.call(lambda door, seconds: door.recommend(request, seconds), self._seconds(timeout))

    def similar(
        self, item_id: str, *, k: int = 10, timeout: float | None = None, model: Model | None = None
    ) -> ItemList:
        """The k items most like one item. Raises a ClientError."""
        request = SimilarRequest(self._which(model, 1), _text("item_id", item_id), _whole("k", k))
        return self._caller.call(lambda door, seconds: door.similar(request, seconds), self._seconds(timeout))

    def predict(
        self, signature: str, inputs: Mapping[str, Any], *, timeout: float | None = None, model: Model | None = None
    ) -> dict[str, np.ndarray]:
        """Runs a signature, as any server that speaks TensorFlow Serving's protocol does.

        Args:
            signature: its name; empty for `serving_default`.
            inputs: arrays, lists or numbers by name. An array travels with its dtype; Python's own numbers become
                float32 and int32, and text UTF-8.
            timeout: seconds.
            model: which model, version or label; TensorFlow Serving needs a name.

        Returns the outputs by name; text as objects of bytes. Raises a ClientError.
        """
        chosen = self._which(model, 0)
        named = {_text("inputs", name): value for name, value in _mapping("inputs", inputs)}
        name = _text("signature", signature)
        return self._caller.call(
            lambda door, seconds: door.predict(chosen, name, named, seconds), self._seconds(timeout)
        )

    def status(self, *, timeout: float | None = None, model: Model | None = None) -> list[VersionStatus]:
        """The versions of a model that a server has, and what state they are in. Raises a ClientError."""
        chosen = self._which(model, 0)
        return self._caller.call(lambda door, seconds: door.status(chosen, seconds), self._seconds(timeout))

    def _seconds(self, timeout: float | None) -> float:
        seconds = self.timeout if timeout is None else timeout
        if not 0 < seconds <= LONGEST_SECONDS:
            raise InvalidRequest(
                f"a timeout must be above 0 seconds, and at most {LONGEST_SECONDS:,.0f}; received {seconds}."
            )
        return seconds

    def _which(self, model: Model | None, least: int) -> Model:
        """The model that a call means. Its version is `least` or more: 0 stands for none in our own messages."""
        chosen = model or self.model
        version = None if chosen.version is None else _whole("version", chosen.version, least, 2**63 - 1)
        return Model(_text("model", chosen.name), version, _text("label", chosen.label))

    def close(self) -> None:
        """Closes all connections; calls under way fail."""
        for replica in self._replicas.all:
            replica.door.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client(targets={list(self.targets)}, transport='{self.transport}')"


def _door(transport: str) -> Any:
    """The class of a transport; imported here, so that HTTP needs no grpcio."""
    if transport == "grpc":
        from .grpc_door import GrpcDoor

        return GrpcDoor
    if transport == "http":
        from .http_door import HttpDoor

        return HttpDoor
    raise ValueError(f"transport must be 'grpc' or 'http'; received '{transport}'.")


def _ids(name: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise InvalidRequest(f"'{name}' must be a list of ids; received the text '{values[:80]}'.")
    return tuple(_text(name, value) for value in values)


def _text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"'{name}' must be text; received {value!r:.80}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"'{name}' must be valid Unicode; received {value!r:.80}.") from error
    return value


def _mapping(name: str, values: Mapping[str, Any] | None) -> Iterable[tuple[str, Any]]:
    if values is not None and not isinstance(values, Mapping):
        raise InvalidRequest(f"'{name}' must be a mapping; received {values!r:.80}.")
    return (values or {}).items()


def _number(name: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"'{name}' must be a number; received {value!r:.80}.") from error


def _whole(name: str, value: int, least: int = 1, most: int = 2**31 - 1) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InvalidRequest(f"'{name}' must be a whole number; received {value!r:.80}.") from error
    if not least <= number <= most:
        raise InvalidRequest(f"'{name}' must be from {least} to {most}; received {number}.")
    return number
