"""Weights learned by gradient, and the gate: worked by hand, on planted worlds, and against slow versions of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize as scipy_minimize
from scipy.special import logsumexp, softmax

from fusion.config import parse
from fusion.errors import ConfigError, DataError
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.types import Over

CLASSES = 4
BOTH = pytest.mark.parametrize("over", ["classes", "candidates"])


def make(name: str, over: Over, members: tuple[str, ...] = ("a", "b"), **options: Any) -> Rule:
    return RULES[name](RULES[name].Config(**options), members, over)


def state_of(rule: Rule, **changed: Any) -> dict[str, np.ndarray]:
    return {**rule.state(), **{key: np.asarray(value, np.float32) for key, value in changed.items()}}


def logits(*probabilities: list[float]) -> np.ndarray:
    """One row of classes, `[1, S, C]`, from the members' probabilities."""
    return np.log(np.array([probabilities], np.float32))


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


# ---- worked by hand

P, Q = [0.5, 0.3, 0.2], [0.1, 0.8, 0.1]


def test_segments_by_hand() -> None:
    """H4a: common odds 3:1; the upper segment multiplies b's by 9; an unknown number leaves the common weights."""
    rule = make("learned", "classes", segments={"words": 2})
    departures = [[0, 0], [0, np.log(9)]]
    rule.load_state(state_of(rule, common=[np.log(3), 0], of_segments=departures, bounds=[[-1e30, 2], [2, 1e30]]))
    rows = np.repeat(logits(P, Q), 4, axis=0)
    fused = rule(rows, context={"words": column(2, 2.5, np.nan, np.inf)}).numpy()
    three_to_one, one_to_three = 0.75 * np.array(P) + 0.25 * np.array(Q), 0.25 * np.array(P) + 0.75 * np.array(Q)
    np.testing.assert_allclose(fused, [three_to_one, one_to_three, three_to_one, three_to_one], atol=1e-5)


def test_weights_per_class_by_hand() -> None:
    """H4a: class 0 trusts a (3:1), class 1 trusts b (1:3), class 2 both; H8: a silent member leaves the other."""
    rule = make("learned", "classes", per_class=True)
    rule.load_state(state_of(rule, common=[0, 0], of_classes=[[np.log(3), 0], [0, np.log(3)], [0, 0]]))
    rows = np.concatenate([logits(P, Q), logits(P, Q)])
    rows[1, 1] = np.nan
    fused = rule(rows).numpy()
    np.testing.assert_allclose(fused, np.array([[0.4, 0.675, 0.15], P]), atol=1e-5)
    np.testing.assert_allclose(rule.probabilities(fused).numpy()[0], np.array([0.4, 0.675, 0.15]) / 1.225, atol=1e-5)


def test_gate_over_candidates_by_hand() -> None:
    """H6: weights from the history and each candidate's popularity; a silent member's place is taken by the others."""
    rule = make("gate", "candidates", ("a", "b", "c"), normalisation="none")
    assert rule.reads(rule.config) == ("history_length", "popularity")
    gate = np.zeros((3, 5))
    gate[0, 0] = np.log(2)  # a counts more with each deviation of history
    gate[1, 1] = np.log(3)  # b with popularity
    gate[1, 4] = np.log(5)  # and where c is silent
    rule.load_state(state_of(rule, gate=gate, scale=[[10, 5], [0, 1]]))
    scores = np.array([[[1, 2, 9], [10, 20, 9], [100, np.nan, 9]]] * 2, np.float32)
    context = {"history_length": column(15, np.nan), "popularity": np.array([[0.0, 1.0, 0.0]], np.float32)}
    fused = rule(scores, context=context).numpy()
    # weights of user 0: 2:1:1 and 2:15; of user 1, whose history is not known: 1:1:1 and 1:15
    expected = np.array([[(2 + 10 + 100) / 4, (4 + 300) / 17, 9], [111 / 3, (2 + 300) / 16, 9]])
    np.testing.assert_allclose(fused, expected, rtol=1e-5)
    terms = rule.contributions(scores, context=context)[0].numpy()
    np.testing.assert_allclose(terms[0, :, :2], np.array([[0.5, 4 / 17], [2.5, 300 / 17], [25, 0]]), rtol=1e-5)


