"""Writing files so that a reader sees the old content or the new, never half of it; and the lock of a run's folder.

Nothing here knows what the bytes mean. Faults of the machine (disk full, folder not writable, lock held)
become a MachineError with one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import filelock
import numpy as np

from fusion.errors import GateError, MachineError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file is larger than this file system or process may write; raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "the folder is not writable for this user; change its permissions or choose another folder",
    errno.EPERM: "the folder is not writable for this user; change its permissions or choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
}


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns the OSErrors with which a machine refuses a write into a MachineError that names `path`.

    Other errors pass unchanged, so the body may read files and fail for reasons of its own.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise MachineError(f"{path} must be writable, but {_REASONS[error.errno]}, then run again.") from error


def _sibling(path: Path) -> Path:
    """A hidden name in the same folder, hence on the same file system, where a rename is atomic."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.partial")


def sync_folder(path: Path) -> None:
    """Makes the entries of a folder durable: without it a rename may be lost by a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Gives a binary handle on a sibling file, which takes the name `path` when the body ends without an error.

    Folders above `path` are made when missing. Raises MachineError when the machine refuses.
    """
    path = Path(path)
    partial = _sibling(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, path)
        except BaseException:  # also Ctrl-C: nothing half-written may stay
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes `content` (text as UTF-8) under `path`, whole or not at all; see `atomic_file`."""
    with atomic_file(path) as handle:
        handle.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty sibling folder, which takes the name `path` when the body ends without an error.

    Every file is fsynced before the rename. A folder that stands at `path` already is moved aside and removed
    only after the new one is in place. If the body fails, the temporary folder is removed and `path` is as before.
    """
    path = Path(path)
    partial = _sibling(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            _replace_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Makes every file and folder below `folder`, and `folder` itself, durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(Path(root))


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    # A rename onto a non-empty folder is refused by the system, so the old one steps aside first.
    aside = _sibling(path)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside)


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as an uncompressed `.npz`, atomically; equal arrays give equal bytes.

    Raises ValueError for arrays of Python objects, which only a pickle could hold. (`numpy.savez` is not
    used because it refuses an array that is called `file` and pickles objects unless told otherwise.)
    """
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise ValueError(
                f"saved arrays must hold numbers or fixed-width text; '{name}' holds Python objects. "
                "Convert it first, as in array.astype(str)."
            )
    with atomic_file(path) as handle, zipfile.ZipFile(handle, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote. Raises GateError when the file is missing, damaged or holds objects."""
    try:
        # An open file, because np.load would leave the one it opens to the garbage collector when it fails.
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise GateError(
            f"{path} must be an .npz of plain arrays, but it cannot be read: {error}. Make it again with the "
            "stage that wrote it."
        ) from error


def sha256_of(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def lock_folder(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the folder's lock, so that one process at a time writes into it; the system frees it if we die.

    With `wait` it waits for another process that holds it. Otherwise it raises MachineError at once, naming that
    process.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", thread_local=False)
        owner = folder / ".lock-owner"  # apart: acquiring truncates the lock's own file
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            raise MachineError(
                f"one process at a time may write into {folder}; process {_owner_of(owner)} holds its lock. "
                "Wait until it ends, or choose another run folder."
            ) from None
    try:
        write_atomically(owner, str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def lock_making(path: str | Path) -> Iterator[None]:
    """Held while `path`, which other processes may want too, is made: they wait, and should then look whether it is
    there. The lock is a file beside it, freed by the system if we die. Raises MachineError when the machine refuses.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.lock")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(beside, thread_local=False)
        lock.acquire()
    try:
        yield
    finally:
        # Who waits for this file and who comes for a new one may then go on at once: both find what has been made.
        beside.unlink(missing_ok=True)
        lock.release()


def _owner_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # it took the lock a moment ago, or is about to let go
        return "unknown"
