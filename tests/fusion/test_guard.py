"""A10: a member whose answers have become senseless is noticed row by row and taken as silent.

Planted: four members see the same truth, each with noise of its own; then one of them is dealt anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from fusion.compat import tf
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.rules.guard import (
    best_witness,
    candidate_distances,
    class_distances,
    fit_guard,
    implausible,
    normal_distances,
)
from fusion.rules.normalisation import LARGEST
from fusion.types import Over

MEMBERS = ("image", "text", "taste", "crowd")
ROWS, WIDE = 500, 8
BOTH = pytest.mark.parametrize("over", ["classes", "candidates"])
EVERY = [(name, over) for name in RULES for over in ("classes", "candidates") if (name, over) != ("greedy", "classes")]
QUICK: dict[str, dict[str, Any]] = {
    "stacker_gbdt": {"trees": 4, "passthrough": ()},
    "stacker_mlp": {"hidden": 2},
    "gate": {"context": ()},
    "greedy": {"bags": 2, "least": 0.0, "standard_errors": 0.0},
}


def planted(over: Over, seed: int = 0, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 `[N, S, C]` and the truth, int `[N]`: the class, or the one candidate that was taken."""
    random = np.random.default_rng(seed)
    wide = WIDE if over == "classes" else 40
    labels = random.integers(0, wide, rows)
    truth = (4.0 if over == "classes" else 6.0) * np.eye(wide)[labels]
    truth += 0.0 if over == "classes" else random.normal(size=truth.shape)
    return (truth[:, None] + random.normal(size=(rows, len(MEMBERS), wide))).astype(np.float32), labels


def dealt_anew(scores: np.ndarray, member: int, seed: int = 9) -> np.ndarray:
    spoilt = scores.copy()
    spoilt[:, member] = np.random.default_rng(seed).permuted(scores[:, member], axis=1)
    return spoilt


def fitted(name: str, over: Over, members: tuple[str, ...] = MEMBERS, **options: Any) -> tuple[Rule, dict[str, Any]]:
    """A rule with its guard, fitted on planted rows."""
    scores, labels = planted(over)
    scores = scores[:, [MEMBERS.index(member) for member in members]]
    rule = RULES[name](RULES[name].Config(**{"guard": True, **QUICK.get(name, {}), **options}), members, over)
    if over == "classes":
        return rule, rule.fit(scores, None, labels)
    features = rule.normalise(scores).numpy()
    apart = rule.distances(features, scores).numpy()
    return rule, rule.fit(features, None, np.eye(scores.shape[2], dtype=bool)[labels], distances=apart)


def unguarded(rule: Rule) -> Rule:
    """The same rule without its guard."""
    plain = type(rule)(rule.config.model_copy(update={"guard": False}), rule.members, rule.over)
    plain.load_state({key: value for key, value in rule.state().items() if key != "guard"})
    return plain


def right(rule: Rule, scores: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None) -> float:
    return float((rule(scores, mask).numpy().argmax(axis=1) == labels).mean())


# ---- distances, by hand and against slow versions of them


def test_class_distances_by_hand() -> None:
    """-ln(√(.9·.1)·2) between mirrored answers; nothing between members of which one is silent."""
    probabilities = np.array([[[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]], np.float32)
    speaks = np.array([True, True, True, False])[None, :, None]
    found = class_distances(np.log(probabilities), speaks).numpy()[0]
    far = -np.log(0.6)
    np.testing.assert_allclose(found[:3, :3], [[LARGEST, far, 0], [far, LARGEST, far], [0, far, LARGEST]], atol=1e-6)
    assert (found[3] == np.float32(LARGEST)).all() and (found[:, 3] == np.float32(LARGEST)).all()


def test_candidate_distances_are_one_less_the_correlation() -> None:
    random = np.random.default_rng(0)
    scores = (random.normal(size=(2, 3, 30)) * [[[1], [1e-6], [1e12]]]).astype(np.float32)
    speaks = np.ones(scores.shape, bool)
    found = candidate_distances(scores, speaks).numpy()
    for row in range(2):
        expected = 1 - np.corrcoef(scores[row].astype(np.float64)) + LARGEST * np.eye(3)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)
    scores[:, 2] = 7.0  # the same to all: not to be compared
    speaks[0, 0, :15] = speaks[0, 1, 15:] = False  # no item in common
    found = candidate_distances(scores, speaks).numpy()
    assert (found[:, 2] == np.float32(LARGEST)).all()
    assert found[0, 0, 1] == np.float32(LARGEST) and found[1, 0, 1] < 3


