"""The gRPC door over a socket, asked with TensorFlow Serving's own stubs."""

import asyncio
import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from fusion.compat import tf
from fusion.export import savedmodel
from fusion.export.manifest import Manifest, verify_manifest, write_manifest
from serving import batching, grpc_server, model_store
from serving.batching import BatchSettings
from serving.client import wire
from serving.errors import InvalidRequest, Overloaded
from serving.grpc_server import GrpcDoor
from serving.members import gone_round
from serving.metrics import METRICS
from serving.model_config import read_model_config
from serving.model_store import ModelConfig, ModelStore, State
from serving.predictor import Predictor
from serving.recommending import Recommending
from serving.security import Tokens
from serving.settings import GrpcSettings
from serving.tensors import NUMBERS, decode, encode

CODE = grpc.StatusCode


@contextmanager
def door_of(store, recommending=None, **options):
    """The port of a door that runs on an event loop in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="door")
    thread.start()

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    async def build():
        door = GrpcDoor(store, recommending or Recommending(store), **options)
        return door, await door.start("127.0.0.1", 0)

    door, port = run(build())
    try:
        yield port
    finally:
        run(door.stop(1.0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def store(artifact, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for number in (1, 2):
        shutil.copytree(artifact, root / "films" / str(number))
    save_classes(root / "classes" / "1")
    store = ModelStore(
        [
            ModelConfig("films", root / "films", latest=2, labels={"stable": 1}),
            ModelConfig("classes", root / "classes"),
        ]
    )
    store.poll()
    yield store
    store.close()


def save_classes(folder):
    """A classifier of three classes, and a signature with one number a row."""
    module = tf.Module()
    specs = [tf.TensorSpec([None, 2], tf.float32, "x"), tf.TensorSpec([None, 1], tf.bool, "mask")]

    @tf.function(input_signature=specs)
    def classify(x, mask):
        first = tf.reduce_sum(x, axis=1, keepdims=True) * tf.cast(mask, tf.float32)
        return {"probabilities": tf.concat([first, x], axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
    def price(x):
        return {"outputs": x[:, :1] * 2, "both": x}

    savedmodel.save(module, folder, {"serving_default": classify, "price": price})
    (folder / "labels.json").write_text(json.dumps(["sum", "left", "right"]))
    write_manifest(folder, Manifest(kind="classifier", members=("one",), signatures=savedmodel.signatures_of(folder)))


@pytest.fixture(scope="module")
def channel(store):
    with door_of(store) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened


@pytest.fixture(scope="module")
def prediction(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def models(channel):
    return model_service_pb2_grpc.ModelServiceStub(channel)


def predict_request(name="films", signature="recommend", outputs=(), **inputs):
    given = {"user_id": ["u1"], "history": [["i3"]], "k": np.int32([2]), "exclude": [[""]], "include": [[""]], **inputs}
    request = predict_pb2.PredictRequest(output_filter=outputs)
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, value in given.items():
        if value is not None:
            request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return request


def refused(call, *args, **kwargs):
    with pytest.raises(grpc.RpcError) as info:
        call(*args, timeout=10, **kwargs)
    return info.value


# ---- PredictionService ---------------------------------------------------------------------------------------


def test_predict_answers_as_the_graph_does(prediction, store):
    """O1 O4 O7: a client of TensorFlow Serving gets every output of the signature, and who answered."""
    response = prediction.Predict(predict_request(), timeout=10)
    with store.lease("films") as servable:
        expected = servable.predictor.recommend(["u1"], [["i3"]], k=2)
    assert {name: tf.make_ndarray(tensor).shape for name, tensor in response.outputs.items()} == {
        "item_ids": (1, 4),
        "scores": (1, 4),
        "contributions": (1, 2, 4),
        "known_user": (1,),
    }
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["item_ids"])[:, :2], expected["item_ids"])
    assert list(response.outputs["scores"].float_val)[:2] == expected["scores"][0].tolist()  # the typed field
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("films", 2, "recommend")


def test_predict_takes_versions_labels_and_an_output_filter(prediction):
    request = predict_request(outputs=["scores"])
    request.model_spec.version.value = 2
    response = prediction.Predict(request, timeout=10)
    assert list(response.outputs) == ["scores"] and response.model_spec.version.value == 2
    request.model_spec.version_label = "stable"
    assert prediction.Predict(request, timeout=10).model_spec.version.value == 1


def test_predict_refuses_with_the_codes_of_tensorflow_serving(prediction):
    """O7 R8: wrong names, dtypes, shapes and values, each with a sentence and without a path or a trace."""
    label, version, nowhere = predict_request(), predict_request(), predict_request()
    label.model_spec.version_label = "nope"
    version.model_spec.version.value = 9
    nowhere.inputs["k"].tensor_shape.dim[0].size = -1
    huge = predict_request()
    huge.inputs["k"].tensor_shape.dim[0].size = 2**40
    cases = [
        (predict_request(name="nope"), CODE.NOT_FOUND, "Servable not found for request: Latest(nope)"),
        (version, CODE.NOT_FOUND, "Servable not found for request: Specific(films, 9)"),
        (label, CODE.INVALID_ARGUMENT, "Unrecognized servable version label: nope"),
        (predict_request(name=""), CODE.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        (predict_request(signature="nope"), CODE.FAILED_PRECONDITION, "received 'nope'"),
        (predict_request(k=None), CODE.INVALID_ARGUMENT, "Missing but required: {k}"),
        (predict_request(more=[1]), CODE.INVALID_ARGUMENT, "Sent extra: {more}"),
        (predict_request(k=np.int64([2])), CODE.INVALID_ARGUMENT, "'k' must have the dtype int32; received DT_INT64"),
        (predict_request(k=np.int32(2)), CODE.INVALID_ARGUMENT, "'k' must have the shape [any]"),
        (predict_request(history=["i3"]), CODE.INVALID_ARGUMENT, "'history' must have the shape [any, any]"),
        (predict_request(k=np.int32([0])), CODE.INVALID_ARGUMENT, "'k' must be between 1 and 4"),
        (predict_request(k=np.int32([5])), CODE.INVALID_ARGUMENT, "'k' must be between 1 and 4"),
        (predict_request(exclude=[["i"] * 10_001]), CODE.INVALID_ARGUMENT, "at most 10000 entries"),
        (predict_request(user_id=["x" * 2000]), CODE.INVALID_ARGUMENT, "at most 1024 bytes"),
        (predict_request(outputs=["nope"]), CODE.INVALID_ARGUMENT, "output tensor alias not found"),
        (predict_request(outputs=["scores"] * 2), CODE.INVALID_ARGUMENT, "duplicate output tensor alias"),
        (nowhere, CODE.INVALID_ARGUMENT, "must have a known shape"),
        (huge, CODE.INVALID_ARGUMENT, "must have at most"),
    ]
    for request, code, words in cases:
        error = refused(prediction.Predict, request)
        assert (error.code(), words in error.details()) == (code, True), error.details()
        assert "/" not in error.details() and "Traceback" not in error.details()
    assert prediction.Predict(predict_request(user_id=[b"a\0b"]), timeout=10).outputs["known_user"].bool_val == [False]


def test_what_the_graph_refuses_is_told_without_its_insides(prediction):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "films", "fail"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.int32([-1])))
    error = refused(prediction.Predict, request)
    assert error.code() == CODE.INVALID_ARGUMENT and "'fail' cannot answer these inputs" in error.details()
    assert "/" not in error.details() and "\n" not in error.details()


def test_bytes_that_are_no_message_are_the_callers_fault(channel):
    for method in ("PredictionService/Predict", "PredictionService/Classify", "ModelService/GetModelStatus"):
        error = refused(channel.unary_unary(f"/tensorflow.serving.{method}"), b"\xff\xff\xff")
        assert error.code() == CODE.INVALID_ARGUMENT and "cannot be parsed" in error.details()


def test_a_fault_inside_is_logged_and_not_told(store, caplog):
    class Broken:
        async def recommend_soon(self, request, compute, in_thread):
            raise ZeroDivisionError("secret of /srv/models")

    with door_of(store, Broken()) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        error = refused(opened.unary_unary(wire.RECOMMEND), b"")
    assert error.code() == CODE.INTERNAL
    assert "secret" not in error.details() and "srv" not in error.details()
    mark = error.details().split()[-1].rstrip(".")
    assert any(mark in record.message and "secret" in record.message for record in caplog.records)


def example(**features):
    made = tf.train.Example()
    for name, values in features.items():
        made.features.feature[name].float_list.value.extend(values)
    return made


def filled(request, *examples, signature=""):
    request.model_spec.name, request.model_spec.signature_name = "classes", signature
    request.input.example_list.examples.extend(examples)
    return request


def test_classify_regress_and_multi_inference_read_examples(prediction):
    """O7: every class with its label; one number a row; several signatures at once."""
    rows = [example(x=[1, 2]), example(x=[3, 4])]
    response = prediction.Classify(filled(classification_pb2.ClassificationRequest(), *rows), timeout=10)
    found = [[(c.label, c.score) for c in row.classes] for row in response.result.classifications]
    assert found == [[("sum", 3), ("left", 1), ("right", 2)], [("sum", 7), ("left", 3), ("right", 4)]]
    request = filled(regression_pb2.RegressionRequest(), *rows, signature="price")
    assert [r.value for r in prediction.Regress(request, timeout=10).result.regressions] == [2, 6]

    several = inference_pb2.MultiInferenceRequest()
    several.input.example_list_with_context.examples.add()
    several.input.example_list_with_context.context.CopyFrom(rows[0])
    for method, signature in (("classify", ""), ("regress", "price")):
        task = several.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = "classes", signature
    results = prediction.MultiInference(several, timeout=10).results
    assert results[0].classification_result.classifications[0].classes[0].score == 3
    assert results[1].regression_result.regressions[0].value == 2


def test_classify_and_regress_refuse_what_does_not_fit(prediction):
    films = classification_pb2.ClassificationRequest()
    films.model_spec.name = "films"
    films.input.example_list.examples.add()
    narrow = filled(classification_pb2.ClassificationRequest(), example(x=[1]))
    for call, request, words in (
        (prediction.Classify, films, "Expected classification signature method_name"),
        (prediction.Classify, filled(classification_pb2.ClassificationRequest()), "Input is empty"),
        (prediction.Classify, filled(classification_pb2.ClassificationRequest(), example(y=[1])), "the feature 'x'"),
        (prediction.Classify, narrow, "must fill the shape"),
        (prediction.Regress, filled(regression_pb2.RegressionRequest(), example(x=[1, 2])), "Expected regression"),
        (prediction.MultiInference, inference_pb2.MultiInferenceRequest(), "must name the same model"),
    ):
        error = refused(call, request)
        assert (error.code(), words in error.details()) == (CODE.INVALID_ARGUMENT, True), error.details()


def test_metadata_is_the_signature_of_the_file(prediction):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "films"
    response = prediction.GetModelMetadata(request, timeout=10)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    recommend = signatures.signature_def["recommend"]
    assert set(recommend.inputs) == {"user_id", "history", "k", "exclude", "include"}
    assert recommend.method_name == "tensorflow/serving/predict" and recommend.inputs["k"].name.endswith(":0")
    request.metadata_field[0] = "nope"
    assert refused(prediction.GetModelMetadata, request).code() == CODE.INVALID_ARGUMENT


# ---- ModelService --------------------------------------------------------------------------------------------


def test_status_by_model_version_and_label(models):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "films"
    found = models.GetModelStatus(request, timeout=10).model_version_status
    assert [(s.version, s.state, s.status.error_code) for s in found] == [(2, State.AVAILABLE, 0), (1, 30, 0)]
    request.model_spec.version_label = "stable"
    assert [s.version for s in models.GetModelStatus(request, timeout=10).model_version_status] == [1]
    request.model_spec.version.value = 9
    assert refused(models.GetModelStatus, request).code() == CODE.NOT_FOUND


def test_administration_is_off_and_needs_a_token_when_it_is_on(models, artifact, tmp_path):
    """R8 O7: nobody reloads a server that was not told to allow it."""
    request = model_management_pb2.ReloadConfigRequest()
    added = request.config.model_config_list.config.add(name="new", base_path=str(artifact.parent))
    added.model_version_policy.specific.versions.append(1)
    added.version_labels["stable"] = 1
    assert refused(models.HandleReloadConfigRequest, request).code() == CODE.PERMISSION_DENIED

    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of "test"
    (tmp_path / "tokens").write_text(f"operator {digest}\n")
    store = ModelStore([ModelConfig("old", artifact)])
    store.poll()
    with (
        door_of(store, admin=Tokens(tmp_path / "tokens")) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as opened,
    ):
        stub = model_service_pb2_grpc.ModelServiceStub(opened)
        assert refused(stub.HandleReloadConfigRequest, request).code() == CODE.UNAUTHENTICATED
        key = (("authorization", "Bearer test"),)
        stub.HandleReloadConfigRequest(request, timeout=20, metadata=key)
        assert store.names() == ["new"] and store.labels("new") == {"stable": 1}
        added.base_path = str(tmp_path)
        error = refused(stub.HandleReloadConfigRequest, request, metadata=key)
        assert error.code() == CODE.FAILED_PRECONDITION and store.names() == ["new"]
    store.close()


def test_a_config_file_of_tensorflow_serving_is_read(tmp_path):
    path = tmp_path / "models.config"
    path.write_text(
        'model_config_list { config { name: "a" base_path: "/m/a" model_platform: "tensorflow" '
        'model_version_policy { latest { num_versions: 2 } } version_labels { key: "stable" value: 3 } } '
        'config { name: "b" base_path: "/m/b" model_version_policy { all {} } } }'
    )
    first, second = read_model_config(path)
    assert (first.name, str(first.folder), first.latest, first.versions, first.labels) == (
        "a",
        "/m/a",
        2,
        None,
        {"stable": 3},
    )
    assert (second.name, second.versions) == ("b", ())
    for text in ("model_config_list {", "custom_model_config {}", 'model_config_list { config { name: "a" } }'):
        path.write_text(text)
        with pytest.raises(InvalidRequest):
            read_model_config(path)


# ---- our own service, health, reflection ---------------------------------------------------------------------


def test_recommend_and_similar_speak_our_own_wire(channel):
    """O4 A7: items with each member's contribution, and who answered."""
    error = refused(channel.unary_unary(wire.RECOMMEND), b"")
    assert error.code() == CODE.NOT_FOUND  # two models are served, and none is named
    ask = channel.unary_unary(wire.RECOMMEND, response_deserializer=wire.ItemList.FromString)
    answer = ask(
        wire.RecommendRequest(model_name="films", history=["i1"], k=2, exclude=["i0"]).SerializeToString(), timeout=10
    )
    assert [item.item_id for item in answer.items] == ["i2", "i3"]
    assert list(answer.members_used) == ["place", "history"]
    assert [sum(item.contributions) == item.score for item in answer.items] == [True, True]
    assert (answer.model_name, answer.version, answer.profile) == ("films", 2, "best")
    error = refused(ask, wire.RecommendRequest(k=0, model_name="films").SerializeToString())
    assert error.code() == CODE.INVALID_ARGUMENT
    similar = channel.unary_unary(wire.SIMILAR, response_deserializer=wire.ItemList.FromString)
    error = refused(similar, wire.SimilarRequest(item_id="nope", k=1, model_name="films").SerializeToString())
    assert error.code() == CODE.NOT_FOUND


