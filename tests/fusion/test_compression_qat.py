"""Clustering and quantisation-aware training: what the `.tflite` holds, by dtype, zeros and shared values."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from compression_world import digits, digits_data, tensors
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
from fusion.compression.clustering import Cluster
from fusion.compression.codebooks import coded_bytes
from fusion.compression.fake_quantization import Fold, SimulatedInt8, Structure, Unfold
from fusion.compression.measure import constants, litert_answer, write_tflite
from fusion.compression.pruning import Prune
from fusion.compression.qat import Qat
from fusion.config import parse
from fusion.errors import ConfigError, GateError
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.text_bert import TextBert
from fusion.training.batches import as_rows
from fusion.training.precision import precision_scope
from fusion.training.separate import cross_entropy
from fusion.training.trainer import TrainingSettings
from fusion.types import RunOptions
from tiny_bert import write_tiny_bert

layers = keras.layers
STATEFUL = {"rng_type": "stateful", "force_generator": True}
SHORT = {"epochs": 2, "batch_size": 48, "learning_rate": 0.002}


def residual_model() -> keras.Model:
    """Each kind of layer that a small image network has: image uint8 `[B, 8, 8, 3]` -> logits `[B, 10]`."""

    def convolution(x, layer, name, activate=True):
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(layer(x))
        return layers.ReLU(6.0, name=f"{name}_relu")(x) if activate else x

    def pointwise(filters, name):
        return layers.Conv2D(filters, 1, use_bias=False, name=name)

    image = layers.Input((8, 8, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 128, offset=-1, name="rescaling")(image)
    x = stem = convolution(x, layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem"), "stem")
    x = convolution(x, pointwise(32, "expand"), "expand")
    x = convolution(x, layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise"), "depthwise")
    x = convolution(x, pointwise(16, "project"), "project", activate=False)
    x = layers.Add(name="add")([stem, x])
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.SpatialDropout2D(0.1, **STATEFUL, name="spatial_dropout")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(32, activation="relu", name="inside")(x)
    x = layers.ReLU(name="relu")(layers.Dense(32, name="before")(x))
    x = layers.Dropout(0.1, **STATEFUL, name="dropout")(x)
    return keras.Model(image, layers.Dense(10, name="logits")(x), name="residual")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = residual_model()
    data = digits_data(tmp_path_factory.mktemp("digits"))
    fine_tune(model, data, TrainingSettings(epochs=8, batch_size=48, learning_rate=0.004))
    return model


def pruned(model, *names, sparsity=0.6):
    """Zeros, written by hand into the kernels of a copy."""
    copy = clone(model)
    for name in names:
        kernel = kernel_of(copy.get_layer(name))
        kernel.assign(np.where(np.abs(kernel) < np.quantile(np.abs(kernel), sparsity), 0, kernel))
    return copy


def shared(model, *names, values=6):
    """Few values, written by hand: those that are not zero become the nearest of `values`."""
    copy = clone(model)
    for name in names:
        kernel = kernel_of(copy.get_layer(name))
        array = kernel.numpy()
        levels = np.quantile(array[array != 0], np.linspace(0.02, 0.98, values)).astype(np.float32)
        nearest = levels[np.abs(array[..., None] - levels).argmin(axis=-1)]
        kernel.assign(np.where(array == 0, 0, nearest))
    return copy


def applied(method, subject, data, **settings):
    """What a method makes of a model or of what another method made; the model stays as it is."""
    subject = subject if isinstance(subject, Compressed) else Compressed(subject)
    before = [weight.copy() for weight in subject.model.get_weights()]
    compressed, done = method(parse(method.Config, settings)).apply(subject, data)
    for old, new in zip(before, subject.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert input_names(compressed.model) == input_names(subject.model)
    return compressed, done


def int8_kernels(tflite):
    """The kernels of a `.tflite` that are int8, by layer: `[output channel, weight]`."""
    kernels = {}
    for name, array in tensors(tflite).items():
        found = re.search(r"([a-z0-9_]+)/LastValueQuant", name)
        if found and array.dtype == np.int8:
            last = array.shape[0] == 1 and array.ndim == 4  # depthwise kernels are [1, H, W, channel]
            channels = np.moveaxis(array, -1, 0) if last else array
            kernels[found[1]] = channels.reshape(len(channels), -1)
    return kernels


def most_values(channels):
    """Distinct values of the output channel that has most of them."""
    return max(len(np.unique(channel)) for channel in channels)


def step_of(compressed):
    """The difference of neighbouring logits, which are rounded too."""
    low, high = (float(bound) for bound in compressed.model.get_layer("quant_logits").weights)
    return (high - low) / 255


def gap_in_steps(compressed, tflite, features):
    """How far LiteRT is from the simulation at most."""
    return np.abs(answer_of(compressed.model)(features) - litert_answer(tflite)(features)).max() / step_of(compressed)


# ---- clustering ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clustered(model, tmp_path_factory):
    """Clusters of a network of which two kernels are sparse."""
    data = digits_data(tmp_path_factory.mktemp("cluster"))
    subject = pruned(model, "stem", "inside")
    return subject, *applied(Cluster, subject, data, clusters=8, huffman=True, training=SHORT)


def test_kernels_have_few_values_and_zeros_stay(clustered, model, tmp_path):
    """L6: at most K distinct values a kernel after stripping, zeros of pruned kernels where they were, no wrappers."""
    subject, compressed, done = clustered
    result = compressed.model
    assert [type(layer) for layer in result.layers] == [type(layer) for layer in model.layers]
    for name in ("stem", "expand", "project", "inside", "before", "logits"):
        before, after = (kernel_of(m.get_layer(name)).numpy() for m in (subject, result))
        assert 4 <= len(np.unique(after)) <= 8
        assert done.facts["values"][name] == len(np.unique(after))
        if name in ("stem", "inside"):
            assert not after[before == 0].any()
            assert np.mean(after == 0) <= np.mean(before == 0) + 0.02
    assert done.left_alone["depthwise"] == "is a DepthwiseConv2D, which TFMOT does not cluster"
    data = digits_data(tmp_path)
    assert data.quality(answer_of(result)) >= data.quality(answer_of(model)) - 0.03


def test_indices_are_counted_in_bytes(clustered):
    """L6: 3 bits a weight and 8 values a kernel; codes of unequal length need less, since most weights are zero."""
    _, compressed, done = clustered
    packed = coded_bytes(compressed.model, huffman=False)
    raw = sum(weight.nbytes for weight in compressed.model.get_weights())
    sizes = [kernel_of(compressed.model.get_layer(name)).shape.num_elements() for name in done.facts["values"]]
    assert packed < raw - sum(sizes) * (32 - 3) / 8 + 100 * len(sizes)
    assert compressed.coded_bytes == done.facts["coded_bytes"] == coded_bytes(compressed.model, huffman=True) < packed


def test_few_zeros_stay_too(model, tmp_path):
    """L6: of a kernel that was pruned by a seventh, and of one in which a weight is zero by accident."""
    subject = pruned(model, "inside", sparsity=1 / 7)
    kernel_of(subject.get_layer("before"))[3, 5].assign(0.0)
    names = ["inside", "before"]
    short = {"epochs": 1, "batch_size": 400, "learning_rate": 0.001}
    compressed, done = applied(Cluster, subject, digits_data(tmp_path), layers=names, clusters=8, training=short)
    for name in names:
        before, after = (kernel_of(m.get_layer(name)).numpy() for m in (subject, compressed.model))
        assert not after[before == 0].any()
        assert 6 <= done.facts["values"][name] <= 8


@pytest.mark.slow
@pytest.mark.parametrize("initialisation", ["linear", "density"])
def test_each_channel_may_have_its_own_values(model, tmp_path, initialisation):
    """L6: values for each output channel of a convolution without bias, from other beginnings than k-means++."""
    settings = {"clusters": 4, "per_channel": True, "initialisation": initialisation, "layers": ["stem"]}
    short = {"epochs": 1, "batch_size": 400, "learning_rate": 0.001}
    compressed, _ = applied(Cluster, pruned(model, "stem"), digits_data(tmp_path), **settings, training=short)
    kernel = kernel_of(compressed.model.get_layer("stem")).numpy()
    assert most_values(kernel.reshape(-1, 16).T) <= 4
    assert len(np.unique(kernel)) > 8
    assert np.mean(kernel == 0) >= 0.599


def test_what_cannot_be_clustered_is_told(model, tmp_path):
    """Too few weights, a table whose distances would not fit into memory, nothing left to do."""
    data = digits_data(tmp_path)
    x = layers.Input((16,), name="x")
    with pytest.raises(GateError, match=r"must have a layer that fits.*small has no more than 256 weights"):
        applied(Cluster, keras.Model(x, layers.Dense(16, name="small")(x)), data, clusters=256)
    words = layers.Input((3,), dtype="int32", name="words")
    table = layers.Embedding(70_000, 64, name="table")(words)
    huge = keras.Model(words, layers.Flatten()(table))
    with pytest.raises(GateError, match=r"table has 4480000 weights, whose distances to 16 centroids do not fit"):
        applied(Cluster, huge, data)
    with pytest.raises(ConfigError, match=r"clusters.*greater than or equal to 3"):
        parse(Cluster.Config, {"clusters": 2})


# ---- what kernels keep -----------------------------------------------------------------------------------------


def test_structure_is_read_off_the_weights():
    """L12: pruned, clustered as a whole, clustered by channel, both, or none of it."""
    random = np.random.default_rng(0)
    plain = random.normal(size=(20, 4)).astype(np.float32)
    assert Structure.of(plain) == Structure(None, None)
    sparse = np.where(np.abs(plain) < 0.7, 0, plain)
    assert Structure.of(sparse).kept == "zeros"
    assert Structure.of(np.where(np.arange(80).reshape(20, 4) == 5, 0, plain)).kept == "zeros"  # one of 80
    levels = np.array([-1, -0.5, 0.25, 2], np.float32)
    few = levels[random.integers(0, 4, (20, 4))]
    structure = Structure.of(few)
    assert structure.kept == "shared values"
    np.testing.assert_array_equal(structure.groups, np.searchsorted(levels, few).ravel())
    assert Structure.of(np.where(sparse == 0, 0, few)).kept == "zeros and shared values"
    channels = few + np.array([10, 20, 30, 40], np.float32)  # four values in each, sixteen together
    expected = np.searchsorted(levels, few) + np.array([0, 4, 8, 12])
    np.testing.assert_array_equal(Structure.of(channels).groups.reshape(20, 4), expected)


def test_projection_is_a_mean_within_each_group():
    """L12: by hand: weights that shared a value share the mean, and pruned ones are zero; gradients are means too."""
    structure = Structure(np.array([[1.0, 1], [0, 1]], np.float32), np.array([0, 0, 1, 0], np.int32))
    kernel = tf.constant([[1.0, 2.0], [5.0, 6.0]])
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        projected = structure.project(kernel)
        loss = tf.reduce_sum(projected * [[1.0, 2.0], [100.0, 3.0]])
    np.testing.assert_allclose(projected, [[3, 3], [0, 3]])
    np.testing.assert_allclose(tape.gradient(loss, kernel), [[2, 2], [0, 2]])


def test_rounding_has_half_a_step_of_error_and_an_exact_zero():
    """L3: 256 numbers between the bounds, zero among them whatever the bounds are; gradients stop where it clips."""
    rounding = SimulatedInt8()
    x = tf.constant(np.linspace(-0.9, 2.5, 1001), tf.float32)
    rounding(x)
    rounding.set_range(-0.5, 2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        rounded = rounding(x)
    inside = (x.numpy() >= -0.5) & (x.numpy() <= 2.0)
    assert np.abs(rounded - x)[inside].max() <= 2.5 / 255 / 2 + 1e-6
    assert len(np.unique(rounded)) <= 256
    assert rounding(tf.zeros(1)).numpy() == 0
    np.testing.assert_array_equal(tape.gradient(rounded, x)[5:-5], inside[5:-5].astype(np.float32))
    rounding.set_range(0.3, 0.9)
    assert float(rounding.weights[0]) == 0.0
    rounding.set_range(0.0, 0.0)
    assert rounding(tf.zeros(1)).numpy() == 0


def test_folding_is_undone():
    """L3: matrices for the product, and the shape of before after it, also where lengths vary."""
    x = tf.random.normal((2, 5, 3))
    folded = Fold()(x)
    assert folded.shape == (10, 3)
    np.testing.assert_array_equal(Unfold()([folded, x]), x)
    assert Unfold()([tf.zeros((10, 7)), x]).shape == (2, 5, 7)


# ---- quantisation-aware training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chained(model, tmp_path_factory):
    """Kernels of all kinds in one network: pruned, clustered, both, and as they were."""
    data = digits_data(tmp_path_factory.mktemp("qat"))
    subject = shared(pruned(model, "stem", "project", "inside"), "project", "before")
    compressed, done = applied(Qat, Compressed(subject, coded_bytes=7), data, training=SHORT)
    return subject, compressed, done, write_tflite(compressed, data.representative)


def test_the_whole_network_is_int8(chained, model):
    """L3: every kernel is int8 in the file, the first behind uint8 pixels and those before a ReLU among them."""
    _, compressed, done, tflite = chained
    names = ["stem", "expand", "depthwise", "project", "inside", "before", "logits"]
    assert done.facts["quantised"] == names
    assert set(int8_kernels(tflite)) == set(names)
    assert done.left_alone == {}
    assert done.facts["in_float"] == ["rescaling"]
    assert done.facts["without"] == ["spatial_dropout", "dropout"]
    weights = sum(kernel_of(model.get_layer(name)).shape.num_elements() for name in names)
    stored = constants(tflite)
    assert stored["int8"]["bytes"] == weights
    assert stored["float32"]["bytes"] < 100
    assert compressed.model.output_shape == (None, 10)


def test_integers_answer_as_the_simulation(chained, model, tmp_path):
    """L3: LiteRT's int8 is at most two steps of the output from fake quantisation, and as good as float32."""
    _, compressed, _, tflite = chained
    images, _ = digits()
    assert gap_in_steps(compressed, tflite, {"image": images[1200:1500]}) <= 2.01
    data = digits_data(tmp_path)
    assert data.quality(litert_answer(tflite)) >= data.quality(answer_of(model)) - 0.03


