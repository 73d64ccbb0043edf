"""Stackers that are not linear: what they learn that the linear one cannot, and that they learn nothing else (H5)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.rules.corrected import Lists, shorten
from fusion.rules.stacker_gbdt import in_bins, newton, perfect, quantiles, sum_of_leaves
from fusion.trees import trees_of_boosting
from fusion.types import Over

NONLINEAR = ("stacker_mlp", "stacker_gbdt")
CLASSES = 4
ROWS: dict[Over, int] = {"classes": 800, "candidates": 400}
Context = dict[str, np.ndarray]


def make(name: str, over: Over, members: tuple[str, ...] = ("a", "b", "c"), **options: Any) -> Rule:
    return RULES[name](RULES[name].Config(**options), members, over)


def switching_classes(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, Context]:
    """Member a knows the class where x > 0, b where x < 0, and each is misled elsewhere; c is noise."""
    random = np.random.default_rng(seed)
    labels, x = random.integers(0, CLASSES, rows), random.normal(size=(rows, 1)).astype(np.float32)
    scores = random.normal(size=(rows, 3, CLASSES))
    right, wrong = np.eye(CLASSES)[labels], np.eye(CLASSES)[(labels + random.integers(1, CLASSES, rows)) % CLASSES]
    scores[:, 0] += 2.5 * np.where(x > 0, right, wrong)
    scores[:, 1] += 2.5 * np.where(x > 0, wrong, right)
    return scores.astype(np.float32), labels, {"x": x, "unread": x}


def switching_candidates(users: int, seed: int, items: int = 40) -> tuple[np.ndarray, np.ndarray, Context]:
    """Member a knows the taste for items with x > 0, b for the others, and each says noise of the rest; c is noise."""
    random = np.random.default_rng(seed)
    taste, x = random.normal(size=(users, items)), random.normal(size=(1, items)).astype(np.float32)
    taken = (taste + 0.3 * random.gumbel(size=taste.shape)).argmax(axis=1)
    scores = random.normal(size=(users, 3, items))
    scores[:, 0] = np.where(x > 0, taste, scores[:, 0])
    scores[:, 1] = np.where(x > 0, scores[:, 1], taste)
    context = np.broadcast_to(x, taste.shape).copy()
    return scores.astype(np.float32), np.eye(items, dtype=bool)[taken], {"x": context, "unread": context}


def fit(rule: Rule, scores: np.ndarray, labels: np.ndarray, context: Context, **arguments: Any) -> dict[str, Any]:
    given = scores if rule.over == "classes" else rule.normalise(scores).numpy()
    return rule.fit(given, None, labels, None, context, **arguments)


def right(rule: Rule, scores: np.ndarray, labels: np.ndarray, context: Context, mask: Any = None) -> float:
    """How often the first is the one."""
    best = rule(scores, mask, context).numpy().argmax(axis=1)
    return float(np.mean(best == labels if labels.ndim == 1 else labels[np.arange(len(labels)), best]))


@dataclass(frozen=True)
class Fitted:
    """A stacker that reads x, fitted on a world in which x says who is right, its report, and fresh rows."""

    rule: Rule
    report: dict[str, Any]
    scores: np.ndarray
    labels: np.ndarray
    context: Context

    @classmethod
    def of(cls, name: str, over: Over, **options: Any) -> Fitted:
        world = switching_classes if over == "classes" else switching_candidates
        rule = make(name, over, **options)
        return cls(rule, fit(rule, *world(ROWS[over], seed=0)), *world(ROWS[over], seed=1))

    @property
    def right(self) -> float:
        return right(self.rule, self.scores, self.labels, self.context)


@functools.cache
def world_fitted(name: str, over: Over, passthrough: tuple[str, ...] = ("x",)) -> Fitted:
    return Fitted.of(name, over, **({"passthrough": passthrough} if passthrough else {}))


@pytest.fixture(params=[(name, over) for over in ROWS for name in NONLINEAR], ids="-".join)
def fitted(request: pytest.FixtureRequest) -> Fitted:
    return world_fitted(*request.param)


# ---- what only they can learn


def test_who_is_right_may_depend_on_context(fitted: Fitted) -> None:
    """H5: where x says which member is right, a stacker that reads x is far above a linear one."""
    correction = fitted.report["correction"]
    assert correction["steps"] > 0 and correction["held_out_gain"] > 5 * correction["standard_error"]
    assert fitted.report["loss_after"] < fitted.report["loss_before"] - 0.2
    assert fitted.right > world_fitted("stacker", fitted.rule.over, ()).right + 0.15
    json.dumps(fitted.report)


@pytest.mark.parametrize("name", NONLINEAR)
def test_without_the_context_it_cannot_be_known(name: str) -> None:
    """H5: the gain above comes from passthrough, not from the members' scores."""
    assert world_fitted(name, "classes", ()).right < world_fitted("stacker", "classes", ()).right + 0.1


