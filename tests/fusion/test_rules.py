"""Fusion rules against tables worked by hand, and what the learned ones learn (H1, H2, H3, H5, H8)."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize as scipy_minimize
from scipy.special import log_softmax, softmax
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

from fusion.compat import keras
from fusion.config import parse
from fusion.errors import ConfigError, DataError
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.rules.calibration import fit_temperature
from fusion.rules.greedy import forward_selection, sampled_ndcg
from fusion.rules.normalisation import speaking_candidates, standardise
from fusion.rules.vote import smallest_margin
from fusion.types import Over


def make(name: str, over: Over, members: tuple[str, ...] = ("a", "b", "c"), **options: Any) -> Rule:
    return RULES[name](RULES[name].Config(**options), members, over)


def logits(*probabilities: list[float]) -> np.ndarray:
    """One row of classes, `[1, S, C]`, from the members' probabilities."""
    return np.log(np.array([probabilities], np.float32))


def ranked(*scores: list[float]) -> np.ndarray:
    """One user's candidates, `[1, S, C]`."""
    return np.array([scores], np.float32)


# ---- worked by hand: classes

P, Q = [0.5, 0.3, 0.2], [0.1, 0.8, 0.1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mean": "arithmetic"}, [0.3, 0.55, 0.15]),
        ({"mean": "arithmetic", "weights": {"a": 3, "b": 1}}, [0.4, 0.425, 0.175]),
        # sqrt(.05), sqrt(.24), sqrt(.02) = .2236, .4899, .1414, divided by their sum .8549
        ({"mean": "geometric"}, [0.2616, 0.5730, 0.1654]),
        # places: P gives 3/3, 2/3, 1/3; Q gives 2/3 (the lower number of the tie), 3/3, 1/3; sum of means 2
        ({"mean": "rank"}, [5 / 12, 5 / 12, 2 / 12]),
    ],
)
def test_average_of_classes_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    """H1: arithmetic, geometric and rank mean."""
    rule = make("average", "classes", ("a", "b"), **options)
    probabilities = rule.probabilities(rule(logits(P, Q))).numpy()[0]
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


def test_arithmetic_mean_is_keras_average_of_probabilities() -> None:
    """H1: without calibration it is what `keras.layers.Average` computes."""
    scores = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    expected = keras.layers.Average()([softmax(scores[:, s], axis=1) for s in range(3)])
    np.testing.assert_allclose(make("average", "classes")(scores).numpy(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("votes", "weights", "winner"),
    [
        ([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]], None, 0),  # two votes beat one sure one
        ([[0.6, 0.4, 0.0], [0.05, 0.9, 0.05], [0.1, 0.1, 0.8]], None, 1),  # three ways: mean .25, .467, .283
        ([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.1, 0.9]], {"a": 1, "b": 1, "c": 3}, 2),
        ([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.1, 0.9]], {"a": 1, "b": 1, "c": 2}, 2),  # tie: .3 < .45
        ([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.4, 0.2, 0.4]], None, 0),  # equal logits: the lower number
    ],
)
def test_vote_of_classes_by_hand(votes: list[list[float]], weights: dict[str, float] | None, winner: int) -> None:
    """H2: majority, weights, and the tie rule: the tied class with the higher mean probability."""
    rule = make("vote", "classes", weights=weights)
    fused = rule(logits(*(np.maximum(vote, 1e-6).tolist() for vote in votes))).numpy()[0]
    assert fused.argmax() == winner
    assert fused.sum() == pytest.approx(1.0, abs=1e-5)


def test_probabilities_never_overturn_a_vote() -> None:
    """H2: over all ways to vote, and the most adverse probabilities, the votes alone decide."""
    weights = np.array([0.4, 0.35, 0.25])
    rule = make("vote", "classes", weights=dict(zip("abc", weights.tolist(), strict=True)))
    for choices in product(range(3), repeat=3):
        share = np.bincount(choices, weights, minlength=3)
        if np.sum(np.isclose(share, share.max())) > 1:
            continue
        loser = int(share.argmin())
        probabilities = np.full((3, 3), 0.01)
        for s, choice in enumerate(choices):
            probabilities[s, loser] = 0.4899
            probabilities[s, choice] = 0.99 if choice == loser else 0.49
        assert rule(logits(*probabilities.tolist())).numpy()[0].argmax() == share.argmax()


