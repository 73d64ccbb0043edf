"""Progress with an estimate of the time left, on stderr only: stdout belongs to results.

On a terminal it is a live bar (rich, which honours NO_COLOR); elsewhere, as in a CI log, it is one plain line
every `every` seconds and one at the end; when quiet it is nothing.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Seconds between two lines of a log that is not a terminal."""


class Bar(Protocol):
    """What `progress` hands out."""

    def advance(self, n: float = 1, **metrics: float) -> None:
        """Counts `n` more units as done and shows the metrics beside them."""


@contextmanager
def progress(
    description: str,
    total: float | None = None,
    unit: str = "steps",
    *,
    quiet: bool = False,
    done: float = 0,
    every: float = LINE_SECONDS,
) -> Iterator[Bar]:
    """Shows how far a piece of work is.

    Args:
        description: what is being done, in a few words.
        total: units in all; None when it is not known, and then there is no estimate.
        unit: what is counted, in the plural.
        quiet: show nothing.
        done: units that an earlier run did already; they do not count towards the speed.
        every: seconds between two lines when stderr is not a terminal.

    >>> with progress("train text", total=3, quiet=True) as bar:
    ...     for _ in range(3):
    ...         bar.advance(loss=0.5)
    """
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with _live_display() as display:
            yield from _live_bar(display, description, total, unit, done)
    else:
        lines = _Lines(description, total, unit, done, every)
        try:
            yield lines
        except BaseException:
            lines.close("stopped at")
            raise
        lines.close("done:")


def reached(bar: Bar, size: float) -> Callable[[float, float], None]:
    """A callback `(done, total)` for code that counts by itself, perhaps in other units: moves a bar of `size`."""
    before = 0.0

    def report(done: float, total: float) -> None:
        nonlocal before
        now = size * done / max(total, 1.0)
        bar.advance(now - before)
        before = now

    return report


def note(text: str, *, quiet: bool = False) -> None:
    """One line on stderr, above a live bar when there is one."""
    if quiet:
        return
    if _displays:
        _displays[-1].console.print(text, markup=False, highlight=False)
    else:
        print(text, file=sys.stderr, flush=True)


class _Silent:
    def advance(self, n: float = 1, **metrics: float) -> None:
        """Shows nothing."""


class _Lines:
    """Plain lines, at most one every so many seconds."""

    def __init__(self, description: str, total: float | None, unit: str, done: float, every: float) -> None:
        self._description, self._total, self._unit, self._every = description, total, unit, every
        self._earlier, self._done = done, done
        self._metrics: Mapping[str, float] = {}
        self._started = self._printed = time.monotonic()

    def advance(self, n: float = 1, **metrics: float) -> None:
        self._done += n
        self._metrics = metrics or self._metrics
        now = time.monotonic()
        if now - self._printed >= self._every:
            self._printed = now
            self._print("", now)

    def close(self, word: str) -> None:
        self._print(f"{word} ", time.monotonic())

    def _print(self, word: str, now: float) -> None:
        seconds = now - self._started
        speed = (self._done - self._earlier) / max(seconds, 1e-9)
        count = f"{self._done:g}" if self._total is None else f"{self._done:g}/{self._total:g}"
        parts = [f"{word}{count} {self._unit}", f"{speed:.3g} {self._unit}/s"]
        if word:
            parts.append(f"in {_clock(seconds)}")
        elif self._total is not None and speed > 0:
            parts.append(f"ETA {_clock((self._total - self._done) / speed)}")
        parts += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        note(f"{self._description}: {', '.join(parts)}")


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


_displays: list[Progress] = []


@contextmanager
def _live_display() -> Iterator[Progress]:
    """The one live display of the process: a bar inside another bar's work is a second row of it."""
    if _displays:
        yield _displays[-1]
        return
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        console=Console(stderr=True),
        redirect_stdout=False,  # results printed meanwhile stay on stdout
    )
    with display:
        _displays.append(display)
        try:
            yield display
        finally:
            _displays.pop()


class _Live:
    def __init__(self, display: Progress, task: TaskID, unit: str) -> None:
        self._display, self._task, self._unit = display, task, unit
        self._done, self._started = 0.0, time.monotonic()

    def advance(self, n: float = 1, **metrics: float) -> None:
        self._done += n
        speed = self._done / max(time.monotonic() - self._started, 1e-9)
        fields: dict[str, Any] = {"speed": f"{speed:.3g} {self._unit}/s"}
        if metrics:
            fields["metrics"] = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._display.update(self._task, advance=n, **fields)


def _live_bar(display: Progress, description: str, total: float | None, unit: str, done: float) -> Iterator[_Live]:
    task = display.add_task(description, total=total, completed=int(done), unit=unit, speed="", metrics="")
    try:
        yield _Live(display, task, unit)
    finally:
        display.stop_task(task)