def test_contributions_of_a_fitted_rule_sum_to_its_score(fitted: Fitted) -> None:
    """A7, H8: Shapley values, 0 for the silent; candidates have no bias, and for classes it is the linear one."""
    scores, context = fitted.scores[:6].copy(), {name: values[:6] for name, values in fitted.context.items()}
    scores[0, 1], scores[1, :2], scores[2] = np.nan, np.nan, np.nan
    fused = fitted.rule(scores, None, context).numpy()
    terms, bias = (part.numpy() for part in fitted.rule.contributions(scores, None, context))
    voiced = np.arange(6) != 2
    np.testing.assert_allclose((terms.sum(axis=1) + bias)[voiced], fused[voiced], atol=2e-5)
    assert (terms[np.isnan(scores)] == 0).all() and np.abs(terms[~np.isnan(scores)]).min() > 0
    expected = fitted.rule.state().get("bias", 0.0)
    np.testing.assert_allclose(bias[voiced], np.broadcast_to(expected, bias.shape)[voiced], atol=1e-6)


def test_members_may_fail_after_the_fit(fitted: Fitted) -> None:
    """H7, H8: without the noise member nothing is lost; without a, the half that b knows stays."""
    answers = {}
    for missing in range(3):
        mask = np.broadcast_to(np.arange(3) != missing, (len(fitted.scores), 3))
        answers[missing] = right(fitted.rule, fitted.scores, fitted.labels, fitted.context, mask)
    chance = 1 / fitted.scores.shape[2]
    assert answers[2] > fitted.right - 0.05
    assert min(answers[0], answers[1]) > chance + 0.05


@pytest.mark.parametrize(("name", "tolerance"), [("stacker_mlp", 0.01), ("stacker_gbdt", 0.1)])
def test_a_fit_is_seeded_and_the_order_of_members_hardly_matters(name: str, tolerance: float) -> None:
    """H5: whatever is drawn is drawn by name. What is left is rounding: it moves a network a little, and makes trees
    choose another of two questions that are equally good. Fitting again starts anew, and the state is all there is."""
    scores, labels, context = switching_classes(300, seed=0)
    rules = [make(name, "classes", members, passthrough=("x",)) for members in (("a", "b", "c"), ("c", "a", "b"))]
    order, fused = [2, 0, 1], []
    for rule, given in zip(rules, (scores, scores[:, order]), strict=True):
        first = fit(rule, given, labels, context)
        fused.append(rule(given, None, context).numpy())
        assert first["correction"]["steps"]
    assert np.sqrt(np.square(fused[0] - fused[1]).mean()) < tolerance * fused[0].std()
    assert fit(rules[1], scores[:, order], labels, context) == first
    restored = make(name, "classes", rules[1].members, passthrough=("x",))
    restored.load_state(rules[1].state())
    np.testing.assert_array_equal(restored(scores[:, order], None, context).numpy(), fused[1])


# ---- and nothing else


@pytest.mark.parametrize("name", NONLINEAR)
def test_shuffled_labels_leave_it_at_chance(name: str) -> None:
    """H5: the noise-label test, with a context to be misled by."""
    random = np.random.default_rng(3)
    scores, labels, context = switching_classes(1000, seed=2)
    rule = make(name, "classes", passthrough=("x",))
    report = fit(rule, scores, random.permutation(labels), context)
    fresh, truth, known = switching_classes(3000, seed=4)
    probabilities = rule.probabilities(rule(fresh, None, known)).numpy()
    assert report["loss_after"] > np.log(CLASSES) - 0.02
    assert abs(np.mean(probabilities.argmax(axis=1) == random.permutation(truth)) - 1 / CLASSES) < 0.03
    assert np.abs(probabilities - 1 / CLASSES).max() < 0.2

    scores, positives, context = switching_candidates(500, seed=2)
    rule = make(name, "candidates", passthrough=("x",))
    report = fit(rule, scores, random.permuted(positives, axis=1), context)
    fresh, truth, known = switching_candidates(500, seed=4)
    fused = rule(fresh, None, known).numpy()
    assert abs(roc_auc_score(random.permuted(truth, axis=1).ravel(), fused.ravel()) - 0.5) < 0.04
    assert report["loss_after"] > np.log(40) - 0.05


def test_it_serves_all_of_its_members() -> None:
    """H9: a correction counts on all members, so none can be left out of an artifact."""
    rule = make("stacker_mlp", "candidates")
    assert rule.used() == ("a", "b", "c") and rule.restricted(rule.used()) is rule
    with pytest.raises(ConfigError, match="serves all of its members"):
        rule.restricted(["a"])


# ---- the parts


def random_lists(seed: int = 0, rows: int = 5, inputs: int = 4, entries: int = 6) -> Lists:
    random = np.random.default_rng(seed)
    positives = random.random((rows, entries)) < 0.3
    positives[:, 0] = True
    weights = random.integers(0, 4, (rows, entries)).astype(float)
    weights[:, 0] = 1.0
    voiced = random.random((rows, entries)) < 0.8
    voiced[0, positives[0]] = False  # a list that teaches nothing
    return Lists(
        random.normal(size=(rows, inputs, entries)).astype(np.float32),
        random.normal(size=(rows, entries)).astype(np.float32),
        voiced, positives, weights, np.ones(rows),
    )  # fmt: skip


