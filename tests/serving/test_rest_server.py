"""The REST door over a real connection: TensorFlow Serving's API, ours, and everything that somebody might send."""

from __future__ import annotations

import asyncio.constants
import base64
import dataclasses
import gzip
import hashlib
import json
import logging
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from certificates import Authority
from fake_serving import ITEMS, MEMBERS, POSTER, REPORT, FakeServable, FakeStore, write_tables
from loopback import listening
from serving.errors import BodyTooLarge, InvalidRequest, LimitExceeded
from serving.feedback import FeedbackLog
from serving.json_limits import check_depth, inflate, parse
from serving.json_tensors import encoded
from serving.model_store import ModelConfig
from serving.openapi import OPERATIONS
from serving.recommending import Recommending
from serving.rest_guard import RestSettings, uvicorn_config
from serving.rest_server import admin_app, app
from serving.security import Tls, Tokens
from serving.settings import GrpcSettings

SETTINGS = RestSettings(
    body_bytes=2**20,
    inflated_bytes=4 * 2**20,
    held_bytes=3 * 2**20,
    values=50_000,
    threads=2,
    waiting=2,
    connections=40,
    seconds=1.0,
    header_seconds=0.4,
    body_seconds=1.0,
    idle_seconds=0.5,
)


@pytest.fixture(scope="module")
def servable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films") / "1"
    return FakeServable(folder, files=write_tables(folder))


@pytest.fixture(scope="module")
def store(servable):
    return FakeStore(servable)


@pytest.fixture(scope="module")
def recommending(store):
    return Recommending(store, timeout_ms=800, failures=1000)


@pytest.fixture(scope="module")
def door(store, recommending, tmp_path_factory):
    log = FeedbackLog(tmp_path_factory.mktemp("feedback"))
    with listening(uvicorn_config(app(store, recommending, SETTINGS, feedback=log), SETTINGS)) as door:
        yield door
    log.close()


@pytest.fixture(autouse=True)
def healthy(servable, store, door):
    """Every test leaves a server that answers, whatever was sent to it, and no lease behind."""
    yield
    servable.faults, servable.seconds = {}, 0.0
    assert door.post("/v1/recommend", {"user_id": "u0", "k": 1}).json["items"][0]["item_id"] == "i2"
    assert store.leases == 0


def refused(reply, status, *parts):
    """One sentence, without paths or traces."""
    assert reply.status == status, reply.content
    assert reply.json.keys() == {"error"} and "\n" not in reply.json["error"]
    assert not any(secret in reply.json["error"] for secret in ("/secret", "Traceback", ".py", "/tmp"))
    for part in parts:
        assert part in reply.json["error"]


# ---- recommendations -----------------------------------------------------------------------------------------


def test_recommend(door):
    """O6, O11, A7: one call without training gives items, titles, scores and every member's part."""
    answer = door.post("/v1/recommend", {"user_id": "u0", "k": 2, "exclude": ["i2"]}).json
    assert answer == {
        "items": [
            {
                "item_id": "i1",
                "score": -8.0,
                "contributions": {"likes": -2, "text": -2, "image": -4},
                "title": "Film 1",
            },
            {"item_id": "i3", "score": -8.0, "contributions": {"likes": -4, "text": -2, "image": -2}},
        ],
        "model": "films",
        "version": 1,
        "profile": "best",
        "members_used": list(MEMBERS),
        "fallback": "",
        "unknown_user": False,
    }


def test_every_field_of_a_recommendation_counts(door):
    def ids(**fields):
        return [item["item_id"] for item in door.post("/v1/recommend", {"k": 4, **fields}).json["items"]]

    assert ids(history=["i2"])[0] == "i1" and ids(include=["i7"]) == ["i7"]
    assert ids(filters={"genres": ["love"]}) == ["i1", "i0", "i6"]
    assert ids(weights={"likes": 0, "text": 0})[0] == "i4" and ids(profile="fast")[0] == "i0"
    assert ids(include=["i0", "i1", "i3", "i4"], diversity=0.9) == ["i1", "i3", "i4", "i0"]
    for where in ({"model": "films"}, {"version": 1}, {"label": "stable"}):
        assert ids(**where)[0] == "i2"
    assert door.post("/v1/recommend", {"user_id": "nobody", "k": 1}).json["unknown_user"] is True


def test_members_that_hang_are_left_out_in_time(door, servable):
    """H7, O13: seen through the door."""
    servable.faults = {"image": "hang"}
    started = time.monotonic()
    answer = door.post("/v1/recommend", {"k": 1, "timeout_ms": 800}).json
    assert time.monotonic() - started < 3
    assert answer["members_used"] == ["likes", "text"] and answer["fallback"] == "'image' did not answer in time."


def test_a_deadline_that_nobody_can_keep(door, servable):
    servable.faults = dict.fromkeys((*MEMBERS, "recommend"), "hang")
    refused(door.post("/v1/recommend", {"k": 1, "timeout_ms": 50}), 504)


