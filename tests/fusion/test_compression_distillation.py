"""Students: what they learn from a model, from several models, from hidden layers, and against a discriminator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from compression_world import digits_data, digits_model
from fusion.compat import keras, tf
from fusion.compression.base import Compressed, CompressionData, answer_of, fine_tune, input_names
from fusion.compression.distillation import (
    Distillation,
    cosine,
    listwise,
    mse,
    reversed_gradient,
    similarity,
    softened,
    unlike,
)
from fusion.compression.measure import SIGNATURE, litert_answer, serving_function
from fusion.compression.students import STUDENTS, principal_components
from fusion.config import parse
from fusion.errors import ConfigError, DataError
from fusion.export.tflite import convert
from fusion.submodels.text_bert import TextBert
from fusion.training.batches import as_rows
from fusion.training.separate import cross_entropy
from fusion.training.trainer import TrainingSettings
from fusion.types import RunOptions
from tiny_bert import write_tiny_bert

TRAIN = 1280
"""Rows to distil with: full batches of 32 and of 64, so that each graph is made once."""
QUICK = {"epochs": 6, "batch_size": 32, "learning_rate": 0.01}
DENSE = {"kind": "dense", "hidden": [24]}


def pixels():
    """Digits as float32 `[1797, 64]` from 0 to 1, and what they are."""
    numbers, labels = load_digits(return_X_y=True)
    return (numbers / 16).astype(np.float32), labels.astype(np.int32)


def world(folder, rows=slice(TRAIN), labels=None, seed=1):
    """Rows to distil with; the digits after these judge by accuracy."""
    numbers, truth = pixels()
    fitted = {"pixels": numbers[rows], "label": truth[rows] if labels is None else labels}
    return CompressionData(
        rows=as_rows(fitted),
        loss=lambda logits, batch: cross_entropy(batch["label"], logits),
        representative={"pixels": numbers[:8]},
        judge=lambda answer: (answer({"pixels": numbers[TRAIN:]}).argmax(1) == truth[TRAIN:]).astype(np.float64),
        metric="accuracy",
        higher_is_better=True,
        options=RunOptions(seed, folder, quiet=True),
    )


def network(known=range(10), seed=0, width=96):
    """Random hidden units, and over them the logits that fit the training digits best, of the digits that it knows."""
    numbers, labels = pixels()
    inputs = keras.Input((64,), name="pixels")
    start = keras.initializers.GlorotUniform(seed)
    hidden = keras.layers.Dense(width, "relu", kernel_initializer=start, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(10, name="logits")(hidden), name="network")
    units = np.column_stack([keras.Model(inputs, hidden)(numbers[:TRAIN]).numpy(), np.ones(TRAIN)])
    target = 5.0 * (labels[:TRAIN, None] == np.arange(10)) * np.isin(np.arange(10), known)
    fitted = np.linalg.solve(units.T @ units + 0.1 * np.eye(width + 1), units.T @ target)
    model.get_layer("logits").set_weights([fitted[:-1], fitted[-1]])
    return model


@pytest.fixture(scope="module")
def teacher():
    """An accuracy of about .93."""
    return network()


def distil(model, data, **settings):
    """The student and what is told of it."""
    config = parse(Distillation.Config, {"student": DENSE, "training": QUICK, **settings})
    compressed, applied = Distillation(config).apply(Compressed(model), data)
    return compressed.model, applied.facts


# ---- the terms, by hand


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_softened_is_the_divergence_times_t_squared():
    """M1: Hinton's term against a slow version; nothing is left where student and teacher differ by a constant."""
    own, truth = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    p, q = log_softmax(truth / 3), log_softmax(own / 3)
    np.testing.assert_allclose(softened(own, truth, 3.0), 9 * (np.exp(p) * (p - q)).sum(1), rtol=1e-4)
    np.testing.assert_allclose(softened(truth + 7, truth, 3.0), 0, atol=1e-5)


