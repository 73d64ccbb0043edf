"""The recommender that is served, and the artifact that it is exported to (O1, O5, A7)."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.errors import ConfigError, GateError
from fusion.export import savedmodel, tflite, warmup
from fusion.export.manifest import verify_manifest
from fusion.rules import RULES
from recsys.collaborative.base import PADDING
from recsys.core import MemberScores, RankingCore
from recsys.evaluation import history_rows
from recsys.export import artifact_of
from recsys.pipeline import rerun, run_experiment
from recsys.ranking_task import RankingTask
from recsys.recommender import UNSCORED, ServedRecommender, StoredRows
from recsys.run import Run
from recsys.schema import TEST, TRAIN
from recsys.settings import parse_experiment
from serving.batch import Lists, recommend_all
from serving.errors import ArtifactRefused
from serving.messages import RecommendRequest
from serving.predictor import Predictor
from worlds import World, fitted

K_MAX = 25
TOWERS = {"epochs": 3, "batch_size": 128, "learning_rate": 0.02}
TEXT = {"columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 16}, "dimensions": 8, "training": TOWERS}
STRANGE = ["a b", "it's", '"quoted"', "ä ö 電", "x" * 200]
"""Ids of the first items that somebody took: anything that is text may be one."""


@dataclass(frozen=True)
class Served:
    """A recommender of popularity and EASE over 40 items, and what it was made of."""

    module: ServedRecommender
    core: RankingCore
    item_ids: np.ndarray
    user_ids: np.ndarray
    history: sparse.csr_matrix
    seen: sparse.csr_matrix

    @functools.cached_property
    def signatures(self) -> dict[str, Any]:
        return self.module.signatures()

    def recommend(
        self,
        users: Sequence[str] = ("",),
        histories: Sequence[Sequence[str]] | None = None,
        k: Sequence[int] | int = 5,
        exclude: Sequence[Sequence[str]] | None = None,
        include: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, np.ndarray]:
        rows = len(users)
        lengths = [k] * rows if isinstance(k, int) else list(k)
        strings = [padded(given, rows) for given in (histories, exclude, include)]
        answer = self.module.recommend(
            tf.constant(list(users)), strings[0], tf.constant(lengths, tf.int32), strings[1], strings[2]
        )
        return {name: value.numpy() for name, value in answer.items()}

    def items(self, *arguments: Any, **named: Any) -> list[list[str]]:
        """The recommended ids of each row, without padding."""
        return [[i.decode() for i in row if i] for row in self.recommend(*arguments, **named)["item_ids"]]

    def fused(self, numbers: Sequence[int]) -> np.ndarray:
        return self.core(tf.constant([list(numbers) or [PADDING]], tf.int32)).numpy()[0]

    def best(self, numbers: Sequence[int], hidden: Sequence[int], k: int) -> list[str]:
        """What has to come out, by numpy."""
        scores = self.fused(numbers).copy()
        scores[list(hidden)] = -np.inf
        order = np.argsort(-scores, kind="stable")
        return [str(self.item_ids[n]) for n in order[:k] if np.isfinite(scores[n])]

    def own(self, user: int, matrix: sparse.csr_matrix) -> list[int]:
        return [int(n) for n in matrix.indices[matrix.indptr[user] : matrix.indptr[user + 1]]]


def padded(lists: Sequence[Sequence[str]] | None, rows: int) -> tf.Tensor:
    lists = lists or [[]] * rows
    width = max(len(values) for values in lists)
    return tf.constant([[*values, *[""] * (width - len(values))] for values in lists], tf.string, (rows, width))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    where = World.planted(users=40, items=40, interactions_per_user=10)
    data = where.training(folder)
    members = {
        "popularity": fitted({"kind": "popularity"}, data, folder),
        "ease": fitted({"kind": "ease", "l2": 5.0}, data, folder),
    }
    average = RULES["average"](RULES["average"].Config(), list(members), "candidates")
    core = RankingCore(MemberScores(members, data.counts), average)
    item_ids, asked = where.data.item_ids.astype(object), where.asked(TEST)
    item_ids[where.warm[: len(STRANGE)]] = STRANGE
    module = ServedRecommender(core, item_ids, where.data.user_ids, asked.history, asked.seen, K_MAX)
    return Served(module, core, item_ids, where.data.user_ids, asked.history, asked.seen)


@pytest.fixture(scope="module", params=list(RULES))
def under(served: Served, request: pytest.FixtureRequest) -> Served:
    """The same members under each rule."""
    members = served.core.members
    rule = RULES[request.param](RULES[request.param].Config(), members.names, "candidates")
    known = served.item_ids, served.user_ids, served.history, served.seen
    core = RankingCore(members, rule)
    return Served(ServedRecommender(core, *known, K_MAX), core, *known)


class TestStoredRows:
    def test_any_rows(self) -> None:
        """Also nobody's, empty ones at both ends, one twice, and none at all."""
        matrix = sparse.csr_matrix(np.array([[0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]], np.float32))
        rows = StoredRows(matrix, "rows")
        asked = rows(tf.constant([1, -1, 2, 0, 3, 1])).numpy()
        assert asked.tolist() == [[1, 2], [-1, -1], [0, -1], [-1, -1], [-1, -1], [1, 2]]
        assert rows(tf.constant([0, 3])).shape == (2, 0) and rows(tf.zeros([0], tf.int32)).shape == (0, 0)
        assert StoredRows(sparse.csr_matrix((2, 3)), "nothing")(tf.constant([0, 1])).shape == (2, 0)

    def test_nothing_reads_all_of_them(self) -> None:
        """An answer costs what its own row costs, however many users there are."""
        rows = StoredRows(sparse.csr_matrix(np.eye(3, dtype=np.float32)), "rows")
        graph = tf.function(rows, input_signature=[tf.TensorSpec([None], tf.int32)]).get_concrete_function().graph
        tables = [tensor for tensor in graph.internal_captures if tensor.dtype == tf.resource]
        assert len(tables) == 2 and {o.type for t in tables for o in t.consumers()} == {"ResourceGather"}