def test_similar(door):
    answer = door.post("/v1/similar", {"item_id": "i2", "k": 2}).json
    assert [item["item_id"] for item in answer["items"]] == ["i1", "i3"]
    refused(door.post("/v1/similar", {"item_id": "none", "k": 1}), 404, "no item 'none'")
    refused(door.post("/v1/similar", {"k": 1}), 400, "'item_id' is missing")


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ([], 400, "a body must be an object with"),
        (b"null", 400, "a body must be an object with"),
        ({"user": "u0"}, 400, "did you mean 'user_id'?"),
        ({"user_id": 7}, 400, "'user_id' must be text; received 7"),
        ({"history": "i1"}, 400, "'history' must be a list of texts"),
        ({"history": ["i1", None]}, 400, "'history' must be a list of texts"),
        ({"k": "3"}, 400, "'k' must be a whole number"),
        ({"k": True}, 400, "'k' must be a whole number"),
        ({"k": 2.5}, 400, "'k' must be a whole number"),
        ({"k": 10**30}, 400, "'k' must be a whole number of 64 bits"),
        ({"k": 0}, 400, "'k' must be between 1 and 6; received 0"),
        ({"k": 7}, 400, "received 7"),
        ({"k": 2**40}, 400, "'k' must be between"),
        ({"filters": {"genres": "love"}}, 400, "'filters' must be a list of texts"),
        ({"filters": []}, 400, "'filters' must be an object"),
        ({"weights": {"text": "2"}}, 400, "'weights' must be a number"),
        ({"weights": {"text": 10**400}}, 400, "must be a number"),
        ({"diversity": 2, "k": 1}, 400, "'diversity' must be between 0 and 1"),
        ({"exclude": ["x"] * 65, "k": 1}, 400, "'exclude' must have at most 64 entries"),
        ({"history": ["x" * 65], "k": 1}, 400, "at most 64 bytes"),
        ({"user_id": "\ud800", "k": 1}, 400, "valid Unicode"),
        ({"model": "songs", "k": 1}, 404, "received 'songs'"),
        ({"version": 9, "k": 1}, 404, "version"),
    ],
)
def test_bad_recommendations_are_one_sentence(door, body, status, sentence):
    refused(door.post("/v1/recommend", body), status, sentence)


def test_nul_bytes_and_repeated_ids_are_ids(door):
    answer = door.post("/v1/recommend", {"history": ["\0", "i2", "i2", "nobody knows"], "user_id": "\0", "k": 1}).json
    assert answer["items"][0]["item_id"] == "i1"


def test_feedback_is_kept(door):
    """P5: what users did, for the next training; a door without a log has no such path (below)."""
    events = [{"user_id": "u0", "item_id": "i2"}, {"user_id": "u1", "item_id": "i3", "event": "rated", "rating": 4}]
    assert door.post("/v1/feedback", {"events": events}).json == {"kept": 2}
    refused(door.post("/v1/feedback", {"events": [{"user_id": "u0"}]}), 400, "item_id")
    refused(door.post("/v1/feedback", []), 400, "feedback must be")


