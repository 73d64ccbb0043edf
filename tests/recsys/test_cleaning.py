"""Cleaning: each rule by a small table worked by hand, and what must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.errors import ConfigError, DataError
from recsys.cleaning import CleaningSettings, clean, clean_examples
from recsys.schema import TEST, TRAIN, Interactions, Tables
from recsys.vocabulary import Vocabulary

GOOD = [("a", "x", 5.0, 10), ("a", "y", 3.0, 20), ("b", "x", 4.0, 30), ("b", "z", 1.0, 40)]


def tables(rows: list[tuple[Any, ...]], items: pd.DataFrame | None = None) -> Tables:
    interactions = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    if items is None:
        items = pd.DataFrame({"item_id": ["x", "y", "z"], "title": ["X", "Y", "Z"], "image": ""})
    return Tables(items, "toy", interactions)


def triples(interactions: Interactions) -> set[tuple[str, str, float]]:
    users, items = interactions.user_ids[interactions.users], interactions.item_ids[interactions.items]
    return set(zip(users, items, interactions.ratings.tolist(), strict=True))


def counts(dropped: list[Any]) -> dict[str, int]:
    return {entry.rule: entry.rows for entry in dropped}


def test_good_rows_pass_untouched() -> None:
    """B2: numbers follow sorted ids, the catalogue is aligned, dtypes are the schema's."""
    interactions, dropped = clean(tables(GOOD[::-1]), CleaningSettings(strict=True))
    assert dropped == []
    assert interactions.user_ids.tolist() == ["a", "b"] and interactions.item_ids.tolist() == ["x", "y", "z"]
    assert interactions.users.tolist() == [0, 0, 1, 1] and interactions.items.tolist() == [0, 1, 0, 2]
    assert interactions.timestamps.tolist() == [10, 20, 30, 40]
    assert interactions.catalogue["title"].tolist() == ["X", "Y", "Z"]
    assert interactions.catalogue["item_id"].tolist() == interactions.item_ids.tolist()
    dtypes = [interactions.users.dtype, interactions.items.dtype, interactions.positive.dtype]
    assert dtypes == [np.int32, np.int32, np.bool_]
    assert interactions.timestamps.dtype == np.int64 and interactions.ratings.dtype == np.float32


BAD_ROWS = {
    "user ids missing": ("", "x", 1.0, 1),
    "item ids missing": ("a", None, 1.0, 1),
    "user ids longer than 256 bytes": ("u" * 10_000, "x", 1.0, 1),
    "item ids longer than 256 bytes": ("a", "é" * 129, 1.0, 1),
    "user ids with NUL or control characters": ("a\0b", "x", 1.0, 1),
    "item ids with NUL or control characters": ("a", "x\n", 1.0, 1),
    "ratings that are not finite numbers": ("a", "z", float("nan"), 1),
    "ratings out of range": ("a", "z", 9.0, 1),
    "timestamps that are no seconds before the year 10000": ("a", "z", 1.0, 253_402_300_800),
    "items that the catalogue lacks": ("a", "unheard of", 1.0, 1),
    "repeated interactions of a user with an item": ("a", "x", 1.0, 1),
}
STRICT = {"max_rating": 5.0, "unknown_items": "drop"}


@pytest.mark.parametrize("rule", sorted(BAD_ROWS))
def test_a_bad_row_is_dropped_counted_and_shown(rule: str) -> None:
    """B2: one rule each, with the good rows left as they are."""
    interactions, dropped = clean(tables([*GOOD, BAD_ROWS[rule]]), CleaningSettings(**STRICT))
    assert counts(dropped) == {rule: 1}
    assert len(dropped[0].examples) == 1 and len(dropped[0].examples[0]) < 200
    assert triples(interactions) == {(user, item, rating) for user, item, rating, _ in GOOD}


@pytest.mark.parametrize("rule", sorted(BAD_ROWS))
def test_strict_fails_instead(rule: str) -> None:
    """B2."""
    with pytest.raises(DataError, match=r"with cleaning.strict no rule may find anything; '") as caught:
        clean(tables([*GOOD, BAD_ROWS[rule]]), CleaningSettings(strict=True, **STRICT))
    assert rule in str(caught.value) and "'toy'" in str(caught.value)


