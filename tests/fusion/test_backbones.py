"""Image networks by name: the same numbers as Keras' own, weights of files, layers side by side, views averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.config import parse
from fusion.errors import ConfigError, DataError, GateError
from fusion.explain import region_shares
from fusion.export import savedmodel, tflite
from fusion.files import save_arrays, sha256_of
from fusion.submodels.backbone_families import CAFFE_MEAN, FAMILIES, drawing
from fusion.submodels.base import has_trunk
from fusion.submodels.image_backbone import ImageBackbone, write_weights
from fusion.submodels.image_cnn import ImageCnn
from fusion.submodels.image_efficientnet import ImageEfficientNet

SIZE = 64
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)

PUBLISHED = {
    "alexnet": 61_100_840,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "resnet50": 25_636_712,
    "resnet101": 44_707_176,
    "resnet152": 60_419_944,
    "resnet50_v2": 25_613_800,
    "resnet101_v2": 44_675_560,
    "resnet152_v2": 60_380_648,
    "inception_v3": 23_851_784,
    "xception": 22_910_480,
    "densenet121": 8_062_504,
    "densenet169": 14_307_880,
    "densenet201": 20_242_984,
    "mobilenet": 4_253_864,
    "mobilenet_v2": 3_538_984,
    "mobilenet_v3_small": 2_554_968,
    "mobilenet_v3_large": 5_507_432,
    "efficientnet_b0": 5_330_571,
    "efficientnet_b1": 7_856_239,
    "efficientnet_b2": 9_177_569,
    "efficientnet_b3": 12_320_535,
    "efficientnet_b4": 19_466_823,
    "efficientnet_b5": 30_562_527,
    "efficientnet_b6": 43_265_143,
    "efficientnet_b7": 66_658_687,
    "efficientnet_v2_b0": 7_200_312,
    "efficientnet_v2_b1": 8_212_124,
    "efficientnet_v2_b2": 10_178_374,
    "efficientnet_v2_b3": 14_467_622,
    "nasnet_mobile": 5_326_716,
    "bit_r50x1": 25_549_352,
    "bit_r50x3": 217_319_080,
    "bit_r101x1": 44_541_480,
    "bit_r101x3": 387_934_888,
    "bit_r152x2": 236_335_208,
}
"""Parameters with 1000 classes: tf_keras' documentation, and torchvision's for AlexNet; Big Transfer: see
test_big_transfer.py."""

ONE_OF_EACH = [
    "vgg16",
    "resnet50",
    "resnet50_v2",
    "inception_v3",
    "xception",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_v2_b0",
    "nasnet_mobile",
]


def backbone(seed: int = 3, **settings: Any) -> ImageBackbone:
    start = {"name": "alexnet", "image_size": SIZE} | ({} if "sha256" in settings else {"fine_tune": "all"})
    return ImageBackbone(parse(ImageBackbone.Config, start | settings), seed)


def encode(submodel: Any, images: np.ndarray = IMAGES) -> np.ndarray:
    return np.asarray(submodel.encoder()(submodel.prepare(images), training=False))


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings of a file of weights."""
    path = tmp_path_factory.mktemp("alexnet") / "weights.npz"
    return {"weights": str(path), "sha256": write_weights("alexnet", backbone(seed=1).encoder(), path)}


def keras_model(name: str, size: int) -> keras.Model:
    """The network out of Keras with random weights, BatchNormalization's among them."""
    family, random = FAMILIES[name], np.random.default_rng(0)
    build = getattr(keras.applications, family.application)
    model = build(include_top=False, weights=None, input_shape=(size, size, 3), pooling="avg", **family.options)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, weight.shape) for weight in layer.weights])
    return model


