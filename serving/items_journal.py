"""The new items of a server's models as they were brought, and which items were withdrawn, in the order in which it
happened: a file that is only ever appended to, out of which each process, a restart and a new version make their rows.

One JSON object a line in `items.jsonl`: `model`, `item`, `action` where the item was not added, and the SHA-256 of all
this. All processes of a server write the one file, one at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from serving.errors import NotWritable, Overloaded, ServingError
from serving.feedback import append_whole
from serving.files import make_folder, sync_folder

logger = logging.getLogger(__name__)

FILE, LOCK = "items.jsonl", "items.lock"
ADD, WITHDRAW, RESTORE = "add", "withdraw", "restore"
ACTIONS = (ADD, WITHDRAW, RESTORE)
WAIT_S = 3.0
"""How long is waited for a lock that somebody else has, who may hang; the caller wants an answer."""
_POLL_S = 0.02
_BLOCK = 2**16


class Entry(NamedTuple):
    """What was done to one item of one model.

    Attributes:
        item: as it was brought; its `item_id` alone where it was withdrawn or restored.
        action: one of ACTIONS.
        end: the byte behind its line.
    """

    model: str
    item: dict[str, Any]
    action: str
    end: int


class ItemsJournal:
    """The journal in a folder, which is made where it is not there. Raises ServingError when it cannot be."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = folder / FILE, folder / LOCK
        try:
            make_folder(folder)
            self._lock.touch()
        except OSError as error:
            raise ServingError(f"the journal of new items needs a folder it can write; {_reason(error)}.") from error

    @property
    def size(self) -> int:
        """Its bytes, those that are just being appended among them; 0 before the first item. Raises ServingError when
        the disk refuses."""
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise _unreadable(error) from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else appends while this lasts; waits for who does. Raises NotWritable when the disk refuses, and
        Overloaded when others take longer than WAIT_S."""
        with contextlib.ExitStack() as open_file:
            try:
                held = open_file.enter_context(self._lock.open("a"))
                _acquire(held, fcntl.LOCK_EX)
            except OSError as error:
                raise NotWritable(
                    f"nothing was changed: the journal of new items cannot be locked, the disk answered "
                    f"'{_reason(error)}'."
                ) from error
            yield

    def append(self, model: str, items: Sequence[Mapping[str, Any]], action: str = ADD) -> None:
        """Writes what is done to items; it is on the disk when this returns. Called within `alone`.

        Raises NotWritable when the disk refuses, Overloaded when it is being read for longer than WAIT_S.
        """
        lines = []
        for item in items:
            entry = {"model": model, "item": dict(item), **({} if action == ADD else {"action": action})}
            lines.append(_text({**entry, "sha256": _digest(entry)}) + "\n")
        try:
            with FileIO(self._file, "ab+") as file:
                _acquire(file, fcntl.LOCK_EX)  # or somebody would read what is taken back
                size = file.seek(0, os.SEEK_END)
                if not size:
                    sync_folder(self._file.parent)
                # What a crash cut short becomes a line of its own, which readers leave out.
                torn = size > 0 and _last_byte(file) != b"\n"
                append_whole(file, ("\n" * torn + "".join(lines)).encode("ascii"))
        except OSError as error:
            raise NotWritable(f"nothing was kept: the disk answered '{_reason(error)}'. Try it again.") from error

    def end(self) -> int:
        """The byte behind its last whole line, 0 before the first; up to there nothing is ever taken back. A line
        without its end is left for later; the log says so.

        Raises ServingError when the disk refuses, Overloaded when an append takes longer than WAIT_S.
        """
        try:
            with self._file.open("rb") as file:
                _acquire(file, fcntl.LOCK_SH)
                size = file.seek(0, os.SEEK_END)
                end = _behind_last_line(file, size)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise _unreadable(error) from error
        if end < size:
            logger.warning("the last line of the journal of new items is cut off; it is left out for now")
        return end

    def read(self, start: int = 0, end: int | None = None) -> Iterator[Entry]:
        """The entries from a byte on, up to one that `end` gave, or gives now. Never more than one line is in memory:
        with their pictures all of them are large.

        A line that is damaged is left out; the log says so. Raises as `end` does.
        """
        end = self.end() if end is None else end
        if start >= end:
            return
        try:
            with self._file.open("rb") as file:
                file.seek(start)
                while line := file.readline(end - start):
                    entry = _entry(line, start + len(line))
                    if entry is None:
                        logger.error("a line of the journal of new items is damaged, at byte %d; it is left out", start)
                    else:
                        yield entry
                    start += len(line)
        except OSError as error:
            raise _unreadable(error) from error


def _acquire(file: IO[Any], how: int) -> None:
    """Locks an open file until it is closed, or the process has died. Raises OSError, and Overloaded after WAIT_S."""
    limit = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= limit:
                raise Overloaded(
                    f"the journal of new items has been busy for {WAIT_S:g} s, so nothing was changed; try it again.",
                    retry_after=1.0,
                ) from error
        time.sleep(_POLL_S)


def _behind_last_line(file: IO[bytes], size: int) -> int:
    """The byte behind the last line feed of a file, 0 where there is none."""
    while size:
        start = max(0, size - _BLOCK)
        file.seek(start)
        if found := file.read(size - start).rfind(b"\n") + 1:
            return start + found
        size = start
    return 0


def _reason(error: OSError) -> str:
    """In words, without the path."""
    return error.strerror or type(error).__name__


def _unreadable(error: OSError) -> ServingError:
    return ServingError(f"the journal of new items cannot be read; the disk answered '{_reason(error)}'.")


def _last_byte(file: FileIO) -> bytes:
    file.seek(-1, 2)
    return file.read(1)


def _entry(line: bytes, end: int) -> Entry | None:
    """The entry of a line, None where it is not what was written."""
    try:
        found = json.loads(line)
        digest, action = found.pop("sha256"), found.get("action", ADD)
        whole = digest == _digest(found) and action in ACTIONS
        return Entry(found["model"], found["item"], action, end) if whole else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(entry).encode("ascii")).hexdigest()
