"""The whole server: `tools/serve.py` as a process, both doors, the order to stop, a dead worker, a taken port."""

import http.client
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from fusion.export.manifest import GateError, MachineError, publish
from serving import metrics, server, worker
from serving.client import wire
from serving.model_config import ModelConfig, named_models
from serving.server import serve
from serving.settings import ServerSettings

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*arguments):
    """The process, and what it announced; ended in any case."""
    command = [sys.executable, "tools/serve.py", *map(str, arguments), "--port", "0", "--rest-port", "0", "--json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    log = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr))
    reader.start()
    try:
        line = process.stdout.readline()
        assert line, "".join(log)
        yield process, json.loads(line), log
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
            for child in children:
                if child.is_running():
                    child.kill()
            process.wait(10)
            reader.join()
            process.stdout.close()
            process.stderr.close()


def get(facts, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{facts['ports']['rest']}{path}", timeout=10) as answer:
        return answer.read()


def status(facts, host):
    """Of an answer to somebody who calls the server by this name."""
    connection = http.client.HTTPConnection("127.0.0.1", facts["ports"]["rest"], timeout=10)
    with closing(connection):
        connection.request("GET", "/healthz", headers={"host": host})
        return connection.getresponse().status


def post(facts, path, body):
    url = f"http://127.0.0.1:{facts['ports']['rest']}{path}"
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read()


@contextmanager
def recommends(facts):
    """Asks for the best item of a user."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{facts['ports']['grpc']}", options=options) as channel:
        call = channel.unary_unary(wire.RECOMMEND, response_deserializer=wire.ItemList.FromString)
        request = wire.RecommendRequest(user_id="u1", k=1).SerializeToString()
        yield lambda: call(request, timeout=20, wait_for_ready=True)


def test_both_doors_answer_alike_roll_over_and_drain(artifact, tmp_path):
    """O7 O10 O13: gRPC and REST from one process; a published version takes over while clients ask, and none of them
    fails; SIGTERM ends with 0 after what is inside is answered."""
    publish(artifact, tmp_path, "films")
    more = ("--feedback", tmp_path / "told", "--host-name", "Films.example", "--cores", "2")
    with served(tmp_path, *more) as (process, facts, log), recommends(facts) as ask:
        event = json.dumps({"events": [{"user_id": "u1", "item_id": "i2"}]}).encode()
        post(facts, "/v1/feedback", event)
        assert facts["models"] == {"films": [1]} and facts["processes"] == [process.pid]
        answer = json.loads(post(facts, "/v1/recommend", json.dumps({"user_id": "u1", "k": 1}).encode()))
        assert answer["items"][0]["item_id"] == ask().items[0].item_id == "i2"
        assert [status(facts, f"{name}.example") for name in ("films", "songs")] == [200, 403]

        versions, failures, stop = set(), [], threading.Event()

        def client():
            while not stop.is_set():
                try:
                    versions.add(ask().version)
                except grpc.RpcError as error:
                    failures.append(error)

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        publish(artifact, tmp_path, "films")
        limit = time.monotonic() + 20
        while 2 not in versions and time.monotonic() < limit:
            time.sleep(0.05)
        stop.set()
        for thread in clients:
            thread.join()
        assert versions == {1, 2} and not failures
        assert json.loads(get(facts, "/readyz"))["models"]["films"]["2"]["state"] == "AVAILABLE"
        assert b':tensorflow:serving:request_count{model_name="films",status="OK"}' in get(
            facts, "/monitoring/prometheus/metrics"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert any(b"i2" in path.read_bytes() for path in (tmp_path / "told").rglob("*") if path.is_file())
    assert all(json.loads(line)["message"] for line in log if line.startswith("{") and "access" not in line)


@pytest.mark.slow
def test_a_killed_worker_costs_no_answer_that_a_retry_does_not_bring(artifact, tmp_path):
    """O10: two workers share the ports; one is killed with -9, another takes its place, and clients never notice more
    than a retry. Every worker is gone in the end."""
    publish(artifact, tmp_path, "films")
    with served(tmp_path / "films", "--workers", "2") as (process, facts, _):
        first, second = facts["processes"]
        answers, lost, stop = [], [], threading.Event()

        def client():
            while not stop.is_set():
                with recommends(facts) as ask:
                    for attempt in range(4):
                        try:
                            answers.append(ask().items[0].item_id)
                            break
                        except grpc.RpcError as error:
                            if error.code() != grpc.StatusCode.UNAVAILABLE or attempt == 3:
                                lost.append(error)

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        time.sleep(1)
        try:
            os.kill(first, signal.SIGKILL)
            limit = time.monotonic() + 60
            while len(workers := worker_ids(process)) < 2 and time.monotonic() < limit:
                time.sleep(0.2)
            time.sleep(1)
        finally:
            stop.set()
            for thread in clients:
                thread.join()
        assert not lost and set(answers) == {"i2"} and len(answers) > 20
        assert second in workers and first not in workers
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert not any(psutil.pid_exists(worker) for worker in workers)


def worker_ids(process):
    """The workers of a supervisor that are alive; it has another child, which only watches what processes share."""
    children = [child for child in psutil.Process(process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    return {child.pid for child in children if "spawn_main" in " ".join(child.cmdline())}


def test_a_taken_port_is_one_sentence_before_anything_is_loaded(artifact):
    """Exit code 5 (`MachineError`), also where the other listener would share its port."""
    for shared in (False, True):
        with socket.socket() as taken:
            if shared:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            settings = ServerSettings((ModelConfig("films", artifact),), grpc_port=0, rest_port=port, workers=2)
            with pytest.raises(MachineError, match=f"the port {port} of 127.0.0.1 must be free"):
                serve(settings, print)


@pytest.fixture
def signals():
    """What a test does about signals is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


class Starting:
    """A worker process that does not come to an answer, and what it inherits."""

    def __init__(self, inherited):
        self.inherited, self.exitcode, self.pid = inherited, None, 1

    def start(self):
        self.inherited.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    def terminate(self):
        self.exitcode = -15

    def join(self, timeout=None):
        pass


@pytest.mark.parametrize(("order", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, None)])
def test_a_server_that_is_stopped_while_its_workers_start_ends_as_one_process_does(signals, monkeypatch, order, raised):
    """Ctrl-C ends with 130, though workers die of the same order; it does not reach those that still import."""
    supervisor = server._Supervisor(ServerSettings((), grpc_port=0, rest_port=0, workers=2))
    inherited, waited, wait = [], [], server.wait

    def stopped(connections, timeout):
        if not waited:
            os.kill(os.getpid(), order)  # and the process at the other end dies: nothing is left to be received
        waited.append(timeout)
        return wait(connections, timeout)

    monkeypatch.setattr(server.resource_tracker, "ensure_running", lambda: None)
    monkeypatch.setattr(supervisor._spawn, "Process", lambda **_: Starting(inherited), raising=False)
    monkeypatch.setattr(server, "wait", stopped)
    if raised is None:
        supervisor.run(pytest.fail)
    else:
        with pytest.raises(raised):
            supervisor.run(pytest.fail)
    assert inherited == [True, True] and waited
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert all(process.exitcode == -15 for process in supervisor._workers)


def test_a_worker_leaves_ctrl_c_to_its_supervisor(signals, monkeypatch, tmp_path):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as it is started
    seen = []

    class Worker:
        def __init__(self, settings, shared):
            pass

        def run(self, announce):
            blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
            seen.append((signal.getsignal(signal.SIGINT), blocked))

    monkeypatch.setattr(worker, "Worker", Worker)
    monkeypatch.setattr(server, "configure_logging", lambda: None)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        server._work(ServerSettings(()), tmp_path, theirs)
    assert seen == [(signal.SIG_IGN, False)], "blocked, it would be so in all that alarms start, and for good"


def test_a_process_ends_without_the_threads_that_hang_in_a_model(monkeypatch):
    ends, hold = [], threading.Event()
    monkeypatch.setattr(worker.os, "_exit", ends.append)
    monkeypatch.setattr(worker.logging, "shutdown", lambda: None)
    worker._leave_hung_threads()
    assert ends == []
    thread = threading.Thread(target=hold.wait, args=(20,), name="batch-films-0", daemon=True)
    thread.start()
    try:
        worker._leave_hung_threads()
    finally:
        hold.set()
        thread.join()
    assert ends == [0]


def test_nothing_to_serve_is_one_sentence(artifact, tmp_path):
    broken = tmp_path / "films" / "1"
    shutil.copytree(artifact, broken)
    (broken / "items.parquet").write_bytes(b"")
    settings = ServerSettings((ModelConfig("films", broken.parent),), grpc_port=0, rest_port=0)
    with pytest.raises(GateError, match=r"'films': the artifact version 1 is refused: 'items\.parquet' must"):
        serve(settings, print)


def test_what_a_folder_holds(artifact, tmp_path):
    """A run, a model, several models, and one artifact are all served."""
    for name in ("films", "books"):
        shutil.copytree(artifact, tmp_path / "run" / "export" / name / "3")
    shelf = tmp_path / "run" / "export"
    assert [(m.name, m.folder) for m in named_models(tmp_path / "run")] == [
        ("books", shelf / "books"),
        ("films", shelf / "films"),
    ]
    assert named_models(shelf) == named_models(tmp_path / "run")
    assert named_models(shelf / "films", canary=0.1) == [ModelConfig("films", shelf / "films", 2, canary=0.1)]
    assert named_models(shelf / "films", canary=0.1, latest=3)[0].latest == 3
    assert named_models(shelf / "films" / "3", name="x") == [ModelConfig("x", shelf / "films", versions=(3,))]
    assert named_models(tmp_path / "run" / "nothing") == named_models(tmp_path) == []


def test_numbers_of_several_processes_are_put_together(tmp_path, monkeypatch):
    """P1: whichever worker is asked answers for all; a dead one's counts stay, its gauges go."""
    ours, other, dead = metrics.Metrics(), metrics.Metrics(), metrics.Metrics()
    which = ("films", "1")
    processes = ((os.getppid(), other), (2**22 + 1, dead), (os.getpid(), ours))
    (tmp_path / "orders.json").write_text("[]")  # of the store, in the same folder
    monkeypatch.setattr(metrics.time, "process_time", lambda: 1.5)
    for number, (process, found) in enumerate(processes, start=1):
        found.share(tmp_path)
        found.watch(lambda n=number: [("serving_queue_depth", which, n), ("serving_version_state", which, 30)])
        for _ in range(number):
            found.request("films", "Predict", "GRPC", "OK", 0.001)
        with monkeypatch.context() as patch:
            patch.setattr(metrics.os, "getpid", lambda p=process: p)
            found.save()
    lines = ours.text().decode().splitlines()
    assert ':tensorflow:serving:request_count{model_name="films",status="OK"} 6' in lines
    assert "serving_cpu_seconds{} 4.5" in lines
    assert 'serving_queue_depth{model_name="films",version="1"} 4' in lines  # 3 of ours, 1 of the other one
    assert 'serving_version_state{model_name="films",version="1"} 30' in lines
    latency = ':tensorflow:serving:request_latency_{}{{model_name="films",API="Predict",entrypoint="GRPC"{}}} {}'
    assert latency.format("bucket", ',le="+Inf"', 6) in lines and latency.format("sum", "", 6000) in lines
    assert any('le="612.' in line and line.endswith(" 0") for line in lines)  # 10 µs x 1.8^7, below 1 ms


def test_numbers_that_the_disk_does_not_take_stop_nothing(tmp_path, caplog):
    found = metrics.Metrics()
    found.share(tmp_path / "gone")
    found.save()
    assert "cannot be written: No such file or directory" in caplog.text