def test_gate_over_classes_by_hand() -> None:
    """H6: b counts e^2 as much per deviation of its own confidence; the silent have the mean confidence."""
    rule = make("gate", "classes", context=())
    gate = np.zeros((2, 4))
    gate[1, 1] = 2.0
    rule.load_state(state_of(rule, gate=gate, scale=[[0, 1], [0.6, 0.1]]))
    w = np.exp(2 * (0.8 - 0.6) / 0.1)
    expected = (np.array(P) + w * np.array(Q)) / (1 + w)
    np.testing.assert_allclose(rule(logits(P, Q)).numpy()[0], expected, atol=1e-5)
    silent = rule(logits(P, Q), mask=np.array([[True, False]]))
    np.testing.assert_allclose(silent.numpy()[0], P, atol=1e-5)


def test_a_hidden_layer_by_hand() -> None:
    """H6: weights softmax(W tanh(A x + a) + b)."""
    rule = make("gate", "candidates", context=("popularity",), hidden=1, normalisation="none")
    numbers = {"hidden": [[2.0, 0, 0]], "hidden_bias": [[0.5]], "gate": [[1.5], [0]], "gate_bias": [[0], [0.25]]}
    rule.load_state(state_of(rule, **numbers))
    fused = rule(np.array([[[1.0, 2.0], [0.0, 5.0]]], np.float32), context={"popularity": column(0.3)}).numpy()
    np.testing.assert_allclose(fused[0, 0], softmax([1.5 * np.tanh(2 * 0.3 + 0.5), 0.25])[0], rtol=1e-5)


# ---- planted worlds: a is right about short histories, b about long ones


