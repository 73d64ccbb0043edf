"""Bounded activations keep outliers out of integer ranges; simple ones answer nearly as the originals do."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from fusion.compat import keras, tf
from fusion.compression.activations import (
    SIMPLE,
    ClipActivations,
    LearnedClip,
    SimpleActivations,
    activation_of,
    quadratic_gelu,
    separate_relus,
)
from fusion.compression.base import Compressed, CompressionData, answer_of
from fusion.compression.codes import kl_limit, mse_limit
from fusion.compression.measure import litert_answer, serving_function
from fusion.config import parse
from fusion.errors import ConfigError, GateError
from fusion.export.tflite import Conversion, convert
from fusion.submodels.text_bert import TextBert
from fusion.training.batches import as_rows
from fusion.types import RunOptions
from tiny_bert import write_tiny_bert

layers = keras.layers


def data_of(features, target, folder):
    """Rows that are to be answered with `target`; the quality is the squared distance."""
    return CompressionData(
        rows=as_rows({**features, "target": target}),
        loss=lambda output, batch: tf.reduce_mean(tf.square(output - batch["target"]), axis=1),
        representative=features,
        judge=lambda answer: np.square(answer(features) - target).mean(axis=1),
        metric="squared_distance",
        higher_is_better=False,
        options=RunOptions(3, folder, quiet=True),
    )


def applied(method, settings, model, data):
    return method(parse(method.Config, settings)).apply(Compressed(model), data)


def written(model, features, conversion):
    """The `.tflite` of a model."""
    owner = tf.Module()
    owner.kept = model.variables
    return convert({"serving_default": serving_function(model, features)}, owner, conversion)


@pytest.fixture(scope="module")
def net():
    """x `[B, 4]` -> `[B, 2]`, with a ReLU of each kind: as a layer, as an Activation, fused, with a maximum of its own;
    a skip connection; one that is dead."""
    keras.utils.set_random_seed(2)
    inputs = layers.Input((4,), name="x")
    x = layers.ReLU(name="layer")(layers.Dense(8, name="a")(inputs))
    y = layers.Activation("relu", name="activation")(layers.Dense(8, name="b")(x))
    z = layers.Dense(8, activation="relu", name="fused")(y)
    z = layers.Add(name="add")([z, y])
    z = layers.ReLU(6.0, name="six")(layers.Dense(8, name="c")(z))
    dead = layers.Dense(8, name="d", kernel_initializer="zeros")(inputs)
    z = layers.Add(name="add2")([z, layers.ReLU(name="dead")(dead)])
    z = layers.Add(name="add3")([z, y])
    return keras.Model(inputs, layers.Dense(2, name="logits")(z))


@pytest.fixture(scope="module")
def rows():
    """500 rows of usual size, of which one is a hundred times as large."""
    x = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    x[123] *= 100
    return {"x": x}


@pytest.fixture
def data(net, rows, tmp_path):
    return data_of(rows, answer_of(net)(rows), tmp_path)


def test_fused_relus_become_layers(net, rows):
    """L10: the same answers, and the same weights by name."""
    apart = separate_relus(net)
    assert activation_of(apart.get_layer("fused")) == "linear"
    assert activation_of(apart.get_layer("fused_relu")) == "relu"
    assert activation_of(net.get_layer("fused")) == "relu"
    np.testing.assert_allclose(answer_of(apart)(rows), answer_of(net)(rows), rtol=1e-5, atol=1e-4)
    shared = layers.Dense(4, activation="relu", name="shared")
    inputs = layers.Input((4,), name="x")
    twice = keras.Model(inputs, shared(shared(inputs)))
    np.testing.assert_allclose(answer_of(separate_relus(twice))(rows), answer_of(twice)(rows), rtol=1e-5)


def test_outputs_stay_within_their_bounds(net, data, rows):
    """L10: bounds are percentiles of what the representative rows give; outliers do not pass them, and rows of usual
    size are answered nearly as before."""
    found, told = applied(ClipActivations, {"percentile": 99}, net, data)
    ranges = told.facts["ranges"]
    assert set(ranges) == {"layer", "activation", "fused_relu", "six"}
    assert told.left_alone == {"dead": "gives nothing but zeros"}
    names = list(ranges)
    observed = keras.Model(net.input, net.get_layer("layer").output)(rows["x"]).numpy()
    assert ranges["layer"]["bound"] == pytest.approx(np.percentile(observed, 99), rel=1e-5)
    assert ranges["layer"]["largest"] == pytest.approx(observed.max(), rel=1e-5)
    assert ranges["layer"]["beyond"] == pytest.approx(0.01, abs=0.002)
    watched = keras.Model(found.model.input, [found.model.get_layer(name).output for name in names])
    outlier = {"x": 1e6 * np.ones((1, 4), np.float32)}
    for name, output in zip(names, watched(outlier["x"]), strict=True):
        bound = found.model.get_layer(name).get_config()["max_value"]
        assert (
            output.numpy().max() <= bound == pytest.approx(min(ranges[name]["bound"], 6 if name == "six" else np.inf))
        )
    before, after = (answer_of(model)({"x": rows["x"][:100]}) for model in (net, found.model))
    assert np.abs(after - before).mean() < 0.05 * np.abs(before).mean()
    assert np.abs(answer_of(found.model)(outlier)).max() < np.abs(answer_of(net)(outlier)).max() / 1000


def test_integer_ranges_are_tighter(net, data, rows):
    """L10: calibrated on the same rows, with the outlier, the steps of int8 activations are finer, and the answers of
    usual rows are nearer to those of the float model, as far as the step of the input allows."""
    found, _ = applied(ClipActivations, {"percentile": 99}, net, data)
    conversion = Conversion("int8", rows)
    usual = {"x": rows["x"][:100]}
    wanted = answer_of(net)(usual)
    errors, steps = {}, {}
    for name, model in (("plain", net), ("clipped", found.model)):
        tflite = written(model, rows, conversion)
        details = Interpreter(model_content=tflite).get_tensor_details()
        steps[name] = max(
            float(tensor["quantization"][0])
            for tensor in details
            if list(tensor["shape"]) == [1, 8] and "elu" in tensor["name"]
        )
        errors[name] = np.abs(litert_answer(tflite)(usual) - wanted).mean()
    assert steps["clipped"] < steps["plain"] / 5
    assert errors["clipped"] < 0.9 * errors["plain"]


def test_learned_bounds(net, data):
    """L10: a strong decay takes the bounds far below what was seen; layers are plain again in the end."""
    training = {"epochs": 2, "batch_size": 50, "learning_rate": 0.003}
    found, told = applied(ClipActivations, {"bounds": "learned", "decay": 0.5, "training": training}, net, data)
    assert not any(isinstance(layer, LearnedClip) for layer in found.model.layers)
    assert set(told.facts["ranges"]) == {"layer", "activation", "fused_relu", "six"}
    for name, row in told.facts["ranges"].items():
        assert 0 < row["bound"] < 0.7 * row["largest"]
        assert found.model.get_layer(name).get_config()["max_value"] == pytest.approx(row["bound"])
    assert np.abs(found.model.get_layer("a").kernel - net.get_layer("a").kernel).max() > 0.001  # weights adapt too


def test_bounds_from_sampled_outputs(net, data, rows):
    """L8, L10: kl, which looks at how many there are, cuts the outlier; mse, which looks at how far off they are, need
    not; both are those of the layer's outputs."""
    observed = keras.Model(net.input, net.get_layer("layer").output)(rows["x"]).numpy()
    for bounds, limit in (("mse", mse_limit), ("kl", kl_limit)):
        _, told = applied(ClipActivations, {"bounds": bounds, "bits": 4}, net, data)
        row = told.facts["ranges"]["layer"]
        assert row["bound"] == pytest.approx(limit(observed, 4)[0], rel=1e-4)
    assert 0 < row["bound"] < row["largest"] / 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": "mse", "percentile": 51}, "bounds: mse reads no percentile; leave that out"),
        ({"bounds": "kl", "decay": 0.1, "training": {"epochs": 9}}, "bounds: kl reads no decay, no training; leave"),
        ({"bits": 4}, "bounds: percentile reads no bits; leave that out"),
        ({"bounds": "learned", "percentile": 99}, "bounds: learned reads no percentile"),
    ],
)
def test_settings_of_other_bounds_are_refused(settings, message):
    """L10: what nothing would read must not look as if it counted; defaults, which a dump names, say nothing."""
    with pytest.raises(ConfigError, match=message):
        parse(ClipActivations.Config, settings)
    read = parse(ClipActivations.Config, {"bounds": settings.get("bounds", "percentile")})
    assert parse(ClipActivations.Config, read.model_dump(mode="json")) == read


