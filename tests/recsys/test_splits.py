"""Splits: small tables worked by hand, properties over all strategies, the manifest, and the test for leaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest

from fusion.errors import ConfigError, DataError, GateError
from leaks import State, assert_fitted_on_train_only
from recsys.cleaning import CleaningSettings, clean
from recsys.schema import HISTORY, TEST, TRAIN, VALIDATION, Interactions, Tables
from recsys.splits import SplitManifest, SplitSettings, Strategy, split, split_examples

RECOMMENDATION = [strategy for strategy in get_args(Strategy) if strategy not in ("stratified", "given")]
TEMPORAL = ["temporal_global", "temporal_per_user", "leave_last_out"]


def made(rows: list[tuple[str, str, float, int]], positive: str = "any", **columns: Any) -> Interactions:
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"]).assign(**columns)
    items = pd.DataFrame({"item_id": sorted(set(table["item_id"])), "image": ""})
    return clean(Tables(items, "toy", table), CleaningSettings(duplicates="keep_all"), positive)[0]


def many(seed: int = 0, times: int = 1000, users: int = 30) -> Interactions:
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for item in rng.choice(40, rng.integers(3, 20), replace=False):
            rows.append((f"u{user}", f"i{item}", float(rng.integers(1, 6)), int(rng.integers(0, times))))
    return made(rows, "rating >= 2")


def by_key(interactions: Interactions, parts: np.ndarray) -> dict[tuple[str, str], int]:
    users, items = interactions.user_ids[interactions.users], interactions.item_ids[interactions.items]
    return {(user, item): int(part) for user, item, part in zip(users, items, parts, strict=True)}


def settings(strategy: str, **more: Any) -> SplitSettings:
    return SplitSettings.model_validate({"strategy": strategy, **more})


def test_temporal_global_by_hand() -> None:
    """B6: ten rows, the last two in time are test, the two before validation."""
    interactions = made([(f"u{n % 2}", f"i{n}", 1.0, 100 - n) for n in range(10)])
    parts = by_key(interactions, split(interactions, settings("temporal_global", validation=0.2, test=0.2)))
    expected = {0: TEST, 1: TEST, 2: VALIDATION, 3: VALIDATION}
    assert parts == {(f"u{n % 2}", f"i{n}"): expected.get(n, TRAIN) for n in range(10)}


def test_leave_last_out_by_hand() -> None:
    """B6: rows that are not positive go with the positive before them; two positives are too few."""
    rows = [("a", item, rating, time) for time, (item, rating) in enumerate(
        [("i0", 1), ("i1", 5), ("i2", 1), ("i3", 5), ("i4", 1), ("i5", 5), ("i6", 1)]
    )] + [("b", "i1", 5, 1), ("b", "i2", 5, 2)]  # fmt: skip
    interactions = made(rows, "rating >= 4")
    parts = by_key(interactions, split(interactions, settings("leave_last_out")))
    assert [parts["a", f"i{n}"] for n in range(7)] == [TRAIN] * 3 + [VALIDATION] * 2 + [TEST] * 2
    assert parts["b", "i1"] == parts["b", "i2"] == TRAIN


def test_temporal_per_user_counts_as_recbole_does() -> None:
    """B6: shares rounded down, at least one each from three positives on."""
    rows = [(user, f"i{n}", 1.0, n) for user, count in (("a", 2), ("b", 3), ("c", 30)) for n in range(count)]
    interactions = made(rows)
    parts = split(interactions, settings("temporal_per_user"))
    counted = {
        user: np.bincount(parts[interactions.users == number], minlength=3).tolist()
        for number, user in enumerate(interactions.user_ids)
    }
    assert counted == {"a": [2, 0, 0], "b": [1, 1, 1], "c": [24, 3, 3]}


@pytest.mark.parametrize("strategy", TEMPORAL)
def test_temporal_splits_never_learn_from_later(strategy: str) -> None:
    """B6: within a user (or over all) no train row is later than a test row."""
    interactions = many()
    parts = split(interactions, settings(strategy))
    groups = [np.ones(len(parts), bool)] if strategy == "temporal_global" else None
    groups = groups or [interactions.users == user for user in range(len(interactions.user_ids))]
    for rows in groups:
        latest = {part: interactions.timestamps[rows & (parts == part)] for part in (TRAIN, VALIDATION, TEST)}
        for before, after in ((TRAIN, VALIDATION), (VALIDATION, TEST), (TRAIN, TEST)):
            if len(latest[before]) and len(latest[after]):
                assert latest[before].max() <= latest[after].min()


def test_user_holdout_keeps_users_apart() -> None:
    """B6: held-out users have nothing in train; what is known of them is earlier than what is asked."""
    interactions = many()
    parts = split(interactions, settings("user_holdout", test=0.2, validation=0.2, history=0.7))
    of_user = [set(parts[interactions.users == user]) for user in range(len(interactions.user_ids))]
    assert sum(TEST in found for found in of_user) == sum(VALIDATION in found for found in of_user) == 6
    for user, found in enumerate(of_user):
        assert found in ({TRAIN}, {HISTORY, TEST}, {HISTORY, VALIDATION})
        if found != {TRAIN}:
            rows = (interactions.users == user) & interactions.positive
            times, history = interactions.timestamps[rows], parts[rows] == HISTORY
            assert times[history].max() <= times[~history].min()
            assert (~history).sum() == max(1, int(0.3 * rows.sum() + 1e-9))


def test_item_holdout_makes_items_cold() -> None:
    """B6."""
    interactions = many()
    parts = split(interactions, settings("item_holdout", test=0.25, validation=0.25))
    of_item = [set(parts[interactions.items == item]) for item in np.unique(interactions.items)]
    assert all(len(found) == 1 for found in of_item)
    assert sum(found == {TEST} for found in of_item) == sum(found == {VALIDATION} for found in of_item) == 10


@pytest.mark.parametrize("strategy", RECOMMENDATION)
def test_a_split_depends_on_seed_and_keys_alone(strategy: str) -> None:
    """B6: with ties in nearly every time; a new item or user of other data moves no row's hash."""
    interactions = many(times=3)
    parts = split(interactions, settings(strategy, seed=1))
    assert parts.dtype == np.int8 and len(parts) == len(interactions.users)
    again = split(interactions, settings(strategy, seed=1))
    np.testing.assert_array_equal(parts, again)
    assert (split(interactions, settings(strategy, seed=2)) != parts).any()
    order = np.random.default_rng(0).permutation(len(parts))
    permuted = replace(
        interactions,
        users=interactions.users[order],
        items=interactions.items[order],
        positive=interactions.positive[order],
        timestamps=interactions.timestamps[order],
        ratings=interactions.ratings[order],
    )
    np.testing.assert_array_equal(split(permuted, settings(strategy, seed=1)), parts[order])


