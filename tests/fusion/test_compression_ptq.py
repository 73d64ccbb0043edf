"""Quantisation after training: dtypes and bytes of the files, what integers ruin, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from compression_world import digits, digits_data, digits_model, tensors
from fusion.compat import keras, tf
from fusion.compression import METHODS
from fusion.compression.base import Compressed, CompressionData, answer_of
from fusion.compression.measure import constants, litert_answer, write_tflite
from fusion.compression.ptq import kernel_operations
from fusion.config import parse, parse_part
from fusion.errors import GateError
from fusion.export.mixed import Rule
from fusion.export.tflite import Conversion
from fusion.submodels.text_bert import TextBert
from fusion.training.batches import as_rows
from fusion.types import RunOptions
from tiny_bert import write_tiny_bert

layers = keras.layers


def apply(model, data, kind, **settings):
    """The result of one method, what it did, and its `.tflite`."""
    compressed, applied = parse_part(METHODS, {"kind": kind, **settings}, kind).make().apply(Compressed(model), data)
    return compressed, applied, write_tflite(compressed, data.representative)


def cosine(tflite, model, features):
    """Mean cosine of what a file and its model answer."""
    found, expected = litert_answer(tflite)(features), answer_of(model)(features)
    return np.mean((found * expected).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return digits_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model():
    return digits_model()


def bert_data(features, folder):
    rows = as_rows({**features, "label": np.zeros(len(features["input_ids"]), np.int32)})
    return CompressionData(
        rows=rows,
        loss=lambda output, batch: tf.zeros(len(output)),
        representative=features,
        judge=lambda answer: np.ones(3),
        metric="accuracy",
        higher_is_better=True,
        options=RunOptions(3, folder, quiet=True),
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of random weights and 40 rows of tokens for it, as many as 12 long."""
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    submodel = TextBert(parse(TextBert.Config, {"init_from": str(folder), "max_tokens": 12, "fine_tune": "all"}), 3)
    words = ["a", "blue", "film", "night", "red", "sea", "war"]
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, random.integers(1, 10))) for _ in range(40)]
    return submodel.encoder(), bert_data(submodel.prepare(texts, fixed_length=True), folder)


@pytest.mark.parametrize(
    ("kind", "dtype", "share", "least"),
    [
        ("float16", "float16", 0.5, 0.99999),
        ("dynamic_range", "int8", 0.25, 0.999),
        ("int8", "int8", 0.25, 0.99),
        ("int16x8", "int8", 0.25, 0.999),
    ],
)
def test_modes_are_what_they_are_called(model, data, kind, dtype, share, least):
    """L4: float16, dynamic range, int8 and 16 x 8 hold the kernels in those bytes, and answer nearly as before."""
    compressed, _, tflite = apply(model, data, kind)
    stored = constants(tflite)
    kernel = next(array for array in tensors(tflite).values() if array.shape == (32, 3, 3, 16))
    assert kernel.dtype == dtype and kernel.nbytes == share * 4 * kernel.size
    assert stored[dtype]["bytes"] >= kernel.nbytes
    assert ("float32" in stored) == (kind == "dynamic_range")  # whose small kernels stay
    assert ("int16" in stored) == (kind == "int16x8")
    images = digits()[0][-100:]
    assert cosine(tflite, model, {"image": images}) > least
    assert compressed.model is model


def test_small_kernels_of_dynamic_range_are_told(model, data):
    """What TFLite's converter passes over is in the report."""
    _, applied, _ = apply(model, data, "dynamic_range")
    assert applied.left_alone["logits"] == "has only 320 weights"
    tiny = digits_model(widths=(4, 8))
    with pytest.raises(GateError, match=r"kernel of at least 1024 weights"):
        apply(tiny, data, "dynamic_range")


def test_representative_rows_go_by_name(bert):
    """L4: two inputs of one dtype and shape, in another order, give the same file."""
    model, data = bert
    turned = dict(reversed(data.representative.items()))
    found = [write_tflite(Compressed(model, Conversion("int8", rows)), rows) for rows in (data.representative, turned)]
    assert found[0] == found[1]


