"""What stands before the REST door's answers: limits, tokens, request ids, logs, and patience that ends.

A request is refused as early as it can be: slow headers by the protocol, before there is a request; a missing token by
its headers; a large body while it comes; the rest before it is parsed (`serving.json_limits`).
"""

from __future__ import annotations

import asyncio
import asyncio.constants
import ipaddress
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    Overloaded,
    ServingError,
    SlowClient,
    Unauthenticated,
    Unavailable,
)
from serving.limits import check_bounds
from serving.security import Tls, Tokens

LOG = logging.getLogger("serving.rest")
ACCESS = logging.getLogger("serving.access")

REQUEST_ID = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINGER_S = 1.0
"""How long what is left of a refused body is read and dropped, so that the client gets to read why it was refused."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": POLICY,
    "cache-control": "no-store",
}
OPERATION = "serving.operation"
"""Key of the scope under which a route says what it is, for the log."""
NO_ANSWER = 499
"""Logged as the status of a request whose client went away, as others do."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class RestSettings:
    """Bounds of the REST door; each is above 0.

    | bound             | default | of what                                                                          |
    |-------------------|---------|----------------------------------------------------------------------------------|
    | `body_bytes`      | 16 MB   | one body as it comes                                                             |
    | `inflated_bytes`  | 64 MB   | one body after gzip                                                              |
    | `ratio`           | 100     | inflated to compressed bytes                                                     |
    | `held_bytes`      | 256 MB  | all bodies that are here at once                                                 |
    | `depth`           | 32      | brackets of JSON inside each other                                               |
    | `values`          | 1 M     | values of one body                                                               |
    | `header_bytes`    | 16 KB   | the head of a request                                                            |
    | `threads`         | 16      | requests that are answered at once                                               |
    | `waiting`         | 64      | requests that wait for one of these threads; more are refused                    |
    | `connections`     | 1,000   | clients at once                                                                  |
    | `seconds`         | 10      | until the answer                                                                 |
    | `header_seconds`  | 5       | until the head of a request is there                                             |
    | `body_seconds`    | 10      | until its body is there                                                          |
    | `idle_seconds`    | 5       | between requests of one connection, and for a client to take its answer          |

    Attributes:
        hosts: names in the header `Host` that are answered, in lower case; besides them `localhost` and addresses are,
            and no other name. Without any, all names are answered, but none over loopback by a door without tokens: a
            page of somebody else that a browser on this machine shows can point a name of its own at 127.0.0.1, and
            would then read from a door that is open to all of the machine (DNS rebinding). A reverse proxy that passes
            the public name on needs that name here.
    """

    body_bytes: int = 16 * 2**20
    inflated_bytes: int = 64 * 2**20
    ratio: int = 100
    held_bytes: int = 256 * 2**20
    depth: int = 32
    values: int = 1_000_000
    header_bytes: int = 16 * 2**10
    threads: int = 16
    waiting: int = 64
    connections: int = 1000
    seconds: float = 10.0
    header_seconds: float = 5.0
    body_seconds: float = 10.0
    idle_seconds: float = 5.0
    hosts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_bounds(self)


