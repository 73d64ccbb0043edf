"""From alarms to what is done about them: rules in a YAML file, each an alarm it waits for and actions.

```yaml
rules:
  - {when: drift, do: [log, {webhook: "http://127.0.0.1:9000/alarms"}]}
  - {when: errors, do: [rollback], cool_down_s: 600}
  - {when: rate, series: silent_text, do: [{drop_member: text}], dry_run: true}
  - {when: drift, series: history_length, do: [{command: [python, tools/train.py, configs/quickstart.yaml]}]}
```

Actions run one after the other in a thread of their own: no request waits for them, and no webhook that hangs delays a
rollback by more than its time limit. What fails is logged and the next one is done all the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, StringConstraints, ValidationError

from serving.errors import InvalidRequest
from serving.monitoring import Alarm, Kind, MonitorSettings

logger = logging.getLogger("fusion.serving.alarms")

WEBHOOK_SECONDS = 5.0
"""The longest that a webhook is waited for."""
COMMAND_SECONDS = 24 * 3600.0
"""The longest that a command may run before it is ended."""
PENDING = 100
"""Alarms that wait for their actions; more than these are logged alone."""
CLOSE_S = 10.0
"""The longest that the end waits for actions: one that hangs must not keep a server from stopping."""

Name = Annotated[str, StringConstraints(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Webhook(_Strict):
    """Posts the alarm as JSON."""

    webhook: HttpUrl


class DropMember(_Strict):
    """Leaves a member out of the answers until the server is told otherwise."""

    drop_member: Name


class Command(_Strict):
    """Starts a program, without a shell; the alarm is JSON on its standard input. One run of a command at a time."""

    command: tuple[Name, ...] = Field(min_length=1)


Action = Literal["log", "rollback"] | Webhook | DropMember | Command


class Rule(_Strict):
    """Which alarms, and what is done about them."""

    when: Kind
    """The kind of alarm."""
    series: str = ""
    """The series that it must be of; empty for every one."""
    do: tuple[Action, ...] = Field(min_length=1)
    """`log`, `rollback` (from the version that the alarm is about to the one before), {webhook: URL},
    {drop_member: NAME}, {command: [..]}."""
    cool_down_s: float = Field(300.0, ge=0)
    """Seconds in which the rule does nothing again about the same series of the same version (with `rollback`, of the
    same model). What is still wrong then is acted upon again, as soon as the monitor raises it again
    (`MonitorSettings.again_s`)."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""

    def fits(self, alarm: Alarm) -> bool:
        """Whether the rule is about this alarm."""
        return alarm.kind == self.when and self.series in ("", alarm.series)


