"""Arrays and models in codes of few bits, judged by hand-worked numbers and slow versions of the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.compat import keras, tf
from fusion.compression import METHODS, codes, recipe
from fusion.compression.base import Compressed, CompressionData, answer_of
from fusion.compression.codebooks import Codebook, Uniform, channel_axis, coded_bytes, read_coded, write_coded
from fusion.compression.huffman import BLOCK, Huffman, code_lengths, entropy
from fusion.compression.low_bit import Binary, Ternary, _ThroughConv2D, _ThroughDense
from fusion.config import parse, parse_part
from fusion.errors import ConfigError, DataError, GateError
from fusion.files import load_arrays, save_arrays
from fusion.training.batches import as_rows
from fusion.training.separate import cross_entropy
from fusion.types import RunOptions

numbers = st.floats(-1000, 1000, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
matrices = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=numbers)
bits_of_codes = st.integers(2, 8)


@pytest.fixture(scope="module")
def heavy():
    """Numbers with a few far out, like those of trained kernels: float32 `[24, 40]`."""
    return np.random.default_rng(0).standard_t(4, (24, 40)).astype(np.float32)


# ---- evenly spaced levels ------------------------------------------------------------------------------------


def test_uniform_levels_by_hand():
    """L1: three bits, symmetric: steps of 1 from -3 to 3; two bits, affine: from -1 to 2, with 0 among them."""
    symmetric = codes.uniform(np.float32([-3, -1, 0, 1.4, 1.6, 3]), 3)
    np.testing.assert_array_equal(symmetric.decode(), [-3, -1, 0, 1, 2, 3])
    np.testing.assert_array_equal(symmetric.codes, [0, 2, 3, 4, 5, 6])
    assert symmetric.bytes() == 3 + 4 + 4 + 3 * 4  # 18 bits, scale, zero, layout
    affine = codes.uniform(np.float32([-1, 0, 0.4, 1.9, 2]), 2, symmetric=False)
    np.testing.assert_array_equal(affine.decode(), [-1, 0, 0, 2, 2])
    rows = codes.uniform(np.float32([[2, 4], [-300, 100]]), 2, axis=0)
    np.testing.assert_array_equal(rows.decode(), [[0, 4], [-300, 0]])  # half a step is rounded to the even one


@settings(max_examples=60, deadline=None)
@given(matrices, bits_of_codes, st.sampled_from([None, 0, 1]), st.booleans())
def test_no_number_is_off_by_more_than_half_a_step(array, bits, axis, symmetric):
    """L1: |error| <= scale / 2 for 2 to 8 bits, in all or by row or column, and 0 stays 0."""
    coded = codes.uniform(array, bits, axis, symmetric)
    error = np.abs(array.astype(np.float64) - coded.decode())
    half = coded.scale.astype(np.float64) / 2
    assert (error <= (half if axis is None else half.reshape((-1, 1) if axis == 0 else (1, -1)))).all()
    assert (coded.decode()[array == 0] == 0).all()
    assert coded.codes.max() < 2**bits
    assert len(coded.packed) == math.ceil(array.size * bits / 8)
    if symmetric:
        assert error.max() <= codes.error_bound(array, coded) <= half.max()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8).flatmap(
        lambda b: st.tuples(st.just(b), arrays(np.uint8, st.integers(0, 40), elements=st.integers(0, 2**b - 1)))
    )
)
def test_packing_gives_codes_back(case):
    """L1: codes of n bits need n bits each, and come back."""
    bits, wanted = case
    packed = codes.pack(wanted, bits)
    assert len(packed) == math.ceil(len(wanted) * bits / 8)
    np.testing.assert_array_equal(codes.unpack(packed, bits, len(wanted)), wanted)


def test_what_cannot_be_coded_is_refused():
    """NaN, and bits or limits out of range."""
    with pytest.raises(DataError, match="finite numbers"):
        codes.uniform(np.float32([1, np.nan]), 8)
    with pytest.raises(DataError, match="finite numbers"):
        codes.kmeans_levels(np.float32([1, np.inf]), 2)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        codes.uniform(np.float32([1]), 1)
    with pytest.raises(ValueError, match="symmetric"):
        codes.uniform(np.float32([1]), 4, symmetric=False, limit=np.ones(1))


# ---- where to cut --------------------------------------------------------------------------------------------


def test_mse_limit_is_near_the_best_of_all(heavy):
    """L8: within 3 % of the least squared error that any of 400 thresholds has, at 3, 4 and 6 bits."""
    for bits in (3, 4, 6):
        every = np.linspace(0.01, 1, 400)[:, None] * np.abs(heavy).max()
        best = min(codes.squared_error(heavy, codes.uniform(heavy, bits, limit=limit)) for limit in every)
        limit = codes.mse_limit(heavy, bits)
        found = codes.squared_error(heavy, codes.uniform(heavy, bits, limit=limit))
        assert found <= 1.03 * best
        coded = codes.uniform(heavy, bits, limit=limit)
        assert np.abs(heavy - coded.decode()).max() == pytest.approx(codes.error_bound(heavy, coded), rel=1e-6)
        assert codes.error_bound(heavy, coded) > coded.scale[0]  # it cuts


@settings(max_examples=40, deadline=None)
@given(matrices, bits_of_codes, st.sampled_from([None, 0]))
def test_mse_limit_never_costs(array, bits, axis):
    """L8: cutting is never worse than not cutting."""
    cut = codes.uniform(array, bits, axis, limit=codes.mse_limit(array, bits, axis))
    whole = codes.uniform(array, bits, axis)
    assert codes.squared_error(array, cut) <= codes.squared_error(array, whole) * (1 + 1e-9)


def test_kl_limit_is_that_of_the_slow_version():
    """L8: TensorRT's loop over thresholds, bin by bin; it cuts a heavy tail and leaves an even distribution."""
    random = np.random.default_rng(1)
    heavy = random.laplace(size=1600).astype(np.float32)
    limit = codes.kl_limit(heavy, 4)
    assert limit[0] == pytest.approx(slow_kl_limit(heavy, 8), rel=1e-6)
    assert limit[0] < 0.8 * np.abs(heavy).max()
    even = random.uniform(-1, 1, (4, 5000)).astype(np.float32) * np.float32([[1], [2], [3], [0]])
    np.testing.assert_allclose(codes.kl_limit(even, 8, axis=0), np.abs(even).max(axis=1), rtol=0.01)
    few = np.float32([1, 2, 50])
    assert codes.kl_limit(few, 4) == 50


