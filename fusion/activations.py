"""Runs the frozen part of an encoder once over the data and keeps on disk what the trained part reads.

Fine-tuning the last blocks then starts every step where the frozen ones end. Nothing is trained here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fusion.compat import tf
from fusion.embeddings import distinct, take, values_hash, working_order
from fusion.errors import DataError, EngineError
from fusion.files import atomic_folder, load_arrays, lock_making, save_arrays, sha256_of
from fusion.images import Progress
from fusion.progress import note, progress, reached
from fusion.submodels.base import Pretrained, check_texts, padded_length, trace
from fusion.types import Features

VERSION = 1
"""Raised when the numbers that come out change, so that older caches are not used."""

BATCH = 32
"""Values that run through a model together."""

INDEX, ROWS = "index.json", "rows.npz"


class Activations:
    """What leaves the trunk of an encoder for N values, in memory-mapped files.

    Floats are stored as float16, which rounds by at most one part in 2,048; padding is not stored at all.

    Attributes:
        lengths: int64 `[N]`, positions of each value; None where all values have the same.
        bytes: what the arrays take on disk.
    """

    def __init__(self, folder: Path) -> None:
        arrays = json.loads((folder / INDEX).read_text(encoding="utf-8"))["arrays"]
        rows = load_arrays(folder / ROWS)
        self._arrays = {
            name: np.memmap(folder / name, facts["dtype"], "r", shape=tuple(facts["shape"]))
            for name, facts in arrays.items()
        }
        self._by_position = {name for name, facts in arrays.items() if facts["by_position"]}
        self._row = rows["row"]  # of a value among the stored ones: equal texts share one
        self._ends = np.cumsum(rows["lengths"])
        self._starts = self._ends - rows["lengths"]
        self.lengths = rows["lengths"][self._row] if self._by_position else None
        self.bytes = sum(array.nbytes for array in self._arrays.values())

    def __len__(self) -> int:
        return len(self._row)

    def gather(self, numbers: np.ndarray) -> Features:
        """The inputs of `Pretrained.top()` for some values, floats as float32, padded with 0 to the longest."""
        rows = self._row[numbers]
        batch = {
            name: self._padded(array, rows) if name in self._by_position else array[rows]
            for name, array in self._arrays.items()
        }
        return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in batch.items()}

    def _padded(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        starts, ends = self._starts[rows], self._ends[rows]
        result = np.zeros((len(rows), padded_length(ends - starts), *array.shape[1:]), array.dtype)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            result[number, : end - start] = array[start:end]
        return result


def activations(
    submodel: Pretrained, values: Sequence[Any], cache_dir: Path, name: str, *, quiet: bool = False
) -> Activations:
    """What leaves the trunk of a partly frozen encoder for each value, in inference mode (no dropout).

    Values are what `submodel.prepare` takes; `name` is shown with the progress and with the bytes. The result is kept
    below `cache_dir` under the hash of the trunk's fingerprint and of the values; files whose own hash is wrong are
    made anew. Raises DataError when there are no values, EngineError for activations beyond what float16 holds,
    MachineError when the folder cannot be written.
    """
    if submodel.modality == "text":
        values = check_texts(values)
    if not len(values):
        raise DataError("fine-tuning needs at least one text or image; received none.")
    folder = Path(cache_dir) / f"trunk-{values_hash(f'{VERSION}:{submodel.trunk_fingerprint()}', values)}"
    if not _whole(folder):
        with lock_making(folder):
            if not _whole(folder):  # another process may have made it while we waited
                with (
                    atomic_folder(folder) as aside,
                    progress(f"frozen part of {name}", len(values), "values", quiet=quiet) as bar,
                ):
                    _write(aside, submodel, values, reached(bar, len(values)))
    kept = Activations(folder)
    note(f"{name}: activations of {len(kept)} values take {kept.bytes / 1e6:.1f} MB in {folder}", quiet=quiet)
    return kept


def embed_activations(submodel: Pretrained, kept: Activations) -> np.ndarray:
    """The embeddings float32 `[N, D]` that the top, as training has left it, makes of kept activations."""
    infer, result = trace(submodel.top()), np.empty((len(kept), submodel.dimensions), np.float32)
    order = np.arange(len(kept)) if kept.lengths is None else np.argsort(kept.lengths, kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        result[rows] = infer(**kept.gather(rows)).numpy()
    return result


# ---- files ---------------------------------------------------------------------------------------------------


def _whole(folder: Path) -> bool:
    """Whether the folder holds what `_write` left there."""
    try:
        hashes = json.loads((folder / INDEX).read_text(encoding="utf-8"))["sha256"]
        return all(sha256_of(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, KeyError):
        return False


def _write(folder: Path, submodel: Pretrained, values: Sequence[Any], report: Progress) -> None:
    chosen, row = distinct(values)
    order = working_order(chosen)
    infer, outputs, lengths = trace(submodel.trunk()), submodel.trunk().output, []
    with contextlib.ExitStack() as opened:
        files = {name: _ArrayFile(opened.enter_context(open(folder / name, "wb"))) for name in outputs}
        for start in range(0, len(order), BATCH):
            features = submodel.trim(submodel.prepare(take(chosen, order[start : start + BATCH])))
            counted = submodel.lengths(features)
            for name, tensor in infer(**features).items():
                # NumPy has no bfloat16, in which a trunk of mixed precision may answer.
                cells = tf.cast(tensor, tf.float32) if tensor.dtype.is_floating else tensor
                files[name].append(cells.numpy(), counted if outputs[name].shape[1] is None else None)
            rows = len(order[start : start + BATCH])
            lengths.append(np.ones(rows, np.int64) if counted is None else counted)
            report(start + rows, len(order))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    save_arrays(folder / ROWS, {"row": place[row], "lengths": np.concatenate(lengths)})
    index = {
        "arrays": {name: file.facts for name, file in files.items()},
        "sha256": {name: sha256_of(folder / name) for name in [*files, ROWS]},
    }
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


class _ArrayFile:
    """An array that is written row by row as it is made; `facts` say how to read it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._cells = file, 0
        self.facts: dict[str, Any] = {}

    def append(self, rows: np.ndarray, lengths: np.ndarray | None) -> None:
        """Appends rows `[b, ...]`, or of rows `[b, L, ...]` the positions that `lengths` count."""
        cells = rows if lengths is None else rows[np.arange(rows.shape[1]) < lengths[:, None]]
        stored = np.ascontiguousarray(_as_float16(cells) if cells.dtype.kind == "f" else cells)
        self._file.write(stored.data)
        self._cells += len(stored)
        self.facts = {
            "dtype": stored.dtype.str,
            "shape": [self._cells, *stored.shape[1:]],
            "by_position": lengths is not None,
        }


def _as_float16(array: np.ndarray) -> np.ndarray:
    largest = float(np.max(np.abs(array), initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise EngineError(
            f"activations of the frozen blocks must stay below {np.finfo(np.float16).max:g} to be kept as float16; "
            f"received {largest:g}. Set fine_tune: all, which keeps none, or take other weights."
        )
    return array.astype(np.float16)
