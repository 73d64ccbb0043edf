"""Members trained together through the rule that fuses them, against members trained alone and numbers made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.config import parse, parse_part
from fusion.errors import ConfigError, DataError
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.training.joint import (
    JointClassifierTraining,
    JointData,
    JointModel,
    JointRows,
    joint_rule,
    share_encoders,
    train_jointly,
)
from fusion.training.member import CLASSIFIERS, ClassifierMember, LabelledData
from fusion.training.separate import Examples, classification_metrics
from fusion.types import History, RunOptions

CLASSES, SIZE, SEED = 3, 8, 5
WORDS = ("oak tree wood", "sea wave salt", "dry sand dune")
NAMES = ("image", "text")
TRAINING = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05}


def image_member(**settings: Any) -> dict[str, Any]:
    encoder = {"kind": "image_cnn", "image_size": SIZE, "widths": [4], "dropout": 0.0}
    return {"kind": "neural", "encoder": encoder, "training": TRAINING, **settings}


def text_member() -> dict[str, Any]:
    """Reads by a frozen encoder: its head alone is trained, on embeddings."""
    encoder = {"kind": "text_tfidf", "dimensions": 8}
    training = {**TRAINING, "optimizer": "sgd", "learning_rate": 2.0}
    return {"kind": "neural", "encoder": encoder, "columns": ["text"], "training": training}


def members_of(**settings: dict[str, Any]) -> dict[str, ClassifierMember]:
    return {
        name: parse_part(CLASSIFIERS, given, name).make(number) for number, (name, given) in enumerate(settings.items())
    }


def both() -> dict[str, ClassifierMember]:
    return members_of(image=image_member(), text=text_member())


def rows_of(n: int, seed: int, silent: bool = False) -> JointRows:
    """A colour and a word that tell the class, each misleading for one row in four; some rows lack one of them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    told = [np.where(rng.random(n) < 0.25, rng.integers(0, CLASSES, n), labels) for _ in NAMES]
    images = rng.integers(0, 100, (n, SIZE, SIZE, 3))
    images[np.arange(n), :, :, told[0]] += 100
    texts = [str(rng.choice(WORDS[kind].split())) for kind in told[1]]
    mask = np.ones((n, 2), bool)
    if silent:
        mask[::5, 0] = mask[2::5, 1] = False
    known = {
        "image": images.astype(np.uint8)[mask[:, 0]],
        "text": [t for t, says in zip(texts, mask[:, 1], strict=True) if says],
    }
    return JointRows(known, mask, labels, {})


def settings_of(**settings: Any) -> JointClassifierTraining:
    return parse(JointClassifierTraining, {"mode": "joint", "epochs": 3, "batch_size": 16, **settings})


def new_rule(kind: str = "average", members: tuple[str, ...] = NAMES, **options: Any) -> Rule:
    return RULES[kind](RULES[kind].Config(**options), members, "classes", name=kind)


def train(
    members: Mapping[str, ClassifierMember],
    folder: Path,
    rows: JointRows | None = None,
    validation: JointRows | None = None,
    rule: Rule | None = None,
    **settings: Any,
) -> tuple[History, dict[str, Any]]:
    return train_jointly(
        members,
        rule or new_rule(members=tuple(members)),
        JointData(rows or rows_of(48, 0), validation, CLASSES, folder / "cache", "rows"),
        settings_of(**settings),
        RunOptions(SEED, folder / "run", quiet=True),
        dict.fromkeys(members, SEED),
    )


def arrays_of(members: Mapping[str, ClassifierMember]) -> dict[str, np.ndarray]:
    return {f"{name}/{key}": array for name, member in members.items() for key, array in member.state().items()}


def same_bits(a: Mapping[str, ClassifierMember], b: Mapping[str, ClassifierMember]) -> bool:
    left, right = arrays_of(a), arrays_of(b)
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def logits_of(members: Mapping[str, ClassifierMember], rows: JointRows) -> np.ndarray:
    """Logits `[N, S, C]`, 0 where silent."""
    logits = np.zeros((len(rows.labels), len(members), CLASSES), np.float32)
    for position, (name, member) in enumerate(members.items()):
        logits[rows.mask[:, position], position] = member.logits(rows.values[name])
    return logits


# ---- what is learned -----------------------------------------------------------------------------------------


def test_without_a_fused_loss_it_is_separate_training(tmp_path: Path) -> None:
    """G1, G3: members step on the same batches as alone, each by its own optimizer with its own learning rates by
    block, and end with the same bits."""
    slow = image_member(training={**TRAINING, "encoder_rate": 0.1})
    rows, alone, together = rows_of(48, 0), *(members_of(image=slow, text=text_member()) for _ in range(2))
    for name, member in alone.items():
        data = LabelledData(Examples(rows.values[name], rows.labels), None, CLASSES, tmp_path / "cache", "rows")
        member.fit(data, RunOptions(SEED, tmp_path / name, quiet=True))
    train(together, tmp_path, rows, fused=0.0, auxiliary=1.0)
    assert same_bits(alone, together)


