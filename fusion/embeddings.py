"""Turns values into embeddings once and keeps them: batches through an encoder, cached by content.

There is no training here: the encoder is used as it is.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion.errors import MachineError
from fusion.files import lock_making
from fusion.images import Progress
from fusion.submodels.base import Submodel, check_texts

VERSION = 1
"""Raised when the numbers that come out change, so that older caches are not used."""

DIGEST_BYTES = hashlib.sha256().digest_size


def embed(
    submodel: Submodel,
    values: Sequence[Any],
    cache_dir: Path | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """The embedding of each value, float32 `[N, D]` in the order of `values`.

    Values are what `submodel.prepare` takes: texts, images as uint8 `[N, H, W, 3]` (a memory map is read batch by
    batch), or rows of a table. Equal texts are computed once, and texts of similar length share a batch, so that
    little is padded.

    With `cache_dir` the result is kept as `.npy` under the hash of the submodel's fingerprint and of the values, and
    a file whose own hash is wrong is computed anew. Raises MachineError when the cache cannot be written.
    """
    if submodel.modality == "text":
        values = check_texts(values)
    if cache_dir is None:
        return _embed(submodel, values, batch_size, progress)
    path = Path(cache_dir) / f"embeddings-{values_hash(f'{VERSION}:{submodel.fingerprint()}', values)}.npy"
    shape = len(values), submodel.dimensions
    embeddings = _read(path, shape)
    if embeddings is None:
        with lock_making(path):
            embeddings = _read(path, shape)  # another process may have made them while we waited
            if embeddings is None:
                embeddings = _embed(submodel, values, batch_size, progress)
                _write(path, embeddings)
                return embeddings
    if progress is not None:
        progress(len(values), len(values))
    return embeddings


def _embed(submodel: Submodel, values: Sequence[Any], batch_size: int, progress: Progress | None) -> np.ndarray:
    chosen, row = distinct(values)
    return _run(submodel, chosen, working_order(chosen), batch_size, progress)[row]


def distinct(values: Sequence[Any]) -> tuple[Sequence[Any], np.ndarray]:
    """The different texts, and the number int64 `[N]` among them of each value; images are taken as all different."""
    if isinstance(values, np.ndarray):
        return values, np.arange(len(values))
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return list(numbers), np.array([numbers[value] for value in values], np.int64)


def working_order(values: Sequence[Any]) -> np.ndarray:
    """Row numbers in the order in which values are worked on: texts of similar length together.

    Longest first: a machine without enough memory says so at once, and the rest gets faster than foretold.
    """
    if isinstance(values, np.ndarray):
        return np.arange(len(values))
    return np.argsort([-len(text) for text in values], kind="stable")


def take(values: Sequence[Any], rows: np.ndarray) -> Sequence[Any]:
    """The values of some rows."""
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]


def concatenate(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The values of several parts, one after the other."""
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [value for part in parts for value in part]


def _run(
    submodel: Submodel, values: Sequence[Any], order: np.ndarray, batch_size: int, progress: Progress | None
) -> np.ndarray:
    """The embeddings of `values`, computed in the given order of rows and returned in theirs."""
    result = np.empty((len(values), submodel.dimensions), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        result[rows] = submodel.encode(submodel.prepare(take(values, rows)))
        if progress is not None:
            progress(start + len(rows), len(order))
    return result


# ---- cache ---------------------------------------------------------------------------------------------------


def values_hash(maker: str, values: Sequence[Any]) -> str:
    """SHA-256 (hex) of what something is made of: a name for its maker, and texts or images."""
    digest = hashlib.sha256(f"{maker}:{len(values)}".encode())
    if isinstance(values, np.ndarray):
        digest.update(f"{values.dtype.descr if values.dtype.names else values.dtype.str}:{values.shape}".encode())
        for value in values:  # row by row, so that a memory map is never in memory as a whole
            digest.update(value.tobytes())
    else:
        for value in values:
            text = value.encode()
            digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array in a file that `_write` left, or None when there is none, or it is damaged."""
    try:
        content = memoryview(path.read_bytes())
        body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            return None
        array = np.load(io.BytesIO(body), allow_pickle=False)
    except (OSError, ValueError):
        return None
    return array if array.shape == shape and array.dtype == np.float32 else None


def _write(path: Path, array: np.ndarray) -> None:
    """Writes `.npy` and then the SHA-256 of it, which readers of `.npy` ignore, aside; and renames."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".aside-", dir=path.parent, delete=False) as file:
            aside = Path(file.name)
            file.write(buffer.getbuffer())
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
        os.replace(aside, path)
    except OSError as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        raise MachineError(
            f"the cache folder {path.parent} must be writable and have room; {error.strerror or error}. "
            "Free some space, or set another folder."
        ) from error