@pytest.mark.parametrize(
    ("weights", "margin"),
    [
        ([1 / 3] * 3, 1 / 3),
        ([1 / 12] * 12, 1 / 12),
        ([0.5, 0.3, 0.2], 0.1),
        ([0.6, 0.0, 0.4], 0.2),
        ([1.0], 1.0),
    ],
)
def test_smallest_margin_by_hand(weights: list[float], margin: float) -> None:
    assert smallest_margin(np.array(weights)) == pytest.approx(margin, abs=1e-5)


def test_probability_of_classes_by_hand() -> None:
    """H3: .2 · P + .8 · Q; H8: where Q is silent, P alone."""
    rule = make("probability", "classes", ("a", "b"), weights={"a": 0.2, "b": 0.8})
    scores = np.concatenate([logits(P, Q), logits(P, Q)])
    scores[1, 1] = np.nan
    np.testing.assert_allclose(rule(scores).numpy(), [[0.18, 0.7, 0.12], P], atol=1e-6)


# ---- worked by hand: candidates

UP, DOWN = [1.0, 2.0, 3.0], [300.0, 200.0, 100.0]  # z-scores -+1.2247 and 0, in opposite orders
Z = 1.2247449
SECOND, THIRD = 1 - np.log(2) / np.log(4), 1 - np.log(3) / np.log(4)  # logarithms of ranks; the first has 1


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("average", {}, [0, 0, 0]),
        ("average", {"weights": {"a": 3, "b": 1}}, [-Z / 2, 0, Z / 2]),
        ("average", {"mean": "rank"}, [2 / 3, 2 / 3, 2 / 3]),
        ("average", {"mean": "rank", "top_n": 2}, [0.5, 0.5, 0.5]),
        ("average", {"mean": "rank", "top_n": 1}, [0.5, 0, 0.5]),
        ("vote", {"method": "borda"}, [2, 2, 2]),
        ("vote", {"method": "borda", "top_n": 2}, [1, 1, 1]),
        ("vote", {}, [(1 / 61 + 1 / 63) / 2, 1 / 62, (1 / 61 + 1 / 63) / 2]),
        ("vote", {"k": 0, "top_n": 2}, [0.5, 0.5, 0.5]),
        ("vote", {"k": 0, "weights": {"a": 1, "b": 0}}, [1 / 3, 1 / 2, 1]),
        ("probability", {"weights": {"a": 0.75, "b": 0.25}}, [0.75 * THIRD + 0.25, SECOND, 0.75 + 0.25 * THIRD]),
        (
            "probability",
            {"weights": {"a": 0.75, "b": 0.25}, "normalisation": "standardise"},
            [-Z / 2, 0, Z / 2],
        ),
        (
            "probability",
            {"weights": {"a": 0.75, "b": 0.25}, "normalisation": "none"},
            [75.75, 51.5, 27.25],
        ),
    ],
)
def test_candidates_by_hand(name: str, options: dict[str, Any], expected: list[float]) -> None:
    """H1, H2, H3: z-scores, ranks, Borda and reciprocal-rank points."""
    fused = make(name, "candidates", ("a", "b"), **options)(ranked(UP, DOWN)).numpy()[0]
    np.testing.assert_allclose(fused, expected, atol=1e-5)


def test_geometric_mean_of_candidates_by_hand() -> None:
    """H1: mean of log-softmax of z-scores / temperature."""
    rule = make("average", "candidates", ("a", "b"), mean="geometric", temperature=0.5)
    z = np.array([[-Z, 0, Z], [0, -Z, Z]])
    expected = log_softmax(z / 0.5, axis=1).mean(axis=0)
    fused = rule(ranked(UP, [20.0, 10.0, 30.0])).numpy()[0]
    np.testing.assert_allclose(fused, expected, atol=1e-5)


