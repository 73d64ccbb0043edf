"""H3: members are calibrated one by one before they are fused, by four methods that one key chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from fusion.compat import tf
from fusion.errors import DataError
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.rules.calibration import CALIBRATIONS, KNOTS, STEP, Method, curve, fit_curve, fit_temperature

FITTED: tuple[Method, ...] = ("temperature", "platt", "isotonic")


def make(name: str, calibration: Method, members: tuple[str, ...] = ("a", "b"), **options: Any) -> Rule:
    return RULES[name](RULES[name].Config(calibration=calibration, **options), members, "classes")


def answers(
    rows: int, seed: int, *, classes: int = 5, overconfident: float = 3.0, biased: float = 0.0, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, C]` and labels. The true logits are known, and multiplied; noise gives a share of rows any label."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    true = 2.0 * (random.normal(size=(rows, classes)) + 2.0 * np.eye(classes)[labels])
    labels = np.where(random.random(rows) < noise, random.integers(0, classes, rows), labels)
    tilt = biased * np.cos(np.arange(classes))
    return (overconfident * true + overconfident * tilt).astype(np.float32), labels


def calibrated(method: Method, logits: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Log-probabilities `[M, C]` of one member, fitted on some rows and asked for others."""
    numbers = CALIBRATIONS[method].fit(logits, labels, np.ones(len(labels)))
    tensors = {name: tf.constant(value[None], tf.float32) for name, value in numbers.items()}
    scores = CALIBRATIONS[method].scores(tf.constant(asked[:, None]), tensors).numpy()
    return log_softmax(scores[:, 0].astype(np.float64), axis=1)


def log_loss(logs: np.ndarray, labels: np.ndarray) -> float:
    return float(-logs[np.arange(len(labels)), labels].mean())


def calibration_error(logs: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error over 15 bins of equal width, row by row."""
    bins: dict[int, list[float]] = {}
    for row, label in zip(np.exp(logs), labels, strict=True):
        found = bins.setdefault(min(int(row.max() * 15), 14), [])
        found.append(float(row.argmax() == label) - row.max())
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(labels)


# ---- each method against a slow version


def imagined(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Targets of which 10 rows' worth are the member's own probabilities."""
    share = 10.0 / (len(labels) + 10.0)
    return share * softmax(logits.astype(np.float64), axis=1) + (1.0 - share) * np.eye(logits.shape[1])[labels]


def test_the_temperature_is_the_best_of_many() -> None:
    """H3: no temperature of a fine grid has a smaller cross-entropy with the targets."""
    logits, labels = answers(60, seed=1)
    targets, grid = imagined(logits, labels), np.geomspace(0.5, 10.0, 4000)
    losses = [-(targets * log_softmax(logits / t, axis=1)).sum() for t in grid]
    assert fit_temperature(logits, labels) == pytest.approx(grid[np.argmin(losses)], rel=2e-3)


def test_platt_is_the_minimum_that_a_general_minimiser_finds() -> None:
    """H3: cross-entropy with the targets, and 10/2 times the squares of biases."""
    logits, labels = answers(80, seed=2, classes=3, biased=2.0)
    targets = imagined(logits, labels)

    def penalised(parameters: np.ndarray) -> float:
        logs = log_softmax(logits * np.exp(parameters[0]) + parameters[1:], axis=1)
        return float(-(targets * logs).sum() + 5.0 * (parameters[1:] ** 2).sum())

    options = {"xatol": 1e-6, "fatol": 1e-9, "maxiter": 10_000, "maxfev": 10_000}
    best = minimize(penalised, np.zeros(4), method="Nelder-Mead", options=options).x
    numbers = CALIBRATIONS["platt"].fit(logits, labels, np.ones(80))
    assert 1.0 / numbers["temperatures"] == pytest.approx(np.exp(best[0]), rel=1e-3)
    np.testing.assert_allclose(numbers["platt_biases"], best[1:], atol=2e-3)
    assert np.abs(best[1:]).max() > 0.3


def test_platt_of_two_classes_is_the_sigmoid_of_platt() -> None:
    """H3: with plenty of rows it is a logistic regression on the difference of the logits."""
    logits, labels = answers(4000, seed=3, classes=2, overconfident=2.0, biased=1.0)
    known = LogisticRegression(C=np.inf).fit((logits[:, 1] - logits[:, 0])[:, None], labels)
    asked = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) * 4
    expected = known.predict_log_proba((asked[:, 1] - asked[:, 0])[:, None])
    np.testing.assert_allclose(np.exp(calibrated("platt", logits, labels, asked)), np.exp(expected), atol=0.01)


def test_the_curve_follows_scikit_learn() -> None:
    """H3: of many pairs of row and class the curve is scikit-learn's isotonic regression but for its few corners."""
    logits, labels = answers(3000, seed=4, overconfident=1.0, noise=0.2)
    logs = log_softmax(logits.astype(np.float64), axis=1)
    knots = fit_curve(logs, labels, np.ones(3000))
    known = IsotonicRegression(out_of_bounds="clip").fit(np.exp(logs).ravel(), np.eye(5)[labels].ravel())
    asked = np.linspace(0.02, 0.98, 97)
    ours = np.exp(curve(tf.constant(np.log(asked)[None, None]), tf.constant(knots[None])).numpy()[0, 0])
    assert np.abs(ours - known.predict(asked)).mean() < 0.025
    assert known.predict([0.99])[0] < 0.9, "a fifth of the labels is noise: nothing comes true more often than that"