def test_health_follows_the_store_and_reflection_knows_all_services(channel, artifact):
    stub = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
    assert refused(stub.Check, health_pb2.HealthCheckRequest(service="nope")).code() == CODE.NOT_FOUND
    found = ProtoReflectionDescriptorDatabase(channel)
    assert {"tensorflow.serving.PredictionService", "fusion.RecommendationService"} <= set(found.get_services())
    assert found.FindFileContainingSymbol("tensorflow.serving.PredictionService").service[0].name
    assert found.FindFileContainingSymbol("fusion.RecommendRequest").message_type[0].name

    store = ModelStore([ModelConfig("films", artifact)])
    store.poll()
    with door_of(store) as port:
        opened = grpc.insecure_channel(f"127.0.0.1:{port}")
        watched = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        store.drain()
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert next(watched, None) is None and watched.code() == CODE.OK  # the door ended the stream, and did not wait
    opened.close()
    store.close()


# ---- load, deadlines, vanished clients -----------------------------------------------------------------------


def test_many_clients_at_once_get_the_answers_of_one(prediction):
    """O13: batches are split again; the metrics count every request under TensorFlow Serving's name."""
    users = ["u0", "u1", "u 2", "nobody"] * 12
    alone = {u: prediction.Predict(predict_request(user_id=[u]), timeout=10).outputs for u in set(users)}
    before = METRICS.value(":tensorflow:serving:request_count", ("films", "OK"))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda u: prediction.Predict(predict_request(user_id=[u]), timeout=10).outputs, users))
    assert all(answer == alone[user] for user, answer in zip(users, answers, strict=True))
    assert METRICS.value(":tensorflow:serving:request_count", ("films", "OK")) == before + len(users)
    assert (
        b':tensorflow:serving:request_latency_count{model_name="films",API="Predict",entrypoint="GRPC"}'
        in METRICS.text()
    )


