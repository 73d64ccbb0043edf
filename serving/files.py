"""Small files through which processes, or an operator, tell a server something while it runs, and folders of files that
outlive it."""

from __future__ import annotations

import os
from pathlib import Path


def stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file does; renaming another file onto it changes its inode. Empty where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def make_folder(folder: Path) -> None:
    """Makes a folder, with those above it, that a loss of power does not take away again. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder: what a file holds does not outlive the machine without its name.
    Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it finds the old text or the new one, whole. Raises OSError.

    Not for what must outlive the machine: nothing waits for the disk.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