def test_feedback_that_the_disk_refuses_is_to_be_sent_again(door, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        reply = door.post("/v1/feedback", {"events": [{"user_id": "u0", "item_id": "i0"}]})
    refused(reply, 507, "No space left on device", "Send it again")


# ---- TensorFlow Serving's API --------------------------------------------------------------------------------

WHERE = ["/v1/models/films", "/v1/models/films/versions/1", "/v1/models/films/labels/stable"]


@pytest.mark.parametrize("where", WHERE)
def test_status_and_metadata(door, where):
    assert door.get(where).json == {
        "model_version_status": [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    answer = door.get(f"{where}/metadata").json
    assert answer["model_spec"] == {"name": "films", "signature_name": "", "version": "1"}
    found = answer["metadata"]["signature_def"]["signature_def"]["sum"]
    assert found["method_name"] == "tensorflow/serving/predict"
    assert found["inputs"]["x"]["dtype"] == "DT_FLOAT"
    assert found["inputs"]["x"]["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}],
        "unknown_rank": False,
    }


@pytest.mark.parametrize("where", WHERE)
def test_predict_by_version(door, where):
    body = {"signature_name": "sum", "instances": [[1, 2], [3, 4.5]]}
    assert door.post(f"{where}:predict", body).json == {"predictions": [3.0, 7.5]}


def test_predict_rows_and_columns(door):
    """O6: one input or output goes without its name, several go with theirs; rows and columns as TF Serving does."""
    rows = [{"x": [1, 2], "y": 1}, {"x": [3, 4], "y": 2}]
    binary = [{"b64": base64.b64encode(b"\xff\0" + bytes([n])).decode()} for n in range(2)]
    answer = door.post("/v1/models/films:predict", {"signature_name": "pair", "instances": rows}).json
    assert answer == {"predictions": [{"sums": 4, "text_bytes": binary[0]}, {"sums": 9, "text_bytes": binary[1]}]}
    columns = {"x": [[1, 2], [3, 4]], "y": [1, 2]}
    answer = door.post("/v1/models/films:predict", {"signature_name": "pair", "inputs": columns}).json
    assert answer == {"outputs": {"sums": [4, 9], "text_bytes": binary}}
    for inputs in ([[1, 2]], {"x": [[1, 2]]}):
        answer = door.post("/v1/models/films:predict", {"signature_name": "sum", "inputs": inputs}).json
        assert answer == {"outputs": [3.0]}
    default = {"instances": [{"history": ["a"], "candidates": ["b", "ccc"]}]}
    assert door.post("/v1/models/films:predict", default).json == {"predictions": [[1, 3]]}


def test_classify_and_regress(door):
    body = {"signature_name": "odds", "examples": [{"x": [1, 3]}, {"x": [[1.0], [1.0]]}]}
    assert door.post("/v1/models/films:classify", body).json == {
        "result": [[["0", 0.25], ["1", 0.75]], [["0", 0.5], ["1", 0.5]]]
    }
    body = {"signature_name": "sum", "context": {"x": [1, 2]}, "examples": [{}, {"x": [3, 4]}]}
    assert door.post("/v1/models/films/versions/1:regress", body).json == {"result": [3.0, 7.0]}


@pytest.mark.parametrize(
    ("task", "body", "sentence"),
    [
        ("classify", {"signature_name": "sum", "examples": [{"x": [1, 2]}]}, "Expected classification signature"),
        ("regress", {"signature_name": "echo", "examples": [{"text": "a"}]}, "Expected regression signature"),
        ("regress", {"signature_name": "sum", "examples": []}, "Input is empty"),
        ("regress", {"signature_name": "sum", "examples": {}}, "must be a list of objects"),
        ("regress", {"signature_name": "sum", "examples": [[1, 2]]}, "must be a list of objects"),
        ("regress", {"signature_name": "sum", "examples": [{"x": [1, 2], "z": 1}]}, "no such feature"),
        ("regress", {"signature_name": "sum", "examples": [{"x": ["1", "2"]}]}, "values of the type float32"),
        ("regress", {"signature_name": "sum", "examples": [{"x": [1]}]}, "'x' must fill the shape [2]"),
        ("regress", {"signature_name": "sum", "example": []}, "did you mean 'examples'?"),
    ],
)
def test_bad_examples_are_one_sentence(door, task, body, sentence):
    refused(door.post(f"/v1/models/films:{task}", body), 400, sentence)


def test_text_and_bytes_come_back_as_they_went(door):
    """Bytes by base64 both ways, UTF-8 as it is, NUL bytes and all."""
    given = [
        "ä ö 電",
        {"b64": base64.b64encode(b"\xff\xfe").decode()},
        "\0",
        {"b64": base64.b64encode(b"plain").decode()},
    ]
    answer = door.post("/v1/models/films:predict", {"signature_name": "echo", "instances": given}).json
    assert answer == {"predictions": [given[0], given[1], "\0", "plain"]}


def test_nan_is_answered_as_null(door, servable):
    """JSON has neither NaN nor infinities; browsers and strict parsers would fail on the whole answer."""
    servable.faults = {"text": "nan"}
    body = {"signature_name": "member_text", "inputs": {"user_id": ["u0"], "history": [[""]]}}
    assert door.post("/v1/models/films:predict", body).json == {"outputs": [[None] * len(ITEMS)]}
    assert encoded("y", np.float32([[1.5, np.inf], [-np.inf, np.nan]])) == [[1.5, None], [None, None]]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "either 'instances' (rows) or 'inputs'"),
        ([], 400, "an object with signature_name, instances, inputs"),
        ({"instances": [[1, 2]], "inputs": [[1, 2]]}, 400, "and not both"),
        ({"instances": [], "signature_name": "sum"}, 400, "at least one row"),
        ({"instances": {}, "signature_name": "sum"}, 400, "must be a list"),
        ({"instance": [], "instances": [[1, 2]]}, 400, "did you mean 'instances'?"),
        ({"instances": [[1, 2]], "signature_name": "none"}, 404, "has the signatures"),
        ({"instances": [[1, 2]], "signature_name": ["sum"]}, 404, "has the signatures"),
        ({"instances": [[1, 2], [1]], "signature_name": "sum"}, 400, "'x' must be an array"),
        ({"instances": [[1, 2, 3]], "signature_name": "sum"}, 400, "'x' must have the shape [any, 2]"),
        ({"instances": [["1", "2"]], "signature_name": "sum"}, 400, "'x' must be float32"),
        ({"instances": [[None, 2]], "signature_name": "sum"}, 400, "'x' must be float32"),
        ({"instances": [{"x": [1, 2]}], "signature_name": "pair"}, 400, "missing ['y']"),
        ({"instances": [{"x": [1, 2], "y": 1}, {"x": [1, 2]}], "signature_name": "pair"}, 400, "same inputs"),
        ({"instances": [{"x": [1, 2], "y": 1}, 3], "signature_name": "pair"}, 400, "same inputs"),
        ({"instances": [3, {"x": [1, 2]}], "signature_name": "sum"}, 400, "rows of one kind"),
        ({"instances": [[1, 2]], "signature_name": "pair"}, 400, "give each value with its name"),
        ({"inputs": {"x": [[1, 2]], "z": 1}, "signature_name": "sum"}, 400, "unknown ['z']"),
        ({"instances": [{"b64": "!!"}], "signature_name": "echo"}, 400, "standard base64"),
        ({"instances": [{"b64": "abc"}], "signature_name": "echo"}, 400, "standard base64"),
        ({"instances": [{"b64": 1}], "signature_name": "echo"}, 400, '{"b64": TEXT}'),
        ({"instances": [[{"a": 1}]], "signature_name": "echo"}, 400, "values must be numbers, text"),
        ({"instances": [1], "signature_name": "echo"}, 400, "'text' must hold text; received a int"),
        ({"instances": ["x" * 65], "signature_name": "echo"}, 400, "at most 64 bytes"),
        ({"inputs": {"x": [[1, 2]], "y": [2**40]}, "signature_name": "pair"}, 400, "'y' must fit int32"),
    ],
)
def test_bad_predictions_are_one_sentence(door, body, status, sentence):
    refused(door.post("/v1/models/films:predict", body), status, sentence)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/songs", 404),
        ("GET", "/v1/models/films/versions/7", 404),
        ("GET", "/v1/models/films/versions/99999999999999999999999", 404),
        ("GET", "/v1/models/films/versions/x", 404),
        ("GET", "/v1/models/films/labels/none", 400),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/models/films:explain", 404),
        ("GET", "/v1/models/films:predict", 405),
        ("DELETE", "/v1/models/films", 405),
        ("GET", "/page/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/admin/models", 404),
        ("POST", "/v1/admin/rollback", 404),
    ],
)
def test_unknown_paths(door, method, path, status):
    refused(door.ask(method, path, b"{}" if method == "POST" else None), status)


