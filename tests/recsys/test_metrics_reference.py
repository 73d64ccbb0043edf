"""N3: every ranking metric against an implementation that is not ours, on random lists.

Accuracy against trec_eval (by `pytrec_eval`) and scikit-learn; what looks beyond accuracy against building blocks of
scikit-learn and SciPy. Where definitions differ, the formula that connects the two stands here:

* recall, precision, hit rate (trec: success) and NDCG (trec: ndcg_cut) are the same, also for lists shorter than k.
* average precision: trec's map_cut divides by |R|, ours by min(k, |R|), so that a perfect list has 1.
* reciprocal rank: trec looks at the whole list, ours at the first k places; trec is handed the list cut at k.
* a user to whom nothing is relevant is unknown to trec, and NaN (left out of means) for us.
* AUC: scikit-learn counts a tie as 1/2. Ours decides ties by item number; scikit-learn is handed the ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.metrics import auc as area_under
from sklearn.metrics import roc_auc_score

from recsys.metrics import METRICS, Catalogue, RankedLists, parse_metric

USERS, ITEMS, LENGTH = 60, 120, 25
TREC = {
    "recall": "recall", "precision": "P", "hit_rate": "success", "ndcg": "ndcg_cut", "map": "map_cut",
    "mrr": "recip_rank",
}  # fmt: skip
BEYOND = ("coverage", "gini", "novelty", "average_popularity", "diversity")


class Sample:
    """Random scores with many ties, catalogues of which little or much is open, and up to 30 relevant items."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.scores = random.integers(0, 9, (USERS, ITEMS)).astype(np.float32)
        self.open = random.random((USERS, ITEMS)) < random.choice([0.05, 0.5, 1.0], (USERS, 1))
        self.relevant = [random.permutation(ITEMS)[: random.integers(0, 31) * (user > 1)] for user in range(USERS)]
        self.sizes = np.array([len(items) for items in self.relevant])
        pointers = np.concatenate([[0], np.cumsum(self.sizes)])
        self.lists = RankedLists.from_scores(self.scores, self.open, pointers, np.concatenate(self.relevant), LENGTH)
        self.popularity = random.integers(0, 50, ITEMS)
        self.vectors = random.normal(size=(ITEMS, 4))

    def by_trec_eval(self, measure: str, k: int) -> np.ndarray:
        """A measure of trec_eval at k for each user, float64 `[U]`, NaN where nothing is relevant."""
        judged = {str(u): {str(item): 1 for item in items} for u, items in enumerate(self.relevant) if len(items)}
        length = k if measure == "recip_rank" else LENGTH
        # trec_eval orders by score and then by name: scores that fall along our list leave it no tie to decide.
        listed = {
            str(u): {str(item): float(LENGTH - place) for place, item in enumerate(row[:length]) if item >= 0}
            for u, row in enumerate(self.lists.top)
        }
        asked, key = (measure, measure) if measure == "recip_rank" else (f"{measure}.{k}", f"{measure}_{k}")
        found = pytrec_eval.RelevanceEvaluator(judged, {asked}).evaluate(listed)
        return np.array([found[str(u)][key] if size else np.nan for u, size in enumerate(self.sizes)])


def test_every_metric_of_the_table_is_held_against_something() -> None:
    assert {*TREC, *BEYOND, "auc"} == set(METRICS["candidates"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 5, 10, LENGTH])
@pytest.mark.parametrize("name", TREC)
def test_accuracy_equals_trec_eval(name: str, k: int, seed: int) -> None:
    """Lists with ties, short and empty ones, users without anything relevant, and more relevant items than places."""
    sample = Sample(seed)
    ours = np.asarray(parse_metric(f"{name}@{k}", "candidates").of_lists(sample.lists))
    theirs = sample.by_trec_eval(TREC[name], k)
    if name == "map":
        theirs = theirs * sample.sizes / np.maximum(np.minimum(k, sample.sizes), 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert np.isnan(ours).any() and np.nanmin(ours) == 0 < np.nanmax(ours)


@pytest.mark.parametrize("seed", range(3))
def test_auc_equals_scikit_learn(seed: int) -> None:
    """Once on the ranks, where both have no ties, and once on scores without ties."""
    sample = Sample(seed)
    smooth = sample.scores + np.random.default_rng(seed).random(sample.scores.shape).astype(np.float32)
    untied = RankedLists.from_scores(
        smooth, sample.open, sample.lists.relevant_indptr, sample.lists.relevant_indices, LENGTH
    )
    for lists, scores in ((sample.lists, sample.scores), (untied, smooth)):
        ours = np.asarray(parse_metric("auc", "candidates").of_lists(lists))
        for user in range(USERS):
            candidates = np.flatnonzero(sample.open[user])
            labels = np.isin(candidates, sample.relevant[user])
            if not labels.any() or labels.all():
                assert np.isnan(ours[user])
                continue
            order = np.lexsort((candidates, -scores[user, candidates]))
            places = np.empty(len(order))
            places[order] = np.arange(len(order))
            assert ours[user] == pytest.approx(roc_auc_score(labels, -places), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [2, LENGTH])
def test_beyond_accuracy_equals_building_blocks_of_others(k: int, seed: int) -> None:
    """Gini as the Lorenz curve's area, novelty as a distribution's log-probability, diversity as cosine distances."""
    sample = Sample(seed)
    catalogue = Catalogue(ITEMS, sample.popularity, sample.vectors)
    shown = [row[row >= 0] for row in sample.lists.top[:, :k]]
    exposure = np.bincount(np.concatenate(shown), minlength=ITEMS)
    lorenz = np.concatenate([[0.0], np.cumsum(np.sort(exposure))]) / exposure.sum()
    chance = stats.rv_discrete(values=(np.arange(ITEMS), (sample.popularity + 1) / (sample.popularity + 1).sum()))
    expected = {
        "coverage": len(np.unique(np.concatenate(shown))) / ITEMS,
        "gini": 1.0 - 2.0 * area_under(np.linspace(0.0, 1.0, ITEMS + 1), lorenz),
        "novelty": [-chance.logpmf(items).mean() / np.log(2.0) if len(items) else np.nan for items in shown],
        "average_popularity": [sample.popularity[items].mean() if len(items) else np.nan for items in shown],
        "diversity": [
            pdist(sample.vectors[items], "cosine").mean() if len(items) > 1 else np.nan for items in shown
        ],
    }  # fmt: skip
    assert set(expected) == set(BEYOND)
    for name, value in expected.items():
        ours = parse_metric(f"{name}@{k}", "candidates").of_lists(sample.lists, catalogue)
        np.testing.assert_allclose(ours, value, atol=1e-12, err_msg=name)
