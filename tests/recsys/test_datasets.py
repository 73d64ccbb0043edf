"""Readers: the folder format and its mapping, MovieLens, RecBole, and what is planted in the planted world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fusion.config import parse
from fusion.errors import ConfigError, DataError
from recsys.cleaning import CleaningSettings, clean, clean_examples
from recsys.conditions import Condition
from recsys.datasets import READERS
from recsys.datasets.planted import (
    COLOURS,
    WORDS,
    Planted,
    PlantedClasses,
    PlantedTruth,
    planted_truth,
    write_folder,
)
from recsys.datasets.tables import read_table, rename, seconds
from recsys.schema import TEST, TRAIN, Interactions, Tables
from recsys.splits import SplitManifest, SplitSettings, split, split_examples

ROWS = [("007", "NA", "4.5"), ("b c", '"q"', "2"), ("007", "é", "")]


def read(kind: str, **config: Any) -> Tables:
    reader = READERS[kind]
    return reader.read(parse(reader.Config, config, "data"))


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


def write_rows(folder: Path, suffix: str) -> None:
    table = pd.DataFrame(ROWS, columns=["user_id", "item_id", "rating"])
    path = folder / f"interactions{suffix}"
    if suffix == ".parquet":
        table.assign(rating=pd.to_numeric(table["rating"])).to_parquet(path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
    else:
        table.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_tables_with_ids_as_they_stand(tmp_path: Path, suffix: str) -> None:
    """B1."""
    write_rows(tmp_path, suffix)
    tables = read("folder", path=str(tmp_path))
    assert tables.interactions["user_id"].tolist() == ["007", "b c", "007"]
    assert tables.interactions["item_id"].tolist() == ["NA", '"q"', "é"]
    np.testing.assert_array_equal(tables.interactions["rating"], [4.5, 2.0, np.nan])
    assert tables.items["item_id"].tolist() == ['"q"', "NA", "é"]


def test_whole_numbers_in_parquet_with_gaps_stay_whole(tmp_path: Path) -> None:
    pd.DataFrame({"id": [12.0, None], "flag": [True, False], "list": [["a", "b"], None]}).to_parquet(
        tmp_path / "t.parquet"
    )
    table = read_table(tmp_path / "t.parquet")
    assert table.to_dict("list") == {"id": ["12", ""], "flag": ["True", "False"], "list": ["a, b", ""]}


def test_columns_may_be_renamed_swapped_doubled_and_kept() -> None:
    table = pd.DataFrame({"a": ["1"], "b": ["2"], "c": ["3"]})
    assert rename(table, {"a": "b", "b": "a"}, "t").to_dict("list") == {"b": ["1"], "a": ["2"], "c": ["3"]}
    assert list(rename(table, {"x": "a", "y": "a", "far": "not here"}, "t")) == ["x", "y", "b", "c"]
    assert list(rename(table, {"x": "a", "a": "a"}, "t")) == ["x", "a", "b", "c"]
    with pytest.raises(DataError, match="'b' and 'columns' also makes it out of 'a'"):
        rename(table, {"b": "a"}, "t")


def test_timestamps_are_read_in_their_unit() -> None:
    assert seconds(pd.Series(["1999", "x", ""]), "ms").tolist() == [1, pd.NA, pd.NA]
    assert seconds(pd.Series(["1.9", "1e300"])).tolist() == [1, pd.NA]
    iso = pd.Series(["1970-01-02", "1970-01-01T01:00:00+01:00", "soon"])
    assert seconds(iso, "iso").tolist() == [86400, 0, pd.NA]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    write(
        tmp_path / "log.csv",
        "who,what,stars,when,fold,country\n1,10,5,100,1,at\n1,11,2,101,2,de\n2,10,4,102,3,at\n",
    )
    write(tmp_path / "goods.csv", "what,code,name,stock\n10,aa,Chair,3\n11,bb,Table,0\n12,,Lamp,9\n")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "aa.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "11.jpg")
    return tmp_path


def shop_config(path: Path, **more: Any) -> dict[str, Any]:
    columns = {"user_id": "who", "item_id": "what", "rating": "stars", "timestamp": "when", "title": "name"}
    files = {"interactions": "log.csv", "items": "goods.csv"}
    return {"path": str(path), "files": files, "columns": columns, **more}


def test_a_folder_is_mapped_by_config_alone(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B1: names, image templates over either name, fold, filters, and a path with an environment variable."""
    monkeypatch.setenv("SHOP", str(shop))
    tables = read(
        "folder",
        **shop_config(
            Path("$SHOP"),
            name="shop",
            image=["pictures/{code}.png", "pictures/{what}.jpg"],
            where={"interactions": "country == at", "items": ["stock > 0", "name != Lamp"]},
            fold={"column": "fold", "test": 3},
        ),
    )
    assert tables.items["item_id"].tolist() == ["10"]
    assert tables.items["title"].tolist() == ["Chair"]
    assert tables.items["image"].tolist() == [str(shop / "pictures" / "aa.png")]
    assert tables.interactions["split"].tolist() == ["train", "test"]
    assert tables.interactions["timestamp"].tolist() == [100, 102]