class TestRecommend:
    def test_a_known_user(self, served: Served) -> None:
        """The core's order over what the user has not seen; nothing seen is ever recommended again."""
        users = [str(served.user_ids[n]) for n in (0, 7, 33)]
        answer = served.recommend(users, k=K_MAX)
        assert answer["known_user"].tolist() == [True] * 3 and answer["item_ids"].shape == (3, K_MAX)
        for row, user in enumerate((0, 7, 33)):
            seen, history = served.own(user, served.seen), served.own(user, served.history)
            found = [item.decode() for item in answer["item_ids"][row] if item]
            assert found == served.best(history, seen, K_MAX)
            assert not set(found) & {str(served.item_ids[n]) for n in seen}

    def test_an_unknown_visitor_is_answered_from_a_history(self, served: Served) -> None:
        """Strange ids are ids like others."""
        one, other = served.items(["nobody", ""], [STRANGE[:3], STRANGE[2:]], k=6)
        for found, history in ((one, numbers(served, STRANGE[:3])), (other, numbers(served, STRANGE[2:]))):
            assert found == served.best(history, history, 6)
        assert one != other
        assert served.recommend(["nobody", ""], [STRANGE[:3], STRANGE[2:]])["known_user"].tolist() == [False, False]

    def test_a_known_user_may_bring_newer_items(self, served: Served) -> None:
        stored = served.own(3, served.history)
        new = next(n for n in range(40) if n not in served.own(3, served.seen) and served.core.members.speaks[1, n] > 0)
        found = served.items([str(served.user_ids[3])], [[str(served.item_ids[new])]], k=8)[0]
        assert found == served.best([*stored, new], [*served.own(3, served.seen), new], 8)

    def test_exclude_and_include(self, served: Served) -> None:
        """Both together, for each row by itself; ids that are not known have no effect."""
        plain = served.items(["", ""], [["a b"], ["a b"]], k=10)[0]
        without, alone = served.items(
            ["", ""],
            [["a b"], ["a b"]],
            10,
            exclude=[plain[:2], [plain[4]]],
            include=[[], [plain[4], plain[1], "unknown", plain[8]]],
        )
        history = numbers(served, ["a b"])
        assert without == served.best(history, [*history, *numbers(served, plain[:2])], 10)
        assert alone == [plain[1], plain[8]]
        assert served.items([""], [["a b"]], 10, exclude=[["unknown", ""]])[0] == plain

    def test_include_of_unknown_ids_alone_leaves_nothing(self, served: Served) -> None:
        """It is a restriction that nothing meets, and not no restriction."""
        answer = served.recommend([""], [["a b"]], 5, include=[["unknown"]])
        assert (answer["item_ids"] == b"").all() and (answer["scores"] == 0).all()
        assert (answer["contributions"] == 0).all()

    def test_include_does_not_bring_back_what_was_seen(self, served: Served) -> None:
        seen = [str(served.item_ids[n]) for n in served.own(0, served.seen)]
        assert served.items([str(served.user_ids[0])], None, 5, include=[seen]) == [[]]

    def test_k_of_each_row_and_more_than_there_are(self, served: Served) -> None:
        rows = served.items([""] * 4, [["a b"]] * 4, k=[1, 0, 3, 500])
        assert [len(row) for row in rows] == [1, 0, 3, K_MAX] and rows[3][:3] == rows[2]
        everything = ServedRecommender(
            served.core, served.item_ids, served.user_ids, served.history, served.seen, k_max=100
        )
        answer = everything.recommend(
            tf.constant([""]), tf.constant([["a b"]]), tf.constant([100]), tf.constant([[""]]), tf.constant([[""]])
        )
        assert answer["item_ids"].shape == (1, 100) and answer["contributions"].shape == (1, 2, 100)
        found = [item.decode() for item in answer["item_ids"].numpy()[0] if item]
        history = numbers(served, ["a b"])
        assert found == served.best(history, history, 100) and len(found) < 40

    def test_duplicates_and_unknown_ids_in_a_history(self, served: Served) -> None:
        expected = served.recommend([""], [["a b", "it's"]])
        for history in (["a b", "it's", "a b"], ["it's", "unknown", "a b", "it's"], ["", "a b", "", "it's"]):
            answer = served.recommend([""], [history])
            np.testing.assert_array_equal(answer["item_ids"], expected["item_ids"])
            np.testing.assert_allclose(answer["scores"], expected["scores"], rtol=1e-5)
        twice = numbers(served, ["a b", "it's", "a b"])
        assert not np.allclose(served.fused(twice), served.fused(twice[:2])), "or this would show nothing"

    def test_nothing_is_known(self, served: Served) -> None:
        """Nobody, without a history: popularity alone answers, and says so."""
        answer = served.recommend(["", "nobody", ""], [[], [], ["unknown"]])
        assert not answer["known_user"].any()
        for row in range(3):
            assert [item.decode() for item in answer["item_ids"][row][:5]] == served.best([], [], 5)
        assert (answer["contributions"][:, 1] == 0).all() and (answer["contributions"][:, 0, :5] != 0).any()

    def test_batch_is_single(self, served: Served) -> None:
        users = [str(user) for user in served.user_ids[:6]]
        together = served.recommend(users, k=7)
        for row, user in enumerate(users):
            alone = served.recommend([user], k=7)
            np.testing.assert_array_equal(alone["item_ids"][0], together["item_ids"][row])
            np.testing.assert_allclose(alone["scores"][0], together["scores"][row], rtol=1e-5)

    def test_contributions_sum_to_the_score(self, served: Served, under: Served) -> None:
        """A7: for every rule, to the last of the returned items."""
        found = under.recommend([str(user) for user in served.user_ids[:9]], k=K_MAX)
        there = found["item_ids"] != b""
        assert there.sum() > 100
        np.testing.assert_allclose(found["contributions"].sum(axis=1), found["scores"], rtol=1e-4, atol=1e-5)
        assert (np.diff(np.where(there, found["scores"], -1e9), axis=1) <= 1e-6).all(), "the best comes first"


