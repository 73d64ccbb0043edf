"""A lint of the split: where the test part asks for what training could have known, found before anything is fitted.

Nothing is repaired here, things are said. A `warning` is a fault of data or split that makes figures doubtful; a
`note` is a property of the chosen split that a reader has to know. Source of the kinds: Ji, Sun, Zhang and Li, A
Critical Study on Data Leakage in Recommender System Offline Evaluation, ACM TOIS 41(3), 2023; Meng et al., Exploring
Data Splitting Strategies for the Evaluation of Recommendation Models, RecSys 2020.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusion.errors import DataError
from fusion.files import write_atomically
from recsys.metrics import parse_metric
from recsys.schema import HISTORY, TEST, TRAIN, VALIDATION, Interactions

FILE = "leaks.json"
"""Below a run's `data/`."""
FEWEST_ITEMS = 10
"""Users with fewer items are not compared with each other: short lists of popular items are equal by chance."""
TOO_GOOD = 1.5
"""How many times further apart than those of the other members the two figures of a suspicious one are."""


@dataclass(frozen=True)
class Finding:
    """One thing that a lint found.

    Attributes:
        kind: its short name, a key.
        level: `warning` (makes figures doubtful) or `note` (inherent in the split).
        count: rows, users or items concerned.
        share: of how many, 0 to 1.
        sentence: for people.
    """

    kind: str
    level: Literal["warning", "note"]
    count: int
    share: float
    sentence: str


def leaks(data: Interactions, parts: np.ndarray, strategy: str) -> list[Finding]:
    """What is wrong, or has to be known, about a split.

    Args:
        data: the cleaned interactions. Only positive rows are looked at: the others teach nothing.
        parts: int8 `[N]`, the part of each row.
        strategy: the name of the split; what it does on purpose is a note or nothing.

    >>> from recsys.cleaning import CleaningSettings, clean
    >>> from recsys.datasets.planted import Planted
    >>> from recsys.splits import SplitSettings, split
    >>> data, _ = clean(Planted.read(Planted.Config(users=50, items=40, image_size=8)), CleaningSettings())
    >>> [found.kind for found in leaks(data, split(data, SplitSettings(strategy="random")), "random")][0]
    'later_training'
    """
    split = _Split(data, parts, strategy)
    checks: list[Callable[[_Split], Finding | None]] = [_repeated_pairs, _equal_users, _unknown_items]
    if data.timestamps is not None:
        checks = [_later_training, _later_others, _later_items, *checks]
    return [found for check in checks if (found := check(split)) is not None]


def tell(found: Sequence[Finding], folder: Path, *, strict: bool = False, quiet: bool = False) -> None:
    """Writes findings to `leaks.json` in `folder` (a run's `data/`), and warnings to stderr.

    Raises DataError with the first warning when `strict`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, json.dumps([asdict(finding) for finding in found], indent=2))
    warnings = [finding for finding in found if finding.level == "warning"]
    if strict and warnings:
        raise DataError(f"with --strict a split must not leak: {warnings[0].sentence}")
    if not quiet:
        for finding in warnings:
            print(f"warning: {finding.sentence}", file=sys.stderr, flush=True)


def told(folder: Path) -> list[Finding]:
    """The findings that `tell` wrote; none where it did not run."""
    path = folder / FILE
    return [Finding(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def too_good(report: Mapping[str, Any]) -> list[Finding]:
    """Members whose validation figure lies so far above their test figure that they must have seen validation rows.

    Both parts may well differ in difficulty, so a member is held against the others: its ratio of validation to test
    on the deciding metric must exceed `TOO_GOOD` times their median (1 for a lone member), and its intervals must not
    touch.
    """
    metric = report["primary_metric"]
    if not parse_metric(metric).higher_is_better:
        return []
    on_validation, on_test = report["validation"]["members"], report["members"]
    ratios = {name: _ratio(on_validation[name][metric], on_test[name][metric]) for name in on_test}
    result = []
    for name, ratio in ratios.items():
        others = [value for other, value in ratios.items() if other != name and np.isfinite(value)]
        usual = float(np.median(others)) if others else 1.0
        before, after = on_validation[name][metric], on_test[name][metric]
        apart = before["low"] is not None and after["high"] is not None and before["low"] > after["high"]
        if apart and ratio > TOO_GOOD * usual:
            sentence = (
                f"The member {name} reaches {before['value']:.4f} {metric} on validation and {after['value']:.4f} on "
                f"test, {ratio:.1f} times (others {usual:.1f} times): it may have seen validation rows."
            )
            result.append(Finding("too_good", "warning", 1, 1 / len(ratios), sentence))
    return result


def _ratio(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Validation over test; NaN where either is undefined, infinity where test is 0 and validation is not."""
    if before["value"] is None or after["value"] is None or (after["value"] == 0 and before["value"] == 0):
        return float("nan")
    return before["value"] / after["value"] if after["value"] > 0 else float("inf")


