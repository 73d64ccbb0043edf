"""The SDK against scripted servers on loopback: both transports, failures, retries, replicas, and the folder alone."""

import asyncio
import contextlib
import doctest
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

import fake_replicas
from certificates import Authority
from fake_replicas import Fault, Script, grpc_replica, http_replica, metadata
from loopback import listening
from serving import client as sdk
from serving.client import Client, Model, RetryPolicy, wire
from serving.client.errors import of_code
from serving.client.grpc_door import GrpcDoor
from serving.client.messages import SimilarRequest
from serving.client.replicas import TIMEOUTS, Replicas
from serving.client.retrying import Budget, Caller
from serving.client.tensors import LARGEST, to_array, to_proto

ROOT = Path(__file__).parents[2]
REPLICAS = {"grpc": grpc_replica, "http": http_replica}
FILMS = Model("films")
IMPATIENT = RetryPolicy(first_wait=0.001, longest_wait=0.002)


@pytest.fixture(params=REPLICAS)
def transport(request):
    return request.param


@contextlib.contextmanager
def connected(transport, *steps, **settings):
    """A client and the script of its only server."""
    script = Script(*steps)
    outputs = settings.pop("outputs", {})
    options = {"outputs": outputs} if transport == "http" else {}
    with REPLICAS[transport](script, **options) as target:
        with Client([target], transport=transport, **{"retry": IMPATIENT, "model": FILMS, **settings}) as client:
            yield client, script


def test_recommend_and_similar_carry_every_field(transport):
    """O8: what is asked arrives whole, what is answered comes back as plain values, whatever the transport."""
    with connected(transport) as (client, script):
        answer = client.recommend(
            "ü1",
            history=["i0", "ä ö"],
            k=3,
            exclude=("i2",),
            include=(item for item in ["i1", "ä ö"]),
            filters={"language": ["fr", "de"]},
            diversity=0.5,
            profile="fast",
            weights={"text": 2},
            timeout=5,
            model=Model("films", version=3),
        )
        assert answer == sdk.ItemList(
            items=tuple(sdk.Item(*item) for item in fake_replicas.ITEMS),
            model=Model("films", 3),
            members_used=("text", "image"),
        )
        assert [item.item_id for item in answer] == ["i1", "ä ö"] and len(answer) == 2
        assert client.similar("i1", k=2, model=Model("films", label="canary")) == answer
    (_, asked), (_, like) = script.calls
    if transport == "grpc":
        assert asked == wire.RecommendRequest(
            model_name="films",
            version=3,
            user_id="ü1",
            history=["i0", "ä ö"],
            k=3,
            exclude=["i2"],
            include=["i1", "ä ö"],
            filters=[wire.Filter(column="language", values=["fr", "de"])],
            diversity=0.5,
            profile="fast",
            weights=[wire.Weight(member="text", factor=2)],
        )
        assert like == wire.SimilarRequest(model_name="films", version_label="canary", item_id="i1", k=2)
    else:
        assert 0 < asked.pop("timeout_ms") <= 5000
        assert asked == {
            "model": "films",
            "version": 3,
            "user_id": "ü1",
            "history": ["i0", "ä ö"],
            "k": 3,
            "exclude": ["i2"],
            "include": ["i1", "ä ö"],
            "filters": {"language": ["fr", "de"]},
            "diversity": 0.5,
            "profile": "fast",
            "weights": {"text": 2.0},
        }
        assert like == {"model": "films", "label": "canary", "item_id": "i1", "k": 2}


KINDS = {"float32": "DT_FLOAT", "float64": "DT_DOUBLE", "int32": "DT_INT32", "int64": "DT_INT64", "bool": "DT_BOOL"}