def slow_kl_limit(array, steps):
    magnitudes = np.abs(array.astype(np.float64))
    bins = min(2048, len(array) // 8)
    counts, edges = np.histogram(magnitudes, bins, (0, magnitudes.max()))
    best = (math.inf, 0)
    for kept in range(max(steps, bins // 16), bins + 1):
        p = [*counts[: kept - 1], counts[kept - 1 :].sum()]
        q = [0.0] * kept
        for step in range(steps):
            inside = [bin for bin in range(kept) if bin * steps // kept == step]
            full = [bin for bin in inside if p[bin] > 0]
            for bin in full:
                q[bin] = sum(counts[other] for other in inside) / len(full)
        shares = [(a / sum(p), max(b / sum(q), 1e-4)) for a, b in zip(p, q, strict=True) if a > 0]
        best = min(best, (sum(a * math.log(a / b) for a, b in shares), kept))
    return edges[best[1]]


# ---- levels where the numbers are ----------------------------------------------------------------------------


def test_quantile_levels_fill_alike(heavy):
    """L5: means of equal shares, by hand; at 3 bits less than half the squared error of even steps."""
    array = np.float32([100, 1, 2, 30, 3, 4, 10, 20])
    np.testing.assert_array_equal(codes.quantile_levels(array, 2), [1.5, 3.5, 15, 65])
    levels = codes.quantile_levels(heavy, 3)
    counts = np.bincount(codes.codebook(heavy, levels).codes.reshape(-1))
    assert entropy(counts) > 2.9  # of 3 bits: nearly equalised
    error = codes.squared_error(heavy, codes.codebook(heavy, levels))
    assert error < codes.squared_error(heavy, codes.uniform(heavy, 3)) / 2


def test_normal_levels_are_those_of_nf4():
    """L9: the table that QLoRA's authors published; other bits have as many levels, 0 among them."""
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    published += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    published += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    np.testing.assert_allclose(codes.normal_levels(4), [*published, 0.7229568362236023, 1.0], atol=3e-6)
    for bits in range(2, 9):
        levels = codes.normal_levels(bits)
        assert len(levels) == 2**bits and 0 in levels and levels[0] == -1 and levels[-1] == 1
        assert (np.diff(levels) > 0).all()


def test_codebooks_compared_on_normal_numbers():
    """L5, L6, L9 beside L1 at 4 bits: k-means is best; the normal levels, which look at nothing but the width, come
    within a tenth of it; even steps lose most."""
    array = np.random.default_rng(2).normal(0, 0.05, 20_000).astype(np.float32)
    normal = codes.normal_levels(4)
    error = {
        "even": codes.squared_error(array, codes.uniform(array, 4)),
        "quantile": codes.squared_error(array, codes.codebook(array, codes.quantile_levels(array, 4))),
        "normal": codes.squared_error(array, codes.codebook(array, normal, codes.fitted_scale(array, normal))),
        "kmeans": codes.squared_error(array, codes.codebook(array, codes.kmeans_levels(array, 4))),
    }
    assert error["kmeans"] < error["normal"] < min(1.1 * error["kmeans"], error["quantile"], error["even"])
    assert error["kmeans"] == pytest.approx(0.009497 * 0.05**2, rel=0.04)  # Max 1960, table I, for 16 levels


def test_normal_levels_of_rows(heavy):
    """L9: each row of a table with a width of its own, as QLoRA codes blocks, beats one width for all."""
    table = heavy * np.geomspace(0.01, 10, 24, dtype=np.float32)[:, None]
    levels, largest = codes.normal_levels(4), np.abs(table).max(axis=1)
    rows = codes.codebook(table, levels, largest, axis=0)
    assert rows.bytes() == table.size // 2 + 4 * (24 + 1 + 16 + 4)
    again = codes.Coded.from_arrays(rows.arrays(huffman=True))
    np.testing.assert_array_equal(again.decode(), rows.decode())
    one = codes.codebook(table, levels, codes.fitted_scale(table, levels))
    assert (
        codes.squared_error(table[:12], codes.codebook(table[:12], levels, largest[:12], axis=0))
        < 0.01 * np.square(table[:12] - one.decode()[:12]).mean()
    )


def test_kmeans_is_near_the_optimum():
    """L6: against the exact optimum, found by dynamic programming; each level is the mean of what is nearest to it."""
    random = np.random.default_rng(3)
    for scale in (0, 1, 2):
        array = np.exp(scale * random.normal(size=60)).astype(np.float32)
        levels = codes.kmeans_levels(array, 2)
        coded = codes.codebook(array, levels)
        assert codes.squared_error(array, coded) <= 1.05 * optimal_error(np.sort(array.astype(np.float64)), 4) + 1e-12
        for code, level in enumerate(levels if scale else ()):
            assert array[coded.codes == code].mean() == pytest.approx(level, rel=1e-5)


def optimal_error(values, clusters):
    """Mean squared error of the best cut of sorted numbers into pieces."""
    cost = {(i, j): np.square(values[i:j] - values[i:j].mean()).sum() for j in range(len(values) + 1) for i in range(j)}
    best = [0.0, *(math.inf for _ in values)]
    for _ in range(clusters):
        best = [0.0, *(min(best[i] + cost[i, j] for i in range(j)) for j in range(1, len(values) + 1))]
    return best[-1] / len(values)


@settings(max_examples=40, deadline=None)
@given(matrices, st.integers(2, 4))
def test_codebooks_keep_what_is_few(array, bits):
    """L6: at most 2^bits distinct numbers; zeros of a pruned array stay; an array with few numbers stays as it is."""
    for fit in (codes.kmeans_levels, codes.quantile_levels):
        decoded = codes.codebook(array, fit(array, bits)).decode()
        assert len(np.unique(decoded)) <= 2**bits
        assert (decoded[array == 0] == 0).all()
    if len(np.unique(array)) <= 2**bits:
        np.testing.assert_array_equal(codes.codebook(array, codes.kmeans_levels(array, bits)).decode(), array)


# ---- Huffman -------------------------------------------------------------------------------------------------


def test_huffman_of_a_textbook():
    """L7: the frequencies of Cormen et al., Introduction to Algorithms, figure 16.3: 224 bits for 100 symbols."""
    counts = np.array([45, 13, 12, 16, 9, 5])
    lengths = code_lengths(counts)
    assert (lengths * counts).sum() == 224
    np.testing.assert_array_equal(np.sort(lengths), [1, 3, 3, 3, 4, 4])
    coded = Huffman.encode(np.repeat(np.arange(6), counts).astype(np.uint8))
    assert len(coded.stream) == 28
    assert coded.bytes == 28 + 6 + 2 + 8  # the stream, six lengths, one block, the count


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, st.integers(0, 300), elements=st.one_of(st.integers(0, 3), st.integers(0, 255))))
def test_huffman_is_lossless_and_short(symbols):
    """L7: the symbols come back, also from an array file, and entropy <= mean length < entropy + 1."""
    coded = Huffman.encode(symbols)
    np.testing.assert_array_equal(Huffman.from_arrays(coded.arrays()).decode(), symbols)
    if len(symbols):
        counts = np.bincount(symbols)
        mean = float((code_lengths(counts) * counts).sum() / len(symbols))
        assert entropy(counts) - 1e-9 <= mean < entropy(counts) + 1
        assert len(coded.stream) == math.ceil(round(mean * len(symbols)) / 8)


def test_huffman_of_many_and_of_long_codes():
    """L7: several blocks, the last one not full; codes of 20 bits, as Fibonacci's frequencies make them."""
    fibonacci = [1, 1]
    while len(fibonacci) < 21:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    symbols = np.random.default_rng(4).permutation(np.repeat(np.arange(21), fibonacci)).astype(np.uint8)
    coded = Huffman.encode(symbols)
    assert coded.lengths.max() == 20
    assert len(coded.blocks) == math.ceil(len(symbols) / BLOCK) > 10
    np.testing.assert_array_equal(coded.decode(), symbols)


def test_damaged_huffman_is_refused():
    """L7: a stream cut short, or lengths that are no code."""
    parts = Huffman.encode(np.arange(9, dtype=np.uint8)).arrays()
    for broken in ({"stream": parts["stream"][:-1]}, {"lengths": np.uint8([1, 1, 1])}, {"count": np.array([5000])}):
        with pytest.raises(GateError, match="Huffman's code must be complete"):
            Huffman.from_arrays(parts | broken).decode()


# ---- codes read off the numbers ------------------------------------------------------------------------------


def test_codes_are_read_off_the_numbers(heavy):
    """L1, L2, L6: what made the numbers few is found again, at the same bits."""
    alpha = np.abs(heavy).mean(axis=0)
    cases = {
        "even": (codes.uniform(heavy, 4).decode(), 4),
        "even by column": (codes.uniform(heavy, 8, axis=1).decode(), 8),
        "affine by row": (codes.uniform(heavy, 5, axis=0, symmetric=False).decode(), 5),
        "codebook": (codes.codebook(heavy, codes.kmeans_levels(heavy, 3)).decode(), 3),
        "binary": (np.where(heavy < 0, -alpha, alpha), 1),
        "ternary": ((np.sign(heavy) * (np.abs(heavy) > 1) * alpha).astype(np.float32), 2),
    }
    for name, (array, bits) in cases.items():
        coded = codes.lossless(array)
        assert coded.bits == bits, name
        assert coded.bytes() < array.size * bits / 8 + 9 * max(array.shape)
        for huffman in (False, True):
            np.testing.assert_array_equal(codes.restored(codes.stored(array, huffman)), array)
    assert codes.lossless(heavy) is None
    assert codes.lossless(np.arange(500)) is None
    np.testing.assert_array_equal(codes.restored(codes.stored(heavy, True)), heavy)


@settings(max_examples=60, deadline=None)
@given(matrices, st.booleans())
def test_any_array_comes_back(array, huffman):
    """L6, L7: whatever is stored of an array gives it back, and is no larger."""
    parts = codes.stored(array, huffman)
    np.testing.assert_array_equal(codes.restored(parts), array)
    assert codes.size_of(parts) <= array.nbytes


# ---- models --------------------------------------------------------------------------------------------------


def small_model():
    """16 numbers -> 3 logits by 16 × 24, 24 × 24 and 24 × 3 weights."""
    keras.utils.set_random_seed(1)
    inputs = keras.layers.Input((16,), name="x")
    x = keras.layers.Dense(24, name="first")(inputs)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.Dense(24, use_bias=False, name="middle")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU(name="relu2")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def small_data(folder):
    random = np.random.default_rng(5)
    x = random.normal(size=(256, 16)).astype(np.float32)
    label = (x[:, :3]).argmax(axis=1).astype(np.int32)

    def judge(answer):
        return (answer({"x": x}).argmax(axis=1) == label).astype(float)

    return CompressionData(
        rows=as_rows({"x": x, "label": label}),
        loss=lambda logits, batch: cross_entropy(batch["label"], logits),
        representative={"x": x[:50]},
        judge=judge,
        metric="accuracy",
        higher_is_better=True,
        options=RunOptions(7, folder, quiet=True),
    )


def applied(method, settings, model, folder):
    return method(parse(method.Config, settings)).apply(Compressed(model), small_data(folder))


def test_uniform_models(tmp_path):
    """L1, L8: kernels lie on few levels by channel, facts bound the error, and clipping by least squares pays."""
    model = small_model()
    kernel = model.get_layer("middle").get_weights()[0]
    found, told = applied(Uniform, {"bits": 4, "layers": ["first", "mid*"]}, model, tmp_path)
    coded = found.model.get_layer("middle").get_weights()[0]
    facts = told.facts["layers"]["middle"]
    assert max(len(np.unique(column)) for column in coded.T) <= 15
    assert np.abs(kernel - coded).max() <= facts["error_bound"]
    assert facts["squared_error"] == pytest.approx(np.square(kernel - coded).mean(), rel=1e-5)
    np.testing.assert_array_equal(model.get_layer("middle").get_weights()[0], kernel)
    assert told.left_alone == {"norm": "has no kernel", "logits": "not among the layers that were asked for"}
    assert found.coded_bytes == told.facts["coded_bytes"] == coded_bytes(found.model, huffman=False)
    _, told = applied(Uniform, {"bits": 3, "per_channel": False, "clip": "mse"}, model, tmp_path)
    for facts in told.facts["layers"].values():
        assert facts["squared_error"] <= facts["unclipped_squared_error"]
    _, told = applied(Uniform, {"bits": 6, "clip": "kl"}, model, tmp_path)
    assert told.facts["layers"]["first"]["unclipped_squared_error"] > 0


def test_channels_of_kernels():
    """L1: the axis along which ranges differ: output channels, channels of depthwise kernels, rows of embeddings."""
    for layer, shape, axis in (
        (keras.layers.Dense(5), (1, 3), 1),
        (keras.layers.Conv2D(5, 3), (1, 8, 8, 3), 3),
        (keras.layers.DepthwiseConv2D(3), (1, 8, 8, 3), 2),
        (keras.layers.Embedding(7, 3), (1, 2), 0),
    ):
        layer.build(shape)
        assert channel_axis(layer) == axis


def test_pruned_models_stay_pruned(tmp_path):
    """L12: zeros that are in the kernels stay in every code."""
    model = small_model()
    kernel = model.get_layer("middle").kernel
    kernel.assign(np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0.0, kernel))
    for method, chosen in (
        (Uniform, {"bits": 4}),
        *((Codebook, {"levels": of}) for of in ("kmeans", "quantile", "normal")),
    ):
        found, _ = applied(method, chosen, model, tmp_path)
        assert (found.model.get_layer("middle").kernel.numpy()[kernel.numpy() == 0] == 0).all()


@pytest.mark.parametrize("levels", ["kmeans", "quantile", "normal"])
def test_codebooks_of_models(levels, tmp_path):
    """L5, L6, L9: at most 2^bits numbers a kernel, compared with even steps of as many bits."""
    found, told = applied(Codebook, {"bits": 3, "levels": levels, "huffman": True}, small_model(), tmp_path)
    for name in ("first", "middle"):
        assert len(np.unique(found.model.get_layer(name).get_weights()[0])) <= 8
        facts = told.facts["layers"][name]
        assert facts["levels"] == 8 and 2 < facts["entropy"] <= 3
        if levels == "kmeans":
            assert facts["squared_error"] < facts["uniform_squared_error"]
    assert told.left_alone["logits"] == "has only 72 weights"


def test_bytes_of_a_model_by_hand(tmp_path):
    """L6, L7: indices, codebook, tables and what is left in float, added up; Huffman's code takes no more."""
    found, _ = applied(Codebook, {"bits": 4}, small_model(), tmp_path)
    overhead = 4 * (16 + 2) + 4 * 4  # 16 levels, scale, zero; bits, axis and the shape
    kernels = 384 // 2 + 576 // 2 + 2 * overhead + 72 * 4
    equal = 5 * (24 // 8 + 2 * 4 + 3 * 4)  # a bias and four statistics, all 0 or all 1: one bit each, and the tables
    assert found.coded_bytes == kernels + equal + 3 * 4  # the last layer's bias is cheaper as it is
    assert coded_bytes(found.model, huffman=True) <= found.coded_bytes


@pytest.mark.parametrize("huffman", [False, True])
def test_coded_files_give_the_weights_back(huffman, tmp_path):
    """L7: the file of a whole model is as large as is said, and gives every weight back to the bit."""
    found, _ = applied(Codebook, {"bits": 2}, small_model(), tmp_path)
    path = tmp_path / "weights.npz"
    write_coded(found.model, path, huffman)
    stored = load_arrays(path)
    assert codes.size_of(stored) == coded_bytes(found.model, huffman)
    assert path.stat().st_size - codes.size_of(stored) < 300 * len(stored)
    again = small_model()
    again.set_weights(read_coded(path))
    for one, other in zip(again.get_weights(), found.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_damaged_coded_files_are_refused(tmp_path):
    """L7: cut in half, of other arrays, or with a part gone: one sentence each."""
    path = tmp_path / "weights.npz"
    found, _ = applied(Codebook, {"bits": 2}, small_model(), tmp_path)
    write_coded(found.model, path, huffman=False)
    stored = load_arrays(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(GateError, match="cannot be read"):
        read_coded(path)
    save_arrays(path, {"theta": np.ones(3)})
    with pytest.raises(GateError, match="must hold the codes of a model's weights"):
        read_coded(path)
    save_arrays(path, {name: array for name, array in stored.items() if name != "0/scale"})
    with pytest.raises(GateError, match="reading failed at 'scale'"):
        read_coded(path)
    save_arrays(path, stored | {"0/layout": np.array([2, -1, 50_000, 50_000], np.int32)})
    with pytest.raises(GateError, match="96 bytes for codes of 2 bits in the shape"):
        read_coded(path)


def test_models_without_kernels_are_refused(tmp_path):
    """Nothing to code is no success; an unknown layer is answered with the nearest."""
    inputs = keras.layers.Input((16,), name="x")
    tiny = keras.Model(inputs, keras.layers.Dense(3, name="logits")(inputs))
    with pytest.raises(GateError, match="at least 256 weights"):
        applied(Codebook, {}, tiny, tmp_path)
    with pytest.raises(GateError, match="between its first and its last"):
        applied(Binary, {}, tiny, tmp_path)
    with pytest.raises(ConfigError, match="'midle': did you mean 'middle'"):
        applied(Uniform, {"layers": ["midle"]}, small_model(), tmp_path)


def test_bytes_of_codes_are_those_of_the_weights(monkeypatch, tmp_path):
    """L6: after a later step that moves the weights they are counted anew, one that leaves them keeps them, and coding
    what is coded already changes nothing."""
    monkeypatch.setattr(recipe, "measure", lambda subject, data: (None, b""))
    model, data = small_model(), small_data(tmp_path)

    def chain(*steps):
        return recipe.compress(model, [parse_part(METHODS, step, "step") for step in steps], data).compressed

    coded = chain({"kind": "codebook", "bits": 3})
    assert coded.coded_bytes == coded_bytes(coded.model, huffman=False)
    clipped = chain({"kind": "codebook", "bits": 3}, {"kind": "clip_activations"})
    assert clipped.coded_bytes == coded.coded_bytes
    learned = {"kind": "clip_activations", "bounds": "learned", "training": {"epochs": 1}}
    moved = chain({"kind": "codebook", "bits": 3}, learned)
    assert moved.coded_bytes == coded_bytes(moved.model, huffman=True) > 3 * coded.coded_bytes
    with pytest.raises(GateError, match="codebook must make something of the model smaller"):
        chain({"kind": "codebook", "bits": 3}, {"kind": "codebook", "bits": 3})
    for huffman in (False, True):
        coder = {"kind": "codebook", "bits": 3, "huffman": huffman}
        pruned = chain(coder, {"kind": "prune", "sparsity": 0.9, "training": None})
        assert pruned.coded_bytes == coded_bytes(pruned.model, huffman) != coded_bytes(pruned.model, not huffman)


# ---- one and two bits ----------------------------------------------------------------------------------------


def test_projections_by_hand():
    """L2: α of each column; ternary drops what is below .7 of the mean and takes α from the rest."""
    kernel = tf.constant([[1.0, -4.0], [-3.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(Binary.project(kernel), [[1.5, -1.5], [-1.5, 1.5], [1.5, 1.5], [1.5, 1.5]])
    np.testing.assert_allclose(Ternary.project(kernel), [[0, -4], [-2.5, 0], [2.5, 0], [0, 0]])


@pytest.mark.parametrize("layer", [_ThroughDense(4, activation="tanh"), _ThroughConv2D(4, 1)])
def test_gradients_go_straight_through(layer):
    """L2: the answer is that of the projected kernel, its gradient that of the float kernel behind it."""
    layer.project = Binary.project
    x = tf.constant(np.random.default_rng(6).normal(size=(2, 3, 3, 5)), tf.float32)
    layer.build(x.shape)
    plain = keras.layers.Dense(4, activation=layer.activation)
    plain.build(x.shape)
    plain.set_weights([tf.reshape(Binary.project(layer.kernel), (5, 4)), np.zeros(4)])
    with tf.GradientTape(persistent=True) as tape:
        through, direct = layer(x), plain(x)
    np.testing.assert_allclose(through, direct, atol=1e-6)
    gradient = tf.reshape(tape.gradient(through, layer.kernel), (5, 4))
    np.testing.assert_allclose(gradient, tape.gradient(direct, plain.kernel), atol=1e-5)


@pytest.mark.parametrize(("method", "values", "bits"), [(Binary, 2, 1), (Ternary, 3, 2)])
def test_low_bit_models_learn(method, values, bits, tmp_path):
    """L2: plain layers with 2 or 3 numbers a channel in the middle, trained well above chance, and counted in bits."""
    model = small_model()
    training = {"epochs": 15, "batch_size": 32, "learning_rate": 0.01}
    found, told = applied(method, {"training": training}, model, tmp_path)
    assert [type(layer) for layer in found.model.layers] == [type(layer) for layer in model.layers]
    kernel = found.model.get_layer("middle").get_weights()[0]
    assert max(len(np.unique(column)) for column in kernel.T) == values
    np.testing.assert_allclose(np.abs(kernel).max(axis=0), -kernel.min(axis=0), rtol=1e-6)
    assert told.facts["layers"]["middle"]["zeros"] == pytest.approx((kernel == 0).mean())
    assert set(told.left_alone) == {"first", "norm", "logits"}
    assert codes.size_of(codes.stored(kernel, False)) == 576 * bits // 8 + 4 * (24 + 1 + 4)
    assert small_data(tmp_path).quality(answer_of(found.model)) > 0.8