def distances(*rows: list[list[float]]) -> np.ndarray:
    found = np.array(rows, np.float32)
    found[:, range(found.shape[1]), range(found.shape[1])] = LARGEST
    return found


def test_who_is_implausible_by_hand() -> None:
    apart = distances(
        [[0, 1, 9], [1, 0, 9], [9, 9, 0]],  # the third lies 9 from either, where 3 is normal
        [[0, 1, 2], [1, 0, 2], [2, 2, 0]],  # all as ever
        [[0, 9, 9], [9, 0, 9], [9, 9, 0]],  # the first is farthest beyond what is normal for it
        [[0, LARGEST, 9], [LARGEST, 0, 9], [9, 9, 0]],  # only the third can be compared with two others
        [[0, LARGEST, 9], [LARGEST, 0, LARGEST], [9, LARGEST, 0]],  # of two nobody can say who is wrong
    )
    found = implausible(apart, np.array([2, 3, 3], np.float32)).numpy()
    expected = np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(found, expected)
    assert not implausible(apart[2:3], np.array([3, 3, 3], np.float32)).numpy().any()  # equally far: nobody can say


def test_normal_distances_allow_for_one_silent_other() -> None:
    """a and b are alike and c, d are alike; a must not look wrong where b is silent, and stands 5 from the rest."""
    apart = distances([[0, 1, 5, 5], [1, 0, 5, 5], [5, 5, 0, 2], [5, 5, 2, 0]])
    np.testing.assert_allclose(normal_distances(apart, 0.99), [5, 5, 5, 5])
    np.testing.assert_allclose(normal_distances(apart[:, :3, :3], 0.99), [1, 1, 5])  # of three no one may be missing
    assert (normal_distances(apart[:, :2, :2], 0.99) == 0).all()


def test_the_witness_is_the_one_that_tells_most() -> None:
    near, far = distances([[0, 4, 1, 3], [4, 0, 1, 3], [1, 1, 0, 3], [3, 3, 3, 0]]), np.array([0.5, 0.5, 0, 0])
    assert best_witness(near, [0, 1], [2, 3], 0.99) == 2
    normal, report = fit_guard(near, MEMBERS, far, 0.99, witness=True)
    np.testing.assert_allclose(normal, [1, 1, 1, 0])
    assert report["witness"] == "taste" and report["members"] == ["image", "text", "taste"]
    normal, report = fit_guard(near, MEMBERS, far, 0.99, witness=False)
    assert not normal.any() and report["members"] == []


# ---- what rules do with it


@pytest.mark.parametrize(("name", "over"), EVERY)
def test_a_member_dealt_anew_is_silent_and_the_others_answer(name: str, over: Over) -> None:
    """A10: with one member senseless the rule answers about as without it, and says who spoke; else all speak."""
    rule, report = fitted(name, over)
    json.dumps(report)
    scores, labels = planted(over, seed=1)
    assert set(report["guard"]["members"]) == set(rule.used())
    plain = unguarded(rule)
    assert rule.heard(scores).numpy().mean() > 0.98
    assert abs(right(rule, scores, labels) - right(plain, scores, labels)) < 0.01
    member = int(np.argmax(rule._shares()))
    spoilt = dealt_anew(scores, member)
    heard = rule.heard(spoilt).numpy()[:, :, 0]
    noticed = ~heard[:, member]
    assert noticed.mean() > (0.75 if over == "classes" else 0.9)  # some deals name the same class again
    assert np.delete(heard, member, axis=1).mean() > 0.98 and heard.sum(axis=1).min() >= 3
    without = right(plain, scores, labels, np.tile(np.arange(len(MEMBERS)) != member, (ROWS, 1)))
    assert right(rule, spoilt, labels) > without - 0.03
    if rule.additive:
        terms, bias = (part.numpy() for part in rule.contributions(spoilt))
        assert (terms[noticed, member] == 0).all() and (np.abs(terms[~noticed, member]).sum(axis=1) > 0).all()
        np.testing.assert_allclose(terms.sum(axis=1) + bias, rule(spoilt).numpy(), rtol=1e-4, atol=1e-4)