def test_predict_answers_arrays_with_their_dtypes(transport):
    """O8: the same arrays come back, text as bytes, -inf as it is."""
    inputs = {kind: np.array([[0, 1], [1, 0]], kind) for kind in KINDS}
    inputs["float32"][0, 0] = -np.inf
    texts = np.array(["ä", b"b\xff\x00", ""], object)
    with connected(transport, outputs=KINDS | {"texts": "DT_STRING"}) as (client, _):
        answer = client.predict("echo", {**inputs, "texts": texts})
        assert set(answer) == {*KINDS, "texts"}
        for kind, value in inputs.items():
            assert answer[kind].dtype == kind
            np.testing.assert_array_equal(answer[kind], value)
        assert answer["texts"].tolist() == ["ä".encode(), b"b\xff\x00", b""]
    with connected(transport, outputs={"x": "DT_FLOAT"}) as (client, script):
        answer = client.predict("echo", {"x": [1.5, 2]}, model=Model("films", label="stable"))
        assert answer["x"].tolist() == [1.5, 2.0] and answer["x"].dtype == np.float32
        if transport == "http":  # where the metadata say so; over gRPC it is the server's to say
            with pytest.raises(sdk.NotFound, match="has the signatures echo; received 'other'"):
                client.predict("other", {"x": [1.0]})
        for wrong in ({"x": [[1], [1, 2]]}, {"x": [object()]}, {"x": np.array([1j])}):
            with pytest.raises(sdk.InvalidRequest, match=r"'x' must (hold|be an array)"):
                client.predict("echo", wrong)
    path, request = script.calls[0]
    if transport == "grpc":
        assert (request.model_spec.version_label, request.model_spec.signature_name) == ("stable", "echo")
        assert request.inputs["x"].dtype == 1
    else:
        assert path == "/v1/models/films/labels/stable:predict" and request["signature_name"] == "echo"


def test_outputs_that_a_new_version_names_otherwise_are_found():
    """Over HTTP their types are in the metadata, which are asked again when they no longer fit."""
    with connected("http", outputs={"a": "DT_INT32", "b": "DT_INT32"}) as (client, script):
        assert client.predict("echo", {"a": [1], "b": [2]})["b"].tolist() == [2]
        script.server.metadata = metadata({"a": "DT_INT32", "c": "DT_FLOAT"})
        assert client.predict("echo", {"a": [1], "c": [2]})["c"].dtype == np.float32
        with pytest.raises(sdk.BadAnswer, match="the outputs of its metadata"):
            client.predict("echo", {"a": [1], "d": [2]})


def test_status_names_versions_states_and_errors(transport):
    with connected(transport) as (client, _):
        expected = [sdk.VersionStatus(3, "AVAILABLE"), sdk.VersionStatus(4, "END", "damaged")]
        assert client.status() == expected


def test_tensors_are_those_of_tensorflow():
    """O4 O8: what we write TensorFlow reads and the other way round, for every type, scalars, no values at all, and
    the short forms that servers use."""
    import tensorflow as tf

    draw = np.random.default_rng(0)
    for kind in (*KINDS, "uint8", "int8", "int16", "uint16", "float16", "uint32", "uint64"):
        for shape in ((), (1,), (0, 3), (2, 3), (4, 1, 2)):
            array = draw.integers(0, 2 if kind == "bool" else 100, shape).astype(kind)
            theirs = type(tf.make_tensor_proto(1))
            ours = to_proto("x", array)
            np.testing.assert_array_equal(tf.make_ndarray(theirs.FromString(ours.SerializeToString())), array)
            back = to_array("x", wire.TensorProto.FromString(tf.make_tensor_proto(array).SerializeToString()))
            assert back.dtype == array.dtype and back.shape == array.shape
            np.testing.assert_array_equal(back, array)
    texts = np.array([["ä", b"\xff"]], object)
    proto = type(tf.make_tensor_proto(1)).FromString(to_proto("x", texts).SerializeToString())
    assert tf.make_ndarray(proto).tolist() == [["ä".encode(), b"\xff"]]
    assert to_proto("x", 2).dtype == 3 and to_proto("x", [2**40]).dtype == 9 and to_proto("x", 0.5).dtype == 1
    assert to_proto("x", [-(2**31)]).dtype == 3 and to_proto("x", [-(2**31) - 1]).dtype == 9


