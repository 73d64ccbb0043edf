"""Images: EfficientNet-Lite0 with real weights, the network from scratch, the head, and the reader of .pth files."""

from __future__ import annotations

import collections
import hashlib
import pickle
import struct
import sys

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from fusion.compat import keras, tf
from fusion.config import parse
from fusion.errors import ConfigError, DataError, GateError
from fusion.images import load_images
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.image_cnn import ImageCnn
from fusion.submodels.image_efficientnet import ImageEfficientNet, imagenet_classifier
from fusion.submodels.torch_weights import MAGIC_NUMBER, PROTOCOL_VERSION, read_tensors

PALACE, DAISY = 698, 985  # rows of ImageNet's list of classes


def efficientnet(seed=0, **settings):
    return ImageEfficientNet(parse(ImageEfficientNet.Config, {"image_size": 32, **settings}), seed)


def cnn(seed=0, **settings):
    return ImageCnn(parse(ImageCnn.Config, settings), seed)


def random_images(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


# ---- EfficientNet-Lite0


def test_photographs_are_named_rightly_and_features_are_the_encoders():
    """E1: the Forbidden City is a palace, the flower a daisy, and the encoder gives the classifier's features."""
    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    images, ok, _ = load_images(photographs, 224)
    assert ok.all()
    model = imagenet_classifier(224)
    probabilities = tf.nn.softmax(model(images, training=False)).numpy()
    assert probabilities.argmax(1).tolist() == [PALACE, DAISY]
    assert probabilities[[0, 1], [PALACE, DAISY]].min() > 0.15
    features = keras.Model(model.input, model.get_layer("embedding").output)(images, training=False)
    encoder = efficientnet(image_size=224)
    assert encoder.dimensions == 1280
    np.testing.assert_allclose(encoder.encode(encoder.prepare(images)), features, atol=1e-4)


def test_fine_tuning_counts_18_blocks_and_leaves_norms_alone():
    """E3, F3: pretrained BatchNormalization is never trained."""
    tuned = efficientnet(fine_tune=2)
    assert {layer.name.partition("_")[0] for layer in tuned.unfreeze()} == {"block15", "head"}
    every = efficientnet(fine_tune="all").unfreeze()
    assert len({layer.name.partition("_")[0] for layer in every}) == 18
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in every)


def test_a_frozen_norm_is_in_inference_mode_in_training_too():
    """E2: training=True changes neither the output nor the moving statistics of a frozen encoder."""
    submodel = efficientnet()
    features = submodel.prepare(random_images(3, 32))
    before = submodel.fingerprint()
    training = submodel.encoder()(features, training=True)
    np.testing.assert_allclose(training, submodel.encode(features), atol=1e-5)
    assert submodel.fingerprint() == before


def test_random_weights_follow_the_seed_and_are_all_trained():
    """F1: each layer has a seed of its own."""
    first, second = (efficientnet(seed=seed, weights="none", fine_tune="all") for seed in (1, 2))
    assert first.fingerprint() != second.fingerprint()
    assert not first.frozen
    assert any(isinstance(layer, keras.layers.BatchNormalization) for layer in first.unfreeze())
    kernels = [first.encoder().get_layer(f"block{n}_depthwise_conv").get_weights()[0] for n in (6, 7)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 100}, {"image_size": 416}, {"weights": "none"}, {"fine_tune": "some"}, {"weights": "else"}],
)
def test_efficientnet_settings_are_checked(settings):
    with pytest.raises(ConfigError):
        parse(ImageEfficientNet.Config, settings)


@pytest.mark.parametrize(
    "values", [random_images(2, 64), random_images(2, 32)[:, :, :, 0], random_images(2, 32) / 255.0]
)
def test_images_of_another_shape_or_dtype_are_refused(values):
    with pytest.raises(DataError, match=r"must be a uint8 array \[N, 32, 32, 3\]"):
        efficientnet().prepare(values)


# ---- the network from scratch, and the head