@BOTH
def test_without_a_guard_the_noise_is_believed(over: Over) -> None:
    """A10: what the guard is worth, on the member that has nearly all the weight."""
    weights = dict(zip(MEMBERS, (0.7, 0.1, 0.1, 0.1), strict=True))
    options: dict[str, Any] = {"weights": weights, **({} if over == "classes" else {"normalisation": "standardise"})}
    scores, labels = planted(over, seed=1)
    spoilt = dealt_anew(scores, 0)
    guarded, _ = fitted("probability", over, **options)
    assert right(RULES["probability"](guarded.config, MEMBERS, over), spoilt, labels) < 0.3
    assert right(guarded, spoilt, labels) > 0.9
    np.testing.assert_allclose(guarded.state()["weights"], [0.7, 0.1, 0.1, 0.1])  # given ones stay


@BOTH
def test_silenced_is_missing(over: Over) -> None:
    """The fused score of a silenced member's row is that of the row without it, to the last digit."""
    rule, _ = fitted("learned", over)
    spoilt = dealt_anew(planted(over, seed=2)[0], 1)
    heard = rule.heard(spoilt).numpy()
    assert 0.7 < (~heard[:, 1, 0]).mean()
    np.testing.assert_allclose(rule(spoilt).numpy(), unguarded(rule)(spoilt, heard).numpy(), rtol=1e-6, atol=1e-6)


@BOTH
def test_of_two_members_nobody_can_say_who_is_wrong(over: Over) -> None:
    """Two members have no guard; of three, one that is silent leaves two, and these are believed."""
    rule, report = fitted("learned", over, ("image", "text"))
    assert "guard" not in rule.state() and "guard" not in report
    three, report = fitted("learned", over, ("image", "text", "taste"))
    assert len(report["guard"]["members"]) == 3
    spoilt = dealt_anew(planted(over, seed=1)[0], 0)[:, :3]
    mask = np.array([[True, True, False]] * ROWS)
    assert (three.heard(spoilt, mask).numpy()[:, :, 0] == mask).all()


def test_two_members_with_influence_keep_a_witness_where_a_guard_is_asked_for() -> None:
    """A third member that counts nothing stays with the rule; by default there is none, and it stays out."""
    scores, labels = planted("classes", seed=1)
    weights = dict(zip(MEMBERS, (0.8, 0.2, 0.0, 0.0), strict=True))
    rule, report = fitted("probability", "classes", weights=weights)
    witness = report["guard"]["witness"]
    assert rule.used() == tuple(m for m in MEMBERS if m in ("image", "text", witness)) and len(rule.used()) == 3
    spoilt, places = dealt_anew(scores, 0), [MEMBERS.index(name) for name in rule.used()]
    assert right(rule, spoilt, labels) > 0.9
    kept = rule.restricted(rule.used())
    np.testing.assert_allclose(kept(spoilt[:, places]).numpy(), rule(spoilt).numpy(), rtol=1e-5, atol=1e-6)
    alone, report = fitted("greedy", "classes")  # to which one of these members is enough
    assert len(alone.used()) == 1 and report["guard"]["members"] == []
    asked_for_none, report = fitted("probability", "classes", weights=weights, guard=None)
    assert asked_for_none.used() == ("image", "text") and report["guard"]["members"] == []


def test_average_and_vote_are_fitted_only_where_a_guard_is_asked_for() -> None:
    for name in ("average", "vote"):
        kind = RULES[name]
        assert not kind(kind.Config(), MEMBERS, "candidates").learned
        assert kind(kind.Config(guard=True), MEMBERS, "candidates").learned
        rule, report = fitted(name, "classes", guard=False)
        assert "guard" not in report and "guard" not in rule.state()