def test_the_last_value_of_a_tensor_stands_for_the_missing_ones():
    proto = wire.TensorProto(dtype=1, float_val=[1.0, 2.0])
    proto.tensor_shape.dim.add(size=4)
    assert to_array("x", proto).tolist() == [1.0, 2.0, 2.0, 2.0]
    assert to_array("x", wire.TensorProto(dtype=3)).tolist() == 0


@pytest.mark.parametrize(
    "proto",
    [
        {"dtype": 1, "size": LARGEST + 1},
        {"dtype": 1, "size": -1},
        {"dtype": 1, "size": 2, "tensor_content": b"abc"},
        {"dtype": 3, "size": 1, "int_val": [1, 2]},
        {"dtype": 21, "size": 1},
    ],
)
def test_tensors_that_cannot_be_meant_are_refused(proto):
    size = proto.pop("size")
    message = wire.TensorProto(**proto)
    message.tensor_shape.dim.add(size=size)
    with pytest.raises(sdk.BadAnswer, match="'x'"):
        to_array("x", message)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("INVALID_ARGUMENT", sdk.InvalidRequest),
        ("NOT_FOUND", sdk.NotFound),
        ("UNAUTHENTICATED", sdk.NotAllowed),
        ("PERMISSION_DENIED", sdk.NotAllowed),
        ("INTERNAL", sdk.ClientError),
    ],
)
def test_final_errors_have_classes_and_are_asked_once(transport, code, error):
    with connected(transport, Fault(code)) as (client, script):
        with pytest.raises(error, match=f"the script says {code}") as caught:
            client.recommend("u")
        assert (caught.value.code, caught.value.attempts, len(script.calls)) == (code, 1, 1)


def test_retries_until_an_answer_or_the_last_attempt(transport):
    """O8: UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, four times in all."""
    busy = [Fault("UNAVAILABLE"), Fault("RESOURCE_EXHAUSTED"), Fault("UNAVAILABLE")]
    with connected(transport, *busy) as (client, script):
        assert len(client.recommend("u")) == 2 and len(script.calls) == 4
    with connected(transport, *[Fault("RESOURCE_EXHAUSTED")] * 9) as (client, script):
        with pytest.raises(sdk.Overloaded) as caught:
            client.similar("i1")
        assert caught.value.attempts == len(script.calls) == 4
    with connected(transport, Fault("UNAVAILABLE"), retry=RetryPolicy(attempts=1)) as (client, script):
        with pytest.raises(sdk.Unavailable):
            client.recommend("u")
        assert len(script.calls) == 1


def test_retry_after_is_honoured_within_the_deadline(transport):
    """O8: no sooner than the server asks for; not at all where the deadline comes before."""
    with connected(transport, Fault("RESOURCE_EXHAUSTED", 0.2), Fault("RESOURCE_EXHAUSTED", 60)) as (client, script):
        start = time.monotonic()
        with pytest.raises(sdk.Overloaded) as caught:
            client.recommend("u")
        assert 0.2 <= time.monotonic() - start < 5
        assert len(script.calls) == 2 and caught.value.retry_after == 60


def test_a_deadline_holds(transport):
    with connected(transport, 5.0) as (client, script):
        start = time.monotonic()
        with pytest.raises(sdk.DeadlineExceeded):
            client.recommend("u", timeout=0.2)
        assert time.monotonic() - start < 2
        with pytest.raises(sdk.InvalidRequest, match="above 0"):
            client.recommend("u", timeout=0)
        script.closing.set()


