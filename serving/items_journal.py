"""The new items of a server's models as they were brought, in the order in which they came: a file that is only ever
appended to, out of which each process, a restart and a new version make their rows.

One JSON object a line in `items.jsonl`: `model`, `item`, and the SHA-256 of both. All processes of a server write the
one file, one at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from serving.errors import NotWritable, ServingError
from serving.feedback import append_whole

logger = logging.getLogger(__name__)

FILE, LOCK = "items.jsonl", "items.lock"


class Entry(NamedTuple):
    """One item of one model, as it was brought."""

    model: str
    item: dict[str, Any]


class ItemsJournal:
    """The journal in a folder, which is made where it is not there. Raises ServingError when it cannot be."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = folder / FILE, folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
        except OSError as error:
            raise ServingError(f"the journal of new items needs a folder it can write; {error.strerror}.") from error

    @property
    def size(self) -> int:
        """Its bytes; 0 before the first item."""
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else appends while this lasts; waits for who does."""
        with self._lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # until it is closed, or the process has died
            yield

    def append(self, model: str, items: Sequence[Mapping[str, Any]]) -> None:
        """Writes items; they are on the disk when this returns. Called within `alone`.

        Raises NotWritable when the disk refuses.
        """
        lines = []
        for item in items:
            entry = {"model": model, "item": dict(item)}
            lines.append(_text({**entry, "sha256": _digest(entry)}) + "\n")
        try:
            with FileIO(self._file, "ab+") as file:
                # What a crash cut short becomes a line of its own, which readers leave out.
                torn = file.tell() and _last_byte(file) != b"\n"
                append_whole(file, ("\n" * torn + "".join(lines)).encode("ascii"))
        except OSError as error:
            raise NotWritable(
                f"the items were not kept: the disk answered '{error.strerror}'. Add them again."
            ) from error

    def read(self, start: int = 0) -> tuple[list[Entry], int]:
        """The entries of the whole lines from a byte on, and the byte behind them.

        A line without its end is left for later. One that is damaged is left out; the log says so. Raises OSError.
        """
        entries: list[Entry] = []
        if not self.size:
            return entries, 0
        with self._file.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    logger.warning("the last line of the journal of new items is cut off; it is left out for now")
                    break
                entry = _entry(line)
                if entry is None:
                    logger.error("a line of the journal of new items is damaged, at byte %d; it is left out", start)
                else:
                    entries.append(entry)
                start += len(line)
        return entries, start


def _last_byte(file: FileIO) -> bytes:
    file.seek(-1, 2)
    return file.read(1)


def _entry(line: bytes) -> Entry | None:
    """The entry of a line, None where it is not what was written."""
    try:
        found = json.loads(line)
        digest = found.pop("sha256")
        return Entry(found["model"], found["item"]) if digest == _digest(found) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(entry).encode("ascii")).hexdigest()
