"""What is measured of a model: floating-point operations by hand, bytes, zeros, distinct values, latency, quality."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest

from compression_world import TRAIN, digits, digits_data, digits_model, tensors
from fusion.compat import keras, tf
from fusion.compression.base import Compressed, answer_of
from fusion.compression.flops import count_flops
from fusion.compression.measure import SIGNATURE, constants, latency, litert_answer, measure
from fusion.errors import GateError
from fusion.export.litert import Runner
from fusion.export.tflite import Conversion, check_runs, convert
from fusion.submodels.text_bert import ScaledDotProductAttention

layers = keras.layers


def flops_of(layer, *shapes):
    inputs = [keras.Input(shape) for shape in shapes]
    model = keras.Model(inputs, layer(inputs if len(inputs) > 1 else inputs[0]))
    specs = [tf.TensorSpec([1, *shape]) for shape in shapes]
    return count_flops(tf.function(lambda *x: model([*x], training=False)).get_concrete_function(*specs))


BIAS = 1
"""Additions of the bias, one for each output."""


@pytest.mark.parametrize(
    ("layer", "shape", "by_hand"),
    [
        (layers.Dense(5), (8,), 5 * (2 * 8 + BIAS)),
        (layers.Dense(5), (7, 8), 7 * 5 * (2 * 8 + BIAS)),
        (layers.Conv2D(6, 3, padding="same"), (10, 12, 4), 10 * 12 * 6 * (2 * 3 * 3 * 4 + BIAS)),
        (layers.Conv2D(6, 3, strides=2, padding="same"), (10, 12, 4), 5 * 6 * 6 * (2 * 3 * 3 * 4 + BIAS)),
        (layers.Conv2D(6, 3, groups=2, use_bias=False), (10, 12, 4), 8 * 10 * 6 * 2 * 3 * 3 * 2),
        (layers.Conv2DTranspose(6, 3, strides=2, use_bias=False), (5, 4, 2), 5 * 4 * 2 * 2 * 3 * 3 * 6),
        (layers.DepthwiseConv2D(3, strides=2, padding="same"), (10, 12, 4), 5 * 6 * 4 * (2 * 3 * 3 + BIAS)),
        (layers.MaxPooling2D(2), (4, 6, 3), 2 * 3 * 3 * 2 * 2),
        (layers.EinsumDense("abc,cd->abd", (7, 5)), (7, 4), 2 * 7 * 4 * 5),
        (layers.EinsumDense("...c,cd->...d", 5), (6, 7, 4), 2 * 6 * 7 * 4 * 5),
        # Each of 7 steps: 4 · 15 and 5 · 15 multiplications, two biases, and 11 operations on each of 5 numbers.
        (layers.GRU(5), (7, 4), 7 * (2 * (4 + 5) * 15 + 2 * 15 + 11 * 5)),
    ],
)
def test_operations_by_hand(layer, shape, by_hand):
    """N1: exact for dense, convolution, depthwise; also in functions and loops, where TensorFlow's profiler sees 0."""
    assert flops_of(layer, shape) == by_hand


