"""Why an item is recommended: hand-made members of which the reasons are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fusion.compat import keras, tf
from fusion.config import parse_part
from fusion.rules.average import Average
from fusion.submodels.base import Submodel
from fusion.types import Features, RunOptions
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import Member, TrainingData
from recsys.collaborative.content import Content
from recsys.core import MemberScores, RankingCore
from recsys.reasons import LEFT_OUT, Explainer, losses
from recsys.report import Example, Recommended, ReportExtras, write_report
from recsys.report_content import Liked, Reasons, Region, Words
from recsys.schema import IMAGE, TITLE, Interactions

TITLES = ["Dragon one", "Dragon two", "Robot one", "Robot two", "Nothing", "Cold dragon", *(["Cold robot"] * 6)]
TEXTS = ["dragon castle", "dragon winter night", "robot space", "robot winter", "", "dragon story", *(["robot"] * 6)]
TAKEN = [[0, 1], [0, 1], [2, 3], [2, 3, 0], [1, 3]]


def made(settings: dict[str, Any]) -> Member:
    member: Member = parse_part(MEMBERS, settings, "member").make(3)
    return member


def neighbours(weights: np.ndarray, decay: float = 1.0) -> Member:
    """EASE with the given weights `[I, I]`: row i is what a liked item i adds to each item."""
    member = made({"kind": "ease", "decay": decay})
    index = np.tile(np.arange(len(weights), dtype=np.int32), (len(weights), 1))
    speaks = np.ones(len(weights), bool)
    member.load_state({"index": index, "weight": weights, "speaks": speaks, "truncation": np.zeros(())})
    return member


def popular(items: int) -> Member:
    """Popularity, which likes the first items most."""
    member = made({"kind": "popularity"})
    member.load_state({"scores": -np.arange(items, dtype=np.float32), "speaks": np.ones(items, bool)})
    return member


def core_of(members: dict[str, Member]) -> RankingCore:
    return RankingCore(MemberScores(members), Average(Average.Config(), list(members), "candidates"))


def training(folder: Path) -> TrainingData:
    from scipy import sparse

    rows = np.repeat(np.arange(len(TAKEN)), [len(items) for items in TAKEN])
    cells = np.ones(len(rows), np.float32), (rows, np.concatenate(TAKEN))
    matrix = sparse.csr_matrix(cells, shape=(len(TAKEN), len(TITLES)))
    return TrainingData(matrix, pd.DataFrame({TITLE: TITLES, "plot": TEXTS}), folder)


def items_of(catalogue: pd.DataFrame) -> Interactions:
    """A data set of which only the items are asked for."""
    ids = np.array([f"i{number}" for number in range(len(catalogue))], object)
    nothing = np.zeros(0, np.int32)
    return Interactions("tiny", np.array(["u"], object), ids, nothing, nothing, nothing > 0, None, None, catalogue)


def test_a_liked_item_counts_what_the_score_loses_without_it() -> None:
    """A7: of EASE just its weight, of the fused score the difference of two whole answers; popularity loses nothing."""
    weights = np.random.default_rng(0).normal(0, 1, (6, 6)).astype(np.float32)
    members = {"ease": neighbours(weights), "popularity": popular(6)}
    core, history, items = core_of(members), np.array([4, 0, 2], np.int32), np.array([1, 3], np.int32)
    lost = losses(core, history, items)
    assert lost.shape == (3, 2, 3)
    np.testing.assert_allclose(lost[1], weights[np.ix_(history, items)].T, atol=1e-6)
    np.testing.assert_array_equal(lost[2], 0.0)
    for place in range(3):
        whole, without = (core(tf.constant([h])).numpy()[0, items] for h in (history, np.delete(history, place)))
        np.testing.assert_allclose(lost[0, :, place], whole - without, atol=1e-5)

    (first, _) = Explainer(core, members, items_of(pd.DataFrame({TITLE: TITLES})))(history, items)
    expected = sorted(((weights[item, 1], TITLES[item]) for item in history if weights[item, 1] > 0), reverse=True)
    assert first.shares["ease"] > 0, "or it had no reasons to be given"
    assert [(liked.title, liked.loss) for liked in first.liked_by_member["ease"]] == [
        (title, pytest.approx(weight, abs=1e-6)) for weight, title in expected
    ]
    assert "popularity" not in first.liked_by_member and first.words == {} == first.regions
    assert first.score == pytest.approx(core(tf.constant([history])).numpy()[0, 1], abs=1e-5)
    assert first.score == pytest.approx(sum(first.shares.values()) + first.bias)
    (nobody,) = Explainer(core, members, items_of(pd.DataFrame({TITLE: TITLES})))(history[:0], items[:1])
    assert nobody.liked == [] and nobody.liked_by_member == {} and nobody.shares["popularity"] == nobody.score


def test_older_items_move_up_and_only_the_latest_are_left_out() -> None:
    """A7: with a recency weight the answer without an item is that to the shorter history, not a sum of terms."""
    weights = np.random.default_rng(1).normal(0, 1, (150, 150)).astype(np.float32)
    member = neighbours(weights, decay=0.5)
    history, items = np.arange(120, dtype=np.int32), np.array([130, 140], np.int32)
    lost = losses(core_of({"ease": member}), history, items)
    assert lost.shape == (2, 2, LEFT_OUT)
    scorer = member.scorer()
    for place in (20, 118, 119):
        shorter = np.delete(history, place)
        expected = (scorer(tf.constant([history])) - scorer(tf.constant([shorter]))).numpy()[0, items]
        np.testing.assert_allclose(lost[1, :, place - 20], expected, atol=1e-5)


def test_the_words_of_a_tfidf_member_are_the_shared_ones(tmp_path: Path) -> None:
    """A7: a dragon was liked, so the dragon speaks for the cold one; what words add sums to the member's score."""
    settings = {"kind": "content", "columns": ["plot"], "scorer": "cosine", "encoder": {"kind": "text_tfidf"}}
    data, member = training(tmp_path), made(settings)
    member.fit(data, RunOptions(1, tmp_path / "text", quiet=True))
    members = {"text": member, "popularity": popular(len(TITLES))}
    history = np.array([0], np.int32)
    explain = Explainer(core_of(members), members, items_of(data.catalogue))
    second, cold, nothing, other = explain(history, np.array([1, 5, 4, 2], np.int32))
    shares = dict(second.words["text"].shares)
    assert shares["dragon"] > 0 and set(shares) == {"dragon", "night", "winter"}
    assert abs(shares["winter"]) + abs(shares["night"]) < 1e-5, "a direction of words that the liked text has not"
    score = member.scorer()(tf.constant([history])).numpy()[0]
    for reasons, item in ((second, 1), (cold, 5)):
        words = reasons.words["text"]
        assert sum(share for _, share in words.shares) == pytest.approx(score[item], abs=1e-5)
        assert words.score == pytest.approx(score[item], abs=1e-5)
    assert [liked.title for liked in second.liked_by_member["text"]] == ["Dragon one"]
    assert nothing.words == {} and nothing.shares["text"] == 0, "it has no text"
    assert other.words == {} and other.shares["text"] < 0, "the text speaks against it"


