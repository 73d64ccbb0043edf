"""How much members differ: pairs that err apart are worth fusing, pairs that err together are one member twice.

Measures of Kuncheva & Whitaker (2003), "Measures of diversity in classifier ensembles and their relationship with the
ensemble accuracy", over what each member got right and wrong. For rankings an answer is right when an item that the
user took stands in the member's first ten.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from recsys.metrics import RankedLists

PLACES = 10
"""Of a ranked list so many places are compared."""

Pairs = list[dict[str, Any]]
"""For each pair of members its names, `n` answers of both, and the measures; None where one is not defined."""


def pairs(right: Mapping[str, np.ndarray], heard: Mapping[str, np.ndarray] | None = None) -> Pairs:
    """The measures of every pair of members, over the answers that both gave.

    With `a` both right, `b` and `c` one right, `d` both wrong (shares of the answers):

    - `disagreement`: b + c, from 0 (alike) to 1 (always one of them is right).
    - `q`: Yule's Q, (ad - bc) / (ad + bc): 0 for independent members, negative where they err on different answers.
    - `correlation`: of right and wrong, (ad - bc) / sqrt((a + b)(c + d)(a + c)(b + d)).

    Args:
        right: by member, bool `[N]`.
        heard: by member, bool `[N]`: who answered; everybody when None.
    """
    result = []
    for one, other in combinations(right, 2):
        both = np.ones(len(right[one]), bool) if heard is None else heard[one] & heard[other]
        x, y = right[one][both], right[other][both]
        result.append({"members": [one, other], "n": int(both.sum()), **_measures(x, y)})
    return result


def _measures(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    if not len(x):
        return {"disagreement": None, "q": None, "correlation": None}
    a, b, c, d = (float(np.mean(cell)) for cell in (x & y, x & ~y, ~x & y, ~x & ~y))
    apart = a * d - b * c
    return {
        "disagreement": b + c,
        "q": _ratio(apart, a * d + b * c),
        "correlation": _ratio(apart, np.sqrt((a + b) * (c + d) * (a + c) * (b + d))),
    }


def _ratio(value: float, by: float) -> float | None:
    return float(value / by) if by > 0 else None


def of_classes(right: Mapping[str, np.ndarray], heard: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `report.json` says under `diversity` of a classification; arguments as of `pairs`."""
    return _told("right answers", pairs(right, heard))


def of_lists(lists: Mapping[str, RankedLists], values: Mapping[str, np.ndarray], metric: str) -> dict[str, Any]:
    """What `report.json` says under `diversity` of a ranking: `pairs` over users and items that they took, and by pair

    - `overlap@10`: the mean share of the first ten that both lists hold, over users with a list of either.
    - `<metric>_correlation`: of the metric over users.

    Args:
        lists: by member, of the same users in one order.
        values: by member, the metric of each user, float `[U]`, NaN where undefined.
        metric: its name.
    """
    right = {name: _hits(ranked) for name, ranked in lists.items()}
    found = pairs(right)
    for pair in found:
        one, other = pair["members"]
        pair[f"overlap@{PLACES}"] = _overlap(lists[one].top[:, :PLACES], lists[other].top[:, :PLACES])
        pair[f"{metric}_correlation"] = _correlation(values[one], values[other])
    return _told(f"items taken that stand in the first {PLACES}", found)


def _told(of: str, found: Pairs) -> dict[str, Any]:
    measures = [key for key in (found[0] if found else ()) if key not in ("members", "n")]
    means = {}
    for measure in measures:
        defined = [pair[measure] for pair in found if pair[measure] is not None]
        means[measure] = float(np.mean(defined)) if defined else None
    return {"part": "validation", "of": of, "pairs": found, "mean": means}


def _hits(ranked: RankedLists) -> np.ndarray:
    """bool `[nnz]`: which relevant items stand in the first places of their user's list."""
    users = np.repeat(np.arange(len(ranked.top)), np.diff(ranked.relevant_indptr))
    return (ranked.top[users, :PLACES] == ranked.relevant_indices[:, None]).any(axis=1)


def _overlap(one: np.ndarray, other: np.ndarray) -> float | None:
    """Lists int `[U, K]`, distinct items, padded with -1."""
    longest = np.maximum((one >= 0).sum(axis=1), (other >= 0).sum(axis=1))
    common = ((one[:, :, None] == other[:, None, :]) & (one >= 0)[:, :, None]).sum(axis=(1, 2))
    listed = longest > 0
    return float((common[listed] / longest[listed]).mean()) if listed.any() else None


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's correlation over the rows where both are defined."""
    known = ~np.isnan(one) & ~np.isnan(other)
    one, other = one[known], other[known]
    if len(one) < 2 or not one.std() or not other.std():
        return None
    return float(np.corrcoef(one, other)[0, 1])