def test_relus_that_cannot_be_bounded(tmp_path):
    """L10: one that is used twice is left alone under the name of its layer; a leaky one is no ReLU; one that is nearly
    always zero keeps what it has."""
    inputs = layers.Input((4,), name="x")
    shared = layers.Dense(4, activation="relu", name="shared")
    x = layers.ReLU(negative_slope=0.1, name="leaky")(shared(shared(inputs)))
    model = keras.Model(inputs, layers.ReLU(name="last")(layers.Dense(4, name="dense")(x)))
    rows = {"x": np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)}
    before = keras.Model(inputs, model.get_layer("dense").output)(rows["x"])
    model.get_layer("dense").bias.assign(0.001 - tf.reduce_max(before, axis=0))  # four of 200 outputs are above zero
    data = data_of(rows, np.zeros((50, 4), np.float32), tmp_path)
    _, told = applied(ClipActivations, {"percentile": 90}, model, data)
    assert told.left_alone == {"shared": "is used more than once"}
    assert told.facts["ranges"]["last"]["bound"] == told.facts["ranges"]["last"]["largest"] > 0


def test_gradient_of_a_learned_bound():
    """L10: by hand: α is 2, in 3 steps; what lies beyond moves it, what lies below does not."""
    layer = LearnedClip(2.0, decay=0.5, bits=2)
    x = tf.Variable([[-1.0, 0.5, 1.2, 3.0, 9.0]])
    with tf.GradientTape() as tape:
        output = layer(x)
    np.testing.assert_allclose(output, [[0, 2 / 3, 4 / 3, 2, 2]], rtol=1e-6)
    by_input, by_exponent = tape.gradient(output, [x, layer.exponent])
    np.testing.assert_array_equal(by_input, [[0, 1, 1, 0, 0]])
    assert by_exponent.numpy() == pytest.approx(2 * 20 * 2)  # two outputs beyond it, and α' = 20 α
    assert layer.losses[0].numpy() == pytest.approx(0.5 * 4)


