"""Channel pruning and trimming: what is cut together, what stays and why, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from compression_world import digits_data, digits_model
from fusion.compat import keras, tf
from fusion.compression.anatomy import Maker, Mixer, Normalised
from fusion.compression.base import Compressed, CompressionData, clone, fine_tune, input_names
from fusion.compression.channels import Channels, estimate_statistics, rounded
from fusion.compression.flops import count_flops
from fusion.compression.measure import serving_function
from fusion.compression.surgery import Anatomy, rebuild
from fusion.compression.trim import Trim
from fusion.config import parse
from fusion.errors import ConfigError, GateError
from fusion.submodels import image_efficientnet
from fusion.submodels.dense import Dense
from fusion.submodels.image_efficientnet import ImageEfficientNet
from fusion.submodels.text_bert import TextBert
from fusion.training.batches import as_rows
from fusion.training.trainer import TrainingSettings
from fusion.types import RunOptions
from tiny_bert import write_tiny_bert

layers = keras.layers


def pruning(**settings):
    return Channels(parse(Channels.Config, settings))


def unused_data(folder, seed=5):
    """For what looks at nothing but the model and the seed."""
    return CompressionData(
        rows=as_rows({"x": np.zeros((1, 1), np.float32)}),
        loss=lambda output, batch: output[:, 0],
        representative={},
        judge=lambda answer: np.zeros(1),
        metric="none",
        higher_is_better=True,
        options=RunOptions(seed, folder, quiet=True),
    )


def stirred(model, seed=0):
    """Random weights everywhere, also where layers begin with zeros or ones."""
    random = np.random.default_rng(seed)
    for layer in model.layers:
        weights = [random.normal(0, 0.3, weight.shape).astype(np.float32) for weight in layer.get_weights()]
        if isinstance(layer, layers.BatchNormalization):
            weights[-1] = np.abs(weights[-1]) + 0.5  # the variance
        layer.set_weights(weights)
    return model


def zoo(seed=0):
    """A network with most ways in which channels are passed on: image uint8 `[B, 8, 8, 3]` -> `[B, 5]`."""
    image = layers.Input((8, 8, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling")(image)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    stem = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_bn")(x))
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="deep")(stem)
    x = layers.BatchNormalization(scale=False, name="branch_bn")(layers.Conv2D(8, 1, name="branch")(x))
    x = layers.Add(name="add")([stem, x])
    excite = layers.Reshape((1, 1, 8), name="as_map")(layers.GlobalAveragePooling2D(name="squeeze")(x))
    excite = layers.Conv2D(4, 1, activation="relu", name="reduce")(excite)
    excite = layers.Conv2D(8, 1, activation="sigmoid", name="expand")(excite)
    x = layers.Multiply(name="scale")([x, excite])
    left = layers.LeakyReLU(name="leaky")(layers.SeparableConv2D(12, 3, padding="same", name="separable")(x))
    left = layers.Cropping2D(1, name="crop")(left)
    right = layers.Conv2D(6, 3, name="valid")(x)
    x = layers.Concatenate(name="beside")([left, right])
    x = layers.AveragePooling2D(name="pool")(layers.ZeroPadding2D(1, name="pad")(x))
    x = layers.Flatten(name="flat")(layers.UpSampling2D(name="up")(x))
    x = layers.Dropout(0.1, name="dropout")(layers.Dense(16, activation="relu", name="hidden")(x))
    return stirred(keras.Model(image, layers.Dense(5, name="logits")(x)), seed)


@pytest.fixture(scope="module")
def inverted_residuals():
    """The first three stages of EfficientNet-Lite0, with the last convolution: 4 blocks, one of them with a skip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_efficientnet, "STAGES", image_efficientnet.STAGES[:2])
        settings = {"image_size": 32, "weights": "none", "fine_tune": "all"}
        return stirred(ImageEfficientNet(parse(ImageEfficientNet.Config, settings), 1).encoder())


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"), num_hidden_layers=1)
    return TextBert(parse(TextBert.Config, {"init_from": str(folder), "max_tokens": 16, "fine_tune": "all"}), 0)


def answer(model, inputs):
    """Without a graph, which takes longer to trace than to run here."""
    return np.asarray(model(inputs, training=False))


def images(size=8, count=4):
    return {"image": np.random.default_rng(9).integers(0, 256, (count, size, size, 3), np.uint8)}