class Slow:
    """A predictor that holds every call until its gate opens."""

    def __init__(self, predictor):
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.rows = 0
        self.manifest, self.limits = predictor.manifest, predictor.limits
        self.signature, self.check, self._run = predictor.signature, predictor.check, predictor.run

    def run(self, signature, arrays):
        self.entered.release()
        self.rows += len(arrays["k"])
        assert self.gate.wait(10)
        return self._run(signature, arrays)


@pytest.fixture
def slow(artifact, monkeypatch):
    """A store of one artifact, whose graph waits, with a queue for two."""
    made = []

    def load(folder, limits, cores=None):
        made.append(Slow(original(folder, limits)))
        return made[0]

    original = model_store.Predictor.load
    monkeypatch.setattr(model_store.Predictor, "load", load)
    store = ModelStore([ModelConfig("films", artifact)], batching=BatchSettings(queue=2))
    store.poll()
    yield store, made[0]
    made[0].gate.set()
    store.close()


def test_deadlines_vanished_clients_and_overload(slow):
    """O10 O13: nothing is computed for who has gone; who finds the queue full is told when to come back."""
    store, graph = slow
    with (
        door_of(store, settings=GrpcSettings(timeout_s=15)) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as opened,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(opened)
        first = stub.Predict.future(predict_request(), timeout=10)
        assert graph.entered.acquire(timeout=5)
        late = stub.Predict.future(predict_request(), timeout=0.05)
        gone = stub.Predict.future(predict_request(), timeout=10)
        assert late.code() == CODE.DEADLINE_EXCEEDED
        gone.cancel()
        time.sleep(0.05)
        waiting = [stub.Predict.future(predict_request(), timeout=10) for _ in range(2)]  # in the places of those two
        wait_until(lambda: queued(store) == 2)
        error = refused(stub.Predict, predict_request())
        assert error.code() == CODE.RESOURCE_EXHAUSTED
        assert "queue of 'films' is full: 2 of 2" in error.details()
        pushback = dict(error.trailing_metadata())
        assert int(pushback["grpc-retry-pushback-ms"]) > 0 and float(pushback["retry-after"]) > 0
        graph.gate.set()
        assert all(future.result(10).outputs for future in (first, *waiting))
    assert graph.rows == 3  # neither the late one nor the one whose client had gone


def test_quick_calls_need_no_thread(artifact, monkeypatch):
    """O13: once a signature is known to be quick, its calls are computed together on the event loop of the door, the
    monitor hears of them, and whoever asks gets the answer of his own request."""
    threads, heard = [], []

    class Quick(Slow):
        def run(self, signature, arrays):
            threads.append((threading.current_thread().name, len(arrays["k"])))
            found = self._run(signature, arrays)
            return {**found, "scores": found["scores"] + arrays["k"][:, None].astype(np.float32)}

    original = model_store.Predictor.load
    monkeypatch.setattr(
        model_store.Predictor, "load", lambda folder, limits, cores=None: Quick(original(folder, limits))
    )
    monkeypatch.setattr(batching, "QUICK_S", 10.0)
    called = lambda servable, signature, arrays, result, seconds: heard.append(len(result()["scores"]))  # noqa: E731
    store = ModelStore([ModelConfig("films", artifact)], called=called)
    store.poll()
    with door_of(store) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(opened)

        def first_score(k):
            answer = stub.Predict(predict_request(user_id=["u0"], k=np.array([k], np.int32)), timeout=10)
            return decode("scores", answer.outputs["scores"], "float32")[0, 0] - k

        first_score(1)
        del threads[:], heard[:]
        with ThreadPoolExecutor(8) as pool:
            scores = list(pool.map(first_score, [1, 2, 3, 4] * 20))
    store.close()
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)
    assert {name for name, _ in threads} == {"door"}
    assert sum(rows for _, rows in threads) == len(heard) == 80 > len(threads)