@pytest.mark.parametrize("rating", [float("inf"), -float("inf"), "five", None])
def test_ratings_that_are_no_numbers_are_bad(rating: Any) -> None:
    _, dropped = clean(tables([*GOOD, ("a", "z", rating, 1)]), CleaningSettings())
    assert counts(dropped) == {"ratings that are not finite numbers": 1}


def test_strange_ids_are_kept_exactly() -> None:
    """B17: spaces, quotes, leading zeros, other alphabets, composed and decomposed letters, NA."""
    ids = [" a", "a ", 'say "hi"', "it's", "007", "7", "é", "e\u0301", "日本", "NA", "nan", "a,b", "\u00a0x"]
    rows = [("u1", name, 1.0, 1) for name in ids] + [(name, "x", 1.0, 1) for name in ids]
    interactions, dropped = clean(tables(rows), CleaningSettings())
    assert dropped == []
    assert set(ids) < set(interactions.item_ids) and set(ids) < set(interactions.user_ids)
    assert interactions.item_ids.tolist() == sorted(interactions.item_ids)


REPEATS = [
    ("a", "x", 1.0, 30),
    ("a", "x", 2.0, 10),
    ("a", "x", 3.0, 20),
    ("a", "y", 9.0, 5),
    ("b", "y", 9.0, 6),
]


@pytest.mark.parametrize(
    ("which", "timed", "kept"),
    [
        ("keep_last", True, {1.0}),
        ("keep_first", True, {2.0}),
        ("keep_last", False, {3.0}),
        ("keep_first", False, {1.0}),
        ("keep_all", True, {1.0, 2.0, 3.0}),
    ],
)
def test_duplicates_are_told_apart_by_time_or_else_by_order(which: Any, timed: bool, kept: set[float]) -> None:
    """B2."""
    source = tables(REPEATS)
    if not timed:
        source.interactions = source.interactions.drop(columns="timestamp")
    interactions, dropped = clean(source, CleaningSettings(duplicates=which))
    assert {rating for user, item, rating in triples(interactions) if (user, item) == ("a", "x")} == kept
    assert sum(counts(dropped).values()) == 3 - len(kept)


def test_a_user_core_and_an_item_core_are_iterated_to_a_fixed_point() -> None:
    """B2: dropping d takes w, dropping w takes c, and then z has one user left."""
    pairs = ["ax", "ay", "bx", "by", "cx", "cw", "dw", "az"]
    source = tables([(user, item, 5.0, n) for n, (user, item) in enumerate(pairs)])
    interactions, dropped = clean(source, CleaningSettings(k_core_users=2, k_core_items=2))
    assert {user + item for user, item, _ in triples(interactions)} == {"ax", "ay", "bx", "by"}
    assert counts(dropped) == {"k-core": 4}
    assert interactions.item_ids.tolist() == ["x", "y"]
    clean(source, CleaningSettings(k_core_users=2, k_core_items=2, strict=True))  # asked for: no fault of the data


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40), st.integers(1, 3))
def test_a_core_is_what_a_slow_loop_finds(pairs: list[tuple[int, int]], k: int) -> None:
    expected = set(pairs)
    while True:
        users, items = [user for user, _ in expected], [item for _, item in expected]
        smaller = {(user, item) for user, item in expected if users.count(user) >= k and items.count(item) >= k}
        if smaller == expected:
            break
        expected = smaller
    source = tables([(f"u{user}", f"i{item}", 1.0, 1) for user, item in pairs])
    if len({user for user, _ in expected}) < 2 or len({item for _, item in expected}) < 2:
        with pytest.raises(DataError):
            clean(source, CleaningSettings(k_core_users=k, k_core_items=k))
        return
    interactions, _ = clean(source, CleaningSettings(k_core_users=k, k_core_items=k))
    assert {(user, item) for user, item, _ in triples(interactions)} == {(f"u{u}", f"i{i}") for u, i in expected}