# ---- bodies that are meant badly -----------------------------------------------------------------------------


def test_deep_json_is_refused_before_it_is_parsed(door):
    """CVE-2025-0649: 50,000 brackets inside each other ended TensorFlow Serving."""
    for bracket in (b"[", b'{"a":'):
        refused(door.post("/v1/recommend", bracket * 50_000), 400, "at most 32 brackets")
    refused(door.post("/v1/models/films:predict", b'{"instances":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), 400)
    assert door.post("/v1/recommend", {"user_id": "[" * 40, "k": 1}).status == 200


@pytest.mark.parametrize("text", [b'"' + b'\\"' * 200_000, b'"' * 300_001, b'["]]' * 100_000, b"\\" * 300_000])
def test_depth_is_found_in_linear_time(text):
    started = time.perf_counter()
    check_depth(text, 1_000_000)
    assert time.perf_counter() - started < 1.5


def test_depth_counts_brackets_outside_of_texts():
    check_depth(b'{"a": "[[[[\\"[[[[", "b": [1]}', 2)
    check_depth(b"[[]]" * 9, 2)
    for text in (b"[[[", b'{"a": "x\\\\", "b": [[1]]}', b'["\\"", [["'):
        with pytest.raises(LimitExceeded):
            check_depth(text, 2)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b'{"k": 1} x', "must be JSON"),
        (b'{"k": NaN}', "it has no NaN"),
        (b'{"k": -Infinity}', "it has no -Infinity"),
        (b'{"weights": {"text": 1e999}}', "'weights' must lie between"),
        (b'{"k": ' + b"9" * 10_000 + b"}", "must be JSON"),
        (b'{"user_id": "\xff\xfe"}', "must be UTF-8; byte 13 is not"),
        ('{"k": 1}'.encode("utf-16"), "must be UTF-8"),
        (b"\xef\xbb\xbf{}", "must be JSON"),
        (b'{"user_id": "\0"}', "must be JSON"),
        (b'{"exclude": [' + b'"a",' * 200_000 + b'"a"]}', "at most 50000 values"),
        (b"[" + b"[]," * 200_000 + b"[]]", "at most 50000 values"),
    ],
)
def test_bodies_that_are_not_json(door, body, sentence):
    refused(door.post("/v1/recommend", body), 400, sentence)