def test_cnn_learns_what_only_its_filters_can_see():
    """Horizontal against vertical stripes of random colours: the mean colour tells nothing."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 160)
    pattern = np.tile((np.arange(16) // 2 % 2)[:, None], (1, 16))
    stripes = np.where(labels[:, None, None], pattern, pattern.T)[..., None]
    images = (stripes * random.integers(100, 256, (160, 1, 1, 3)) + random.integers(0, 40, (160, 16, 16, 3))).clip(
        0, 255
    )
    submodel = cnn(image_size=16, widths=[8, 8], dropout=0.1)
    features = submodel.prepare(images.astype(np.uint8))
    model = classifier(submodel.encoder(), head(submodel.dimensions, 2, HeadSettings()))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss={"logits": loss})
    train, test = slice(0, 120), slice(120, 160)
    model.fit(features["image"][train], {"logits": labels[train]}, epochs=8, batch_size=20, shuffle=False, verbose=0)
    answers = model(features["image"][test], training=False)["logits"].numpy().argmax(1)
    assert (answers == labels[test]).mean() >= 0.95


def test_cnn_blocks_are_convolution_norm_activation():
    names = [type(layer).__name__ for layer in cnn(widths=[4, 8]).encoder().layers]
    block = ["Conv2D", "BatchNormalization", "ReLU", "SpatialDropout2D"]
    assert names == ["InputLayer", "Rescaling", *block, "MaxPooling2D", *block, "GlobalAveragePooling2D"]


def test_cnn_too_deep_for_its_images_is_refused():
    with pytest.raises(ConfigError, match="halves the image"):
        parse(ImageCnn.Config, {"image_size": 8, "widths": [4, 4, 4, 4]})


def test_head_has_the_layers_of_its_settings_and_follows_its_seed():
    """F2: dropout is silent at inference."""
    settings = HeadSettings(hidden=(7,), dropout=0.5)
    model = head(5, 3, settings, seed=1)
    x = np.ones((2, 5), np.float32)
    assert model.output_shape == (None, 3)
    assert [type(layer).__name__ for layer in model.layers[1:]] == ["Dropout", "Dense", "ReLU", "Dropout", "Dense"]
    np.testing.assert_array_equal(model(x), model(x))
    np.testing.assert_array_equal(model(x), head(5, 3, settings, seed=1)(x))
    assert np.abs(model(x) - head(5, 3, settings, seed=2)(x)).max() > 1e-3


# ---- .pth files


class Persistent(pickle.Pickler):
    """Writes storages as PyTorch does: by reference."""

    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


class Storage:
    def __init__(self, key, elements):
        self.pid = ("storage", FloatStorage, key, "cpu", elements, None)


class FloatStorage:
    __module__ = "torch"
    __qualname__ = "FloatStorage"


def _rebuild_tensor_v2(*arguments):
    raise AssertionError("only its name is pickled")


_rebuild_tensor_v2.__module__ = "torch._utils"


class Tensor:
    def __init__(self, storage, offset, shape, strides):
        self.arguments = storage, offset, shape, strides, False, collections.OrderedDict()

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


class Attack:
    """What every guide to malicious pickles begins with."""

    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/pth-attack-ran",)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a legacy PyTorch file of these parts; returns its path and SHA-256."""
    # pickle looks the names up before it writes them
    for name, attributes in {"torch": {"FloatStorage": FloatStorage}, "torch._utils": {}}.items():
        module = type(sys)(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2

    def write_file(state, data=(), header=(MAGIC_NUMBER, PROTOCOL_VERSION), sizes=None):
        path = tmp_path / "model.pth"
        with path.open("wb") as file:
            for part in (*header, sizes or {"little_endian": True}):
                pickle.dump(part, file, 2)
            Persistent(file, 2).dump(state)
            pickle.dump([str(number) for number in range(len(data))], file, 2)
            for array in data:
                file.write(struct.pack("<q", len(array)) + array.tobytes())
        return path, hashlib.sha256(path.read_bytes()).hexdigest()

    return write_file


NUMBERS = np.arange(6, dtype="<f4")


def test_tensors_are_read_with_offsets_and_permuted_axes(write):
    """A kernel that was transposed before saving keeps its strides in the file; the published weights do."""
    storage = Storage("0", 6)
    state = collections.OrderedDict(
        plain=Tensor(storage, 0, (2, 3), (3, 1)),
        transposed=Tensor(storage, 0, (3, 2), (1, 3)),
        part=Tensor(storage, 4, (2,), (1,)),
        scalar=Tensor(storage, 5, (), ()),
    )
    state._metadata = {"version": 1}
    tensors = read_tensors(*write(state, [NUMBERS]))
    np.testing.assert_array_equal(tensors["plain"], NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(tensors["transposed"], NUMBERS.reshape(2, 3).T)
    np.testing.assert_array_equal(tensors["part"], [4, 5])
    assert tensors["scalar"] == 5


@pytest.mark.parametrize("place", ["state", "header", "sizes"])
def test_a_malicious_pickle_is_refused_and_not_run(write, place):
    """Anything but tensors is refused by name, wherever in the file it stands."""
    parts = {"state": {"weight": Attack()}} if place == "state" else {"state": {}}
    if place == "header":
        parts["header"] = (MAGIC_NUMBER, Attack())
    if place == "sizes":
        parts["sizes"] = Attack()
    path, sha256 = write(**parts)
    with pytest.raises(GateError, match=r"must hold tensors only.*posix\.system"):
        read_tensors(path, sha256)
    assert not __import__("pathlib").Path("/tmp/pth-attack-ran").exists()


def test_another_file_is_not_even_parsed(write):
    path, _ = write({"weight": Attack()})
    with pytest.raises(GateError, match="must have SHA-256"):
        read_tensors(path, "0" * 64)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (7,), (1,)),  # ends outside
        (5, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (3, 2), (6, 1)),
        (0, (2**40,), (0,)),  # would take terabytes
        (0, (2, 3), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(write, offset, shape, strides):
    state = {"weight": Tensor(Storage("0", 6), offset, shape, strides)}
    with pytest.raises(GateError, match="legacy PyTorch state dict"):
        read_tensors(*write(state, [NUMBERS]))


def test_a_storage_longer_than_the_file_is_refused(write):
    with pytest.raises(GateError, match="does not fit the file"):
        read_tensors(*write({"weight": Tensor(Storage("0", 2**50), 0, (1,), (1,))}, [NUMBERS]))


def test_a_cut_off_file_is_refused(write):
    path, _ = write({"weight": Tensor(Storage("0", 6), 0, (6,), (1,))}, [NUMBERS])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(GateError):
        read_tensors(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_what_is_no_state_dict_is_refused(write):
    with pytest.raises(GateError, match="a dict of tensors"):
        read_tensors(*write([1, 2]))
    with pytest.raises(GateError, match="the header"):
        read_tensors(*write({}, header=(1, 2)))