def test_words_through_trained_projections_add_up_to_the_score(tmp_path: Path) -> None:
    """A7: the score as a function of the embedding is the member's own; members of older code go without words."""
    settings = {"kind": "content", "columns": ["plot"], "encoder": {"kind": "text_tfidf"}, "decay": 0.7}
    data, plain = training(tmp_path), made({**settings, "scorer": "cosine"})
    plain.fit(data, RunOptions(1, tmp_path / "text", quiet=True))
    state, random = plain.state(), np.random.default_rng(2)
    table = state["embeddings"]
    state["item_projection"], other = random.normal(0, 1, (2, table.shape[1], 3)).astype(np.float32)
    vectors = table @ state["item_projection"]
    state |= {"history_table": table @ other, "item_table": vectors / np.linalg.norm(vectors + 1e-9, axis=1)[:, None]}
    member, older = made(settings), made(settings)
    member.load_state(state)
    assert set(member.state()) == set(state), "the projection is kept"
    older.load_state({name: array for name, array in state.items() if name != "item_projection"})
    history, found = np.array([0, 3], np.int32), []
    for one in (member, older):
        members = {"text": one, "popularity": popular(len(TITLES))}
        found.append(Explainer(core_of(members), members, items_of(data.catalogue))(history, np.arange(len(TITLES))))
    score = member.scorer()(tf.constant([history])).numpy()[0]
    spoken = [(item, reasons.words["text"]) for item, reasons in enumerate(found[0]) if reasons.words]
    assert spoken and not any(reasons.words for reasons in found[1])
    for item, words in spoken:
        assert words.score == pytest.approx(score[item], abs=1e-5)
        assert sum(share for _, share in words.shares) == pytest.approx(score[item], abs=1e-4)