RESUMABLE = {"rows": rows_of(48, 0, silent=True), "member_dropout": 0.5, "checkpoint_steps": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ClassifierMember]:
    members = both()
    train(members, tmp_path_factory.mktemp("whole"), **RESUMABLE)
    return members


def test_a_run_is_decided_by_its_seed_even_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Mapping[str, ClassifierMember]
) -> None:
    """G3, F10: members are dropped at random, rows lack an image or a text; begun, stopped and gone on with, it ends
    with the same bits."""
    broken, resumed = both(), both()
    calls = iter(range(1000))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fusion.training.trainer.Loop._check_finite", lambda *_: next(calls) < 5 or _interrupt())
        train(broken, tmp_path, **RESUMABLE)
    train(resumed, tmp_path, **RESUMABLE)
    assert same_bits(uninterrupted, resumed) and not same_bits(uninterrupted, broken)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_the_fused_output_is_learned_and_better_than_its_members(tmp_path: Path) -> None:
    """G1: through the fused loss alone; on rows that a member cannot read it guesses, and the others answer."""
    members, unseen = both(), rows_of(300, 2, silent=True)
    history, facts = train(
        members, tmp_path, rows_of(160, 0, silent=True), rows_of(96, 1, silent=True), epochs=12, auxiliary=0.0
    )
    logits = logits_of(members, unseen)
    fused = new_rule()(tf.constant(logits), mask=tf.constant(unseen.mask)).numpy()
    accuracy = float((fused.argmax(axis=1) == unseen.labels).mean())
    alone = [classification_metrics(logits[:, position], unseen.labels)["accuracy"] for position in range(2)]
    assert 0.6 < min(alone) and max(alone) + 0.02 < accuracy
    best = history.epochs[history.best_epoch]
    assert best["accuracy"] > 0.75 and set(best) >= {"accuracy/image", "accuracy/text", "learning_rate/text"}
    head = 8 * CLASSES + CLASSES
    assert facts == {"joint": {"rule": "average", "parameters": head + _trainable(members["image"].model)}}


def _trainable(model: keras.Model) -> int:
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


@pytest.mark.parametrize("kind", [kind for kind in RULES if RULES[kind].differentiable])
def test_every_differentiable_rule_sends_a_gradient_to_every_member(kind: str) -> None:
    """G1: finite and not 0 where a member speaks, 0 where it is silent; that of the average worked out by hand."""
    rule, rng = new_rule(kind), np.random.default_rng(0)
    logits = tf.constant(rng.normal(size=(4, 2, CLASSES)).astype(np.float32))
    mask = np.ones((4, 2), bool)
    mask[1, 0] = mask[2, 1] = False
    context = {name: tf.zeros([4, 1]) for name in rule.reads(rule.config)}
    rule(logits, context=context)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        fused = rule.probabilities(rule(logits, mask=tf.constant(mask), context=context))
        loss = -tf.reduce_sum(tf.math.log(fused[:, 0]))
    gradient = tape.gradient(loss, logits).numpy()
    assert np.isfinite(gradient).all()
    assert np.array_equal(np.abs(gradient).sum(axis=2) > 1e-6, mask)
    if kind == "average":
        p = tf.nn.softmax(logits, axis=2).numpy()[0]
        own = (np.eye(CLASSES)[0] - p) * p[:, :1]  # of each member's probability of class 0
        np.testing.assert_allclose(gradient[0], -own / p[:, 0].sum(), rtol=1e-4)


def test_dropout_silences_members_but_never_all() -> None:
    """G1: half of the members are dropped; a row that only one can read keeps it, and inference drops nobody."""
    model = _hand_made(member_dropout=0.5)
    mask = tf.constant([[True, True]] * 2000 + [[False, True]] * 100)
    heard = model._heard(mask, training=True).numpy()
    assert heard.any(axis=1).all() and heard[2000:].tolist() == [[False, True]] * 100
    assert 0.45 < (heard[:2000].sum(axis=1) == 1).mean() < 0.55  # 1/4 each way; both or none dropped: all are heard
    assert np.array_equal(model._heard(mask, training=False), mask)


def _hand_made(kind: str = "average", **settings: Any) -> JointModel:
    """Two members that hand on their input of 2 logits, scaled by a weight of 1."""
    parts = {}
    for name in NAMES:
        x = keras.Input((2,), name="x")
        own = keras.layers.Dense(2, use_bias=False, kernel_initializer="identity", name=f"{name}_scale")(x)
        parts[name] = keras.Model(x, {"logits": own})
    return JointModel(parts, new_rule(kind), 2, settings_of(**{"member_dropout": 0.0, **settings}), 1)


def test_the_loss_by_hand() -> None:
    """G1: member a says (1/2, 1/2), b says (3/4, 1/4) of class 0; on the second row b is silent."""
    model = _hand_made(fused=2.0, auxiliary=0.5)
    batch = {
        "image/x": tf.zeros([2, 2]),
        "text/x": tf.constant([[np.log(3.0), 0.0]] * 2, tf.float32),
        "label": tf.constant([0, 0]),
        "mask": tf.constant([[True, True], [True, False]]),
    }
    both_speak = 2 * -np.log(5 / 8) + 0.5 * (np.log(2) - np.log(3 / 4))
    np.testing.assert_allclose(model.objective(batch), [both_speak, 2.5 * np.log(2)], rtol=1e-5)