def check_equals_keras(name: str, size: int, folder: Path) -> ImageBackbone:
    """Weights written out of Keras' network and read into ours give Keras' numbers, with its own scaling of pixels."""
    model = keras_model(name, size)
    sha256 = write_weights(name, model, folder / "weights.npz")
    ours = backbone(name=name, image_size=size, weights=str(folder / "weights.npz"), sha256=sha256)
    images = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), np.uint8)
    scaled = keras.applications.imagenet_utils.preprocess_input(
        images.astype(np.float32), mode=FAMILIES[name].scaling
    ) * (255.0 if any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers[:2]) else 1.0)
    expected = model(scaled, training=False).numpy()
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(encode(ours, images), expected, atol=1e-4 * np.abs(expected).max())
    return ours


# ---- networks ------------------------------------------------------------------------------------------------


def test_a_network_gives_the_numbers_of_keras_own(tmp_path: Path) -> None:
    """D16m, E1: weights by name out of a local file; its norms are never trained."""
    ours = check_equals_keras("mobilenet", 32, tmp_path)
    assert ours.frozen and ours.dimensions == 1024
    blocks = ours.blocks()
    assert len(blocks) == 14  # the first convolution, then 13 separable ones
    assert [[layer.name for layer in block] for block in blocks[:2]] == [["conv1"], ["conv_dw_1", "conv_pw_1"]]


def test_networks_of_caffe_read_blue_green_red(tmp_path: Path) -> None:
    """The published kernels of VGG and ResNet expect the channels so; only the first block is in this file."""
    random = np.random.default_rng(0)
    kernels = [random.normal(0, 0.1, shape).astype(np.float32) for shape in ((3, 3, 3, 64), (3, 3, 64, 64))]
    arrays = {}
    for number, kernel in enumerate(kernels, start=1):
        arrays |= {f"block1_conv{number}/kernel": kernel, f"block1_conv{number}/bias": np.full(64, 0.1, np.float32)}
    save_arrays(tmp_path / "vgg.npz", arrays)
    settings = {"weights": str(tmp_path / "vgg.npz"), "sha256": sha256_of(tmp_path / "vgg.npz"), "layers": ["block1"]}
    x = (IMAGES.astype(np.float32) - np.array(CAFFE_MEAN, np.float32))[..., ::-1]
    for kernel in kernels:
        x = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME") + 0.1)
    expected = tf.nn.max_pool2d(x, 2, 2, "VALID").numpy().mean(axis=(1, 2))
    np.testing.assert_allclose(encode(backbone(name="vgg16", **settings)), expected, rtol=1e-3)


def test_random_weights_follow_the_seed_and_nothing_else() -> None:
    """F1: each layer has a seed of its own, and what was built before does not matter."""
    first = backbone().encoder()
    keras.layers.Conv2D(3, 3)(keras.Input((8, 8, 3)))
    drawing.cache_clear()
    for ours, again in zip(first.get_weights(), backbone().encoder().get_weights(), strict=True):
        np.testing.assert_array_equal(ours, again)
    other = backbone(seed=4).encoder().get_weights()
    assert not np.array_equal(first.get_weights()[0], other[0])
    kernels = [first.get_layer(f"block{number}_conv").get_weights()[0] for number in (4, 5)]
    assert abs(np.corrcoef(kernels[0][:, :, :256].ravel(), kernels[1].ravel())[0, 1]) < 0.01


def test_parameters_of_alexnet_are_those_published() -> None:
    top = 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert backbone().encoder().count_params() + top == PUBLISHED["alexnet"]
    assert [len(block) for block in backbone().blocks()] == [1] * 5


def top_parameters(name: str, dimensions: int) -> int:
    """Of the layers that make 1000 classes, with those of Normalization, which our scaling stands for."""
    if name.startswith("vgg"):
        return 7 * 7 * 512 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    if name.startswith("mobilenet_v3"):
        hidden = 1024 if name.endswith("small") else 1280
        return (dimensions + 1) * hidden + (hidden + 1) * 1000
    return (dimensions + 1) * 1000 + 7 * name.startswith("efficientnet_b")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"alexnet"}))
