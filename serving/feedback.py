"""What users did with what they were shown: a log that is only ever appended to, and that training reads.

One JSON object a line in `feedback-<day>-<writer>.jsonl`: `user_id`, `item_id`, `event`, `timestamp` (seconds since
1970), and `rating` where one was given. A file has one writer, so that worker processes never write into each other's
lines; a line that a crash cut short is the last of its file, and readers leave it out.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from serving.errors import InvalidRequest, LimitExceeded, NotWritable, ServingError
from serving.files import make_folder, sync_folder

Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]

MOST = 1000
"""Events of one call."""


class Event(BaseModel):
    """One thing that a user did."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_id: Id
    item_id: Id
    event: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")] = "taken"
    """What: a word in small letters, such as taken, rated, bought."""
    rating: float | None = Field(None, allow_inf_nan=False)
    timestamp: int | None = Field(None, ge=0, lt=2**40)
    """Seconds since 1970; without it the moment of arrival."""

    @field_validator("user_id", "item_id")
    @classmethod
    def _plain(cls, value: str) -> str:
        if any(ord(letter) < 32 for letter in value):
            raise ValueError("ids must have no control characters")
        return value


class FeedbackLog:
    """Writes events; safe to be called from several threads.

    Args:
        folder: made where it is not there.
        clock: seconds since 1970.
    """

    def __init__(self, folder: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = Path(folder)
        self._clock = clock
        self._writer = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._day = ""
        self._file: FileIO | None = None
        try:
            make_folder(self.folder)
        except OSError as error:
            raise ServingError(f"the feedback log needs a folder it can write; {error.strerror}.") from error

    def append(self, events: Sequence[Event]) -> int:
        """Writes all of them, and returns their number once they are on the disk.

        Raises LimitExceeded for more than MOST, NotWritable when the disk refuses.
        """
        if len(events) > MOST:
            raise LimitExceeded(f"a call may bring at most {MOST} events; received {len(events)}.")
        now = self._clock()
        lines = []
        for event in events:
            facts = event.model_dump(exclude_none=True)
            lines.append(json.dumps({**facts, "timestamp": facts.get("timestamp", int(now))}, ensure_ascii=True) + "\n")
        try:
            with self._lock:
                append_whole(self._today(now), "".join(lines).encode("ascii"))
        except OSError as error:
            raise NotWritable(
                f"the feedback was not kept: the disk answered '{error.strerror}'. Send it again."
            ) from error
        return len(events)

    def close(self) -> None:
        """Closes the file of the day."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._day, self._file = "", None

    def _today(self, now: float) -> FileIO:
        day = time.strftime("%Y%m%d", time.gmtime(now))
        if self._file is None or day != self._day:
            file = FileIO(self.folder / f"feedback-{day}-{self._writer}.jsonl", "ab")
            try:
                sync_folder(self.folder)
            except OSError:
                file.close()
                raise
            if self._file is not None:
                self._file.close()
            self._day, self._file = day, file
        return self._file


def append_whole(file: FileIO, content: bytes) -> None:
    """Appends all of it, on the disk when this returns, or nothing: who is told that it was not kept sends it again.
    Until then others may read what is taken back; where they must not, the caller locks the file.

    Raises OSError.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # what is said is why it was not kept
            file.truncate(end)
        raise


def parse_events(body: object) -> list[Event]:
    """The events of a request's body, `{"events": [...]}`. Raises InvalidRequest with the first fault."""
    if not isinstance(body, dict) or set(body) != {"events"} or not isinstance(body["events"], list):
        raise InvalidRequest('feedback must be {"events": [{"user_id": ..., "item_id": ...}, ...]}.')
    if len(body["events"]) > MOST:
        raise LimitExceeded(f"a call may bring at most {MOST} events; received {len(body['events'])}.")
    events = []
    for place, event in enumerate(body["events"]):
        try:
            events.append(Event.model_validate(event))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in ("events", place, *first["loc"]))
            raise InvalidRequest(f"{where}: {first['msg']}.") from error
    return events