def test_models_without_relu_are_refused(tmp_path):
    """L10, L11: nothing to do is no success."""
    inputs = layers.Input((4,), name="x")
    linear = keras.Model(inputs, layers.Dense(2, name="logits")(inputs))
    rows = {"x": np.ones((3, 4), np.float32)}
    data = data_of(rows, np.zeros((3, 2), np.float32), tmp_path)
    with pytest.raises(GateError, match="must have a ReLU that is not always zero"):
        applied(ClipActivations, {}, linear, data)
    with pytest.raises(GateError, match=r"gelu or swish within it.*has no activation"):
        applied(SimpleActivations, {"activations": ["gelu", "swish"]}, linear, data)
    with pytest.raises(ConfigError, match="activations"):
        parse(SimpleActivations.Config, {"activations": ["relu"]})


# ---- simple activations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SIMPLE))
def test_simple_forms_differ_by_what_is_stated(name):
    """L11: the largest difference over a fine grid is what the table says, and no less than .99 of it."""
    x = tf.linspace(-30.0, 30.0, 600_001)
    difference = np.abs(SIMPLE[name].function(x) - keras.activations.get(name)(x)).max()
    assert 0.99 * SIMPLE[name].most < difference <= SIMPLE[name].most


def test_quadratic_gelu_by_hand():
    """L11: I-BERT's formula with a sign: x/2 (1 + sgn(x) (a (min(|x|/√2, -b) + b)² + 1)), a = -.2888, b = -1.769."""
    x = np.array([-4.0, -1.0, 0.0, 0.5, 3.0])
    u = np.minimum(np.abs(x) / np.sqrt(2), 1.769)
    formula = x / 2 * (1 + np.sign(x) * (-0.2888 * (u - 1.769) ** 2 + 1))
    np.testing.assert_allclose(quadratic_gelu(tf.constant(x)), formula, atol=1e-12)
    np.testing.assert_allclose(formula[[0, 2, 4]], [0, 0, 3], atol=1e-12)