def halves(rows: int, seed: int, over: Over) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of two members, labels, and history `[N, 1]`: a knows where it is below 0, b where it is above."""
    random = np.random.default_rng(seed)
    history = random.normal(size=(rows, 1)).astype(np.float32)
    knows = np.stack([history[:, 0] < 0, history[:, 0] >= 0], axis=1)[:, :, None]
    wide = CLASSES if over == "classes" else 10
    labels = np.eye(wide, dtype=bool)[random.integers(0, wide, rows)]
    scores = random.normal(size=(rows, 2, wide)) + 2.5 * labels[:, None] * knows
    return scores.astype(np.float32), labels, history


def target(labels: np.ndarray, over: Over) -> np.ndarray:
    return labels.argmax(axis=1) if over == "classes" else labels


def fitted(rule: Rule, scores: np.ndarray, labels: np.ndarray, history: np.ndarray, **options: Any) -> dict[str, Any]:
    given = scores if rule.over == "classes" else rule.normalise(scores).numpy()
    context = {name: history for name in rule.reads(rule.config)}
    return rule.fit(given, None, target(labels, rule.over), context=context, **options)


def goodness(rule: Rule, scores: np.ndarray, labels: np.ndarray, history: np.ndarray) -> float:
    """Mean logarithm of the likelihood of classes, mean reciprocal rank over candidates."""
    fused = rule(scores, context={name: history for name in rule.reads(rule.config)})
    if rule.over == "classes":
        return float(np.log(rule.probabilities(fused).numpy()[labels]).mean())
    values = fused.numpy()
    return float((1 / (1 + (values > values[labels][:, None]).sum(axis=1))).mean())


ADAPTIVE = [
    ("learned", {"segments": {"history_length": 2}}),
    ("gate", {"context": ("history_length",)}),
]


@BOTH
@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_who_is_right_when_is_found(name: str, options: dict[str, Any], over: Over) -> None:
    """A8, H6, H4a: on rows that were not fitted on, better than every constant weighting by far."""
    fresh = halves(1500, 1, over)
    rule = make(name, over, shrinkage=3.0, **options)
    report = fitted(rule, *halves(500, 0, over))
    constant = []
    for share in np.linspace(0, 1, 11):
        fixed = make("probability", over, weights={"a": share, "b": 1 - share})
        if over == "classes":
            fixed.load_state({**fixed.state(), "temperatures": rule.state()["temperatures"]})
        constant.append(goodness(fixed, *fresh))
    assert goodness(rule, *fresh) > max(constant) + (0.15 if over == "classes" else 0.1)
    assert report["loss_after"] < report["loss_before"] - 0.1
    assert 0.35 < report["weights"]["a"] < 0.65
    if name == "learned":
        low, high = report["segments"]["history_length"]
        assert low["weights"]["a"] > 0.7 > 0.3 > high["weights"]["a"]
        assert low["up_to"] == pytest.approx(0.0, abs=0.15) and high["up_to"] is None


def test_a_hidden_layer_finds_what_a_line_cannot() -> None:
    """H6: a is right in the middle of the range, b at both ends."""

    def world(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores, labels, history = halves(rows, seed, "candidates")
        outside = np.abs(history[:, 0]) > 0.67
        swapped = outside != (history[:, 0] >= 0)
        return np.where(swapped[:, None, None], scores[:, ::-1], scores), labels, history

    found = {}
    for hidden in (0, 8):
        rule = make("gate", "candidates", context=("history_length",), hidden=hidden, shrinkage=1.0)
        fitted(rule, *world(300, 0))
        found[hidden] = goodness(rule, *world(1500, 1))
    assert found[8] > found[0] + 0.1


def test_the_gate_hears_who_is_sure() -> None:
    """H6: a knows a third of the rows and says so by its logits; where it is sure the gate follows it."""

    def world(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        labels = np.eye(CLASSES, dtype=bool)[random.integers(0, CLASSES, rows)]
        scores = random.normal(size=(rows, 2, CLASSES)) * 0.7
        scores[:, 0] += 4.0 * labels * (random.random((rows, 1)) < 1 / 3)
        scores[:, 1] += 1.0 * labels
        return scores.astype(np.float32), labels

    found = {}
    fresh, truth = world(3000, 1)
    for confidence in (False, True):
        rule = make("gate", "classes", context=(), confidence=confidence, shrinkage=1.0)
        report = fitted(rule, *world(800, 0), np.zeros((800, 1)))
        found[confidence] = goodness(rule, fresh, truth, np.zeros((3000, 1)))
    assert found[True] > found[False] + 0.03
    assert report["coefficients"]["confidence of a"]["a"] > report["coefficients"]["confidence of a"]["b"] + 0.5


# ---- robustness

SHRUNK = [
    ("learned", {"segments": {"history_length": 3}}),
    ("gate", {"context": ("history_length",)}),
    ("gate", {"context": ("history_length",), "hidden": 4}),
]


@BOTH
@pytest.mark.parametrize(("name", "options"), SHRUNK)
def test_nothing_to_learn_or_few_rows_leave_equal_weights(name: str, options: dict[str, Any], over: Over) -> None:
    """A10: by default neither shuffled labels nor a handful of rows move a weight far from 1/2, anywhere."""
    scores, labels, history = halves(500, 0, over)
    shuffled = np.random.default_rng(1).permuted(labels, axis=1)
    for few, rows in ((shuffled, 500), (labels, 10)):
        rule = make(name, over, **options)
        fitted(rule, scores[:rows], few[:rows], history[:rows])
        moved = np.abs(weights_of(rule, scores, history) - 0.5)
        assert moved.max() < 0.2 and moved.mean() < 0.06


def weights_of(rule: Rule, scores: np.ndarray, history: np.ndarray) -> np.ndarray:
    """The weight of each member on each row, `[N, S]`: its contribution where all members say 1."""
    context = {name: history for name in rule.reads(rule.config)}
    features = np.ones_like(scores) if rule.over == "candidates" else rule.normalise(scores).numpy()
    terms = rule.weigh(features, None, context)[0].numpy()
    return (terms / features)[:, :, 0]


def test_a_segment_with_few_rows_keeps_the_common_weights() -> None:
    """H4a: shrinkage is towards the common weights, and those are towards equal ones."""
    labels = halves(600, 0, "classes")[1]
    noise = np.random.default_rng(1).normal(size=(600, 2, CLASSES))
    noise[:, 0] += 2.5 * labels  # a knows, but
    noise[:5] = noise[:5, ::-1]  # in the five rows that are above the median it is b
    few = (np.arange(600) < 5).astype(np.float32)[:, None]
    rule = make("learned", "classes", segments={"history_length": 2}, shrinkage=10.0)
    low, high = fitted(rule, noise.astype(np.float32), labels, few)["segments"]["history_length"]
    assert low["weights"]["a"] > 0.9
    assert low["weights"]["a"] - 0.25 < high["weights"]["a"] < low["weights"]["a"] - 0.01


@BOTH
@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_a_missing_member_is_made_up_for(name: str, options: dict[str, Any], over: Over) -> None:
    """H6, H8: fitted with member dropout, the rest answer by renormalised weights, and alone each is itself."""
    rule = make(name, over, ("a", "b", "c"), **options)
    scores, labels, history = halves(300, 0, over)
    third = scores[:, :1] + np.random.default_rng(2).normal(size=scores[:, :1].shape)
    scores = np.concatenate([scores, third.astype(np.float32)], axis=1)
    fitted(rule, scores, labels, history)
    context = {key: history for key in rule.reads(rule.config)}
    for silent in ([2], [0, 1]):
        mask = ~np.isin(np.arange(3), silent)[None].repeat(300, axis=0)
        terms, bias = (part.numpy() for part in rule.contributions(scores, mask, context))
        fused = rule(scores, mask=mask, context=context).numpy()
        np.testing.assert_allclose(terms.sum(axis=1) + bias, fused, atol=1e-6)
        assert (terms[:, silent] == 0).all()
        features = rule.normalise(scores, mask).numpy()
        shares = np.nan_to_num(terms[:, :, 0] / features[:, :, 0])[features[:, 0, 0] != 0]
        np.testing.assert_allclose(shares.sum(axis=1)[np.isfinite(shares).all(axis=1)], 1.0, atol=1e-4)
        # Over these members alone it is the same rule.
        kept = [name for s, name in enumerate(rule.members) if s not in silent]
        places = [s for s in range(3) if s not in silent]
        part = rule.restricted(kept)(scores[:, places], context=context).numpy()
        np.testing.assert_allclose(part, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "over"), [(*ADAPTIVE[0], "classes"), (*SHRUNK[2], "candidates")])
def test_the_order_of_members_does_not_matter_to_the_fit(name: str, options: dict[str, Any], over: Over) -> None:
    """H8: members are dropped, and hidden units drawn, by name; the same seed gives the same numbers."""
    scores, labels, history = halves(100, 0, over)
    forward, backward = make(name, over, **options), make(name, over, ("b", "a"), **options)
    first, second = fitted(forward, scores, labels, history), fitted(backward, scores[:, ::-1], labels, history)
    for member, weight in first["weights"].items():
        assert second["weights"][member] == pytest.approx(weight, abs=2e-3)
    again = fitted(make(name, over, **options), scores, labels, history)
    assert again == first
    assert fitted(make(name, over, **options), scores, labels, history, seed=1)["history"] != first["history"]


# ---- the minimum


def test_the_course_of_the_fit_is_told() -> None:
    """H4a: the loss after each iteration, from equal weights downward."""
    rule = make("learned", "candidates", shrinkage=3.0, member_dropout=0.0)
    scores, labels, history = halves(200, 0, "candidates")
    scores[:, 1] = np.random.default_rng(3).normal(size=scores[:, 1].shape)
    report = fitted(rule, scores, labels, history)
    course = report["history"]
    assert len(course) == report["iterations"] + 1 > 3
    assert course[0] == pytest.approx(report["loss_before"]) and (np.diff(course) <= 0).all()
    assert report["loss_after"] <= course[-1] < course[0] - 0.01


def test_class_weights_are_the_minimum_of_the_penalised_loss() -> None:
    """H4a: against a slow version in plain NumPy, minimised without gradients' help of ours."""
    scores, labels, history = halves(150, 0, "classes")
    options: dict[str, Any] = {
        "per_class": True,
        "segments": {"history_length": 2},
        "calibration": "none",
        "member_dropout": 0.0,
    }
    rule = make("learned", "classes", shrinkage=4.0, **options)
    fitted(rule, scores, labels, history)
    chosen = labels.argmax(axis=1)
    segment = (history[:, 0] > np.median(history)).astype(int)
    probabilities = softmax(scores.astype(np.float64), axis=2)

    def penalised(parameters: np.ndarray) -> float:
        common, classes, segments = parameters[:2], parameters[2:10].reshape(4, 2), parameters[10:].reshape(2, 2)
        w = softmax(common[None, :, None] + classes.T[None] + segments[segment][:, :, None], axis=1)
        fused = (w * probabilities).sum(axis=1)
        loss = -np.log(fused[np.arange(150), chosen] / fused.sum(axis=1)).sum()
        return float(loss + 4.0 / 2 * parameters @ parameters)

    best = scipy_minimize(penalised, np.zeros(14), method="BFGS", options={"gtol": 1e-6}).x
    state = rule.state()
    learned = np.concatenate([state["common"], state["of_classes"].ravel(), state["of_segments"].ravel()])
    np.testing.assert_allclose(learned, best, atol=2e-3)


