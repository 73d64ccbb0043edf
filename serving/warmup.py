"""Warm-up: the requests of `assets.extra/tf_serving_warmup_requests` are answered once before a version takes over.

The file is the one that TensorFlow Serving reads: TFRecords of `PredictionLog`. It has been verified against the
manifest by then, so the records' own checksums are not computed again; lengths are checked before anything is read.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from serving.errors import ArtifactRefused, DeadlineExceeded, ServingError
from serving.inputs import Arrays
from serving.tensors import decode

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
MAX_RECORDS = 1000
"""Of more the rest is not read; TensorFlow Serving's bound."""
MAX_RECORD_BYTES = 64 * 2**20
SERVING_DEFAULT = "serving_default"
WARM_UP_S = 120.0
"""The longest that all requests may take. While a version is warmed no other one is loaded, and orders wait."""


class Call(Protocol):
    """Answers inputs by the name of a signature; gives up at `time.monotonic()` = deadline with DeadlineExceeded."""

    def __call__(self, signature: str, inputs: Mapping[str, Any], /, *, deadline: float) -> Arrays: ...


def warm_up(folder: Path, call: Call, within_s: float = WARM_UP_S) -> int:
    """Answers every request of the artifact's file; returns how many there were, 0 without a file.

    Args:
        folder: of the artifact.
        call: answers the requests.
        within_s: seconds for all of them.

    Raises ArtifactRefused when the file cannot be read, a request fails, or time is over: a version that cannot answer
    its own examples would not answer users.
    """
    done, deadline = 0, time.monotonic() + within_s
    for record in records(folder / WARMUP_FILE):
        try:
            log = PredictionLog.FromString(record)
        except DecodeError as error:
            raise _refusal(f"record {done + 1} is not a PredictionLog") from error
        if log.WhichOneof("log_type") != "predict_log":
            raise _refusal(f"record {done + 1} must be a predict_log")
        request = log.predict_log.request
        try:
            inputs = {name: decode(name, tensor) for name, tensor in request.inputs.items()}
            call(request.model_spec.signature_name or SERVING_DEFAULT, inputs, deadline=deadline)
        except DeadlineExceeded as error:
            raise _refusal(f"after {within_s:g} s there was no answer to request {done + 1}") from error
        except ServingError as error:
            raise _refusal(f"request {done + 1} failed: {error}") from error
        done += 1
    return done


def records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file, at most MAX_RECORDS; none where there is no file.

    Each is stored as its length (uint64, little-endian), 4 bytes of checksum, the bytes, and 4 bytes of checksum.
    """
    try:
        handle = open(path, "rb")
    except FileNotFoundError:
        return
    with handle:
        for number in range(1, MAX_RECORDS + 1):
            head = handle.read(12)
            if not head:
                return
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else MAX_RECORD_BYTES + 1
            body = handle.read(length + 4) if length <= MAX_RECORD_BYTES else b""
            if len(body) != length + 4:
                raise _refusal(f"record {number} is cut off, or has more than {MAX_RECORD_BYTES} bytes")
            yield body[:-4]


def _refusal(reason: str) -> ArtifactRefused:
    return ArtifactRefused(f"the warm-up file {WARMUP_FILE} must hold requests that the artifact answers; {reason}.")
