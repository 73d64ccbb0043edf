"""Search by an example picture, sentence or item (B11): exact cosines over the embeddings of content members."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

import recsys
from command_line import refusal, run_tool
from fusion.compat import keras, tf
from fusion.errors import ConfigError, DataError
from fusion.images import load_images
from fusion.rules import RULES
from fusion.submodels.standardized import StandardizedConv2D
from recsys.collaborative.base import Member, TrainingData
from recsys.collaborative.content import Contents, join_columns
from recsys.core import MemberScores, RankingCore
from recsys.examples import Examples
from recsys.export import artifact_of
from recsys.pipeline import load_experiment
from recsys.recommender import ServedRecommender, contents_of
from recsys.schema import IMAGE, ITEM_ID
from serving.errors import UnknownSignature
from serving.predictor import Predictor
from worlds import World, fitted

K_MAX = 30
SIZE = 64
TEXT = {"kind": "content", "columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 16}, "scorer": "cosine"}
PICTURE = {"kind": "content", "encoder": {"kind": "image_efficientnet", "image_size": SIZE}, "scorer": "cosine"}
WITHOUT_IMAGE = 5
"""The item whose image is taken away."""


def average(members: dict[str, Member]) -> RankingCore:
    rule = RULES["average"](RULES["average"].Config(), list(members), "candidates")
    return RankingCore(MemberScores(members), rule)


def serve(members: dict[str, Member], ids: np.ndarray, k_max: int = K_MAX) -> ServedRecommender:
    """A recommender of nobody in particular."""
    nobody = sparse.csr_matrix((1, len(ids)), dtype=np.float32)
    return ServedRecommender(average(members), ids, np.array(["u"]), nobody, nobody, k_max, contents_of(members))


def test_kernels_are_standardised_once() -> None:
    """D16m: a new item is embedded by plain convolutions, which answer as those of Big Transfer do."""
    image = keras.Input((8, 8, 3), name="image")
    maps = StandardizedConv2D(4, 3, use_bias=False)(image)
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(maps))
    encoder = SimpleNamespace(encoder=lambda: model, fingerprint=lambda: "bit")
    contents = {"picture": Contents(encoder, (IMAGE,), np.eye(3, 4, dtype=np.float32), np.ones(3, bool))}
    rule = RULES["average"](RULES["average"].Config(), ["popularity"], "candidates")
    said = SimpleNamespace(items=3)
    nobody = sparse.csr_matrix((1, 3), dtype=np.float32)
    core = SimpleNamespace(members=said, rule=rule)
    module = ServedRecommender(core, np.array(["a", "b", "c"]), np.array(["u"]), nobody, nobody, 3, contents)
    embed = module.embed["picture"]
    images = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(embed(image=tf.constant(images))["embedding"], model(images), atol=1e-5)
    assert "SquaredDifference" not in {operation.type for operation in embed.graph.get_operations()}


@dataclass(frozen=True)
class Shop:
    """A planted world of which ease, text and image members are served."""

    world: World
    data: TrainingData
    members: dict[str, Any]
    module: ServedRecommender

    @property
    def pixels(self) -> np.ndarray:
        return load_images(list(self.data.catalogue[IMAGE]), SIZE)[0]

    def found(self, name: str, values: Any, k: int = K_MAX) -> tuple[list[list[str]], np.ndarray]:
        """Ids and cosines of a search by raw texts or pixels."""
        inputs = self.members[name].encoder.prepare(values)
        tensors = [tf.constant(array) for array in inputs.values()]
        answer = self.module.search[name](*tensors, tf.fill([len(values)], k))
        return [[i.decode() for i in row if i] for row in answer["item_ids"].numpy()], answer["scores"].numpy()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    world = World.planted(users=60, items=60, interactions_per_user=10)
    data = world.training(folder)
    images = data.catalogue[IMAGE].copy()
    images.iloc[WITHOUT_IMAGE] = ""
    data = TrainingData(data.matrix, data.catalogue.assign(**{IMAGE: images}), folder)
    settings = {"ease": {"kind": "ease", "l2": 5.0}, "text": TEXT, "picture": PICTURE}
    members = {name: fitted(part, data, folder / name) for name, part in settings.items()}
    return Shop(world, data, members, serve(members, world.data.item_ids))


class TestSearch:
    def test_an_image_of_the_catalogue_finds_itself_first(self, shop: Shop) -> None:
        """B11: with a cosine of 1; an item without an image is never found."""
        rows = np.flatnonzero(shop.members["picture"].speaks)
        found, cosines = shop.found("picture", shop.pixels[rows])
        assert [row[0] for row in found] == shop.world.data.item_ids[rows].tolist()
        np.testing.assert_allclose(cosines[:, 0], 1.0, atol=1e-4)
        assert len(rows) == 59 and not any(shop.world.data.item_ids[WITHOUT_IMAGE] in row for row in found)

    def test_so_does_a_cropped_or_noisy_copy(self, shop: Shop) -> None:
        """B11"""
        rows = np.flatnonzero(shop.members["picture"].speaks)
        random = np.random.default_rng(0)
        images = [np.array(image, np.float64) for image in shop.data.catalogue[IMAGE].iloc[rows]]
        noisy = [(image + random.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8) for image in images]
        cropped = [pixels[2:-2, 2:-2] for pixels in shop.pixels[rows]]
        for copies in (noisy, cropped):
            found, _ = shop.found("picture", load_images(copies, SIZE)[0])
            right = [row[0] == name for row, name in zip(found, shop.world.data.item_ids[rows], strict=True)]
            assert np.mean(right) >= 0.85

    @pytest.mark.parametrize("name", ["text", "picture"])
    def test_recall_against_exact_cosines_is_one(self, shop: Shop, name: str) -> None:
        """B11: the same items in the same order as numpy's cosines of the member's own table, by every k."""
        member = shop.members[name]
        rows = np.flatnonzero(member.speaks)[:20]
        values = shop.pixels[rows] if name == "picture" else shop.data.catalogue["text"].iloc[rows].tolist()
        found, cosines = shop.found(name, values)
        exact = np.where(member.speaks, member.table[rows] @ member.table.T, -np.inf)
        np.testing.assert_allclose(cosines, -np.sort(-exact, axis=1)[:, :K_MAX], atol=1e-4)
        for k in (1, 5, K_MAX):
            for row, scores in enumerate(exact):
                bound = np.sort(scores)[-k] - 1e-4  # equal texts have equal cosines: any of them is right
                chosen = np.searchsorted(shop.world.data.item_ids, found[row][:k])
                assert len(chosen) == k and (scores[chosen] >= bound).all()

    def test_a_word_finds_the_items_that_have_it(self, shop: Shop) -> None:
        texts = dict(zip(shop.world.data.item_ids, shop.data.catalogue["text"], strict=True))
        found, _ = shop.found("text", ["a dragon", "robot"], k=10)
        for row, word in zip(found, ("dragon", "robot"), strict=True):
            assert len(row) == 10 and all(word in texts[item] for item in row)

    def test_k_of_each_row(self, shop: Shop) -> None:
        tensors = [
            tf.constant(a) for a in shop.members["text"].encoder.prepare(["dragon", "robot", "wedding"]).values()
        ]
        answer = shop.module.search["text"](*tensors, tf.constant([0, 2, 500]))
        assert (answer["item_ids"].numpy() != b"").sum(axis=1).tolist() == [0, 2, K_MAX]
        assert (answer["scores"].numpy()[0] == 0).all()


class TestSimilarItems:
    def similar(self, shop: Shop, items: list[str], k: int = 8) -> dict[str, np.ndarray]:
        answer = shop.module.similar_items(tf.constant(items), tf.fill([len(items)], k))
        return {name: value.numpy() for name, value in answer.items()}

    def test_a_cold_item_is_answered_by_content(self, shop: Shop) -> None:
        """B11: never by itself; the members that know nothing of it add nothing."""
        cold = np.flatnonzero(shop.world.counts == 0)[:4]
        names = [str(shop.world.data.item_ids[n]) for n in cold]
        answer = self.similar(shop, names)
        for name, found in zip(names, answer["item_ids"], strict=True):
            assert (found[:8] != b"").all() and name.encode() not in found
        assert (answer["contributions"][:, 0] == 0).all() and (answer["contributions"][:, 1:] != 0).any()

    def test_contributions_sum_to_the_score(self, shop: Shop) -> None:
        names = [str(shop.world.data.item_ids[n]) for n in shop.world.warm[:6]]
        answer = self.similar(shop, names)
        assert answer["contributions"].shape == (6, 3, K_MAX)
        np.testing.assert_allclose(answer["contributions"].sum(axis=1), answer["scores"], rtol=1e-4, atol=1e-5)
        assert (answer["contributions"][:, 0, :8] != 0).any()


@pytest.mark.slow
def test_members_that_read_alike_share_encoder_and_table(shop: Shop, tmp_path: Path) -> None:
    """A hybrid over the same images writes neither the encoder nor the embeddings twice; its searches have names."""
    image = {"encoder": PICTURE["encoder"]}
    base = {"kind": "ials", "factors": 4, "epochs": 2}
    settings = {"kind": "content_regression", "base": base, "content": {"a": image, "b": image}}
    hybrid = fitted(settings, shop.data, tmp_path)
    members = {"picture": shop.members["picture"], "hybrid": hybrid}
    module = serve(members, shop.world.data.item_ids)
    assert set(module.search) == {"picture", "hybrid_a", "hybrid_b"}
    assert {"embed_item_hybrid_a", "search_hybrid_b", "similar_items"} <= set(module.signatures())
    first, *others = module.encoder_variables.values()
    assert all(a is b for other in others for a, b in zip(first[:-1], other[:-1], strict=True))


def test_names_of_signatures_must_differ(shop: Shop, tmp_path: Path) -> None:
    both = {"text": {"columns": ["text"], "encoder": TEXT["encoder"]}, "b": {"encoder": PICTURE["encoder"]}}
    base = {"kind": "ials", "factors": 4, "epochs": 1}
    hybrid = fitted({"kind": "content_regression", "base": base, "content": both}, shop.data, tmp_path)
    with pytest.raises(ConfigError, match="two contents are called 'a_b'"):
        contents_of({"a": hybrid, "a_b": shop.members["picture"]})


# ---- the artifact --------------------------------------------------------------------------------------------


CONFIG: dict[str, Any] = {
    "name": "search",
    "data": {"kind": "planted", "users": 60, "items": 40, "interactions_per_user": 10},
    "members": {
        "popularity": {"kind": "popularity"},
        "ease": {"kind": "ease", "l2": 10},
        "text": TEXT,
        "image": {
            "kind": "content",
            "encoder": {"kind": "image_cnn", "image_size": 16, "widths": [8, 16]},
            "scorer": "cosine",
            "fine_tuning": {"pairs": 64, "training": {"epochs": 1, "batch_size": 32}},
        },
    },
    "rules": {"average": {"kind": "average"}},
    "evaluation": {"metrics": ["ndcg@10"], "samples": 100, "examples": 1},
    "export": {"tflite": False, "k_max": 20, "refit": "none"},
}


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> recsys.Recommender:
    return recsys.Recommender.fit(CONFIG, tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.fixture(scope="module")
def catalogue(recommender: recsys.Recommender) -> Any:
    from recsys.ranking_task import RankingTask

    data = RankingTask(recommender.run).interactions
    return data.catalogue.assign(**{ITEM_ID: data.item_ids}).set_index(ITEM_ID)


class TestRecommender:
    def test_by_text(self, recommender: recsys.Recommender, catalogue: Any) -> None:
        """B11: raw text, read by the exported vocabulary."""
        table = recommender.search(text="the robot", k=5)
        assert list(table.columns) == ["rank", "item_id", "score"] and table["rank"].tolist() == [1, 2, 3, 4, 5]
        assert catalogue.loc[table["item_id"], "text"].str.contains("robot").all()
        assert table["score"].is_monotonic_decreasing and table["score"].between(0, 1.0001).all()

    def test_by_image(self, recommender: recsys.Recommender, catalogue: Any, tmp_path: Path) -> None:
        """B11: pixels and a file find the item that they show."""
        pixels = np.array(catalogue.loc["i07", IMAGE])
        table = recommender.search(image=pixels, k=3)
        assert table["item_id"][0] == "i07" and table["score"][0] == pytest.approx(1.0, abs=1e-4)
        Image.fromarray(pixels).save(tmp_path / "seven.png")
        assert recommender.search(image=tmp_path / "seven.png", k=3).equals(table)

    def test_similar_items(self, recommender: recsys.Recommender) -> None:
        table = recommender.similar_items(["i07", "i01"], k=4)
        assert table.groupby("row").size().tolist() == [4, 4]
        assert "i07" not in table[table["row"] == 0]["item_id"].tolist()
        shares = table[["popularity", "ease", "text", "image"]]
        assert (shares["popularity"] == 0).all(), "what everybody takes is like nothing in particular"
        np.testing.assert_allclose(shares.sum(axis=1), table["score"], atol=1e-5)

    @pytest.mark.parametrize(
        ("asked", "error", "sentence"),
        [
            ({}, DataError, "either a text or an image; received both or neither"),
            ({"text": "a", "image": "b"}, DataError, "either a text or an image; received both or neither"),
            ({"text": "  "}, DataError, "needs a text with a word in it"),
            ({"image": "none.png"}, DataError, "'none.png' cannot be used: the file does not exist"),
            ({"text": "robot", "k": 0}, ConfigError, r"k must be between 1 and 20 \(export.k_max\); received 0"),
            ({"text": "robot", "member": "image"}, ConfigError, "no member 'image' can be searched by text"),
        ],
    )
    def test_what_cannot_be_searched(
        self, recommender: recsys.Recommender, asked: dict[str, Any], error: type[Exception], sentence: str
    ) -> None:
        with pytest.raises(error, match=sentence):
            recommender.search(**asked)

    def test_an_artifact_without_content(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="a search by image needs a member that reads images"):
            Examples(tmp_path).choose("image")


class TestTool:
    def test_like_text_image_and_item(self, recommender: recsys.Recommender, catalogue: Any, tmp_path: Path) -> None:
        """B11: `tools/recommend.py RUN --like-text "..."`, `--like-image FILE`, `--like-item ID`."""
        folder = recommender.run.folder
        by_text = json.loads(run_tool("recommend", folder, "--like-text", "the robot", "-k", 5, "--json").out)
        assert [row["item_id"] for row in by_text["items"]] == recommender.search(
            text="the robot", k=5
        ).item_id.tolist()
        assert by_text["searched"] == "text" and by_text["items"][0]["title"].startswith("Item ")
        Image.fromarray(np.array(catalogue.loc["i07", IMAGE])).save(tmp_path / "seven.png")
        shown = run_tool("recommend", folder, "--like-image", tmp_path / "seven.png", "-k", 2)
        assert shown.code == 0 and shown.out.splitlines()[1].split()[:2] == ["1", "i07"]
        by_item = json.loads(run_tool("recommend", folder, "--like-item", "i07", "-k", 4, "--json").out)
        assert [r["item_id"] for r in by_item["items"]] == recommender.similar_items(["i07"], k=4).item_id.tolist()
        assert set(by_item["items"][0]["contributions"]) == {"popularity", "ease", "text", "image"}

    def test_what_it_refuses(self, recommender: recsys.Recommender, tmp_path: Path) -> None:
        folder = recommender.run.folder
        assert "'nothing' is not in the catalogue" in refusal(
            run_tool("recommend", folder, "--like-item", "nothing"), 3
        )
        (tmp_path / "broken.png").write_bytes(b"nothing")
        broken = run_tool("recommend", folder, "--like-image", tmp_path / "broken.png")
        assert "cannot be used: not a JPEG, PNG, WEBP file" in refusal(broken, 3)
        assert "needs a text with a word" in refusal(run_tool("recommend", folder, "--like-text", ""), 3)
        assert run_tool("recommend", folder, "--like-text", "a", "--like-item", "i07").code == 2

    def test_the_predictor_names_what_it_has(self, recommender: recsys.Recommender) -> None:
        predictor = Predictor.load(artifact_of(recommender.run.folder))
        assert {"search_text", "search_image", "similar_items"} <= set(predictor.manifest.signatures)
        with pytest.raises(UnknownSignature, match="search_text"):
            predictor.search("poster", {"image": np.zeros((1, 16, 16, 3), np.uint8)})


# ---- real data -----------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.slow
def test_posters_find_themselves_and_plots_their_film(data_dir: Path, tmp_path: Path) -> None:
    """B11: on 400 real films, a poster, even cut, finds its film, and a sentence finds the film that it tells of."""
    config = Path(__file__).parents[2] / "configs" / "movielens_posters.yaml"
    experiment = load_experiment(config, [f"data.path={data_dir / 'movielens_multimodal'}"])
    items = experiment.data.registry[experiment.data.kind].read(experiment.data.config).items
    items = items[(items[IMAGE] != "") & (items["plot"].fillna("") != "")].head(400).reset_index(drop=True)
    matrix = sparse.csr_matrix(np.ones((2, len(items)), np.float32))
    data = TrainingData(matrix, items, tmp_path)
    members = {
        name: fitted({**experiment.members[name].dump(), "scorer": "cosine"}, data, tmp_path)
        for name in ("text", "poster")
    }
    module = serve(members, items[ITEM_ID].to_numpy())
    cut = np.stack([
        np.asarray(Image.open(path).convert("RGB").crop((4, 4, 80, 80)).resize((160, 160)))
        for path in items[IMAGE][:40]
    ])  # fmt: skip
    whole = load_images(list(items[IMAGE][:40]), 160)[0]
    expected = items[ITEM_ID][:40].tolist()
    for pixels, least in ((whole, 40), (cut, 20)):
        answer = module.search["poster"](tf.constant(pixels), tf.fill([40], 1))
        assert sum(a.decode() == b for a, b in zip(answer["item_ids"].numpy()[:, 0], expected, strict=True)) >= least
    titles = join_columns(items, ["title"])
    inputs = members["text"].encoder.prepare(["a boy's toys are jealous of a new spaceman doll"])
    in_order = [tf.constant(inputs[name]) for name in module.embed["text"].structured_input_signature[1]]
    answer = module.search["text"](*in_order, tf.constant([3]))
    best = answer["item_ids"].numpy()[0, 0].decode()
    assert titles[items[ITEM_ID].tolist().index(best)] == "Toy Story (1995)"