def test_templates_are_tried_in_turn_and_a_missing_file_is_a_missing_modality(shop: Path) -> None:
    """B4."""
    tables = read("folder", **shop_config(shop, image=["pictures/{code}.png", "pictures/{item_id}.jpg"]))
    names = [Path(image).name if image else "" for image in tables.items["image"]]
    assert names == ["aa.png", "11.jpg", ""]
    assert tables.notes == [f"2 of 3 rows of {shop.name} have an image."]


@pytest.mark.parametrize("template", ["../{x}.jpg", "/etc/{x}", "a/../../{x}", "{x!r}", "{x:>9}", "{}", "{"])
def test_templates_that_could_lead_elsewhere_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="image template"):
        parse(READERS["folder"].Config, {"path": "x", "image": template})


@pytest.mark.parametrize("cell", ["../secret.png", "/etc/passwd"])
def test_a_cell_cannot_lead_out_of_the_folder(tmp_path: Path, cell: str) -> None:
    write(tmp_path / "data" / "examples.csv", f"label,image\na,{cell}\n")
    write(tmp_path / "secret.png", "x")
    with pytest.raises(DataError, match="must lie below the data folder"):
        read("folder", path=str(tmp_path / "data"))


def test_examples_may_come_in_files_by_part(tmp_path: Path) -> None:
    """B6: the split of clinc150's layout, several files to a part."""
    write(tmp_path / "a.csv", "text,label\nhello,x\n")
    write(tmp_path / "b.csv", "text,label\nbye,y\n")
    write(tmp_path / "c.csv", "text,label\nwell,y\n")
    tables = read("folder", path=str(tmp_path), files={"train": ["a.csv", "b.csv"], "test": "c.csv"})
    assert tables.interactions is None
    assert tables.items["split"].tolist() == ["train", "train", "test"]
    same = read("folder", path=str(tmp_path), files={"examples": {"train": ["a.csv", "b.csv"], "test": "c.csv"}})
    pd.testing.assert_frame_equal(tables.items, same.items)


def test_usual_names_of_parts_are_understood(tmp_path: Path) -> None:
    write(tmp_path / "examples.csv", "text,label,set\na,x,TRAIN\nb,y,valid\nc,x,dev\nd,y,test\n")
    tables = read("folder", path=str(tmp_path), columns={"split": "set"})
    assert tables.items["split"].tolist() == ["train", "validation", "validation", "test"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n >= 2", [False, True, False]),
        ("n != 2", [True, False, True]),
        ("t == 'a b'", [False, True, False]),
        ("t > b", [False, False, True]),
        ('t == "2"', [False, False, False]),
    ],
)
def test_conditions_compare_numbers_as_numbers(text: str, expected: list[bool]) -> None:
    table = pd.DataFrame({"n": ["1.5", "2", ""], "t": ["2x", "a b", "c"]})
    condition = Condition.parse(text)
    assert condition.holds(table, "t").tolist() == expected
    assert Condition.parse(str(condition)) == condition


@pytest.mark.parametrize(
    "text", ["", "rating", "rating = 4", "rating >= 4 and x == 1", "__import__('os')", "a == b c", ">= 4"]
)
def test_anything_else_is_no_condition(text: str) -> None:
    with pytest.raises(ConfigError, match="a condition must read"):
        Condition.parse(text)