def test_parameters_are_those_published(name: str) -> None:
    """D16m: every network of the table."""
    parameters = sum(int(np.prod(shape)) for drawn in drawing(name, 96) for _, shape in drawn.weights)
    parameters -= 7 * name.startswith("efficientnet_b")
    last = next(drawn.weights[0][1][-1] for drawn in reversed(drawing(name, 96)) if drawn.weights)
    dimensions = {"inception_v3": 2048, "nasnet_mobile": 1056}.get(name, last)  # these end side by side
    assert parameters + top_parameters(name, dimensions) == PUBLISHED[name]


def test_every_network_has_its_published_figure() -> None:
    assert set(PUBLISHED) == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_network_of_each_kind_gives_the_numbers_of_keras_own(name: str, tmp_path: Path) -> None:
    """D16m: flat, cut into blocks, named alike whatever was built before, and convertible."""
    size = 96
    ours = check_equals_keras(name, size, tmp_path)
    encoder = ours.encoder()
    assert not any("OpLambda" in type(layer).__name__ for layer in encoder.layers)
    assert sum(map(len, ours.blocks())) == sum(
        bool(layer.weights) and not isinstance(layer, keras.layers.BatchNormalization) for layer in encoder.layers
    )
    assert {"vgg16": 5, "resnet50": 17, "inception_v3": 11, "densenet121": 5}.get(name, 12) <= len(ours.blocks())
    names = [drawn.name for drawn in drawing(name, size)]
    drawing.cache_clear()
    assert [drawn.name for drawn in drawing(name, size)][1:] == names[1:]
    check_exports(ours, np.random.default_rng(1).integers(0, 256, (2, size, size, 3), np.uint8), tmp_path)


# ---- settings and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet5"}, r"name: did you mean 'resnet50'\? There is no backbone 'resnet5'\."),
        ({"weights": "imagenet"}, "none or an .npz file; received 'imagenet'"),
        ({"weights": "resnet50.h5", "sha256": "0" * 64}, "received 'resnet50.h5'. Convert the model"),
        ({"weights": "resnet50.npz"}, "every such file needs it"),
        ({"sha256": "0" * 64, "fine_tune": "all"}, "sha256 belongs to a file of weights"),
        ({"fine_tune": 1}, "needs fine_tune: all"),
        ({"name": "inception_v3", "image_size": 64}, "inception_v3 reads images of 75 pixels or more"),
        ({"beside": [{"name": "vgg1"}]}, "beside.0.name: did you mean 'vgg1"),
        ({"views": {"zooms": [1.5]}}, "less than 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone(**settings)


def test_a_file_is_checked_before_it_is_read(alexnet: dict[str, str], tmp_path: Path) -> None:
    """E1: a file that is missing, another one, or another network's is answered in one sentence."""
    with pytest.raises(DataError, match=r"must be a file; .*nowhere.npz is not there"):
        backbone(weights=str(tmp_path / "nowhere.npz"), sha256="0" * 64).encoder()
    with pytest.raises(GateError, match=f"must have SHA-256 {'0' * 64}; it has {alexnet['sha256']}"):
        backbone(weights=alexnet["weights"], sha256="0" * 64).encoder()
    save_arrays(tmp_path / "other.npz", {"block1_conv/kernel": np.zeros((3, 3, 3, 64), np.float32)})
    other = {"weights": str(tmp_path / "other.npz"), "sha256": sha256_of(tmp_path / "other.npz")}
    message = r"must hold block1_conv/kernel of shape \[11, 11, 3, 64\]; it has \[3, 3, 3, 64\]"
    with pytest.raises(DataError, match=message):
        backbone(**other).encoder()


def test_another_network_is_not_written(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Conv2D(2, 3, input_shape=(8, 8, 3))])
    message = (
        r"alexnet without its classes, which has \[\[11, 11, 3, 64\], \[64\]\].*received \[\[3, 3, 3, 2\], \[2\]\]"
    )
    with pytest.raises(DataError, match=message):
        write_weights("alexnet", model, tmp_path / "weights.npz")
    assert not (tmp_path / "weights.npz").exists()