def test_the_curve_by_hand() -> None:
    """100 rows say (0.75, 0.25) and 60 are right: .75 comes true .6, .25 comes true .4, less what 10 rows imagine."""
    logs = np.log(np.tile([0.75, 0.25], (100, 1)))
    labels = (np.arange(100) >= 60).astype(int)
    knots = fit_curve(logs, labels, np.ones(100))
    right = (100 * 0.6 + 10 * 0.75) / 110
    np.testing.assert_allclose(knots[0, :2], np.log([0.25, 0.75]), atol=STEP)
    np.testing.assert_allclose(knots[1, :2], np.log([1 - right, right]), atol=STEP)
    # 90 of 100 right, then 80: the second bin must not fall below the first, so both are 85 in 100
    falling = np.concatenate([np.tile([0.8, 0.2], (100, 1)), np.tile([0.9, 0.1], (200, 1))])
    labels = np.concatenate([np.arange(100) >= 90, np.arange(200) >= 160]).astype(int)
    knots = fit_curve(np.log(falling), labels, np.full(300, 1e6))
    rates = np.exp(knots[1])
    assert rates[:2] == pytest.approx([50 / 300, 250 / 300], abs=1e-3)


def test_ramps_draw_the_lines_between_corners_and_slope_one_beyond() -> None:
    random = np.random.default_rng(5)
    at = np.cumsum(random.uniform(0.1, 1.0, (2, KNOTS)), axis=1) - 9.0
    values = np.cumsum(random.uniform(0.0, 1.0, (2, KNOTS)), axis=1) - 9.0
    asked = np.linspace(-12, 3, 300)
    drawn = curve(tf.constant(np.tile(asked, (1, 2, 1))), tf.constant(np.stack([at, values], axis=1))).numpy()[0]
    for s in range(2):
        expected = np.interp(asked, at[s], values[s])
        expected += np.minimum(asked - at[s, 0], 0) + np.maximum(asked - at[s, -1], 0)
        np.testing.assert_allclose(drawn[s], expected, atol=1e-9)
        assert (np.diff(drawn[s]) >= 0).all()


# ---- what calibrating is for


@pytest.mark.parametrize("method", FITTED)
def test_an_overconfident_member_is_calibrated(method: Method) -> None:
    """H3: on rows that were not fitted the calibration error and the log-loss fall."""
    logits, labels = answers(400, seed=6)
    asked, truth = answers(4000, seed=7)
    before, after = log_softmax(asked.astype(np.float64), axis=1), calibrated(method, logits, labels, asked)
    assert calibration_error(before, truth) > 0.08
    assert calibration_error(after, truth) < 0.03
    assert log_loss(after, truth) < 0.8 * log_loss(before, truth)


def test_each_method_mends_what_the_one_before_cannot() -> None:
    """H3: biases mend a tilt between classes, a curve mends certainty that noise forbids; a temperature neither."""
    fitted, (asked, truth) = answers(1000, seed=8, biased=3.0), answers(4000, seed=9, biased=3.0)
    tilted = {method: calibrated(method, *fitted, asked) for method in FITTED}
    assert log_loss(tilted["platt"], truth) < 0.9 * log_loss(tilted["temperature"], truth)
    right = {method: (logs.argmax(axis=1) == truth).mean() for method, logs in tilted.items()}
    assert right["platt"] > right["temperature"] + 0.02 and right["isotonic"] == right["temperature"]
    fitted, (asked, truth) = answers(1000, seed=10, noise=0.2), answers(4000, seed=11, noise=0.2)
    noisy = {method: calibrated(method, *fitted, asked) for method in FITTED}
    assert log_loss(noisy["isotonic"], truth) < 0.97 * log_loss(noisy["temperature"], truth)
    assert calibration_error(noisy["isotonic"], truth) < 0.5 * calibration_error(noisy["temperature"], truth)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_the_order_of_classes_stays(method: Method) -> None:
    logits, labels = answers(500, seed=12, noise=0.3, classes=12)
    asked, _ = answers(1000, seed=13, classes=12)
    after = calibrated(method, logits, labels, asked)
    np.testing.assert_array_equal(np.argsort(after, axis=1, kind="stable"), np.argsort(asked, axis=1, kind="stable"))


@pytest.mark.parametrize("method", FITTED)
def test_few_rows_do_not_make_it_certain(method: Method) -> None:
    """Five right answers: without the imagined rows the temperature would be the least there is."""
    logits = np.eye(5, dtype=np.float32) * 2
    asked, truth = answers(500, seed=14, overconfident=1.0)
    after = calibrated(method, logits, np.arange(5), asked)
    plain = log_softmax(asked.astype(np.float64), axis=1)
    assert log_loss(after, truth) < log_loss(plain, truth) + 0.05
    # And with few rows for many classes nothing is made worse than one temperature makes it.
    few, many = answers(60, seed=15, classes=40), answers(2000, seed=16, classes=40)
    one = log_loss(calibrated("temperature", *few, many[0]), many[1])
    assert log_loss(calibrated(method, *few, many[0]), many[1]) < 1.02 * one