def test_equal_scores_are_ranked_by_item_number() -> None:
    """H2: of equal scores the lower item number comes first, also at the edge of the top N."""
    fused = make("vote", "candidates", ("a",), method="borda", top_n=3)(ranked([5, 7, 5, 5, 1])).numpy()[0]
    np.testing.assert_array_equal(fused, [2, 3, 1, 0, 0])


def test_a_silent_item_is_judged_by_the_others() -> None:
    """H8: item 2 is cold for `a`; its z-scores are over the other two items, and b's stands alone."""
    fused = make("average", "candidates", ("a", "b"))(ranked([1, 2, np.nan], DOWN)).numpy()[0]
    np.testing.assert_allclose(fused, [(-1 + Z) / 2, 0.5, -Z], atol=1e-5)


def test_with_doubt_a_lone_voice_counts_less() -> None:
    """H8: beside one imagined member to whom items are alike, two voices are divided by three and one by two."""
    doubting = make("average", "candidates", ("a", "b"), doubt=1)
    fused = doubting(ranked([1, 2, np.nan], DOWN)).numpy()[0]
    np.testing.assert_allclose(fused, [(-1 + Z) / 3, 1 / 3, -Z / 2], atol=1e-5)
    leaves_out = make("average", "candidates", ("a", "b", "c"), doubt=1, weights={"a": 1, "b": 1, "c": 0})
    np.testing.assert_allclose(leaves_out(ranked([1, 2, np.nan], DOWN, DOWN)).numpy()[0], fused, atol=1e-6)
    with pytest.raises(ValueError, match="doubt must go with mean arithmetic"):
        RULES["average"].Config(mean="rank", doubt=1)


def test_z_scores_do_not_depend_on_scale_or_shift() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 2, 500)).astype(np.float32)
    expected = (scores - scores.mean(axis=2, keepdims=True)) / scores.std(axis=2, keepdims=True)
    for scale, shift in [(1, 0), (1e20, 0), (1e-20, 0), (1, 100)]:
        moved = scores * np.float32(scale) + np.float32(shift)
        z = standardise(moved, speaking_candidates(moved)).numpy()
        np.testing.assert_allclose(z, expected, atol=1e-4)


def test_rounding_is_not_an_opinion() -> None:
    """A member whose scores differ by rounding only is silent, one that differs a little more is not."""
    flat = (np.float32(0.1) + np.array([0, 1, 0, 2]) * np.float32(7e-9)).astype(np.float32)
    assert np.ptp(flat) > 0
    speaks = speaking_candidates(ranked(flat.tolist(), [0.1, 0.1, 0.1, 0.1001])).numpy()
    assert not speaks[0, 0].any() and speaks[0, 1].all()


# ---- calibration


