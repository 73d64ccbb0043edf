"""SavedModel and TFLite: names survive, other operations than TensorFlow's safe ones are refused, answers agree."""

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.errors import GateError
from fusion.export import savedmodel, tflite
from fusion.export.manifest import Manifest, TensorSpec, write_manifest
from fusion.export.verify import compare


class Core(tf.Module):
    """Scores of four candidates out of two numeric inputs."""

    def __init__(self):
        self.weights = tf.Variable(np.random.default_rng(0).normal(size=(3, 4)), dtype=tf.float32)

    @tf.function(input_signature=[tf.TensorSpec([None, 3], name="first"), tf.TensorSpec([None, 4], name="second")])
    def score(self, first, second):
        return {"scores": tf.matmul(first, self.weights) - second, "first_only": tf.matmul(first, self.weights)}


class WithTable(tf.Module):
    """The same behind a table of ids: what is served, but not converted."""

    def __init__(self, core):
        self.core = core
        self.table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(tf.constant(["a", "b", "c"]), tf.constant([0, 1, 2])), -1
        )

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.string, "history")])
    def recommend(self, history):
        numbers = self.table.lookup(history)
        known = tf.cast(numbers >= 0, tf.float32)[:, :, None]
        return {"scores": tf.reduce_sum(tf.gather(self.core.weights, tf.maximum(numbers, 0)) * known, axis=1)}


def read_file(x):
    return tf.io.read_file(x[0])


def call_python(x):
    return tf.numpy_function(lambda x: x, [x], tf.string)


def read_file_in_a_branch(x):
    return tf.cond(tf.size(x) > 3, lambda: tf.io.read_file(x[0]), lambda: x[0])


def as_module(function, spec):
    module = tf.Module()
    module.serve = tf.function(lambda x: {"y": function(x)}, input_signature=[spec])
    return module