def test_listwise_is_cross_entropy_over_the_candidates_that_were_scored():
    """ListNet by hand: of scores [ln 3, 0] the first is first with probability 3/4; silent candidates are not there."""
    truth = np.array([[np.log(3), np.nan, 0], [np.nan, np.inf, np.nan]], np.float32)
    own = np.array([[0, 50, 0], [1, 2, 3]], np.float32)
    np.testing.assert_allclose(listwise(own, truth, 1.0), [np.log(2), 0], rtol=1e-6)
    own[0, 2] = np.log(3)
    expected = -(0.75 * np.log(0.25) + 0.25 * np.log(0.75))
    np.testing.assert_allclose(listwise(own, truth, 1.0)[0], expected, rtol=1e-6)
    with tf.GradientTape() as tape:
        x = tf.Variable(own)
        tape.watch(x)
        loss = listwise(x, truth, 1.0)
    assert np.isfinite(tape.gradient(loss, x)).all()


def test_terms_over_vectors():
    """Cosine, squared error and cosines within the batch, by hand."""
    own, truth = np.array([[3, 4], [0, 2]], np.float32), np.array([[4, 3], [0, 1]], np.float32)
    np.testing.assert_allclose(cosine(own, truth, 1.0), [1 - 24 / 25, 0], atol=1e-6)
    np.testing.assert_allclose(mse(own, truth, 1.0), [1, 0.5])
    np.testing.assert_allclose(
        similarity(own, truth), [0.2**2 / 2] * 2, rtol=1e-4
    )  # cosines .8 and .6 between the rows


def test_hidden_layers_are_compared_where_something_is():
    """M4: tokens that are padding do not count, maps are resized, and the scale of the layer does not matter."""
    hint = np.array([[[2.0], [9.0]], [[2.0], [2.0]]], np.float32)
    projected = np.array([[[1.0], [0.0]], [[2.0], [2.0]]], np.float32)
    mask = np.array([[1, 0], [1, 1]], np.int32)
    # Squared errors 1 and 0; squares of the hints 4 and 4 + 4, their mean 6.
    np.testing.assert_allclose(unlike(projected, hint, mask), [1 / 6, 0])
    np.testing.assert_allclose(unlike(10 * projected, 10 * hint, mask), [1 / 6, 0], rtol=1e-6)
    maps = np.full((1, 4, 4, 2), 3, np.float32)
    np.testing.assert_allclose(unlike(maps[:, :2, :2], maps, None), [0], atol=1e-6)
    np.testing.assert_allclose(unlike(2 * maps[:, :2, :2], maps, None), [1], rtol=1e-5)


def test_reversed_gradient():
    x = tf.Variable([1.0, -2.0])
    with tf.GradientTape() as tape:
        y = reversed_gradient(x, 0.5)
        loss = tf.reduce_sum(y * y)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(tape.gradient(loss, x), [-1.0, 2.0])


# ---- what is learned


def test_a_student_learns_more_from_the_teacher_than_from_labels(teacher, tmp_path):
    """M1: with 320 rows, three in ten labels of them wrong, and over two seeds, the student is better by far than the
    same network that learns from the labels alone."""
    taught, alone = [], []
    for seed in (1, 2):
        random = np.random.default_rng(seed)
        rows = random.permutation(TRAIN)[:320]
        labels = np.where(random.random(320) < 0.3, random.integers(0, 10, 320), pixels()[1][rows]).astype(np.int32)
        data = world(tmp_path / f"taught{seed}", rows, labels, seed)
        settings = {**QUICK, "epochs": 10}
        student, facts = distil(teacher, data, training=settings)
        assert facts["parameters"] == {"teacher": 7210, "student": 1938}
        assert set(facts["losses"]) == {"teacher", "task"}
        taught.append(data.quality(answer_of(student)))
        same = STUDENTS["dense"](parse(STUDENTS["dense"].Config, {"hidden": [24]}), seed).build(teacher, {})
        fine_tune(same, world(tmp_path / f"alone{seed}", rows, labels, seed), parse(TrainingSettings, settings))
        alone.append(data.quality(answer_of(same)))
    assert np.mean(taught) > 0.85
    assert np.mean(taught) > np.mean(alone) + 0.05


def test_an_ensemble_becomes_one_student(tmp_path):
    """M2: of two models each knows half of the digits; a student of their mean knows all of them, without labels."""
    numbers, _ = pixels()
    data = world(tmp_path)
    experts = [network(known, seed) for seed, known in enumerate((range(5), range(5, 10)))]
    assert max(data.quality(answer_of(expert)) for expert in experts) < 0.6
    mean = np.mean([answer_of(expert)({"pixels": numbers[:TRAIN]}) for expert in experts], axis=0)
    of_all, _ = distil(experts[0], replace(data, teacher=mean), weight=1.0)
    assert data.quality(answer_of(of_all)) > 0.85


