"""Pruning in all its kinds: how many weights become zero, which ones, and what is left of the model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import orthogonal_mp_gram

from compression_world import digits_data, digits_model
from fusion.compat import keras, tf
from fusion.compression.base import (
    Compressed,
    CompressionData,
    answer_of,
    clone,
    fine_tune,
    input_names,
    kernel_of,
)
from fusion.compression.gaussian import Gaussian
from fusion.compression.l0 import HIGH, L0, LOW, TEMPERATURE, HardConcrete
from fusion.compression.masks import fine_tune_sparse, magnitude_mask, random_mask, zeros_in
from fusion.compression.pruning import Prune, stripped
from fusion.compression.sensitivity import PruneBySensitivity
from fusion.compression.sparse_regression import SparseRegression, matching_pursuit
from fusion.config import parse
from fusion.errors import ConfigError, GateError
from fusion.submodels.text_bert import TextBert
from fusion.training.batches import as_rows
from fusion.training.trainer import TrainingSettings
from fusion.types import RunOptions
from tiny_bert import write_tiny_bert

layers = keras.layers
KERNELS = ("block0_conv", "block1_conv", "logits")
SHORT = {"epochs": 2, "batch_size": 48, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = digits_model()
    data = digits_data(tmp_path_factory.mktemp("digits"))
    fine_tune(model, data, TrainingSettings(epochs=6, batch_size=32, learning_rate=0.005))
    return model


def applied(method, model, data, **settings):
    """What a method makes of a model, which has to stay as it is."""
    before = [weight.copy() for weight in model.get_weights()]
    compressed, done = method(parse(method.Config, settings)).apply(Compressed(model), data)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [layer.name for layer in compressed.model.layers] == [layer.name for layer in model.layers]
    assert [type(layer) for layer in compressed.model.layers] == [type(layer) for layer in model.layers]
    assert input_names(compressed.model) == input_names(model)
    return compressed.model, done


def kernel(model, name):
    return kernel_of(model.get_layer(name)).numpy()


def accuracy(model, folder):
    return digits_data(folder).quality(answer_of(model))


# ---- TFMOT's pruning


def test_magnitude_pruning_while_training(model, tmp_path):
    """K1, K11: the share of zeros is met to .1 %, no wrapper is left, and training makes up for what was lost."""
    settings = {"sparsity": 0.8, "training": SHORT}
    pruned, done = applied(Prune, model, digits_data(tmp_path), **settings)
    zeros = sum(zeros_in(kernel(pruned, name)) for name in KERNELS)
    assert zeros / sum(kernel(model, name).size for name in KERNELS) == pytest.approx(0.8, abs=0.001)
    assert done.facts["sparsity"] == pytest.approx(0.8, abs=0.001)
    assert done.facts["sparsity_by_layer"]["block1_conv"] == zeros_in(kernel(pruned, "block1_conv")) / 4608
    assert set(done.left_alone) == {"block0_bn", "block1_bn"}
    assert accuracy(pruned, tmp_path) > done.facts["quality_without_training"]["magnitude"] + 0.2


def test_sparsity_rises_along_a_polynomial():
    """K1: TFMOT's schedule begins with the first forward pass, and is where it should be while training goes on."""
    method = Prune(parse(Prune.Config, {"sparsity": 0.8, "ramp": 0.5}))
    constant = Prune(parse(Prune.Config, {"sparsity": 0.8, "schedule": "constant"}))

    def asked(schedule, step):
        return tuple(float(value) for value in schedule(tf.constant(step, tf.int64)))

    rising = method._schedule(402)  # for 201 passes; masks are chosen anew in every tenth
    assert asked(rising, 1) == (True, 0)
    assert asked(rising, 101) == (True, pytest.approx(0.8 * (1 - 0.5**3)))
    assert not asked(rising, 102)[0]
    assert asked(rising, 201) == (True, pytest.approx(0.8))
    assert asked(rising, 211) == (False, pytest.approx(0.8))  # from here on training repairs
    assert asked(method._schedule(1), 1) == (True, pytest.approx(0.8))  # too short to rise
    assert asked(constant._schedule(402), 1) == (True, pytest.approx(0.8))