def test_each_layer_is_found_in_the_file(model, data, bert):
    """Layers keep their names in what the converter fuses, and the last one has the name of the output."""
    file = write_tflite(Compressed(model), data.representative)
    kinds = {name: place.kind for name, place in kernel_operations(file, model).items()}
    assert kinds == {"block0_conv": "CONV_2D", "block1_conv": "CONV_2D", "logits": "FULLY_CONNECTED"}
    encoder, rows = bert
    places = kernel_operations(write_tflite(Compressed(encoder), rows.representative), encoder)
    dense = [layer.name for layer in encoder.layers if isinstance(layer, layers.Dense)]
    assert {name for name, place in places.items() if place.kind == "FULLY_CONNECTED"} == set(dense)
    assert places["embeddings_word"].kind == "GATHER"


def test_int8_gives_back_to_floats_what_integers_ruin(bert):
    """L4: all of a BERT in integers is not good enough here; norms and the worst layers leave them, and are named."""
    model, data = bert
    _, applied = parse_part(METHODS, {"kind": "int8", "agreement": 0.5}, "int8").make().apply(Compressed(model), data)
    assert applied.left_alone == {} and applied.facts["agreement"] == applied.facts["agreement_all_int8"]
    least = 1 - (1 - applied.facts["agreement_all_int8"]) / 8  # an eighth of that error
    _, applied, tflite = apply(model, data, "int8", agreement=least)
    assert applied.facts["agreement"] >= least > applied.facts["agreement_all_int8"]
    norms = {layer.name for layer in model.layers if isinstance(layer, layers.LayerNormalization)}
    assert norms <= set(applied.left_alone)
    assert "agree to" in applied.left_alone["embeddings_norm"]
    assert 0 < applied.facts["int8_layers"]
    assert cosine(tflite, model, data.representative) > applied.facts["agreement_all_int8"]
    kernels = [array for array in tensors(tflite).values() if array.shape == (32, 16)]
    assert len(kernels) == 1 and kernels[0].dtype == np.int8  # layer0_wide


def test_int8_that_cannot_agree_is_refused(model, data):
    """An agreement that no layer keeps is answered with the nearest one."""
    with pytest.raises(GateError, match=r"int8 must agree .* to 1\.0 .*alone \w+ agrees to 0\.9.*Lower agreement"):
        apply(model, data, "int8", agreement=1.0)


def test_16_by_8_with_layer_normalization_is_refused(bert):
    """L4: it fails in LiteRT, or aborts the process; a process of its own finds that out, and the reason is told."""
    reason = r"must run once; .*(SIGABRT|SquaredDifference).*no layer normalisation.*embeddings_norm.*Use int8"
    with pytest.raises(GateError, match=reason):
        apply(*bert, "int16x8")


def test_four_bits_and_their_error(data):
    """L1: int4 needs half the bytes of int8, and no weight moves by more than half a step of its channel."""
    image = keras.Input((8, 8, 3), dtype="uint8", name="image")
    x = layers.Flatten(name="flat")(layers.Rescaling(1 / 255, name="rescaling")(image))
    x = layers.Dense(64, activation="relu", name="wide")(x)
    model = keras.Model(image, layers.Dense(32, name="narrow")(x))
    _, applied, tflite = apply(model, data, "int4", layers=["wide"])
    assert applied.facts["int4_layers"] == ["wide"]
    assert applied.left_alone == {"narrow": "in 8 bits: not among the layers that were asked for"}
    stored = constants(tflite)
    assert stored["int4"]["bytes"] == 192 * 64 / 2 and stored["int8"]["bytes"] == 64 * 32
    kernel, scales = quantised(tflite, "INT4")
    weights = model.get_layer("wide").kernel.numpy().T
    assert np.abs(kernel).max() <= 8
    assert (np.abs(kernel * scales[:, None] - weights) <= scales[:, None] / 2 + 1e-7).all()
    assert cosine(tflite, model, {"image": digits()[0][-50:]}) > 0.98
    blocks = apply(model, data, "int4", layers=["wide"], block_size=32, rest="float32")[2]
    assert constants(blocks)["float32"]["bytes"] > 4 * 64 * 32
    assert cosine(blocks, model, {"image": digits()[0][-50:]}) > 0.98


