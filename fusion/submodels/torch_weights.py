"""Reads the tensors of a legacy PyTorch file (the format before 1.6) without PyTorch and without running its code.

Such a file is a row of pickles followed by raw storages. The unpickler here knows how to rebuild tensors and
nothing else: any other global in the file is refused, so that reading it cannot call anything. Format:
`torch/serialization.py`, `_legacy_save`.
"""

from __future__ import annotations

import collections
import math
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusion.errors import EngineError, GateError
from fusion.submodels.wheels import check_sha256

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
MAX_FILE_BYTES = 512 * 2**20
MAX_TENSORS = 20_000

DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
}


def read_tensors(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """The tensors of a state dict saved by `torch.save` before PyTorch 1.6, by name, in the dtype of the file.

    `sha256` (hex) is that of the one file meant; it is checked before anything is parsed. Raises GateError when
    it differs, when the file is too large, is damaged, or asks for anything but tensors.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise _refused(path, f"at most {MAX_FILE_BYTES} bytes", f"{size} bytes")
    check_sha256(path, sha256)
    try:
        with path.open("rb") as file:
            return _read(file, path, size)
    except EngineError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception at all
        raise _refused(path, "a legacy PyTorch state dict", f"{type(error).__name__}: {error}") from error


def _refused(path: Path, must: str, received: str) -> GateError:
    return GateError(f"{path} must hold {must}; received {received}. Nothing of it was used: get the file again.")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    elements: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it, before its storage is read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, strings and containers only: every global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise GateError(
            f"a file of weights must hold tensors only; received one that asks for {module}.{name}. "
            "It may be an attack, and nothing of it was run: get the file from its publisher."
        )


class _TensorUnpickler(_PlainUnpickler):
    """Adds what describes tensors: their rebuild function, ordered dicts and storage types by name."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, elements = pid[:5]
        if kind != "storage":
            raise pickle.UnpicklingError(f"persistent id of kind {kind!r}")
        storage = _Storage(str(key), DTYPES[storage_type], int(elements))
        return self.storages.setdefault(storage.key, storage)


def _read(file: BinaryIO, path: Path, size: int) -> dict[str, np.ndarray]:
    header = [_PlainUnpickler(file).load() for _ in range(2)]
    if header != [MAGIC_NUMBER, PROTOCOL_VERSION]:
        raise _refused(path, "the header of a legacy PyTorch file", repr(header)[:80])
    _PlainUnpickler(file).load()  # sizes of C types on the machine that wrote it; the dtypes above are fixed
    unpickler = _TensorUnpickler(file)
    state = unpickler.load()
    if not isinstance(state, dict) or not all(isinstance(tensor, _Tensor) for tensor in state.values()):
        raise _refused(path, "a dict of tensors", type(state).__name__)
    if len(state) > MAX_TENSORS:
        raise _refused(path, f"at most {MAX_TENSORS} tensors", str(len(state)))
    keys = _PlainUnpickler(file).load()
    data = {key: _read_storage(file, unpickler.storages[key], size) for key in keys}
    return {str(name): _view(tensor, data[tensor.storage.key]) for name, tensor in state.items()}


def _read_storage(file: BinaryIO, storage: _Storage, file_size: int) -> np.ndarray:
    (elements,) = struct.unpack("<q", file.read(8))
    if elements != storage.elements or not 0 <= elements * storage.dtype.itemsize <= file_size - file.tell():
        raise ValueError(f"storage {storage.key} of {elements} elements does not fit the file")
    return np.frombuffer(file.read(elements * storage.dtype.itemsize), storage.dtype)


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """The tensor as a copy; its strides (in elements) may permute axes but must stay inside the storage."""
    if len(tensor.strides) != len(tensor.shape) or min((tensor.offset, *tensor.shape, *tensor.strides)) < 0:
        raise ValueError(f"a tensor of shape {tensor.shape} has strides {tensor.strides}, offset {tensor.offset}")
    if math.prod(tensor.shape) > len(storage):
        raise ValueError(f"a tensor of shape {tensor.shape} is larger than its storage of {len(storage)}")
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in tensor.shape and last >= len(storage):
        raise ValueError(f"a tensor of shape {tensor.shape} ends outside its storage of {len(storage)}")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides).copy()