def test_random_shares_are_per_user() -> None:
    rows = [(f"u{user}", f"i{n}", 1.0, 0) for user in range(50) for n in range(20)]
    interactions = made(rows)
    parts = split(interactions, settings("random", validation=0.1, test=0.2))
    for user in range(50):
        assert np.bincount(parts[interactions.users == user]).tolist() == [14, 2, 4]
    chosen = np.bincount(interactions.items[parts == TEST], minlength=20)
    assert chosen.min() > 0 and chosen.max() < 25, "every item should be drawn about ten times in fifty"


@pytest.mark.parametrize("timed", [True, False])
def test_a_given_split_is_honoured_and_validation_is_cut_from_train(timed: bool) -> None:
    """B6: by time where there is any, else by chance."""
    rows = [(user, f"i{n}", 1.0, n) for user in "ab" for n in range(10)]
    names = ["train"] * 8 + ["test"] * 2
    interactions = made(rows, split=names * 2)
    if not timed:
        interactions = replace(interactions, timestamps=None)
    parts = split(interactions, settings("given", validation=0.25))
    np.testing.assert_array_equal(parts == TEST, interactions.given_split == TEST)
    for user in (0, 1):
        cut = np.flatnonzero(parts[interactions.users == user] == VALIDATION).tolist()
        assert len(cut) == 2
        if timed:
            assert cut == [6, 7]
    whole = made(rows, split=["validation", *names[1:]] * 2)
    np.testing.assert_array_equal(split(whole, settings("given")), whole.given_split)


