"""What bad data get: one sentence that says what must hold, what was received, where, and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fusion.config import parse
from fusion.errors import DataError
from recsys.cleaning import CleaningSettings, clean, clean_examples
from recsys.datasets import READERS
from recsys.schema import Tables

GOOD = "user_id,item_id,rating,timestamp\na,x,5,1\na,y,4,2\nb,x,3,3\nb,y,2,4\n"
HEADER = "user_id,item_id,rating,timestamp\n"


def folder(text: str | bytes, name: str = "interactions.csv", **config: Any) -> Callable[[Path], dict[str, Any]]:
    def write(path: Path) -> dict[str, Any]:
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"path": str(path), **config}

    return write


def two_files(items: str, **config: Any) -> Callable[[Path], dict[str, Any]]:
    def write(path: Path) -> dict[str, Any]:
        (path / "interactions.csv").write_text(GOOD)
        (path / "items.csv").write_text(items)
        return {"path": str(path), **config}

    return write


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing column": (
        folder(GOOD.replace("item_id", "itemid")),
        "interactions must have a column 'item_id': did you mean 'itemid'?",
    ),
    "mapped column that is not there": (
        folder(GOOD, columns={"user_id": "userid"}),
        "columns.user_id must name a column of .* 'userid' is in none of its tables: did you mean 'user_id'",
    ),
    "missing label": (folder("lable,text\na,b\n", "examples.csv"), "a column 'label': did you mean 'lable'"),
    "missing item id": (two_files("item,title\nx,X\n"), "items must have a column 'item_id'"),
    "template with an unknown column": (
        two_files("item_id,code\nx,1\n", image="p/{cod}.jpg"),
        "image template 'p/{cod}.jpg' needs a column 'cod': did you mean 'code'",
    ),
    "condition on an unknown column": (
        folder(GOOD, where={"interactions": "raiting > 3"}),
        "condition 'raiting > 3' needs a column 'raiting' in .* did you mean 'rating'",
    ),
    "fold that is not there": (
        folder(GOOD, fold={"column": "rating", "test": 9}),
        "fold.test must be a value of the column 'rating' .* '9' is not",
    ),
    "unknown part": (
        folder("text,label,split\na,b,train\nc,d,tset\n", "examples.csv"),
        "must hold train, validation or test in each row; received 'tset'",
    ),
    "missing file": (folder(GOOD, files={"interactions": "interaction.csv"}), "does not exist: did you mean"),
    "missing folder": (lambda path: {"path": str(path / "none")}, "must be a folder that exists"),
    "folder without tables": (
        folder("x", "notes.txt"),
        "must hold interactions.* or examples.* .* it holds notes.txt",
    ),
    "file of another kind": (
        folder(GOOD, "log.xlsx", files={"interactions": "log.xlsx"}),
        "must be one of .csv, .tsv",
    ),
    "empty file": (folder(""), "must have a header and rows; .*interactions.csv is empty"),
    "no rows": (folder(HEADER), "must have interactions; .* has none"),
    "filter that leaves nothing": (
        folder(GOOD, where={"interactions": "rating > 5"}),
        "must have interactions",
    ),
    "not UTF-8": (folder(GOOD.encode() + b"\xe9,x,1,1\n"), "byte .* is not utf-8; set 'encoding'"),
    "ragged rows": (
        folder(GOOD + "a,z,1,1,1,1\n"),
        "must be readable; received: .*Expected 4 fields in line 6",
    ),
    "rows longer than the header": (folder("user_id,item_id\na,x,1\nb,y,1\n"), "must be readable"),
    "open quote": (folder(GOOD + '"a,z,1,1\n'), "must be readable; received: .*EOF inside string"),
    "broken JSON": (
        folder('{"user_id": "a", "item_id": "x"}\n{"user_id"\n', "interactions.jsonl"),
        "one JSON object; .*interactions.jsonl, line 2",
    ),
    "JSON of another shape": (folder("[1]\n", "interactions.jsonl"), "one JSON object; .*, line 1"),
    "broken Parquet": (
        folder(os.urandom(99), "interactions.parquet"),
        "interactions.parquet must be readable",
    ),
    "one user": (
        folder(HEADER + "a,x,1,1\na,y,1,1\n"),
        "at least two users must remain .* has one, 'a', in 2 of 2",
    ),
    "one item": (
        folder(HEADER + "a,x,1,1\nb,x,1,1\n"),
        "at least two items must remain .* has one, 'x', in 2 of 2",
    ),
    "NaN ratings": (
        folder(HEADER + "a,x,nan,1\nb,y,,1\n"),
        "of 2 rows of .* 0 remain and the rule 'ratings that are not finite numbers' removed most, 2",
    ),
    "milliseconds for seconds": (
        folder(HEADER + "a,x,1,1600000000000\nb,y,1,1600000000000\n"),
        "timestamps that are no seconds before the year 10000",
    ),
    "ids of 10,000 characters": (
        folder(HEADER + f"{'a' * 10_000},x,1,1\n{'b' * 10_000},y,1,1\n"),
        r"user ids longer than 256 bytes' removed most, 2, such as 'aaa.*\(10,002 characters\)",
    ),
    "ids with NUL": (folder(HEADER + "a\0,x,1,1\nb\0,y,1,1\n"), "user ids with NUL or control characters"),
    "one class": (
        folder("text,label\na,b\nc,b\n", "examples.csv"),
        "at least two classes .* 2 remain with 1 class ",
    ),
    "no labels": (folder("text,label\na,\nc,\n", "examples.csv"), "0 remain with 0 classes .*'empty labels'"),
}


def read_and_clean(config: dict[str, Any]) -> None:
    reader = READERS["folder"]
    tables = reader.read(parse(reader.Config, config, "data"))
    (clean_examples if tables.interactions is None else clean)(tables, CleaningSettings())


@pytest.mark.parametrize("case", sorted(CASES))
def test_bad_data_get_one_clear_sentence(tmp_path: Path, case: str) -> None:
    """B2."""
    make, message = CASES[case]
    with pytest.raises(DataError, match=message) as caught:
        read_and_clean(make(tmp_path))
    text = str(caught.value)
    assert "\n" not in text and "\0" not in text and len(text) < 700
    assert text[-1] in ".?", "a sentence ends"
    assert caught.value.exit_code == 3


def test_the_good_data_of_these_cases_are_good(tmp_path: Path) -> None:
    """The negative control: with nothing spoilt, nothing is refused."""
    read_and_clean(folder(GOOD)(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    config = folder(GOOD)(tmp_path)
    (tmp_path / "interactions.csv").chmod(0)
    with pytest.raises(DataError, match="must be readable"):
        read_and_clean(config)


@pytest.mark.parametrize("kind", ["movielens", "recbole"])
def test_other_readers_name_what_they_look_for(tmp_path: Path, kind: str) -> None:
    (tmp_path / "stray.txt").write_text("x")
    reader = READERS[kind]
    with pytest.raises(DataError, match=r"stray.txt.* Set data.path"):
        reader.read(parse(reader.Config, {"path": str(tmp_path)}))
    with pytest.raises(DataError, match="no such folder"):
        reader.read(parse(reader.Config, {"path": str(tmp_path / "none")}))


def test_a_recbole_header_without_types_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.inter").write_text("user_id\titem_id\n1\t2\n")
    with pytest.raises(DataError, match=r"must read name:type .* has 'user_id'"):
        READERS["recbole"].read(parse(READERS["recbole"].Config, {"path": str(tmp_path), "name": "toy"}))


def test_a_broken_line_of_movies_dat_is_named(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::7::5::881250949\n")
    (tmp_path / "movies.dat").write_text("7::A::B\n8::C\n")
    with pytest.raises(DataError, match=r"movies.dat, line 2"):
        READERS["movielens"].read(parse(READERS["movielens"].Config, {"path": str(tmp_path)}))


def test_tables_from_python_with_numbers_for_ids_are_taken() -> None:
    """Callers of the Python API bring integers, floats with gaps and None."""
    interactions = pd.DataFrame({"user_id": [1, 1, 2], "item_id": [7.0, np.nan, 8.0]})
    items = pd.DataFrame({"item_id": [7, 8], "title": ["A", None]})
    cleaned, dropped = clean(Tables(items, "python", interactions), CleaningSettings())
    assert cleaned.user_ids.tolist() == ["1", "2"] and cleaned.item_ids.tolist() == ["7", "8"]
    assert cleaned.catalogue["title"].tolist() == ["A", ""]
    assert [(entry.rule, entry.rows) for entry in dropped] == [("item ids missing", 1)]