def test_newton_steps_are_the_derivatives_of_the_loss() -> None:
    """The target is -g / h and the weight h, by differences of the loss itself."""
    lists, step = random_lists(), 1e-4
    correction = np.random.default_rng(1).normal(size=lists.linear.shape)
    targets, weights = newton(lists, correction)
    found = np.zeros((2, *lists.linear.shape))
    found[:, lists.weights > 0] = targets * weights, weights
    for row, entry in np.ndindex(correction.shape):
        moved = [correction.copy() for _ in range(3)]
        moved[0][row, entry] -= step
        moved[2][row, entry] += step
        below, at, above = (lists.losses(m)[row] for m in moved)
        assert found[0, row, entry] == pytest.approx((below - above) / (2 * step), abs=1e-6)
        assert found[1, row, entry] == pytest.approx((below - 2 * at + above) / step**2, abs=1e-5)


def test_trees_are_those_of_scikit_learn() -> None:
    """H5: perfect trees over inputs answer as scikit-learn's over bins do, to 1e-6, also for values never seen."""
    random = np.random.default_rng(6)
    rows = random.normal(size=(3000, 5)).astype(np.float32)
    rows[:, 1] = np.round(rows[:, 1])
    rows[:, 2] = 7.0
    edges = [quantiles(column) for column in rows.T]
    target = rows[:, 0] * (rows[:, 1] > 0) + np.sin(3 * rows[:, 3])
    boosted = HistGradientBoostingRegressor(max_iter=20, max_depth=4, max_leaf_nodes=None, early_stopping=False)
    with threadpool_limits(1, "openmp"):
        boosted.fit(in_bins(rows, edges), target)
    asked, thresholds, leaves = perfect(trees_of_boosting(boosted), edges, 4)
    assert asked.shape == thresholds.shape == (20, 15) and leaves.shape == (20, 16)
    fresh = np.concatenate([random.normal(size=(500, 5)) * 2, rows[:500]]).astype(np.float32)
    expected = boosted.predict(in_bins(fresh, edges)) - boosted._baseline_prediction.ravel()
    inputs = tf.constant(fresh.reshape(2, 500, 5).transpose(0, 2, 1))
    numbers = [tf.constant(part, tf.float32) for part in (asked, thresholds, leaves)]
    found = sum_of_leaves(inputs, 20.0, *numbers).numpy()
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)
    np.testing.assert_array_equal(sum_of_leaves(inputs, 0.0, *numbers).numpy(), np.zeros((2, 500)))


def test_shortened_lists_keep_the_likely_and_stand_for_the_rest() -> None:
    """Of 200 classes 33 are left: the true one, the 24 likeliest others, and 8 that count for 175."""
    random = np.random.default_rng(7)
    linear = random.normal(size=(400, 200)).astype(np.float32)
    positives = np.arange(200) == random.integers(0, 200, 400)[:, None]
    whole = Lists(linear[:, None], linear, np.ones_like(positives), positives, np.ones(linear.shape), np.ones(400))
    short = shorten(whole, random)
    assert short.linear.shape == (400, 33) and short.positives.sum() == 400
    np.testing.assert_array_equal(short.inputs[:, 0], short.linear)
    np.testing.assert_allclose(short.weights.sum(axis=1), 200)
    best = np.sort(np.where(positives, -np.inf, linear), axis=1)[:, -24:]
    np.testing.assert_allclose(np.sort(short.linear[:, 1:25], axis=1), best)
    assert short.mean(short.losses(0.0)) == pytest.approx(whole.mean(whole.losses(0.0)), abs=0.05)  # without: 1.2 less
    assert shorten(short, random) is short


def test_a_fitted_rule_is_exported(tmp_path: Path) -> None:
    """H5: a network and trees, fitted, are the same in memory, in a SavedModel and in LiteRT (builtin operations)."""
    rules = {name: world_fitted(name, "candidates").rule for name in NONLINEAR}
    scores, _, context = switching_candidates(1, seed=2)

    def serve(scores: Any, x: Any) -> dict[str, Any]:
        answers = {}
        for name, rule in rules.items():
            answers[name] = rule(scores, context={"x": x})
            answers[f"{name}_terms"] = rule.contributions(scores, context={"x": x})[0]
        return answers

    module = tf.Module()
    module.kept = [variable for rule in rules.values() for variable in rule.variables]
    signature = [tf.TensorSpec((1, 3, 40), tf.float32, "scores"), tf.TensorSpec((1, 40), tf.float32, "x")]
    module.serve = tf.function(serve, input_signature=signature)
    given = {"scores": scores, "x": context["x"]}
    scores[0, 0, 3] = np.nan
    expected = serve(**given)
    tf.saved_model.save(module, str(tmp_path))
    saved = tf.saved_model.load(str(tmp_path))
    loaded = saved.serve(**{name: tf.constant(values) for name, values in given.items()})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    from ai_edge_litert.interpreter import Interpreter

    lite = Interpreter(model_content=converter.convert()).get_signature_runner()(**given)
    for found in (loaded, lite):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
