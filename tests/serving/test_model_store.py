"""Versions come, take over, fail, go back and go away. Most tests load a stand-in instead of TensorFlow; the files,
their manifests and the way they appear are real."""

import functools
import gc
import shutil
import struct
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from fusion.compat import tf
from fusion.export.manifest import (
    EngineError,
    Manifest,
    Signature,
    TensorSpec,
    publish,
    verify_manifest,
    write_manifest,
)
from serving import model_store
from serving.batching import BatchSettings
from serving.errors import (
    ArtifactRefused,
    DeadlineExceeded,
    InvalidRequest,
    NotPossible,
    Unavailable,
    UnknownLabel,
    UnknownModel,
)
from serving.limits import Limits
from serving.metrics import METRICS
from serving.model_store import ModelConfig, ModelStore, Retries, State, release_memory, version_folders
from serving.warmup import MAX_RECORDS, WARMUP_FILE, records

SIGNATURE = Signature({"x": TensorSpec("int64", (None,))}, {"y": TensorSpec("int64", (None,))})


class StandIn:
    """A predictor that adds the number in its file."""

    def __init__(self, folder):
        try:
            self.manifest = verify_manifest(folder)
        except EngineError as error:
            raise ArtifactRefused(str(error)) from error
        self.number = int((folder / "number").read_text())
        self.limits = Limits()

    @classmethod
    def load(cls, folder, limits, cores=None):
        return cls(folder)

    def check(self, signature, inputs):
        return {"x": np.asarray(inputs["x"])}

    def run(self, signature, arrays):
        if (arrays["x"] < 0).any():
            time.sleep(0.2)
        return {"y": arrays["x"] + self.number}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(model_store, "Predictor", StandIn)
    monkeypatch.setattr(model_store, "release_memory", lambda: None)  # collecting beside TensorFlow takes a while


@pytest.fixture
def shelf(tmp_path, stand_in):
    """The folder of the model `toy`."""
    folder = tmp_path / "toy"
    folder.mkdir()
    return folder


@pytest.fixture
def make(shelf):
    made = []

    def build(*configs, **options):
        made.append(ModelStore(configs or [ModelConfig("toy", shelf)], **options))
        made[-1].poll()
        return made[-1]

    yield build
    for store in made:
        store.close()


def artifact_at(folder, number=None):
    folder.mkdir(parents=True)
    (folder / "number").write_text(str(folder.name if number is None else number))
    write_manifest(folder, Manifest(kind="recommender", signatures={"add": SIGNATURE}))
    return folder


def ask(store, x=0, **where):
    with store.lease(**where) as servable:
        return int(servable.call("add", {"x": [x]})["y"][0])


def states(store, name="toy"):
    return {status.version: status.state.name for status in store.statuses(name)}


# ---- versions come and go ------------------------------------------------------------------------------------


def test_a_new_version_takes_over_and_the_old_one_finishes_what_it_has(make, shelf):
    """O10: no request is lost between two versions."""
    artifact_at(shelf / "1")
    store = make()
    assert ask(store, 10) == 11
    with store.lease("toy") as old:
        artifact_at(shelf / "2")
        store.poll()
        assert states(store) == {2: "AVAILABLE", 1: "UNLOADING"}
        assert ask(store, 10) == 12
        assert old.call("add", {"x": [10]})["y"] == [11]
        store.poll()
        assert states(store)[1] == "UNLOADING"
    store.poll()
    assert states(store) == {2: "AVAILABLE", 1: "END"}


def test_an_unloaded_version_leaves_nothing_behind(make, shelf):
    artifact_at(shelf / "1")
    store = make()
    with store.lease("toy") as servable:
        gone = weakref.ref(servable.predictor)
    del servable
    artifact_at(shelf / "2")
    store.poll()
    gc.collect()
    assert gone() is None
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("batch-toy")]) == 1


