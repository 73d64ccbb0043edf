"""P3: alarms lead to what the rules say, once, in order, and whatever fails on the way."""

from __future__ import annotations

import dataclasses
import http.server
import json
import logging
import sys
import threading
import time

import pytest

from serving.actions import Handler, Rule, Watch
from serving.errors import InvalidRequest
from serving.monitoring import Alarm

ALARM = Alarm("drift", "top_score", 0.5, 0.2, "'top_score' is not distributed as in training.", 1.0)


class Server:
    """What the server can do, as a list of what was asked of it."""

    def __init__(self):
        self.done = []
        self.actions = {
            "rollback": lambda version: self.done.append("rollback" if version is None else f"leave {version}"),
            "drop_member": lambda name: self.done.append(f"drop {name}"),
        }


def handled(rules, *alarms, clock=time.monotonic):
    server = Server()
    handler = Handler([Rule.model_validate(rule) for rule in rules], server.actions, clock)
    for alarm in alarms:
        handler(alarm)
    handler.close()
    return server.done


def test_rules_are_followed_in_order():
    """P3: an alarm rolls back and drops a member; other alarms do nothing."""
    rules = [
        {"when": "drift", "series": "top_score", "do": ["rollback", {"drop_member": "text"}]},
        {"when": "drift", "series": "history_length", "do": ["rollback"]},
        {"when": "errors", "do": ["rollback"]},
    ]
    assert handled(rules, ALARM) == ["rollback", "drop text"]


def test_a_rollback_leaves_the_version_that_the_alarm_is_about():
    """P3: by the time it is followed another version may be served, and others may have followed it."""
    rule = {"when": "drift", "do": ["rollback", "rollback"]}
    assert handled([rule], dataclasses.replace(ALARM, version=3)) == ["leave 3", "leave 3"]


def test_the_end_does_not_wait_for_ever(monkeypatch, caplog):
    """P3: an action that hangs keeps no server from stopping; what waits behind it is not done any more."""
    monkeypatch.setattr("serving.actions.PENDING", 1)
    hold, begun, done = threading.Event(), threading.Event(), []

    def hanging(version):
        begun.set()
        hold.wait(20)
        done.append(version)

    rule = Rule.model_validate({"when": "drift", "do": ["rollback", "rollback"], "cool_down_s": 0})
    handler = Handler([rule], {"rollback": hanging})
    handler(ALARM)
    assert begun.wait(5)
    handler(ALARM)
    started = time.monotonic()
    handler.close(0.05)
    assert time.monotonic() - started < 2 and "what is not done by now is left" in caplog.text
    hold.set()
    handler._thread.join(5)
    assert done == [None]


def test_a_rule_rests_after_it_was_followed():
    now = [0.0]
    rule = {"when": "drift", "do": ["rollback"], "cool_down_s": 60}
    assert handled([rule], ALARM, ALARM, clock=lambda: now[0]) == ["rollback"]
    ticks = iter([0.0, 61.0])
    assert handled([rule], ALARM, ALARM, clock=lambda: next(ticks)) == ["rollback", "rollback"]


def test_each_series_of_each_version_rests_apart():
    """P3: what else goes wrong during the cool-down is not lost, be it of another version; only rollbacks do
    not lead from version to version."""
    other, newer = dataclasses.replace(ALARM, series="history_length"), dataclasses.replace(ALARM, version=4)
    alarms = (ALARM, other, newer) * 2
    drop = {"when": "drift", "do": [{"drop_member": "text"}], "cool_down_s": 60}
    assert len(handled([drop], *alarms, clock=lambda: 0.0)) == 3
    rollback = {"when": "drift", "do": ["rollback"], "cool_down_s": 60}
    assert len(handled([rollback], *alarms, clock=lambda: 0.0)) == 2


def test_a_dry_run_only_says_so(caplog):
    with caplog.at_level(logging.WARNING, "fusion.serving.alarms"):
        assert handled([{"when": "drift", "do": ["rollback"], "dry_run": True}], ALARM) == []
    assert "Would be done: rollback" in caplog.text


def test_what_fails_does_not_stop_the_next(caplog):
    """P3: nobody listens at the webhook, and a program is not there."""
    do = [{"webhook": "http://127.0.0.1:9/"}, {"command": ["/nowhere/at/all"]}, "rollback"]
    with caplog.at_level(logging.ERROR, "fusion.serving.alarms"):
        assert handled([{"when": "drift", "do": do}], ALARM) == ["rollback"]
    assert "webhook did not take" in caplog.text and "command failed" in caplog.text


def test_a_webhook_gets_the_alarm_as_json():
    received = []

    class Door(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        handled([{"when": "drift", "do": [{"webhook": f"http://127.0.0.1:{server.server_port}/alarms"}]}], ALARM)
        thread.join(10)
    assert received[0]["series"] == "top_score" and received[0]["kind"] == "drift"


def test_a_command_reads_the_alarm_and_runs_once_at_a_time(tmp_path):
    """P3: a retraining is started without a shell, and not a second time beside itself."""
    out = tmp_path / "alarm.json"
    code = f"import sys, time, pathlib; pathlib.Path({str(out)!r}).write_text(sys.stdin.read()); time.sleep(60)"
    rule = Rule.model_validate({"when": "drift", "do": [{"command": [sys.executable, "-c", code]}], "cool_down_s": 0})
    handler = Handler([rule], {})
    handler(ALARM)
    handler(ALARM)
    end = time.monotonic() + 20
    while not (out.exists() and out.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert json.loads(out.read_text())["sentence"] == ALARM.sentence
    (process,) = handler._running.values()
    handler.close()
    assert process.poll() is not None


@pytest.mark.parametrize(
    "text, message",
    [
        ("rules: [{when: sunshine, do: [log]}]", "rules.0.when"),
        ("rules: [{when: drift, do: []}]", "rules.0.do"),
        ("rules: [{when: drift, do: [log], colour: red}]", "colour"),
        ("rules: [", "must be YAML"),
    ],
)
def test_bad_rules_are_refused_with_their_place(tmp_path, text, message):
    path = tmp_path / "watch.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequest, match=message):
        Watch.read(path)


def test_an_empty_file_logs_every_alarm(tmp_path):
    path = tmp_path / "watch.yaml"
    path.write_text("", encoding="utf-8")
    watch = Watch.read(path)
    assert {rule.when for rule in watch.rules} == {"drift", "rate", "errors", "latency", "spike"}
    assert {rule.do for rule in watch.rules} == {("log",)}