def test_what_others_stand_in_for_is_never_computed_on_the_loop(artifact):
    """A loop could not leave it when it hangs; members are asked one by one in its place (O13)."""
    manifest = verify_manifest(artifact)
    apart = {name: manifest.signatures["recommend"] for name in ("recommend", "fuse", "member_place", "member_history")}
    whole = dataclasses.replace(manifest, signatures={**manifest.signatures, **apart})
    assert [gone_round(whole, name) for name in (*apart, "serving_default")] == [True] * 4 + [False]
    assert not gone_round(manifest, "recommend")  # nothing stands in for it


def test_large_requests_and_answers_are_worked_on_in_a_thread(store, monkeypatch):
    """O10: on the event loop they would keep all other callers waiting."""
    monkeypatch.setattr(grpc_server, "LARGE", 8)
    threads, original = [], Predictor.check

    def check(predictor, *given):
        threads.append(threading.current_thread().name)
        return original(predictor, *given)

    monkeypatch.setattr(Predictor, "check", check)
    with door_of(store) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(opened)
        answer = stub.Predict(predict_request(), timeout=10)
        assert tf.make_ndarray(answer.outputs["item_ids"])[0, :2].tolist() == [b"i2", b"i4"]
        classes = filled(classification_pb2.ClassificationRequest(), example(x=[1, 2]))
        assert stub.Classify(classes, timeout=10).result.classifications[0].classes[0].score == 3
        assert refused(stub.Predict, predict_request(k=None)).code() == CODE.INVALID_ARGUMENT
    assert len(threads) == 2 and all(name.startswith("recommend") for name in threads)