def test_large_bodies_are_refused_while_they_come(door):
    """A million excluded ids and a text of 10 MB, with the length told before and without."""
    large = json.dumps({"exclude": [f"{n:07}" for n in range(1_000_000)]}).encode()
    refused(door.post("/v1/recommend", large), 413, "at most 1048576 bytes")
    refused(door.post("/v1/recommend", {"user_id": "x" * 10_000_000}), 413)
    assert door.ask("POST", "/v1/recommend", b"x" * (2**20 + 1)).headers["connection"] == "close"
    with door.connect() as connection:
        connection.sendall(b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(17):
            connection.sendall(chunk)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_gzip(door):
    body = gzip.compress(json.dumps({"user_id": "u0", "k": 1}).encode())
    assert door.post("/v1/recommend", body, **{"content-encoding": "gzip"}).status == 200


@pytest.mark.parametrize(
    ("body", "encoding", "status", "sentence"),
    [
        (gzip.compress(b" " * 2**22 + b"{}"), "gzip", 413, "inflate to at most 4194304 bytes and 100 times"),
        (gzip.compress(b" " * 2**21 + b"{}"), "gzip", 413, "100 times its size"),
        (gzip.compress(gzip.compress(b"{}")), "gzip", 400, "UTF-8"),
        (gzip.compress(b'{"k": 1}')[:-6], "gzip", 400, "one whole gzip stream"),
        (gzip.compress(b"{}") + b"more", "gzip", 400, "one whole gzip stream"),
        (b"{}", "gzip", 400, "must be gzip"),
        (zlib.compress(b"{}"), "gzip", 400, "must be gzip"),
        (b"{}", "br", 400, "must be gzip or identity; received 'br'"),
        (gzip.compress(b"[" * 50_000), "gzip", 400, "at most 32 brackets"),
    ],
    # Not the bytes, because they hold the time.
    ids=["large", "ratio", "twice", "cut", "more", "plain", "zlib", "other", "deep"],
)
def test_gzip_bombs(door, body, encoding, status, sentence):
    """tensorflow/serving PR 4136: measured while it inflates, never after."""
    refused(door.post("/v1/recommend", body, **{"content-encoding": encoding}), status, sentence)


def test_inflating_never_holds_more_than_it_may():
    import tracemalloc

    bomb = gzip.compress(b"\0" * 60 * 2**20, 1)
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        inflate(bomb, "gzip", 2**20, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_random_bytes_never_do_more_than_be_refused():
    random = np.random.default_rng(0)
    pieces = [b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"1e9", b"null", b"\xff", b" ", b"a", b"-", b"NaN"]
    for _ in range(3000):
        body = b"".join(pieces[n] for n in random.integers(0, len(pieces), random.integers(0, 30)))
        try:
            assert json.loads(body) == parse(body, 10, 100)
        except (InvalidRequest, ValueError):
            continue


# ---- clients that are meant badly ----------------------------------------------------------------------------


def closed_after(connection: socket.socket) -> float:
    """Seconds until the server ends the connection."""
    started = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except OSError:
        pass
    return time.monotonic() - started


@pytest.mark.parametrize("head", [b"", b"POST /v1/reco", b"GET / HTTP/1.1\r\nhost: localhost\r\nx-slow: "])
def test_heads_that_do_not_come_are_not_waited_for(door, head):
    """Slow loris: a byte now and then does not help it."""
    with door.connect() as connection:
        started = time.monotonic()
        connection.sendall(head)

        def drip():
            try:
                while time.monotonic() - started < 5:
                    time.sleep(0.1)
                    connection.sendall(b"a")
            except OSError:
                pass

        thread = threading.Thread(target=drip if head else lambda: None)
        thread.start()
        assert closed_after(connection) < 3
        thread.join()


def test_bodies_that_do_not_come_are_not_waited_for(door):
    with door.connect() as connection:
        connection.sendall(b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert closed_after(connection) < 3


def test_clients_that_vanish_leave_nothing_behind(door, servable):
    """Gone while the head, the body or the answer was due."""
    body = b'POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-length: 8\r\n\r\n{"k": 1}'
    servable.seconds = 0.02
    for size in (1, 30, len(body) - 3, len(body)):
        for _ in range(5):
            with door.connect() as connection:
                connection.sendall(body[:size])
    time.sleep(0.3)
    servable.seconds = 0.0
    assert door.get("/healthz").status == 200


def test_large_heads_are_refused(door):
    with door.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 200_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_what_is_not_http_is_refused(door):
    with door.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" * 9 + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_too_many_requests_are_told_when_to_come_back(door, servable):
    """Two are answered, two wait, the others hear at once; who asks how the server is, is answered."""
    servable.faults = {"serving_default": "stuck"}
    body = {"instances": [{"history": ["a"], "candidates": ["b"]}]}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(door.post, "/v1/models/films:predict", body) for _ in range(8)]
        time.sleep(0.3)
        assert door.get("/healthz").status == 200
        assert door.get("/monitoring/prometheus/metrics").status == 200
        replies = [future.result() for future in asked]
    full = [reply for reply in replies if reply.status == 429]
    late = [reply for reply in replies if reply.status == 504]
    assert len(full) == 4 and len(late) == 4
    refused(full[0], 429, "the REST door is full: 4 of 4")
    assert full[0].headers["retry-after"] == "1"
    refused(late[0], 504, "not there within 1 s")
    servable.released.set()
    time.sleep(0.2)
    servable.released.clear()


def test_bodies_together_are_bounded(door):
    head = b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1048576\r\n\r\n"
    connections = [door.connect() for _ in range(5)]
    try:
        for connection in connections:
            connection.sendall(head + b" " * (2**20 - 1))
        answers = [connection.recv(1000) for connection in connections]
    finally:
        for connection in connections:
            connection.close()
    statuses = [int(answer[9:12]) for answer in answers]
    assert 429 in statuses and set(statuses) <= {429, 408}


def test_more_connections_than_allowed_are_refused(door):
    connections = [door.connect() for _ in range(60)]
    try:
        connections[-1].sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connections[-1].recv(100).startswith(b"HTTP/1.1 503 ")
    finally:
        for connection in connections:
            connection.close()
    time.sleep(0.1)


def test_a_failure_of_ours_tells_nothing(door, servable, caplog):
    servable.faults = dict.fromkeys((*MEMBERS, "recommend"), "raise")
    reply = door.post("/v1/recommend", {"k": 1, "user_id": "private"})
    refused(reply, 500, "the server could not answer")
    assert "private" not in caplog.text


# ---- who watches ---------------------------------------------------------------------------------------------


def test_alive_is_not_ready(door, store):
    assert door.get("/healthz").json == {"status": "alive"}
    reply = door.get("/readyz")
    assert reply.status == 200
    assert reply.json["models"]["films"]["1"] == {"state": "AVAILABLE", "warmed": 2, "error": ""}
    store.ready = False
    try:
        assert (door.get("/readyz").status, door.get("/healthz").status) == (503, 200)
    finally:
        store.ready = True


def test_what_answers_cost_can_be_read(door):
    """O12: the processor time of the server, which only grows, beside the number of calls."""

    def spent():
        rows = door.get("/monitoring/prometheus/metrics").content.decode().splitlines()
        return float(next(row for row in rows if row.startswith("serving_cpu_seconds{} ")).split()[1])

    before = spent()
    door.post("/v1/recommend", {"k": 1})
    assert 0 < before < spent() <= time.process_time()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/recommend", {"k": 1, "model": "fi\0lms"}, 404),
        ("/v1/models/fi%00lms:predict", {"instances": [{}]}, 404),
        ("/v1/models/films/versions/1%00:predict", {"instances": [{}]}, 404),
    ],
)
def test_a_zero_byte_in_a_name(door, path, body, status):
    """O6: no name has one, and no file is asked for by it."""
    refused(door.post(path, body), status)


