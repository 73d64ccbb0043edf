"""Metrics of rankings with binary relevance, one float64 value per user.

For all of them: the range is 0 to 1 and more is better. A user to whom nothing is relevant gets NaN
(undefined, left out of means), so every metric is a mean over the same users. A list shorter than k, or
empty, has misses in the missing places. A relevant item that was no candidate counts as missed, except in
`auc`, which compares candidates alone. Ties between scores were decided when the lists were made
(`RankedLists.from_scores`: lower item number first). In formulas: rel(j) is 1 if the item at place j is
relevant, R the user's relevant items.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.metrics.definition import metric
from recsys.metrics.lists import RankedLists, ratio


def _where_relevant(lists: RankedLists, values: npt.ArrayLike) -> np.ndarray:
    """NaN for users to whom nothing is relevant."""
    defined: np.ndarray = np.where(lists.relevant > 0, values, np.nan)
    return defined


@metric("ranking", at_k=True)
def recall(lists: RankedLists, k: int) -> np.ndarray:
    """Recall@k: the share of the relevant items that are in the list.

    Formula: sum_{j<=k} rel(j) / |R|. Range 0 to 1; below 1 for every list when |R| > k. Ties: as in the
    lists. Empty list: 0. Nothing relevant: NaN.
    Source: Manning, Raghavan, Schütze, Introduction to Information Retrieval (2008), section 8.3.
    """
    _, hits = lists.cut(k)
    return ratio(hits.sum(axis=1), lists.relevant)


@metric("ranking", at_k=True)
def precision(lists: RankedLists, k: int) -> np.ndarray:
    """Precision@k: the share of the k places that hold a relevant item.

    Formula: sum_{j<=k} rel(j) / k; always k, also when the list is shorter. Range 0 to min(|R|, k) / k.
    Ties: as in the lists. Empty list: 0. Nothing relevant: NaN.
    Source: Manning, Raghavan, Schütze, Introduction to Information Retrieval (2008), section 8.4.
    """
    _, hits = lists.cut(k)
    return _where_relevant(lists, hits.sum(axis=1) / k)


@metric("ranking", at_k=True)
def ndcg(lists: RankedLists, k: int) -> np.ndarray:
    """NDCG@k: discounted cumulative gain with binary gains, over that of an ideal list of k.

    Formula: sum_{j<=k} rel(j) / log2(j + 1), over the same with every j <= min(k, |R|) relevant.
    Range 0 to 1. Ties: as in the lists. Empty list: 0. Nothing relevant: NaN.
    Source: Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, ACM TOIS 20(4), 2002.
    """
    _, hits = lists.cut(k)
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(lists.relevant, k)]
    return ratio(hits @ discounts, ideal)


@metric("ranking", at_k=True)
def map(lists: RankedLists, k: int) -> np.ndarray:
    """Average precision at k; its mean over users is MAP@k.

    Formula: sum_{j<=k} rel(j) precision@j / min(k, |R|). Range 0 to 1. Ties: as in the lists. Empty list: 0.
    Nothing relevant: NaN. Others divide by |R|, which cannot reach 1 when |R| > k.
    Source: Manning, Raghavan, Schütze, Introduction to Information Retrieval (2008), section 8.4; the cut at
    k as in the Million Song Dataset Challenge (McFee et al., 2012).
    """
    _, hits = lists.cut(k)
    precisions = np.cumsum(hits, axis=1) / np.arange(1, k + 1)
    return ratio((precisions * hits).sum(axis=1), np.minimum(lists.relevant, k))


@metric("ranking", at_k=True)
def mrr(lists: RankedLists, k: int) -> np.ndarray:
    """Reciprocal rank at k; its mean over users is MRR@k.

    Formula: 1 / (place of the first relevant item), 0 when none is among the first k. Range 0 to 1. Ties: as
    in the lists. Empty list: 0. Nothing relevant: NaN.
    Source: Voorhees, The TREC-8 Question Answering Track Report, 1999.
    """
    _, hits = lists.cut(k)
    first = np.where(hits.any(axis=1), 1.0 / (1 + hits.argmax(axis=1)), 0.0)
    return _where_relevant(lists, first)


@metric("ranking", at_k=True)
def hit_rate(lists: RankedLists, k: int) -> np.ndarray:
    """HitRate@k: whether any relevant item is in the list.

    Formula: 1 if sum_{j<=k} rel(j) > 0, else 0. Range 0 or 1. Ties: as in the lists. Empty list: 0.
    Nothing relevant: NaN.
    Source: Deshpande and Karypis, Item-based top-N recommendation algorithms, ACM TOIS 22(1), 2004.
    """
    _, hits = lists.cut(k)
    return _where_relevant(lists, hits.any(axis=1).astype(np.float64))


@metric("ranking")
def auc(lists: RankedLists) -> np.ndarray:
    """AUC: how often a relevant candidate stands above one that is not relevant, over all unseen candidates.

    Formula: 1 - (sum of the ranks of the P relevant candidates - P (P + 1) / 2) / (P N), N the other
    candidates. Range 0 to 1, 0.5 by chance. Ties: the ranks have none left, so tied pairs count 1 or 0 by
    item number and not 1/2. Empty list: the lists play no part, only the ranks. Nothing relevant, or nothing
    else: NaN.
    Source: Hand and Till, Machine Learning 45, 2001 (Mann-Whitney form); per user as in Rendle et al., BPR,
    2009.
    """
    ranked = lists.ranks > 0
    positives = np.bincount(lists.rows[ranked], minlength=lists.users)
    rank_sums = np.bincount(lists.rows[ranked], weights=lists.ranks[ranked], minlength=lists.users)
    pairs = positives * (lists.candidates - positives)
    misplaced = rank_sums - positives * (positives + 1) / 2
    return 1.0 - ratio(misplaced, pairs)