# ---- layers and networks side by side ------------------------------------------------------------------------


def test_named_layers_are_averaged_and_laid_side_by_side(alexnet: dict[str, str]) -> None:
    """E5: feature concatenation; the beginning of names stands for the last layer of a block."""
    several = backbone(layers=["block2_conv", "block3", "block5"], **alexnet)
    assert several.dimensions == 192 + 384 + 256
    whole = backbone(**alexnet).encoder()
    maps = [whole.get_layer(name).output for name in ("block2_conv", "block3_relu", "block5_pool")]
    by_hand = [m.numpy().mean(axis=(1, 2)) for m in keras.Model(whole.input, maps)(IMAGES)]
    np.testing.assert_allclose(encode(several), np.concatenate(by_hand, axis=1), atol=1e-5)
    cut = backbone(layers=["block2"], **alexnet)
    assert cut.dimensions == 192 and len(cut.blocks()) == 2  # what lies above is not there


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["blok3"], "no layer 'blok3' with a map of features: did you mean 'block3'"),
        (["block5", "block5_pool"], "must name each layer once"),
    ],
)
def test_unknown_layers_are_refused(layers: list[str], message: str, alexnet: dict[str, str]) -> None:
    """E5: by the nearest name."""
    with pytest.raises(ConfigError, match=message):
        backbone(layers=layers, **alexnet).encoder()


def test_networks_side_by_side_are_each_alone(alexnet: dict[str, str], tmp_path: Path) -> None:
    """E5: several networks over one image; the last blocks of all are trained together."""
    second = write_weights("alexnet", backbone(seed=9).encoder(), tmp_path / "second.npz")
    other = {"weights": str(tmp_path / "second.npz"), "sha256": second, "layers": ["block1"]}
    both = backbone(beside=[{"name": "alexnet", **other}], fine_tune=1, **alexnet)
    alone = [encode(backbone(**alexnet)), encode(backbone(**other))]
    np.testing.assert_allclose(encode(both), np.concatenate(alone, axis=1), atol=1e-5)
    assert [layer.name for layer in both.unfreeze()] == ["block5_conv", "beside1_block1_conv"]
    assert [len(block) for block in both.blocks()] == [1, 1, 1, 1, 2]
    assert has_trunk(both)
    trunk = both.trunk()({"image": IMAGES}, training=False)
    np.testing.assert_allclose(both.top()(trunk, training=False), encode(both), atol=1e-5)


# ---- views ---------------------------------------------------------------------------------------------------

VIEWS = {"flip": True, "zooms": [0.5]}


def views_by_hand(images: np.ndarray) -> list[np.ndarray]:
    """The whole image and its middle at twice the size (between pixels, by the mean), each mirrored too."""
    quarter = images.shape[1] // 4
    middle = images[:, quarter:-quarter, quarter:-quarter].astype(np.float64)
    places = (np.arange(images.shape[1]) + 0.5) / 2 - 0.5
    low, share = np.floor(places).astype(int), places - np.floor(places)
    last = middle.shape[1] - 1
    for axis in (1, 2):
        before, after = (np.take(middle, np.clip(low + step, 0, last), axis) for step in (0, 1))
        weight = share.reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        middle = before * (1 - weight) + after * weight
    views = [images.astype(np.float64), middle]
    return views + [view[:, :, ::-1] for view in views]


def mean_over_views(submodel: Any, layers: list[str]) -> np.ndarray:
    """What maps or vectors of some layers of an encoder without views average to, over places and views."""
    encoder = submodel.encoder()
    rescaling = encoder.get_layer("rescaling")
    network = keras.Model(rescaling.output, [encoder.get_layer(name).output for name in layers])
    each = [tf.nest.flatten(network(rescaling(view.astype(np.float32)))) for view in views_by_hand(IMAGES)]
    pooled = [[x.numpy().mean(axis=(1, 2)) if len(x.shape) == 4 else x.numpy() for x in view] for view in each]
    return np.mean([np.concatenate(view, axis=1) for view in pooled], axis=0)