def test_metrics_count_by_model_and_status(door):
    def count(status, model="films"):
        text = door.get("/monitoring/prometheus/metrics").content.decode()
        line = f':tensorflow:serving:request_count{{model_name="{model}",status="{status}"}} '
        return sum(float(row.removeprefix(line)) for row in text.splitlines() if row.startswith(line))

    before, unknown = count("OK"), count("NOT_FOUND", "")
    door.post("/v1/recommend", {"k": 1})
    assert count("OK") == before + 1
    for name in ("a", "b"):
        door.post("/v1/recommend", {"k": 1, "model": name})
    assert count("NOT_FOUND", "") == unknown + 2, "nobody makes new series"
    refused(door.post("/v1/recommend", {"k": 0}), 400)
    assert count("INVALID_ARGUMENT") >= 1


def test_requests_have_ids_and_logs_have_no_features(door, caplog):
    caplog.set_level(logging.INFO, "serving.access")
    assert door.get("/healthz", **{"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {door.get("/healthz", **{"x-request-id": given}).headers["x-request-id"] for given in ("", "a b", "x" * 65)}
    assert len(made) == 3 and all(len(name) == 16 for name in made)
    door.post("/v1/recommend", {"user_id": "private", "history": ["private"], "k": 1}, **{"x-request-id": "abc-2"})
    door.get("/v1/items?search=private", **{"x-request-id": "abc-3"})
    records = {record["id"]: record for record in logged(caplog, "abc-3")}
    assert records["abc-2"].pop("ms") > 0
    assert records["abc-2"] == {"id": "abc-2", "method": "POST", "operation": "recommend", "status": 200}
    assert "private" not in caplog.text and records["abc-3"]["operation"] == "items"


def logged(caplog, last):
    """The access log, which is written after an answer has gone, up to the request of this id."""
    until = time.monotonic() + 5
    while True:
        lines = [record.message for record in list(caplog.records) if record.name == "serving.access"]
        records = [json.loads(line) for line in lines]
        if any(record["id"] == last for record in records) or time.monotonic() > until:
            return records
        time.sleep(0.01)


def test_answers_carry_the_headers_of_a_careful_page(door):
    for path in ("/", "/healthz", "/none"):
        headers = door.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
    assert "access-control-allow-origin" not in door.get("/v1/catalogue", origin="https://elsewhere.example").headers


def test_catalogue_items_and_images(door):
    answer = door.get("/v1/catalogue").json
    assert answer["members"] == list(MEMBERS) and answer["k_max"] == 6 and answer["profiles"] == ["best", "fast"]
    assert answer["filters"]["genres"] == ["love", "sea", "war"] and answer["users"] == ["u0", "u1", "ü 2"]
    assert answer["figures"] == {"ndcg@10": 0.25} and answer["diversity"] is True
    items = door.get("/v1/items?search=film%20&limit=2").json["items"]
    assert [item["item_id"] for item in items] == ["i0", "i1"] and items[0]["genres"] == ["war", "love"]
    image = door.get("/v1/items/i0/image")
    assert image.content == POSTER and image.headers["content-type"] == "image/png"
    for item in ("i1", "none", "..%2f..%2fmanifest.json"):
        refused(door.get(f"/v1/items/{item}/image"), 404)
    report = door.get("/v1/report")
    assert (
        answer["report"] is True and report.content == REPORT and report.headers["content-type"].startswith("text/html")
    )
    assert "script-src" not in (policy := report.headers["content-security-policy"]) and "default-src 'none'" in policy
    refused(door.get("/v1/items?limit=51"), 400, "'limit' must be between 1 and 50")
    refused(door.get("/v1/items?limit=x"), 400)


# ---- one table of calls --------------------------------------------------------------------------------------


def test_the_document_has_every_call_and_its_examples_answer(door):
    """O6: the OpenAPI document is made from the table that the routes are made from."""
    document = door.get("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    users = [operation for operation in OPERATIONS if not operation.admin]
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(operation.method, operation.path) for operation in users}
    names = [call["operationId"] for methods in document["paths"].values() for call in methods.values()]
    assert len(set(names)) == len(names)
    values = {"model": "films", "version": "1", "label": "stable", "item_id": "i0"}
    for operation in users:
        reply = door.ask(operation.method, operation.path.format(**values), operation.example)
        assert reply.status == 200, (operation.path, reply.content)
        assert reply.headers["content-type"].startswith(operation.kind.removesuffix("*"))


# ---- tokens, certificates, administration --------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(
        f"shop {hashlib.sha256(b's3cret').hexdigest()}\nold {hashlib.sha256(b'old').hexdigest()} 2020-01-01\n"
    )
    return Tokens(path)


def test_doors_with_tokens(store, recommending, tokens, caplog):
    """R8: nobody comes in without a valid token, but for the page and for those who ask whether the server lives."""
    caplog.set_level(logging.INFO, "serving.access")
    asked = 0
    with listening(uvicorn_config(app(store, recommending, SETTINGS, tokens), SETTINGS)) as door:
        for given in (None, "wrong", "old", "s3cret\xff"):
            headers = {"authorization": f"Bearer {given}"} if given else {}
            for operation in OPERATIONS:
                if not operation.admin and not operation.open:
                    reply = door.ask(operation.method, operation.path, b"[" * 99, headers)
                    assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
                    asked += 1
        assert [door.get(path).status for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz")] == [200] * 5
        known = {"authorization": "Bearer s3cret", "x-request-id": "known"}
        assert door.post("/v1/recommend", {"k": 1}, **known).status == 200
        records = logged(caplog, "known")
        assert [record["id"] for record in records if "caller" in record] == ["known"]
        assert records[-1]["caller"] == "shop" and "s3cret" not in caplog.text
        assert sum(record["status"] == 401 for record in records) == asked > 50


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("127.0.0.1", 200), ("localhost:8501", 200), ("LOCALHOST", 200), ("[::1]:8501", 200), ("[::1]", 200)),
        *(("shop.example", 200), ("evil.example", 403), ("evil.example:80", 403), ("localhost.evil.example", 403)),
    ],
)
def test_a_name_of_somebody_else_is_not_answered(store, recommending, tokens, host, status):
    """R8: DNS rebinding; a browser shows a stranger's page that calls 127.0.0.1 by a name of its own."""
    settings = dataclasses.replace(SETTINGS, hosts=frozenset({"shop.example"}))
    for given in (None, tokens):
        with listening(uvicorn_config(app(store, recommending, settings, given), settings)) as door:
            assert door.get("/healthz", host=host).status == status