@pytest.mark.parametrize(
    ("settings", "loaded"),
    [({}, [4]), ({"latest": 2}, [3, 4]), ({"versions": (1, 3, 9)}, [1, 3]), ({"versions": ()}, [1, 2, 3, 4])],
)
def test_policies(make, shelf, settings, loaded):
    for number in (1, 2, 3, 4):
        artifact_at(shelf / str(number))
    store = make(ModelConfig("toy", shelf, **settings))
    assert [n for n, state in sorted(states(store).items()) if state == "AVAILABLE"] == loaded
    assert ask(store, version=loaded[0]) == loaded[0]
    assert ask(store) == loaded[-1]


def test_names_versions_and_labels_that_are_not_there(make, shelf):
    """O7: the sentences are TensorFlow Serving's, which clients compare."""
    artifact_at(shelf / "1")
    store = make()
    for where, error, words in (
        ({"name": "films"}, UnknownModel, r"Servable not found for request: Latest\(films\)"),
        ({"name": "toy", "version": 7}, UnknownModel, r"Servable not found for request: Specific\(toy, 7\)"),
        ({"name": "toy", "label": "stable"}, UnknownLabel, "Unrecognized servable version label: stable"),
        ({"name": "toy", "version": 1, "label": "x"}, InvalidRequest, "received both"),
    ):
        with pytest.raises(error, match=words), store.lease(**where):
            pass
    with pytest.raises(UnknownModel, match="version 7 of model toy"):
        store.statuses("toy", 7)
    assert ask(store, name="") == 1  # the only one


def test_one_artifact_alone_is_version_1_and_odd_folders_are_no_versions(make, shelf, tmp_path):
    artifact_at(shelf / "007", number=7)
    for name in ("latest", ".publishing-1", "x2", "9" * 30):
        (shelf / name).mkdir()
    (shelf / "8").symlink_to(shelf / "007")
    (shelf / "9").write_text("")
    assert version_folders(shelf) == {7: shelf / "007"}
    assert version_folders(shelf / "007") == {1: shelf / "007"}
    assert version_folders(tmp_path / "nowhere") == {}
    assert ask(make(ModelConfig("toy", shelf / "007"))) == 7


def test_vanished_folders_do_not_stop_the_last_version(make, shelf):
    artifact_at(shelf / "1")
    store = make()
    shutil.rmtree(shelf)
    store.poll()
    assert ask(store, 1) == 2


# ---- what cannot be served -----------------------------------------------------------------------------------


def test_a_corrupt_version_never_takes_over_and_says_why(make, shelf):
    """R8: bytes that differ from the manifest are not loaded; neither status nor message show a path."""
    artifact_at(shelf / "1")
    (artifact_at(shelf / "2") / "number").write_text("6")
    before = METRICS.value("serving_load_failures", ("toy",))
    store = make()
    status = store.statuses("toy", 2)[0]
    assert (status.state, status.grpc_code, status.attempts) == (State.END, "FAILED_PRECONDITION", 1)
    assert "SHA-256" in status.error and str(shelf) not in status.error
    assert METRICS.value("serving_load_failures", ("toy",)) == before + 1
    assert ask(store) == 1
    assert store.ready


def test_a_version_that_is_being_copied_waits_until_it_is_whole(make, shelf):
    artifact_at(shelf / "1")
    store = make()
    source = artifact_at(shelf.parent / "2")
    (shelf / "2").mkdir()
    shutil.copy(source / "number", shelf / "2" / "number")
    store.poll()
    assert ask(store) == 1 and "manifest.json" in store.statuses("toy", 2)[0].error
    shutil.copy(source / "manifest.json", shelf / "2" / "manifest.json")
    store.poll()  # at once: its files have changed
    assert ask(store) == 2 and store.statuses("toy", 2)[0].error == ""


def test_loading_is_tried_again_after_growing_pauses_and_then_no_more(make, shelf, monkeypatch):
    artifact_at(shelf / "1")
    now, tries = [1000.0], []
    monkeypatch.setattr(model_store.time, "monotonic", lambda: now[0])

    def load(folder, limits, cores=None):
        tries.append(now[0])
        raise ArtifactRefused("the disk sleeps")

    monkeypatch.setattr(StandIn, "load", load)
    store = make(retries=Retries(attempts=4, pause_s=1))
    for _ in range(40):
        now[0] += 0.5
        store.poll()
    assert tries == [1000, 1001, 1003, 1007]
    assert store.statuses("toy")[0].attempts == 4 and not store.ready


