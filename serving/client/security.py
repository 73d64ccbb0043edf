"""Certificates, and whom a token may be shown to."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TLS:
    """An encrypted connection.

    Attributes:
        ca: PEM file of the authorities that servers are checked against; None takes the system's.
        certificate, key: PEM files of this client, where servers ask for one (mutual TLS); both or neither.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client certificate needs its key: give both or neither of certificate and key.")

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Authorities, key and certificate as gRPC takes them. Raises ValueError as `context` does: gRPC itself would
        say nothing of a damaged file, and never get a connection."""
        self.context()
        ca, key, certificate = (None if path is None else Path(path).read_bytes() for path in self._paths())
        return ca, key, certificate

    def context(self) -> ssl.SSLContext:
        """The same for HTTP; TLS 1.2 or newer. Raises ValueError for a file that is not there or no PEM file of its
        kind, and for a key of another certificate."""
        ca, key, certificate = self._paths()
        try:
            context = ssl.create_default_context(cafile=None if ca is None else str(ca))
            if certificate is not None:
                context.load_cert_chain(certificate, key)
        except OSError as error:  # SSLError is one
            raise ValueError(
                f"ca, certificate and key must be readable PEM files, and the key that of the certificate; received "
                f"ca={ca}, certificate={certificate} and key={key}, of which the system says: {error}."
            ) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def _paths(self) -> tuple[str | Path | None, str | Path | None, str | Path | None]:
        return self.ca, self.key, self.certificate


def split(target: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 address stands in brackets. Raises ValueError."""
    host, colon, port = target.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and bare == host):
        raise ValueError(f"a target must be host:port, such as localhost:8500; received '{target}'.")
    return bare, int(port)


def is_loopback(target: str) -> bool:
    """Whether `host:port` is this machine, so that nobody on the way can read along."""
    host, _ = split(target)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