def test_a_temperature_is_found_again() -> None:
    """H3: labels drawn from softmax(x), logits handed over as 4·x: the temperature is 4."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20_000, 5)) * 1.5
    labels = (true + rng.gumbel(size=true.shape)).argmax(axis=1)
    assert fit_temperature(4 * true, labels) == pytest.approx(4.0, rel=0.03)
    assert fit_temperature(true, labels) == pytest.approx(1.0, rel=0.03)


def test_calibration_lowers_the_loss_and_can_be_left_out() -> None:
    """H1: an overconfident member is cooled; with `calibration: none` the average has nothing to fit."""
    scores, labels = informative_classes(600, seed=1)
    scores *= 10
    rule = make("average", "classes")
    report = rule.fit(scores, None, labels)
    assert report["loss_after"] < 0.8 * report["loss_before"]
    assert min(report["temperatures"].values()) > 2
    plain = make("average", "classes", calibration="none")
    assert not plain.learned
    assert not make("average", "candidates").learned


# ---- planted worlds

CLASSES = 4


def informative_classes(rows: int, seed: int, good: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of three members of which one knows the label; `good=-1` for none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    scores = rng.normal(size=(rows, 3, CLASSES))
    if good >= 0:
        scores[:, good] += 2.0 * np.eye(CLASSES)[labels]
    return scores.astype(np.float32), labels


def informative_candidates(users: int, seed: int, items: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Scores over a catalogue of three members; the first knows which item is taken, up to noise."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=(users, items))
    taken = (taste + 0.4 * rng.gumbel(size=taste.shape)).argmax(axis=1)
    noise = rng.normal(size=(users, 2, items))
    known = taste + 0.3 * rng.normal(size=taste.shape)
    return np.concatenate([known[:, None], noise], axis=1).astype(np.float32), np.eye(items, dtype=bool)[taken]


def auc(fused: np.ndarray, positives: np.ndarray) -> float:
    return float(roc_auc_score(positives.ravel(), fused.ravel()))


LEARNED = [
    ("probability", {}),
    ("probability", {"shrinkage": 0.0}),
    ("stacker", {}),
    ("stacker", {"member_dropout": 0.0}),
    ("stacker", {"member_dropout": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), [*LEARNED, ("stacker", {"per_class": True})])
def test_the_informative_class_member_gets_the_weight(name: str, options: dict[str, Any]) -> None:
    """H3, H5: one member knows, two are noise; the fused answer is at least as good as the average's."""
    scores, labels = informative_classes(800, seed=2, good=1)
    fresh, truth = informative_classes(2000, seed=3, good=1)
    rule = make(name, "classes", **options)
    report = rule.fit(scores, None, labels)
    weights = report["weights"]
    assert weights["b"] > 4 * (weights["a"] + weights["c"])
    assert report["loss_after"] < report["loss_before"] + 0.005
    accuracy = np.mean(rule(fresh).numpy().argmax(axis=1) == truth)
    alone = np.mean(fresh[:, 1].argmax(axis=1) == truth)
    assert accuracy > alone - 0.01 > 0.7


@pytest.mark.parametrize(("name", "options"), [*LEARNED, ("probability", {"normalisation": "rank"})])
def test_the_informative_ranking_member_gets_the_weight(name: str, options: dict[str, Any]) -> None:
    """H3, H5: the same for candidates, and better than equal weights on fresh users."""
    scores, positives = informative_candidates(400, seed=4)
    fresh, truth = informative_candidates(400, seed=5)
    rule = make(name, "candidates", **options)
    report = rule.fit(rule.normalise(scores).numpy(), None, positives)
    weights = report["weights"]
    assert weights["a"] > 4 * (weights["b"] + weights["c"])
    assert report["loss_after"] < report["loss_before"]
    equal = make("average", "candidates")
    assert auc(rule(fresh).numpy(), truth) > auc(equal(fresh).numpy(), truth) + 0.03


@pytest.mark.parametrize("name", ["probability", "stacker"])
@pytest.mark.parametrize("over", ["classes", "candidates"])
def test_learned_weights_do_not_depend_on_the_order_of_members(name: str, over: Over) -> None:
    """H5: members are drawn by name in member dropout, and the losses are convex."""
    order = [2, 0, 1]
    forward, backward = make(name, over), make(name, over, ("c", "a", "b"))
    if over == "classes":
        scores, labels = informative_classes(300, seed=6)
    else:
        scores, labels = informative_candidates(300, seed=6)
    reports = [
        rule.fit(given if over == "classes" else rule.normalise(given).numpy(), None, labels)
        for rule, given in ((forward, scores), (backward, scores[:, order]))
    ]
    for member, weight in reports[0]["weights"].items():
        assert reports[1]["weights"][member] == pytest.approx(weight, abs=2e-3)


# ---- shuffled labels: the stacker must stay at chance