def silent(released):
    """A request stream that sends nothing until it is released."""
    released.wait(20)
    yield from ()


def test_callers_who_send_nothing_do_not_keep_their_places(store):
    """O10 O13: a call has to bring its message within the limit of the server; only so many are under way at once."""
    released = threading.Event()
    with (
        door_of(store, settings=GrpcSettings(timeout_s=0.5, calls=3)) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as opened,
    ):
        stub, never = prediction_service_pb2_grpc.PredictionServiceStub(opened), opened.stream_unary(wire.RECOMMEND)
        quiet = [never.future(silent(released)) for _ in range(3)]
        wait_until(lambda: stub.Predict.future(predict_request(), timeout=10).code() == CODE.RESOURCE_EXHAUSTED)
        assert {call.code() for call in quiet} == {CODE.DEADLINE_EXCEEDED}
        assert stub.Predict(predict_request(), timeout=10).outputs
        released.set()


def test_a_caller_without_a_deadline_is_answered_within_the_default(slow):
    """O13: also where nothing stands in for what hangs."""
    store, graph = slow
    recommending = Recommending(store, timeout_ms=150)
    with door_of(store, recommending) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        ask, request = opened.unary_unary(wire.RECOMMEND), wire.RecommendRequest(user_id="u1", k=2).SerializeToString()
        graph.gate.set()
        assert ask(request, timeout=10)  # reads the tables of the version
        graph.gate.clear()
        name = ":tensorflow:serving:request_count"
        before, started = METRICS.value(name, ("films", "DEADLINE_EXCEEDED")), time.monotonic()
        with pytest.raises(grpc.RpcError) as info:
            ask(request)
        assert info.value.code() == CODE.DEADLINE_EXCEEDED and time.monotonic() - started < 5
        wait_until(lambda: METRICS.value(name, ("films", "DEADLINE_EXCEEDED")) == before + 1)  # under its model's name


