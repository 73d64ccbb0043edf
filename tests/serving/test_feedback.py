"""P5: feedback is on the disk before it is acknowledged, and training reads it with what it has."""

from __future__ import annotations

import json
import os
import stat
import threading

import pandas as pd
import pytest

from fusion.errors import DataError
from recsys.feedback import with_feedback
from recsys.schema import Tables
from serving.errors import InvalidRequest, LimitExceeded, ServingError
from serving.feedback import MOST, Event, FeedbackLog, parse_events


def lines(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_events_are_kept_in_order_and_by_day(tmp_path):
    now = [86_400.0]
    log = FeedbackLog(tmp_path / "log", clock=lambda: now[0])
    assert log.append([Event(user_id="ü 1", item_id="a"), Event(user_id="u2", item_id="b", rating=4, timestamp=7)]) == 2
    now[0] += 86_400
    log.append([Event(user_id="u3", item_id="c", event="bought")])
    log.close()
    assert lines(tmp_path / "log") == [
        {"user_id": "ü 1", "item_id": "a", "event": "taken", "timestamp": 86_400},
        {"user_id": "u2", "item_id": "b", "event": "taken", "rating": 4.0, "timestamp": 7},
        {"user_id": "u3", "item_id": "c", "event": "bought", "timestamp": 172_800},
    ]
    assert [file.name[:17] for file in sorted((tmp_path / "log").iterdir())] == [
        "feedback-19700102",
        "feedback-19700103",
    ]


def test_threads_and_writers_do_not_tear_each_others_lines(tmp_path):
    logs = [FeedbackLog(tmp_path), FeedbackLog(tmp_path)]

    def write(log):
        for place in range(20):
            log.append([Event(user_id=f"u{place}", item_id="x" * 200)] * 3)

    threads = [threading.Thread(target=write, args=(log,)) for log in (*logs, *logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    assert len(lines(tmp_path)) == 4 * 20 * 3
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "body, message",
    [
        ([], "feedback must be"),
        ({"events": [{"user_id": "u"}]}, "events.0.item_id"),
        ({"events": [{"user_id": "u", "item_id": "a"}, {"user_id": "", "item_id": "a"}]}, "events.1.user_id"),
        ({"events": [{"user_id": "u", "item_id": "a\x00"}]}, "control characters"),
        ({"events": [{"user_id": "u", "item_id": "a", "rating": float("nan")}]}, "events.0.rating"),
        ({"events": [{"user_id": "u", "item_id": "a", "colour": "red"}]}, "events.0.colour"),
    ],
)
def test_bad_feedback_is_refused_with_its_place(body, message):
    with pytest.raises(InvalidRequest, match=message):
        parse_events(body)


def test_too_much_at_once(tmp_path):
    with pytest.raises(LimitExceeded, match=f"at most {MOST}"):
        parse_events({"events": [{}] * (MOST + 1)})
    with pytest.raises(LimitExceeded, match=f"at most {MOST}"):
        FeedbackLog(tmp_path).append([Event(user_id="u", item_id="a")] * (MOST + 1))


def test_a_disk_that_refuses_is_said(tmp_path, monkeypatch):
    log = FeedbackLog(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    log.append([Event(user_id="u", item_id="kept")])
    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        with pytest.raises(ServingError, match="No space left on device"):
            log.append([Event(user_id="u", item_id="a")])
    log.append([Event(user_id="u", item_id="a")])  # as it was told to
    log.close()
    assert [line["item_id"] for line in lines(tmp_path)] == ["kept", "a"], "what was refused must not be kept as well"


def test_the_names_of_its_files_are_on_the_disk(tmp_path, monkeypatch):
    """Or a loss of power would take events that were acknowledged away with their file."""
    now, folders, fsync = [86_400.0], [], os.fsync

    def noted(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folders.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    log = FeedbackLog(tmp_path / "log", clock=lambda: now[0])
    assert folders == [tmp_path.stat().st_ino]
    for _ in range(2):
        log.append([Event(user_id="u", item_id="a")] * 2)
        log.append([Event(user_id="u", item_id="b")])
        now[0] += 86_400
    log.close()
    assert folders[1:] == [(tmp_path / "log").stat().st_ino] * 2, "once a day"


def test_a_disk_that_refuses_the_file_of_a_new_day(tmp_path, monkeypatch):
    """It is tried again with the next event."""
    now, fsync = [86_400.0], os.fsync

    def full(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    log = FeedbackLog(tmp_path, clock=lambda: now[0])
    log.append([Event(user_id="u", item_id="a")])
    now[0] += 86_400
    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        for _ in range(2):
            with pytest.raises(ServingError, match="No space left on device"):
                log.append([Event(user_id="u", item_id="refused")])
    log.append([Event(user_id="u", item_id="b")])
    log.close()
    assert [line["item_id"] for line in lines(tmp_path)] == ["a", "b"]


def test_training_reads_what_the_server_wrote(tmp_path):
    log = FeedbackLog(tmp_path, clock=lambda: 50.0)
    log.append([Event(user_id="u9", item_id="new"), Event(user_id="u1", item_id="a", rating=2, timestamp=60)])
    log.close()
    with open(next(tmp_path.glob("*.jsonl")), "a", encoding="ascii") as file:
        file.write('{"user_id": "torn')
    known = pd.DataFrame({"user_id": ["u1"], "item_id": ["b"], "rating": [5.0], "timestamp": [10], "split": ["test"]})
    tables = with_feedback(Tables(pd.DataFrame({"item_id": ["a", "b"]}), "films", known), [str(tmp_path)])
    assert tables.interactions["user_id"].tolist() == ["u1", "u9", "u1"]
    assert tables.interactions["timestamp"].tolist() == [10, 50, 60]
    assert tables.interactions["split"].tolist() == ["test", "train", "train"]
    assert tables.interactions["rating"].iloc[2] == 2.0 and pd.isna(tables.interactions["rating"].iloc[1])
    assert tables.notes == ["2 of its interactions are feedback."]


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1]", "user_id and item_id"),
        ("{", "line 1 of"),
        ('{"user_id": 3}', "as text"),
        ('{"user_id": "u", "item_id": "a", "rating": "good"}', "rating must be a number; line 1 of .* has 'good'"),
        ('{"user_id": "u", "item_id": "a", "timestamp": true}', "timestamp must be a number; line 1 of .* has True"),
        ('{"user_id": "\udcff", "item_id": "a"}', "must be readable UTF-8 text"),
    ],
)
def test_other_files_are_no_feedback(tmp_path, line, message):
    path = tmp_path / "log.jsonl"
    path.write_bytes((line + "\n").encode("utf-8", "surrogateescape"))
    tables = Tables(pd.DataFrame({"item_id": []}), "films", pd.DataFrame({"user_id": [], "item_id": []}))
    with pytest.raises(DataError, match=message):
        with_feedback(tables, [str(path)])
    with pytest.raises(DataError, match="does not"):
        with_feedback(tables, [str(tmp_path / "none")])