class TestMembersApart:
    """H7: what a server asks where a member fails: each one by itself, and `fuse` over those that answered."""

    USERS = (3, 7, 33, None, None)
    GIVEN = (["ä ö 電"], ["unknown"], [], ["a b", "it's"], [])

    def who(self, served: Served) -> dict[str, tf.Tensor]:
        ids = ["nobody" if user is None else str(served.user_ids[user]) for user in self.USERS]
        return {"user_id": tf.constant(ids), "history": padded(self.GIVEN, 5)}

    def what(self) -> dict[str, tf.Tensor]:
        exclude, include = [["it's"], [], ["a b"], [], []], [[], [], ["it's", "ä ö 電", "a b"], [], []]
        return {"k": tf.fill([5], K_MAX), "exclude": padded(exclude, 5), "include": padded(include, 5)}

    def histories(self, served: Served) -> tf.Tensor:
        """What the members are asked with, as numbers `[B, L]`."""
        rows = [
            [*([] if user is None else served.own(user, served.history)), *numbers(served, known)]
            for user, known in zip(self.USERS, (["ä ö 電"], [], [], ["a b", "it's"], []), strict=True)
        ]
        once = [list(dict.fromkeys(reversed(row)))[::-1] for row in rows]
        return tf.constant([[*row, *[PADDING] * (20 - len(row))] for row in once], tf.int32)

    def said(self, served: Served) -> np.ndarray:
        """`[B, S, I]`, each member by its own signature."""
        signatures, who, names = served.signatures, self.who(served), served.core.members.names
        return np.stack([signatures[f"member_{name}"](**who)["scores"].numpy() for name in names], axis=1)

    def fused(self, served: Served, said: np.ndarray) -> dict[str, np.ndarray]:
        scores = tf.constant(said, tf.float32)
        answer = served.signatures["fuse"](**self.who(served), scores=scores, **self.what())
        return {name: value.numpy() for name, value in answer.items()}

    def test_a_member_says_what_the_core_hears(self, served: Served) -> None:
        """NaN exactly where it is silent: on cold items, and to somebody of whom a personal member knows nothing."""
        scores, mask = served.core.members(self.histories(served))
        said = self.said(served)
        np.testing.assert_allclose(said, np.where(mask, scores, np.nan), rtol=1e-5)
        assert np.isnan(said[-1, 1]).all() and not np.isnan(said[:-1, 1]).all(axis=1).any()

    def test_fused_they_are_the_recommendation(self, under: Served) -> None:
        """For every rule the same items, scores and contributions: what was seen or excluded stays away."""
        whole = under.module.recommend(**self.who(under), **self.what())
        found = self.fused(under, self.said(under))
        assert found.keys() == whole.keys() and (found["item_ids"] != b"").sum() > 60
        np.testing.assert_array_equal(found["item_ids"], whole["item_ids"])
        np.testing.assert_array_equal(found["known_user"], whole["known_user"])
        for name in ("scores", "contributions"):
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-5, atol=1e-6)

    def test_a_member_without_scores_is_left_out(self, under: Served) -> None:
        """For every rule: what it makes of the others where a mask silences the member."""
        rule, history = under.core.rule, self.histories(under)
        scores, mask = under.core.members(history)
        mask = mask & tf.constant([False, True])[None, :, None]
        expected = rule(scores, mask, under.core.members.context(history)).numpy()
        said = self.said(under)
        said[:, 0] = np.array([np.nan, np.inf, -np.inf, np.nan, np.nan])[:, None]
        found = self.fused(under, said)
        assert not found["contributions"][:, 0].any()
        for row, items in enumerate(found["item_ids"]):
            places = numbers(under, [item.decode() for item in items if item])
            np.testing.assert_allclose(found["scores"][row, : len(places)], expected[row, places], 1e-4, 1e-5)
            assert len(places) > (5 if row in (0, 1, 3) else -1)