def test_zeros_and_shared_values_stay(chained):
    """L12: PQAT, CQAT and PCQAT: zeros where they were and no more values a channel, in the int8 tensors."""
    subject, compressed, done, tflite = chained
    assert done.facts["kept"] == {
        "stem": "zeros",
        "project": "zeros and shared values",
        "inside": "zeros",
        "before": "shared values",
    }
    kernels = int8_kernels(tflite)
    for name in ("stem", "project", "inside"):
        before = kernel_of(subject.get_layer(name)).numpy()
        np.testing.assert_array_equal(kernels[name] == 0, (before == 0).reshape(-1, before.shape[-1]).T)
    assert most_values(kernels["project"]) <= 6 + 1
    assert most_values(kernels["before"]) <= 6
    assert most_values(kernels["expand"]) > 6 and most_values(kernels["logits"]) > 6
    trained = kernel_of(compressed.model.get_layer("project").layer).numpy()
    assert np.abs(trained - kernel_of(subject.get_layer("project")).numpy()).max() > 1e-4


def test_codes_are_counted_anew(chained):
    """L6: where an earlier step counted them, and in codes of equal length as it did."""
    _, compressed, _, _ = chained
    assert compressed.coded_bytes == coded_bytes(compressed.model, huffman=False)
    assert compressed.coded_bytes > coded_bytes(compressed.model, huffman=True)


