"""N3: metrics against hand-worked tables, a slow independent version on random lists, and properties."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.errors import ConfigError, DataError
from recsys.metrics import Catalogue, RankedLists, multi_hot, parse_metric
from recsys.metrics.classes import reliability
from recsys.metrics.lists import blocks

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ranking_metrics.json").read_text())


def lists_of(users: list[dict]) -> RankedLists:
    """The golden file's users as arrays."""
    return RankedLists(
        top=np.array([user["top"] for user in users], np.int32),
        relevant_indptr=np.cumsum([0] + [len(user["relevant"]) for user in users]),
        relevant_indices=np.array([item for user in users for item in user["relevant"]], np.int64),
        ranks=np.array([rank for user in users for rank in user["ranks"]], np.int64),
        candidates=np.array([user["candidates"] for user in users], np.int64),
    )


def random_lists(seed: int, users: int = 25, items: int = 30, k: int = 8, levels: int = 6) -> tuple:
    """Scores with many ties, few or most items seen, 0 to 6 relevant items, of which some are seen."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, (users, items)).astype(np.float32)
    candidates = random.random((users, items)) < random.choice([0.1, 0.8], (users, 1))
    relevant = [random.choice(items, int(random.integers(0, 7)), replace=False) for _ in range(users)]
    pointers = np.cumsum([0] + [len(found) for found in relevant])
    lists = RankedLists.from_scores(scores, candidates, pointers, np.concatenate(relevant), k)
    return lists, scores, candidates, relevant


@pytest.mark.parametrize("name", GOLDEN["expected"])
def test_ranking_metrics_equal_the_hand_worked_table(name: str) -> None:
    values = parse_metric(name, "candidates").of_lists(lists_of(GOLDEN["users"]))
    expected = np.array(GOLDEN["expected"][name], dtype=np.float64)
    np.testing.assert_allclose(values, expected, atol=1e-9)
    assert values.dtype == np.float64


def test_beyond_accuracy_equals_the_hand_worked_table() -> None:
    """Two lists of two over four items; the third user's list is empty."""
    lists = RankedLists(
        top=np.array([[0, 1], [0, 2], [-1, -1]], np.int32),
        relevant_indptr=np.zeros(4, np.int64),
        relevant_indices=np.zeros(0, np.int64),
        ranks=np.zeros(0, np.int64),
        candidates=np.array([4, 4, 0]),
    )
    vectors = np.array([[1, 0], [0, 2], [3, 0], [0, 0]], np.float32)
    catalogue = Catalogue(items=4, popularity=np.array([3, 1, 0, 0]), vectors=vectors)
    expected = {
        "coverage@2": 0.75,  # items 0, 1, 2 of 4
        "coverage@1": 0.25,
        "gini@2": 0.375,  # exposure 0 1 1 2: (-3*0 - 1*1 + 1*1 + 3*2) / (4 * 4)
        "gini@1": 0.75,  # one item has everything: 1 - 1/I
        "novelty@2": [1.5, 2.0, np.nan],  # shares 4/8 2/8 1/8 1/8: 1, 2, 3, 3 bits
        "average_popularity@2": [2.0, 1.5, np.nan],
        "diversity@2": [1.0, 0.0, np.nan],  # right angles; same direction
        "diversity@1": [np.nan, np.nan, np.nan],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(parse_metric(name).of_lists(lists, catalogue), value, err_msg=name)


def slow_order(scores: np.ndarray, candidates: np.ndarray) -> list[int]:
    """All candidates of one user, best first, the lower number first among equals."""
    return sorted(np.flatnonzero(candidates).tolist(), key=lambda item: (-scores[item], item))


def slow(name: str, k: int, order: list[int], relevant: set[int]) -> float:
    """The definitions word by word, for one user."""
    shown, gains = order[:k], [item in relevant for item in order[:k]]
    found = sum(gains)
    if not relevant:
        return math.nan
    if name == "recall":
        return found / len(relevant)
    if name == "precision":
        return found / k
    if name == "hit_rate":
        return float(found > 0)
    if name == "mrr":
        return next((1 / place for place, item in enumerate(shown, 1) if item in relevant), 0.0)
    if name == "map":
        seen, total = 0, 0.0
        for place, gain in enumerate(gains, 1):
            if gain:
                seen += 1
                total += seen / place
        return total / min(k, len(relevant))
    if name == "ndcg":
        best = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(relevant)) + 1))
        return sum(1 / math.log2(place + 1) for place, gain in enumerate(gains, 1) if gain) / best
    labels = [item in relevant for item in order]
    if not any(labels) or all(labels):
        return math.nan
    return sklearn.metrics.roc_auc_score(labels, -np.arange(len(order)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["recall", "precision", "hit_rate", "mrr", "map", "ndcg", "auc"])
def test_ranking_metrics_equal_an_independent_slow_version(name: str, seed: int) -> None:
    lists, scores, candidates, relevant = random_lists(seed)
    for k in (1, 5, 8):
        expected = [
            slow(name, k, slow_order(scores[user], candidates[user]), set(relevant[user].tolist()))
            for user in range(len(scores))
        ]
        metric = parse_metric(name if name == "auc" else f"{name}@{k}", "candidates")
        np.testing.assert_allclose(metric.of_lists(lists), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_beyond_accuracy_equals_an_independent_slow_version(seed: int) -> None:
    lists, *_ = random_lists(seed)
    random = np.random.default_rng(seed)
    popularity, vectors = random.integers(0, 50, 30), random.normal(size=(30, 3))
    vectors[::7] = 0.0
    catalogue = Catalogue(30, popularity, vectors)
    shown = [[item for item in row[:5] if item >= 0] for row in lists.top.tolist()]

    def cosine(a: int, b: int) -> float:
        return float(vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]))

    exposure = [sum(item in row for row in shown) for item in range(30)]
    differences = sum(abs(a - b) for a in exposure for b in exposure)
    diversity, novelty = [], []
    for row in shown:
        known = [item for item in row if vectors[item].any()]
        pairs = [1 - cosine(a, b) for i, a in enumerate(known) for b in known[i + 1 :]]
        diversity.append(np.mean(pairs) if pairs else np.nan)
        bits = [-math.log2((popularity[item] + 1) / (popularity.sum() + 30)) for item in row]
        novelty.append(np.mean(bits) if bits else np.nan)
    expected = {
        "coverage@5": len({item for row in shown for item in row}) / 30,
        "gini@5": differences / (2 * 30 * sum(exposure)),  # half the relative mean absolute difference
        "novelty@5": novelty,
        "diversity@5": diversity,
        "average_popularity@5": [np.mean(popularity[row]) if row else np.nan for row in shown],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(parse_metric(name).of_lists(lists, catalogue), value, err_msg=name)


def test_from_scores_ranks_unscored_candidates_last_and_lists_neither_them_nor_seen_items() -> None:
    scores = np.array([[0.5, np.nan, 0.5, -np.inf, 9.0]], np.float32)
    candidates = np.array([[True, True, True, True, False]])
    lists = RankedLists.from_scores(scores, candidates, [0, 3], [4, 3, 2], k=6)
    assert lists.top.tolist() == [[0, 2, -1, -1, -1, -1]]
    assert lists.ranks.tolist() == [0, 4, 2]
    assert lists.candidates.tolist() == [4]
    assert lists.top.dtype == np.int32


def test_ranks_of_silent_items_follow_their_numbers() -> None:
    """Every place is given once: what was scored by score and number, then what was not, by number alone."""
    random = np.random.default_rng(0)
    scores = random.integers(0, 3, (20, 15)).astype(np.float32)
    scores[random.random(scores.shape) < 0.4] = random.choice([np.nan, np.inf, -np.inf])
    candidates = random.random(scores.shape) < 0.7
    lists = RankedLists.from_scores(scores, candidates, np.arange(0, 301, 15), np.tile(np.arange(15), 20), k=15)
    for row, places in enumerate(lists.ranks.reshape(20, 15)):
        spoken = [
            i for i in np.argsort(-scores[row], kind="stable") if candidates[row, i] and np.isfinite(scores[row, i])
        ]
        silent = [i for i in range(15) if candidates[row, i] and not np.isfinite(scores[row, i])]
        assert [int(places[item]) for item in spoken + silent] == list(range(1, 1 + candidates[row].sum()))
        assert not places[~candidates[row]].any()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """N3: memory is bounded by cutting, and the cut does not show in any number."""
    whole, scores, candidates, relevant = random_lists(5)
    monkeypatch.setattr("recsys.metrics.lists._BLOCK_BYTES", 200)
    assert len(list(blocks(25, 8 * 30))) == 25
    pointers = np.cumsum([0] + [len(found) for found in relevant])
    cut = RankedLists.from_scores(scores, candidates, pointers, np.concatenate(relevant), 8)
    np.testing.assert_array_equal(cut.top, whole.top)
    np.testing.assert_array_equal(cut.ranks, whole.ranks)
    vectors = Catalogue(30, vectors=np.random.default_rng(0).normal(size=(30, 4)))
    metric = parse_metric("diversity@8")
    values = metric.of_lists(cut, vectors)
    monkeypatch.undo()
    np.testing.assert_allclose(values, metric.of_lists(whole, vectors))


def test_merged_parts_equal_the_whole() -> None:
    lists, scores, candidates, relevant = random_lists(6)
    parts = []
    for part in (slice(0, 1), slice(1, 14), slice(14, 25)):
        pointers = np.cumsum([0] + [len(found) for found in relevant[part]])
        items = np.concatenate([np.zeros(0, np.int64), *relevant[part]])
        parts.append(RankedLists.from_scores(scores[part], candidates[part], pointers, items, 8))
    merged = RankedLists.merge(parts)
    for name in ("ndcg@8", "auc", "map@3"):
        metric = parse_metric(name, "candidates")
        np.testing.assert_array_equal(metric.of_lists(merged), metric.of_lists(lists))
    with pytest.raises(DataError, match="one common length"):
        RankedLists.merge([lists, RankedLists.from_scores(scores, candidates, np.zeros(26), [], 3)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_properties_of_ranking_metrics(seed: int, k: int) -> None:
    """Ranges; recall grows with k; one relevant item ties metrics together; numbers do not matter."""
    lists, *_ = random_lists(seed, users=8, items=12)
    value = {
        name: parse_metric(f"{name}@{k}").of_lists(lists)
        for name in ("recall", "precision", "ndcg", "map", "mrr", "hit_rate")
    }
    undefined = lists.relevant == 0
    for values in value.values():
        np.testing.assert_array_equal(np.isnan(values), undefined)
        assert np.all((values[~undefined] >= 0) & (values[~undefined] <= 1 + 1e-12))
    np.testing.assert_allclose(value["recall"] * lists.relevant, value["precision"] * k, equal_nan=True)
    assert np.all((value["recall"] <= parse_metric("recall@8").of_lists(lists))[~undefined])
    single = lists.relevant == 1
    np.testing.assert_allclose(value["map"][single], value["mrr"][single])
    np.testing.assert_allclose(value["recall"][single], value["hit_rate"][single])
    renumbered = RankedLists(
        np.where(lists.top >= 0, 50 - lists.top, -1),
        lists.relevant_indptr,
        50 - lists.relevant_indices,
        lists.ranks,
        lists.candidates,
    )
    np.testing.assert_array_equal(parse_metric(f"ndcg@{k}").of_lists(renumbered), value["ndcg"])


def test_ranked_lists_refuse_arrays_that_do_not_fit() -> None:
    top = np.zeros((2, 3), np.int32)
    with pytest.raises(DataError, match="offsets from 0 to 1"):
        RankedLists(top, np.array([0, 1]), np.array([4]), np.array([1]), np.array([9, 9]))
    with pytest.raises(DataError, match="distinct"):
        RankedLists(top, np.array([0, 2, 2]), np.array([4, 4]), np.array([1, 1]), np.array([9, 9]))
    with pytest.raises(DataError, match="exceed"):
        RankedLists(top, np.array([0, 1, 1]), np.array([4]), np.array([10]), np.array([9, 9]))


def test_names_of_metrics() -> None:
    """A4: a wrong name is refused before any data is read, with the nearest known one."""
    metric = parse_metric("ndcg@10")
    assert (metric.name, metric.k, metric.higher_is_better, metric.kind) == ("ndcg@10", 10, True, "ranking")
    assert parse_metric("auc", "classes").kind == "class" and parse_metric("auc").kind == "ranking"
    for text, sentence in {
        "ndgc@10": "did you mean 'ndcg'",
        "ndcg": "must name its list length, as in 'ndcg@10'",
        "accuracy@3": "has no list length",
        "recall@0": "whole number from 1",
        "recall@ten": "whole number from 1",
        "": "unknown metric",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            parse_metric(text)
    with pytest.raises(ConfigError, match="does not judge classes"):
        parse_metric("ndcg@10", "classes")
    lists, *_ = random_lists(0)
    with pytest.raises(ConfigError, match="needs lists of 9 items"):
        parse_metric("recall@9").of_lists(lists)
    with pytest.raises(ConfigError, match="needs the popularity"):
        parse_metric("novelty@3").of_lists(lists, Catalogue(30))
    with pytest.raises(ConfigError, match="cannot judge classes"):
        metric.of_classes(np.zeros(1, int), np.ones((1, 1)))


def test_class_metrics_equal_the_hand_worked_table() -> None:
    """N2: three classes, four examples; the third is a tie that the lower class number takes."""
    labels = np.array([0, 1, 1, 2])
    probabilities = np.array([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    expected: dict[str, object] = {
        "accuracy": [1.0, 0.0, 1.0, 0.0],
        "log_loss": [math.log(2), math.log(2), math.log(2), 15 * math.log(10)],
        # class 0: 0.5 against 0.5 0 1 -> (1/2 + 1 + 0)/3; class 1: {.5 .5} against {.25 0} -> 1; class 2: 0
        # against .25 0 .5 -> (0 + 1/2 + 0)/3
        "auc": (0.5 + 1.0 + 1 / 6) / 3,
        # squared errors by row: .25+.0625+.0625, .25+.25, .25+.25, 1+1
        "rmse": math.sqrt((0.375 + 0.5 + 0.5 + 2.0) / 12),
        # bin 8 of 15 holds three answers of .5, one right; bin 15 one of 1.0 that is wrong
        "ece": 3 / 4 * abs(1 / 3 - 0.5) + 1 / 4 * 1.0,
    }
    for name, value in expected.items():
        metric = parse_metric(name, "classes")
        np.testing.assert_allclose(metric.of_classes(labels, probabilities), value, rtol=1e-9, err_msg=name)


def test_class_metrics_equal_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels, probabilities = random.integers(0, 4, 200), random.dirichlet(np.ones(4), 200)

    def of(name: str) -> np.ndarray | float:
        return parse_metric(name, "classes").of_classes(labels, probabilities)

    assert np.mean(of("accuracy")) == sklearn.metrics.accuracy_score(labels, probabilities.argmax(1))
    assert np.mean(of("log_loss")) == pytest.approx(sklearn.metrics.log_loss(labels, probabilities))
    assert of("auc") == pytest.approx(sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr"))


def test_calibration_error_is_that_of_a_slow_version() -> None:
    """N2, H3: confidence against accuracy, bin by bin; the diagram's bins hold every answer once."""
    random = np.random.default_rng(1)
    labels, probabilities = random.integers(0, 4, 300), random.dirichlet(np.ones(4), 300)
    gaps = [0.0] * 15
    for label, row in zip(labels, probabilities, strict=True):
        edge = next(number for number in range(1, 16) if row.max() < number / 15 or number == 15)
        gaps[edge - 1] += float(row.argmax() == label) - row.max()
    found = parse_metric("ece", "classes").of_classes(labels, probabilities)
    assert found == pytest.approx(sum(map(abs, gaps)) / 300)
    diagram = reliability(labels, probabilities)
    assert diagram.share.sum() == pytest.approx(1.0) and np.all(np.diff(diagram.confidence) > 0)
    assert diagram.share @ diagram.accuracy == pytest.approx(np.mean(probabilities.argmax(1) == labels))
    drawn = np.array([random.choice(4, p=row) for row in probabilities])
    assert parse_metric("ece", "classes").of_classes(drawn, probabilities) < 0.1 < found  # who is right by chance


def test_class_metrics_at_the_edges() -> None:
    def of(name: str, labels: list, probabilities: object) -> np.ndarray | float:
        return parse_metric(name, "classes").of_classes(np.array(labels), np.array(probabilities))

    assert len(of("accuracy", [], np.zeros((0, 2)))) == 0  # type: ignore[arg-type]
    assert math.isnan(of("auc", [1, 1], [[0.5, 0.5], [0.1, 0.9]]))  # type: ignore[arg-type]
    assert math.isnan(of("rmse", [], np.zeros((0, 2))))  # type: ignore[arg-type]
    assert math.isnan(of("ece", [], np.zeros((0, 2))))  # type: ignore[arg-type]
    assert of("ece", [0, 1, 0, 0], np.eye(2)[[0, 1, 0, 1]]) == 0.25  # type: ignore[arg-type]
    assert of("rmse", [3.0, 5.0], [4.0, 4.0]) == 1.0  # ratings
    refusals: list[tuple[list, list, str]] = [
        ([2], [[0.5, 0.5]], "lie in 0..1"),
        ([0, 1], [[0.5, 0.5]], "shape"),
        ([0], [[3.0, -2.0]], "sum to 1"),
    ]
    for labels, probabilities, sentence in refusals:
        with pytest.raises(DataError, match=sentence):
            of("log_loss", labels, probabilities)


def test_categories_become_vectors_whose_cosine_is_the_overlap() -> None:
    vectors = multi_hot([{"a", "b"}, {"b", "c"}, set()])
    assert vectors[0] @ vectors[1] / 2 == 0.5
    assert not vectors[2].any()


def test_metrics_do_not_import_tensorflow() -> None:
    """Evaluation runs where no model does."""
    code = (
        "import sys, recsys.significance; from recsys.metrics import METRICS, parse_metric\n"
        "[table[name] for table in METRICS.values() for name in table]\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