def test_without_names_of_its_own_a_door_with_tokens_answers_to_any(store, recommending, tokens):
    """R8: who has no token gets nothing by another name; a door that is open to all of its machine is not asked so."""
    for given, status in ((None, 403), (tokens, 200)):
        with listening(uvicorn_config(app(store, recommending, SETTINGS, given), SETTINGS)) as door:
            assert door.get("/healthz", host="shop.example").status == status
            assert door.get("/healthz", host="localhost").status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:9", "host": "127.0.0.1:9", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://shop.example", "host": "backend"}, 200),
        ({"origin": "https://shop.example:444"}, 200),
        ({"origin": "http://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://127.0.0.1:3000", "host": "127.0.0.1:9", "sec-fetch-site": "same-site"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://shop.example.evil.example"}, 403),
    ],
)
def test_pages_of_other_servers_send_nothing(store, recommending, headers, status):
    """R8: a browser sends a form or plain text for any page; feedback must not come from strangers' pages."""
    settings = dataclasses.replace(SETTINGS, hosts=frozenset({"shop.example", "backend"}))
    with listening(uvicorn_config(app(store, recommending, settings), settings)) as door:
        reply = door.post("/v1/recommend", {"k": 1}, **{"content-type": "text/plain", **headers})
        assert reply.status == status
        if status == 403:
            refused(reply, 403, "a page of another server")
            assert door.get("/v1/catalogue", **headers).status == 200  # which no browser gives to that page


def test_callers_who_never_shake_hands_are_left(store, recommending, tmp_path, monkeypatch):
    """R8: TLS begins within the time that headers have, or the connection is closed."""
    monkeypatch.setattr(asyncio.constants, "SSL_HANDSHAKE_TIMEOUT", asyncio.constants.SSL_HANDSHAKE_TIMEOUT)
    authority, settings = Authority(tmp_path), dataclasses.replace(SETTINGS, header_seconds=0.3)
    tls = Tls(*authority.issue("server"))
    with listening(uvicorn_config(app(store, recommending, settings), settings, tls=tls)) as door:
        with socket.create_connection(("127.0.0.1", door.port), timeout=10) as silent:
            started = time.monotonic()
            assert silent.recv(1) == b""
            assert time.monotonic() - started < 5


