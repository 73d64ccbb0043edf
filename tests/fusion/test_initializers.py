"""Where weights start: the variances of the papers, a seed for each layer, and the same starts as ever by default."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from fusion.compat import keras
from fusion.config import parse
from fusion.errors import ConfigError
from fusion.initializers import Initializer, initializer
from fusion.submodels import SUBMODELS
from fusion.submodels.head import HeadSettings, head
from fusion.types import derive_seed

INPUTS, UNITS = 400, 300
VARIANCES = {
    "zeros": 0.0,
    "ones": 0.0,
    "uniform": 0.1**2 / 12,
    "normal": 0.05**2,
    "he_uniform": 2 / INPUTS,
    "he_normal": 2 / INPUTS,
    "glorot_uniform": 2 / (INPUTS + UNITS),
    "glorot_normal": 2 / (INPUTS + UNITS),
    "orthogonal": 1 / INPUTS,
}


@pytest.mark.parametrize("name", get_args(Initializer))
def test_variance_is_that_of_the_paper(name: Any) -> None:
    """F1: 120,000 weights; the error of a variance is below 2 %."""
    weights = initializer(name, 1)((INPUTS, UNITS)).numpy()
    assert weights.var() == pytest.approx(VARIANCES[name], rel=0.02)
    assert weights.mean() == pytest.approx(float(name == "ones"), abs=1e-3)
    if "uniform" in name:
        assert np.abs(weights).max() <= np.sqrt(3 * VARIANCES[name]) * 1.0001
    if name == "orthogonal":
        np.testing.assert_allclose(weights.T @ weights, np.eye(UNITS), atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(get_args(Initializer)) - {"zeros", "ones"}))
def test_seeds_are_honoured(name: Any) -> None:
    first, again, other = (initializer(name, seed)((20, 30)).numpy() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


TEXTS = ["a red film", "a blue film", "a red sea"]
TABLE = np.array([("1", "2"), ("3", "5")], dtype=[("width", "U8"), ("height", "U8")])
FROM_SCRATCH = [
    # kind, key, the layer and its weight, the default, and its seed
    ("image_cnn", "initializer", "block1_conv", 0, "he_normal", ("image_cnn", "block1")),
    ("dense", "initializer", "dense1", 0, "glorot_uniform", ("dense", "dense1")),
    ("text_convolution", "initializer", "run2_conv", 0, "glorot_uniform", ("TextConvolution", "run2")),
    ("text_convolution", "vectors_initializer", "vectors", 0, "uniform", ("TextConvolution", "vectors")),
    ("text_recurrent", "initializer", "forward", 0, "glorot_uniform", ("TextRecurrent", "forward/kernel")),
    ("text_recurrent", "recurrent_initializer", "forward", 1, "orthogonal", ("TextRecurrent", "forward/recurrent")),
]
SMALL = {
    "image_cnn": {"image_size": 16, "widths": [8, 4]},
    "dense": {"widths": [8, 4]},
    "text_convolution": {"min_count": 1, "runs": [2], "word_dimensions": 6},
    "text_recurrent": {"min_count": 1, "bidirectional": False, "word_dimensions": 6},
}


@pytest.mark.parametrize(("kind", "key", "layer", "number", "default", "seed"), FROM_SCRATCH)
def test_each_group_of_layers_starts_as_its_key_says(
    kind: str, key: str, layer: str, number: int, default: Any, seed: tuple[str, ...]
) -> None:
    """F1: by name, with a seed of its own; without the key as Keras' initialiser of that name always did."""

    def weights(**settings: Any) -> np.ndarray:
        submodel = SUBMODELS[kind](parse(SUBMODELS[kind].Config, SMALL[kind] | settings), 3)
        submodel.adapt(TABLE if kind == "dense" else TEXTS)
        return np.asarray(submodel.encoder().get_layer(layer).get_weights()[number])

    plain = weights()
    old = keras.initializers.get({"class_name": default, "config": {"seed": derive_seed(3, *seed)}})
    np.testing.assert_array_equal(plain, old(plain.shape))
    np.testing.assert_array_equal(weights(**{key: "ones"}), np.ones_like(plain))
    np.testing.assert_array_equal(
        weights(**{key: "glorot_normal"}), initializer("glorot_normal", derive_seed(3, *seed))(plain.shape)
    )


def test_the_layers_of_a_head_start_as_its_keys_say() -> None:
    """F1: hidden layers and the last one are two groups; a last layer of zeros gives every class the same chance."""
    plain = head(5, 3, HeadSettings(hidden=(7,)), seed=1)
    for name in ("head_dense0", "logits"):
        kernel = plain.get_layer(name).get_weights()[0]
        start = keras.initializers.GlorotUniform(seed=derive_seed(1, "head", name))
        np.testing.assert_array_equal(kernel, start(kernel.shape))
    other = head(5, 3, HeadSettings(hidden=(7,), initializer="he_normal", logits_initializer="zeros"), seed=1)
    assert not np.array_equal(other.get_layer("head_dense0").get_weights()[0], plain.get_weights()[0])
    np.testing.assert_array_equal(other(np.ones((2, 5), np.float32)), np.zeros((2, 3)))


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"initializer: .*'he_normal'"):
        parse(HeadSettings, {"initializer": "xavier"})