def test_stripping_changes_no_answer(model):
    """K1: what a model answers with TFMOT's wrappers and without is equal bit by bit."""
    method = Prune(parse(Prune.Config, {"sparsity": 0.6}))
    wrapped, pruned = method._wrapped(model, KERNELS, method._schedule(0))
    for layer in pruned:
        layer.pruning_step.assign(1)
        layer.pruning_obj.conditional_mask_update()
        layer.pruning_obj.weight_mask_op()
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    before = answer_of(wrapped)({"image": images})
    assert len(wrapped.weights) > len(model.weights)
    assert len(stripped(wrapped).weights) == len(model.weights)
    np.testing.assert_array_equal(before, answer_of(stripped(wrapped))({"image": images}))
    assert np.abs(before - answer_of(model)({"image": images})).max() > 0.01


def test_one_threshold_for_each_layer(model, tmp_path):
    """K6: the largest weights of each layer stay, exactly."""
    pruned, done = applied(Prune, model, digits_data(tmp_path), sparsity=0.7, training=None)
    for name in KERNELS:
        old = kernel(model, name)
        smallest = np.sort(np.abs(old), axis=None)[-round(old.size * 0.3)]
        np.testing.assert_array_equal(kernel(pruned, name), np.where(np.abs(old) >= smallest, old, 0))
        np.testing.assert_array_equal(kernel(pruned, name) != 0, magnitude_mask(old, 0.7))
    assert done.facts["quality_without_training"]["magnitude"] == accuracy(pruned, tmp_path)


def test_one_threshold_for_all_layers(model, tmp_path):
    """K5: the largest weights of all layers together stay, so that layers lose different shares."""
    pruned, done = applied(Prune, model, digits_data(tmp_path), sparsity=0.7, scope="global", training=None)
    magnitudes = np.concatenate([np.abs(kernel(model, name)).ravel() for name in KERNELS])
    threshold = np.sort(magnitudes)[-round(magnitudes.size * 0.3)]
    for name in KERNELS:
        old = kernel(model, name)
        np.testing.assert_array_equal(kernel(pruned, name), np.where(np.abs(old) >= threshold, old, 0))
    assert done.facts["sparsity"] == pytest.approx(0.7, abs=0.001)
    shares = done.facts["sparsity_by_layer"]
    assert shares["block1_conv"] > shares["logits"] + 0.1


def test_one_threshold_while_training(tmp_path):
    """K5: the threshold moves with the weights while they are trained, and the share of all layers is met."""
    wide, narrow = layers.Dense(60, name="wide"), layers.Dense(10, name="narrow")
    model = keras.Sequential([layers.Input((20,), name="x"), wide, layers.ReLU(), narrow])
    wide.kernel.assign(wide.kernel / 3)
    rows = np.random.default_rng(3).normal(size=(64, 20)).astype(np.float32)
    data = small_data(tmp_path, {"x": rows}, np.tanh(rows[:, :10]))
    training = {"epochs": 10, "batch_size": 16, "learning_rate": 0.003, "accumulate": 2}  # masks see each half
    pruned, done = applied(Prune, model, data, sparsity=0.5, scope="global", training=training)
    resumed, _ = applied(Prune, model, data, sparsity=0.5, scope="global", training=training)
    np.testing.assert_array_equal(kernel(resumed, "wide"), kernel(pruned, "wide"))
    old = np.concatenate([np.abs(kernel(model, name)).ravel() for name in ("wide", "narrow")])
    new = np.concatenate([np.abs(kernel(pruned, name)).ravel() for name in ("wide", "narrow")])
    assert np.sum(new == 0) == 900
    assert np.sum((new == 0) != (old < np.median(old))) > 5  # the masks are not those of the first step
    assert done.facts["sparsity_by_layer"]["wide"] > 0.6 > 0.4 > done.facts["sparsity_by_layer"]["narrow"]