def test_gate_over_candidates_is_the_minimum_of_the_penalised_loss() -> None:
    """H6: candidates that stand for several, padding, and a context of the candidates, in plain NumPy."""
    random = np.random.default_rng(5)
    features = random.normal(size=(60, 2, 6)).astype(np.float32)
    features[3, 0, 2] = features[5, 1, :] = np.nan
    popularity = random.normal(size=(60, 6)).astype(np.float32)
    positives = np.eye(6, dtype=bool)[random.integers(0, 5, 60)]
    counts = np.where(positives, 1.0, random.integers(1, 5, size=(60, 6)))
    counts[:, 5] = 0.0
    popularity[:, 5] = 50.0  # padding must not count in the scale of the context
    rule = make("gate", "candidates", context=("popularity",), shrinkage=2.0, member_dropout=0.0)
    report = rule.fit(features, None, positives, counts, {"popularity": popularity})
    known = popularity[:, :5].astype(np.float64)
    x = (popularity - known.mean()) / known.std()
    speaks = np.isfinite(features)
    values = np.where(speaks, features, 0.0)

    def loss(parameters: np.ndarray) -> float:
        gate, bias, scale = parameters[:6].reshape(2, 3), parameters[6:8], parameters[8]
        inputs = np.stack([x, ~speaks[:, 0], ~speaks[:, 1]], axis=1)
        z = np.where(speaks, np.einsum("sf,nfk->nsk", gate, inputs) + bias[None, :, None], -1e9)
        fused = np.exp(scale) * (softmax(z, axis=1) * values).sum(axis=1)
        masses = np.where(counts > 0, fused + np.log(np.maximum(counts, 1e-9)), -1e9)
        return float((logsumexp(masses, axis=1) - (fused * positives).sum(axis=1)).sum())

    def with_equal_weights(scale: np.ndarray) -> float:
        return loss(np.append(np.zeros(8), scale)) + float(scale[0]) ** 2 / 2

    equal = scipy_minimize(with_equal_weights, np.zeros(1), method="BFGS", options={"gtol": 1e-6}).x[0]

    def penalised(parameters: np.ndarray) -> float:
        return loss(parameters) + float(parameters[:8] @ parameters[:8] * 2 + (parameters[8] - equal) ** 2) / 2

    best = scipy_minimize(penalised, np.zeros(9), method="BFGS", options={"gtol": 1e-6})
    learned = np.concatenate([rule.state()["gate"].ravel(), rule.state()["gate_bias"].ravel()])
    np.testing.assert_allclose(learned, best.x[:8], atol=5e-3)
    assert report["history"][-1] == pytest.approx(best.fun / 60, abs=1e-5)


# ---- settings


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("learned", {"segments": {"words": 1}}, "rules.segments.words"),
        ("learned", {"segments": {"a": 2, "b": 2, "c": 2}}, "rules.segments"),
        ("learned", {"shrinkage": 0}, "rules.shrinkage"),
        ("gate", {"hidden": -1}, "rules.hidden"),
        ("gate", {"member_dropout": 1.0}, "rules.member_dropout"),
        ("gate", {"contexts": ["words"]}, "did you mean 'context'"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(RULES[name].Config, data, "rules")


def test_what_is_read_must_be_given() -> None:
    """A8: the defaults by what is fused, and an error that names what is missing."""
    assert RULES["gate"].reads(RULES["gate"].Config()) == ()
    rule = make("gate", "classes")
    assert rule.reads(rule.config) == ("words",)
    with pytest.raises(DataError, match="reads words; words is not given"):
        rule(logits(P, Q))