def test_only_positives_count_for_a_core() -> None:
    interactions, _ = clean(
        tables([*GOOD, ("c", "x", 1.0, 1), ("c", "y", 1.0, 1), ("a", "z", 5.0, 3), ("b", "y", 5.0, 9)]),
        CleaningSettings(k_core_users=2),
        "rating >= 3",
    )
    assert interactions.user_ids.tolist() == ["a", "b"]
    assert not interactions.positive.all()


def test_the_positive_rule_marks_and_keeps() -> None:
    """B2: what is not positive stays as seen."""
    interactions, _ = clean(tables(GOOD), CleaningSettings(), "rating >= 4")
    assert interactions.positive_rule == "rating >= 4"
    assert dict(zip(interactions.ratings.tolist(), interactions.positive.tolist(), strict=True)) == {
        5.0: True, 3.0: False, 4.0: True, 1.0: False
    }  # fmt: skip
    assert clean(tables(GOOD), CleaningSettings())[0].positive.all()
    with pytest.raises(ConfigError, match="a condition must read"):
        clean(tables(GOOD), CleaningSettings(), "rating")
    with pytest.raises(DataError, match="needs a column 'ratign' in toy's interactions: did you mean 'rating'"):
        clean(tables(GOOD), CleaningSettings(), "ratign > 3")


def test_unknown_items_get_an_empty_row_and_unused_ones_stay_by_default() -> None:
    """B4: no content is a missing modality, never a dropped user."""
    items = pd.DataFrame({"item_id": ["z", "q"], "title": ["Z", "Q"], "year": [1990, 2000], "image": ""})
    interactions, dropped = clean(tables(GOOD, items), CleaningSettings())
    assert dropped == []
    assert interactions.item_ids.tolist() == ["q", "x", "y", "z"]
    assert interactions.catalogue["title"].tolist() == ["Q", "", "", "Z"]
    assert interactions.catalogue["image"].tolist() == [""] * 4
    used, dropped = clean(tables(GOOD, items), CleaningSettings(items_without_interactions="drop"))
    assert used.item_ids.tolist() == ["x", "y", "z"]
    assert counts(dropped) == {"items without interactions": 1}


def test_bad_and_repeated_rows_of_the_catalogue_are_dropped() -> None:
    items = pd.DataFrame({"item_id": ["x", "x", "", "y\0", "y", "z"], "title": list("ABCDEF"), "image": ""})
    interactions, dropped = clean(tables(GOOD, items), CleaningSettings())
    assert interactions.catalogue["title"].tolist() == ["A", "E", "F"]
    assert counts(dropped) == {
        "items: ids missing": 1,
        "items: ids with NUL or control characters": 1,
        "items: ids that stand twice": 1,
    }


