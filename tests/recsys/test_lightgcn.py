"""B1: the reader of LightGCN's layout: parts, ids as they stand, and one sentence for what cannot be read."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from fusion.errors import DataError
from recsys.cleaning import CleaningSettings, clean
from recsys.datasets.lightgcn import LightGCN
from recsys.schema import ITEM_ID, SPLIT, TEST, TRAIN, USER_ID, VALIDATION, Tables
from recsys.splits import SplitSettings, split


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def read(folder: Path) -> Tables:
    return LightGCN.read(LightGCN.Config(path=str(folder)))


def test_lines_become_pairs_with_their_part(tmp_path: Path) -> None:
    """Several spaces, a user without items, an empty line, a user of the test alone, ids with leading zeros."""
    tables = read(write(tmp_path / "toy", train="0 3 07\n1  2\n\n2\n", test="0 5\n9 3 \n"))
    rows = tables.interactions[[USER_ID, ITEM_ID, SPLIT]].to_numpy().tolist()
    assert rows == [
        ["0", "3", "train"], ["0", "07", "train"], ["1", "2", "train"], ["0", "5", "test"], ["9", "3", "test"],
    ]  # fmt: skip
    assert tables.name == "toy" and tables.items[ITEM_ID].tolist() == ["07", "2", "3", "5"]


@pytest.mark.parametrize("valid", [None, "0 4\n"])
def test_the_given_split_is_honoured_and_validation_cut_from_train_where_none_is_given(
    tmp_path: Path, valid: str | None
) -> None:
    files = {"train": "0 1 2 3\n1 1 2 3\n", "test": "0 5\n1 5\n"} | ({"valid": valid} if valid else {})
    data, dropped = clean(read(write(tmp_path / "toy", **files)), CleaningSettings(strict=True))
    parts = split(data, SplitSettings(strategy="given"))
    assert dropped == [] and data.timestamps is None
    counts = np.bincount(parts, minlength=3)[[TRAIN, VALIDATION, TEST]].tolist()
    assert counts == ([6, 1, 2] if valid else [4, 2, 2])
    assert set(data.item_ids[data.items[parts == TEST]]) == {"5"}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("0 1\n1 2,3\n", r"train.txt, line 2 has '2,3'"),
        ("user item\n0 1\n", r"train.txt, line 1 has 'user'"),
        ("0 -1\n", r"line 1 has '-1'"),
        ("0 1.0\n", r"line 1 has '1.0'"),
        ("0 é\n", r"digits and spaces only"),
        ("\n \n", r"train.txt must hold lines 'user item item ...'; it is empty"),
        (None, r"train.txt is missing in .* which has: test.txt"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, train: str | None, words: str) -> None:
    files = {"test": "0 1\n"} | ({} if train is None else {"train": train})
    with pytest.raises(DataError, match=words) as caught:
        read(write(tmp_path / "toy", **files))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read(tmp_path / "nowhere")


def test_many_interactions_are_read_at_once(tmp_path: Path) -> None:
    """A million pairs take about half a second on a quiet core; this is a fifth of that."""
    users = np.random.default_rng(0).integers(0, 40_000, (7_500, 27)).astype(str)
    lines = "".join(f"{user} {' '.join(items)}\n" for user, items in enumerate(users))
    folder = write(tmp_path / "toy", train=lines, test="0 1\n")
    started = time.perf_counter()
    tables = read(folder)
    assert time.perf_counter() - started < 5
    assert len(tables.interactions) == 7_500 * 27 + 1
