"""What every reader promises, run over the table of readers: registering one without a case here fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fusion.config import parse
from fusion.errors import ConfigError
from recsys.cleaning import CleaningSettings, clean, clean_examples
from recsys.datasets import READERS
from recsys.datasets.planted import Planted, write_folder
from recsys.schema import IMAGE, ITEM_ID, LABEL, RATING, SPLIT, TIMESTAMP, USER_ID, Tables


def _folder(path: Path) -> dict[str, Any]:
    write_folder(Planted.read(Planted.Config(users=8, items=20, interactions_per_user=5, image_size=8)), path)
    return {"path": str(path)}


def _movielens(path: Path) -> dict[str, Any]:
    (path / "u.data").write_text("1\t10\t5\t881250949\n2\t10\t3\t881250950\n2\t11\t1\t881250951\n")
    return {"path": str(path)}


def _recbole(path: Path) -> dict[str, Any]:
    (path / "toy.inter").write_text("user_id:token\titem_id:token\trating:float\n1\t10\t5\n2\t10\t3\n2\t11\t1\n")
    return {"path": str(path), "name": "toy"}


def _lightgcn(path: Path) -> dict[str, Any]:
    (path / "train.txt").write_text("0 10 11\n1 10\n")
    (path / "test.txt").write_text("0 12\n1 \n")
    return {"path": str(path), "name": "toy"}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "folder": _folder,
    "movielens": _movielens,
    "movielens_package": lambda path: {},
    "recbole": _recbole,
    "lightgcn": _lightgcn,
    "sklearn_digits": lambda path: {},
    "sklearn_tables": lambda path: {"name": "wine"},
    "long_tail": lambda path: {"size": "small"},
    "planted": lambda path: {"users": 8, "items": 20, "interactions_per_user": 5, "image_size": 8},
    "planted_classes": lambda path: {"examples": 40, "image_size": 8},
}


@pytest.fixture(params=sorted(READERS))
def twice_read(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tables, Tables]:
    reader = READERS[request.param]
    if request.param not in CASES:
        pytest.fail(f"the reader '{request.param}' needs a case in CASES")
    config = parse(reader.Config, CASES[request.param](tmp_path))
    return reader.read(config), reader.read(config)


def test_a_reader_keeps_its_contract(twice_read: tuple[Tables, Tables]) -> None:
    """B1: names, dtypes, no gaps in text, images of the promised kinds, equal when read again, and cleanable."""
    tables, again = twice_read
    assert tables.name and not tables.name.startswith("/")
    _check_text(tables.items)
    for image in tables.items[IMAGE]:
        assert isinstance(image, (str, np.ndarray))
        if isinstance(image, str):
            assert not image or Path(image).is_file()
        else:
            assert image.dtype == np.uint8 and image.ndim in (2, 3)
    pd.testing.assert_frame_equal(tables.items, again.items)
    if tables.interactions is None:
        assert LABEL in tables.items
        assert clean_examples(tables, CleaningSettings())[1] == []
        return
    _check_text(tables.interactions)
    assert {USER_ID, ITEM_ID} <= set(tables.interactions)
    assert {USER_ID, ITEM_ID, RATING, TIMESTAMP, SPLIT} >= set(tables.interactions)
    if RATING in tables.interactions:
        assert tables.interactions[RATING].dtype == np.float64
    if TIMESTAMP in tables.interactions:
        assert tables.interactions[TIMESTAMP].dtype == "Int64"
    assert not tables.items[ITEM_ID].duplicated().any()
    pd.testing.assert_frame_equal(tables.interactions, again.interactions)
    cleaned, dropped = clean(tables, CleaningSettings(strict=True))
    assert dropped == [] and len(cleaned.users) == len(tables.interactions)


def _check_text(table: pd.DataFrame) -> None:
    for name in set(table.columns) - {IMAGE, RATING, TIMESTAMP}:
        assert table[name].dtype == "str", name
        assert not table[name].isna().any(), name


@pytest.mark.parametrize("name", sorted(READERS))
def test_unknown_keys_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'data.no_such_key'"):
        parse(
            READERS[name].Config,
            {"path": "x", "no_such_key": 1} if name in _WITH_PATH else {"no_such_key": 1},
            "data",
        )


_WITH_PATH = {"folder", "movielens", "recbole", "lightgcn"}