@pytest.mark.slow
def test_prune_cluster_quantise(model, tmp_path):
    """L12: the chain of the three methods, without a word passed between them: what the file holds in the end."""
    data = digits_data(tmp_path)
    names = ["stem", "expand", "inside"]
    compressed, _ = applied(Prune, model, digits_data(tmp_path / "prune"), sparsity=0.5, layers=names, training=None)
    compressed, _ = applied(
        Cluster, compressed, digits_data(tmp_path / "cluster"), clusters=8, layers=names, training=SHORT
    )
    counted = compressed.coded_bytes
    compressed, done = applied(Qat, compressed, digits_data(tmp_path / "qat"), training=SHORT)
    assert done.facts["kept"] == dict.fromkeys(names, "zeros and shared values")
    assert compressed.coded_bytes not in (None, counted)
    tflite = write_tflite(compressed, data.representative)
    kernels = int8_kernels(tflite)
    for name in names:
        assert np.mean(kernels[name] == 0) >= 0.499
        assert most_values(kernels[name]) <= 8
    assert data.quality(litert_answer(tflite)) >= data.quality(answer_of(model)) - 0.05


def table_data(folder, features, labels):
    """Rows of any inputs with labels; they judge what they train."""
    return CompressionData(
        rows=as_rows({**features, "label": labels}),
        loss=lambda logits, batch: cross_entropy(batch["label"], logits),
        representative={name: array[:64] for name, array in features.items()},
        judge=lambda answer: (answer(features).argmax(axis=1) == labels).astype(np.float64),
        metric="accuracy",
        higher_is_better=True,
        options=RunOptions(7, folder, quiet=True),
    )


