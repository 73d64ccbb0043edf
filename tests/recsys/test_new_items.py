"""New items join by their texts and images, without training: the signature `add_items` (O1, O11)."""

from __future__ import annotations

import functools
import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.export import savedmodel
from fusion.export.warmup import read_warmup
from fusion.rules import RULES
from fusion.submodels import SUBMODELS
from new_item_shops import CONTENTS, K_MAX, NEW, STEPS, WORDS, Shop, two_shops
from recsys.cells import read_cells
from recsys.collaborative.content import Contents
from recsys.core import MemberScores, RankingCore
from recsys.examples import ItemReader, write_examples
from recsys.export import artifact_of, export_recommender
from recsys.growing import GrowingCore, GrowingIds
from recsys.pipeline import rerun
from recsys.ranking_student import Student
from recsys.ranking_task import RankingTask
from recsys.recommender import ServedRecommender
from recsys.run import Run
from serving.predictor import Predictor
from worlds import fitted

SPARE = 5


@dataclass(frozen=True)
class Served:
    """The signatures of one module, called with lists."""

    module: ServedRecommender

    @functools.cached_property
    def signatures(self) -> dict[str, Any]:
        return self.module.signatures()

    def __call__(self, signature: str, **inputs: Any) -> dict[str, np.ndarray]:
        found = self.signatures[signature](**{name: tf.constant(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in found.items()}

    def recommend(self, histories: Any, signature: str = "recommend", **given: Any) -> dict[str, np.ndarray]:
        rows = len(histories)
        nothing = {"user_id": [""] * rows, "exclude": [[""]] * rows, "include": [[""]] * rows}
        return self(signature, **{**nothing, "history": histories, "k": [K_MAX] * rows, **given})

    def add(self, ids: list[str], vectors: Mapping[str, np.ndarray]) -> list[int]:
        given = {f"embed_item_{name}": np.asarray(vectors[name], np.float32) for name in CONTENTS}
        return self("add_items", item_id=ids, **given)["number"].tolist()

    def withdraw(self, ids: list[str], withdrawn: bool = True) -> list[int]:
        return self("withdraw_items", item_id=ids, withdrawn=[withdrawn] * len(ids))["number"].tolist()


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, Shop]:
    return two_shops(tmp_path_factory.mktemp("shops"))


@pytest.fixture(scope="module")
def whole(shops: tuple[Shop, Shop]) -> Served:
    """With all items from the start."""
    return Served(shops[0].module())


@pytest.fixture(scope="module")
def grown(shops: tuple[Shop, Shop]) -> Served:
    """To which the last items were added; two spare rows are left."""
    served = Served(shops[1].module(SPARE))
    assert served.add(new_ids(shops[0]), new_vectors(shops[0])) == [37, 38, 39]
    return served


def new_ids(shop: Shop) -> list[str]:
    return [str(item) for item in shop.item_ids[-NEW:]]


def new_vectors(shop: Shop) -> dict[str, np.ndarray]:
    """What the encoders make of the last items; of any length, as signatures give them."""
    return {name: 3.0 * shop.members[name].table[-NEW:] for name in CONTENTS}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(other[name], values, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(other[name], values)


class TestAsIfThereFromTheStart:
    def test_recommended_and_known_to_histories(self, shops: tuple[Shop, Shop], whole: Served, grown: Served) -> None:
        """O11: the same lists, scores and contributions as where the items were cold ones of the catalogue."""
        old, new = [str(item) for item in shops[0].item_ids[:4]], new_ids(shops[0])
        histories = [[old[0], old[1]], [new[0], old[2]], [new[1], new[2]], ["", ""]]
        found = grown.recommend(histories)
        same(whole.recommend(histories), found)
        assert any(item.decode() in new for item in found["item_ids"][0])
        assert not any(item.decode() in new[1:] for item in found["item_ids"][2]), "what is taken is not offered again"
        user = [str(shops[0].user_ids[3])] * 4
        same(whole.recommend(histories, user_id=user), grown.recommend(histories, user_id=user))

    def test_excluded_and_included(self, shops: tuple[Shop, Shop], whole: Served, grown: Served) -> None:
        old, new = str(shops[0].item_ids[0]), new_ids(shops[0])
        without = grown.recommend([[old]], exclude=[new])
        same(whole.recommend([[old]], exclude=[new]), without)
        assert not {item.decode() for item in without["item_ids"][0]} & set(new)
        only = grown.recommend([[old]], include=[[*new, "nobody"]])
        same(whole.recommend([[old]], include=[[*new, "nobody"]]), only)
        assert {item.decode() for item in only["item_ids"][0] if item} == set(new)

    def test_likened_scored_and_found(self, shops: tuple[Shop, Shop], whole: Served, grown: Served) -> None:
        """B11: an example finds a new item too."""
        old, new = str(shops[0].item_ids[0]), new_ids(shops[0])
        asked = {"item_id": [new[0], old], "k": [K_MAX, K_MAX]}
        same(whole("similar_items", **asked), grown("similar_items", **asked))
        asked = {"history": [[old], [new[0]]], "candidates": [[*new, old, "nobody"]] * 2}
        same(whole("serving_default", **asked), grown("serving_default", **asked))
        prepared = shops[0].members["text"].encoder.prepare([str(shops[0].data.catalogue["text"].iloc[-1])])
        found = grown("search_text", **prepared, k=[K_MAX])
        same(whole("search_text", **prepared, k=[K_MAX]), found)
        assert new[-1].encode() in found["item_ids"][0]

    def test_member_by_member(self, shops: tuple[Shop, Shop], whole: Served, grown: Served) -> None:
        """`member_<name>` and `fuse` have the spare rows, which are silent; a member that knows what it was fitted with
        alone is silent about new items as well."""
        who = {"user_id": [""], "history": [[str(shops[0].item_ids[1]), new_ids(shops[0])[0]]]}
        names = list(shops[0].members)
        said = [grown(f"member_{name}", **who)["scores"] for name in names]
        for name, scores in zip(names, said, strict=True):
            assert scores.shape == (1, 37 + SPARE) and np.isnan(scores[:, 40:]).all()
            assert np.isfinite(scores[:, 37:40]).all() == (name in CONTENTS)
            np.testing.assert_allclose(scores[:, :40], whole(f"member_{name}", **who)["scores"], rtol=1e-5, atol=1e-5)
        fused = grown.recommend(who["history"], "fuse", scores=np.stack(said, axis=1))
        same(whole.recommend(who["history"]), fused)

    def test_under_every_rule(self, shops: tuple[Shop, Shop], grown: Served) -> None:
        """Scales may depend on how many items there are; unused rows are not among them."""
        history = tf.constant([[0, 5, -1], [38, 2, 39]])
        plain = MemberScores(shops[0].members, shops[0].data.counts)
        for name in RULES:
            before = RankingCore(plain, shops[0].rule(name))(history).numpy()
            core = GrowingCore(grown.module.core.members, shops[1].rule(name), 40)
            after = core(history).numpy()
            np.testing.assert_allclose(after[:, :40], before, rtol=1e-5, atol=1e-5, err_msg=name)
            assert np.isneginf(after[:, 40:]).all(), name


class TestSpareRows:
    def test_unused_ones_change_nothing(self, shops: tuple[Shop, Shop]) -> None:
        plain, spare = Served(shops[1].module()), Served(shops[1].module(SPARE))
        histories = [[str(shops[1].item_ids[0]), str(shops[1].item_ids[2])], ["", "nobody"]]
        same(plain.recommend(histories), spare.recommend(histories))
        everything = spare.recommend([[""]], k=[1000])
        assert (everything["item_ids"] != b"").all() and np.isfinite(everything["scores"]).all()
        assert "add_items" not in plain.signatures

    def test_what_is_not_added(self, shops: tuple[Shop, Shop]) -> None:
        """Known ids, an id twice, no id, nothing to read, and what comes when all rows are taken."""
        served = Served(shops[1].module(2))
        rows = {name: shops[0].members[name].table[[0] * 6] for name in CONTENTS}
        rows["text"][4] = rows["image"][4] = 0.0
        known = str(shops[1].item_ids[7])
        assert served.add(["new", "new", known, "", "blank", "other"], rows) == [37, -1, -1, -1, -1, 38]
        one = {name: vectors[:1] for name, vectors in rows.items()}
        assert served.add(["new"], one) == [-1] and served.add(["late"], one) == [-1]

    def test_a_modality_that_is_missing(self, shops: tuple[Shop, Shop]) -> None:
        """Its member is silent about the item, and the search does not find it."""
        served, vectors = Served(shops[1].module(SPARE)), new_vectors(shops[0])
        given = {"text": vectors["text"][:1], "image": 0.0 * vectors["image"][:1]}
        assert served.add(["only words"], given) == [37]
        who = {"user_id": [""], "history": [[str(shops[1].item_ids[0])]]}
        assert np.isfinite(served("member_text", **who)["scores"][0, 37])
        assert np.isnan(served("member_image", **who)["scores"][0, 37])
        pixels = {"image": np.zeros((1, 16, 16, 3), np.uint8)}
        assert b"only words" not in served("search_image", **pixels, k=[K_MAX])["item_ids"]

    def test_a_student_passes_over_them(self, shops: tuple[Shop, Shop]) -> None:
        """`recommend_fast` knows what it was taught; new items in histories change nothing, and none is returned."""
        random, items = np.random.default_rng(0), shops[1].items
        tables = [random.normal(size=(items, 4)).astype(np.float32) for _ in range(2)]
        student = Student(tables[0], tables[1], random.normal(size=items).astype(np.float32), np.ones(1, np.float32))
        served = Served(shops[1].module(SPARE, student.scorer()))
        assert served.add(new_ids(shops[0]), new_vectors(shops[0])) == [37, 38, 39]
        old, new = str(shops[1].item_ids[0]), new_ids(shops[0])[0]
        with_new = served.recommend([[new, old]], "recommend_fast")
        same(served.recommend([["", old]], "recommend_fast"), with_new)
        assert (with_new["item_ids"] != b"").all() and new.encode() not in with_new["item_ids"]

    def test_versions_that_are_loaded_side_by_side_share_nothing(
        self, shops: tuple[Shop, Shop], tmp_path: Path
    ) -> None:
        """O1: of one file even; and what was added is not written into it."""
        folder = shops[1].write(tmp_path / "1", SPARE)
        first, second = (tf.saved_model.load(str(folder)) for _ in range(2))
        vectors = {f"embed_item_{name}": tf.constant(array) for name, array in new_vectors(shops[0]).items()}
        first.signatures["add_items"](item_id=tf.constant(new_ids(shops[0])), **vectors)
        savedmodel.lint(folder)
        asked = {
            "history": tf.constant([[str(shops[0].item_ids[0])]]),
            "candidates": tf.constant([new_ids(shops[0])]),
        }
        scores = [model.signatures["serving_default"](**asked)["scores"].numpy() for model in (first, second)]
        assert (scores[0] > -1e30).all() and (scores[1] < -1e30).all()


class TestWithdrawn:
    """O11: items that are taken back, and items of the catalogue that are withdrawn from sale."""

    def test_in_no_list_until_they_are_put_back(self, shops: tuple[Shop, Shop]) -> None:
        """Everything else is as it was: the same order, scores and contributions, and what histories say."""
        random, items = np.random.default_rng(0), shops[1].items
        tables = [random.normal(size=(items, 4)).astype(np.float32) for _ in range(2)]
        student = Student(tables[0], tables[1], random.normal(size=items).astype(np.float32), np.ones(1, np.float32))
        served = Served(shops[1].module(SPARE, student.scorer()))
        served.add(new_ids(shops[0]), new_vectors(shops[0]))
        old, new = str(shops[1].item_ids[0]), new_ids(shops[0])[0]
        prepared = shops[0].members["text"].encoder.prepare([str(shops[0].data.catalogue["text"].iloc[-NEW])])

        def lists() -> dict[str, dict[str, np.ndarray]]:
            return {
                "recommend": served.recommend([[old, new]]),
                "recommend_fast": served.recommend([[old, new]], "recommend_fast"),
                "similar_items": served("similar_items", item_id=[old], k=[K_MAX]),
                "search_text": served("search_text", **prepared, k=[K_MAX]),
            }

        before = lists()
        firsts = {name: answer["item_ids"][0, 0].decode() for name, answer in before.items()}
        assert firsts["search_text"] == new and len(set(firsts.values())) > 2
        gone = sorted({*firsts.values(), new})
        assert min(served.withdraw(gone)) >= 0 and served.withdraw(["nobody"]) == [-1]
        after = lists()
        for name, answer in before.items():
            stay = [place for place, item in enumerate(answer["item_ids"][0]) if item.decode() not in gone]
            for output in ("item_ids", "scores", "contributions"):
                if output in answer:
                    kept = answer[output][..., stay]
                    np.testing.assert_array_equal(after[name][output][..., : len(stay)], kept, err_msg=name)
            assert not {item.decode() for item in after[name]["item_ids"][0]} & set(gone), name
        only = served.recommend([[old]], include=[gone])
        assert not only["item_ids"].astype(bool).any()
        scores = served("serving_default", history=[[old]], candidates=[[*gone, str(shops[1].item_ids[9])]])["scores"]
        assert (scores[0, :-1] < -1e30).all() and scores[0, -1] > -1e30
        said = [served(f"member_{n}", user_id=[""], history=[[old, new]])["scores"] for n in shops[0].members]
        same(after["recommend"], served.recommend([[old, new]], "fuse", scores=np.stack(said, axis=1)))
        assert served.withdraw(gone, False) == served.withdraw(gone, False)
        for name, answer in lists().items():
            same(before[name], answer)

    def test_a_new_item_that_comes_again(self, shops: tuple[Shop, Shop]) -> None:
        """With other contents, in another row; an item of the catalogue is what it was trained as."""
        served, vectors = Served(shops[1].module(3)), new_vectors(shops[0])
        first, second = ({name: rows[[place]] for name, rows in vectors.items()} for place in (0, 1))
        old = str(shops[1].item_ids[0])
        assert served.add(["new"], first) == [37]
        served.withdraw(["new", old])
        twice = {name: np.repeat(rows, 3, axis=0) for name, rows in second.items()}
        assert served.add(["new", old, "new"], twice) == [38, -1, -1]
        assert served.add(["new"], first) == [-1]
        answer = served("similar_items", item_id=[str(shops[1].item_ids[5])], k=[K_MAX])
        expected = Served(shops[1].module(3))
        expected.add(["new"], second)
        expected.withdraw([old])
        same(expected("similar_items", item_id=[str(shops[1].item_ids[5])], k=[K_MAX]), answer)
        assert served.withdraw(["new"]) == [38] and served.add(["new"], first) == [39]
        served.withdraw(["new"])
        assert served.add(["new"], second) == [-1], "all rows are taken"


def test_a_lookup_beside_learning_takes_no_id_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every state that there is between two assignments known ids are found, and new ones too or not yet."""
    variable = type(tf.Variable(0))
    assign = variable.assign
    left = [0]

    def cut_off(self: Any, *given: Any, **named: Any) -> Any:
        if not left[0]:
            raise InterruptedError
        left[0] -= 1
        return assign(self, *given, **named)

    monkeypatch.setattr(variable, "assign", cut_off)
    batches = [["one", "two"], ["three"], ["four", "five", "six"]]
    whole = 0
    for allowed in range(4):
        there = tf.Variable([*"abc", *[""] * 8])
        keys = tf.lookup.KeyValueTensorInitializer(["a", "b", "c"], tf.range(3))
        ids, known = GrowingIds(tf.lookup.StaticHashTable(keys, -1), there, 3), {"a": 0, "b": 1, "c": 2, "": -1}
        for batch in batches:
            fresh = {name: number for number, name in enumerate(batch, len(known) - 1)}
            left[0] = 1
            there.assign([*[name for name in [*known, *fresh] if name], *[""] * (11 - len(known) - len(fresh) + 1)])
            left[0] = allowed
            try:
                ids.learn()
                whole += 1
            except InterruptedError:
                pass
            found = dict(zip([*known, *fresh], ids.lookup(tf.constant([*known, *fresh])).numpy().tolist(), strict=True))
            assert {name: found[name] for name in known} == known
            assert all(found[name] in (number, -1) for name, number in fresh.items())
            left[0] = 10
            ids.learn()
            known |= fresh
            assert ids.lookup(tf.constant([list(known), ["?"] * len(known)])).numpy().tolist() == [
                list(known.values()),
                [-1] * len(known),
            ]
    assert whole == 3 * len(batches), "one assignment"


def test_older_members_read_their_projection_off_their_tables(shops: tuple[Shop, Shop]) -> None:
    """What a member without `history_projection` makes of items that it knows is what it has of them."""
    member = shops[0].members["text"]
    state = member.state()
    state.pop("history_projection")
    other = type(member)(member.config, 3)
    other.load_state(state)
    grown, rows = other.growing(NEW), tf.constant([ITEM for ITEM in range(40, 43)])
    assert grown is not None
    assert grown.add(rows, {"item": tf.constant(member.table[:NEW])}).numpy().all()
    np.testing.assert_allclose(grown.scorer.history_table.numpy()[40:43], member.tables[0][:NEW], atol=1e-4)
    np.testing.assert_allclose(grown.scorer.item_table.numpy()[40:43], member.tables[1][:NEW], atol=1e-4)
    state.pop("item_projection")
    other.load_state(state)
    assert other.growing(NEW) is None


@pytest.mark.parametrize(
    "base",
    [
        {"kind": "ials", "factors": 4, "epochs": 2, "frequency_scaling": 1.0},
        {"kind": "matrix_factorization", "factors": 4, "training": STEPS},
    ],
    ids=["ials", "matrix_factorization"],
)
def test_a_regression_foretells_their_vectors(base: dict[str, Any], shops: tuple[Shop, Shop], tmp_path: Path) -> None:
    """D15m: a new item gets the vectors that a cold item with the same content got when the member was fitted; to those
    of warm items, and to scores, spare rows change nothing. So it is after a file, too."""
    data, there = shops[0].data, shops[0].items
    encoders = {"words": {"encoder": WORDS, "columns": ["text"]}, "titles": {"encoder": WORDS, "columns": ["title"]}}
    titles = data.catalogue["title"].where(np.arange(there) != there - 1, "")  # the last one has none
    data = replace(data, catalogue=data.catalogue.assign(title=titles))
    member = fitted({"kind": "content_regression", "base": base, "content": encoders}, data, tmp_path)
    loaded = type(member)(member.config, 3)
    loaded.load_state(member.state())
    grown, history = loaded.growing(NEW), tf.constant([[0, 5, -1], [2, 39, 1]])
    assert grown is not None
    plain = member.scorer()
    np.testing.assert_allclose(grown(history)[:, :there], plain(history), rtol=1e-5, atol=1e-5)
    cold = {name: tf.constant(table[-NEW:]) for name, table in loaded.tables.items()}
    assert grown.add(tf.range(there, there + NEW), cold).numpy().all()
    for after, before in (
        (grown.scorer.history_table, plain.history_table),
        (grown.scorer.item_table, plain.item_table),
    ):
        np.testing.assert_allclose(after.numpy()[there : there + NEW], before.numpy()[there - NEW : there], atol=1e-5)
    nothing = {name: 0.0 * table for name, table in cold.items()}
    assert not grown.add(tf.range(there, there + NEW), nothing).numpy().any()
    loaded.load_state({name: array for name, array in member.state().items() if not name.startswith("mapping/")})
    assert loaded.growing(NEW) is None, "fitted by older code"


def test_cells_and_the_picture_of_a_new_item(tmp_path: Path) -> None:
    """A tabular encoder reads the columns that its pattern chose in training; cells may be numbers and lists. Whatever
    encoders there are, a picture is made small for pages."""
    values, _ = read_cells(pd.DataFrame({"year": ["1990", "1991", "2000"], "kind": ["a", "b", "a|b"]}), ["*"])
    encoder = SUBMODELS["dense"](SUBMODELS["dense"].Config(), 0)
    encoder.adapt(values)
    write_examples(tmp_path, {"cells": Contents(encoder, ("*",), np.zeros((3, 2), np.float32), np.ones(3, bool))})
    reader = ItemReader(tmp_path)
    assert reader.columns == {"cells": ("year", "kind")}
    inputs, available, reasons = reader.read("cells", [{"year": 1995}, {"x": 1}, {"kind": ["a", "b"], "year": None}])
    assert available.tolist() == [True, False, True] and reasons == ["", "year and kind are empty", ""]
    assert inputs["numbers"][0, 0] == 1995 and inputs["missing"][:, 0].tolist() == [0, 1]
    assert (
        inputs["categories"].tolist()
        == encoder.prepare(np.array([("", ""), ("", "a|b")], values.dtype))["categories"].tolist()
    )
    picture = io.BytesIO()
    Image.new("RGB", (900, 1800), (200, 30, 30)).save(picture, "PNG")
    with Image.open(io.BytesIO(reader.picture(picture.getvalue()))) as small:
        assert (small.format, small.size) == ("JPEG", (84, 168))
    assert reader.picture(picture.getvalue()[:99]) is None and reader.picture(b"GIF89a") is None
    nothing, available, _ = reader.read("cells", [{}])
    assert nothing == {} and not available.any()


class TestExport:
    @pytest.mark.slow
    def test_spare_rows_by_the_config(self, shop_run: Run, tmp_path: Path) -> None:
        """`export.spare_items`: the manifest says how many, the `.tflite` is as it was, and no warm-up adds items."""
        shutil.copytree(shop_run.folder.parent.parent, tmp_path / "runs", symlinks=True)
        folder = tmp_path / "runs" / shop_run.folder.parent.name / shop_run.folder.name
        rerun(Run.open(folder, quiet=True, export={"spare_items": 4}), ["export"])
        newest = artifact_of(folder)
        first, second = (Predictor.load(folder / "export" / "shop" / version) for version in "12")
        limits = [dict(predictor.manifest.limits) for predictor in (first, second)]
        assert limits == [{"k_max": 12}, {"k_max": 12, "spare_items": 4}]
        assert second.manifest.signatures["fuse"].inputs["scores"].shape == (None, 3, 44)
        lite = [predictor.manifest.files["core.tflite"] for predictor in (first, second)]
        assert lite[0] == lite[1]
        warmed = {name for name, _ in read_warmup(newest)}
        changing = {"add_items", "withdraw_items"}
        assert warmed == set(second.manifest.signatures) - changing == set(first.manifest.signatures)
        users = pq.read_table(newest / "users.parquet")["user_id"].to_pylist()
        same(first.recommend(users[:20]), second.recommend(users[:20]))

    def test_nothing_to_read(self, shop_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no member reads texts or images nothing could be said about a new item."""
        run = Run.open(shop_run.folder, quiet=True, export={"spare_items": 4})
        monkeypatch.setattr(RankingTask, "searchable", lambda *_: {})
        with pytest.raises(ConfigError, match="spare_items must be 0 where no member reads"):
            export_recommender(RankingTask(run))