def some_units(anatomy, share, seed=0):
    """Units drawn by lot among those that can be cut, one of each layer excepted: bool `[units]`."""
    chosen = np.random.default_rng(seed).random(anatomy.units) < share
    chosen[list(anatomy.held)] = False
    for place in anatomy.places:
        if len(place.made):
            chosen[place.made[-1]] = False
    return chosen


def silence(anatomy, units):
    """Makes the units zero at all of their places."""
    for place in anatomy.places:
        gone, weights = units[place.made], place.layer.get_weights()
        if isinstance(place.kind, Maker):
            place.kind.kernel(place.layer).assign(np.where(gone, 0.0, place.kind.kernel(place.layer)))
            if getattr(place.layer, "use_bias", False):
                place.layer.bias.assign(np.where(gone, 0.0, place.layer.bias))
        elif isinstance(place.kind, Normalised):
            if place.layer.gamma is not None:
                place.layer.gamma.assign(np.where(gone, 0.0, place.layer.gamma))
            else:
                place.layer.moving_mean.assign(np.where(gone, 0.0, place.layer.moving_mean))
            place.layer.beta.assign(np.where(gone, 0.0, place.layer.beta))
        elif isinstance(place.layer, layers.DepthwiseConv2D) and len(weights) == 2:
            place.layer.bias.assign(np.where(gone, 0.0, place.layer.bias))


# ---- K4: surgery


def test_a_model_that_loses_nothing_is_equal_to_the_bit(inverted_residuals, bert):
    """K4: the model is built anew; with all of its channels it answers with the same bits."""
    text = bert.prepare(["a blue film", "the war of the sea and the night"])
    for model, inputs in ((zoo(), images()), (inverted_residuals, images(32)), (bert.encoder(), text)):
        anatomy = Anatomy.of(model)
        again = rebuild(anatomy, np.ones(anatomy.units, bool))
        np.testing.assert_array_equal(answer(model, inputs), answer(again, inputs))
        assert not {id(layer) for layer in model.layers} & {id(layer) for layer in again.layers}


def test_silent_channels_leave_no_trace(inverted_residuals):
    """K4: channels that are zero everywhere can be cut, whatever they pass through; the answer is the same."""
    for model, inputs in ((zoo(), images()), (clone(inverted_residuals), images(32))):
        anatomy = Anatomy.of(model)
        units = some_units(anatomy, 0.5)
        silence(anatomy, units)
        smaller = rebuild(anatomy, ~units)
        assert smaller.count_params() < 0.7 * model.count_params()
        np.testing.assert_allclose(answer(model, inputs), answer(smaller, inputs), atol=1e-5)


def test_branches_that_meet_are_cut_together():
    """K4: what meets in an addition or a multiplication is one unit; a concatenation keeps its parts apart."""
    places = {place.layer.name: place for place in Anatomy.of(zoo()).places}
    for name in ("branch", "expand", "stem_bn"):
        np.testing.assert_array_equal(places[name].made, places["stem"].made)
    np.testing.assert_array_equal(places["deep"].made, np.repeat(places["stem"].made, 2))
    np.testing.assert_array_equal(
        places["beside"].made, np.concatenate([places["separable"].made, places["valid"].made])
    )
    np.testing.assert_array_equal(places["flat"].made, np.tile(places["beside"].made, 8 * 8))