class TestSimilarItems:
    def similar(self, served: Served, items: list[str], k: int = 6) -> list[list[str]]:
        answer = served.module.similar_items(tf.constant(items), tf.constant([k] * len(items)))
        assert answer["item_ids"].shape == answer["scores"].shape == (len(items), K_MAX)
        return [[item.decode() for item in row if item] for row in answer["item_ids"].numpy()]

    def test_by_the_personal_members_alone_and_never_itself(self, served: Served) -> None:
        warm = np.flatnonzero(served.core.members.speaks.numpy()[1])[:4]
        names = [str(served.item_ids[n]) for n in warm]
        for number, name, found in zip(warm, names, self.similar(served, names), strict=True):
            ease = served.core.members.scorers[1](tf.constant([[number]])).numpy()[0]
            ease[served.core.members.speaks.numpy()[1] == 0] = -np.inf
            ease[number] = -np.inf
            expected = [str(served.item_ids[n]) for n in np.argsort(-ease, kind="stable")[:6]]
            assert found == expected and name not in found

    def test_an_unknown_item_is_like_nothing(self, served: Served) -> None:
        assert self.similar(served, ["unknown", "a b"])[0] == []


class TestServingDefault:
    def test_equals_the_core(self, served: Served) -> None:
        histories, candidates = [["a b", "it's"], ["", ""]], [["ä ö 電", "it's", "unknown", "a b"]] * 2
        scores = served.module.score(tf.constant(histories), tf.constant(candidates))["scores"].numpy()
        assert scores.shape == (2, 4) and (scores[:, 2] == UNSCORED).all() and np.isfinite(scores).all()
        for row, history in enumerate((numbers(served, ["a b", "it's"]), [])):
            expected = served.fused(history)[numbers(served, ["ä ö 電", "it's", "a b"])]
            expected = np.where(np.isfinite(expected), expected, UNSCORED)
            np.testing.assert_allclose(scores[row, [0, 1, 3]], expected, rtol=1e-5, atol=1e-6)

    def test_what_nobody_speaks_about_is_the_lowest(self, served: Served) -> None:
        """JSON knows no infinity."""
        cold = np.flatnonzero(~(served.core.members.speaks.numpy() > 0).any(axis=0))
        names = [str(served.item_ids[n]) for n in cold]
        scores = served.module.score(tf.constant([["a b"]]), tf.constant([names]))["scores"].numpy()
        assert len(cold) and (scores == UNSCORED).all()
        assert not {n for row in served.items([""], [["a b"]], k=K_MAX) for n in row} & set(names)


