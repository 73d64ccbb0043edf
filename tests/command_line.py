"""Calls the tools of `tools/` as a person does, in this process where that is enough: a helper of tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "cli")


@dataclass(frozen=True)
class Ended:
    """How a tool ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def run_tool(name: str, *arguments: object) -> Ended:
    """Runs `python tools/NAME.py ARGUMENTS` inside this process."""
    script = ROOT / "tools" / f"{name}.py"
    out, err = io.StringIO(), io.StringIO()
    argv, path = [str(script), *map(str, arguments)], [str(script.parent), *sys.path]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", path),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return Ended(end.code if isinstance(end.code, int) else 0, out.getvalue(), err.getvalue())
    raise AssertionError(f"{name} must end by sys.exit")


def start_tool(name: str, *arguments: object, prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """Starts a tool in a process of its own, in which Ctrl-C works even if it was switched off for us."""

    def in_child() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if prepare:
            prepare()

    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=in_child,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def refusal(ended: Ended, code: int) -> str:
    """The one sentence of an error, after checking that it is one: exit code, no traceback, nothing on stdout."""
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err and ended.out == ""
    assert len(errors) == 1 and ended.err.splitlines()[-1] == errors[0], ended.err
    sentence = errors[0].removeprefix("error: ")
    assert len(sentence) < 700 and re.search(r"[.?]$", sentence) and sentence.isprintable(), sentence
    return sentence


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for something that other processes do; fails when it has not come in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished_runs(root: Path) -> list[Path]:
    """The runs below a root that look whole, by any of the marks that one may look at."""
    states = {path.resolve().parent: json.loads(path.read_text(encoding="utf-8")) for path in root.glob("*/*/run.json")}
    whole = {run for run, state in states.items() if state["status"] == "finished"}
    return sorted(whole | {path.resolve().parent for path in root.glob("*/*/report.json")})