def test_stacker_on_random_labels_is_at_chance_for_classes() -> None:
    """H5: members know random labels by heart; out of fold the stacker finds nothing, in sample it would.

    The last part is the control: fed with in-sample scores, the same stacker believes in its members.
    """
    rng = np.random.default_rng(7)
    inputs, labels = rng.normal(size=(600, 5)), rng.integers(0, CLASSES, 600)
    fresh, truth = rng.normal(size=(3000, 5)), rng.integers(0, CLASSES, 3000)
    members = [DecisionTreeClassifier(random_state=0), KNeighborsClassifier(1), KNeighborsClassifier(9)]

    def log(probabilities: list[np.ndarray]) -> np.ndarray:
        return np.log(np.maximum(np.stack(probabilities, axis=1), 1e-3)).astype(np.float32)

    out_of_fold = log([cross_val_predict(m, inputs, labels, cv=5, method="predict_proba") for m in members])
    for member in members:
        member.fit(inputs, labels)
    in_sample = log([member.predict_proba(inputs) for member in members])
    held_out = log([member.predict_proba(fresh) for member in members])

    chance = np.log(CLASSES)
    stacker = make("stacker", "classes")
    report = stacker.fit(out_of_fold, None, labels)
    probabilities = stacker.probabilities(stacker(held_out)).numpy()
    assert report["loss_after"] > chance - 0.02
    assert abs(np.mean(probabilities.argmax(axis=1) == truth) - 1 / CLASSES) < 0.03
    assert abs(np.mean(probabilities[np.arange(3000), truth]) - 1 / CLASSES) < 0.005
    assert np.abs(probabilities - 1 / CLASSES).max() < 0.15

    believed = make("stacker", "classes").fit(in_sample, None, labels)
    assert believed["loss_after"] < 0.5 * chance


def test_stacker_on_shuffled_labels_is_at_chance_for_candidates() -> None:
    """H5: the positives shuffled within each user leave no weights, and AUC .5 on fresh users."""
    scores, positives = informative_candidates(500, seed=8)
    fresh, truth = informative_candidates(500, seed=9)
    shuffled = np.random.default_rng(10).permuted(positives, axis=1)
    fresh_shuffled = np.random.default_rng(11).permuted(truth, axis=1)
    stacker = make("stacker", "candidates")
    features = stacker.normalise(scores).numpy()
    learned = stacker.fit(features, None, positives)
    assert auc(stacker(fresh).numpy(), truth) > 0.85
    report = stacker.fit(features, None, shuffled)
    assert abs(auc(stacker(fresh).numpy(), fresh_shuffled) - 0.5) < 0.04
    assert report["loss_after"] > np.log(40) - 0.03
    assert max(report["weights"].values()) < 0.15 * learned["weights"]["a"]


# ---- the minimisers themselves


def test_mixture_weights_are_the_minimum_of_the_log_loss() -> None:
    """H3: the update reaches what a general minimiser finds, also where members are silent on some rows."""
    scores, labels = informative_classes(400, seed=12)
    scores[:, 1] += 1.0 * np.eye(CLASSES)[labels]
    mask = np.random.default_rng(13).random((400, 3)) > 0.3
    mask[~mask.any(axis=1), 0] = True
    rule = make("probability", "classes", calibration="none", shrinkage=5.0)
    report = rule.fit(scores, mask, labels)
    picked = softmax(scores.astype(np.float64), axis=2)[np.arange(400), :, labels]

    def penalised(parameters: np.ndarray) -> float:
        w = softmax(parameters)
        loss = -np.log((picked * mask) @ w / (mask @ w)).sum()
        return float(loss - 5.0 / 3 * np.log(w).sum())

    best = softmax(scipy_minimize(penalised, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-7}).x)
    np.testing.assert_allclose(list(report["weights"].values()), best, atol=1e-3)


def test_shrinkage_pulls_to_equal_weights_and_fades_with_rows() -> None:
    """H3, H5: the pull is that of a number of rows."""
    for over in ("classes", "candidates"):
        spread = []
        for rows, shrinkage in [(30, 1000.0), (30, 10.0), (600, 10.0)]:
            rule = make("probability", over, shrinkage=shrinkage)
            if over == "classes":
                scores, labels = informative_classes(rows, seed=14)
            else:
                scores, labels = informative_candidates(rows, seed=14)
                scores = rule.normalise(scores).numpy()
            spread.append(np.ptp(list(rule.fit(scores, None, labels)["weights"].values())))
        assert spread[0] < 0.1 < spread[1] < spread[2]


