"""Progress goes to stderr, in a form that suits a terminal, a log or silence."""

from __future__ import annotations

import io
import sys
import time

import pytest

from fusion.progress import note, progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_few_short_lines_and_stdout_none(capsys: pytest.CaptureFixture[str]) -> None:
    """F8: progress with speed, metrics and ETA, and no spam in CI logs."""
    with progress("train text", total=400, every=0.05) as bar:
        for _ in range(400):
            bar.advance(1, loss=0.5)
            time.sleep(0.0005)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert 2 <= len(lines) <= 12
    assert all("ETA" in line and "steps/s" in line and len(line) < 110 for line in lines[:-1])
    assert lines[-1].startswith("train text: done: 400/400 steps")
    assert lines[-1].endswith("loss 0.5")


def test_earlier_work_does_not_count_towards_the_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 11.0])
    monkeypatch.setattr("fusion.progress.time.monotonic", lambda: next(clock))
    with progress("train", total=1000, done=900, every=5) as bar:
        bar.advance(50)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "train: 950/1000 steps, 5 steps/s, ETA 0:00:10"


def test_an_error_is_not_reported_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress("train", total=10) as bar:
        bar.advance(3)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("train: stopped at 3/10 steps")


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", total=1, quiet=True, every=0) as bar:
        bar.advance(1, loss=1.0)
    note("a note", quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_nested_bars_and_no_color_is_honoured(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar within a bar's work is a row of the same display, because rich allows one at a time."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    with progress("folds", total=2, unit="folds") as outer:
        for fold in range(2):
            with progress(f"fold {fold}", total=5) as inner:
                inner.advance(5, loss=0.25)
                note(f"half way [{fold}]")
            outer.advance(1)
    shown = terminal.getvalue()
    assert all(text in shown for text in ("folds", "fold 1", "loss 0.25", "half way [1]", "2/2"))
    assert ("\x1b[38;5" in shown or "\x1b[3" in shown) is not no_color