def test_the_embedding_is_the_mean_over_views(alexnet: dict[str, str]) -> None:
    """D12m: mirrored and enlarged views, averaged in the graph; training sees the whole image alone."""
    plain, averaged = backbone(**alexnet), backbone(views=VIEWS, **alexnet)
    expected = mean_over_views(plain, ["embedding"])
    np.testing.assert_allclose(averaged.encoder()(IMAGES, training=False), expected, atol=1e-4 * expected.max())
    whole = plain.encoder()(IMAGES, training=False)
    assert np.abs(whole - expected).max() > 0.01 * expected.max()
    np.testing.assert_allclose(averaged.encoder()(IMAGES, training=True), whole, atol=1e-5)
    assert plain.by_row and not averaged.by_row


def test_views_of_a_network_from_scratch() -> None:
    """D12m: the weights are the same with and without views."""
    settings = {"image_size": SIZE, "widths": [4, 8], "dropout": 0}
    plain, averaged = (ImageCnn(parse(ImageCnn.Config, settings | more), 3) for more in ({}, {"views": VIEWS}))
    expected = mean_over_views(plain, ["embedding"])
    np.testing.assert_allclose(averaged.encoder()(IMAGES, training=False), expected, atol=1e-4 * expected.max())


def test_layers_and_views_of_efficientnet() -> None:
    """D12m, E5: with ImageNet's weights."""
    settings = {"image_size": SIZE, "layers": ["block4", "head"], "views": VIEWS}
    plain = ImageEfficientNet(parse(ImageEfficientNet.Config, {"image_size": SIZE}), 0)
    chosen = ImageEfficientNet(parse(ImageEfficientNet.Config, settings), 0)
    expected = mean_over_views(plain, ["block4_add", "embedding"])
    assert chosen.dimensions == 40 + 1280 and len(chosen.blocks()) == 18 and not chosen.by_row
    np.testing.assert_allclose(chosen.encoder()(IMAGES, training=False), expected, atol=1e-4 * np.abs(expected).max())


def test_layers_and_views_are_exported(alexnet: dict[str, str], tmp_path: Path) -> None:
    """D12m, E5: built-in operations are enough; the encoder is a clone of its settings; regions are explained."""
    submodel = backbone(layers=["block2", "block5"], views=VIEWS, **alexnet)
    check_exports(submodel, IMAGES, tmp_path)
    clone = keras.models.clone_model(submodel.encoder())
    clone.set_weights(submodel.encoder().get_weights())
    np.testing.assert_array_equal(clone(IMAGES, training=False), submodel.encoder()(IMAGES, training=False))
    heat = region_shares(submodel, IMAGES[0], lambda embeddings: embeddings[:, -1])
    assert heat.shape == (SIZE, SIZE) and heat.min() >= 0 and heat.max() == pytest.approx(1.0, abs=1e-3)


def check_exports(submodel: ImageBackbone, images: np.ndarray, folder: Path) -> None:
    """SavedModel and TFLite give the encoder's numbers."""
    encoder = submodel.encoder()
    module = tf.Module()
    module.encoder = encoder
    module.embed = tf.function(
        lambda image: {"embedding": encoder(image, training=False)},
        input_signature=[tf.TensorSpec([None, *images.shape[1:]], tf.uint8, "image")],
    )
    expected = encode(submodel, images)
    (folder / "encoder.tflite").write_bytes(tflite.convert({"embed": module.embed}, module))
    answers = tflite.run(folder / "encoder.tflite", {"image": images}, "embed")["embedding"]
    np.testing.assert_allclose(answers, expected, atol=1e-4 * np.abs(expected).max())
    savedmodel.save(module, folder / "saved", {"embed": module.embed})
    loaded = tf.saved_model.load(str(folder / "saved")).signatures["embed"](image=tf.constant(images))["embedding"]
    np.testing.assert_allclose(loaded, expected, atol=1e-5 * np.abs(expected).max())