def test_importance_weights_stand_for_left_out_candidates() -> None:
    """H5: sampled candidates with their weights give about the weights that the whole catalogue gives."""
    scores, positives = informative_candidates(1000, seed=15, items=100)
    whole = make("probability", "candidates", shrinkage=0.0)
    features = whole.normalise(scores).numpy()
    expected = whole.fit(features, None, positives)
    rng = np.random.default_rng(16)
    keep = 30
    order = np.argsort(np.where(positives, -1, rng.random(positives.shape)), axis=1)[:, : keep + 1]
    sampled = np.take_along_axis(features, order[:, None, :], axis=2)
    labels = np.take_along_axis(positives, order, axis=1)
    counts = np.where(labels, 1.0, 99 / keep)
    rule = make("probability", "candidates", shrinkage=0.0)
    report = rule.fit(sampled, None, labels, counts)
    assert report["loss_after"] == pytest.approx(expected["loss_after"], abs=0.2)
    assert rule.fit(sampled, None, labels)["loss_after"] < expected["loss_after"] - 0.5  # unweighted: too easy
    for member, weight in expected["weights"].items():
        assert report["weights"][member] == pytest.approx(weight, abs=0.05)


def test_rows_that_teach_nothing_are_left_out() -> None:
    """H8: lists without a positive, or on which nobody speaks, change nothing; none but such is an error."""
    scores, positives = informative_candidates(200, seed=17)
    rule = make("stacker", "candidates", member_dropout=0.0)
    features = rule.normalise(scores).numpy()
    expected = rule.fit(features, None, positives)
    useless = np.concatenate([features, features[:2]])
    useless[200] = np.nan
    labels = np.concatenate([positives, np.zeros((2, 40), bool)])
    report = rule.fit(useless, None, labels)
    assert report["rows"] == 200
    assert report["loss_after"] == pytest.approx(expected["loss_after"], abs=1e-6)
    with pytest.raises(DataError, match="no such list"):
        rule.fit(features, None, np.zeros_like(positives))
    with pytest.raises(DataError, match="class numbers from 0 to 3"):
        make("stacker", "classes").fit(*informative_classes(5, 0)[:1], None, np.full(5, 4))
    with pytest.raises(DataError, match="no such row"):
        make("probability", "classes").fit(np.full((5, 3, 4), np.nan), None, np.zeros(5, int))


# ---- the stacker's own


def state_of(rule: Rule, **changed: Any) -> dict[str, np.ndarray]:
    return {**rule.state(), **{key: np.asarray(value, np.float32) for key, value in changed.items()}}


def test_stacker_by_hand() -> None:
    """H5: 2·z of a, -1·z of b, silent b: (2 + 1)/2 times what a says when c = 1, nothing added when c = 0."""
    rule = make("stacker", "candidates", ("a", "b"), features=("standardise",))
    numbers = {"weights": [[[2.0], [-1.0]]], "influence": [2.0, 1.0]}
    third = ranked(UP, [30.0, 10.0, np.nan])  # b's z-scores: 1, -1, silent
    for compensation, expected in [(1.0, [-2 * Z - 1, 1, 3 * Z]), (0.0, [-2 * Z - 1, 1, 2 * Z])]:
        rule.load_state(state_of(rule, **numbers, compensation=compensation))
        np.testing.assert_allclose(rule(third).numpy()[0], expected, atol=1e-5)


def test_stacker_with_a_weight_of_zero_is_the_stacker_without_the_member() -> None:
    """H8: also where the others are silent."""
    scores = np.random.default_rng(18).normal(size=(3, 3, 6)).astype(np.float32)
    scores[0, 0] = np.nan
    scores[1, 0, :3] = np.nan
    scores[1, 2, 2] = np.nan  # only the member without a weight speaks on this one
    whole = make("stacker", "candidates", features=("standardise",))
    whole.load_state(state_of(whole, weights=[[[1.0], [0.0], [-0.5]]], influence=[1.0, 0.0, 0.5]))
    rest = make("stacker", "candidates", ("a", "c"), features=("standardise",))
    rest.load_state(state_of(rest, weights=[[[1.0], [-0.5]]], influence=[1.0, 0.5]))
    np.testing.assert_allclose(whole(scores).numpy(), rest(scores[:, [0, 2]]).numpy(), rtol=1e-5)
    assert whole(scores).numpy()[1, 2] == -np.inf


