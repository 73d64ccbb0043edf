"""Big Transfer (D16m): the published names and figures, numbers as by hand, trained, exported and made smaller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.compression import METHODS
from fusion.compression.base import CompressionData
from fusion.compression.recipe import compress
from fusion.config import parse, parse_part
from fusion.errors import DataError, GateError
from fusion.export import savedmodel, tflite
from fusion.files import load_arrays, save_arrays, sha256_of
from fusion.submodels.backbone_families import FAMILIES, Family, drawing
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.image_backbone import ImageBackbone, write_weights
from fusion.submodels.standardized import GroupNormalization, StandardizedConv2D, folded, standardized
from fusion.training.batches import as_rows
from fusion.training.precision import precision_scope
from fusion.training.separate import ClassifierTraining, Examples, train_classifier
from fusion.types import RunOptions

SIZE, GROUPS = 32, 32
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)

PUBLISHED = {
    "bit_r50x1": (25_549_352, 25.55),
    "bit_r50x3": (217_319_080, 217.32),
    "bit_r101x1": (44_541_480, 44.54),
    "bit_r101x3": (387_934_888, 387.93),
    "bit_r152x2": (236_335_208, 236.34),
}
"""Parameters with 1000 classes, and in millions as docs/models/big-transfer.md of pytorch-image-models has them."""


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Two blocks of one unit each, by the same table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "bit_tiny", Family("", "tf", r"root_pool|block1_unit01_add", units=(1, 1)))
        yield


def published(seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays in the names of the published files (google-research/big_transfer), with a head of 7 classes."""
    random = np.random.default_rng(seed)
    kernels = {"resnet/root_block": (7, 7, 3, 64)}
    norms = {"resnet": 512}
    for block, reads, middle in ((1, 64, 64), (2, 256, 128)):
        unit = f"resnet/block{block}/unit01"
        kernels |= {f"{unit}/a": (1, 1, reads, middle), f"{unit}/a/proj": (1, 1, reads, 4 * middle)}
        kernels |= {f"{unit}/b": (3, 3, middle, middle), f"{unit}/c": (1, 1, middle, 4 * middle)}
        norms |= {f"{unit}/a": reads, f"{unit}/b": middle, f"{unit}/c": middle}
    arrays = {
        f"{place}/standardized_conv2d/kernel": random.normal(0.3, 0.02, shape) for place, shape in kernels.items()
    }
    for place, channels in norms.items():
        arrays[f"{place}/group_norm/gamma"] = random.uniform(0.5, 1.5, channels)
        arrays[f"{place}/group_norm/beta"] = random.normal(0, 0.3, channels)
    arrays |= {"resnet/head/conv2d/kernel": np.zeros((1, 1, 512, 7)), "resnet/head/conv2d/bias": np.zeros(7)}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings of a file of weights."""
    path = tmp_path_factory.mktemp("bit") / "BiT-tiny.npz"
    save_arrays(path, published())
    return {"weights": str(path), "sha256": sha256_of(path)}


def backbone(seed: int = 3, **settings: Any) -> ImageBackbone:
    start = {"name": "bit_tiny", "image_size": SIZE} | ({} if "sha256" in settings else {"fine_tune": "all"})
    return ImageBackbone(parse(ImageBackbone.Config, start | settings), seed)


def encode(submodel: ImageBackbone) -> np.ndarray:
    return np.asarray(submodel.encoder()(IMAGES, training=False))


# ---- by hand -------------------------------------------------------------------------------------------------


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """Weight-standardised, padded with half the kernel's size on each side; one place and one filter at a time."""
    size, filters = kernel.shape[0], kernel.shape[-1]
    flat = kernel.reshape(-1, filters).astype(np.float64)
    flat = (flat - flat.mean(axis=0)) / np.sqrt(flat.var(axis=0) + 1e-10)
    padded = np.pad(x, [(0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)])
    made = (x.shape[1] + 2 * (size // 2) - size) // stride + 1
    result = np.zeros((len(x), made, made, filters))
    for row in range(made):
        for column in range(made):
            top, left = row * stride, column * stride
            result[:, row, column] = padded[:, top : top + size, left : left + size].reshape(len(x), -1) @ flat
    return result


def active(x: np.ndarray, arrays: dict[str, np.ndarray], place: str) -> np.ndarray:
    """Group normalisation and ReLU, a group of an image at a time."""
    result, width = np.zeros_like(x), x.shape[-1] // GROUPS
    for image in range(len(x)):
        for start in range(0, x.shape[-1], width):
            group = x[image, :, :, start : start + width]
            result[image, :, :, start : start + width] = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
    gamma, beta = (arrays[f"{place}/group_norm/{name}"] for name in ("gamma", "beta"))
    return np.maximum(result * gamma + beta, 0)


def by_hand(images: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The embedding, from pixels between -1 and 1."""

    def kernel(place: str) -> np.ndarray:
        return arrays[f"{place}/standardized_conv2d/kernel"]

    x = convolve(images / 127.5 - 1, kernel("resnet/root_block"), 2)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])  # with zeros, which are above what is negative
    made = x.shape[1] // 2
    x = np.stack(
        [
            np.stack([padded[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].max(axis=(1, 2)) for c in range(made)], axis=1)
            for r in range(made)
        ],
        axis=1,
    )
    for block, stride in ((1, 1), (2, 2)):
        unit = f"resnet/block{block}/unit01"
        y = active(x, arrays, f"{unit}/a")
        shortcut = convolve(y[:, ::stride, ::stride], kernel(f"{unit}/a/proj"))
        y = active(convolve(y, kernel(f"{unit}/a")), arrays, f"{unit}/b")
        y = active(convolve(y, kernel(f"{unit}/b"), stride), arrays, f"{unit}/c")
        x = convolve(y, kernel(f"{unit}/c")) + shortcut
    return active(x, arrays, "resnet").mean(axis=(1, 2))


def test_published_weights_give_the_numbers_worked_by_hand(weights: dict[str, str]) -> None:
    """D16m, E1: an .npz in the published names, against a slow network in NumPy of its own."""
    ours, expected = backbone(**weights), by_hand(IMAGES.astype(np.float64), published())
    assert ours.frozen and ours.dimensions == 512 and np.ptp(expected) > 0.1
    np.testing.assert_allclose(encode(ours), expected, atol=1e-4 * expected.max())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_those_published(name: str) -> None:
    """D16m: every network of the table, drawn without being built; blocks are the root and the units."""
    drawn = drawing(name, 224)
    count = sum(int(np.prod(shape)) for layer in drawn for _, shape in layer.weights)
    exact, millions = PUBLISHED[name]
    assert count + (2048 * FAMILIES[name].width + 1) * 1000 == exact
    assert round(exact / 1e6, 2) == millions
    names = [FAMILIES[name].key(layer.name, weight) for layer in drawn for weight, _ in layer.weights]
    assert {"resnet/root_block/standardized_conv2d/kernel", "resnet/group_norm/beta"} <= set(names)
    assert "resnet/block4/unit01/a/proj/standardized_conv2d/kernel" in names
    assert len(set(names)) == len(names)


# ---- files ---------------------------------------------------------------------------------------------------


def test_a_file_is_checked_before_it_is_used(weights: dict[str, str], tmp_path: Path) -> None:
    """E1: another file, one without an array, and one of another shape, by the published name."""
    with pytest.raises(GateError, match=f"must have SHA-256 {'0' * 64}; it has {weights['sha256']}"):
        backbone(weights=weights["weights"], sha256="0" * 64).encoder()
    name = "resnet/block2/unit01/a/proj/standardized_conv2d/kernel"
    for change, found in (({}, "no such array"), ({name: np.zeros((1, 1, 256, 500), np.float32)}, r"\[1, 1, 256, 500")):
        arrays = {key: array for key, array in published().items() if key != name} | change
        save_arrays(tmp_path / "other.npz", arrays)
        other = {"weights": str(tmp_path / "other.npz"), "sha256": sha256_of(tmp_path / "other.npz")}
        with pytest.raises(DataError, match=rf"must hold {name} of shape \[1, 1, 256, 512\]; it has {found}"):
            backbone(**other).encoder()


def test_written_weights_are_in_the_published_names(weights: dict[str, str], tmp_path: Path) -> None:
    """D16m: what was trained here is read by whoever reads the published files."""
    write_weights("bit_tiny", backbone(**weights).encoder(), tmp_path / "again.npz")
    again, given = load_arrays(tmp_path / "again.npz"), published()
    assert set(again) == {name for name in given if "/head/" not in name}
    for name, array in again.items():
        np.testing.assert_array_equal(array, given[name])


# ---- training ------------------------------------------------------------------------------------------------


def test_gradients_go_through_the_standardisation() -> None:
    """D16m: the loss does not change with mean and scale of a filter, so its gradient has no part along them."""
    layer = StandardizedConv2D(4, 3, use_bias=False)
    x = tf.random.stateless_normal([2, 6, 6, 5], seed=(1, 2))
    y = layer(x)
    kernel = layer.kernel.numpy()
    layer.kernel.assign(3 * kernel + np.arange(4))
    np.testing.assert_allclose(layer(x), y, atol=1e-4)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x) ** 3)
    gradient = tf.convert_to_tensor(tape.gradient(loss, layer.kernel)).numpy().reshape(-1, 4)
    flat = layer.kernel.numpy().reshape(-1, 4)
    assert np.abs(gradient).max() > 1
    np.testing.assert_allclose(gradient.sum(axis=0), 0, atol=1e-3 * np.abs(gradient).max())
    np.testing.assert_allclose(
        (gradient * (flat - flat.mean(axis=0))).sum(axis=0), 0, atol=1e-3 * np.abs(gradient).max()
    )


def test_it_learns_and_only_where_it_may(weights: dict[str, str], tmp_path: Path) -> None:
    """D16m, E2: the last block of published weights is fine-tuned, the others stay; the classes are told apart."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 32)
    images = random.integers(0, 200, (32, SIZE, SIZE, 3)).astype(np.uint8)
    images[labels == 1, :, ::4] += 50  # stripes
    submodel = backbone(fine_tune=1, **weights)
    assert [[layer.name for layer in block][:1] for block in submodel.blocks()] == [
        ["root_block_standardized_conv2d"],
        ["block1_unit01_a_group_norm"],
        ["block2_unit01_a_group_norm"],
    ]
    before = {layer.name: layer.get_weights() for layer in submodel.encoder().layers}
    settings = parse(ClassifierTraining, {"epochs": 6, "batch_size": 16, "learning_rate": 0.003})
    options = RunOptions(1, tmp_path, quiet=True)
    data = Examples(images, labels)
    fitted = train_classifier(submodel, data, None, 2, HeadSettings(), settings, options, tmp_path)
    moved = {
        layer.name
        for layer in submodel.encoder().layers
        if any((old != new).any() for old, new in zip(before[layer.name], layer.get_weights(), strict=True))
    }
    assert moved == {layer.name for layer in submodel.blocks()[-1]}
    assert (fitted.model(images)["logits"].numpy().argmax(axis=1) == labels).mean() > 0.9


def test_mixed_precision_keeps_statistics_in_float32() -> None:
    """I7: 16 bits in the products alone; a fresh copy outside the scope gives about the same."""
    with precision_scope("mixed_bfloat16"):
        low = backbone()
        low.encoder()
    kinds = {type(layer): layer.compute_dtype for layer in low.encoder().layers}
    assert kinds[StandardizedConv2D] == "bfloat16" and kinds[GroupNormalization] == "float32"
    assert {variable.dtype for variable in low.encoder().variables} == {tf.float32}
    plain = encode(backbone())
    np.testing.assert_allclose(encode(low), plain, atol=0.06 * plain.max())
    assert not np.array_equal(encode(low), plain)


# ---- what is served ------------------------------------------------------------------------------------------


def test_exported_it_is_plain_convolutions(weights: dict[str, str], tmp_path: Path) -> None:
    """D16m: stock operations; the converter folds the standardisation, and any number of rows is answered."""
    submodel = backbone(**weights)
    encoder, expected = submodel.encoder(), encode(submodel)
    module = tf.Module()
    module.kept = encoder.variables
    module.embed = tf.function(
        lambda image: {"embedding": encoder(image, training=False)},
        input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.uint8, "image")],
    )
    path = tmp_path / "encoder.tflite"
    path.write_bytes(tflite.convert({"embed": module.embed}, module))
    for rows in (1, 3):
        answers = tflite.run(path, {"image": IMAGES[:rows]}, "embed")["embedding"]
        np.testing.assert_allclose(answers, expected[:rows], atol=1e-5 * expected.max())
    assert path.stat().st_size < 1.05 * 4 * encoder.count_params(), "kernels once, not as they were as well"
    savedmodel.save(module, tmp_path / "saved", {"embed": module.embed})
    loaded = tf.saved_model.load(str(tmp_path / "saved")).signatures["embed"](image=tf.constant(IMAGES))["embedding"]
    np.testing.assert_allclose(loaded, expected, atol=1e-5 * expected.max())


def test_a_served_ensemble_standardises_nothing(weights: dict[str, str]) -> None:
    """D16m: the folded network is one of stock convolutions with the same answers; what has none is left as it is."""
    submodel = backbone(**weights)
    encoder = submodel.encoder()
    plain = folded(encoder)
    kinds = Counter(type(layer) for layer in plain.layers)
    assert kinds[keras.layers.Conv2D] == 9 and StandardizedConv2D not in kinds
    np.testing.assert_allclose(plain(IMAGES), encode(submodel), atol=1e-5)
    kernel = plain.get_layer("block1_unit01_b_standardized_conv2d").get_weights()[0]
    np.testing.assert_allclose(kernel.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(kernel.std(axis=(0, 1, 2)), 1, atol=1e-4)
    assert folded(plain) is plain


@pytest.mark.slow
@pytest.mark.usefixtures("short_clocks")
def test_zeros_of_pruning_stay_zeros(weights: dict[str, str], tmp_path: Path) -> None:
    """Of a kernel that is standardised afterwards none would: recipes work on what is served."""
    submodel = backbone(layers=["block1"], **weights)
    outputs = classifier(submodel.encoder(), head(256, 2, HeadSettings()))
    model = keras.Model(outputs.input, outputs.output["logits"])
    features, target = {"image": IMAGES}, model(IMAGES).numpy()
    data = CompressionData(
        rows=as_rows({**features, "target": target}),
        loss=lambda output, batch: tf.reduce_mean(tf.square(output - batch["target"]), axis=1),
        representative=features,
        judge=lambda answer: np.square(answer(features) - target).mean(axis=1),
        metric="squared_distance",
        higher_is_better=False,
        options=RunOptions(3, tmp_path, quiet=True),
    )
    part = parse_part(METHODS, {"kind": "prune", "sparsity": 0.5, "schedule": "constant", "training": None}, "prune")
    outcome = compress(model, [part], data)
    kernel = outcome.compressed.model.get_layer("block1_unit01_b_standardized_conv2d").get_weights()[0]
    assert (kernel == 0).mean() == pytest.approx(0.5, abs=0.01)
    assert (np.asarray(standardized(tf.constant(kernel))) == 0).mean() < 0.01