def test_a_thread_that_cannot_start_costs_no_place(store):
    door = GrpcDoor(store, Recommending(store), GrpcSettings(threads=1, queue=1))

    async def asked():
        door._completions = grpc_server._Completions(asyncio.get_running_loop())
        submit, door._pool.submit = door._pool.submit, failing
        for _ in range(3):
            with pytest.raises(Overloaded, match="no thread"):
                await door._in_pool(len, "ab")
        door._pool.submit = submit
        return await door._in_pool(len, "ab")

    def failing(*_):
        raise RuntimeError("can't start new thread")

    assert asyncio.run(asked()) == 2


class Busy:
    """Keeps the event loop from everything else for a while; makes calls for a user wait without that."""

    def __init__(self):
        self.asked, self.entered = 0, threading.Event()

    async def recommend_soon(self, request, compute, in_thread):
        self.asked += 1
        if request.user_id:
            await asyncio.sleep(5)
        self.entered.set()
        time.sleep(0.3)
        raise InvalidRequest("that is all.")


def test_late_calls_are_counted_and_left_alone(store):
    """O10: a call that was late before its turn came is neither read nor answered, but counted; who still waits is told
    of the server's own limit."""
    recommending, name = Busy(), ":tensorflow:serving:request_count"
    with (
        door_of(store, recommending, settings=GrpcSettings(timeout_s=0.5)) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as opened,
    ):
        ask = opened.unary_unary(wire.RECOMMEND)
        first = ask.future(b"", timeout=10)
        assert recommending.entered.wait(5)
        before = METRICS.value(name, ("", "DEADLINE_EXCEEDED"))
        assert ask.future(b"", timeout=0.1).code() == CODE.DEADLINE_EXCEEDED
        assert first.code() == CODE.INVALID_ARGUMENT
        wait_until(lambda: METRICS.value(name, ("", "DEADLINE_EXCEEDED")) == before + 1)
        assert recommending.asked == 1
        error = refused(ask, wire.RecommendRequest(user_id="u0").SerializeToString())
        assert error.code() == CODE.DEADLINE_EXCEEDED and error.details().startswith("the deadline passed")