@BOTH
def test_the_guard_is_part_of_the_state(over: Over) -> None:
    """A round trip, a rule cut to some members, and the order of members."""
    rule, _ = fitted("learned", over)
    spoilt = dealt_anew(planted(over, seed=3)[0], 2)
    again = RULES["learned"](rule.config, MEMBERS, over)
    again.load_state(rule.state())
    np.testing.assert_array_equal(again.heard(spoilt).numpy(), rule.heard(spoilt).numpy())
    np.testing.assert_array_equal(again(spoilt).numpy(), rule(spoilt).numpy())
    cut = rule.restricted(("image", "taste", "crowd"))
    mask = np.array([[True, False, True, True]] * ROWS)
    np.testing.assert_array_equal(
        cut.heard(spoilt[:, [0, 2, 3]]).numpy(), rule.heard(spoilt, mask).numpy()[:, [0, 2, 3]]
    )
    assert (~cut.heard(spoilt[:, [0, 2, 3]]).numpy()[:, 1, 0]).mean() > 0.5
    assert rule.restricted(("image", "taste")).heard(spoilt[:, [0, 2]]).numpy().all()
    turned, _ = fitted("learned", over, MEMBERS[::-1])
    np.testing.assert_allclose(turned.state()["guard"], rule.state()["guard"][::-1], rtol=1e-3)
    older = {key: value for key, value in rule.state().items() if key != "guard"}  # of a run without guards
    again.load_state(older)
    assert again.heard(spoilt).numpy().all() and set(again.state()) == set(older)


def test_class_guard_against_a_slow_version() -> None:
    """Whom the guard silences, reckoned row by row in NumPy from the state alone."""
    rule, _ = fitted("stacker", "classes")
    scores = dealt_anew(planted("classes", seed=4, rows=60)[0], 0)
    scores[::7, 3] = np.nan
    state = rule.state()
    heard = rule.heard(scores).numpy()[:, :, 0]
    for row, said in enumerate(scores):
        speak = [s for s in range(4) if np.isfinite(said[s]).all()]
        p = {s: softmax(log_softmax(said[s].astype(np.float64) / state["temperatures"][s])) for s in speak}
        excess = {
            s: min(-np.log(np.sqrt(p[s] * p[t]).sum()) for t in speak if t != s) / state["guard"][s] for s in speak
        }
        worst = max(speak, key=lambda s: excess[s])
        expected = [s for s in speak if s != worst or excess[s] <= 1]
        assert np.flatnonzero(heard[row]).tolist() == expected


@pytest.mark.parametrize(("name", "over"), [("stacker", "candidates"), ("learned", "classes")])
def test_exported_guards_give_the_same_numbers(name: str, over: Over, tmp_path: Path) -> None:
    """Keras = SavedModel = LiteRT with builtin operations only, on a sound row, a spoilt one and one with silence."""
    rule, _ = fitted(name, over)
    scores = planted(over, seed=5, rows=1)[0]
    rows = [scores, dealt_anew(scores, 0), np.where(np.arange(4)[:, None] == 3, np.float32(np.nan), scores)]
    shape = list(scores.shape)

    def serve(scores: Any, mask: Any) -> dict[str, Any]:
        terms, bias = rule.contributions(scores, mask)
        return {"fused": tf.reduce_sum(terms, axis=1) + bias, "terms": terms}

    specs = [tf.TensorSpec(shape, tf.float32, "scores"), tf.TensorSpec(shape, tf.bool, "mask")]
    module = tf.Module()
    module.rule, module.serve = rule, tf.function(serve, input_signature=specs)
    tf.saved_model.save(module, str(tmp_path), signatures=module.serve)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    from ai_edge_litert.interpreter import Interpreter

    lite = Interpreter(model_content=converter.convert()).get_signature_runner()
    saved = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    mask = np.ones(shape, bool)
    silenced = []
    for row in rows:
        terms = rule.contributions(row, mask)[0].numpy()
        silenced.append(np.flatnonzero((terms == 0).all(axis=2)[0]).tolist())
        for found in (saved(scores=tf.constant(row), mask=tf.constant(mask)), lite(scores=row, mask=mask)):
            np.testing.assert_allclose(found["terms"], terms, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found["fused"], rule(row, mask).numpy(), rtol=1e-4, atol=1e-5)
    assert silenced == [[], [0], [3]]