def test_a_split_that_cannot_be_made_is_refused() -> None:
    """B6: no timestamps, no given split, an empty part, a strategy of the other task."""
    untimed = replace(many(), timestamps=None)
    for strategy in TEMPORAL:
        with pytest.raises(DataError, match=f"split.strategy={strategy} needs timestamps, which 'toy' has not"):
            split(untimed, settings(strategy))
    for strategy in ("random", "user_holdout", "item_holdout"):
        split(untimed, settings(strategy))
    with pytest.raises(DataError, match="needs a split in the data"):
        split(many(), settings("given"))
    few = made([("a", "x", 1.0, 1), ("a", "y", 1.0, 2), ("b", "x", 1.0, 3), ("b", "y", 1.0, 4)])
    for strategy in RECOMMENDATION:
        with pytest.raises(DataError, match=r"leaves (validation|test|train) without any"):
            split(few, settings(strategy))
    with pytest.raises(ConfigError, match=r"must be one of temporal_global, .* received 'stratified'"):
        split(many(), settings("stratified"))
    with pytest.raises(ConfigError, match=r"must be one of stratified, random, given"):
        split_examples(["a", "b"], None, settings("temporal_global"))


def test_stratified_keeps_shares_in_each_class() -> None:
    """B6."""
    labels = np.repeat(["a", "b", "rare", "single"], [100, 30, 3, 1])
    parts = split_examples(labels, None, settings("stratified", validation=0.1, test=0.2))
    counted = {label: np.bincount(parts[labels == label], minlength=3).tolist() for label in np.unique(labels)}
    assert counted == {"a": [70, 10, 20], "b": [21, 3, 6], "rare": [1, 1, 1], "single": [1, 0, 0]}
    assert (split_examples(labels, None, settings("stratified", validation=0.1, test=0.2, seed=1)) != parts).any()
    shuffled = split_examples(labels, None, settings("random", validation=0.1, test=0.2))
    assert np.bincount(shuffled).tolist() == [95, 13, 26]


def test_given_examples_are_honoured() -> None:
    """B6."""
    labels, names = ["a", "b"] * 20, ["train"] * 30 + ["test"] * 10
    parts = split_examples(labels, names, settings("given"))
    assert (np.flatnonzero(parts == TEST) == np.arange(30, 40)).all()
    assert np.bincount(parts).tolist() == [28, 2, 10]
    with pytest.raises(DataError, match="the data have neither"):
        split_examples(labels, None, settings("given"))
    with pytest.raises(DataError, match="leaves test without any"):
        split_examples(labels, ["train"] * 40, settings("given"))


def test_a_manifest_survives_the_disk_and_knows_its_rows(tmp_path: Path) -> None:
    """B6."""
    interactions = many()
    chosen = settings("user_holdout", seed=3)
    parts = split(interactions, chosen)
    manifest = SplitManifest.of(interactions, parts, chosen)
    assert sum(manifest.counts.values()) == len(parts) and manifest.counts["history"] > 0
    manifest.save(tmp_path)
    loaded = SplitManifest.load(tmp_path)
    np.testing.assert_array_equal(loaded.parts, parts)
    assert (loaded.sha256, loaded.strategy) == (manifest.sha256, "user_holdout")
    assert SplitSettings.model_validate(loaded.settings) == chosen
    loaded.verify(interactions)
    moved = interactions.timestamps.copy()
    moved[0] += 1
    for other in (replace(interactions, timestamps=moved), many(seed=1)):
        with pytest.raises(GateError, match="the data must be those that were split"):
            loaded.verify(other)


def test_the_hash_is_of_rows_and_parts_not_of_their_order() -> None:
    """B6: permuted rows hash alike, also beside items nobody took; one other part hashes differently."""
    interactions = many()
    chosen = settings("random")
    parts = split(interactions, chosen)
    sha256 = SplitManifest.of(interactions, parts, chosen).sha256
    order = np.random.default_rng(0).permutation(len(parts))
    permuted = replace(
        interactions,
        users=interactions.users[order],
        items=interactions.items[order] + 1,
        item_ids=np.array(["a new first item", *interactions.item_ids], object),
        timestamps=interactions.timestamps[order],
    )
    assert SplitManifest.of(permuted, parts[order], chosen).sha256 == sha256
    changed = parts.copy()
    changed[0] = TRAIN if parts[0] != TRAIN else TEST
    assert SplitManifest.of(interactions, changed, chosen).sha256 != sha256