def test_a_server_that_sends_byte_by_byte_is_given_up():
    """A slow answer over HTTP counts as a whole: every byte renews Python's own timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def drip():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
                    if stop.wait(0.05):
                        return
                    connection.send(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            target = f"127.0.0.1:{listener.getsockname()[1]}"
            with Client([target], transport="http", timeout=0.3) as client:
                start = time.monotonic()
                with pytest.raises(sdk.DeadlineExceeded):
                    client.recommend("u")
                assert time.monotonic() - start < 2
        finally:
            stop.set()
            thread.join()


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self):
        self.now = 0.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def scripted_caller(answers, policy, targets=1):
    """A caller over doors that are lists of errors, which they raise one after the other."""
    clock = Clock()
    doors = [(str(number), answers if targets == 1 else answers[number]) for number in range(targets)]

    def ask(door, seconds):
        if door:
            error = door.pop(0)
            clock.now += seconds if isinstance(error, sdk.DeadlineExceeded) else 0.0
            raise error
        return "answer"

    replicas = Replicas(doors, clock)
    return Caller(replicas, policy, clock, clock.sleep), ask, clock, replicas


def test_waits_grow_and_are_random():
    """Full jitter: uniform from 0 to the bound, which doubles."""
    policy = RetryPolicy(first_wait=0.1, longest_wait=1.0)
    for retry, bound in ((1, 0.2), (2, 0.4), (3, 0.8), (9, 1.0)):
        waits = np.array([policy.wait(retry) for _ in range(2000)])
        assert 0 <= waits.min() < 0.05 * bound and 0.95 * bound < waits.max() <= bound
        assert abs(waits.mean() - bound / 2) < 0.05 * bound
    with pytest.raises(ValueError, match="at least 1"):
        RetryPolicy(attempts=0)


def test_the_budget_ends_retries():
    """Nobody is buried: with a reserve of 3, a fourth retry needs calls that went well before it."""
    budget = Budget(RetryPolicy(share=0.5, reserve=3))
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]
    budget.deposit()
    assert not budget.withdraw()
    budget.deposit()
    assert budget.withdraw()
    errors = [sdk.Overloaded("full") for _ in range(100)]
    caller, ask, _, _ = scripted_caller(errors, RetryPolicy(share=0.0, reserve=5))
    for _ in range(10):
        with pytest.raises(sdk.Overloaded):
            caller.call(ask, 60)
    assert len(errors) == 100 - 10 - 5


def test_moving_on_from_a_dead_replica_is_free_and_instant():
    doors = [[sdk.Unavailable("gone")], [sdk.Unavailable("gone")], []]
    caller, ask, clock, _ = scripted_caller(doors, RetryPolicy(attempts=1, reserve=0), targets=3)
    assert caller.call(ask, 1) == "answer" and clock.slept == []


def test_a_replica_that_hangs_costs_half_of_the_time_and_is_left_alone_at_the_third():
    doors = [[sdk.DeadlineExceeded("late") for _ in range(9)], []]
    caller, ask, clock, replicas = scripted_caller(doors, RetryPolicy(first_wait=0.0), targets=2)
    for _ in range(2 * TIMEOUTS + 4):
        start = clock.now
        assert caller.call(ask, 1.0) == "answer" and clock.now - start <= 0.5
    assert len(doors[0]) == 9 - TIMEOUTS and replicas.all[0].failures == 1
    clock.now += 60
    for _ in range(3):
        assert caller.call(ask, 1.0) == "answer"
    assert len(doors[0]) < 9 - TIMEOUTS  # one call looked whether it is back


def test_benches_grow_and_one_call_looks_whether_it_is_back():
    clock = Clock()
    replicas = Replicas([("a", "a"), ("b", "b")], clock)
    dead, alive = replicas.all
    for failures in range(1, 12):
        clock.now = dead.out_until
        replicas.failed(dead)
        replicas.failed(dead)  # of a call that was under way: counts once
        bound = min(30.0, 0.5 * 2.0 ** (failures - 1))
        assert dead.failures == failures and bound / 2 <= dead.out_until - clock.now <= bound
        assert replicas.lease(set()) is alive
        replicas.release(alive)
    clock.now = dead.out_until
    leased = [replicas.lease(set()) for _ in range(4)]
    assert leased.count(dead) == 1
    replicas.answered(dead)
    assert dead.failures == 0 and replicas.lease(set()) is dead  # the one with the fewest calls
    for replica in replicas.all:
        replicas.failed(replica)
    assert replicas.lease(set()) in replicas.all  # all are out: any answer is better than none


def test_overload_rests_one_replica_and_asks_another(transport):
    full, free = Script(*[Fault("RESOURCE_EXHAUSTED", 30)] * 50), Script()
    with REPLICAS[transport](full) as first, REPLICAS[transport](free) as second:
        with Client([first, second], transport=transport, retry=IMPATIENT) as client:
            for _ in range(10):
                client.recommend("u")
    assert len(full.calls) == 1 and len(free.calls) == 10


def test_a_replica_that_comes_back_is_asked_again(transport, monkeypatch):
    """O10: no call fails while one of two servers is away, and it is used again when it is back."""
    monkeypatch.setattr("serving.client.replicas.FIRST_BENCH", 0.05)
    with REPLICAS[transport](Script()) as stays:
        with REPLICAS[transport](Script()) as goes:
            client = Client([goes, stays], transport=transport, retry=IMPATIENT)
            for _ in range(4):
                client.recommend("u")
        with client:
            for _ in range(20):
                client.recommend("u")
            back = Script()
            with REPLICAS[transport](back, port=int(goes.rpartition(":")[2])):
                for _ in range(400):
                    client.recommend("u")
                    if len(back.calls) > 3:
                        break
                    time.sleep(0.02)
                assert len(back.calls) > 3


def test_calls_go_round_the_servers_behind_one_name():
    """O10: a headless service is one target; each of its servers gets calls."""
    first, second = Script(), Script()
    with grpc_replica(first) as one, grpc_replica(second) as two:
        door = GrpcDoor(f"ipv4:{one},{two}", "", None, 2**20)  # what a name of two addresses resolves to
        for _ in range(2000):
            door.similar(SimilarRequest(FILMS, "i1"), 5.0)
            if min(len(first.calls), len(second.calls)) > 5:
                break
            time.sleep(0.002)  # the second connection may take a moment
        door.close()
    assert len(first.calls) > 5 and len(second.calls) > 5


def test_a_killed_replica_costs_no_answer():
    """O10: eight threads under way, SIGKILL to one of two server processes, not one failed call."""
    program = [sys.executable, fake_replicas.__file__, "30"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}) as victim:
        target = victim.stdout.readline().decode().strip()
        survivor = Script()
        with grpc_replica(survivor) as other, Client([target, other], retry=IMPATIENT) as client:
            stop = threading.Event()

            def work(number):
                answers = 0
                while not stop.is_set():
                    answers += len(client.recommend(f"u{number}")) == 2
                return answers

            with ThreadPoolExecutor(8) as pool:
                workers = [pool.submit(work, number) for number in range(8)]
                time.sleep(0.4)
                before = len(survivor.calls)
                victim.send_signal(signal.SIGKILL)
                time.sleep(0.4)
                stop.set()
                answers = sum(worker.result() for worker in workers)
        assert before < len(survivor.calls) < answers  # both had answered, and the survivor went on


def test_messages_beyond_grpcs_own_limit_pass_and_larger_ones_are_named(transport):
    """O8: 5 MB both ways; beyond `max_message_bytes` a sentence instead of RESOURCE_EXHAUSTED and retries."""
    with connected(transport, outputs={"x": "DT_STRING"}) as (client, script):
        assert client.predict("echo", {"x": ["y" * 5_000_000]})["x"].tolist() == [b"y" * 5_000_000]
        with Client(client.targets, transport=transport, model=FILMS, max_message_bytes=1000) as small:
            with pytest.raises(sdk.InvalidRequest, match="at most 1000 bytes"):
                small.predict("echo", {"x": ["y" * 1000]})
        asked = len(script.calls)
        bound = 70 if transport == "http" else 30
        with Client(client.targets, transport=transport, model=FILMS, max_message_bytes=bound) as small:
            with pytest.raises(sdk.BadAnswer, match="must have at most"):
                small.similar("i1")
        assert len(script.calls) == asked + 1


def test_what_a_server_finds_too_large_is_not_sent_again():
    with grpc_replica(Script(), largest=1000) as target, Client([target], model=FILMS) as client:
        with pytest.raises(sdk.InvalidRequest, match="larger than the server takes") as caught:
            client.predict("echo", {"x": ["y" * 2000]})
        assert caught.value.attempts == 1


def test_kept_connections_that_the_server_closed_are_replaced():
    """A server may close idle connections at any time; that is no failure of it."""
    with connected("http", retry=RetryPolicy(attempts=1)) as (client, script):
        client.recommend("u")
        script.server.hang_up()
        assert len(client.recommend("u")) == 2
        assert client._replicas.all[0].failures == 0


def test_half_an_answer_is_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"items": []')

        thread = threading.Thread(target=answer)
        thread.start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with Client([target], transport="http", retry=RetryPolicy(attempts=2, first_wait=0)) as client:
            with pytest.raises(sdk.Unavailable, match="must be a server that answers"):
                client.recommend("u")
        thread.join()


def test_threads_share_one_client(transport):
    with connected(transport) as (client, script), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: client.recommend(f"u{number}"), range(80)))
        assert len(set(map(len, answers))) == 1 and len(script.calls) == 80
        users = [request.user_id if transport == "grpc" else request["user_id"] for _, request in script.calls]
        assert sorted(users) == sorted(f"u{number}" for number in range(80))


def test_tokens_travel_in_the_header_and_show_nowhere_else(transport):
    secret = "s3cret-token"
    with connected(transport, token=secret) as (client, script):
        client.recommend("u")
        script.steps.append(Fault("UNAUTHENTICATED"))
        with pytest.raises(sdk.NotAllowed) as caught:
            client.recommend("u")
        assert secret not in repr(client) + str(caught.value) + repr(caught.value)
        sent = script.headers[0]
        assert (sent.get("authorization") or sent.get("Authorization")) == f"Bearer {secret}"
    with pytest.raises(ValueError, match="must not travel in plain text"):
        Client(["example.org:8500"], token=secret, transport=transport)
    Client(["[::1]:8500"], token=secret, transport=transport).close()


@pytest.mark.parametrize(
    ("targets", "settings", "sentence"),
    [
        ([], {}, "at least one server"),
        (["a:1", "a:1"], {}, "each once"),
        (["host"], {}, "must be host:port"),
        (["host:0"], {}, "must be host:port"),
        (["::1:8500"], {}, "must be host:port"),
        (["a:1"], {"timeout": 0}, "must be above 0"),
        (["a:1"], {"timeout": float("nan")}, "must be above 0"),
        (["a:1"], {"timeout": float("inf")}, "at most 1,000,000 seconds"),
        (["a:1"], {"transport": "carrier pigeon"}, "'grpc' or 'http'"),
    ],
)
def test_settings_that_cannot_be_meant(targets, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Client(targets, **settings)


def test_requests_that_cannot_be_meant(transport):
    with connected(transport) as (client, script):
        for wrong in ({"history": "i1"}, {"user_id": 42}, {"k": 0}, {"k": "3"}, {"exclude": [7]}, {"k": 2**31}):
            with pytest.raises(sdk.InvalidRequest, match="must be"):
                client.recommend(**wrong)
        assert script.calls == []
    with pytest.raises(sdk.InvalidRequest, match="must be open"):
        client.recommend("u")
    with pytest.raises(ValueError, match="by its version or by a label"):
        Model("films", 3, "canary")
    with Client(["localhost:1"], transport="http") as nameless:
        with pytest.raises(sdk.InvalidRequest, match="needs the name of the model"):
            nameless.status()
    with pytest.raises(ValueError, match="both or neither"):
        sdk.TLS(certificate="x.pem")
    assert type(of_code("ABORTED", "x")) is sdk.ClientError


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"timeout": 1e12},
        {"user_id": "\ud800"},
        {"history": ["\ud800"]},
        {"filters": {"\ud800": ["x"]}},
        {"filters": 5},
        {"weights": {"\ud800": 1.0}},
        {"weights": {"text": "much"}},
        {"diversity": "x"},
        {"profile": "\ud800"},
        {"model": Model("\ud800")},
        {"model": Model("films", label="\ud800")},
        {"model": Model("films", version=0)},
        {"model": Model("films", version=-1)},
        {"model": Model("films", version=2**70)},
    ],
)
def test_both_transports_refuse_the_same_before_anything_is_sent(transport, wrong):
    """O8: the largest time that is allowed is one that both can wait for."""
    with connected(transport) as (client, script):
        with pytest.raises(sdk.InvalidRequest, match="must be"):
            client.recommend(**wrong)
        assert script.calls == []
        assert len(client.recommend("u", timeout=1e6, model=Model("films", version=np.int64(3)))) == 2


def test_text_that_is_no_unicode_is_not_predicted_with(transport):
    with connected(transport, outputs={"x": "DT_STRING"}) as (client, script):
        for signature, inputs in (("\ud800", {"x": ["a"]}), ("echo", {"\ud800": ["a"]}), ("echo", {"x": ["\ud800"]})):
            with pytest.raises(sdk.InvalidRequest, match="valid Unicode"):
                client.predict(signature, inputs)
        assert script.calls == []


def test_certificates_that_cannot_be_read_are_refused_at_once(transport, certificates, tmp_path):
    """O8: a missing file, one that is no certificate, and a key of another certificate."""
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no pem")
    authority, certificate = certificates / "authority.crt", certificates / "client.crt"
    for tls in (
        sdk.TLS(tmp_path / "missing.pem"),
        sdk.TLS(garbage),
        sdk.TLS(authority, certificate, garbage),
        sdk.TLS(authority, certificate, certificates / "server.key"),
    ):
        with pytest.raises(ValueError, match="must be readable PEM files"):
            Client(["localhost:1"], transport=transport, tls=tls)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with the certificates of an authority, and of a server and a client that it vouches for."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    for name in ("server", "client"):
        authority.issue(name)
    return folder


def secure_replica(transport, script, folder):
    if transport == "http":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "authority.crt"))
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        context.verify_mode = ssl.CERT_REQUIRED
        return http_replica(script, context=context)
    pair = ((folder / "server.key").read_bytes(), (folder / "server.crt").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], (folder / "authority.crt").read_bytes(), require_client_auth=True)
    return grpc_replica(script, credentials=credentials)


def test_mutual_tls(transport, certificates):
    """O8: both sides show certificates; a client without one, or one that does not trust the server, gets nothing."""
    script = Script()
    mutual = sdk.TLS(certificates / "authority.crt", certificates / "client.crt", certificates / "client.key")
    once = RetryPolicy(attempts=1)
    with secure_replica(transport, script, certificates) as target:
        with Client([target], transport=transport, tls=mutual, token="t") as client:
            assert len(client.recommend("u")) == 2
        for wrong in (sdk.TLS(certificates / "authority.crt"), sdk.TLS(certificates / "client.crt"), None):
            with Client([target], transport=transport, tls=wrong, retry=once, timeout=2) as client:
                with pytest.raises((sdk.Unavailable, sdk.DeadlineExceeded)):
                    client.recommend("u")
    assert len(script.calls) == 1


@contextlib.contextmanager
def real_doors(artifact):
    """Targets of both doors of our own server over one artifact, by transport."""
    from serving.grpc_server import GrpcDoor as RealDoor
    from serving.model_store import ModelConfig, ModelStore
    from serving.recommending import Recommending
    from serving.rest_guard import RestSettings, uvicorn_config
    from serving.rest_server import app

    store = ModelStore([ModelConfig("toy", artifact.parent)])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    try:
        store.poll()
        recommending = Recommending(store)
        door = RealDoor(store, recommending)
        port = run(door.start("127.0.0.1", 0))
        with listening(uvicorn_config(app(store, recommending), RestSettings(), "127.0.0.1", 0)) as rest:
            yield {"grpc": f"127.0.0.1:{port}", "http": f"127.0.0.1:{rest.port}"}
        run(door.stop(0))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        store.close()


def test_both_transports_answer_as_a_batch_job_does(artifact, tmp_path):
    """O4 O8 O16: against our own server, gRPC = HTTP = batch for the same users; and errors have the same classes."""
    import pyarrow.parquet as pq

    from serving.batch import Lists, recommend_all
    from serving.messages import RecommendRequest
    from serving.predictor import Predictor

    users, asked = ["u0", "u1", "u 2"], {"k": 3, "exclude": ("i4",), "filters": {"title": ("Zero", "Three", "Four")}}
    recommend_all(Lists(Predictor.load(artifact), artifact, RecommendRequest(**asked)), users, tmp_path / "x.parquet")
    batch = pq.read_table(tmp_path / "x.parquet").to_pandas()
    row = {"user_id": ["u0"], "history": [[""]], "k": [2], "exclude": [[""]], "include": [[""]]}
    answers = {}
    with real_doors(artifact) as targets:
        for name, target in targets.items():
            with Client([target], transport=name, model=Model("toy")) as client:
                lists = [client.recommend(user, **asked) for user in users]
                rows = [(user, item) for user, answer in zip(users, lists, strict=True) for item in answer]
                assert [(user, item.item_id, item.score) for user, item in rows] == list(
                    zip(batch.user_id, batch.item_id, batch.score, strict=True)
                )
                assert [item.contributions["place"] for _, item in rows] == batch.contribution_place.tolist()
                assert client.status() == [sdk.VersionStatus(1, "AVAILABLE")]
                found = client.predict("recommend", row)
                assert found["item_ids"].tolist() == [[b"i1", b"i2", b"", b""]] and found["scores"].dtype == np.float32
                assert found["scores"][0, :2].tolist() == [9.0, -2.0] and found["known_user"].tolist() == [True]
                assert not np.isfinite(found["scores"][0, 2:]).any()  # -inf, for which JSON has no word
                for error, call in (
                    (sdk.InvalidRequest, lambda: client.recommend("u0", k=99)),
                    (sdk.NotFound, lambda: client.recommend("u0", model=Model("other"))),
                    (sdk.InvalidRequest, lambda: client.predict("recommend", {**row, "k": [0.5]})),
                ):
                    with pytest.raises(error):
                        call()
                answers[name] = [lists, client.recommend(history=["i2"], k=4)]
    assert answers["grpc"] == answers["http"]


def test_installs_alone_without_tensorflow(tmp_path):
    """O8: a wheel from the folder alone, some hundred kB, that imports without TensorFlow, and speaks HTTP without
    grpcio and protobuf."""
    shutil.copytree(ROOT / "serving/client", tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    target = tmp_path / "target"
    subprocess.run(
        [*pip, "--no-compile", "--disable-pip-version-check", "--target", str(target), str(tmp_path / "source")],
        check=True,
        capture_output=True,
    )
    package = target / "fusion_client"
    assert {"py.typed", "recommendation.proto", "wire.py"} <= {path.name for path in package.iterdir()}
    assert sum(path.stat().st_size for path in target.rglob("*")) < 300_000
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import fusion_client
client = fusion_client.Client(["localhost:1"], transport="http")
assert "grpc" not in sys.modules and "google.protobuf" not in sys.modules
fusion_client.Client(["localhost:1"]).close()
ours = [name for name in sys.modules if name.split(".")[0] in ("serving", "fusion", "tensorflow", "pandas")]
assert not ours, ours
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_its_example_runs():
    assert doctest.testmod(sdk).attempted > 2 and doctest.testmod(sdk).failed == 0


def test_imports_nothing_of_ours_from_outside_its_folder():
    for path in (ROOT / "serving/client").glob("*.py"):
        text = path.read_text(encoding="utf-8").replace(">>> from serving.client import Client", "")
        assert not re.search(r"^\s*(from|import) (serving|fusion|recsys|tensorflow)\b", text, re.M), path.name
