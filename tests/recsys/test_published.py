"""Popularity on a split that everybody has (MovieLens 100k, fold u1) against the figures that others published.

The protocol of both sources: every rating of `u1.base` counts as taken, every rating of `u1.test` as relevant; each
user's unseen items are ranked by how often they stand in `u1.base`; figures are over the 459 users of `u1.test`. Many
items are equally popular, and which of them comes first is up to each program's sort. The data are read by
configs/ml100k.yaml; member, question and metrics are ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys.cleaning import clean
from recsys.core import MemberScores
from recsys.evaluation import question
from recsys.metrics import RankedLists, parse_metric
from recsys.pipeline import load_experiment
from recsys.schema import TEST, TRAIN, Interactions
from worlds import fitted, training_data


class Popularity:
    """Our popularity member on u1, and what the test part asks.

    Attributes:
        ids: int `[I]`, MovieLens' item numbers.
        scores: float `[I]`, how good each item is for everybody.
        unseen, relevant: bool `[U, I]` for the users of the test part.
        trained: bool `[I]`, the items of u1.base.
    """

    def __init__(self, data: Interactions, folder: Path) -> None:
        parts = np.asarray(data.given_split)
        asked = question(data, parts, TEST)
        member = fitted({"kind": "popularity"}, training_data(data, parts, folder), folder)
        scores, _ = MemberScores({"popularity": member})(np.full((1, 1), -1, np.int32))
        self.ids = data.item_ids.astype(np.int64)
        self.scores = scores.numpy()[0, 0]
        self.unseen = asked.seen[asked.users].toarray() == 0
        self.relevant = asked.relevant[asked.users].toarray() > 0
        self.trained = data.matrix(parts == TRAIN).getnnz(axis=0) > 0

    def lists(self, tie: np.ndarray, k: int, among: np.ndarray | None = None) -> RankedLists:
        """Lists of k items; of equally popular ones that with the smaller `tie` (`[I]` or `[U, I]`) comes first."""
        open_to = self.unseen if among is None else self.unseen & among
        relevant = self.relevant if among is None else self.relevant & among
        order = np.lexsort((np.broadcast_to(tie, open_to.shape), np.broadcast_to(-self.scores, open_to.shape)))
        places = np.empty(open_to.shape, np.float64)
        np.put_along_axis(places, order, np.arange(len(self.scores))[None, :].astype(np.float64), axis=1)
        pointers = np.concatenate([[0], np.cumsum(relevant.sum(axis=1))])
        return RankedLists.from_scores(-places, open_to, pointers, np.nonzero(relevant)[1], k)


@pytest.fixture(scope="module")
def popularity(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Popularity:
    config = Path(__file__).resolve().parents[2] / "configs" / "ml100k.yaml"
    experiment = load_experiment(config, [f"data.path={data_dir / 'ml100k'}", "cleaning.strict=true"])
    tables = experiment.data.registry[experiment.data.kind].read(experiment.data.config)
    data, dropped = clean(tables, experiment.cleaning, experiment.positive)
    assert dropped == [] and data.positive.all() and data.shape == (943, 1682) and len(data.users) == 100_000
    return Popularity(data, tmp_path_factory.mktemp("popularity"))


def mean(name: str, lists: RankedLists) -> float:
    return float(np.nanmean(parse_metric(name, "candidates").of_lists(lists)))


@pytest.mark.data
def test_popularity_as_mymedialite_published_it(popularity: Popularity) -> None:
    """N3. http://www.mymedialite.net/documentation/command_line.html: `item_recommendation --training-file=u1.base
    --test-file=u1.test --recommender=MostPopular` prints AUC 0.8543 prec@5 0.322 prec@10 0.30458 NDCG 0.57038
    num_users 459 num_items 1650. (Its MAP of .02187 is of an early version with another definition.)

    Candidates are the 1,650 items of u1.base. prec@5 meets no tie: equal to the digit. The others do, and their sort
    is not stable: each published figure lies between those of the unluckiest and the luckiest order of ties.
    """
    among, whole = popularity.trained, len(popularity.scores)
    assert among.sum() == 1650
    worst, ours, best = (
        popularity.lists(tie, whole, among)
        for tie in (popularity.relevant, popularity.ids, ~popularity.relevant)
    )  # fmt: skip
    assert ours.users == 459
    for lists in (worst, ours, best):
        assert round(mean("precision@5", lists), 5) == 0.322
    for name, published in (("precision@10", 0.30458), ("auc", 0.8543), (f"ndcg@{whole}", 0.57038)):
        low, high = mean(name, worst), mean(name, best)
        assert low < published < high < low + 0.0035, name
        assert mean(name, ours) == pytest.approx(published, abs=7e-4), name


def order_of_std_sort(values: list[int]) -> list[int]:
    """Positions of `values` from the largest down, as `std::sort` of libstdc++ leaves them, equal ones included.

    Quicksort with the median of three as pivot down to pieces of 16, then insertion (Musser, Introspective sorting and
    selection algorithms, 1997). Its way out to heapsort is not needed for these values.
    """
    order = list(range(len(values)))

    def before(a: int, b: int) -> bool:
        return values[order[a]] > values[order[b]]

    def swap(a: int, b: int) -> None:
        order[a], order[b] = order[b], order[a]

    def partition(first: int, last: int) -> int:
        low, middle, high = first + 1, (first + last) // 2, last - 1
        if before(low, middle):
            swap(first, middle if before(middle, high) else high if before(low, high) else low)
        else:
            swap(first, low if before(low, high) else high if before(middle, high) else middle)
        left, right = first + 1, last
        while True:
            while before(left, first):
                left += 1
            right -= 1
            while before(first, right):
                right -= 1
            if left >= right:
                return left
            swap(left, right)
            left += 1

    pieces = [(0, len(order))]
    while pieces:
        first, last = pieces.pop()
        if last - first > 16:
            cut = partition(first, last)
            pieces += [(cut, last), (first, cut)]
    for end in range(1, len(order)):
        place = end
        while place > 0 and before(place, place - 1):
            swap(place, place - 1)
            place -= 1
    return order


@pytest.mark.data
def test_popularity_as_a_program_with_a_known_sort_published_it(popularity: Popularity) -> None:
    """N3. https://github.com/PanJianning/UserCF, README, most popular items: precision and recall in per cent at 5, 10,
    20, 40, 80 and 160. All twelve figures are met to the last digit.

    It sorts by `std::sort`, whose order of ties (libstdc++) is repeated here. It counts the last row of a file twice.
    Its recall is hits over all test rows, and not a mean over users, so it is worked out of precision.
    """
    counts = np.zeros(2001, np.int64)
    counts[popularity.ids] = np.rint(np.expm1(popularity.scores))
    counts[1330] += 1  # the item of the last row of u1.base
    place = np.empty(2001, np.int64)
    place[order_of_std_sort(counts.tolist())] = np.arange(2001)
    lists = popularity.lists(place[popularity.ids], 160)
    assert lists.users == 459 and lists.relevant.sum() == 20_000
    published = {
        5: (32.20, 3.69), 10: (30.39, 6.97), 20: (25.46, 11.68), 40: (21.66, 19.88), 80: (17.55, 32.21),
        160: (13.37, 49.09),
    }  # fmt: skip
    for k, (precision, recall) in published.items():
        ours = mean(f"precision@{k}", lists)
        assert 100 * ours == pytest.approx(precision, abs=0.005), k
        assert 100 * ours * k * lists.users / 20_001 == pytest.approx(recall, abs=0.005), k