def test_a_manifest_of_examples_counts_content_not_place(tmp_path: Path) -> None:
    """B6."""
    table = pd.DataFrame({"label": list("abab"), "text": ["one", "two", "three", "two"], "image": ["/x/1.png"] * 4})
    parts = np.array([TRAIN, TRAIN, VALIDATION, TEST], np.int8)
    manifest = SplitManifest.of_examples(table, parts, settings("stratified"))
    manifest.verify(table.assign(image="/elsewhere/1.png"))
    order = [2, 0, 3, 1]
    permuted = SplitManifest.of_examples(table.iloc[order], parts[order], settings("stratified"))
    assert permuted.sha256 == manifest.sha256
    with pytest.raises(GateError):
        manifest.verify(table.assign(text=["one", "two", "three", "four"]))
    with pytest.raises(GateError):
        manifest.verify(table.head(3))


def test_a_spoilt_manifest_is_refused(tmp_path: Path) -> None:
    interactions = many()
    chosen = settings("random")
    SplitManifest.of(interactions, split(interactions, chosen), chosen).save(tmp_path)
    np.savez_compressed(tmp_path / "split.npz", parts=np.zeros(len(interactions.users), np.int8))
    with pytest.raises(GateError, match="count differently"):
        SplitManifest.load(tmp_path)
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(DataError, match="must be readable"):
        SplitManifest.load(tmp_path)
    (tmp_path / "split.json").write_text("{")
    with pytest.raises(DataError, match="must be readable"):
        SplitManifest.load(tmp_path)


def honest(interactions: Interactions, parts: np.ndarray) -> State:
    """Popularity and the texts of train items."""
    matrix = interactions.matrix((parts == TRAIN) & interactions.positive)
    seen = np.unique(interactions.items[parts == TRAIN])
    words = sorted(set(" ".join(interactions.catalogue["title"].iloc[seen]).split()))
    return {"popularity": np.asarray(matrix.sum(0)), "words": np.array(words)}


def leaks_by_popularity(interactions: Interactions, parts: np.ndarray) -> State:
    return {"popularity": np.bincount(interactions.items, minlength=len(interactions.item_ids))}


def leaks_by_vocabulary(interactions: Interactions, parts: np.ndarray) -> State:
    return honest(interactions, parts) | {"words": np.array(sorted(set(interactions.catalogue["title"])))}


def leaks_by_time(interactions: Interactions, parts: np.ndarray) -> State:
    return honest(interactions, parts) | {"last": interactions.timestamps.max(keepdims=True)}


def learns_nothing(interactions: Interactions, parts: np.ndarray) -> State:
    return {"weights": np.zeros(3)}


@pytest.mark.parametrize("strategy", ["temporal_global", "user_holdout", "item_holdout"])
def test_the_leak_test_passes_the_honest_and_catches_the_others(strategy: str) -> None:
    """B6: members and vocabularies fitted on hidden rows are caught, and so is a test that would show nothing."""
    interactions = many()
    titles = [f"word{number}" for number in range(len(interactions.item_ids))]
    interactions = replace(interactions, catalogue=interactions.catalogue.assign(title=pd.Series(titles, dtype="str")))
    parts = split(interactions, settings(strategy))
    assert_fitted_on_train_only(honest, interactions, parts)
    with pytest.raises(AssertionError, match="stay hidden: popularity"):
        assert_fitted_on_train_only(leaks_by_popularity, interactions, parts)
    if strategy == "item_holdout":
        with pytest.raises(AssertionError, match="stay hidden: words"):
            assert_fitted_on_train_only(leaks_by_vocabulary, interactions, parts)
    if strategy == "temporal_global":
        with pytest.raises(AssertionError, match="stay hidden: last"):
            assert_fitted_on_train_only(leaks_by_time, interactions, parts)
    with pytest.raises(AssertionError, match="shows nothing"):
        assert_fitted_on_train_only(learns_nothing, interactions, parts)