@pytest.mark.parametrize("method", FITTED)
def test_the_weight_of_a_row_is_how_often_it_counts(method: Method) -> None:
    logits, labels = answers(200, seed=17, biased=1.0)
    times = np.random.default_rng(18).integers(1, 4, 200)
    weighted = CALIBRATIONS[method].fit(logits, labels, times.astype(float))
    repeated = CALIBRATIONS[method].fit(
        np.repeat(logits, times, axis=0), np.repeat(labels, times), np.ones(times.sum())
    )
    for name, value in weighted.items():
        np.testing.assert_allclose(value, repeated[name], rtol=1e-3, atol=1e-3)


# ---- in rules


@pytest.mark.parametrize("method", FITTED)
def test_a_member_is_fitted_where_it_speaks_and_left_alone_where_it_never_does(method: Method) -> None:
    """H3, H8: rows on which a member is silent do not count, whatever stands there."""
    logits, labels = answers(300, seed=19)
    scores = np.stack([logits, logits, logits], axis=1)
    mask = np.ones((300, 3), bool)
    mask[200:, 1], mask[:, 2] = False, False
    scores[200:, 1], scores[:, 2] = 99.0, np.nan
    rule = make("average", method, ("a", "b", "c"))
    report = rule.fit(scores, mask, labels)
    state, alone = rule.state(), CALIBRATIONS[method].fit(logits[:200], labels[:200], np.ones(200))
    identity = CALIBRATIONS[method].identity(3, 5)
    assert set(state) == set(identity)
    for name, value in state.items():
        np.testing.assert_allclose(value[1], alone[name], rtol=1e-5)
        np.testing.assert_array_equal(value[2], identity[name][2])
    assert report["temperatures"]["a"] > 2 and report["temperatures"]["c"] == 1.0
    whole = rule.calibrated(logits[:, None].repeat(3, axis=1)).numpy()
    np.testing.assert_allclose(whole[:, 2], softmax(logits, axis=1), atol=1e-5)
    cut = rule.restricted(["b", "c"]).calibrated(logits[:, None].repeat(2, axis=1)).numpy()
    np.testing.assert_allclose(cut, whole[:, 1:], rtol=1e-5)


def test_without_calibration_members_are_as_they_are() -> None:
    logits, labels = answers(50, seed=20)
    scores = np.stack([logits, -logits], axis=1)
    rule = make("average", "none")
    assert not rule.learned and rule.state() == {}
    np.testing.assert_allclose(rule.calibrated(scores).numpy(), softmax(scores, axis=2), rtol=1e-4, atol=1e-6)
    report = make("greedy", "none").fit(scores, None, labels)
    assert "temperatures" not in report and "weights" in report


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_takes_calibrated_members(name: str) -> None:
    """H3: fitted, saved and loaded; members of unequal worth, one of them overconfident."""
    logits, labels = answers(150, seed=21, classes=4)
    scores = np.stack([logits, np.random.default_rng(22).normal(size=logits.shape).astype(np.float32)], axis=1)
    rule = make(name, "isotonic")
    context = {read: np.arange(150, dtype=np.float32)[:, None] for read in rule.reads(rule.config)}
    report = rule.fit(scores, None, labels, context=context)
    assert report["loss_after"] <= report["loss_before"] + 1e-6 and report["temperatures"]["a"] > 1.5
    fused = rule(scores, context=context).numpy()
    assert np.isfinite(fused).all()
    again = make(name, "isotonic")
    again.load_state(rule.state())
    np.testing.assert_array_equal(again(scores, context=context).numpy(), fused)
    with pytest.raises(DataError, match="Fit the rule again"):
        make(name, "isotonic").load_state({**rule.state(), "temperatures": np.ones(3)})


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_fitted_calibrations_are_the_same_in_litert(method: Method) -> None:
    """H3: the calibration is part of the exported graph, builtin operations only."""
    from ai_edge_litert.interpreter import Interpreter

    logits, labels = answers(600, seed=23, biased=1.0, noise=0.15)
    asked = answers(8, seed=24)[0]
    rule = make("average", method)
    rule.fit(np.stack([logits, logits[:, ::-1]], axis=1), None, labels)
    scores = np.stack([asked, asked[:, ::-1]], axis=1)
    serve = tf.function(rule.calibrated, input_signature=[tf.TensorSpec([8, 2, 5], tf.float32, "scores")])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([serve.get_concrete_function()], rule)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    runner = Interpreter(model_content=converter.convert()).get_signature_runner()
    (found,) = runner(scores=scores).values()
    np.testing.assert_allclose(found, rule.calibrated(scores).numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(found - softmax(scores, axis=2)).max() > 0.05