# ---- weights that are shared ---------------------------------------------------------------------------------


def two_views() -> JointRows:
    """Two images of each row."""
    rows = rows_of(48, 3)
    other = rows_of(48, 4).values["image"]
    return JointRows({"front": rows.values["image"], "back": other}, rows.mask, rows.labels, {})


def test_one_encoder_of_two_members_is_trained_by_both(tmp_path: Path) -> None:
    """G7, D14m, E6: the same variables, counted once, moved by either member's loss; each keeps a head of its own."""
    shared = members_of(front=image_member(share="cnn"), back=image_member(share="cnn"))
    share_encoders(shared)
    _, facts = train(shared, tmp_path, two_views(), epochs=1)
    encoder = shared["front"].submodel.encoder()
    own = [{id(variable) for variable in member.model.variables} for member in shared.values()]
    assert {id(variable) for variable in encoder.variables} == own[0] & own[1]
    apart = sum(_trainable(member.model) for member in shared.values())
    assert facts["joint"]["parameters"] == apart - _trainable(encoder)
    kernel = encoder.trainable_variables[0]
    image = {"image": two_views().values["back"][:16]}
    for member in shared.values():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(member.model(image)["logits"][:, 0])
        assert np.abs(tape.gradient(loss, kernel)).max() > 0


def test_conflict_is_the_cosine_of_gradients(tmp_path: Path) -> None:
    """G8: against a slow version, on shared weights and on those of one member."""
    shared = members_of(front=image_member(share="cnn"), back=image_member(share="cnn"))
    share_encoders(shared)
    views = two_views()
    # All rows are one batch, so the batch that is watched is the whole.
    history, _ = train(shared, tmp_path, views, views, epochs=1, batch_size=48)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with tf.GradientTape(persistent=True) as tape:
        logits = [m.model({"image": views.values[n]}, training=True)["logits"] for n, m in shared.items()]
        own = [entropy(views.labels, each) for each in logits]
        mean = tf.add_n([tf.nn.softmax(each) for each in logits]) / 2
        fused = keras.losses.SparseCategoricalCrossentropy()(views.labels, mean)

    def cosine(one: tf.Tensor, two: tf.Tensor, variables: list[tf.Variable]) -> float:
        a, b = (np.concatenate([np.ravel(g) for g in tape.gradient(loss, variables)]) for loss in (one, two))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    front, back = (member.model.trainable_variables for member in shared.values())
    slow = {
        "conflict/front+back": cosine(own[0], own[1], shared["front"].submodel.encoder().trainable_variables),
        "conflict/front": cosine(fused, own[0], front),
        "conflict/back": cosine(fused, own[1], back),
    }
    found = {name: value for name, value in history.epochs[0].items() if name.startswith("conflict")}
    assert found == pytest.approx(slow, abs=1e-4)


# ---- what is refused -----------------------------------------------------------------------------------------


def test_rules_without_a_gradient_are_refused_by_name() -> None:
    """G1"""
    rules = {kind: parse_part(RULES, {"kind": kind}, "rules") for kind in ("vote", "greedy", "average")}
    rules["ranks"] = parse_part(RULES, {"kind": "average", "mean": "rank"}, "rules")
    assert joint_rule(settings_of(), rules, NAMES, NAMES) == "average"
    assert joint_rule(settings_of(rule="average"), rules, NAMES, NAMES) == "average"
    for name in ("vote", "greedy", "ranks"):
        with pytest.raises(ConfigError, match=f"received {rules[name].kind}, which has none. Add a rule of kind"):
            joint_rule(settings_of(rule=name), rules, NAMES, NAMES)
    with pytest.raises(ConfigError, match="received vote, greedy, which have none"):
        joint_rule(settings_of(), {name: rules[name] for name in ("vote", "greedy")}, NAMES, NAMES)
    with pytest.raises(ConfigError, match="no rule 'mean': known are"):
        joint_rule(settings_of(rule="mean"), rules, NAMES, NAMES)
    whole = {"mlp": parse_part(RULES, {"kind": "stacker_mlp"}, "rules")}
    assert joint_rule(settings_of(), whole, NAMES, NAMES) == "mlp"
    with pytest.raises(ConfigError, match=r"can do with .* image, text; 'mlp' counts on all of image, text, linear"):
        joint_rule(settings_of(), whole, [*NAMES, "linear"], NAMES)
    with pytest.raises(ConfigError, match="one of the keys fused and auxiliary must be above 0"):
        settings_of(fused=0, auxiliary=0)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = rows_of(30, 0)
    silent = np.zeros_like(rows.mask)
    with pytest.raises(DataError, match="a member for each row"):
        train(both(), tmp_path, JointRows(rows.values, silent, rows.labels, {}))
    with pytest.raises(DataError, match=r"members\.image: labels must be class numbers from 0 to 2"):
        train(both(), tmp_path, JointRows(rows.values, rows.mask, rows.labels + 1, {}))