def test_kernels_are_sliced_and_nothing_else(tmp_path):
    """K4: an independent version of the cut of two blocks: the strongest half stays, in its order."""
    model = stirred(digits_model())
    smaller, alone, facts = pruning(ratio=0.5, multiple=4).cut(model, digits_data(tmp_path))
    kernels = {name: model.get_layer(name).get_weights() for name in ("block0_conv", "block1_conv", "logits")}
    first, second = (
        np.sort(np.argsort([-np.abs(kernels[name][0][:, :, :, c]).sum() for c in range(width)])[: width // 2])
        for name, width in (("block0_conv", 16), ("block1_conv", 32))
    )
    np.testing.assert_array_equal(smaller.get_layer("block0_conv").kernel, kernels["block0_conv"][0][..., first])
    np.testing.assert_array_equal(
        smaller.get_layer("block1_conv").kernel, kernels["block1_conv"][0][:, :, first][..., second]
    )
    np.testing.assert_array_equal(smaller.get_layer("logits").kernel, kernels["logits"][0][second])
    np.testing.assert_array_equal(smaller.get_layer("logits").bias, kernels["logits"][1])
    np.testing.assert_array_equal(
        smaller.get_layer("block1_bn").get_weights(),
        [each[second] for each in model.get_layer("block1_bn").get_weights()],
    )
    assert alone == {}
    assert facts["channels"] == {"block0_conv": [16, 8], "block1_conv": [32, 16]}
    assert facts["parameters"] == [model.count_params(), smaller.count_params()]


def products(model):
    """Twice the multiplications of convolutions and dense layers, from the shapes of their kernels and outputs."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)):
            kernel = getattr(layer, "depthwise_kernel", None)
            kernel = layer.kernel if kernel is None else kernel
            total += 2 * int(np.prod(layer.output_shape[1:-1])) * kernel.shape.num_elements()
    return total


def test_operations_fall_as_reckoned_by_hand(inverted_residuals, tmp_path):
    """K4: skip connections and depthwise blocks are handled, and what has half its channels costs what it should."""

    def by_hand(stem, first, wide, skip, wider):
        """Inputs times outputs of each layer, at 16 × 16 places and then at 8 × 8."""
        large = 27 * stem + 9 * stem + stem * first + first * wide
        small = 9 * wide + wide * skip + skip * wider + 9 * wider + wider * skip + skip * 1280
        return 2 * (16 * 16 * large + 8 * 8 * small)

    smaller, alone, facts = pruning(ratio=0.5).cut(inverted_residuals, unused_data(tmp_path))
    assert alone == {"head_bn": "shares channels with the model's output"}
    assert facts["channels"] == {
        "stem_conv": [32, 16],
        "block0_project_conv": [16, 8],
        "block1_expand_conv": [96, 48],
        "block1_project_conv": [24, 16],  # meets the next but one in an addition
        "block2_expand_conv": [144, 72],
        "block2_project_conv": [24, 16],
    }
    assert products(inverted_residuals) == by_hand(32, 16, 96, 24, 144)
    assert products(smaller) == by_hand(16, 8, 48, 16, 72)
    counted = [count_flops(serving_function(model, images(32, 1))) for model in (inverted_residuals, smaller)]
    # What is counted beside them, normalisation and activation, falls with the channels.
    assert counted[1] / counted[0] == pytest.approx(products(smaller) / products(inverted_residuals), abs=0.03)
    assert answer(smaller, images(32)).shape == (4, 1280)


def test_bert_loses_hidden_units_and_whole_heads(bert, tmp_path):
    """K4: units between the two dense layers, and heads of attention; the width of tokens stays, and why is told."""
    model = bert.encoder()
    smaller, alone, facts = pruning(ratio=0.5, multiple=4).cut(model, unused_data(tmp_path))
    assert facts["channels"] == {
        "layer0_query": [8, 4],
        "layer0_key": [8, 4],
        "layer0_value": [8, 4],
        "layer0_wide": [12, 8],
    }
    assert smaller.get_layer("layer0_attention").heads == 1
    assert alone["layer0_norm"] == "is of type LayerNormalization and needs all of its channels"
    assert alone["embeddings_word"].startswith("shares channels with ")
    # The head that counts for less goes, of query, key and value alike.
    strength = sum(
        np.abs(model.get_layer(f"layer0_{part}").get_weights()[0]).reshape(8, 2, 4).sum(axis=(0, 2))
        for part in ("query", "key", "value")
    )
    kept = slice(0, 4) if strength[0] > strength[1] else slice(4, 8)
    for part in ("query", "key", "value"):
        before, after = (m.get_layer(f"layer0_{part}").get_weights() for m in (model, smaller))
        np.testing.assert_array_equal(after[0], before[0][:, kept])
        np.testing.assert_array_equal(after[1], before[1][kept])
    np.testing.assert_array_equal(
        smaller.get_layer("layer0_output").kernel, np.asarray(model.get_layer("layer0_output").kernel)[kept]
    )
    assert answer(smaller, bert.prepare(["a film"])).shape == (1, 8)


def test_a_silent_head_leaves_no_trace(tmp_path):
    """K4: a head whose values are zero is cut exactly; the other heads divide by the same root."""
    folder = write_tiny_bert(tmp_path, num_hidden_layers=1)
    bert = TextBert(parse(TextBert.Config, {"init_from": str(folder), "max_tokens": 8, "normalise": False}), 0)
    model, text = bert.encoder(), bert.prepare(["red sea", "the film of the war"])
    kernel, bias = model.get_layer("layer0_value").get_weights()
    kernel[:, 4:], bias[4:] = 0.0, 0.0
    model.get_layer("layer0_value").set_weights([kernel, bias])
    trimmed, _ = Trim(Trim.Config()).apply(Compressed(model), unused_data(tmp_path))
    assert trimmed.model.get_layer("layer0_attention").heads == 1
    np.testing.assert_allclose(answer(model, text), answer(trimmed.model, text), atol=1e-5)


def test_tables_lose_hidden_units_and_no_categories(tmp_path):
    """K4: a chain of dense layers; columns of categories are codes, which stay."""
    rows = np.array([("1", "a"), ("2", "b"), ("5", "c")], dtype=[("size", "U4"), ("colour", "U4")])
    member = Dense(parse(Dense.Config, {"widths": [16, 24], "dropout": 0.0}), 0)
    member.adapt(rows)
    model = stirred(member.encoder())
    smaller, alone, facts = pruning(ratio=0.5, multiple=4).cut(model, unused_data(tmp_path))
    assert facts["channels"] == {"dense0": [16, 8]}
    assert alone["one_hot"] == "is a table that is not trained"
    assert smaller.get_layer("dense1").kernel.shape == (8, 24)
    assert answer(smaller, member.prepare(rows)).shape == (3, 24)


# ---- K4: what a channel counts for


def two_layers(hidden=((1.0, -2.0, 0.5, 3.0),), out=((1.0,), (1.0,), (8.0,), (0.0,))):
    """x `[B, 1]` -> 4 hidden units -> `[B, 1]`, linear."""
    x = layers.Input((1,), name="x")
    model = keras.Model(x, layers.Dense(1, use_bias=False, name="out")(layers.Dense(4, use_bias=False, name="in")(x)))
    model.set_weights([np.array(hidden, np.float32), np.array(out, np.float32)])
    return model


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        ("l1", [-2.0, 3.0]),  # |w| is 1, 2, .5, 3
        ("l2", [-2.0, 3.0]),
        ("taylor", [-2.0, 0.5]),  # gradient times weight: x · w · out = 1, -2, 4, 0 for x = 1
    ],
)
def test_scores_worked_by_hand(score, kept, tmp_path):
    """K4: the two weakest of four units go, by each score."""
    data = dataclasses.replace(unused_data(tmp_path), rows=as_rows({"x": np.ones((3, 1), np.float32)}))
    smaller, _, _ = pruning(score=score, multiple=1).cut(two_layers(), data)
    np.testing.assert_array_equal(smaller.get_layer("in").kernel, [kept])


def test_the_scale_of_a_normalisation_is_a_score(tmp_path):
    """K4: network slimming keeps channels of large |gamma|; a layer without one is left alone."""
    image = layers.Input((4, 4, 1), name="image")
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv")(image))
    x = layers.Dense(4, name="hidden")(layers.GlobalAveragePooling2D(name="mean")(x))
    model = keras.Model(image, layers.Dense(2, name="logits")(x))
    model.get_layer("bn").gamma.assign([0.5, -3.0, 0.1, 2.0])
    smaller, alone, _ = pruning(score="batch_norm", multiple=1).cut(model, unused_data(tmp_path))
    np.testing.assert_allclose(smaller.get_layer("bn").gamma, [-3.0, 2.0])
    assert alone["logits"] == "shares channels with the model's output"
    assert smaller.get_layer("hidden").kernel.shape == (2, 4)


def chain(*kernels):
    """A chain of dense layers without biases, d0, d1 ..."""
    x = first = layers.Input((len(kernels[0]),), name="x")
    for number, kernel in enumerate(kernels):
        x = layers.Dense(len(kernel[0]), use_bias=False, name=f"d{number}")(x)
    model = keras.Model(first, x)
    model.set_weights([np.array(kernel, np.float32) for kernel in kernels])
    return model


def test_the_model_can_be_cut_as_a_whole(tmp_path):
    """K4: of eight units half go: beside the means of their layers the weakest are three of one, one of the other."""
    model = chain([[0.1, 0.1, 0.1, 10.0]], np.diag([1.0, 1.1, 1.2, 0.2]), np.ones((4, 1)))
    smaller, _, _ = pruning(scope="global", multiple=1).cut(model, unused_data(tmp_path))
    assert [weights.shape for weights in smaller.get_weights()] == [(1, 1), (1, 3), (3, 1)]
    each, _, _ = pruning(scope="group", multiple=1).cut(model, unused_data(tmp_path))
    assert [weights.shape for weights in each.get_weights()] == [(1, 2), (2, 2), (2, 1)]


def test_a_weak_layer_keeps_a_tenth(tmp_path):
    """K4: cut as a whole, no layer is emptied, or nothing would pass."""
    weak = np.concatenate([np.full(19, 1e-6), [19.0]])
    model = chain([weak], np.ones((20, 20)), np.ones((20, 1)))
    smaller, _, _ = pruning(scope="global", ratio=0.6, multiple=1).cut(model, unused_data(tmp_path))
    assert smaller.get_layer("d0").units == 2


def test_random_channels_follow_the_seed(tmp_path):
    """K4: the baseline draws by lot, and the same seed draws the same."""
    model = chain([np.arange(1.0, 17.0)], np.ones((16, 1)))
    drawn = [
        np.asarray(pruning(score="random").cut(model, unused_data(tmp_path, seed))[0].get_layer("d0").kernel).tolist()
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_counts_are_rounded_to_a_multiple():
    """K4: to the nearest one, upwards from the middle; at least one multiple, at most all; a head is some channels."""
    assert [rounded(wanted, 32, 1, 8) for wanted in (0, 1, 11, 12, 20, 32)] == [8, 8, 8, 16, 24, 32]
    assert rounded(15, 20, 1, 8) == 16
    assert rounded(19, 20, 1, 8) == 16
    assert rounded(20, 20, 1, 8) == 20
    assert rounded(5, 12, 64, 8) == 5
    assert rounded(5, 12, 4, 8) == 6


# ---- K4: what is left alone


def test_layers_that_were_not_asked_for_stay(tmp_path):
    """K4: a group is cut where all of its layers are asked for; an unknown layer is answered with the nearest."""
    model = zoo()
    _, alone, facts = pruning(layers=["hidden"], multiple=4).cut(model, unused_data(tmp_path))
    assert facts["channels"] == {"hidden": [16, 8]}
    assert alone["valid"] == "not among the layers that were asked for"
    with pytest.raises(GateError, match=r"there are none \(stem belongs to a group with branch, which is not"):
        pruning(layers=["stem"], multiple=4).cut(model, unused_data(tmp_path))
    _, alone, _ = pruning(layers=["stem", "separable"], multiple=4).cut(model, unused_data(tmp_path))
    assert alone["stem"] == "belongs to a group with branch, which is not among the layers that were asked for"
    with pytest.raises(ConfigError, match=r"separabel.*separable"):
        pruning(layers=["separabel"]).cut(model, unused_data(tmp_path))


def test_what_needs_all_channels_keeps_them(tmp_path):
    """K4: layers of a type that is not known, of several calls or with a softmax make their channels untouchable."""
    x = layers.Input((3,), name="x")
    twice = layers.Dense(16, name="twice")
    h = layers.Dense(16, name="before")(x)
    h = layers.Add(name="add")([twice(h), twice(twice(h))])
    h = layers.Dense(16, activation="softmax", name="shares")(h)
    h = layers.UnitNormalization(name="unit")(layers.Dense(16, name="last")(h))
    model = keras.Model(x, layers.Dense(2, name="logits")(layers.Dense(16, name="free")(h)))
    _, alone, facts = pruning().cut(model, unused_data(tmp_path))
    assert facts["channels"] == {"free": [16, 8]}
    assert alone == {
        "before": "shares channels with twice, which is used more than once",
        "twice": "is used more than once",
        "shares": "is a softmax over all channels",
        "last": "shares channels with unit, which is of type UnitNormalization and needs all of its channels",
    }


def test_a_model_without_anything_to_cut_is_refused(tmp_path):
    """K4: a method that can do nothing says so, and why."""
    with pytest.raises(GateError, match=r"there are none \(d0 has only 4 channels; d1 shares channels with"):
        pruning().cut(chain(np.ones((2, 4)), np.ones((4, 1))), unused_data(tmp_path))


# ---- K11: repair


def test_training_repairs_what_was_cut(tmp_path):
    """K4, K11: without some channels accuracy falls; epochs bring it back, and keep a pruned model's zeros."""
    model, data = digits_model(), digits_data(tmp_path / "compress")
    training = {"epochs": 5, "batch_size": 32, "learning_rate": 0.005}
    fine_tune(model, digits_data(tmp_path / "train"), parse(TrainingSettings, training))
    kernel = model.get_layer("block1_conv").kernel
    kernel.assign(tf.where(tf.abs(kernel) < 0.02, 0.0, kernel))
    weights = model.get_weights()
    method = pruning(ratio=0.5, training=training)
    untrained, _, _ = method.cut(model, data)
    before, cut = (data.quality(functools.partial(answer, each)) for each in (model, untrained))
    compressed, applied = method.apply(Compressed(model), data)
    after = data.quality(functools.partial(answer, compressed.model))
    assert cut < before - 0.2
    assert after > before - 0.03
    assert applied.facts["channels"] == {"block0_conv": [16, 8], "block1_conv": [32, 16]}
    assert input_names(compressed.model) == input_names(model)
    zeros = untrained.get_layer("block1_conv").kernel == 0.0
    np.testing.assert_array_equal(compressed.model.get_layer("block1_conv").kernel == 0.0, zeros)
    assert 0.02 < np.mean(zeros) < 0.5
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_all_layers_are_trained_though_they_were_frozen(tmp_path):
    """K11: a frozen encoder needs repair too, also in the layers that lost nothing; its normalisation keeps its scale
    and offset."""
    model, data = digits_model(), digits_data(tmp_path)
    for layer in model.layers:
        layer.trainable = False
    training = {"epochs": 1, "batch_size": 600}
    compressed, applied = pruning(ratio=0.25, training=training).apply(Compressed(model), data)
    assert list(applied.facts["channels"]) == ["block1_conv"]
    smaller = compressed.model
    trained = [layer.name for layer in smaller.layers if layer.trainable_weights]
    assert trained == ["block0_conv", "block1_conv", "logits"]
    cut, _, _ = pruning(ratio=0.25, training=training).cut(model, data)
    for name in trained:
        assert (smaller.get_layer(name).get_weights()[0] != cut.get_layer(name).get_weights()[0]).any()
    for norm in ("block0_bn", "block1_bn"):
        for part in ("gamma", "beta"):
            ours, kept = (getattr(each.get_layer(norm), part).numpy() for each in (smaller, cut))
            np.testing.assert_array_equal(ours, kept)


def test_statistics_are_those_of_the_smaller_model(tmp_path):
    """K11: also a frozen normalisation gets mean and variance of what it reads now, over all training rows."""
    x = layers.Input((3,), name="x")
    hidden = layers.Dense(2, use_bias=False, name="hidden")(x)
    model = keras.Model(x, layers.BatchNormalization(trainable=False, name="bn")(hidden))
    rows = np.random.default_rng(0).normal(2.0, 3.0, (12, 3)).astype(np.float32)
    data = dataclasses.replace(unused_data(tmp_path), rows=as_rows({"x": rows}))
    estimate_statistics(model, data, batch_size=4)
    read = rows @ np.asarray(model.get_layer("hidden").kernel)
    gamma, beta, mean, variance = model.get_layer("bn").get_weights()
    np.testing.assert_allclose(mean, read.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, read.var(axis=0), rtol=1e-5)
    assert (gamma == 1).all() and (beta == 0).all() and not model.get_layer("bn").trainable


# ---- K11: trimming


def trimmed(model):
    return Trim(Trim.Config()).apply(Compressed(model), None)


def test_constants_are_folded_by_hand():
    """K11: a unit of zeros gives ReLU(bias) to the next layer's bias; one that nobody reads goes as it is."""
    x = layers.Input((2,), name="x")
    hidden = layers.Dense(4, activation="relu", name="hidden")(x)
    model = keras.Model(x, layers.Dense(2, use_bias=False, name="out")(hidden))
    kernel = np.array([[1, 0, 0, 1], [2, 0, 0, 1]], np.float32)
    reads = np.array([[1, 1], [2, 3], [4, 5], [0, 0]], np.float32)
    model.set_weights([kernel, np.array([0.5, 2.0, -1.0, 1.0], np.float32), reads])
    small, applied = trimmed(model)
    assert applied.facts == {"channels": {"hidden": [4, 1]}, "parameters": [20, 7]}
    assert applied.left_alone == {}
    np.testing.assert_array_equal(small.model.get_layer("hidden").kernel, [[1], [2]])
    np.testing.assert_array_equal(small.model.get_layer("out").bias, [4, 6])  # 2 · [2, 3]; ReLU(-1) gave nothing


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trimming_leaves_every_answer_as_it_was(seed):
    """K11: dead filters anywhere in a network of many kinds of layers, with biases, offsets and unread rows."""
    model = zoo(seed)
    anatomy, random = Anatomy.of(model), np.random.default_rng(seed)
    units = some_units(anatomy, 0.5, seed)
    constant = units & (random.random(anatomy.units) < 0.7)
    for place in anatomy.places:
        if isinstance(place.kind, Maker):  # constant: its biases and the offsets after it stay what they are
            place.kind.kernel(place.layer).assign(np.where(constant[place.made], 0.0, place.kind.kernel(place.layer)))
        if isinstance(place.kind, Mixer) and place.layer.name != "separable":  # the others: nobody reads them
            unread = (units & ~constant)[place.read[0]]
            place.layer.kernel.assign(np.where(unread[:, np.newaxis], 0.0, place.layer.kernel))
    small, applied = trimmed(model)
    assert sum(before - after for before, after in applied.facts["channels"].values()) >= 3
    np.testing.assert_allclose(answer(model, images()), answer(small.model, images()), rtol=1e-4, atol=1e-5)


def test_a_constant_beside_padding_stays():
    """K11: next to zeros at the border a constant is none; with zeros, or without padding, it goes."""

    def network(offset, padding):
        image = layers.Input((5, 5, 1), name="image")
        x = layers.Conv2D(3, 1, name="first")(image)
        model = stirred(keras.Model(image, layers.Conv2D(2, 3, padding=padding, use_bias=False, name="second")(x)))
        kernel, bias = model.get_layer("first").get_weights()
        kernel[..., 1], bias[1] = 0.0, offset
        model.get_layer("first").set_weights([kernel, bias])
        return model

    picture = {"image": np.random.default_rng(0).normal(size=(2, 5, 5, 1)).astype(np.float32)}
    with pytest.raises(GateError, match="constant, or that nobody reads; the model has none"):
        trimmed(network(0.5, "same"))
    for model in (network(0.5, "valid"), network(0.0, "same")):
        small = trimmed(model)[0].model
        assert small.get_layer("first").filters == 2
        np.testing.assert_allclose(answer(model, picture), answer(small, picture), atol=1e-6)


def test_what_only_the_dead_read_is_dead_too():
    """K11: without a unit those that it alone read go as well, and a layer that is all dead keeps one."""
    model = chain(
        [[1, 2, 3, 4]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]],
        [[1, 0], [0, 0], [2, 0]],
        [[5], [6]],
    )
    small, applied = trimmed(model)
    assert applied.facts["channels"] == {"d0": [4, 3], "d1": [3, 2], "d2": [2, 1]}
    x = np.array([[1.0], [-2.0]], np.float32)
    np.testing.assert_allclose(answer(small.model, {"x": x}), answer(model, {"x": x}))
    silent = chain([[1, 2]], [[0, 0], [0, 0]], [[1], [1]])
    assert [weights.shape for weights in trimmed(silent)[0].model.get_weights()] == [(1, 1), (1, 1), (1, 1)]


@pytest.mark.slow
def test_efficientnet_with_real_weights_shrinks(tmp_path):
    """K4: EfficientNet-Lite0 as it is published loses a quarter of its channels and still runs."""
    member = ImageEfficientNet(parse(ImageEfficientNet.Config, {"image_size": 96}), 0)
    model = member.encoder()
    smaller, alone, _ = pruning(ratio=0.25).cut(model, unused_data(tmp_path))
    assert alone == {
        "head_bn": "shares channels with the model's output",
        "block0_bn2": "keeps all of its channels at this ratio and multiple",  # 12 of 16 are rounded to 16
    }
    counted = [count_flops(serving_function(each, images(96, 1))) for each in (model, smaller)]
    fallen = products(smaller) / products(model)
    assert counted[1] / counted[0] == pytest.approx(fallen, abs=0.02)
    assert 0.5 < fallen < 0.7
    embedding = answer(smaller, images(96))
    assert embedding.shape == (4, 1280)
    assert np.isfinite(embedding).all()
    assert embedding.std() > 0
