"""The lint of splits: every kind of finding on data made for it by hand, and silence where nothing is wrong."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fusion.errors import DataError
from recsys.leaks import Finding, leaks, tell, told, too_good
from recsys.schema import HISTORY, ITEM_ID, TEST, TRAIN, VALIDATION, Interactions
from worlds import World


def rows(*table: tuple[int, int, int, int], positive: list[bool] | None = None, timed: bool = True) -> tuple:
    """Interactions and parts of rows (user, item, time, part)."""
    users, items, times, parts = np.array(table, np.int64).T
    ids = np.array([f"i{number}" for number in range(items.max() + 1)], object)
    data = Interactions(
        name="toy",
        user_ids=np.array([f"u{number}" for number in range(users.max() + 1)], object),
        item_ids=ids,
        users=users.astype(np.int32),
        items=items.astype(np.int32),
        positive=np.ones(len(users), bool) if positive is None else np.array(positive),
        timestamps=times if timed else None,
        ratings=None,
        catalogue=pd.DataFrame({ITEM_ID: ids}),
    )
    return data, parts.astype(np.int8)


def kinds(data: Interactions, parts: np.ndarray, strategy: str = "given") -> dict[str, Finding]:
    return {finding.kind: finding for finding in leaks(data, parts, strategy)}


def test_a_clean_split_by_time_has_no_finding() -> None:
    """All training is before all of the test, every item is known, nothing stands twice."""
    data, parts = rows((0, 0, 1, TRAIN), (0, 1, 2, TRAIN), (1, 1, 3, TRAIN), (1, 0, 9, TEST), (0, 0, 4, VALIDATION))
    assert leaks(data, parts, "temporal_global") == []


def test_training_later_than_the_test_of_the_same_user() -> None:
    """User 0 has two training rows after a test row; user 1 has none, and equal times are not later."""
    data, parts = rows(
        (0, 0, 5, TEST), (0, 1, 6, TRAIN), (0, 2, 7, TRAIN), (0, 3, 1, TRAIN), (1, 1, 8, TRAIN), (1, 0, 8, TEST),
        (2, 0, 0, TRAIN),
    )  # fmt: skip
    found = kinds(data, parts, "random")["later_training"]
    assert (found.level, found.count, found.share) == ("warning", 2, 0.5)
    assert "1 of 2 test users" in found.sentence and "temporal_per_user" in found.sentence
    assert kinds(data, parts, "item_holdout")["later_training"].level == "note"


def test_rows_that_are_not_positive_do_not_leak() -> None:
    data, parts = rows((0, 0, 5, TEST), (0, 1, 9, TRAIN), (0, 2, 1, TRAIN), (1, 0, 1, TRAIN), positive=[1, 0, 1, 1])
    assert kinds(data, parts) == {}


def test_the_future_of_others_and_items_that_were_not_there_yet() -> None:
    """User 0 is asked at 5 and at 20; user 1 trains at 10, when item 2 appears: one of three items, once of twice."""
    data, parts = rows(
        (0, 0, 1, TRAIN), (1, 1, 2, TRAIN), (0, 1, 5, TEST), (1, 2, 10, TRAIN), (0, 2, 20, TEST)
    )  # fmt: skip
    found = kinds(data, parts, "temporal_per_user")
    assert set(found) == {"later_others", "later_items"}
    assert (found["later_others"].count, found["later_others"].share) == (1, 0.5)
    assert found["later_items"].count == 1 and found["later_items"].share == pytest.approx((1 / 3 + 0) / 2)
    assert {finding.level for finding in found.values()} == {"note"}


def test_without_times_only_what_needs_none_is_looked_at() -> None:
    data, parts = rows((0, 0, 5, TEST), (0, 1, 6, TRAIN), (1, 0, 8, TRAIN), timed=False)
    assert leaks(data, parts, "random") == []


@pytest.mark.parametrize("part", [TRAIN, VALIDATION, HISTORY])
def test_pairs_that_stand_in_the_test_and_before_it(part: int) -> None:
    data, parts = rows((0, 0, 1, part), (1, 0, 1, TRAIN), (1, 1, 1, TRAIN), (0, 0, 9, TEST), (0, 1, 9, TEST))
    found = kinds(data, parts)["repeated_pairs"]
    assert (found.level, found.count, found.share) == ("warning", 1, 0.5)


def test_users_who_stand_in_the_data_twice() -> None:
    """0, 2 and 6 have the same ten items, cut differently; 1 has one more; 3 and 4 are equal but short."""
    ten = list(range(1, 11))
    items = {0: ten, 2: ten[::-1], 1: [*ten, 11], 3: ten[:9], 4: ten[:9], 5: [*ten, 11, 12]}
    table = [(user, item, 9, TRAIN) for user, listed in items.items() for item in listed[1:]]
    asked = [(user, listed[0], 9, TEST) for user, listed in items.items()]
    data, parts = rows(*table, *asked, *((6, item, 9, TRAIN) for item in ten))
    found = kinds(data, parts)
    assert set(found) == {"equal_users"}
    assert (found["equal_users"].count, found["equal_users"].share) == (2, 2 / 6)


def test_test_items_without_a_training_row() -> None:
    data, parts = rows((0, 0, 1, TRAIN), (1, 0, 9, TEST), (1, 1, 9, TEST), (0, 1, 5, VALIDATION))
    found = kinds(data, parts)["unknown_items"]
    assert (found.level, found.count, found.share) == ("note", 1, 0.5)
    assert kinds(data, parts, "item_holdout") == {}


def test_the_splits_of_the_planted_world() -> None:
    """A split by chance is warned of, one by time is not, and no split of clean data repeats pairs."""
    for strategy, level in (("random", "warning"), ("temporal_global", None), ("leave_last_out", None)):
        world = World.planted(strategy)
        found = kinds(world.data, world.parts, strategy)
        assert ("later_training" in found) == (level is not None)
        assert "repeated_pairs" not in found
    assert "later_others" not in kinds(*_planted("temporal_global"))
    assert "later_training" not in kinds(*_planted("user_holdout"))
    assert kinds(*_planted("item_holdout"))["later_training"].level == "note"


def _planted(strategy: str) -> tuple[Interactions, np.ndarray, str]:
    world = World.planted(strategy)
    return world.data, world.parts, strategy


def test_findings_are_kept_told_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(tmp_path) == []
    data, parts = rows((0, 0, 5, TEST), (0, 1, 6, TRAIN), (1, 0, 1, TRAIN))
    found = leaks(data, parts, "random")
    tell(found, tmp_path / "data", quiet=True)
    assert capsys.readouterr().err == "" and told(tmp_path / "data") == found
    tell(found, tmp_path)
    assert [finding.level for finding in found] == ["warning", "note", "note"]
    assert capsys.readouterr().err.splitlines() == [f"warning: {found[0].sentence}"]
    with pytest.raises(DataError, match="with --strict a split must not leak: 1 training rows"):
        tell(found, tmp_path, strict=True)
    tell([finding for finding in found if finding.level == "note"], tmp_path, strict=True)


def report(**members: tuple[float | None, float | None]) -> dict[str, Any]:
    def figure(value: float | None) -> dict[str, Any]:
        wide = None if value is None else 0.01
        return {
            "ndcg@10": {
                "value": value,
                "low": value and value - wide,
                "high": value is not None and value + wide,
                "n": 9,
            }
        }

    return {
        "primary_metric": "ndcg@10",
        "members": {name: figure(test) for name, (_, test) in members.items()},
        "validation": {"members": {name: figure(validation) for name, (validation, _) in members.items()}},
    }


def test_a_member_that_knows_validation_stands_out() -> None:
    """All fall from validation to test by a third; one falls to a third."""
    found = too_good(report(a=(0.30, 0.20), b=(0.15, 0.10), c=(0.60, 0.20)))
    assert [finding.sentence.split()[2] for finding in found] == ["c"]
    assert "0.6000 ndcg@10 on validation and 0.2000 on test, 3.0 times (others 1.5 times)" in found[0].sentence
    assert too_good(report(a=(0.30, 0.20), b=(0.15, 0.10))) == []
    assert [f.count for f in too_good(report(alone=(0.5, 0.1)))] == [1]


def test_what_is_unsure_or_undefined_raises_no_alarm() -> None:
    assert too_good(report(a=(0.02, 0.01), b=(0.10, 0.10))) == []  # twice as good, but the intervals touch
    assert too_good(report(a=(None, 0.01), b=(0.10, None))) == []
    assert [f.kind for f in too_good(report(a=(0.5, 0.0), b=(0.1, 0.1)))] == ["too_good"]


def test_many_rows_take_seconds() -> None:
    """A second for a million rows on a quiet core: nothing goes row by row."""
    random, count = np.random.default_rng(0), 300_000
    users, items = random.integers(0, 30_000, count), random.integers(0, 40_000, count)
    toy, _ = rows((29_999, 39_999, 0, TRAIN))
    data = replace(
        toy,
        users=users,
        items=items,
        positive=np.ones(count, bool),
        timestamps=random.permutation(count).astype(np.int64),
    )
    parts = np.where(random.random(count) < 0.2, TEST, TRAIN).astype(np.int8)
    started = time.perf_counter()
    found = kinds(data, parts, "random")
    assert time.perf_counter() - started < 10
    assert {"later_training", "later_others", "later_items", "repeated_pairs"} <= set(found)