def test_what_loads_models_has_time(store, tokens, monkeypatch):
    """O10: a rollback may load the version before; who asks for it hears how it ended."""
    settings, key = dataclasses.replace(SETTINGS, seconds=0.1), {"authorization": "Bearer s3cret"}
    monkeypatch.setattr(store, "rollback", lambda *_, **__: time.sleep(0.3) or 1)
    monkeypatch.setattr(store, "drop_member", lambda *_: time.sleep(0.3))
    with listening(uvicorn_config(admin_app(store, tokens, settings), settings)) as door:
        assert door.post("/v1/admin/rollback", {"model": "films"}, **key).status == 200
        refused(door.post("/v1/admin/members", {"member": "text", "use": False}, **key), 504)
        paths = door.get("/v1/admin/openapi.json", **key).json["paths"]
        assert {"/v1/admin/rollback", "/v1/admin/labels", "/v1/admin/items"} <= set(paths)
        assert "/v1/recommend" not in paths and {"403", "507"} <= set(paths["/v1/admin/labels"]["post"]["responses"])


def test_mutual_tls(store, recommending, tmp_path):
    authority = Authority(tmp_path)
    tls = Tls(*authority.issue("server"), client_ca=authority.certificate)
    import ssl

    client = ssl.create_default_context(cafile=authority.certificate)
    stranger = ssl.create_default_context(cafile=authority.certificate)
    client.load_cert_chain(*authority.issue("client"))
    with listening(uvicorn_config(app(store, recommending, SETTINGS), SETTINGS, tls=tls), client) as door:
        assert door.post("/v1/recommend", {"k": 1}).status == 200
        for other in (stranger, None):
            with pytest.raises(OSError):
                type(door)(door.port, other).get("/healthz")
        assert door.get("/healthz").status == 200


def test_administration_is_a_door_of_its_own(store, tokens):
    with listening(uvicorn_config(admin_app(store, tokens, SETTINGS), SETTINGS)) as door:
        key = {"authorization": "Bearer s3cret"}
        for operation in OPERATIONS:
            if operation.admin:
                refused(door.ask(operation.method, operation.path, operation.example), 401)
        assert door.get("/v1/admin/models", **key).json == {
            "models": {
                "films": {
                    "versions": {"1": {"state": "AVAILABLE", "warmed": 2, "error": ""}},
                    "labels": {"stable": 1},
                    "dropped": [],
                }
            }
        }
        answer = door.post("/v1/admin/labels", {"model": "films", "label": "new", "version": 1}, **key)
        assert answer.json == {"labels": {"stable": 1, "new": 1}}
        refused(door.post("/v1/admin/labels", {"label": "new", "version": 2}, **key), 404)
        refused(door.post("/v1/admin/labels", {"label": "new"}, **key), 400, "must have 'version'")
        refused(door.post("/v1/admin/rollback", {"model": "films"}, **key), 409, "no version before 1")
        assert door.post("/v1/admin/rollback", {"model": "films", "version": 2}, **key).json == {"version": 1}
        refused(door.post("/v1/admin/rollback", {"version": "2"}, **key), 400, "'version' must be a whole number")
        models = [{"name": "films", "folder": "/models/films", "versions": [1, 2], "labels": {"a": 1}, "canary": 0.1}]
        assert door.post("/v1/admin/reload", {"models": models}, **key).status == 200
        wanted = ModelConfig("films", store.orders[-1][0].folder, versions=(1, 2), labels={"a": 1}, canary=0.1)
        assert store.orders == [[wanted]] and str(wanted.folder) == "/models/films"
        refused(door.post("/v1/admin/reload", {"models": [{"name": "films"}]}, **key), 400, "must have 'folder'")
        refused(door.post("/v1/admin/reload", {"models": []}, **key), 400, "at least one object")
        drop = {"model": "films", "member": "text", "use": False}
        assert door.post("/v1/admin/members", drop, **key).json == drop
        assert door.get("/v1/admin/models", **key).json["models"]["films"]["dropped"] == ["text"]
        assert door.post("/v1/admin/members", {"member": "text", "use": True}, **key).status == 200
        assert store.dropped("films") == frozenset()
        refused(door.post("/v1/admin/members", {"member": "text", "use": "no"}, **key), 400, "true or false")
        refused(door.post("/v1/recommend", {"k": 1}, **key), 404)


def test_without_a_page_nobody_is_listed(store, recommending):
    with listening(uvicorn_config(app(store, recommending, SETTINGS, page=False), SETTINGS)) as door:
        for path in ("/", "/page.js", "/v1/catalogue", "/v1/items", "/v1/items/i0/image", "/v1/report"):
            assert door.get(path).status == 404
        assert door.post("/v1/feedback", {"events": []}).status == 404
        assert not {"/v1/feedback", "/v1/items"} & set(door.get("/openapi.json").json["paths"])
        assert door.post("/v1/recommend", {"k": 1}).status == 200


def test_bounds_must_be_above_zero():
    with pytest.raises(ValueError, match="'depth' must be above 0"):
        RestSettings(depth=0)
    with pytest.raises(ValueError, match="'timeout_s' must be above 0; received nan"):
        GrpcSettings(timeout_s=float("nan"))