def test_a_call_without_a_message_is_refused(channel):
    assert refused(channel.stream_unary(wire.RECOMMEND), iter(())).code() == CODE.INVALID_ARGUMENT


def queued(store):
    with store.lease() as servable:
        return servable.waiting


def wait_until(condition):
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


# ---- tensors -------------------------------------------------------------------------------------------------


def test_tensors_are_those_of_tensorflow():
    """Both directions against TensorFlow's own converters, for every dtype and form."""
    random = np.random.default_rng(0)
    arrays = [(random.random((2, 3, 4)) * 100).astype(dtype) for dtype, _ in NUMBERS.values()]
    arrays += [np.array([[b"a", b"\x00\xff"], [b"", "ä".encode()]], object), np.zeros((0, 3), np.float32), np.array(7)]
    arrays += [
        np.array([-1, 2**62, -(2**63)]),
        np.array([np.nan, np.inf], np.float32),
        np.full(300, b"x" * 200, object),
    ]
    for array in arrays:
        theirs = tf.make_tensor_proto(array, shape=array.shape)
        np.testing.assert_array_equal(decode("x", theirs), array)
        ours = type(theirs).FromString(encode(array))
        back = tf.make_ndarray(ours)
        np.testing.assert_array_equal(back, array)
        assert ours.dtype == theirs.dtype
    repeated = type(theirs)(dtype=1, float_val=[1, 2])
    repeated.tensor_shape.dim.add(size=4)
    np.testing.assert_array_equal(decode("x", repeated), tf.make_ndarray(repeated))