def test_stacker_learns_to_distrust_a_member_that_is_wrong() -> None:
    """H5: weights may have any sign: a member that knows the answer upside down is turned round."""
    scores, positives = informative_candidates(400, seed=19)
    rule = make("stacker", "candidates", features=("standardise",))
    report = rule.fit(rule.normalise(-scores).numpy(), None, positives)
    assert report["coefficients"]["standardise"]["a"] < -0.5
    assert auc(rule(-scores).numpy(), positives) > 0.85


def test_stacker_learns_how_much_a_lone_voice_counts() -> None:
    """H8: when the good member is silent a noise member must not be amplified to its strength."""
    scores, positives = informative_candidates(400, seed=20)
    rule = make("stacker", "candidates", features=("standardise",), member_dropout=0.3)
    report = rule.fit(rule.normalise(scores).numpy(), None, positives)
    assert report["compensation"] < 0.8
    spoken = rule(scores).numpy().std()
    lone = rule(scores, mask=np.array([[False, True, True]]).repeat(400, axis=0)).numpy().std()
    assert lone < 0.5 * spoken


def test_stacker_learns_a_bias_per_class() -> None:
    """H5: members see uniform priors, the labels are skewed: the bias carries the prior."""
    scores, labels = informative_classes(4000, seed=21)
    kept = (labels != 0) | (np.random.default_rng(22).random(4000) < 0.2)
    rule = make("stacker", "classes")
    rule.fit(scores[kept], None, labels[kept])
    bias = rule.state()["bias"]
    assert bias[0] < bias[1:].min() - 0.7