class Watch(_Strict):
    """The file of `tools/serve.py --monitor`."""

    monitor: MonitorSettings = MonitorSettings()
    rules: tuple[Rule, ...] = (
        Rule(when="drift", do=("log",)),
        Rule(when="rate", do=("log",)),
        Rule(when="errors", do=("log",)),
        Rule(when="latency", do=("log",)),
        Rule(when="spike", do=("log",)),
    )

    @classmethod
    def read(cls, path: Path) -> Watch:
        """Raises InvalidRequest with the first thing that is wrong with the file."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{path} must be a readable YAML file; the system answered: {error}.") from error
        except yaml.YAMLError as error:
            raise InvalidRequest(f"{path} must be YAML; the parser answered: {error}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(f"{path} must hold rules of monitoring; {where}: {first['msg']}.") from error


class Handler:
    """Does what the rules say about alarms.

    Args:
        rules: in order; every one that fits is followed.
        do: what the server can do, by the name of the action: `rollback` takes the version to leave, None where the
            alarm is about none, and `drop_member` a name.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        do: Mapping[str, Callable[..., object]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules = tuple(rules)
        self._do = do
        self._clock = clock
        self._last: dict[tuple[int, str, int | None], float] = {}
        self._running: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}
        self._over = False
        self._alarms: queue.Queue[Alarm | None] = queue.Queue(PENDING)
        self._thread = threading.Thread(target=self._work, name="alarms", daemon=True)
        self._thread.start()

    def __call__(self, alarm: Alarm) -> None:
        """Takes an alarm and returns at once."""
        try:
            self._alarms.put_nowait(alarm)
        except queue.Full:
            logger.error("too many alarms wait for their actions; only logged: %s", alarm.sentence)

    def close(self, within_s: float = CLOSE_S) -> None:
        """Ends after what waits is done, or without it once so many seconds have passed; commands that still run are
        ended."""
        if not ended(self._thread, self._alarms, within_s):
            logger.error("the actions of alarms take too long; what is not done by now is left")
        self._over = True
        for process in list(self._running.values()):
            _end(process)

    def _work(self) -> None:
        while (alarm := self._alarms.get()) is not None:
            for number, rule in enumerate(self.rules):
                if rule.fits(alarm) and self._ready(number, rule, alarm):
                    for action in rule.do:
                        if self._over:
                            return
                        self._follow(rule, action, alarm)

    def _ready(self, number: int, rule: Rule, alarm: Alarm) -> bool:
        """Whether the rule may act. What else goes wrong meanwhile is news, so each series of a version rests apart;
        but what comes after a rollback too was not the version's fault, and must not lead from one to the next."""
        version = None if "rollback" in rule.do else alarm.version
        about = number, alarm.series, version
        now, last = self._clock(), self._last.get(about)
        if last is not None and now - last < rule.cool_down_s:
            return False
        self._last[about] = now
        return True

    def _follow(self, rule: Rule, action: Action, alarm: Alarm) -> None:
        name = action if isinstance(action, str) else next(iter(action.model_dump()))
        if rule.dry_run:
            logger.warning("%s Would be done: %s.", alarm.sentence, name)
            return
        try:
            self._act(action, alarm)
        except Exception:  # whatever an action does wrong must not end the thread that handles alarms
            logger.exception("the action %s failed for the alarm: %s", name, alarm.sentence)

    def _act(self, action: Action, alarm: Alarm) -> None:
        match action:
            case "log":
                logger.warning("%s", alarm.sentence, extra={"alarm": asdict(alarm)})
            case "rollback":
                self._do["rollback"](alarm.version)
            case DropMember():
                self._do["drop_member"](action.drop_member)
            case Webhook():
                _post(str(action.webhook), alarm)
            case Command():
                self._start(action.command, alarm)

    def _start(self, command: tuple[str, ...], alarm: Alarm) -> None:
        running = self._running.get(command)
        if running is not None and running.poll() is None:
            logger.warning("%s still runs for an earlier alarm; not started again.", command[0])
            return
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._running[command] = process
        threading.Thread(target=_reap, args=(process, _as_json(alarm)), name="alarm command", daemon=True).start()


def ended(thread: threading.Thread, waiting: queue.Queue[Any], within_s: float) -> bool:
    """Tells a thread, by a None behind what waits in its queue, to end; whether it did within so many seconds."""
    limit = time.monotonic() + within_s
    with contextlib.suppress(queue.Full):
        waiting.put(None, timeout=within_s)
    thread.join(max(limit - time.monotonic(), 0.0))
    return not thread.is_alive()


def _as_json(alarm: Alarm) -> bytes:
    facts: dict[str, Any] = asdict(alarm)
    return json.dumps(facts).encode("utf-8")


def _post(url: str, alarm: Alarm) -> None:
    request = urllib.request.Request(url, _as_json(alarm), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS) as answer:
            answer.read(1024)
    except urllib.error.URLError as error:
        logger.error("the webhook did not take the alarm: %s", error)


def _reap(process: subprocess.Popen[bytes], text: bytes) -> None:
    """Hands a command its alarm, waits for it, ends one that takes too long, and says how it ended."""
    try:
        process.communicate(text, COMMAND_SECONDS)
        code = process.returncode
        logger.log(logging.INFO if code == 0 else logging.ERROR, "the command of an alarm ended with %s", code)
    except subprocess.TimeoutExpired:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