class Brightness(Submodel):
    """Two features: how bright, and how dark, an image is on average."""

    modality = "image"
    frozen = True

    def prepare(self, values: Any, fixed_length: bool = False) -> Features:
        return {"image": np.asarray(values, np.float32) / 255.0}

    def _build(self) -> keras.Model:
        image = keras.Input((16, 16, 3), name="image")
        parts = keras.layers.Conv2D(2, 1, activation="relu", name="parts")
        vector = keras.layers.GlobalAveragePooling2D()(parts(image))
        model = keras.Model(image, keras.layers.UnitNormalization(name="embedding")(vector))
        kernel = np.zeros((1, 1, 3, 2), np.float32)
        kernel[..., 0], kernel[..., 1] = 1 / 3, -1 / 3
        parts.set_weights([kernel, np.array([-0.5, 0.5], np.float32)])
        return model

    def unfreeze(self) -> list[Any]:
        return []


def test_the_region_that_is_like_what_was_liked(tmp_path: Path) -> None:
    """A7: who liked bright pictures is shown the bright square, who liked dark ones all but the square."""
    images = np.full((12, 16, 16, 3), 20, np.uint8)
    images[0] = 250
    images[2, 3:9, 5:11] = 250
    member = made({"kind": "content", "scorer": "cosine", "encoder": {"kind": "image_cnn", "image_size": 16}})
    assert isinstance(member, Content)
    member.encoder = Brightness(member.config.encoder.config, 1)
    table = member.encoder.encode(member.encoder.prepare(images))
    member.tables, member.speaks = (table, table), np.ones(12, bool)
    members = {"image": member, "popularity": popular(12)}
    catalogue = pd.DataFrame({TITLE: ["bright", "dark", "square", *(["dark"] * 9)], IMAGE: list(images)})
    explain = Explainer(core_of(members), members, items_of(catalogue))
    square = np.zeros((16, 16), bool)
    square[3:9, 5:11] = True
    (bright,) = explain(np.array([0], np.int32), np.array([2], np.int32))
    (dark,) = explain(np.array([1], np.int32), np.array([2], np.int32))
    np.testing.assert_array_equal(bright.regions["image"].image, images[2])
    np.testing.assert_allclose(bright.regions["image"].heat, square, atol=1e-5)
    np.testing.assert_allclose(dark.regions["image"].heat, ~square, atol=1e-5)
    grid = np.array(json.loads(json.dumps(bright.plain()))["regions"]["image"])
    np.testing.assert_array_equal(grid, square[1::2, 1::2])


def test_the_page_tells_the_reasons(tmp_path: Path) -> None:
    """A7: titles, members, words and pictures are on the page and cannot break it."""
    hostile = "<b>Heat</b>"
    why = Reasons(
        "i7", 0.9, 0.1, {"ease": 0.5, "text": 0.3, "image": 0.2, "popularity": 0.05, "vae": -0.2},
        [Liked("i1", hostile, 0.4)], {"ease": [Liked("i2", "Ronin", 0.2)], "text": []},
        {"text": Words(0.4, [("dragon", 0.3), ("the", -0.1)])},
        {"image": Region(np.full((8, 8, 3), 90, np.uint8), np.eye(8, dtype=np.float32))},
    )  # fmt: skip
    recommended = [Recommended("Alien", 0.9, why.shares, reasons=why), Recommended("Up", 0.1, {"ease": 0.1})]
    example = Example("u1", [], recommended)
    write_report(tmp_path, {}, ReportExtras("ndcg@10", examples=[example]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = page.split('<ol class="why">')[1].split("</ol>")[0]
    assert "1. Alien" in shown and "2." not in shown and hostile not in shown and "&lt;b&gt;Heat" in shown
    assert "Ronin" in shown and "dragon" in shown and shown.count("data:image/jpeg") == 1
    assert "the same for everybody" in shown and "vae" not in shown
    assert example.plain() == {"user_id": "u1", "recommended": [why.plain()]}