def test_operations_of_attention_by_hand():
    """N1: attention over 16 tokens in 2 heads of 4: two products, scaling, the mask, softmax (5 a number)."""
    tokens, hidden, heads = 16, 8, 2
    products = 2 * (2 * heads * tokens * tokens * (hidden // heads))
    scores = heads * tokens * tokens
    others = tokens * hidden + 2 * tokens + (1 + 5) * scores
    assert flops_of(ScaledDotProductAttention(heads), *[(tokens, hidden)] * 3, (tokens,)) == products + others


def test_operations_on_what_is_found_when_it_runs():
    """N1: of a mask of 6 numbers all may be set; elsewhere an unknown axis is that of a batch of one."""

    def twice_what_is_above_zero(numbers):
        return 2.0 * tf.gather_nd(numbers, tf.where(numbers > 0))

    counted = tf.function(twice_what_is_above_zero)
    assert count_flops(counted.get_concrete_function(tf.TensorSpec([2, 3]))) == 6
    doubled = tf.function(lambda numbers: 2.0 * numbers)
    assert count_flops(doubled.get_concrete_function(tf.TensorSpec([None, 3]))) == 3


def counted(function, *shapes):
    specs = [tf.TensorSpec(shape) for shape in shapes]
    return count_flops(tf.function(function).get_concrete_function(*specs))


def test_operations_of_sums_and_of_the_error_function():
    """N1: a sum of three takes two additions; x · erfc(-x / √2) / 2, as GELU is written, five for each number."""
    assert counted(lambda x: tf.add_n([x, x, x]), [10]) == 2 * 10
    assert counted(lambda x: 0.5 * x * tf.math.erfc(-x * math.sqrt(0.5)), [10]) == 5 * 10


def test_operations_of_the_larger_branch():
    """N1: one of two branches is taken, and at most the larger one."""

    def either(x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: x @ tf.ones((4, 5)), lambda: tf.ones((2, 5)))

    assert counted(either, [2, 4]) == 2 * 4 + 2 * 2 * 4 * 5  # the sum, and the product


def test_operations_of_products_whose_axes_have_no_names():
    """N1: axes behind an ellipsis are aligned at their end, and those of length 1 repeated."""
    assert counted(lambda x, y: tf.einsum("...ab,...bc->...ac", x, y), [3, 1, 4, 5], [2, 5, 6]) == 2 * 3 * 2 * 4 * 5 * 6
    assert counted(lambda x, y: tf.einsum("a...,ab->b...", x, y), [4, 7], [4, 5]) == 2 * 4 * 7 * 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model():
    model = digits_model()
    kernel = model.get_layer("block1_conv").kernel.numpy()
    model.get_layer("block1_conv").set_weights([np.sign(kernel) * (np.arange(kernel.size).reshape(kernel.shape) % 2)])
    return model


@pytest.fixture(scope="module")
def measured(model, data):
    return measure(Compressed(model), data)


def test_figures_by_hand(measured, model, data):
    """K10, A4, A5: bytes, zeros, distinct values, operations and quality of a network whose figures are known."""
    measures, tflite = measured
    kernels = {"block0_conv": 3 * 3 * 3 * 16, "block1_conv": 3 * 3 * 16 * 32, "logits": 32 * 10}
    assert measures.bytes["raw"] == 4 * model.count_params()
    assert measures.bytes["tflite"] == len(tflite)
    assert measures.bytes["tflite_gzip"] == len(gzip.compress(tflite, 6, mtime=0)) < len(tflite)
    assert measures.bytes["gzip"] < measures.bytes["raw"] / 3  # most weights are zeros and ones
    assert "coded" not in measures.bytes
    assert measures.zeros == pytest.approx(kernels["block1_conv"] / 2 / sum(kernels.values()))
    assert measures.distinct["block1_conv"] == 3
    assert set(measures.distinct) == set(kernels)
    products = 2 * (8 * 8 * kernels["block0_conv"] + 4 * 4 * kernels["block1_conv"] + kernels["logits"])
    assert products < measures.flops < 1.05 * products
    values = data.judge(answer_of(model))
    np.testing.assert_array_equal(measures.values, values)
    assert measures.quality == pytest.approx(values.mean())
    assert set(measures.latency) == {"litert_1", "litert_2", "savedmodel"}
    assert all(0 < at["p50_ms"] <= at["p95_ms"] for at in measures.latency.values())


def test_the_dump_is_json_without_values(measured):
    """A report holds figures, not rows."""
    dumped = json.loads(json.dumps(measured[0].dump()))
    assert "values" not in dumped
    assert dumped["metric"] == "accuracy" and dumped["bytes"]["raw"] > 0


def test_quality_is_that_of_the_file(model, data):
    """K10: what is judged is what the file answers, not what the Keras model does."""
    spoiled = digits_model(seed=11)
    measures, tflite = measure(Compressed(spoiled, Conversion("int8", data.representative), coded_bytes=7), data)
    np.testing.assert_array_equal(measures.values, data.judge(litert_answer(tflite)))
    assert measures.bytes["coded"] == 7
    kernels = measures.tensors["int8"]
    assert kernels["bytes"] > 5000 and "float32" not in measures.tensors
    images, _ = digits()
    outputs = litert_answer(tflite)({"image": images[TRAIN:]})
    assert not np.array_equal(outputs, answer_of(spoiled)({"image": images[TRAIN:]}))


def test_constants_by_dtype(measured):
    """Bytes and zeros of each dtype are those of the arrays that LiteRT reads from the file."""
    _, tflite = measured
    counted = constants(tflite)["float32"]
    (kernel,) = (array for array in tensors(tflite).values() if array.shape == (32, 3, 3, 16))
    assert np.count_nonzero(kernel) == kernel.size / 2
    kernels, biases = (3 * 3 * 3 * 16, 3 * 3 * 16 * 32, 32 * 10), (16, 32)  # that of the logits is zero and left out
    assert counted["bytes"] == 4 * (sum(kernels) + sum(biases) + 2)  # 2: of Rescaling
    assert counted["zeros"] >= 0.4


def test_calls_are_adapted_to_the_time(monkeypatch):
    """L13: a fast call is measured often, a slow one seldom, and neither without warming up."""
    clock, calls = [0.0], [0]
    monkeypatch.setattr("fusion.compression.measure.time.perf_counter", lambda: clock[0])

    def call(seconds):
        def run():
            calls[0] += 1
            clock[0] += seconds * (10 if calls[0] <= 3 else 1)

        calls[0] = 0
        return latency(run)

    assert call(0.0001) == {"p50_ms": 0.1, "p95_ms": 0.1}
    assert calls[0] == 3 + 400
    assert call(0.5)["p50_ms"] == 500.0
    assert calls[0] == 3 + 20


def test_a_cut_file_is_refused(measured, tmp_path):
    """A `.tflite` cut in half is answered with one sentence, from a file and from bytes."""
    half = measured[1][: len(measured[1]) // 2]
    path = tmp_path / "half.tflite"
    path.write_bytes(half)
    with pytest.raises(GateError, match=r"half\.tflite must be a \.tflite file that is whole"):
        Runner(path)
    with pytest.raises(GateError, match=r"the \.tflite file must run once; .*that is whole"):
        check_runs(half, {"image": np.zeros((1, 8, 8, 3), np.uint8)})


def test_the_runner_answers_rows_in_any_number(measured):
    """One interpreter answers row by row and, resized, all rows at once; it checks names."""
    runner = Runner(measured[1], SIGNATURE, threads=2)
    images = digits()[0][:5]
    rows = runner.row_by_row({"image": images})["logits"]
    assert runner.inputs == {"image": np.uint8} and runner.outputs == {"logits": np.float32}
    np.testing.assert_allclose(runner({"image": images[2:3]})["logits"], rows[2:3], atol=1e-5)
    with pytest.raises(GateError, match=r"takes the inputs \['image'\]"):
        runner({"picture": images})


def test_a_file_with_two_signatures():
    """Each signature has its own runner, and a batch may have another size than the one before."""
    module = tf.Module()
    spec = [tf.TensorSpec([None, 2], name="x")]
    signatures = {
        "double": tf.function(lambda x: {"y": 2 * x}, input_signature=spec),
        "square": tf.function(lambda x: {"y": x * x}, input_signature=spec),
    }
    tflite = convert(signatures, module)
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    np.testing.assert_array_equal(Runner(tflite, "square")({"x": x})["y"], x * x)
    double = Runner(tflite, "double")
    np.testing.assert_array_equal(double({"x": x})["y"], 2 * x)
    np.testing.assert_array_equal(double({"x": x[:1]})["y"], 2 * x[:1])
    with pytest.raises(GateError, match="has the signatures"):
        Runner(tflite)
