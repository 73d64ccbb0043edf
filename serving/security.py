"""Who may come in: bearer tokens and TLS, the same for the REST door and the gRPC door.

A file of tokens holds no token, only their SHA-256, one a line, with the day after which it no longer opens:

    # name    SHA-256 of the token, 64 hexadecimal digits                                 last day (UTC, optional)
    shop      9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08            2027-03-31

    printf %s "$TOKEN" | sha256sum      makes the digits; `openssl rand -hex 32` makes a token

Plain SHA-256 is right for tokens that were drawn at random; a word that a person chose could be guessed from it. The
file is read again when it changes. As long as it is missing or has a wrong line, nobody comes in.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import logging
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from serving.errors import ConfigurationRefused, Unauthenticated
from serving.files import stamp

LOG = logging.getLogger("serving.security")
OPEN_TO_ALL = "/grpc.health.v1.Health/"
"""Calls of gRPC that need no token: whoever watches the process has none, and they tell nothing about models."""

_LINE = re.compile(r"(?P<name>\S{1,64})\s+(?P<digest>[0-9a-f]{64})(?:\s+(?P<last_day>\d{4}-\d\d-\d\d))?")
_BEARER = "bearer "


@dataclass(frozen=True)
class Token:
    """A line of the file: whose, the SHA-256, and the last day on which it opens (None: until it is taken out)."""

    name: str
    digest: bytes
    last_day: datetime.date | None = None


class Tokens:
    """The tokens that open a door, read from a file and read again when that changes. Safe to use from several threads.

    Raises ConfigurationRefused when the file cannot be read or has a wrong line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._seen = stamp(self.path)
        self._tokens = read_tokens(self.path)

    def check(self, authorization: str | None) -> str:
        """The name of the caller whose token stands in a header `Authorization: Bearer TOKEN`.

        Every token of the file is compared in constant time, whether an earlier one fits or not, so that the time of an
        answer tells nothing. Raises Unauthenticated; why is logged, and not told to the caller.
        """
        given = authorization or ""
        if given[: len(_BEARER)].lower() != _BEARER:
            raise Unauthenticated("this server needs the header 'Authorization: Bearer TOKEN'; the request has none.")
        digest = hashlib.sha256(given[len(_BEARER) :].strip().encode("utf-8", "surrogateescape")).digest()
        found = [token for token in self._current() if hmac.compare_digest(token.digest, digest)]
        today = datetime.datetime.now(datetime.UTC).date()
        valid = [token for token in found if token.last_day is None or today <= token.last_day]
        if not valid:
            if found:
                LOG.warning("the token of '%s' expired on %s", found[0].name, found[0].last_day)
            raise Unauthenticated("the token is not one of this server's, or has expired.")
        return valid[0].name

    def _current(self) -> tuple[Token, ...]:
        with self._lock:
            if (seen := stamp(self.path)) != self._seen:
                self._seen = seen
                try:
                    self._tokens = read_tokens(self.path)
                    LOG.info("read %d tokens anew", len(self._tokens))
                except ConfigurationRefused as error:
                    self._tokens = ()
                    LOG.error("nobody is let in: %s", error)
            return self._tokens


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file. Raises ConfigurationRefused, with the number of the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationRefused(f"the file of tokens {path} must be readable text ({error}).") from error
    tokens = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        try:
            last_day = datetime.date.fromisoformat(match["last_day"]) if match and match["last_day"] else None
        except ValueError:
            match = None
        if not match:
            raise ConfigurationRefused(
                f"line {number} of the file of tokens {path} must be a name, the token's SHA-256 as 64 hexadecimal "
                "digits in small letters, and perhaps a last day as 2027-03-31."
            )
        tokens.append(Token(match["name"], bytes.fromhex(match["digest"]), last_day))
    return tuple(tokens)


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Answers calls without a valid token with UNAUTHENTICATED, before their message is parsed; `grpc.aio.server`."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        sentence = refusal(self._tokens, handler_call_details)
        if not sentence:
            return await continuation(handler_call_details)

        async def abort(_: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, sentence)

        return grpc.unary_unary_rpc_method_handler(abort)


def refusal(tokens: Tokens, call: Any) -> str:
    """Why a gRPC call (`grpc.HandlerCallDetails`) is not let in, '' when it is."""
    if call.method.startswith(OPEN_TO_ALL):
        return ""
    given = [value for key, value in call.invocation_metadata or () if key == "authorization"]
    try:
        tokens.check(given[0] if given else None)
    except Unauthenticated as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Tls:
    """Certificates of a server, as PEM files.

    Attributes:
        certificate: the server's own, with those in between.
        key: its private key, without a password.
        client_ca: who signs the certificates of clients; where it is given, every client must show one (mutual TLS).
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Raises ConfigurationRefused, before a port is opened, for files that cannot be read or do not fit each other,
        and for certificates that have expired or are not valid yet."""
        certificates = _certificates(self.certificate)
        _check_dates(self.certificate, certificates[0])
        if self.client_ca is not None:
            for authority in _certificates(self.client_ca):
                _check_dates(self.client_ca, authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (OSError, ValueError) as error:
            raise ConfigurationRefused(
                f"{self.key} must be the key of {self.certificate}, in PEM and without a password ({_reason(error)})."
            ) from error

    def ssl_context(self) -> ssl.SSLContext:
        """For the REST door: TLS 1.2 or newer, and a certificate of every client where `client_ca` is given."""
        self.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.certificate, self.key)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.client_ca)
        return context

    def grpc_credentials(self) -> Any:
        """For the gRPC door (`server.add_secure_port`); gRPC speaks TLS 1.2 and newer only."""
        self.check()
        authority = self.client_ca.read_bytes() if self.client_ca is not None else None
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials(
            [pair], root_certificates=authority, require_client_auth=authority is not None
        )


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationRefused(f"{path} must be a certificate in PEM ({_reason(error)}).") from error


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now <= end:
        raise ConfigurationRefused(
            f"the certificate {path} must be valid today; it is from {start:%Y-%m-%d} until {end:%Y-%m-%d}. Renew it."
        )


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error).split("(")[0].strip()


def _no_password() -> str:
    """Instead of asking at the terminal."""
    raise ValueError("it has a password")