def test_two_of_four(model, tmp_path):
    """K3: of each 4 consecutive input channels the 2 smallest weights are zero."""
    pruned, done = applied(Prune, model, digits_data(tmp_path), m_by_n=[2, 4], layers=["block1*", "lo*"], training=None)
    for name in ("block1_conv", "logits"):
        old, new = kernel(model, name), kernel(pruned, name)
        groups = [np.moveaxis(values, -2, -1).reshape(-1, 4) for values in (old, new)]
        second = np.sort(np.abs(groups[0]), axis=1)[:, 2:3]
        np.testing.assert_array_equal(groups[1], np.where(np.abs(groups[0]) >= second, groups[0], 0))
    assert done.facts["sparsity"] == 0.5
    assert done.left_alone["block0_conv"] == "not among the layers that were asked for"


def test_whole_blocks(model, tmp_path):
    """K3: blocks of a Dense kernel are zero as a whole, those with the least mean magnitude; convolutions are told."""
    pruned, done = applied(Prune, model, digits_data(tmp_path), sparsity=0.25, block=[4, 2], training=None)
    blocks = np.abs(kernel(model, "logits")).reshape(8, 4, 5, 2).mean(axis=(1, 3))
    kept = kernel(pruned, "logits").reshape(8, 4, 5, 2).any(axis=(1, 3))
    assert not kept[blocks < np.sort(blocks, axis=None)[10]].any() and kept.sum() == 30
    assert "not to be cut into blocks [4, 2]" in done.left_alone["block0_conv"]


def test_random_pruning_is_the_baseline(model, tmp_path):
    """K2: as many zeros in each layer but anywhere, decided by the seed; its quality stands beside magnitude's."""
    data = digits_data(tmp_path)
    pruned, done = applied(Prune, model, data, criterion="random", training=None)
    again, _ = applied(Prune, model, data, criterion="random", training=None, layers=["block*"])
    other, _ = applied(Prune, model, replace(data, options=RunOptions(9, tmp_path)), criterion="random", training=None)
    for name in KERNELS:
        assert zeros_in(kernel(pruned, name)) == kernel(model, name).size // 2
    np.testing.assert_array_equal(kernel(pruned, "block1_conv"), kernel(again, "block1_conv"))
    assert (kernel(pruned, "block1_conv") != kernel(other, "block1_conv")).any()
    found = done.facts["quality_without_training"]
    assert found["random"] == accuracy(pruned, tmp_path) < found["magnitude"]


