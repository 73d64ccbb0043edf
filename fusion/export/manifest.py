"""The manifest of an artifact: what is in the folder, with the size and SHA-256 of every file.

Verification comes before anything in the folder is parsed. It guards against damage, mix-ups and smuggled files,
not against somebody who rewrites files and manifest together. Imports neither TensorFlow nor anything of ours but
the errors, so that servers can use it alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fusion.errors import EngineError, GateError, MachineError

__all__ = [
    "FILE_NAME",
    "SCHEMA_VERSION",
    "EngineError",
    "FileEntry",
    "GateError",
    "MachineError",
    "Manifest",
    "Signature",
    "TensorSpec",
    "publish",
    "verify_manifest",
    "write_manifest",
]

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 4 * 2**20
"""Larger manifests are refused unread; one with 10,000 files and 100 signatures has about 1.5 MB."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CHUNK = 2**20


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a signature: TensorFlow's name of the dtype, and the shape with None for any."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """A callable of the artifact: its named inputs and outputs."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it comes from.

    Attributes:
        kind: `recommender` or `classifier`.
        members: names of the ensemble's submodels, in the order of the axis S.
        signatures: by name.
        config_hash, data_hash, split_hash: SHA-256 (hex) of what it was made from.
        rows_seen: in words, which rows it was fitted on, for instance `train` or `all`.
        metrics: figures of the report that belong to it.
        libraries: versions of the libraries that made it.
        limits: numbers that a server has to know, for instance `k_max`, and `spare_items`, how many new items the
            signature `add_items` takes.
        items: what the tables of items hold: `attributes`, by column of `items.parquet` `text`, or `list` of texts; and
            `vectors`, with `file`, `dtype`, `shape`, `made_of`, and `projections`, a file, where new items get vectors.
            Empty for other kinds.
        tflite: signatures by name of each `.tflite` file.
        compression: the recipe that made the `.tflite` files smaller: `recipe`, `settings`, `figures` and `cost` as it
            was judged, `left_alone` by member, `agreement` with the SavedModel; empty where they are in float32.
        profiles: other ways to ask than `recommend`, by name; of `fast` the `signature`, `member` (whose contributions
            it returns), `recipe`, and `figures` and `differences` on test.
        files: by relative path with `/`; filled in by `write_manifest`, never contains the manifest itself.
    """

    kind: str
    members: tuple[str, ...] = ()
    signatures: Mapping[str, Signature] = field(default_factory=dict)
    config_hash: str = ""
    data_hash: str = ""
    split_hash: str = ""
    rows_seen: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, Any] = field(default_factory=dict)
    tflite: Mapping[str, Mapping[str, Signature]] = field(default_factory=dict)
    compression: Mapping[str, Any] = field(default_factory=dict)
    profiles: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def write_manifest(folder: str | Path, content: Manifest) -> Manifest:
    """Hashes every file below `folder`, writes `manifest.json` as the last file, and returns what it says.

    Raises GateError when the folder holds something that verification would refuse (links, devices), and
    MachineError when the file cannot be written.
    """
    folder = Path(folder).absolute()
    files = {}
    for path in _files_below(folder):
        with _open_regular(folder, path) as (descriptor, size):
            files[path] = FileEntry(size, _digest(descriptor))
    manifest = replace(content, files=dict(sorted(files.items())), schema_version=SCHEMA_VERSION)
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True, allow_nan=False)
    if len(text.encode()) > MAX_MANIFEST_BYTES:
        raise GateError(f"a manifest must have at most {MAX_MANIFEST_BYTES} bytes; that of {folder} would be larger.")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.manifest")
    with _machine(folder):
        try:
            partial.write_text(text, encoding="utf-8")
            _sync(partial)
            os.replace(partial, folder / FILE_NAME)
        finally:
            partial.unlink(missing_ok=True)
        _sync(folder)
    return manifest


def verify_manifest(folder: str | Path) -> Manifest:
    """Checks that the folder holds exactly the files of its manifest, byte for byte, and returns the manifest.

    Raises GateError for: no manifest, one over the size limit, one that is not valid; paths that are absolute
    or leave the folder; links and special files; missing, unknown, resized and changed files.
    """
    folder = Path(folder)
    manifest = _parse(_read_limited(folder), folder)
    for path in manifest.files:
        _check_path(path, folder)
    present = set(_files_below(folder))
    missing, unknown = sorted(set(manifest.files) - present), sorted(present - set(manifest.files))
    if missing:
        raise _refusal(folder, f"every file that its manifest lists must be there; '{missing[0]}' is missing")
    if unknown:
        raise _refusal(folder, f"every file must be listed in its manifest; '{unknown[0]}' is not")
    for path, entry in manifest.files.items():
        with _open_regular(folder, path) as (descriptor, size):
            if size != entry.size:
                raise _refusal(folder, f"'{path}' must have {entry.size} bytes as its manifest says; it has {size}")
            if _digest(descriptor) != entry.sha256:
                raise _refusal(folder, f"'{path}' must have the SHA-256 of its manifest; its bytes were changed")
    return manifest


def publish(source: str | Path, target_root: str | Path, name: str) -> Path:
    """Copies a verified artifact to `target_root/name/<next version>` and returns that folder.

    The copy is made in a hidden sibling folder, made durable, verified, and then renamed, so a server never sees a
    part of it. Several publishers may run at once: a rename onto a version that is not empty is refused by the
    system, and the loser takes the next number.

    Raises GateError when the source or the copy does not match its manifest, MachineError when the disk refuses.
    """
    if not _NAME.fullmatch(name):
        raise GateError(f"a model's name must be letters, digits, '.', '_' and '-'; received '{name[:80]}'.")
    source, shelf = Path(source), Path(target_root) / name
    manifest = verify_manifest(source)
    partial = shelf / f".publishing-{secrets.token_hex(6)}"
    with _machine(shelf):
        try:
            partial.mkdir(parents=True)
            for path in (*manifest.files, FILE_NAME):
                _copy(source / path, partial / path)
            for root, _, _ in os.walk(partial, topdown=False):
                _sync(Path(root))
            verify_manifest(partial)
            return _rename_to_next_version(partial, shelf)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _rename_to_next_version(partial: Path, shelf: Path) -> Path:
    version = 1 + max((int(entry.name) for entry in shelf.iterdir() if entry.name.isdecimal()), default=0)
    while True:
        target = shelf / str(version)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.exists():
                raise
            version += 1  # another publisher was faster
        else:
            _sync(shelf)
            return target


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reader, open(target, "xb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK)
        writer.flush()
        os.fsync(writer.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _machine(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MachineError(
            f"{path} must be writable; the system answered '{reason}'. Free space or change its permissions."
        ) from error


def _refusal(folder: Path, sentence: str) -> GateError:
    return GateError(f"the artifact {folder} is refused: {sentence}. Export or publish it again.")


def _files_below(folder: Path) -> Iterator[str]:
    """Relative paths of all files but the manifest; anything that is neither file nor folder is refused."""
    pending = [folder]
    while pending:
        try:
            entries = sorted(os.scandir(pending.pop()), key=lambda entry: entry.name)
        except OSError as error:
            raise _refusal(folder, f"it must be a readable folder ({error.strerror})") from error
        for entry in entries:
            path = Path(entry.path).relative_to(folder).as_posix()
            if entry.is_symlink():
                raise _refusal(folder, f"it must not hold links; '{path}' is one")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                raise _refusal(folder, f"it must hold plain files only; '{path}' is a pipe, socket or device")
            elif path != FILE_NAME:
                yield path


@contextlib.contextmanager
def _open_regular(folder: Path, path: str) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a plain file. Never follows a link in the last place nor waits for a pipe."""
    try:
        descriptor = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _refusal(folder, f"'{path}' must be a readable file ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(folder, f"'{path}' must be a plain file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    while chunk := os.read(descriptor, _CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _read_limited(folder: Path) -> bytes:
    with _open_regular(folder, FILE_NAME) as (descriptor, size):
        if size > MAX_MANIFEST_BYTES:
            raise _refusal(folder, f"its manifest must have at most {MAX_MANIFEST_BYTES} bytes; it has {size}")
        content = b""
        while len(content) <= size and (chunk := os.read(descriptor, size + 1 - len(content))):
            content += chunk
        return content


def _check_path(path: str, folder: Path) -> None:
    parts = PurePosixPath(path).parts
    plain = path == "/".join(parts) and not path.startswith("/")
    if not path or not plain or ".." in parts or "\\" in path or "\0" in path or path == FILE_NAME:
        raise _refusal(folder, f"paths of its manifest must stay inside the folder; received '{path[:200]!s}'")


def _parse(content: bytes, folder: Path) -> Manifest:
    try:
        data = json.loads(content, object_pairs_hook=_without_repeats)
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}, received {data['schema_version']!r:.40}")
        return Manifest(
            kind=_typed(data["kind"], str),
            members=tuple(_typed(name, str) for name in _typed(data["members"], list)),
            signatures=_signatures(data["signatures"]),
            config_hash=_typed(data["config_hash"], str),
            data_hash=_typed(data["data_hash"], str),
            split_hash=_typed(data["split_hash"], str),
            rows_seen=_typed(data["rows_seen"], str),
            metrics=_typed(data["metrics"], dict),
            libraries={name: _typed(value, str) for name, value in _typed(data["libraries"], dict).items()},
            limits={name: _size(value) for name, value in _typed(data["limits"], dict).items()},
            # Older artifacts do not tell these.
            items=_typed(data.get("items", {}), dict),
            tflite={path: _signatures(found) for path, found in _typed(data.get("tflite", {}), dict).items()},
            compression=_typed(data.get("compression", {}), dict),
            profiles=_typed(data.get("profiles", {}), dict),
            files={path: _entry(value) for path, value in _typed(data["files"], dict).items()},
        )
    except KeyError as error:
        raise _refusal(folder, f"its manifest must have the key {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise _refusal(folder, f"its manifest must be valid ({str(error)[:200]})") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, received {value!r:.60}")
    return value


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a number >= 0, received {value!r:.60}")
    return value


def _entry(value: Any) -> FileEntry:
    digest = _typed(_typed(value, dict)["sha256"], str)
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"expected 64 hexadecimal digits, received '{digest:.80}'")
    return FileEntry(_size(value["size"]), digest)


def _signatures(value: Any) -> dict[str, Signature]:
    return {name: _signature(found) for name, found in _typed(value, dict).items()}


def _signature(value: Any) -> Signature:
    inputs, outputs = (
        {name: _tensor(spec) for name, spec in _typed(_typed(value, dict)[side], dict).items()}
        for side in ("inputs", "outputs")
    )
    return Signature(inputs, outputs)


def _tensor(value: Any) -> TensorSpec:
    shape = _typed(_typed(value, dict)["shape"], list)
    return TensorSpec(
        dtype=_typed(value["dtype"], str), shape=tuple(None if size is None else _size(size) for size in shape)
    )