def test_a_discriminator_makes_answers_alike(teacher, tmp_path):
    """M3: this teacher is never sure of anything. A student of the labels alone is; one that deceives the discriminator
    is as unsure as its teacher."""
    numbers, _ = pixels()
    truth = answer_of(teacher)({"pixels": numbers[:TRAIN]})
    unsure = truth / truth.std()

    def sureness(logits):
        return np.exp(log_softmax(logits)).max(axis=1).mean()

    found = {}
    for name, settings in (("alone", {"weight": 1e-6}), ("deceiving", {"weight": 0.0, "adversarial": 3.0})):
        data = replace(world(tmp_path / name), teacher=unsure)
        student, facts = distil(teacher, data, temperature=1.0, **settings)
        found[name] = sureness(answer_of(student)({"pixels": numbers[TRAIN:]}))
        assert ("discriminator" in facts["losses"]) == (name == "deceiving")
    assert found["alone"] > sureness(unsure) + 0.2
    assert abs(found["deceiving"] - sureness(unsure)) < 0.5 * (found["alone"] - sureness(unsure))


def test_hidden_layers_are_learned(tmp_path):
    """M4: this teacher says only what is a zero. What else its hidden layer knows can be read from the student's where
    that was asked for, and hardly where not; the projection is gone."""
    numbers, _ = pixels()
    teacher = network(known=[0])
    hidden = keras.Model(teacher.inputs, teacher.get_layer("hidden").output)(numbers).numpy()
    error = {}
    for name, features in (("without", {}), ("with", {"hidden": "hidden0_relu"})):
        student, facts = distil(teacher, world(tmp_path / name), weight=1.0, features=features, feature_weight=10.0)
        own = keras.Model(student.inputs, student.get_layer("hidden0_relu").output)(numbers).numpy()
        design = np.column_stack([own, np.ones(len(own))])
        fitted = np.linalg.lstsq(design[:TRAIN], hidden[:TRAIN], rcond=None)[0]
        error[name] = np.square(design[TRAIN:] @ fitted - hidden[TRAIN:]).mean() / np.square(hidden[TRAIN:]).mean()
        assert set(facts["losses"]) == {"teacher", *(["features"] if features else [])}
        assert [layer.name for layer in student.layers if layer.weights] == ["pixels_bn", "hidden0", "logits"]
    assert error["with"] < 0.8 * error["without"], error


def test_rankings_are_learned_where_the_teacher_speaks(tmp_path):
    """A list of scores with gaps: the student puts first what the teacher does, and the gaps do no harm."""
    random = np.random.default_rng(0)
    history = random.normal(size=(512, 12)).astype(np.float32)
    scores = (history @ random.normal(size=(12, 20))).astype(np.float32)
    gaps = np.where(random.random(scores.shape) < 0.3, np.nan, scores)
    inputs = keras.Input((12,), name="history")
    x = keras.layers.Dense(64, "relu", name="wide")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(20, name="scores")(x))

    def judge(answer):
        return (answer({"history": history}).argmax(1) == scores.argmax(1)).astype(np.float64)

    data = replace(world(tmp_path), rows=as_rows({"history": history}), judge=judge, teacher=gaps)
    settings = {"student": {"kind": "dense", "hidden": []}, "weight": 1.0, "training": {**QUICK, "epochs": 12}}
    student, facts = distil(model, data, loss="listwise", temperature=1.0, **settings)
    assert data.quality(answer_of(student)) > 0.8
    assert np.isfinite(facts["losses"]["teacher"])
    with pytest.raises(DataError, match=r"must be finite.*loss: listwise alone"):
        distil(model, data, **settings)