def test_movielens_in_its_three_layouts(tmp_path: Path) -> None:
    """B1: u.data with genre flags, ratings.dat with '::' and Latin-1, ratings.csv."""
    flags = "0|1|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0"
    write(tmp_path / "a" / "u.data", "1\t7\t5\t881250949\n2\t7\t3\t881250950\n")
    write(tmp_path / "a" / "u.item", f"7|Café (1995)|01-Jan-1995||http://x|{flags}\n", "latin-1")
    write(tmp_path / "b" / "ratings.dat", "1::7::5::881250949\n2::7::3::881250950\n")
    write(tmp_path / "b" / "movies.dat", "7::Café: Part: 2 (1995)::Action|Comedy\n", "latin-1")
    write(
        tmp_path / "c" / "ratings.csv",
        "userId,movieId,rating,timestamp\n1,7,5.0,881250949\n2,7,3.0,881250950\n",
    )
    write(tmp_path / "c" / "movies.csv", 'movieId,title,genres\n7,"Café, The (1995)",(no genres listed)\n')
    read_all = [read("movielens", path=str(tmp_path / layout)) for layout in "abc"]
    for tables in read_all:
        pd.testing.assert_frame_equal(tables.interactions, read_all[0].interactions)
    assert [tables.items["title"][0] for tables in read_all] == [
        "Café (1995)",
        "Café: Part: 2 (1995)",
        "Café, The (1995)",
    ]
    assert [tables.items["genres"][0] for tables in read_all] == ["Action, Comedy", "Action, Comedy", ""]


def test_the_packaged_movielens_is_the_published_one() -> None:
    """B1: the quickstart's data, counted."""
    tables = read("movielens_package")
    assert len(tables.interactions) == 100_004
    assert tables.interactions["user_id"].nunique() == 671
    assert len(tables.items) == tables.interactions["item_id"].nunique() == 9_066
    toy_story = tables.items[tables.items["item_id"] == "1"].iloc[0]
    assert (toy_story["title"], toy_story["year"]) == ("Toy Story", "1995")
    assert toy_story["genres"] == "Adventure, Animation, Children, Comedy, Fantasy"
    assert tables.interactions["rating"].between(0.5, 5).all()


def test_recbole_atomic_files_whole_and_by_part(tmp_path: Path) -> None:
    """B1: the documented layout, quotes taken literally, and benchmark splits."""
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    write(tmp_path / "ml" / "ml.inter", header + "1\t7\t5\t881250949\n2\t8\t3\t881250950\n")
    write(tmp_path / "ml" / "ml.item", 'item_id:token\tmovie_title:token_seq\n7\tThe "Best\n8\tB\n')
    tables = read("recbole", path=str(tmp_path / "ml"), columns={"title": "movie_title"})
    assert tables.items["title"].tolist() == ['The "Best', "B"]
    assert tables.interactions["timestamp"].tolist() == [881250949, 881250950]
    for part in ("train", "valid", "test"):
        write(tmp_path / "cut" / f"cut.{part}.inter", header + "1\t7\t5\t881250949\n")
    assert read("recbole", path=str(tmp_path / "cut")).interactions["split"].tolist() == [
        "train",
        "validation",
        "test",
    ]


def test_digits_are_ten_classes_of_grey_images() -> None:
    tables = read("sklearn_digits")
    assert len(tables.items) == 1797 and tables.items["label"].nunique() == 10
    images = np.stack(tables.items["image"])
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8 and images.max() == 255 and images.min() == 0


@pytest.fixture(scope="module")
def world() -> tuple[Tables, PlantedTruth, Interactions, np.ndarray]:
    config = Planted.Config(seed=3)
    tables = Planted.read(config)
    interactions, dropped = clean(tables, CleaningSettings(strict=True))
    assert not dropped
    return tables, planted_truth(config), interactions, split(interactions, SplitSettings())


def test_cold_items_are_cold_in_the_default_split(
    world: tuple[Tables, PlantedTruth, Interactions, np.ndarray],
) -> None:
    """C6: they never occur in train and often in test; the truth and the tables agree."""
    _, truth, interactions, parts = world
    cold = truth.cold[interactions.items]
    assert cold[parts == TRAIN].sum() == 0
    assert 0.2 < cold[parts == TEST].mean() < 0.8
    taken = truth.scores[interactions.users, interactions.items].mean()
    assert taken > truth.scores.mean() + 1


def test_each_hint_is_visible_where_it_was_planted_and_nowhere_else(
    world: tuple[Tables, PlantedTruth, Interactions, np.ndarray],
) -> None:
    """C6."""
    tables, truth, _, _ = world
    np.testing.assert_array_equal(_seen_colours(tables.items), truth.item_traits[:, 1])
    np.testing.assert_array_equal(_seen_words(tables.items), truth.item_traits[:, 2])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        together = np.zeros((4, 4))
        np.add.at(together, (truth.item_traits[:, one], truth.item_traits[:, other]), 1)
        assert together.min() > 0, "two hints must not determine each other"