@pytest.fixture(scope="module")
def core():
    return Core()


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(1)
    return {
        "first": random.normal(size=(5, 3)).astype(np.float32),
        "second": random.normal(size=(5, 4)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def tflite_file(core, tmp_path_factory):
    path = tmp_path_factory.mktemp("tflite") / "core.tflite"
    path.write_bytes(tflite.convert({"score": core.score}, core))
    return path


def test_saved_model_round_trip(core, inputs, tmp_path):
    """O1: a reloaded SavedModel has the same signatures, by name, and gives the same answers."""
    folder = tmp_path / "artifact"
    whole = WithTable(core)
    savedmodel.save(whole, folder, {"serving_default": core.score, "recommend": whole.recommend})
    signatures = savedmodel.signatures_of(folder)
    assert signatures["serving_default"].inputs == {
        "first": TensorSpec("float32", (None, 3)),
        "second": TensorSpec("float32", (None, 4)),
    }
    assert signatures["recommend"].inputs == {"history": TensorSpec("string", (None, None))}
    assert set(signatures["serving_default"].outputs) == {"scores", "first_only"}
    with pytest.raises(GateError, match="manifest"):
        savedmodel.load(folder)
    write_manifest(folder, Manifest(kind="recommender", signatures=signatures))
    loaded = savedmodel.load(folder)
    answer = loaded.signatures["serving_default"](**{name: tf.constant(value) for name, value in inputs.items()})
    assert compare(core.score(**inputs), answer, 1e-6, "Keras and SavedModel")["rows"] == 5
    history = tf.constant([["a", "c", ""], ["b", "x", ""]])
    answer = loaded.signatures["recommend"](history=history)
    compare(whole.recommend(history), answer, 0.0, "tables")


@pytest.mark.parametrize(
    ("function", "operation"), [(read_file, "ReadFile"), (call_python, "PyFunc"), (read_file_in_a_branch, "ReadFile")]
)
def test_files_and_python_in_the_graph_are_refused(tmp_path, function, operation):
    module = as_module(function, tf.TensorSpec([None], tf.string))
    with pytest.raises(GateError, match=rf"'{operation}' \(node '.+' in .*reads files, Python or hardware"):
        savedmodel.save(module, tmp_path / "artifact", {"serving_default": module.serve})
    assert list(tmp_path.iterdir()) == []


def test_an_operation_that_is_not_tensorflows_is_refused(core, tmp_path):
    folder = tmp_path / "artifact"
    savedmodel.save(core, folder, {"serving_default": core.score})
    model = savedmodel.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    library = model.meta_graphs[0].graph_def.library.function
    node = next(node for function in library for node in function.node_def if node.op == "MatMul")
    node.op = "Addons>GeluFast"
    (folder / "saved_model.pb").write_bytes(model.SerializeToString())
    with pytest.raises(GateError, match=r"'Addons>GeluFast' .* is not one of TensorFlow's own"):
        savedmodel.lint(folder)


def test_the_savers_functions_are_no_way_round(core, tmp_path):
    """TensorFlow's own save and restore functions touch files; another node that calls them is refused."""
    folder = tmp_path / "artifact"
    savedmodel.save(core, folder, {"serving_default": core.score})
    model = savedmodel.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    nodes = model.meta_graphs[0].graph_def.node
    call = next(node for node in nodes if node.name == model.meta_graphs[0].saver_def.restore_op_name)
    nodes.append(call)
    nodes[-1].name = "smuggled"
    (folder / "saved_model.pb").write_bytes(model.SerializeToString())
    with pytest.raises(GateError, match="'RestoreV2'"):
        savedmodel.lint(folder)


def test_a_folder_without_a_graph_is_refused(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"\xff\xff")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(GateError, match="must be a SavedModel"):
            savedmodel.lint(folder)


def test_stock_layers_pass_the_lint(tmp_path):
    """The kinds of layers that our submodels are made of."""
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3, use_bias=False)(image)
    x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
    x = keras.layers.DepthwiseConv2D(3, padding="same")(x)
    x = keras.layers.Dropout(0.5)(keras.layers.GlobalAveragePooling2D()(x))
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    y = keras.layers.LayerNormalization()(keras.layers.Embedding(10, 4)(tokens))
    y = keras.layers.Dense(4, activation=keras.activations.gelu)(y)
    y = keras.layers.Bidirectional(keras.layers.LSTM(3))(y)
    model = keras.Model([image, tokens], keras.layers.Dense(3, "softmax")(keras.layers.Concatenate()([x, y])))
    specs = {"image": tf.TensorSpec([None, 8, 8, 3]), "tokens": tf.TensorSpec([None, 6], tf.int32)}

    @tf.function(input_signature=[specs])
    def serve(features):
        return {"probabilities": model(features)}

    savedmodel.save(model, tmp_path / "artifact", {"serving_default": serve})


def test_tflite_gives_the_same_by_name(core, inputs, tflite_file):
    """O5: built-in operations only, run by LiteRT in a process of its own and in this one, names kept."""
    expected = core.score(**inputs)
    alone = tflite.check_runs(tflite_file, inputs)
    assert set(alone) == {"scores", "first_only"}
    compare(expected, alone, 1e-5, "Keras and TFLite")
    compare(expected, tflite.run(tflite_file, inputs, "score"), 1e-5, "Keras and TFLite")


def test_tflite_refuses_what_it_does_not_have():
    module = as_module(tf.strings.as_string, tf.TensorSpec([None, 3]))
    with pytest.raises(GateError, match="the graph needs AsString"):
        tflite.convert({"serve": module.serve}, module)


def test_tflite_names_and_dtypes_are_checked(tflite_file, inputs, tmp_path):
    with pytest.raises(GateError, match=r"takes the inputs \['first', 'second'\]"):
        tflite.run(tflite_file, {"first": inputs["first"]})
    with pytest.raises(GateError, match="takes 'first' as float32; received float64"):
        tflite.run(tflite_file, {**inputs, "first": inputs["first"].astype(float)})
    with pytest.raises(GateError, match="has the signatures"):
        tflite.run(tflite_file, inputs, "other")
    (tmp_path / "broken.tflite").write_bytes(b"x" * 100)
    with pytest.raises(GateError, match=r"broken\.tflite must be a \.tflite file"):
        tflite.run(tmp_path / "broken.tflite", inputs)


def test_a_file_that_dies_or_hangs_is_found_from_outside(tflite_file, inputs, monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -ABRT $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(tflite.sys, "executable", str(program))
    with pytest.raises(GateError, match="killed its process by SIGABRT"):
        tflite.check_runs(tflite_file, inputs)
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(GateError, match=r"within 0\.2 s"):
        tflite.check_runs(tflite_file, inputs, seconds=0.2)


def test_compare_names_the_place():
    expected = {"scores": np.array([[0.0, -np.inf], [1.0, np.nan]]), "ids": np.array([["a", "b"]])}
    same = {"scores": expected["scores"] + 1e-7, "ids": np.array([[b"a", b"b"]], object)}
    report = compare(expected, same, 1e-5, "two forms")
    assert 0 < report["largest_difference"] < 1e-5 and report["where"].startswith("scores[")
    for name, value in (("scores", [[0.0, -np.inf], [1.5, np.nan]]), ("scores", [[0.0, -np.inf], [np.inf, np.nan]])):
        with pytest.raises(GateError, match=r"two forms: answers must agree within 1e-05; .* at scores\[1, 0\]"):
            compare(expected, {**same, name: np.array(value)}, 1e-5, "two forms")
    with pytest.raises(GateError, match=r"at ids\[0, 1\]"):
        compare(expected, {**same, "ids": np.array([["a", "c"]])}, 1e-5, "two forms")
    with pytest.raises(GateError, match="same shape"):
        compare(expected, {**same, "ids": np.array([["a"]])}, 1e-5, "two forms")
    with pytest.raises(GateError, match="same outputs"):
        compare(expected, {"scores": same["scores"]}, 1e-5, "two forms")