@pytest.mark.slow
def test_dense_layers_of_bert_are_int8(tmp_path):
    """L3: all Dense kernels of a transformer, whose inputs have rank 3, and its words; the rest stays float."""
    config = {"init_from": str(write_tiny_bert(tmp_path, num_hidden_layers=1)), "max_tokens": 8, "fine_tune": "all"}
    encoder = TextBert(parse(TextBert.Config, config), 0).encoder()
    joined = classifier(encoder, head(8, 2, parse(HeadSettings, {"hidden": [6]}), 0))
    model = keras.Model(joined.inputs, joined.output["logits"], name="bert")
    narrow = model.get_layer("layer0_narrow").kernel
    narrow[:, 3].assign(100 * narrow[:, 3])  # as real transformers have it
    random = np.random.default_rng(0)
    ids = random.integers(4, 15, (128, 8)).astype(np.int32)
    mask = (np.arange(8) < random.integers(3, 9, (128, 1))).astype(np.int32)
    features = {"input_ids": ids * mask, "attention_mask": mask}
    data = table_data(tmp_path / "run", features, (ids[:, 0] > 9).astype(np.int32))
    compressed, done = applied(Qat, model, data, training=SHORT | {"epochs": 4})
    tflite = write_tflite(compressed, data.representative)

    dense = [layer.name for layer in model.layers if isinstance(layer, layers.Dense)]
    assert len(dense) == 8
    assert set(int8_kernels(tflite)) == {*dense, "embeddings_word"} == set(done.facts["quantised"])
    kernels = [kernel_of(model.get_layer(name)) for name in (*dense, "embeddings_word")]
    # The table stands there once: rows that are rounded apart from it would make LiteRT scale it in each run.
    assert constants(tflite)["int8"]["bytes"] == sum(kernel.shape.num_elements() for kernel in kernels)
    assert set(done.left_alone) == {
        layer.name for layer in model.layers if layer.weights and layer.name not in done.facts["quantised"]
    }
    assert {"layer0_attention", "layer0_activation", "layer0_add", "embedding"} <= set(done.facts["in_float"])
    # LayerNormalization in float32 makes more of one step within than a chain of integers does: no bound for one row.
    said, heard = answer_of(compressed.model)(features), litert_answer(tflite)(features)
    assert np.abs(said - heard).mean() <= 1.5 * step_of(compressed)
    assert np.mean(said.argmax(axis=1) == heard.argmax(axis=1)) >= 0.97
    assert done.facts["outlier_channels"]["layer0_narrow"] == 1
    assert float(np.ptp(compressed.model.get_layer("quant_layer0_narrow").get_weights())) < 50
    varied = {name: array[:9, :5] for name, array in features.items()}  # the simulation takes any length
    assert answer_of(compressed.model)(varied).shape == (9, 2)


