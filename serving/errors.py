"""Everything that can go wrong while serving, each with the gRPC code and the HTTP status that a door answers.

    ServingError            INTERNAL             500   a fault of ours
    ├── InvalidRequest      INVALID_ARGUMENT     400   names, dtypes or shapes are not those of the signature
    │   ├── UnknownLabel    INVALID_ARGUMENT     400   no version of the model has this label
    │   └── LimitExceeded   INVALID_ARGUMENT     400   more than `serving.limits` allows
    │       └── BodyTooLarge INVALID_ARGUMENT    413   more bytes than a door takes
    ├── Unauthenticated     UNAUTHENTICATED      401   no token that lets in
    ├── UnknownSignature    FAILED_PRECONDITION  404   the artifact has no signature of this name
    ├── UnknownModel        NOT_FOUND            404   no such model, or no such version of it, is being served
    ├── UnknownItem         NOT_FOUND            404   the artifact has no item of this id
    ├── ItemExists          ALREADY_EXISTS       409   an item of this id is there already
    ├── NotWritable         RESOURCE_EXHAUSTED   507   the disk takes no more of what is to be kept
    ├── Overloaded          RESOURCE_EXHAUSTED   429   no memory, or no place in a queue, for this request now
    ├── Unavailable         UNAVAILABLE          503   the server is stopping, or the version just went
    ├── NotPossible         FAILED_PRECONDITION  409   the server is not in a state for this request
    ├── Forbidden           PERMISSION_DENIED    403   administration is off
    ├── DeadlineExceeded    DEADLINE_EXCEEDED    504   the answer was not there in time
    │   └── SlowClient      DEADLINE_EXCEEDED    408   the request was not there in time
    ├── ConfigurationRefused FAILED_PRECONDITION 503   a server cannot start with these settings
    └── ArtifactRefused     FAILED_PRECONDITION  503   the artifact is damaged or not loadable, so nothing is served

This is the only kind of error that leaves `serving`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import ClassVar


class ServingError(Exception):
    """Base of all errors of a server; itself a fault of ours that the caller cannot repair."""

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500


class InvalidRequest(ServingError):
    """The inputs do not fit the signature; the message names the input and what it must be."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class LimitExceeded(InvalidRequest):
    """The inputs fit the signature but are larger than this server allows."""


class BodyTooLarge(LimitExceeded):
    """The body has more bytes than this server reads, as it came or after it was inflated."""

    http_status = 413


class Unauthenticated(ServingError):
    """The request carries no token of the server's list, or one that has expired."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class UnknownSignature(ServingError):
    """The artifact has no such signature; the message lists those that it has. The code is TensorFlow Serving's."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 404


class UnknownModel(ServingError):
    """No such model, or no such version of it, is being served now."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class UnknownLabel(InvalidRequest):
    """No version has this label; as TensorFlow Serving does, this is answered like a wrong argument."""


class UnknownItem(ServingError):
    """The artifact's catalogue has no item of this id."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class ItemExists(ServingError):
    """An item of this id is being served already, or stands in the request before."""

    grpc_code = "ALREADY_EXISTS"
    http_status = 409


class Overloaded(ServingError):
    """The machine has no memory, or a queue no place, left for this request; it may be tried again.

    Attributes:
        retry_after: in how many seconds it is worth trying again; None where nobody knows.
    """

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotWritable(ServingError):
    """The disk is full, or the folder may not be written to."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 507


class Unavailable(ServingError):
    """This server takes no requests: it is being stopped, or the version just went. Another one may answer."""

    grpc_code = "UNAVAILABLE"
    http_status = 503


class NotPossible(ServingError):
    """The request is understood but the server is not in a state for it; trying again does not help by itself."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 409


class Forbidden(ServingError):
    """The caller is known but must not do this; administration is off unless the operator turns it on."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class DeadlineExceeded(ServingError):
    """The answer was not there in the time that the caller, or this server, allows."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class SlowClient(DeadlineExceeded):
    """The client did not send its whole request in the time that this server waits."""

    http_status = 408


class ConfigurationRefused(ServingError):
    """The settings of a server cannot be: an unreadable certificate, a file of tokens with a wrong line."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 503


class ArtifactRefused(ServingError):
    """The artifact's files do not match its manifest, or TensorFlow cannot load them."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 503


def unknown(name: str, known: Collection[str]) -> str:
    """Half a sentence: what was received, and the nearest of the names that are known."""
    if not known:
        return f"received '{name[:100]}', and there are none"
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"received '{name[:100]}'" + (
        f"; did you mean '{nearest[0]}'?" if nearest else f", known are {', '.join(sorted(known))}"
    )