def test_member_dropout_is_seeded() -> None:
    scores, labels = informative_classes(200, seed=23)
    rule = make("stacker", "classes")
    first, same, other = (rule.fit(scores, None, labels, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first["loss_after"] != other["loss_after"]


# ---- settings


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("average", {"mean": "median"}, "rules.mean"),
        ("average", {"weights": {"a": -1}}, "greater than or equal to 0; received -1"),
        ("average", {"weights": {"a": float("nan")}}, "rules.weights.a"),
        ("vote", {"top_n": 0}, "rules.top_n"),
        ("vote", {"methode": "borda"}, "unknown key 'rules.methode': did you mean 'method'"),
        ("probability", {"shrinkage": -1}, "rules.shrinkage"),
        ("stacker", {"features": []}, "rules.features"),
        ("stacker", {"features": ["rank", "rank"]}, "a feature may be named once"),
        ("stacker", {"member_dropout": 1.0}, "rules.member_dropout"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(RULES[name].Config, data, "rules")


def test_weights_of_the_probability_rule_must_sum_to_one() -> None:
    """H3."""
    kind = RULES["probability"]
    with pytest.raises(ConfigError, match=r"must sum to 1; received a sum of 1\.5"):
        kind.check(kind.Config(weights={"a": 1.0, "b": 0.5}), ["a", "b"])
    kind.check(kind.Config(weights={"a": 0.333, "b": 0.333, "c": 0.333}), ["a", "b", "c"])


def test_rules_take_part_in_functional_models() -> None:
    """A rule is a layer: scores and mask as Keras inputs, the learned numbers among its weights."""
    scores, mask = keras.Input([3, 4], name="scores"), keras.Input([3], dtype="bool", name="mask")
    rule = make("stacker", "classes")
    model = keras.Model([scores, mask], rule(scores, mask=mask))
    values, silent = np.random.default_rng(24).normal(size=(2, 3, 4)), np.array([[True, False, True]] * 2)
    np.testing.assert_allclose(
        model({"scores": values, "mask": silent}), rule(values.astype(np.float32), mask=silent), rtol=1e-6
    )
    assert {weight.name.split("/")[-1].split(":")[0] for weight in model.weights} >= {
        "weights",
        "bias",
        "temperatures",
    }


# ---- greedy selection


def test_ndcg_of_sampled_lists_by_hand() -> None:
    """A sampled candidate that stands for 3 pushes what is below it down by 3 places; silence is never listed."""
    fused = np.array([[0.9, 0.8, 0.7, -np.inf], [0.1, 0.2, 0.3, 0.4]])
    positives = np.array([[False, True, True, False], [True, False, False, False]])
    weights = np.array([[3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    gains = 1 / np.log2(5) + 1 / np.log2(6)  # places 4 and 5
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(sampled_ndcg(fused, positives, weights, 5), [gains / ideal, 1 / np.log2(5)])
    np.testing.assert_allclose(sampled_ndcg(fused, positives, weights, 3), [0.0, 0.0])


def test_forward_selection_by_hand() -> None:
    """Two members that are right on different rows join; one that repeats the first, and one that hurts, do not."""
    right = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])

    def goodness(counts: tuple[int, ...]) -> np.ndarray:
        first, second, harm = counts[0] + counts[2], counts[1], counts[3]
        total = max(first + second + harm, 1)
        return np.sqrt((first * right[0] + second * right[1]) / total) - harm / total

    shares = forward_selection(goodness, np.array([True, True, False, False]), np.arange(4), steps=6)
    np.testing.assert_allclose(shares, [0.5, 0.5, 0.0, 0.0])


def lists_of(weak: float, users: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores `[N, 3, K]` of two members that see different halves of taste and one that sees `weak` of it."""
    random = np.random.default_rng(seed)
    halves, noise = random.normal(size=(2, users, 60)), random.normal(size=(3, users, 60))
    positives = np.argsort(-(halves[0] + halves[1]), axis=1).argsort(axis=1) < 3
    scores = np.stack([halves[0], halves[1], weak * halves[0]], axis=1) + 0.3 * noise.transpose(1, 0, 2)
    return scores.astype(np.float32), positives


def test_greedy_drops_the_weak_and_keeps_the_rest_alike() -> None:
    """H4: a member of noise leaves; the two that know different things stay with about equal shares."""
    rule = make("greedy", "candidates")
    scores, positives = lists_of(weak=0.0)
    report = rule.fit(rule.normalise(scores).numpy(), None, positives, seed=1)
    weights = list(report["weights"].values())
    assert weights[2] == 0.0 and min(weights[:2]) > 0.35 and sum(weights) == pytest.approx(1.0)
    assert report["loss_after"] < report["loss_before"]


def test_greedy_falls_back_on_those_it_dropped() -> None:
    """H8: where no chosen member says anything about a row, the others answer; elsewhere they stay silent."""
    rule = make("greedy", "candidates", k=3)
    rule.load_state({"weights": np.array([0.5, 0.5, 0.0], np.float32)})
    scores = np.array(
        [[[1, 2, np.nan], [2, 4, np.nan], [3, 1, 2]], [[np.nan] * 3, [np.nan] * 3, [3, 1, 2]]], np.float32
    )
    fused = rule(scores).numpy()
    np.testing.assert_allclose(fused[0], [-1, 1, -np.inf])
    np.testing.assert_allclose(fused[1], [Z, -Z, 0], atol=1e-5)
    terms = rule.contributions(scores)[0].numpy()
    assert (terms[0, 2] == 0).all() and (terms[1, :2] == 0).all()


def test_greedy_over_classes_learns_who_is_right() -> None:
    """H4: labels decide who stays; shuffled labels leave nothing to gain over the prior."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    good = np.eye(3)[labels] * 2.0 + random.normal(size=(300, 3))
    scores = np.stack([good, random.normal(size=(300, 3)) * 4, good + random.normal(size=(300, 3)) * 0.5], axis=1)
    rule = make("greedy", "classes", calibration="none")
    report = rule.fit(scores.astype(np.float32), None, labels)
    assert report["weights"]["b"] == 0.0 and report["loss_after"] < report["loss_before"]
