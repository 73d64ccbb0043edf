"""N3: what holds for every metric in the table; registering one tests it."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.metrics import METRICS, Catalogue, RankedLists, parse_metric
from recsys.metrics.definition import Definition

RANKING = sorted(METRICS["candidates"])
CLASSES = sorted(METRICS["classes"])
CATALOGUE = Catalogue(20, np.arange(20) ** 2, np.abs(np.random.default_rng(1).normal(size=(20, 3))))


def lists(seed: int, users: int = 9) -> RankedLists:
    random = np.random.default_rng(seed)
    relevant = [random.choice(20, 3, replace=False) for _ in range(users)]
    return RankedLists.from_scores(
        scores=random.random((users, 20)),
        candidates=random.random((users, 20)) < 0.7,
        relevant_indptr=3 * np.arange(users + 1),
        relevant_indices=np.concatenate([np.zeros(0, np.int64), *relevant]),
        k=5,
    )


def full_name(name: str) -> str:
    return f"{name}@5" if METRICS["candidates"][name].at_k else name


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in METRICS for n in METRICS[t]])
def test_the_docstring_says_everything(table: str, name: str) -> None:
    definition = METRICS[table][name]  # type: ignore[index]
    assert isinstance(definition, Definition)
    says = " ".join(str(definition.__doc__).split())
    edge = {"ranking": "Empty list: ", "list": "Empty lists ", "class": "No examples: "}[definition.kind]
    relevance = ["elevan"] if definition.kind != "class" else []
    for part in ("Formula: ", "ange ", "Ties", edge, "Source: ", *relevance):
        assert part in says, f"{name} does not say '{part}'"


@pytest.mark.parametrize("name", RANKING)
def test_shape_and_type(name: str) -> None:
    value = parse_metric(full_name(name), "candidates").of_lists(lists(0), CATALOGUE)
    if METRICS["candidates"][name].kind == "list":
        assert isinstance(value, float)
    else:
        assert isinstance(value, np.ndarray) and value.shape == (9,) and value.dtype == np.float64


@pytest.mark.parametrize("name", RANKING)
def test_no_users_and_empty_lists(name: str) -> None:
    """Nothing to judge is never an error, a warning or an infinity."""
    metric = parse_metric(full_name(name), "candidates")
    assert np.size(metric.of_lists(lists(0, users=0), CATALOGUE)) == (metric.kind == "list")
    nothing = RankedLists.from_scores(
        np.zeros((2, 20)), np.zeros((2, 20), bool), np.zeros(3, np.int64), np.zeros(0, np.int64), 5
    )
    value = np.asarray(metric.of_lists(nothing, CATALOGUE))
    assert np.all(np.isnan(value) | (value == 0))


@pytest.mark.parametrize("name", RANKING)
def test_order_of_users_does_not_matter_and_parts_merge(name: str) -> None:
    metric, first, second = parse_metric(full_name(name), "candidates"), lists(1), lists(2)
    forth = metric.of_lists(RankedLists.merge([first, second]), CATALOGUE)
    back = metric.of_lists(RankedLists.merge([second, first]), CATALOGUE)
    np.testing.assert_allclose(np.roll(forth, 9), back)


@pytest.mark.parametrize("name", CLASSES)
def test_class_metrics_prefer_the_truth(name: str) -> None:
    metric, labels = parse_metric(name, "classes"), np.array([0, 1, 2, 1])
    right, wrong = np.eye(3)[labels], np.eye(3)[(labels + 1) % 3]
    good, bad = np.mean(metric.of_classes(labels, right)), np.mean(metric.of_classes(labels, wrong))
    assert (good > bad) == metric.higher_is_better and good != bad


@pytest.mark.parametrize("name", ["recall", "precision", "ndcg", "map", "mrr", "hit_rate", "auc"])
def test_accuracy_of_rankings_prefers_the_truth(name: str) -> None:
    pointers, items = 3 * np.arange(5), np.tile([2, 7, 11], 4)
    truth = np.zeros((4, 20))
    truth[:, [2, 7, 11]] = 1.0
    everything = np.ones((4, 20), bool)
    metric = parse_metric(full_name(name), "candidates")
    best = metric.of_lists(RankedLists.from_scores(truth, everything, pointers, items, 5))
    worst = metric.of_lists(RankedLists.from_scores(-truth, everything, pointers, items, 5))
    np.testing.assert_allclose(best, 0.6 if name == "precision" else 1.0)
    np.testing.assert_allclose(worst, 0.0)
