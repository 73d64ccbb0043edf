"""What every submodel of the registry must do; a new line in the table is tested by being there."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.config import parse
from fusion.embeddings import embed
from fusion.errors import ConfigError, DataError
from fusion.submodels import SUBMODELS
from fusion.submodels.base import Pretrained
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.image_backbone import write_weights
from tiny_bert import write_tiny_bert

TEXTS = ["a red film", "the blue night, the blue sea", "", "war and war and night", "a sea of red", "film"]
TABLE = np.array(
    [("1.5", "red", "3"), ("-2", "blue", ""), ("", "red", "3"), ("0", "", "3"), ("7e3", "green", ""), ("1", "red", "")],
    dtype=[("width", "U8"), ("colour", "U8"), ("doors", "U8")],
)
BATCH_TOLERANCE = 1e-5
PRETRAINED = sorted(kind for kind, submodel in SUBMODELS.items() if issubclass(submodel, Pretrained))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a small adapted submodel of a kind; settings over those that make it small."""
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    small = {
        "text_bert": {"init_from": str(folder), "max_tokens": 16},
        "text_bert_long": {"init_from": str(folder), "max_tokens": 8, "windows": 3, "overlap": 2},
        "text_tfidf": {"max_features": 50, "dimensions": 4},
        "text_convolution": {"max_words": 12, "min_count": 1, "word_dimensions": 6, "runs": [1, 3], "filters": 4},
        "text_recurrent": {"max_words": 12, "min_count": 1, "word_dimensions": 6, "units": 4},
        "image_efficientnet": {"image_size": 32},
        "image_backbone": alexnet(tmp_path_factory.mktemp("alexnet") / "weights.npz"),
        "image_cnn": {"image_size": 16, "widths": [4, 8]},
        "dense": {"widths": [8, 4]},
    }

    def build(kind, seed=3, **settings):
        kind_class = SUBMODELS[kind]
        submodel = kind_class(parse(kind_class.Config, small.get(kind, {}) | settings), seed)
        submodel.adapt(values_for(submodel))
        return submodel

    return build


def alexnet(path):
    """Settings of the network that is built fastest, with random weights of a file."""
    settings = {"name": "alexnet", "image_size": 64}
    kind = SUBMODELS["image_backbone"]
    model = kind(parse(kind.Config, settings | {"fine_tune": "all"}), 1).encoder()
    return settings | {"weights": str(path), "sha256": write_weights("alexnet", model, path)}