def test_a_version_that_does_not_fit_into_memory_is_refused(make, shelf):
    artifact_at(shelf / "1")
    folder = shelf / "2"
    (folder / "variables").mkdir(parents=True)
    (folder / "variables" / "data").write_bytes(bytes(3_000_000))
    (folder / "core.tflite").write_bytes(bytes(9_000_000))  # not loaded
    (folder / "number").write_text("2")
    write_manifest(folder, Manifest(kind="recommender", signatures={"add": SIGNATURE}))
    store = make(free_memory=lambda: 2_000_000)
    assert ask(store) == 1
    status = store.statuses("toy", 2)[0]
    assert status.grpc_code == "RESOURCE_EXHAUSTED"
    assert "needs about 4 MB of memory; 2 MB are free" in status.error


def test_publishers_that_race_leave_every_version_whole(make, shelf, tmp_path):
    """R8, O9: two publishers at once while the folder is watched; nothing half is ever seen."""
    sources = [artifact_at(tmp_path / f"source{n}", number=n) for n in range(2)]
    publish(sources[0], shelf.parent, "toy")
    store = make()
    store.start(interval_s=0.001)
    threads = [
        threading.Thread(target=lambda s=s: [publish(s, shelf.parent, "toy") for _ in range(8)]) for s in sources
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert ask(store) in (0, 1)
    deadline = time.monotonic() + 5
    while states(store).get(17) != "AVAILABLE" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert states(store)[17] == "AVAILABLE"
    assert not [status.error for status in store.statuses("toy") if status.error]


def test_a_process_that_freezes_its_memory_keeps_graphs_frozen_and_gives_them_back(make, shelf):
    """A collection that walks through every graph would make all requests wait."""

    class Cycle:
        pass

    garbage = Cycle()
    garbage.itself = garbage
    seen = weakref.ref(garbage)
    gc.freeze()
    try:
        del garbage
        before = gc.get_freeze_count()
        artifact_at(shelf / "1")
        make()
        assert gc.get_freeze_count() > before
        release_memory()
        assert seen() is None and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


# ---- labels, canary, rollback, orders ------------------------------------------------------------------------


def test_labels_are_given_only_to_versions_that_are_available(make, shelf):
    for number in (1, 2):
        artifact_at(shelf / str(number))
    store = make(ModelConfig("toy", shelf, latest=2, labels={"stable": 1}))
    assert ask(store, name="toy", label="stable") == 1
    store.assign_label("toy", "stable", 2)
    assert ask(store, name="toy", label="stable") == 2
    with pytest.raises(NotPossible, match="version 3 of 'toy', which is to be 'stable', is not"):
        store.assign_label("toy", "stable", 3)
    assert store.labels("toy") == {"stable": 2}


def test_the_canary_gets_its_share_and_keeps_its_users(make, shelf):
    for number in (1, 2):
        artifact_at(shelf / str(number))
    store = make(ModelConfig("toy", shelf, latest=2, labels={"canary": 2}, canary=0.2))
    assert [ask(store) for _ in range(100)].count(2) == 20
    users = {key: ask(store, key=key) for key in map(str, range(300))}
    assert 30 < list(users.values()).count(2) < 90
    assert users == {key: ask(store, key=key) for key in users}
    assert ask(store, key="\ud800") in (1, 2), "half a character is a user nobody knows, not a fault of ours"
    assert ask(store, name="toy", version=2) == ask(store, name="toy", label="canary") == 2


def test_the_newest_version_is_the_canary_until_it_is_stable(make, shelf):
    """O10: a version that was just published gets its share and not everything, without a label."""
    for number in (1, 2):
        artifact_at(shelf / str(number))
    store = make(ModelConfig("toy", shelf, latest=2, canary=0.1))
    assert [ask(store) for _ in range(100)].count(2) == 10
    artifact_at(shelf / "3")
    store.poll()
    assert sorted({ask(store) for _ in range(100)}) == [2, 3] and [ask(store) for _ in range(100)].count(3) == 10
    store.assign_label("toy", "stable", 3)
    assert {ask(store) for _ in range(100)} == {3}
    store.assign_label("toy", "canary", 2)  # the other way round
    assert [ask(store) for _ in range(100)].count(2) == 10


def test_rollback_under_load_loses_no_request(make, shelf):
    """O10: v1 is loaded again before v2 goes; what is published later is served as usual."""
    artifact_at(shelf / "1")
    artifact_at(shelf / "2")
    store = make()
    assert states(store) == {2: "AVAILABLE", 1: "START"}
    stop, failures, seen = threading.Event(), [], set()

    def client():
        while not stop.is_set():
            try:
                seen.add(ask(store))
            except Exception as error:
                failures.append(error)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    assert store.rollback("toy") == 1
    assert ask(store) == 1
    store.poll()
    assert ask(store) == 1
    artifact_at(shelf / "3")
    store.poll()
    assert ask(store) == 3
    stop.set()
    for thread in clients:
        thread.join()
    assert not failures and seen <= {1, 2, 3}
    with pytest.raises(NotPossible, match="no version before 1"):
        store.rollback("toy"), store.rollback("toy")


def test_a_rollback_skips_what_does_not_load_and_keeps_what_serves(make, shelf):
    artifact_at(shelf / "1")
    (artifact_at(shelf / "2") / "number").write_text("6")
    artifact_at(shelf / "3")
    store = make()
    assert store.rollback("toy") == 1 and ask(store) == 1
    with pytest.raises(NotPossible):
        store.rollback("toy")
    assert ask(store) == 1


def test_a_version_is_left_once_however_many_ask_for_it(make, shelf, tmp_path):
    """P3: processes that meet the same alarm, or two rules for it, do not go back further and further."""
    for number in (1, 2, 3):
        artifact_at(shelf / str(number))
    first, second = (make(shared=tmp_path / "orders.json") for _ in range(2))
    assert [store.rollback("toy", 3) for store in (first, second, second)] == [2, 2, 2]
    first.poll()
    assert ask(first) == ask(second) == 2
    assert first.rollback("toy") == 1, "who names none leaves the newest"


def test_a_version_that_this_process_has_yet_to_load_is_left_as_well(make, shelf, tmp_path):
    """O10: an administrator's call meets any of the processes."""
    for number in (1, 2):
        artifact_at(shelf / str(number))
    first, second = (make(shared=tmp_path / "orders.json") for _ in range(2))
    artifact_at(shelf / "3")
    first.poll()
    assert (ask(first), ask(second)) == (3, 2)
    assert second.rollback("toy", 3) == 2
    for store in (first, second):
        store.poll()
        assert ask(store) == 2


def test_only_what_is_to_be_left_goes(make, shelf):
    """O10: newer versions that are served beside it stay, and so does one that is published at the same moment."""
    for number in (1, 2, 3):
        artifact_at(shelf / str(number))
    store = make(ModelConfig("toy", shelf, versions=()))
    assert store.rollback("toy", 2) == store.rollback("toy", 9) == 3
    assert store.served("toy") == {1, 3} and not store.served("films")
    with pytest.raises(NotPossible, match="no version before 1"):
        store.rollback("toy", 1)
    newest = make()
    artifact_at(shelf / "4")
    assert newest.rollback("toy", 3) == ask(newest) == 4


def test_reload_serves_exactly_what_it_is_told(make, shelf, tmp_path):
    """O7: `HandleReloadConfigRequest` is declarative."""
    for number in (1, 2):
        artifact_at(shelf / str(number))
    other = artifact_at(tmp_path / "other" / "5").parent
    store = make()
    store.reload([ModelConfig("toy", shelf, versions=(1,), labels={"stable": 1}), ModelConfig("other", other)])
    assert store.names() == ["toy", "other"]
    assert ask(store, name="toy") == 1 and ask(store, name="other") == 5
    store.reload([ModelConfig("other", other)])
    with pytest.raises(UnknownModel):
        ask(store, name="toy")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-toy")]
    store.reload([ModelConfig("other", shelf)])  # another folder under the same name
    assert ask(store, name="other") == 2


def test_a_reload_that_fails_changes_nothing(make, shelf, tmp_path):
    artifact_at(shelf / "1")
    broken = artifact_at(tmp_path / "broken" / "1")
    (broken / "number").write_text("6")
    store = make()
    for configs, error in (
        ([ModelConfig("broken", broken.parent)], NotPossible),
        ([ModelConfig("toy", shelf), ModelConfig("toy", shelf)], InvalidRequest),
        ([ModelConfig("toy", shelf, canary=2.0)], InvalidRequest),
        ([ModelConfig("toy", Path("/models/\0"))], InvalidRequest),
        ([ModelConfig("toy", shelf, labels={"stable": 9})], NotPossible),
    ):
        with pytest.raises(error):
            store.reload(configs)
        assert store.names() == ["toy"] and ask(store) == 1 and store.labels("toy") == {}


def test_processes_of_one_server_hear_of_orders(make, shelf, tmp_path):
    """O10: what one worker is ordered, the others and those that start later do as well."""
    for number in (1, 2):
        artifact_at(shelf / str(number))
    config, shared = ModelConfig("toy", shelf, latest=2), tmp_path / "orders.json"
    first, second = make(config, shared=shared), make(config, shared=shared)
    first.assign_label("toy", "stable", 1)
    first.rollback("toy")
    assert ask(second) == 2
    second.poll()
    assert ask(second) == 1 and second.labels("toy") == {"stable": 1}
    assert ask(make(config, shared=shared)) == 1


def test_orders_of_several_processes_at_the_same_moment_are_all_kept(make, shelf, tmp_path):
    """O10: a process that has not heard of an order yet does not write over it."""
    for number in (1, 2):
        artifact_at(shelf / str(number))
    config, shared = ModelConfig("toy", shelf, latest=2), tmp_path / "orders.json"
    stores = [make(config, shared=shared) for _ in range(4)]
    ready = threading.Barrier(len(stores))

    def order(number):
        ready.wait()
        for turn in range(5):
            stores[number].assign_label("toy", f"{number}-{turn}", 1 + turn % 2)

    threads = [threading.Thread(target=order, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.poll()
        assert store.labels("toy") == {f"{n}-{turn}": 1 + turn % 2 for n in range(4) for turn in range(5)}


def test_an_order_that_cannot_be_read_is_heard_later(make, shelf, tmp_path, monkeypatch):
    """O10: a process that has no file left to open neither misses an order nor takes it back by its own next one."""
    for number in (1, 2):
        artifact_at(shelf / str(number))
    config, shared = ModelConfig("toy", shelf, latest=2), tmp_path / "orders.json"
    first, second = make(config, shared=shared), make(config, shared=shared)
    first.rollback("toy")

    def refuse(path, **_):
        raise OSError(24, "Too many open files", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            second.poll()
    second.assign_label("toy", "stable", 1)
    first.poll()
    assert ask(first) == ask(second) == 1


def members_at(folder, *members, apart=True):
    """An artifact with these members."""
    artifact_at(folder)
    names = ("add", "fuse", *(f"member_{name}" for name in members)) if apart else ("add",)
    write_manifest(folder, Manifest("recommender", members, dict.fromkeys(names, SIGNATURE)))
    return folder


def test_members_are_dropped_from_one_model_in_every_process(make, shelf, tmp_path):
    """H7, P3: the others of the server hear of it, later versions and restarted processes keep to it."""
    members_at(shelf / "1", "taste", "text")
    films = members_at(tmp_path / "films" / "1", "taste", "text").parent
    configs, shared = (ModelConfig("toy", shelf), ModelConfig("films", films)), tmp_path / "orders.json"
    first, second = make(*configs, shared=shared), make(*configs, shared=shared)
    first.drop_member("toy", "text")
    first.drop_member("toy", "text")
    assert first.dropped("toy") == {"text"} and not first.dropped("films") and not first.dropped("gone")
    second.poll()
    assert second.dropped("toy") == {"text"} and not second.dropped("films")
    members_at(shelf / "2", "taste", "text")
    second.poll()
    assert second.dropped("toy") == make(*configs, shared=shared).dropped("toy") == {"text"}
    second.reload([ModelConfig("toy", shelf, labels={"stable": 2})])
    first.poll()
    assert first.labels("toy") == {"stable": 2} and first.dropped("toy") == {"text"}
    first.restore_member("toy", "text")
    second.poll()
    assert not second.dropped("toy")
    first.drop_member("", "text")
    first.reload([ModelConfig("toy", films)])  # another model under the same name
    assert not first.dropped("toy")


def test_members_that_cannot_be_left_out_are_named(make, shelf, tmp_path):
    members_at(shelf / "1", "taste", "text", "image")
    whole = members_at(tmp_path / "whole" / "1", "taste", "text", apart=False).parent
    store = make(ModelConfig("toy", shelf), ModelConfig("whole", whole))
    for change in (store.drop_member, store.restore_member):
        with pytest.raises(
            InvalidRequest, match=r"member of 'toy' must be named; received 'texts'; did you mean 'text'"
        ):
            change("toy", "texts")
        with pytest.raises(UnknownModel):
            change("songs", "text")
    with pytest.raises(NotPossible, match="of taste, text these are out: none"):
        store.drop_member("whole", "text")
    store.drop_member("toy", "text")
    store.drop_member("toy", "image")
    with pytest.raises(NotPossible, match=r"'taste' can be left out only .* these are out: image, text"):
        store.drop_member("toy", "taste")
    assert store.dropped("toy") == {"text", "image"}


# ---- calls ---------------------------------------------------------------------------------------------------


def test_calls_are_told_of_whether_they_wait_in_the_queue_or_not(make, shelf):
    """P1: what is computed beside the queue, after a fault, is watched all the same."""
    artifact_at(shelf / "1")
    told = []
    store = make(called=lambda servable, signature, inputs, answer, seconds: told.append((signature, answer, seconds)))
    with store.lease() as servable:
        assert servable.aside("add", {"x": np.array([4])})["y"] == servable.call("add", {"x": [4]})["y"] == 5
    assert [(signature, answer()["y"]) for signature, answer, _ in told] == [("add", 5), ("add", 5)]
    assert all(0 <= seconds < 5 for *_, seconds in told)


def test_a_call_ends_at_its_deadline_and_a_closed_store_refuses(make, shelf):
    """O13: the deadline is honoured while the graph still computes."""
    artifact_at(shelf / "1")
    store = make(batching=BatchSettings(queue=4))
    started = time.monotonic()
    with store.lease("toy") as servable, pytest.raises(DeadlineExceeded):
        servable.call("add", {"x": [-1]}, deadline=started + 0.05)
    assert time.monotonic() - started < 0.19
    store.drain()
    assert not store.ready and ask(store) == 1
    store.close()
    with pytest.raises(Unavailable):
        ask(store)


# ---- warm-up -------------------------------------------------------------------------------------------------


def written(folder, *requests):
    """The warm-up file as TensorFlow Serving's own tools write it; the manifest anew."""
    path = folder / WARMUP_FILE
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for inputs in requests:
            log = PredictionLog()
            log.predict_log.request.model_spec.signature_name = "recommend"
            for name, value in inputs.items():
                log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())


def test_warm_up_requests_are_answered_before_a_version_serves(artifact, tmp_path):
    """O13: with TensorFlow, a real artifact and a real warm-up file; its failure keeps the version out."""
    good = {"user_id": ["u1"], "history": [["i3"]], "k": np.int32([2]), "exclude": [[""]], "include": [[""]]}
    shelf = tmp_path / "films"
    for number, requests in enumerate(([good, good], [good, {**good, "k": np.int32([99])}]), start=1):
        folder = shelf / str(number)
        shutil.copytree(artifact, folder)
        written(folder, *requests)
        write_manifest(folder, verify_manifest_without(folder))
    store = ModelStore([ModelConfig("films", shelf)])
    try:
        store.poll()
        assert [(s.version, s.state.name, s.warmed) for s in store.statuses("films")] == [
            (2, "END", 0),
            (1, "AVAILABLE", 2),
        ]
        assert "request 2 failed: 'k' must be between 1 and 4" in store.statuses("films", 2)[0].error
        with store.lease() as servable:
            answer = servable.call("recommend", {**good, "history": [["i4"]], "user_id": [""]})
            assert answer["item_ids"].tolist() == [["ä ö".encode(), b"i0", b"", b""]]
            assert set(servable.signature_defs) == {"serving_default", "recommend", "fail"}
            assert servable.signature_defs["fail"].inputs["x"].name.endswith(":0")
    finally:
        store.close()


@pytest.fixture
def hangs(monkeypatch):
    """Version 3 answers nothing until this is set."""
    go, run = threading.Event(), StandIn.run

    def hanging(self, signature, arrays):
        if self.number == 3:
            go.wait(20)
        return run(self, signature, arrays)

    monkeypatch.setattr(StandIn, "run", hanging)
    monkeypatch.setattr(model_store.Batcher, "close", functools.partialmethod(model_store.Batcher.close, 0.02))
    yield go
    go.set()


def warmed_at(folder):
    written(artifact_at(folder), {"x": [1]})
    write_manifest(folder, Manifest(kind="recommender", signatures={"add": SIGNATURE}))


def test_a_warm_up_that_hangs_is_refused_in_time(make, shelf, hangs):
    """O13: it keeps neither other versions from being loaded nor orders waiting for ever."""
    for number in (1, 2):
        artifact_at(shelf / str(number))
    store = make(warm_up_s=0.05)
    warmed_at(shelf / "3")
    store.poll()
    status = store.statuses("toy", 3)[0]
    assert (status.state, status.grpc_code, status.attempts) == (State.END, "FAILED_PRECONDITION", 1)
    assert status.error.endswith("requests that the artifact answers; after 0.05 s there was no answer to request 1.")
    assert ask(store) == 2 and store.rollback("toy") == 1


def test_the_end_does_not_wait_for_a_version_that_hangs(make, shelf, hangs, monkeypatch, caplog):
    """O10: what is served is unloaded all the same; the other version goes when it comes to itself."""
    monkeypatch.setattr(model_store, "CLOSE_S", 0.05)
    artifact_at(shelf / "1")
    store = make()
    warmed_at(shelf / "3")
    store.start(0.001)
    deadline = time.monotonic() + 5
    while states(store).get(3) != "LOADING" and time.monotonic() < deadline:
        time.sleep(0.005)
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 2 and "it is left behind" in caplog.text
    assert states(store) == {3: "LOADING", 1: "END"}
    hangs.set()
    store._thread.join(5)
    assert states(store)[3] == "END"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-toy")]


def verify_manifest_without(folder):
    """The manifest of a folder to which a file was added."""
    moved = folder / WARMUP_FILE
    content = moved.read_bytes()
    moved.unlink()
    manifest = verify_manifest(folder)
    moved.write_bytes(content)
    return manifest


def test_records_are_read_with_bounds(tmp_path):
    path = tmp_path / "records"
    assert list(records(path)) == []
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number in range(MAX_RECORDS + 5):
            writer.write(str(number).encode())
    assert list(records(path)) == [str(number).encode() for number in range(MAX_RECORDS)]
    for content in (b"\x01\x02", struct.pack("<Q", 2**62) + bytes(8), struct.pack("<Q", 100) + bytes(20)):
        path.write_bytes(content)
        with pytest.raises(ArtifactRefused, match="record 1 is cut off"):
            list(records(path))