class _Split:
    """Positive rows of a split: users, items and times of training and of test, all int64."""

    def __init__(self, data: Interactions, parts: np.ndarray, strategy: str) -> None:
        self.data = data
        self.strategy = strategy
        self.train = np.flatnonzero((parts == TRAIN) & data.positive)
        self.test = np.flatnonzero((parts == TEST) & data.positive)
        self.known = np.flatnonzero(np.isin(parts, (TRAIN, HISTORY, VALIDATION)))

    def times(self, rows: np.ndarray) -> np.ndarray:
        assert self.data.timestamps is not None
        times: np.ndarray = self.data.timestamps[rows]
        return times

    def pairs(self, rows: np.ndarray) -> np.ndarray:
        """One number for each user and item."""
        pairs: np.ndarray = self.data.users[rows].astype(np.int64) * self.data.shape[1] + self.data.items[rows]
        return pairs


def _later_training(split: _Split) -> Finding | None:
    """Training rows of a user that lie later than a test row of the same user."""
    users = split.data.users
    first_test = np.full(split.data.shape[0], np.iinfo(np.int64).max)
    np.minimum.at(first_test, users[split.test], split.times(split.test))
    later = split.times(split.train) > first_test[users[split.train]]
    if not later.any():
        return None
    concerned = len(np.unique(users[split.train][later]))
    asked = len(np.unique(users[split.test]))
    inherent = split.strategy == "item_holdout"
    advice = "" if inherent else " Use split.strategy=temporal_global or temporal_per_user."
    return Finding(
        "later_training",
        "note" if inherent else "warning",
        int(later.sum()),
        concerned / asked,
        f"{int(later.sum()):,} training rows of {concerned:,} of {asked:,} test users lie later than a test row of the "
        f"same user ({split.strategy}): members learn from the future.{advice}",
    )


def _later_others(split: _Split) -> Finding | None:
    """Test rows that are older than the newest training row of anybody."""
    earlier = split.times(split.test) < split.times(split.train).max()
    if not earlier.any():
        return None
    share = float(earlier.mean())
    return Finding(
        "later_others",
        "note",
        int(earlier.sum()),
        share,
        f"{share:.0%} of the test rows are older than the newest training row ({split.strategy}): what others did "
        "afterwards is known, as popularity is. Only split.strategy=temporal_global is free of that.",
    )


def _later_items(split: _Split) -> Finding | None:
    """Trained items that nobody had taken yet when a test row happened: candidates that were not there."""
    items, times = split.data.items, split.data.timestamps
    assert times is not None
    first = np.full(split.data.shape[1], np.iinfo(np.int64).max)
    np.minimum.at(first, items, times)
    appeared = np.sort(first[np.unique(items[split.train])])
    there = np.searchsorted(appeared, split.times(split.test), side="right")
    missing = len(appeared) - there
    share = float(missing.mean() / len(appeared))
    if not missing.any():
        return None
    return Finding(
        "later_items",
        "note",
        int((missing > 0).sum()),
        share,
        f"On average {share:.1%} of the trained items appear for the first time after the test row for which they are "
        f"candidates ({split.strategy}): they could not have been recommended then.",
    )


def _repeated_pairs(split: _Split) -> Finding | None:
    """Pairs of user and item that stand in the test part and in what is known before it."""
    pairs = split.pairs(split.test)
    repeated = np.isin(pairs, split.pairs(split.known))
    if not repeated.any():
        return None
    share = float(repeated.mean())
    return Finding(
        "repeated_pairs",
        "warning",
        int(repeated.sum()),
        share,
        f"{int(repeated.sum()):,} test rows ({share:.1%}) repeat a user and item known before the test: seen items are "
        "no candidates, so they are not counted. Set cleaning.duplicates=keep_last or keep_first.",
    )


def _equal_users(split: _Split) -> Finding | None:
    """Test users with exactly the items of another user in all parts together: one person twice, or copied rows."""
    pairs = np.unique(split.pairs(np.flatnonzero(split.data.positive)))
    users, items = pairs // split.data.shape[1], pairs % split.data.shape[1]
    present, starts, counts = np.unique(users, return_index=True, return_counts=True)
    owners: dict[bytes, list[int]] = {}
    for place in np.flatnonzero(counts >= FEWEST_ITEMS):
        listed = items[starts[place] : starts[place] + counts[place]].tobytes()
        owners.setdefault(listed, []).append(int(present[place]))
    asked = set(split.data.users[split.test].tolist())
    equal = sum(user in asked for same in owners.values() if len(same) > 1 for user in same)
    if not equal:
        return None
    return Finding(
        "equal_users",
        "warning",
        equal,
        equal / len(asked),
        f"{equal:,} of {len(asked):,} test users have exactly the items of another user ({FEWEST_ITEMS} or more): the "
        "same people may stand in the data twice, so that training knows what the test asks. Join their ids.",
    )


def _unknown_items(split: _Split) -> Finding | None:
    """Test rows whose item no training row has."""
    trained = np.bincount(split.data.items[split.train], minlength=split.data.shape[1]) > 0
    unknown = ~trained[split.data.items[split.test]]
    if split.strategy == "item_holdout" or not unknown.any():
        return None
    share = float(unknown.mean())
    return Finding(
        "unknown_items",
        "note",
        int(unknown.sum()),
        share,
        f"{int(unknown.sum()):,} test rows ({share:.1%}) ask for items without a training row: only members that read "
        "content can find them.",
    )


__all__ = ["Finding", "leaks", "tell", "told", "too_good"]