@pytest.fixture(scope="module", params=sorted(SUBMODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def submodel(kind, make):
    return make(kind)


def values_for(submodel):
    if submodel.modality == "text":
        return TEXTS
    if submodel.modality == "tabular":
        return TABLE
    size = submodel.config.image_size
    return np.random.default_rng(0).integers(0, 256, (6, size, size, 3), np.uint8)


def encode(submodel, values):
    return submodel.encode(submodel.prepare(values))


def test_inputs_are_named_as_prepared(submodel):
    features = submodel.prepare(values_for(submodel))
    assert set(features) == set(submodel.encoder().input_names)
    assert all(len(array) == 6 for array in features.values())


def test_embedding_is_float32_finite_and_named(submodel):
    output = encode(submodel, values_for(submodel))
    assert output.shape == (6, submodel.dimensions)
    assert output.dtype == np.float32
    assert np.isfinite(output).all()
    assert submodel.encoder().output_names == ["embedding"]


def test_the_embedding_depends_on_the_value(submodel):
    output = encode(submodel, values_for(submodel))
    assert np.abs(output[0] - output[1]).max() > 1e-4


def test_a_batch_gives_what_single_values_give(submodel):
    values = values_for(submodel)
    single = np.concatenate([encode(submodel, values[row : row + 1]) for row in range(6)])
    np.testing.assert_allclose(encode(submodel, values), single, atol=BATCH_TOLERANCE)


def test_no_values_give_no_rows(submodel):
    features = submodel.prepare(values_for(submodel)[:0])
    assert all(len(array) == 0 for array in features.values())


def test_same_seed_same_weights_and_fingerprint(kind, make, submodel):
    again = make(kind)
    np.testing.assert_array_equal(encode(again, values_for(again)), encode(submodel, values_for(submodel)))
    assert again.fingerprint() == submodel.fingerprint()


def test_fingerprint_follows_the_weights(kind, make):
    submodel = make(kind)
    before = submodel.fingerprint()
    layer = next(layer for layer in submodel.encoder().layers if layer.weights)
    layer.set_weights([weight + 1e-3 for weight in layer.get_weights()])
    assert submodel.fingerprint() != before


def test_state_makes_an_equal_submodel_without_adapting(kind, make, submodel):
    """B13: only arrays of numbers and strings are needed to restore what was fitted."""
    state = submodel.state()
    assert all(array.dtype.kind in "fiubUS" for array in state.values())
    restored = type(submodel)(submodel.config, submodel.seed)
    restored.load_state(state)
    np.testing.assert_array_equal(encode(restored, values_for(submodel)), encode(submodel, values_for(submodel)))
    assert restored.fingerprint() == submodel.fingerprint()


def test_foreign_state_is_refused(kind, make):
    with pytest.raises(DataError):
        make(kind).load_state({"something": np.zeros(3)})


def test_flat_functional_and_cloneable(submodel):
    """TFMOT's demands: no model within the model, no Lambda, no operation outside a layer, clone from config."""
    encoder = submodel.encoder()
    stock_or_ours = [type(layer).__module__.split(".")[0] in ("tf_keras", "fusion") for layer in encoder.layers]
    assert all(stock_or_ours)
    assert not any(isinstance(layer, keras.Model | keras.layers.Lambda) for layer in encoder.layers)
    assert not any("OpLambda" in type(layer).__name__ for layer in encoder.layers)
    clone = keras.models.clone_model(encoder)
    clone.set_weights(encoder.get_weights())
    features = submodel.prepare(values_for(submodel))
    np.testing.assert_array_equal(clone(features, training=False), encoder(features, training=False))


def test_frozen_says_whether_anything_is_trained(submodel):
    assert submodel.frozen == (not submodel.encoder().trainable_weights)
    assert submodel.unfreeze() == [layer for layer in submodel.encoder().layers if layer.trainable_weights]


@pytest.mark.parametrize("fine_tune", [0, 1, "all"])
@pytest.mark.parametrize("kind", PRETRAINED)
def test_only_the_named_layers_change_in_training(kind, make, fine_tune):
    """E2, E3: frozen variables are bit-identical after training steps, the others are not."""
    submodel = make(kind, fine_tune=fine_tune)
    assert submodel.frozen == (fine_tune == 0)
    chosen = submodel.unfreeze()
    before = {layer.name: layer.get_weights() for layer in submodel.encoder().layers}
    train(submodel)
    named = {layer.name for layer in chosen}
    assert bool(named) == (fine_tune != 0)
    for layer in submodel.encoder().layers:
        same = [np.array_equal(a, b) for a, b in zip(before[layer.name], layer.get_weights(), strict=True)]
        assert layer.name in named or all(same), f"{layer.name} is frozen and changed"
    changed = [name for name in named if not np.array_equal(before[name][0], weights_of(submodel, name))]
    assert len(changed) >= 0.5 * len(named)


def weights_of(submodel, name):
    return submodel.encoder().get_layer(name).get_weights()[0]


def train(submodel):
    """One step of gradient descent on a linear head over the encoder."""
    values = values_for(submodel)
    model = classifier(submodel.encoder(), head(submodel.dimensions, 2, HeadSettings()))
    with tf.GradientTape() as tape:
        logits = model(submodel.prepare(values), training=True)["logits"]
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits([0, 1, 0, 1, 0, 1], logits)
    for variable, gradient in zip(
        model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True
    ):
        variable.assign_sub(0.1 * tf.convert_to_tensor(gradient))


@pytest.mark.parametrize("kind", PRETRAINED)
def test_more_blocks_than_there_are_is_a_config_error(kind, make):
    with pytest.raises(ConfigError, match="at most the number of blocks"):
        make(kind, fine_tune=1000).encoder()


def test_cached_embeddings_equal_the_encoder_and_are_read_back(submodel, tmp_path, monkeypatch):
    """G2: an embedding is computed once; a damaged file is not believed."""
    values = values_for(submodel)
    first = embed(submodel, values, tmp_path, batch_size=4)
    np.testing.assert_allclose(first, encode(submodel, values), atol=BATCH_TOLERANCE)
    (file,) = tmp_path.iterdir()
    np.testing.assert_array_equal(np.load(file, allow_pickle=False), first)
    damaged = bytearray(file.read_bytes())
    damaged[-40] ^= 1
    file.write_bytes(damaged)
    np.testing.assert_array_equal(embed(submodel, values, tmp_path, batch_size=4), first)
    monkeypatch.setattr("fusion.embeddings._run", lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(embed(submodel, values, tmp_path), first)


def test_embed_asks_again_when_values_or_weights_change(submodel, tmp_path):
    values = values_for(submodel)
    embed(submodel, values, tmp_path)
    embed(submodel, values[:5], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_head_and_classifier_share_weights(submodel):
    top = head(submodel.dimensions, 3, HeadSettings(hidden=(5,), dropout=0.5), seed=1)
    model = classifier(submodel.encoder(), top)
    features = submodel.prepare(values_for(submodel))
    outputs = model(features, training=False)
    assert set(outputs) == {"logits", "embedding"}
    np.testing.assert_array_equal(outputs["logits"], top(outputs["embedding"], training=False))
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