def _seen_colours(items: pd.DataFrame) -> np.ndarray:
    """The colour that most pixels are, from the pixels alone."""
    pixels = np.stack(items["image"]).astype(int)
    return (pixels[:, :, :, None, :] == COLOURS).all(-1).sum((1, 2)).argmax(1)


def _seen_words(items: pd.DataFrame) -> np.ndarray:
    return np.array([[word in text.split() for word in WORDS] for text in items["text"]]).argmax(1)


def _standard(scores: np.ndarray) -> np.ndarray:
    spread = scores.std(1, keepdims=True)
    return (scores - scores.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)


def _ndcg(scores: np.ndarray, interactions: Interactions, parts: np.ndarray, candidates: np.ndarray) -> float:
    """Mean NDCG@10 over users with a test item among the candidates."""
    seen = interactions.matrix(parts != TEST).toarray() > 0
    wanted = (interactions.matrix(parts == TEST).toarray() > 0) & candidates
    noise = np.random.default_rng(0).random(scores.shape) * 1e-9
    top = np.argsort(np.where(seen | ~candidates, np.inf, -(scores + noise)), axis=1)[:, :10]
    discounts = 1 / np.log2(np.arange(2, 12))
    gains = (np.take_along_axis(wanted, top, 1) * discounts).sum(1)
    ideal = np.array([discounts[: min(n, 10)].sum() for n in wanted.sum(1)])
    return float((gains[ideal > 0] / ideal[ideal > 0]).mean())