def test_arguments_and_layers_get_simple_forms(tmp_path):
    """L11: `Activation` layers and `activation` arguments, but not the output's; named ones alone where some are
    named; what is written runs in LiteRT with the same answers, hard_swish as one operation."""
    keras.utils.set_random_seed(3)
    inputs = layers.Input((6, 6, 3), name="x")
    x = layers.Conv2D(4, 3, activation="swish", name="conv")(inputs)
    x = layers.DepthwiseConv2D(3, activation="sigmoid", name="depthwise")(x)
    x = layers.Activation("tanh", name="bend")(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(2, activation="sigmoid", name="answer")(x))
    features = {"x": np.random.default_rng(1).normal(size=(20, 6, 6, 3)).astype(np.float32)}
    data = data_of(features, np.zeros((20, 2), np.float32), tmp_path)
    found, told = applied(SimpleActivations, {}, model, data)
    kinds = {layer.name: activation_of(layer) for layer in found.model.layers}
    assert kinds["conv"] == "hard_swish" and kinds["depthwise"] == "hard_sigmoid" and kinds["bend"] == "hard_tanh"
    assert kinds["answer"] == "sigmoid"
    assert told.left_alone == {"answer": "has the activation of the model's answer"}
    assert told.facts["layers"]["bend"] == {"was": "tanh", "is": "hard_tanh", "largest_difference": 0.2385}
    assert activation_of(model.get_layer("conv")) == "swish"
    tflite = written(found.model, features, Conversion())
    np.testing.assert_allclose(litert_answer(tflite)(features), answer_of(found.model)(features), atol=1e-5)
    operations = Interpreter(model_content=tflite)._get_ops_details()
    assert "HARD_SWISH" in {operation["op_name"] for operation in operations}
    found, _ = applied(SimpleActivations, {"activations": ["tanh"]}, model, data)
    assert activation_of(found.model.get_layer("conv")) == "swish"


def test_gelu_of_bert(tmp_path):
    """L11: BERT's activations become quadratic; the answers hardly move; LiteRT runs the result with built-in
    operations."""
    folder = str(write_tiny_bert(tmp_path, num_hidden_layers=1))
    bert = TextBert(parse(TextBert.Config, {"init_from": folder, "max_tokens": 16, "fine_tune": "all"}), 1)
    features = bert.prepare(["a red film", "the sea", "war and the blue night"] * 8)
    model = bert.encoder()
    wanted = answer_of(model)(features)
    data = data_of(features, wanted, tmp_path / "bert")
    found, told = applied(SimpleActivations, {}, model, data)
    assert set(told.facts["layers"]) == {"layer0_activation"}
    moved = np.abs(answer_of(found.model)(features) - wanted).max()
    assert 0 < moved < 0.02
    tflite = written(found.model, features, Conversion())
    np.testing.assert_allclose(litert_answer(tflite)(features), answer_of(found.model)(features), atol=1e-5)


def test_repair_adapts_the_weights(tmp_path):
    """L11: fine-tuning takes back at least half of what the simple form cost."""
    keras.utils.set_random_seed(4)
    inputs = layers.Input((4,), name="x")
    x = layers.Dense(16, activation="tanh", name="bend")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="logits")(x))
    features = {"x": 1.5 * np.random.default_rng(2).normal(size=(300, 4)).astype(np.float32)}
    data = data_of(features, answer_of(model)(features), tmp_path)
    plain, _ = applied(SimpleActivations, {}, model, data)
    repair = {"epochs": 10, "batch_size": 30, "learning_rate": 0.01}
    repaired, _ = applied(SimpleActivations, {"repair": repair}, model, data)
    assert data.quality(answer_of(repaired.model)) < data.quality(answer_of(plain.model)) / 2
