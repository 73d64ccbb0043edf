"""A test for leaks: what a member fits must not change when anything that it may not see changes.

    assert_fitted_on_train_only(fit, interactions, parts)

`fit(interactions, parts)` returns the fitted state as named arrays; vocabularies, weights and statistics all count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from recsys.schema import HISTORY, IMAGE, ITEM_ID, TEST, TRAIN, Interactions

State = Mapping[str, np.ndarray]
Fit = Callable[[Interactions, np.ndarray], State]


def assert_fitted_on_train_only(
    fit: Fit,
    interactions: Interactions,
    parts: np.ndarray,
    hidden: Sequence[int] = (TEST, HISTORY),
    seed: int = 0,
) -> None:
    """Fits three times and raises AssertionError when the state shows that `fit` saw hidden rows.

    Once as it is; once with the hidden rows and the content of items that stand in hidden rows alone made
    arbitrary, which must change nothing; once with half of the train rows, which must change something (or the
    first two would prove nothing). Members that stop early by validation keep it out of `hidden`.
    """
    truth = fit(interactions, parts)
    blind = fit(scrambled(interactions, parts, hidden, seed), parts)
    different = differing(truth, blind)
    assert not different, f"fitted on rows that must stay hidden: {', '.join(different)} changed with them"
    kept = (parts != TRAIN) | (np.random.default_rng(seed).random(len(parts)) < 0.5)
    fewer = fit(_rows(interactions, kept), parts[kept])
    assert differing(truth, fewer), "the state does not depend on the train rows, so this test shows nothing"


def differing(one: State, other: State) -> list[str]:
    """Names of the arrays that are not identical in two states."""
    names = sorted(set(one) | set(other))
    return [name for name in names if name not in one or name not in other or not _same(one[name], other[name])]


def scrambled(
    interactions: Interactions, parts: np.ndarray, hidden: Sequence[int] = (TEST, HISTORY), seed: int = 0
) -> Interactions:
    """The same data set with other items, times, ratings and positives in hidden rows and other hidden content."""
    rng = np.random.default_rng(seed)
    rows = np.isin(parts, hidden)
    items = interactions.items.copy()
    items[rows] = rng.integers(0, len(interactions.item_ids), rows.sum())
    positive = interactions.positive.copy()
    positive[rows] = ~positive[rows]
    timestamps, ratings = interactions.timestamps, interactions.ratings
    if timestamps is not None:
        timestamps = np.where(rows, rng.permutation(timestamps), timestamps)
    if ratings is not None:
        ratings = np.where(rows, rng.permutation(ratings), ratings)
    seen = np.zeros(len(interactions.item_ids), bool)
    seen[interactions.items[~rows]] = True
    only_hidden = np.zeros(len(interactions.item_ids), bool)
    only_hidden[interactions.items[rows]] = True
    catalogue = _other_content(interactions.catalogue, only_hidden & ~seen)
    return replace(
        interactions,
        items=items,
        positive=positive,
        timestamps=timestamps,
        ratings=ratings,
        catalogue=catalogue,
    )


def _other_content(catalogue: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    changed = catalogue.copy()
    for name in changed.columns:
        if name not in (ITEM_ID, IMAGE) and isinstance(changed[name].dtype, pd.StringDtype):
            changed.loc[rows, name] = [f"unheard of word{row}" for row in np.flatnonzero(rows)]
    changed[IMAGE] = pd.Series(
        [_inverted(image) if is_hidden else image for image, is_hidden in zip(catalogue[IMAGE], rows, strict=True)],
        dtype=object,
    )
    return changed


def _inverted(image: np.ndarray | str) -> np.ndarray | str:
    return image if isinstance(image, str) else np.asarray(255 - image)


def _rows(interactions: Interactions, kept: np.ndarray) -> Interactions:
    def part(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[kept]

    return replace(
        interactions,
        users=interactions.users[kept],
        items=interactions.items[kept],
        positive=interactions.positive[kept],
        timestamps=part(interactions.timestamps),
        ratings=part(interactions.ratings),
        given_split=part(interactions.given_split),
    )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))