def _simple_members(tables: Tables, interactions: Interactions, parts: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [U, I] of an item-item model on interactions, and of profiles over colours and over words."""
    train = interactions.matrix(parts == TRAIN).toarray()
    inverse = np.linalg.inv(train.T @ train + 30 * np.eye(train.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    members = {"interactions": train @ weights}
    for name, kinds in (("image", _seen_colours(tables.items)), ("text", _seen_words(tables.items))):
        one_hot = np.eye(4)[kinds]
        members[name] = (train @ one_hot / (train.sum(0) @ one_hot)) @ one_hot.T
    return members


def test_the_planted_world_asks_for_fusion(
    world: tuple[Tables, PlantedTruth, Interactions, np.ndarray],
) -> None:
    """C6: interactions fail on cold items, image and text do not, and together they beat each alone."""
    tables, truth, interactions, parts = world
    members = _simple_members(tables, interactions, parts)
    everything = np.ones(len(truth.cold), bool)
    chance = _ndcg(np.zeros_like(truth.scores), interactions, parts, truth.cold)
    cold = {name: _ndcg(scores, interactions, parts, truth.cold) for name, scores in members.items()}
    assert abs(cold["interactions"] - chance) < 0.08
    assert min(cold["image"], cold["text"]) > chance + 0.1
    fused = _standard(members["image"]) + _standard(members["text"])
    fused += np.where(truth.cold, 0, _standard(members["interactions"]))
    best = max(_ndcg(scores, interactions, parts, everything) for scores in members.values())
    assert _ndcg(fused, interactions, parts, everything) > best + 0.05


def test_shuffled_nothing_can_be_learned() -> None:
    """C6: the negative control of the test above."""
    config = Planted.Config(seed=3, shuffle_labels=True)
    tables, truth = Planted.read(config), planted_truth(config)
    interactions, _ = clean(tables, CleaningSettings())
    parts = split(interactions, SplitSettings())
    everything = np.ones(len(truth.cold), bool)
    chance = _ndcg(np.zeros_like(truth.scores), interactions, parts, everything)
    for scores in _simple_members(tables, interactions, parts).values():
        assert _ndcg(scores, interactions, parts, everything) < chance + 0.03


def test_three_hints_at_a_class_are_better_than_one() -> None:
    """C6: each hint is right for 1 - noise, their majority for more; shuffled labels leave chance."""
    for shuffled, low, high in ((False, 0.78, 0.88), (True, 0.2, 0.3)):
        table = PlantedClasses.read(PlantedClasses.Config(examples=2000, shuffle_labels=shuffled)).items
        truth = table["label"].str.slice(6).astype(int).to_numpy()
        notes = ("winter", "music", "football", "kitchen")
        in_note = np.array([[word in note.split() for word in notes] for note in table["note"]]).argmax(1)
        hints = np.stack([_seen_colours(table), _seen_words(table), in_note])
        votes = np.eye(4)[hints].sum(0).argmax(1)
        assert low < (votes == truth).mean() < high
        if not shuffled:
            np.testing.assert_allclose((hints == truth).mean(1), 0.7, atol=0.05)


@pytest.mark.parametrize("kind", ["planted", "planted_classes"])
def test_a_written_folder_reads_back_as_it_was(tmp_path: Path, kind: str) -> None:
    """B1, C6: write_folder and the folder reader are inverse, images pixel by pixel, without any mapping."""
    config = {
        "planted": {"users": 6, "items": 12, "interactions_per_user": 5},
        "planted_classes": {"examples": 40},
    }
    tables = read(kind, image_size=8, **config[kind])
    tables.items.at[1, "image"] = ""
    write_folder(tables, tmp_path / kind)
    back = read("folder", path=str(tmp_path / kind))
    assert back.name == kind
    pd.testing.assert_frame_equal(back.items.drop(columns="image"), tables.items.drop(columns="image"))
    for ours, path in zip(tables.items["image"], back.items["image"], strict=True):
        if isinstance(ours, str):
            assert path == ""
        else:
            np.testing.assert_array_equal(np.asarray(Image.open(path)), ours)
    if tables.interactions is not None:
        pd.testing.assert_frame_equal(back.interactions, tables.interactions)


REAL: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "movielens_multimodal": (
        {
            "files": {"interactions": "ratings_latest_small.csv", "items": "items.csv"},
            "columns": {"user_id": "userId", "item_id": "movieId"},
            "image": "posters/{item_id}.jpg",
        },
        {"rows": 100_836, "users": 610, "items": 10_676, "images": 9_928, "test users": 610},
    ),
    "lichess_openings_multimodal": (
        {"columns": {"user_id": "user", "item_id": "item"}, "image": "boards/{item}.png"},
        {"rows": 13_957, "users": 1_550, "items": 467, "images": 467, "test users": 1_550},
    ),
    "ml100k": (
        {
            "path": "",
            "files": {"interactions": "ml100k/ratings.csv", "items": "ml100k/items.csv"},
            "columns": {"user_id": "user", "item_id": "item", "timestamp": "ts"},
            "image": ["movielens_multimodal/posters/{movieId}.jpg", "ml100k/posters/{item}.jpg"],
            "fold": {"column": "test_fold", "test": 1},
        },
        {"rows": 100_000, "users": 943, "items": 1_682, "images": 1_669, "test users": 943},
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(REAL))
def test_real_recommendation_folders_by_config_alone(data_dir: Path, name: str) -> None:
    """B1, B6: the counts that the data sets' own descriptions state."""
    config, expected = REAL[name]
    tables = read("folder", **config | {"path": str(data_dir / config.get("path", name)), "name": name})
    interactions, dropped = clean(tables, CleaningSettings(strict=True))
    strategy = "temporal_per_user" if interactions.timestamps is not None else "random"
    settings = SplitSettings(strategy=strategy)
    parts = split(interactions, settings)
    SplitManifest.of(interactions, parts, settings).verify(interactions)
    users, items = interactions.shape
    images = int((interactions.catalogue["image"] != "").sum())
    test_users = len(np.unique(interactions.users[parts == TEST]))
    assert dropped == []
    assert expected == {
        "rows": len(parts), "users": users, "items": items, "images": images, "test users": test_users
    }  # fmt: skip
    if name == "ml100k":
        given = split(interactions, SplitSettings(strategy="given"))
        assert (given == TEST).sum() == 20_000


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "config", "strategy", "expected"),
    [
        ("clinc150", {"files": {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}}, "given",
         {"classes": 150, "train": 15_000, "validation": 3_000, "test": 4_500}),
        ("banking77", {"files": {"train": "train.csv", "test": "test.csv"}}, "given",
         {"classes": 77, "train": 9_038, "validation": 965, "test": 3_080}),
        ("sign_language_digits", {"files": {"examples": "labels.csv"}, "image": "{file}"}, "stratified",
         {"classes": 10, "train": 1_662, "validation": 200, "test": 200}),
    ],
)  # fmt: skip
def test_real_classification_folders_by_config_alone(
    data_dir: Path, name: str, config: dict[str, Any], strategy: str, expected: dict[str, int]
) -> None:
    """B1, B6."""
    table, dropped = clean_examples(read("folder", path=str(data_dir / name), **config), CleaningSettings(strict=True))
    settings = SplitSettings.model_validate({"strategy": strategy})
    parts = split_examples(table["label"], table.get("split"), settings)
    manifest = SplitManifest.of_examples(table, parts, settings)
    assert dropped == []
    assert {"classes": table["label"].nunique(), **manifest.counts} == {**expected, "history": 0}
    if "image" in config:
        assert (table["image"] != "").all()