def test_training_keeps_zeros(model, tmp_path):
    """K11: repair leaves each zero where it is and makes none, while all other weights move."""
    start = clone(model)
    for name in KERNELS:
        variable = kernel_of(start.get_layer(name))
        variable.assign(
            variable * random_mask(variable.shape, variable.shape.num_elements() // 2, np.random.default_rng(0))
        )
    trained = clone(start)
    data = digits_data(tmp_path)
    fine_tune_sparse(trained, data, TrainingSettings(**{**SHORT, "optimizer": "adam"}))
    for name in KERNELS:
        np.testing.assert_array_equal(kernel(trained, name) == 0, kernel(start, name) == 0)
        assert (kernel(trained, name) != kernel(start, name)).mean() == pytest.approx(0.5, abs=0.01)
    assert accuracy(trained, tmp_path) > accuracy(start, tmp_path) + 0.2


def test_masks_by_hand():
    """K2, K6: of equal magnitudes the first stay, one weight always does, and a random mask has its zeros exactly."""
    values = np.array([[3.0, -1.0], [1.0, -2.0]])
    np.testing.assert_array_equal(magnitude_mask(values, 0.25), [[True, True], [False, True]])
    np.testing.assert_array_equal(magnitude_mask(values, 0.99), [[True, False], [False, False]])
    assert np.sum(~random_mask((5, 7), 11, np.random.default_rng(1))) == 11


def xnnpack_net():
    """A network that XNNPACK can run on sparse weights: an inverted residual on uint8 images."""
    image = layers.Input((16, 16, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(image)
    x = layers.ZeroPadding2D(1)(x)
    x = shortcut = layers.Conv2D(16, 3, strides=2, use_bias=False, name="stem")(x)
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(32, 1, use_bias=False, name="expand")(x)))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Add()([shortcut, layers.Conv2D(16, 1, use_bias=False, name="project")(layers.ReLU()(x))])
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    return keras.Model(image, layers.Flatten()(layers.Conv2D(20, 1, name="logits")(x)))


def small_data(folder, features, targets):
    """Rows with a squared loss, which judge as well."""
    return CompressionData(
        rows=as_rows({**features, "target": targets}),
        loss=lambda output, batch: tf.reduce_mean((output - batch["target"]) ** 2, axis=1),
        representative=features,
        judge=lambda answer: np.mean((answer(features) - targets) ** 2, axis=1),
        metric="squared_error",
        higher_is_better=False,
        options=RunOptions(7, folder, quiet=True),
    )


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """An inverted residual network and data on which it is right."""
    model = xnnpack_net()
    images = np.random.default_rng(2).integers(0, 256, (48, 16, 16, 3), np.uint8)
    return model, small_data(
        tmp_path_factory.mktemp("residual"), {"image": images}, answer_of(model)({"image": images})
    )


def test_the_latency_policy_prunes_what_runs_faster(residual):
    """K13: 1×1 convolutions of a network that XNNPACK runs on sparse weights, and nothing else."""
    model, data = residual
    pruned, done = applied(Prune, model, data, sparsity=0.75, policy="latency", training=None)
    for name in ("expand", "project", "logits"):
        assert zeros_in(kernel(pruned, name)) == kernel(pruned, name).size * 3 // 4
    assert done.left_alone["stem"] == "is no 1×1 convolution"
    assert done.left_alone["depthwise"] == "is a DepthwiseConv2D, which TFMOT does not prune"
    assert zeros_in(kernel(pruned, "stem")) == zeros_in(kernel(pruned, "depthwise")) == 0


def test_the_latency_policy_refuses_other_networks(model, tmp_path):
    """K13: a network without the first layer that XNNPACK asks for would be pruned for nothing, and is told so."""
    with pytest.raises(GateError, match=r"policy: latency needs a network from a 3×3 convolution.*Use policy: all\."):
        applied(Prune, model, digits_data(tmp_path), policy="latency")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"prune\.sparsity: input should be less than 1; received 1\.0\."),
        ({"sparsity": 0}, r"prune\.sparsity: input should be greater than 0; received 0\."),
        ({"m_by_n": [4, 4]}, r"m_by_n must be fewer zeros than weights, as in \[2, 4\]; received \[4, 4\]"),
        ({"m_by_n": [2, 4], "block": [4, 1]}, "only one can be had"),
        (
            {"training": None, "schedule": "constant"},
            "with training: null all zeros are there at once; leave out schedule",
        ),
        ({"criterion": "random", "ramp": 0.2}, "with criterion: random all zeros are there at once; leave out ramp"),
        ({"m_by_n": [2, 4], "sparsity": 0.8}, "m_by_n says how many zeros there are, and where; leave out sparsity"),
        ({"block": [4, 1], "scope": "global"}, "scope: global compares single weights"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    """K1, K3: one sentence each, a sparsity of 1 among them."""
    with pytest.raises(ConfigError, match=message):
        parse(Prune.Config, settings, "prune")


def test_settings_are_read_again_as_they_were_dumped():
    """K3: a dump names every setting, those that the pattern has no use for among them."""
    config = parse(Prune.Config, {"m_by_n": [2, 4]})
    assert parse(Prune.Config, config.model_dump(mode="json")) == config


def test_a_model_without_anything_to_prune_is_refused(tmp_path):
    """K1: the reason of each layer is told."""
    tiny = keras.Sequential([layers.Input((4,), name="x"), layers.Dense(3, name="small")])
    data = small_data(tmp_path, {"x": np.ones((4, 4), np.float32)}, np.ones((4, 3), np.float32))
    for method in (Prune, PruneBySensitivity, L0, Gaussian, SparseRegression):
        with pytest.raises(GateError, match=r"must have a layer that fits.*small has only 12 weights"):
            applied(method, tiny, data)


@pytest.mark.slow
def test_bert_is_pruned_with_its_own_layers(tmp_path):
    """K1, K12: embeddings and Dense layers of a transformer are pruned and trained; layers of our own stay whole."""
    folder = write_tiny_bert(tmp_path, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    model = TextBert(
        parse(TextBert.Config, {"init_from": str(folder), "max_tokens": 8, "fine_tune": "all"}), 3
    ).encoder()
    ids = np.random.default_rng(0).integers(4, 15, (24, 8), np.int32)
    mask = (np.arange(8) < np.arange(24)[:, None] % 6 + 3).astype(np.int32)
    features = {"input_ids": ids, "attention_mask": mask}
    data = small_data(tmp_path / "prune", features, answer_of(model)(features))
    names = ["layer0_query", "layer0_wide"]
    assert set(names) <= {layer.name for layer in model.layers}
    training = {"epochs": 2, "batch_size": 24, "learning_rate": 0.003, "optimizer": "sgd"}
    pruned, done = applied(Prune, model, data, sparsity=0.5, layers=names, training=training)
    assert all(zeros_in(kernel(pruned, name)) == kernel(pruned, name).size // 2 for name in names)
    assert done.left_alone["embeddings_position"] == "has no kernel"
    assert data.quality(lambda inputs: pruned(inputs).numpy()) < done.facts["quality_without_training"]["random"]
    _, done = applied(SparseRegression, model, data, layers=names[1:])
    assert done.facts["sparsity"] == 0.5
    assert all(error["regression"] < error["magnitude"] for error in done.facts["relative_error"].values())


# ---- sensitivity


def test_ratios_are_chosen_by_a_scan(model, tmp_path):
    """K7: each layer alone from the lowest up, no further than the stop, then all of them within the budget."""
    data = digits_data(tmp_path)
    settings = {"ratios": [0.2, 0.7, 0.9], "stop": 0.05, "max_drop": 0.03}
    pruned, done = applied(PruneBySensitivity, model, data, **settings)
    scan, ratios, full = done.facts["scan"], done.facts["ratios"], accuracy(model, tmp_path)
    assert list(scan) == list(KERNELS)
    for name, found in scan.items():
        alone = clone(model)
        ratio, quality = found[-1]
        kernel_of(alone.get_layer(name)).assign(kernel(model, name) * magnitude_mask(kernel(model, name), ratio))
        assert quality == accuracy(alone, tmp_path)
        assert all(full - quality < 0.05 for _, quality in found[:-1])
        assert full - quality >= 0.05 or ratio == 0.9
    assert any(len(found) < 3 for found in scan.values())
    assert done.facts["quality_without_training"] == accuracy(pruned, tmp_path) >= full - 0.03
    for name in KERNELS:
        share = zeros_in(kernel(pruned, name)) / kernel(pruned, name).size
        assert share == pytest.approx(ratios.get(name, 0), abs=0.002)
    assert ratios and done.facts["sparsity"] > 0.1


def test_a_larger_budget_makes_more_zeros_and_repair_keeps_them(model, tmp_path):
    """K7, K11: the budget is what decides, and training afterwards gives back what was lost."""
    small, large = (digits_data(tmp_path / name) for name in ("small", "large"))
    _, least = applied(PruneBySensitivity, model, small, max_drop=0.01)
    pruned, most = applied(PruneBySensitivity, model, large, max_drop=0.5, stop=1.0, repair={**SHORT, "epochs": 1})
    assert sum(most.facts["ratios"].values()) > sum(least.facts["ratios"].values())
    assert most.facts["sparsity"] == pytest.approx(
        sum(zeros_in(kernel(pruned, name)) for name in KERNELS) / sum(kernel(pruned, name).size for name in KERNELS)
    )
    assert accuracy(pruned, tmp_path) > most.facts["quality_without_training"] + 0.05


def test_a_budget_that_no_layer_meets_is_refused(model, tmp_path):
    """K7: one sentence, and no model."""
    with pytest.raises(GateError, match=r"share of zeros of 0\.99 within max_drop 0; none of block0_conv, block1_conv"):
        applied(PruneBySensitivity, model, digits_data(tmp_path), ratios=[0.99], max_drop=0)
    with pytest.raises(ConfigError, match="ratios must rise"):
        parse(PruneBySensitivity.Config, {"ratios": [0.5, 0.3]})


# ---- L0 gates


def test_fewer_weights_stay_with_a_larger_penalty(model, tmp_path):
    """K8: the number of weights that are not zero falls with λ, and the model keeps its layers."""
    left = []
    model = clone(model)
    variable = kernel_of(model.get_layer("block1_conv"))
    before = magnitude_mask(variable.numpy(), 0.2)
    variable.assign(variable * before)
    for penalty in (8, 80):
        settings = {"penalty": penalty, "training": SHORT}
        pruned, done = applied(L0, model, digits_data(tmp_path / str(penalty)), **settings)
        left.append(sum(np.count_nonzero(kernel(pruned, name)) for name in KERNELS))
        assert done.facts["sparsity"] == pytest.approx(1 - left[-1] / 5360)
        assert not kernel(pruned, "block1_conv")[~before].any()  # what was zero stays so
    assert left[1] < 0.9 * left[0] < 0.9 * (5360 - np.sum(~before))


def test_gates_that_stay_open_are_refused(tmp_path):
    """K8: a training that closes no gate has pruned nothing."""
    line = keras.Sequential([layers.Input((1,), name="x"), layers.Dense(300, name="line")])
    data = small_data(tmp_path, {"x": np.ones((8, 1), np.float32)}, np.ones((8, 300), np.float32))
    settings = {"penalty": 1e-6, "gate_learning_rate": 1e-4, "training": {"epochs": 1, "batch_size": 8}}
    with pytest.raises(GateError, match="none of them closed with penalty 1e-06 in 1 epochs"):
        applied(L0, line, data, **settings)


def test_gates_are_hard_concrete():
    """K8: drawn gates are 0 as often as equation 12 says, inference takes equation 13."""
    dense = layers.Dense(100, use_bias=False)
    gate = HardConcrete(dense, seed=4)
    gate.build((None, 200))
    log_alpha = np.linspace(-4, 4, 100, dtype=np.float32)
    gate.log_alpha.assign(np.broadcast_to(log_alpha, (200, 100)))
    original = dense.kernel.numpy()
    drawn = np.stack([gate(np.eye(200, dtype=np.float32), training=True).numpy() / original for _ in range(20)])
    open_share = 1 / (1 + np.exp(-(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))))
    np.testing.assert_allclose((drawn > 0).mean(axis=(0, 1)), open_share, atol=0.03)
    assert (drawn == 1).any() and drawn.max() <= 1 + 1e-6
    assert (drawn[0] != drawn[1]).any()
    expected = np.clip(1.2 / (1 + np.exp(-log_alpha)) - 0.1, 0, 1) * original
    np.testing.assert_allclose(gate(np.eye(200, dtype=np.float32), training=False), expected, atol=1e-6)
    np.testing.assert_allclose(gate.gated_kernel(), expected, atol=1e-6)
    assert kernel_of(dense) is dense.trainable_variables[0]


# ---- the Gaussian constraint


def test_a_narrow_prior_draws_weights_to_zero(model, tmp_path):
    """K9: a zero-mean Gaussian is a quadratic penalty; what is small beside its kernel becomes zero."""
    found = {}
    for deviation in (0.1, 30):
        settings = {"deviation": deviation, "training": SHORT, "threshold": 0.4, "repair": None}
        pruned, done = applied(Gaussian, model, digits_data(tmp_path / str(deviation)), **settings)
        found[deviation] = done.facts
        for name in KERNELS:
            kept = np.abs(kernel(pruned, name)[kernel(pruned, name) != 0])
            assert kept.min() >= 0.4 * done.facts["root_mean_square"][name]
    for name in ("block0_conv", "block1_conv"):
        before = found[30]["root_mean_square_before"][name]
        assert found[0.1]["root_mean_square"][name] < 0.8 * before < found[30]["root_mean_square"][name]
    assert found[0.1]["sparsity"] > found[30]["sparsity"]
    assert found[30]["sparsity_of_a_gaussian"] == pytest.approx(0.3108, abs=1e-4)  # 2 Φ(.4) - 1


def test_the_prior_weighs_as_it_should(tmp_path):
    """K9: the best weights by hand: (w - t)² and w² / 2σ²N for N = 300 weights make w = t · 2N / (2N + 1/σ²), whatever
    the number of rows."""
    line = keras.Sequential([layers.Input((1,), name="x"), layers.Dense(300, use_bias=False, name="line")])
    line.get_layer("line").kernel.assign(tf.ones((1, 300)))
    targets = np.broadcast_to(np.where(np.arange(300) < 150, 1, 0.01).astype(np.float32), (8, 300))
    data = small_data(tmp_path, {"x": np.ones((8, 1), np.float32)}, targets)
    data = replace(data, loss=lambda output, batch: tf.reduce_sum((output - batch["target"]) ** 2, axis=1))
    settings = {
        "deviation": 600**-0.5,  # of a root mean square of 1
        "training": {"epochs": 20, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.2},
        "repair": None,
    }
    constrained, done = applied(Gaussian, line, data, **settings)
    np.testing.assert_allclose(kernel(constrained, "line")[0], np.where(np.arange(300) < 150, 0.5, 0), rtol=1e-4)
    assert done.facts["root_mean_square"]["line"] == pytest.approx(0.5 / math.sqrt(2), rel=1e-3)
    with pytest.raises(GateError, match="a weight must be below 1e-06 times the root mean square"):
        applied(Gaussian, line, data, **settings, threshold=1e-6)


def test_what_the_threshold_costs_is_repaired(model, tmp_path):
    """K9: by default, since here more than half of the weights go at once; zeros stay, also those of before."""
    subject = clone(model)
    subject.get_layer("block1_conv").kernel[..., :3].assign(tf.zeros((3, 3, 16, 3)))
    settings = {"training": {**SHORT, "epochs": 1}, "threshold": 0.9}
    raw, done = applied(Gaussian, subject, digits_data(tmp_path / "raw"), **settings, repair=None)
    found, _ = applied(Gaussian, subject, digits_data(tmp_path / "found"), **settings)
    for name in KERNELS:
        np.testing.assert_array_equal(kernel(found, name) == 0, kernel(raw, name) == 0)
    assert not kernel(found, "block1_conv")[..., :3].any()
    assert done.facts["sparsity"] > 0.5
    assert accuracy(found, tmp_path) > accuracy(raw, tmp_path) + 0.02


# ---- sparse regression


@pytest.mark.parametrize("solver", ["omp", "lasso"])
def test_regression_by_hand(solver):
    """K12: of two equal inputs one takes over what both had, where pruning by magnitude would lose half of it."""
    random = np.random.default_rng(5)
    signal, other = random.normal(size=(2, 500, 1))
    rows = np.hstack([signal, signal, 0.1 * other])
    old = np.array([[1.0, 0.0], [1.0, 0.5], [0.5, 20.0]])
    method = SparseRegression(parse(SparseRegression.Config, {"solver": solver, "ridge": 1e-6}))
    new = method.reconstruct(rows, rows @ old, old, kept=1)
    assert np.count_nonzero(new[:, 0]) == np.count_nonzero(new[:, 1]) == 1
    assert new[:2, 0].sum() == pytest.approx(2, abs=0.01)
    assert new[2, 1] == pytest.approx(20, abs=0.2)


def test_matching_pursuit_is_that_of_scikit_learn():
    """K12: the same inputs and weights; inputs that depend on chosen ones are not taken."""
    random = np.random.default_rng(7)
    rows = random.normal(size=(90, 40))
    rows /= np.linalg.norm(rows, axis=0)
    gram, products = rows.T @ rows, rows.T @ random.normal(size=(90, 6))
    ours = np.stack([matching_pursuit(gram, column, 15) for column in products.T], axis=1)
    np.testing.assert_allclose(ours, orthogonal_mp_gram(gram, products, n_nonzero_coefs=15), atol=1e-9)
    twice = np.concatenate([rows[:, :3], rows[:, :3]], axis=1)
    alone = matching_pursuit(twice.T @ twice, twice.T @ rows[:, 3], 6)
    assert np.count_nonzero(alone) == 3 and np.count_nonzero(alone[:3] * alone[3:]) == 0


def test_a_strong_ridge_keeps_the_old_weights():
    """K12: where rows count for nothing, the largest old weights stay as they are."""
    random = np.random.default_rng(6)
    rows, old = random.normal(size=(40, 6)), random.normal(size=(6, 3))
    method = SparseRegression(parse(SparseRegression.Config, {"ridge": 100}))
    new = method.reconstruct(1e-3 * rows, 1e-3 * rows @ old, old, kept=2)
    largest = np.abs(old) >= np.sort(np.abs(old), axis=0)[-2]
    np.testing.assert_allclose(new, np.where(largest, old, 0), atol=0.05)


def test_regression_reconstructs_better_than_magnitude(residual):
    """K12: 1×1 convolutions are Dense layers over pixels; the error of each is below that of magnitude pruning."""
    model, data = residual
    fitted, done = applied(SparseRegression, model, data, sparsity=0.5)
    for name, error in done.facts["relative_error"].items():
        assert error["regression"] < error["magnitude"]
        columns = kernel(fitted, name).reshape(-1, kernel(fitted, name).shape[-1])
        np.testing.assert_array_equal(np.count_nonzero(columns, axis=0), len(columns) // 2)
    assert set(done.facts["relative_error"]) == {"expand", "project", "logits"}
    assert "neither a Dense layer nor a 1×1 convolution" in done.left_alone["stem"]
    halved, _ = applied(Prune, model, data, sparsity=0.5, layers=["expand", "project", "logits"], training=None)
    assert data.quality(answer_of(fitted)) < 0.7 * data.quality(answer_of(halved))


@pytest.mark.parametrize("train", [fine_tune, fine_tune_sparse])
def test_a_frozen_network_is_trained_too(tmp_path, train):
    """K1: what a step takes from a frozen encoder is made up for; its normalisation keeps its statistics."""
    image = layers.Input((8, 8, 1), name="image")
    normed = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv")(image))
    model = keras.Model(image, layers.Flatten()(normed))
    model.trainable = False
    before = {layer.name: layer.get_weights() for layer in model.layers}
    random = np.random.default_rng(0)
    images, targets = random.normal(size=(16, 8, 8, 1)), random.normal(size=(16, 144))
    data = small_data(tmp_path, {"image": images.astype(np.float32)}, targets.astype(np.float32))
    train(model, data, TrainingSettings(epochs=1, batch_size=8))
    assert np.abs(model.get_layer("conv").get_weights()[0] - before["conv"][0]).max() > 0
    for ours, kept in zip(model.get_layer("bn").get_weights(), before["bn"], strict=True):
        np.testing.assert_array_equal(ours, kept)