def test_a_run_repeats_itself(teacher, tmp_path):
    """With every term: the same seed gives the same bits, and the teacher stays as it is."""
    before = [weight.copy() for weight in teacher.get_weights()]
    terms = {"similarity": 1.0, "features": {"hidden": "hidden0_relu"}, "adversarial": 0.1}
    terms["training"] = {**QUICK, "epochs": 2}
    data = world(tmp_path, slice(192))
    runs = [
        distil(teacher, replace(data, options=replace(data.options, directory=tmp_path / name)), **terms)
        for name in "ab"
    ]
    assert runs[0][1] == runs[1][1]
    for one, other in zip(runs[0][0].get_weights(), runs[1][0].get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- students of texts


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return TextBert(parse(TextBert.Config, {"init_from": str(folder), "max_tokens": 12}), seed=0)


def texts(bert, n=300):
    random = np.random.default_rng(1)
    words = ["blue", "film", "night", "red", "sea", "war", "films"]
    return bert.prepare([" ".join(random.choice(words, random.integers(1, 7))) for _ in range(n)], fixed_length=True)


def test_a_bag_of_tokens_learns_an_encoder(bert, tmp_path):
    """M1, M2: BERT's embeddings of texts that were not trained on, out of a bag of its tokens' vectors."""
    features, encoder = texts(bert), bert.encoder()
    truth = answer_of(encoder)(features)
    fitted = {name: array[:192] for name, array in features.items()}
    held = {name: array[192:] for name, array in features.items()}
    data = CompressionData(
        rows=as_rows(fitted),
        loss=lambda embedding, batch: tf.zeros(len(embedding)),
        representative=fitted,
        judge=lambda answer: (answer(held) * truth[192:]).sum(axis=1),
        metric="cosine",
        higher_is_better=True,
        options=RunOptions(1, tmp_path, quiet=True),
    )
    settings = {"kind": "bag_of_tokens", "width": 6, "start": "answers"}
    student, _ = distil(encoder, data, student=settings, loss="cosine", weight=1.0, similarity=1.0)
    assert input_names(student) == ["input_ids", "attention_mask"]
    assert student.output_names == ["embedding"]
    np.testing.assert_allclose(np.linalg.norm(answer_of(student)(held), axis=1), 1, atol=1e-5)
    untaught = STUDENTS["bag_of_tokens"](parse(STUDENTS["bag_of_tokens"].Config, {"width": 6}), 1).build(
        encoder, fitted
    )
    assert data.quality(answer_of(student)) > 0.9
    owner = tf.Module()
    owner.kept = student.variables  # without the layers, whose own functions would take long to write
    tflite = convert({SIGNATURE: serving_function(student, fitted)}, owner)
    np.testing.assert_allclose(litert_answer(tflite)(held), answer_of(student)(held), atol=1e-5)
    assert data.quality(answer_of(student)) > data.quality(answer_of(untaught)) + 0.05


def test_a_bag_may_start_with_what_the_teacher_says_of_each_token(bert):
    """Before any training a text of one token is answered as the teacher answers it, but for the pooled ends."""
    features, encoder = texts(bert), bert.encoder()
    student = STUDENTS["bag_of_tokens"](
        parse(STUDENTS["bag_of_tokens"].Config, {"width": 8, "start": "answers"}), 1
    ).build(encoder, features)
    one = bert.prepare(["sea", "war"])
    table, projection = student.get_layer("tokens").get_weights()[0], student.get_layer("projection")
    for row, said in zip(one["input_ids"], answer_of(encoder)(one), strict=True):
        np.testing.assert_allclose(projection(table[row[1:2]])[0], said, atol=1e-4)


def test_a_bag_may_start_at_random_and_have_hidden_layers(bert):
    """Random vectors follow the seed and may be longer than the teacher's, whose components may not."""
    features, encoder = texts(bert, 5), bert.encoder()

    def student(seed, **settings):
        kind = STUDENTS["bag_of_tokens"]
        return kind(parse(kind.Config, {"width": 16, "hidden": [5], **settings}), seed).build(encoder, features)

    one, again, other = (student(seed, start="random")(features) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    with pytest.raises(ConfigError, match=r"width must be at most 8, the length of the vectors.*received 16"):
        student(1)


def test_a_shallow_bert_takes_layers_or_makes_narrow_ones(bert):
    """With all layers the student is the teacher; with one it has that layer's weights; narrow ones follow the seed."""
    features, encoder = texts(bert, 5), bert.encoder()

    def student(seed=1, **settings):
        return STUDENTS["bert"](parse(STUDENTS["bert"].Config, settings), seed).build(encoder, features)

    np.testing.assert_allclose(student(layers=2)(features), encoder(features), atol=1e-6)
    one = student(layers=1)
    assert one.count_params() < encoder.count_params()
    for part in ("query", "wide", "norm"):
        for own, theirs in zip(
            one.get_layer(f"layer0_{part}").weights, encoder.get_layer(f"layer0_{part}").weights, strict=True
        ):
            np.testing.assert_array_equal(own, theirs)
    narrow, again, other = student(width=4), student(width=4), student(seed=2, width=4)
    assert narrow.get_layer("layer1_wide").units == 16
    np.testing.assert_array_equal(narrow(features), again(features))
    assert not np.allclose(narrow(features), other(features))


def test_principal_components():
    """They are numpy's singular vectors; with all of them nothing is lost."""
    table = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    components, axes, mean = principal_components(table, 5)
    np.testing.assert_allclose(components @ axes + mean, table, atol=1e-5)
    values = np.linalg.svd(table - table.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(components, axis=0), values, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"width must be at most 5.*received 6"):
        principal_components(table, 6)


# ---- what is refused


def test_a_student_must_be_smaller(teacher, tmp_path):
    with pytest.raises(ConfigError, match=r"fewer parameters than the model.*it has 9,138, the model 7,210. Make it"):
        distil(teacher, world(tmp_path), student={"kind": "dense", "hidden": [120]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": {"kind": "cnnn"}}, "unknown student 'cnnn': did you mean 'cnn'"),
        ({"weight": 0.0}, "must learn from similarity, features or adversarial"),
        ({"loss": "cosine", "temperature": 2.0}, "temperature must go with loss softened or listwise"),
        ({"student": {"kind": "bert", "width": 5}}, "width must be a multiple of the 2 heads"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse(Distillation.Config, {"student": DENSE, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": {"hiden": "hidden0_relu"}}, "layers of the model; received 'hiden': did you mean 'hidden'"),
        ({"features": {"hidden": "hidden1_relu"}}, "layers of the student; received 'hidden1_relu'.*'hidden0_relu'"),
        ({"student": {"kind": "cnn"}}, "student cnn reads one uint8 image.*the model reads pixels"),
        ({"student": {"kind": "bert"}}, "student bert reads input_ids and attention_mask; the model reads pixels"),
    ],
)
def test_what_does_not_fit_the_model(settings, message, teacher, tmp_path):
    with pytest.raises(ConfigError, match=message):
        distil(teacher, world(tmp_path), **settings)


def test_images_and_texts_that_do_not_fit(bert, tmp_path):
    """A student of texts for images and the other way round, an image shrunk to nothing, layers of unlike axes."""
    images = digits_data(tmp_path)
    with pytest.raises(ConfigError, match=r"shrink must leave a pixel.*received 16 for \[8, 8\] pixels"):
        distil(digits_model(), images, student={"kind": "cnn", "shrink": 16})
    with pytest.raises(ConfigError, match="as many axes; 'block0_relu' is"):
        distil(digits_model(), images, student={"kind": "cnn", "widths": [4]}, features={"block0_relu": "pooled"})
    with pytest.raises(ConfigError, match=r"student dense reads.*'input_ids' is int32"):
        STUDENTS["dense"](parse(STUDENTS["dense"].Config, {}), 1).build(bert.encoder(), {})
    with pytest.raises(ConfigError, match="layers must be at most the 2 of the model; received 3"):
        STUDENTS["bert"](parse(STUDENTS["bert"].Config, {"layers": 3}), 1).build(bert.encoder(), {})


def test_a_teacher_of_other_rows_is_refused(teacher, tmp_path):
    data = world(tmp_path)
    with pytest.raises(
        DataError, match=r"answer each training row as the model does, \[1280, 10\]; received \[3, 10\]"
    ):
        distil(teacher, replace(data, teacher=np.zeros((3, 10))))


def test_image_students_halve_and_shrink():
    """The graph makes the image smaller; all layers are stock ones in the order that TFMOT folds."""
    model = digits_model()
    student = STUDENTS["inverted_residual"](
        parse(STUDENTS["inverted_residual"].Config, {"shrink": 2, "widths": [4], "repeats": 2, "features": 8}), 1
    ).build(model, {})
    assert student.get_layer("shrink").output.shape == (None, 4, 4, 3)
    assert student.get_layer("block1_add").output.shape == (None, 1, 1, 4)
    assert student.output_names == ["logits"]
    for layer in student.layers:
        assert type(layer).__module__.startswith("tf_keras")
        if isinstance(layer, keras.layers.Conv2D):
            (following,) = {node.layer for node in layer.outbound_nodes}
            assert isinstance(following, keras.layers.BatchNormalization)