def quantised(tflite, dtype):
    """The numbers and scales of the only kernel of a dtype, two of 4 bits in a byte."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(tflite)
    graph = model.Subgraphs(0)
    tensors = [graph.Tensors(number) for number in range(graph.TensorsLength())]
    (kernel,) = (tensor for tensor in tensors if tensor.Type() == getattr(schema.TensorType, dtype))
    stored = model.Buffers(kernel.Buffer()).DataAsNumpy()
    numbers = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8)
    signed = np.where(numbers > 7, numbers - 16, numbers).reshape(kernel.ShapeAsNumpy())
    return signed, kernel.Quantization().ScaleAsNumpy()


def test_four_bits_where_there_are_none(data):
    """Depthwise convolutions have no 4-bit kernels: left alone with the reason, or refused where nothing else is."""
    image = keras.Input((8, 8, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="rescaling")(image)
    x = layers.DepthwiseConv2D(5, depth_multiplier=8, name="depthwise")(x)
    model = keras.Model(image, layers.Flatten(name="flat")(x))
    with pytest.raises(GateError, match="depthwise LiteRT has no 4-bit weights for DEPTHWISE_CONV_2D operations"):
        apply(model, data, "int4")


def test_numbers_are_chosen_once(model, data):
    """Two steps that say what the file is written in contradict each other."""
    first = Compressed(model, Conversion("float16"))
    with pytest.raises(GateError, match="an earlier step chose float16"):
        METHODS["int8"](METHODS["int8"].Config()).apply(first, data)


def test_fixed_ranges_need_rows(model, data):
    """Ranges that are found at run time do not."""
    rows = data.representative
    found = write_tflite(Compressed(model, Conversion("mixed", rules=(Rule("dynamic8", "CONV_2D"),))), rows)
    assert constants(found)["int8"]["bytes"] == 3 * 3 * (3 * 16 + 16 * 32)
    with pytest.raises(GateError, match="need representative rows"):
        write_tflite(Compressed(model, Conversion("mixed", rules=(Rule("int8"),))), rows)


SENTENCES = (
    "how do I reset my password",
    "what is the weather in the mountains tomorrow",
    "please book a table for four at seven",
    "the film was far too long and rather dull",
    "she plays the violin in an orchestra",
    "my card was charged twice for one order",
    "a recipe for soup with lentils and carrots",
    "when does the last train to the coast leave",
    "two dogs run along an empty beach",
    "the parcel arrived broken and I want my money back",
    "prices of houses rose again this spring",
    "translate good morning into italian",
)


@pytest.mark.slow
def test_the_real_minilm(tmp_path):
    """L4, L13: all-MiniLM-L6-v2 by its modes; int8 keeps in floats what ruins it, and stays below 24 MB."""
    submodel = TextBert(parse(TextBert.Config, {"max_tokens": 32, "fine_tune": "all"}), 3)
    texts = [f"{one} and {two}" if one != two else one for one in SENTENCES[:6] for two in SENTENCES[:8]]
    model, data = submodel.encoder(), bert_data(submodel.prepare(texts, fixed_length=True), tmp_path)
    unseen = submodel.prepare(SENTENCES[8:], fixed_length=True)
    found = {}
    for kind, least, megabytes in (
        ("float16", 0.9999, 46),
        ("dynamic_range", 0.995, 24),
        ("int8", 0.98, 24),
        ("int4", 0.9, 19),
    ):
        _, applied, tflite = apply(model, data, kind)
        found[kind] = applied
        assert cosine(tflite, model, unseen) >= least, kind
        assert len(tflite) <= megabytes * 1e6, kind
    assert found["int8"].facts["agreement"] >= 0.99
    assert "layer0_norm" in found["int8"].left_alone