def test_images_are_checked_by_existence_size_and_first_bytes(tmp_path: Path) -> None:
    """B4: the row stays, its image becomes '' (missing), and each reason is counted; arrays are left alone."""
    content = {
        "good.jpg": b"\xff\xd8\xff\xe0 rest",
        "text.png": b"<html>",
        "big.png": b"\x89PNG\r\n\x1a\n" + b"x" * 99,
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    images = [str(tmp_path / name) for name in (*content, "gone.png")] + ["", np.zeros((2, 2), np.uint8)]
    items = pd.DataFrame({"item_id": list("pqrsxy")})
    items["image"] = pd.Series(images, dtype=object)
    interactions, dropped = clean(tables(GOOD, items), CleaningSettings(max_image_bytes=50))
    cleaned = interactions.catalogue["image"].tolist()
    assert cleaned[0] == images[0] and cleaned[1:5] == [""] * 4 and isinstance(cleaned[5], np.ndarray)
    assert counts(dropped) == {
        "images: larger than 50 bytes": 1,
        "images: missing or unreadable": 1,
        "images: not a JPEG, PNG, WebP, GIF or BMP file": 1,
    }


def test_the_order_of_rows_does_not_matter() -> None:
    """B2: a permuted file gives the same arrays, ties in time included."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{i}", float(r), int(t))
        for u, i, r, t in zip(*(rng.integers(0, n, 300) for n in (20, 15, 5, 4)), strict=True)
    ]
    source = tables(rows)
    shuffled = Tables(
        source.items.sample(frac=1, random_state=1), "toy", source.interactions.sample(frac=1, random_state=2)
    )
    one, _ = clean(source, CleaningSettings(), "rating > 1")
    other, _ = clean(shuffled, CleaningSettings(), "rating > 1")
    for name in ("users", "items", "timestamps", "ratings", "positive"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    pd.testing.assert_frame_equal(one.catalogue, other.catalogue)


def test_a_given_split_travels_with_its_rows() -> None:
    """B6."""
    source = tables(GOOD)
    source.interactions["split"] = ["test", "train", "train", "dev"]
    interactions, _ = clean(source, CleaningSettings())
    assert interactions.given_split.dtype == np.int8
    at = dict(zip(interactions.timestamps.tolist(), interactions.given_split.tolist(), strict=True))
    assert (at[10], at[20], at[30], at[40]) == (TEST, TRAIN, TRAIN, 1)


def test_examples_lose_what_cannot_be_learned_from() -> None:
    """B2, B4: for classification; repeated examples stay unless asked."""
    table = pd.DataFrame({
        "label": ["a", "", None, "b", "b", "a", "a"],
        "text": ["t", "t", "t", " ", None, "t", "t"],
        "image": ["", "", "", "", "", "", ""],
        "split": ["train"] * 7,
    })  # fmt: skip
    table = pd.concat([table, pd.DataFrame({"label": ["b"], "text": ["u"], "image": [""], "split": ["test"]})])
    cleaned, dropped = clean_examples(Tables(table, "toy"), CleaningSettings())
    assert counts(dropped) == {"empty labels": 2, "examples without text and image": 2}
    assert cleaned["label"].tolist() == ["a", "a", "a", "b"]
    cleaned, dropped = clean_examples(Tables(table, "toy"), CleaningSettings(duplicate_examples="keep_first"))
    assert counts(dropped)["repeated examples"] == 2 and len(cleaned) == 2
    with pytest.raises(DataError, match="'empty labels' found 2 in 'toy', such as \"row 1, label ''\""):
        clean_examples(Tables(table, "toy"), CleaningSettings(strict=True))


def test_vocabularies_number_ids_both_ways_and_survive_the_disk(tmp_path: Path) -> None:
    """B17: any string, unknown is -1, and the same hash after a round trip."""
    ids = ["b", "a", "", "é\n\u2028", '"', "日本", "\U0001f600", "\0"]
    vocabulary = Vocabulary(ids)
    assert vocabulary.numbers([*ids, "?"]).tolist() == [*range(len(ids)), -1]
    assert vocabulary.numbers([]).tolist() == [] and vocabulary.numbers(["a"]).dtype == np.int32
    assert vocabulary.ids([1, 0]).tolist() == ["a", "b"]
    assert "a" in vocabulary and "?" not in vocabulary and len(vocabulary) == len(ids)
    vocabulary.save(tmp_path / "ids.jsonl")
    loaded = Vocabulary.load(tmp_path / "ids.jsonl")
    assert loaded == vocabulary and loaded.sha256() == vocabulary.sha256()
    assert len((tmp_path / "ids.jsonl").read_text().splitlines()) == len(ids)
    assert Vocabulary(ids[::-1]).sha256() != vocabulary.sha256()


def test_vocabularies_refuse_what_cannot_be_numbered(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' twice"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(DataError, match="must be strings; received 7"):
        Vocabulary(["a", 7])  # type: ignore[list-item]
    with pytest.raises(IndexError, match=r"0\.\.1; received -1"):
        Vocabulary(["a", "b"]).ids([-1])
    (tmp_path / "bad").write_text("a\n")
    with pytest.raises(DataError, match="must be a JSON string"):
        Vocabulary.load(tmp_path / "bad")
    with pytest.raises(DataError, match="must be readable"):
        Vocabulary.load(tmp_path / "none")
