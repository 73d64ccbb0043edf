"""Everything that can go wrong while serving, each with the gRPC code and the HTTP status that a door answers.

    ServingError            INTERNAL             500   a fault of ours
    ├── InvalidRequest      INVALID_ARGUMENT     400   names, dtypes or shapes are not those of the signature
    │   └── LimitExceeded   INVALID_ARGUMENT     400   more than `serving.limits` allows
    ├── UnknownSignature    NOT_FOUND            404   the artifact has no signature of this name
    ├── Overloaded          RESOURCE_EXHAUSTED   429   no memory for this request now
    └── ArtifactRefused     FAILED_PRECONDITION  503   the artifact is damaged or not loadable, so nothing is served

This is the only kind of error that leaves `serving`.
"""

from __future__ import annotations

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


class UnknownSignature(ServingError):
    """The artifact has no such signature; the message lists those that it has."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class Overloaded(ServingError):
    """The machine has no memory left for this request; it may be tried again."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429


class ArtifactRefused(ServingError):
    """The artifact's files do not match its manifest, or TensorFlow cannot load them."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 503
