"""Columns of a table as members read them: by name or pattern, in classifications and of the items of a catalogue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from fusion.compat import tf
from fusion.errors import ConfigError, DataError
from recsys.cells import read_cells
from recsys.classification_task import ClassificationTask
from recsys.datasets import READERS
from recsys.settings import parse_experiment
from worlds import World, fitted, member_part, ndcg, random_ndcg

TABLE = pd.DataFrame(
    {
        "label": ["a", "b", "a"],
        "pixel_1": ["1", "", "3"],
        "size": ["s", " ", "xl"],
        "pixel_2": ["4", "", "6"],
        "image": "",
    }
)


def test_names_and_patterns_choose_columns() -> None:
    """A3: a member declares what it reads; a pattern stands for the columns in the order of the table, each once."""
    values, available = read_cells(TABLE, ["size", "pixel_*", "pixel_1"])
    assert values.dtype.names == ("size", "pixel_1", "pixel_2")
    assert values["size"].tolist() == ["s", "", "xl"] and values["pixel_2"].tolist() == ["4", "", "6"]
    assert available.tolist() == [True, False, True]
    assert read_cells(TABLE, ["*"])[0].dtype.names == ("pixel_1", "size", "pixel_2")


@pytest.mark.parametrize("name", ["sise", "label", "image", "pixels_*"])
def test_a_column_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(DataError, match="the table has no column"):
        read_cells(TABLE, [name])


def test_packaged_tables_are_read_as_they_are() -> None:
    """scikit-learn's numbers come back exactly out of their text."""
    from sklearn.datasets import load_breast_cancer

    reader = READERS["sklearn_tables"]
    table = reader.read(reader.Config(name="breast_cancer")).items
    cells, available = read_cells(table, ["*"])
    numbers = np.stack([cells[name].astype(float) for name in cells.dtype.names], axis=1)
    np.testing.assert_array_equal(numbers, load_breast_cancer().data)
    assert available.all() and cells.dtype.names[:2] == ("mean_radius", "mean_texture")
    assert table["label"].value_counts().to_dict() == {"benign": 357, "malignant": 212}


def test_items_are_described_by_columns_too(tmp_path: Path) -> None:
    """A3: a content member of a ranking over a category and a number finds items that nobody has taken yet."""
    world = World.planted("item_holdout")
    words = world.data.catalogue["text"].str.split()
    columns = {f"word_{number}": words.str[number].fillna("") for number in range(int(words.str.len().max()))}
    length = words.str.len().astype(str)
    world = World(replace(world.data, catalogue=world.data.catalogue.assign(length=length, **columns)), world.parts)
    encoder = {"kind": "dense", "widths": [], "max_categories": 200}
    settings = {"kind": "content", "encoder": encoder, "columns": ["word_*", "length"], "dimensions": 16}
    member = fitted(
        {**settings, "training": {"epochs": 10, "batch_size": 128, "learning_rate": 0.01}},
        world.training(tmp_path),
        tmp_path,
    )
    asked = world.asked()
    assert ndcg(member, asked) > max(random_ndcg(asked, seed) for seed in range(10))
    restored = type(member)(member.config, member.seed)
    restored.load_state(member.state())
    history = tf.constant([[1, 2, 3]])
    np.testing.assert_array_equal(restored.scorer()(history), member.scorer()(history))


def test_a_member_over_columns_must_name_them() -> None:
    part = member_part({"kind": "content", "encoder": {"kind": "dense", "widths": []}})
    with pytest.raises(ConfigError, match="a tabular member must name its columns"):
        part.registry[part.kind].check(part.config)


def test_rows_of_a_table_are_shown_by_their_first_cells() -> None:
    """The page's worst mistakes name what stands in the row where there is neither text nor image."""
    columns = {"encoder": {"kind": "dense"}, "columns": ["pixel_*", "size"]}
    experiment = parse_experiment(
        {
            "name": "cells",
            "task": "classification",
            "data": {"kind": "sklearn_tables"},
            "members": {"dense": columns},
            "rules": {"average": {"kind": "average"}},
        }
    )
    task = ClassificationTask(SimpleNamespace(experiment=experiment))
    task.table = TABLE
    assert task.shown(np.array([2, 0])) == ["pixel_1 3 · pixel_2 6 · size xl", "pixel_1 1 · pixel_2 4 · size s"]