def tower_model() -> keras.Model:
    """Dense layers over float inputs, as in a factorisation tower: x `[B, 12]` -> logits `[B, 3]`."""
    x = numbers = layers.Input((12,), name="x")
    x = layers.Dense(16, activation="gelu", name="wide")(x)
    x = layers.BatchNormalization(name="norm")(layers.Dense(8, name="narrow")(x))
    return keras.Model(numbers, layers.Dense(3, name="logits")(x), name="tower")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [[], ["narrow"]])
def test_towers_of_dense_layers(tmp_path, chosen):
    """L3: activations that LiteRT does not fuse and a norm behind a Dense stay float beside int8 kernels, also of a
    model that was built in mixed precision; layers that are not asked for stay float; the same seed gives the same."""
    with precision_scope("mixed_float16"):
        model = tower_model()
    x = np.random.default_rng(1).normal(size=(96, 12)).astype(np.float32)
    data = table_data(tmp_path, {"x": x}, x[:, :3].argmax(axis=1).astype(np.int32))
    compressed, done = applied(Qat, model, data, layers=chosen, training=SHORT)
    tflite = write_tflite(compressed, data.representative)
    assert set(int8_kernels(tflite)) == set(done.facts["quantised"]) == set(chosen or ("wide", "narrow", "logits"))
    assert done.left_alone["norm"] == "has no kernel"
    if chosen:
        assert done.left_alone["logits"] == "not among the layers that were asked for"
    else:
        assert done.facts["in_float"] == ["wide_activation"]
        assert gap_in_steps(compressed, tflite, {"x": x}) <= 2.01
        again, _ = applied(
            Qat, model, replace(data, options=replace(data.options, directory=tmp_path / "again")), training=SHORT
        )
        for one, other in zip(compressed.model.get_weights(), again.model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_models_that_it_cannot_work_on_are_refused(tmp_path):
    """A layer that is called twice, and a model without any kernel that could be int8."""
    data = digits_data(tmp_path)
    a, b = layers.Input((4,), name="a"), layers.Input((4,), name="b")
    twice = layers.Dense(4, name="twice")
    with pytest.raises(GateError, match="'twice' is called 2 times"):
        applied(Qat, keras.Model([a, b], layers.Add()([twice(a), twice(b)])), data)
    series = layers.Input((6, 2), name="series")
    recurrent = keras.Model(series, layers.Conv1D(4, 3, name="wave")(series), name="waves")
    with pytest.raises(GateError, match=r"needs a Conv2D.*waves has none"):
        applied(Qat, recurrent, data)


@pytest.mark.slow
def test_minilm_becomes_a_quarter(tmp_path):
    """L3: all 36 Dense kernels and the table of the real MiniLM are int8, and it still says what it said."""
    submodel = TextBert(parse(TextBert.Config, {"max_tokens": 16}), 0)
    words = ["the weather", "my account", "a flight to Oslo", "this film", "the old recipe", "your answer", "our team"]
    verbs = [
        "is lovely",
        "was lost",
        "costs too much",
        "makes me laugh",
        "takes an hour",
        "is wrong",
        "starts tomorrow",
    ]
    texts = [f"{w} {v}, {end}" for w in words for v in verbs for end in ("I think", "again", "said nobody")]
    features = submodel.prepare(texts, fixed_length=True)
    model = submodel.encoder()
    wanted = answer_of(model)(features)
    data = replace(
        table_data(tmp_path, features, np.zeros(len(texts), np.int32)),
        rows=as_rows({**features, "wanted": wanted}),
        loss=lambda said, batch: tf.reduce_sum((said - batch["wanted"]) ** 2, axis=1),
        judge=lambda answer: (answer(features) * wanted).sum(axis=1).astype(np.float64),
    )
    training = {"epochs": 4, "batch_size": 16, "learning_rate": 0.0001}
    compressed, done = applied(Qat, model, data, training=training)
    tflite = write_tflite(compressed, data.representative)
    assert len(done.facts["quantised"]) == len(int8_kernels(tflite)) == 37
    assert len(tflite) < 24_000_000 < 89_000_000 < 4 * sum(weight.size for weight in model.get_weights())
    assert constants(tflite)["float32"]["bytes"] < 100_000
    assert data.quality(litert_answer(tflite)) > 0.93