def numbers(served: Served, ids: Sequence[str]) -> list[int]:
    order = served.item_ids.tolist()
    return [order.index(name) for name in ids]


# ---- the artifact --------------------------------------------------------------------------------------------


def settings(**export: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": {"kind": "planted", "users": 60, "items": 40, "noise": 0.2, "interactions_per_user": 10},
        "members": {
            "popularity": {"kind": "popularity"},
            "ease": {"kind": "ease", "l2": 5.0},
            "text": {"kind": "content", **TEXT},
        },
        "rules": {"average": {"kind": "average"}, "probability": {"kind": "probability"}},
        "out_of_fold": {"folds": 1},
        "evaluation": {"samples": 100, "metrics": ["ndcg@10"], "examples": 1},
        "export": {"k_max": 12, "tflite_history": 16, **export},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("runs")
    return run_experiment(parse_experiment(settings()), root, quiet=True)


@pytest.fixture(scope="module")
def predictor(run: Run) -> Predictor:
    return Predictor.load(artifact_of(run.folder))


@pytest.fixture(scope="module")
def in_memory(run: Run) -> tuple[RankingTask, RankingCore]:
    """The exported core, made again from the run's folder."""
    task = RankingTask(run)
    rule = json.loads(run.path("report.json").read_text())["best_rule"]
    return task, RankingCore(MemberScores(task.refitted()), task.rules[rule])


class TestArtifact:
    def test_what_is_in_the_folder(self, run: Run) -> None:
        """O1: manifest, signatures with names, dtypes and shapes, and what clients need beside the graph."""
        folder = artifact_of(run.folder)
        assert folder.parent.name == "tiny" and folder.name == "1"
        manifest = verify_manifest(folder)
        assert manifest.kind == "recommender" and manifest.members == ("popularity", "ease", "text")
        assert manifest.limits == {"k_max": 12} and manifest.rows_seen == "all"
        report = json.loads(run.path("report.json").read_text())
        assert manifest.split_hash == report["split"]["hash"] and manifest.data_hash == report["dataset"]["hash"]
        assert manifest.metrics["ndcg@10"] == report["rules"][report["best_rule"]]["ndcg@10"]["value"]
        asked = {"serving_default", "recommend", "similar_items", "embed_item_text", "search_text", "fuse"}
        assert set(manifest.signatures) == asked | {f"member_{name}" for name in manifest.members}
        inputs = {name: spec.dtype for name, spec in manifest.signatures["recommend"].inputs.items()}
        strings = dict.fromkeys(("user_id", "history", "exclude", "include"), "string")
        assert inputs == {**strings, "k": "int32"}
        outputs = manifest.signatures["recommend"].outputs
        assert {n: s.shape for n, s in outputs.items()} == {
            "item_ids": (None, 12), "scores": (None, 12), "contributions": (None, 3, 12), "known_user": (None,),
        }  # fmt: skip
        tables = {"items.parquet", "users.parquet", "report.html"}
        assert {"core.tflite", "saved_model.pb", *tables} <= set(manifest.files)
        told = manifest.items["vectors"]
        vectors = np.load(folder / told["file"])
        assert vectors.dtype == told["dtype"] and [*vectors.shape] == told["shape"] and told["made_of"] == "text"
        assert len(vectors) == pq.read_metadata(folder / "items.parquet").num_rows == 40

    def test_its_forms_were_compared(self, run: Run) -> None:
        checks = json.loads(run.path("verify.json").read_text())
        assert [check["what"] for check in checks] == ["Keras and TFLite", "Keras and SavedModel"]
        assert all(check["largest_difference"] <= check["tolerance"] and check["rows"] == 60 for check in checks)

    def test_all_forms_answer_alike(
        self, run: Run, in_memory: tuple[RankingTask, RankingCore], predictor: Predictor, tmp_path: Path
    ) -> None:
        """O1, O5: Keras = SavedModel = TFLite = predictor = batch job for the same rows."""
        task, core = in_memory
        data, (history, seen), folder = task.interactions, task.known(), artifact_of(run.folder)
        rows = history_rows(history, np.arange(len(data.user_ids)))
        keras_scores = core(tf.constant(rows)).numpy()
        finite = np.where(np.isfinite(keras_scores), keras_scores, UNSCORED)
        ids = data.item_ids.astype(object)
        texts = np.where(rows < 0, "", ids[np.maximum(rows, 0)])

        loaded = savedmodel.load(folder).signatures["serving_default"]
        every = np.broadcast_to(ids, (len(rows), len(ids)))
        saved = loaded(history=tf.constant(texts, tf.string), candidates=tf.constant(every, tf.string))["scores"]
        np.testing.assert_allclose(saved, finite, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(
            predictor.predict("serving_default", {"history": texts, "candidates": every})["scores"], saved
        )

        for row in range(0, len(rows), 7):
            given = np.full((1, 16), PADDING, np.int32)
            given[0, : (rows[row] >= 0).sum()] = rows[row][rows[row] >= 0]
            lite = tflite.run(folder / "core.tflite", {"history": given})
            np.testing.assert_allclose(lite["scores"][0], keras_scores[row], rtol=1e-3, atol=1e-3)
            explained = core.explained(tf.constant(given))[1].numpy()
            np.testing.assert_allclose(lite["contributions"], explained, rtol=1e-3, atol=1e-3)

        users = [str(user) for user in data.user_ids]
        answer = predictor.recommend(users, k=6)
        for row in range(len(users)):
            scores = keras_scores[row].copy()
            scores[seen.indices[seen.indptr[row] : seen.indptr[row + 1]]] = -np.inf
            order = np.argsort(-scores, kind="stable")[:6]
            assert [item.decode() for item in answer["item_ids"][row]] == ids[order].tolist()
            np.testing.assert_allclose(answer["scores"][row], scores[order], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(answer["contributions"].sum(axis=1), answer["scores"], rtol=1e-4, atol=1e-5)

        lists = Lists(predictor, folder, RecommendRequest(k=6))
        summary = recommend_all(lists, users, tmp_path / "all.parquet")
        table = pq.read_table(tmp_path / "all.parquet").to_pandas()
        assert summary.rows == len(table) == 6 * len(users)
        assert table["item_id"].tolist() == [item.decode() for item in answer["item_ids"].ravel()]
        np.testing.assert_array_equal(table["score"], answer["scores"].ravel())

    def test_the_tool_answers_from_the_run(
        self, run: Run, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """O16: `python tools/recommend.py RUN --history ID,ID --json`"""
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        tool, cli = importlib.import_module("recommend"), importlib.import_module("cli")
        arguments = ["recommend.py", str(run.folder), "--history", "i01,i02,i03", "-k", "4", "--json"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            cli.run(tool.main)
        assert end.value.code == 0
        found = json.loads(capsys.readouterr().out)["items"]
        expected = predictor.recommend(histories=[["i01", "i02", "i03"]], k=4)
        assert [row["item_id"] for row in found] == [item.decode() for item in expected["item_ids"][0]]
        assert found[0]["title"] == f"Item {found[0]['item_id'][1:]}"
        assert sum(found[0]["contributions"].values()) == pytest.approx(found[0]["score"], abs=1e-4)

    def test_the_encoder_is_a_signature(self, predictor: Predictor, in_memory: tuple[RankingTask, RankingCore]) -> None:
        """A new item is embedded by the artifact as the table of the others was."""
        task, _ = in_memory
        member = task.refitted()["text"]
        prepared = member.encoder.prepare(list(task.interactions.catalogue["text"][:5]))
        found = predictor.predict("embed_item_text", prepared)["embedding"]
        np.testing.assert_allclose(found, member.table[:5], rtol=1e-4, atol=1e-5)

    def test_a_server_can_warm_up(self, run: Run, predictor: Predictor) -> None:
        """O13: TensorFlow Serving's file: for each signature requests of real rows, which are all answered."""
        folder = artifact_of(run.folder)
        assert warmup.PLACE in predictor.manifest.files
        requests = list(warmup.read_warmup(folder))
        assert {name for name, _ in requests} == set(predictor.manifest.signatures) and len(requests) < 50
        for name in predictor.manifest.signatures:
            assert {len(next(iter(inputs.values()))) for asked, inputs in requests if asked == name} == {1, 8}
        for name, inputs in requests:
            answer = predictor.predict(name, inputs)
            if name in ("recommend", "fuse"):
                assert (answer["item_ids"][:, 0] != b"").all(), "real users, of whom something is known"
                np.testing.assert_array_equal(answer["known_user"], inputs["user_id"] != b"")

    def test_members_can_be_asked_apart(self, predictor: Predictor) -> None:
        """As in memory; the artifact's members stand in the order of the manifest."""
        who = {"user_id": ["u01", "", ""], "history": [["i01", "i02"], ["i03", ""], ["", ""]]}
        said = [predictor.predict(f"member_{name}", who)["scores"] for name in predictor.members]
        what = {"k": [12] * 3, "exclude": [[""]] * 3, "include": [[""]] * 3}
        fused = predictor.predict("fuse", {**who, "scores": np.stack(said, axis=1), **what})
        whole = predictor.predict("recommend", {**who, **what})
        np.testing.assert_array_equal(fused["item_ids"], whole["item_ids"])
        np.testing.assert_allclose(fused["contributions"], whole["contributions"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["core.tflite", "saved_model.pb", "items.parquet", "manifest.json"])
    def test_a_tampered_file_is_refused(self, run: Run, tmp_path: Path, name: str) -> None:
        shutil.copytree(artifact_of(run.folder), tmp_path / "1")
        changed = bytearray((tmp_path / "1" / name).read_bytes())
        changed[len(changed) // 2] ^= 1
        (tmp_path / "1" / name).write_bytes(changed)
        with pytest.raises(GateError):
            savedmodel.load(tmp_path / "1")
        with pytest.raises(ArtifactRefused):
            Predictor.load(tmp_path / "1")


class TestRefit:
    def test_all_is_every_row(self, in_memory: tuple[RankingTask, RankingCore], predictor: Predictor) -> None:
        """What is exported was fitted on every positive row, knows all of them, and says so."""
        task, _ = in_memory
        data = task.interactions
        counts = np.bincount(data.items, minlength=data.shape[1])
        np.testing.assert_allclose(task.refitted()["popularity"].state()["scores"], np.log1p(counts), rtol=1e-6)
        trained = np.bincount(data.items[task.parts == TRAIN], minlength=data.shape[1])
        assert (trained < counts).any()
        np.testing.assert_allclose(task.fitted["popularity"].member.state()["scores"], np.log1p(trained), rtol=1e-6)
        assert task.known()[1].nnz == len(data.users) and predictor.manifest.rows_seen == "all"

    @pytest.mark.slow
    def test_none_is_what_was_evaluated(self, run: Run, tmp_path: Path) -> None:
        """`tools/export.py RUN --refit none` writes the next version, and leaves the first as it was."""
        shutil.copytree(run.folder.parent.parent, tmp_path / "runs", symlinks=True)
        folder = tmp_path / "runs" / run.folder.parent.name / run.folder.name
        other = Run.open(folder, quiet=True, export={"refit": "none", "rule": "average"})
        rerun(other, ["export"])
        newest = artifact_of(folder)
        assert newest.name == "2" and verify_manifest(newest).rows_seen == "train"
        assert verify_manifest(newest.parent / "1").rows_seen == "all"
        task = RankingTask(other)
        members = task.refitted()
        assert all(members[name] is task.fitted[name].member for name in members)
        history, seen = task.known()
        assert history.nnz == seen.nnz == len(task.parts), "every row is known when answering, fitted on or not"
        user = str(task.interactions.user_ids[0])
        scores = [Predictor.load(newest.parent / version).recommend([user], k=3)["scores"] for version in "12"]
        assert not np.allclose(*scores)


def test_a_run_without_an_artifact_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must have exported an artifact.*tools/export\.py"):
        artifact_of(tmp_path)