class Workers:
    """Threads that answer, and a bounded number of requests that wait for one.

    A call that hangs keeps its thread, and its place, until it ends: when all places are taken so, what comes is
    refused at once instead of piling up.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rest")
        self._places = threads + waiting
        self._taken = 0
        self._lock = threading.Lock()

    async def run(self, function: Callable[[], Result], seconds: float) -> Result:
        """The function's result, computed in a thread. Raises Overloaded; DeadlineExceeded after so many seconds."""
        with self._lock:
            if self._taken >= self._places:
                raise Overloaded(
                    f"the REST door is full: {self._taken} of {self._places} requests are being answered or wait; "
                    "come back in 1 s.",
                    retry_after=1.0,
                )
            self._taken += 1
        try:
            future = self._pool.submit(function)
        except RuntimeError as error:  # the pool takes no more
            self._leave()
            raise Unavailable("the server is stopping; ask another one.") from error
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the answer was not there within {seconds:g} s.") from error

    def close(self) -> None:
        """Takes nothing more; what runs comes to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, _: Future[Any] | None = None) -> None:
        with self._lock:
            self._taken -= 1


class Bodies:
    """Reads bodies, and bounds what is held of all of them together. Belongs to one event loop."""

    def __init__(self, settings: RestSettings) -> None:
        self._settings = settings
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """The body as it came; `release` its size when it is no longer needed.

        Raises BodyTooLarge, Overloaded, SlowClient, and Starlette's ClientDisconnect.
        """
        settings, chunks, size = self._settings, list[bytes](), 0
        try:
            declared = request.headers.get("content-length", "0")
            if declared.isdecimal() and int(declared) > settings.body_bytes:
                raise BodyTooLarge(f"a body must have at most {settings.body_bytes} bytes; received {declared}.")
            async with asyncio.timeout(settings.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    self._held += len(chunk)
                    if size > settings.body_bytes:
                        raise BodyTooLarge(f"a body must have at most {settings.body_bytes} bytes; it has more.")
                    if self._held > settings.held_bytes:
                        raise Overloaded("too many large bodies are being read; come back in 1 s.", retry_after=1.0)
                    chunks.append(chunk)
        except TimeoutError as error:
            self.release(size)
            raise SlowClient(f"the body must be there within {settings.body_seconds:g} s; it is not.") from error
        except (BodyTooLarge, Overloaded):
            self.release(size)
            await self._linger(request)
            raise
        except BaseException:
            self.release(size)
            raise
        return b"".join(chunks)

    def release(self, size: int) -> None:
        """The body of so many bytes is no longer held."""
        self._held -= size

    async def _linger(self, request: Request) -> None:
        try:
            async with asyncio.timeout(_LINGER_S):
                async for _ in request.stream():
                    pass
        except (TimeoutError, RuntimeError, ClientDisconnect):
            return  # enough was done for this client


class Guard:
    """Middleware around everything: who asks, under which number, what came of it, and every error as one sentence.

    Args:
        app: what answers.
        tokens: who may ask; None asks for no token.
        open_paths: these need no token.
        hosts: see RestSettings.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens | None, open_paths: frozenset[str], hosts: frozenset[str]) -> None:
        self._app, self._tokens, self._open, self._hosts = app, tokens, open_paths, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        facts: dict[str, Any] = {"id": given if _ID.fullmatch(given) else secrets.token_hex(8), "status": NO_ANSWER}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                own = MutableHeaders(scope=message)
                own[REQUEST_ID] = facts["id"]
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
            await send(message)

        try:
            self._check_host(scope, headers.get("host", ""))
            self._check_origin(scope["method"], headers)
            if self._tokens is not None and scope["path"] not in self._open:
                facts["caller"] = self._tokens.check(headers.get("authorization"))
            await self._app(scope, receive, answer)
        except ServingError as error:
            await error_response(error)(scope, receive, answer)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception:
            LOG.exception("request %s failed", facts["id"])
            if facts["status"] != NO_ANSWER:
                raise  # half an answer is there already
            await error_response(ServingError("the server failed; its log says why."))(scope, receive, answer)
        finally:
            # Neither the query nor the body: they hold what people searched for and took.
            facts |= {"method": scope["method"], "operation": scope.get(OPERATION, "")}
            facts["ms"] = round((time.perf_counter() - started) * 1000, 2)
            ACCESS.info(json.dumps(facts))

    def _check_host(self, scope: Scope, header: str) -> None:
        name = header[: header.rindex("]") + 1] if header.endswith("]") else header.rpartition(":")[0] or header
        if _is_address(name.strip("[]")) or name.lower() in self._hosts | {"localhost"}:
            return
        here = (scope.get("server") or ("",))[0]
        open_here = self._tokens is None and _is_address(here) and ipaddress.ip_address(here).is_loopback
        if self._hosts or open_here:
            raise Forbidden(f"this door is not asked as '{name[:100]}'; an operator may allow more names.")

    def _check_origin(self, method: str, headers: Headers) -> None:
        """A browser says which page sends something. None of another server may: nobody asked its reader."""
        if method in ("GET", "HEAD", "OPTIONS"):  # these change nothing, and browsers give no answer to such a page
            return
        origin = headers.get("origin")
        theirs = urlsplit(origin).netloc if origin is not None else headers.get("host", "")
        known = theirs == headers.get("host", "") or theirs.rpartition(":")[0].lower() in self._hosts
        if not (known or theirs.lower() in self._hosts) or headers.get("sec-fetch-site") == "cross-site":
            raise Forbidden("a page of another server sends this; only pages of this door may.")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def error_response(error: ServingError) -> Response:
    """TensorFlow Serving's form of an error, with what HTTP has to say beside it."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded) and error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))  # whole seconds
    if isinstance(error, BodyTooLarge | SlowClient | Overloaded | Unauthenticated | Forbidden):
        headers["connection"] = "close"  # there may be more of the body to come
    sentence = str(error) if error.http_status != 500 else public(error)
    return json_response({"error": sentence}, error.http_status, headers)


def public(error: ServingError) -> str:
    """What a caller is told of a fault of ours: no path, no message of a library. The log has it whole."""
    LOG.error("%s", error)
    return "the server could not answer; its log says why."


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in UTF-8; raises ValueError for NaN and infinities, which must not get here."""
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A name may hold half a surrogate pair, which UTF-8 does not have.
    return Response(content.encode("utf-8", "replace"), status, headers, "application/json")


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, whose patience ends: with a head that does not come, and an answer that nobody takes."""

    header_seconds = 5.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # it closes when everything is sent, which may be never
            self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _wait_for_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.abort()


def uvicorn_config(
    app: ASGIApp, settings: RestSettings, host: str = "127.0.0.1", port: int = 8501, tls: Tls | None = None
) -> uvicorn.Config:
    """How uvicorn must run an app of `serving.rest_server` so that all of its bounds hold."""
    protocol = type("Protocol", (PatientProtocol,), {"header_seconds": settings.header_seconds})
    if tls is not None:  # uvicorn cannot be told, and without it a caller who never shakes hands is kept for a minute
        asyncio.constants.SSL_HANDSHAKE_TIMEOUT = settings.header_seconds  # type: ignore[misc]
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.connections,
        timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]  # it goes to call_later, which takes floats
        h11_max_incomplete_event_size=settings.header_bytes,
        ssl_context_factory=(lambda *_: tls.ssl_context()) if tls is not None else None,
    )
