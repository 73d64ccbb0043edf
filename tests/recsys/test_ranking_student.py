"""The student of a whole ranking ensemble, and the profile fast that it makes (M2, A8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.config import parse
from fusion.errors import ConfigError, DataError, GateError
from fusion.export.litert import run as run_tflite
from fusion.export.manifest import verify_manifest
from fusion.export.savedmodel import load
from fusion.files import write_atomically
from fusion.rules.average import Average
from fusion.training.trainer import TrainingSettings
from fusion.types import RunOptions, derive_seed
from recsys.benchmarks import measure_fast
from recsys.collaborative.base import Member
from recsys.collaborative.tables import pack
from recsys.compression import compress_run
from recsys.core import MemberScores, RankingCore
from recsys.evaluation import history_rows
from recsys.export import artifact_of
from recsys.fast_profile import SIGNATURE, fast_profile
from recsys.pipeline import run_experiment
from recsys.ranking_student import (
    RIDGE,
    Lessons,
    Student,
    StudentSettings,
    _held_out,
    check_smaller,
    distil,
    histories_of,
    lessons,
    user_vectors,
)
from recsys.ranking_task import RankingTask
from recsys.recipes import Recipe
from recsys.recommender import ServedRecommender
from recsys.run import Run
from recsys.schema import USER_ID
from recsys.settings import parse_experiment
from worlds import World, fitted

pytestmark = pytest.mark.usefixtures("short_clocks")

SMALL = {
    "factors": 8,
    "parts": 4,
    "shortlist": 20,
    "others": 20,
    "training": {"epochs": 10, "batch_size": 32, "learning_rate": 0.03, "patience": 3},
}
SETTINGS = parse(StudentSettings, SMALL)
CONFIG: dict[str, Any] = {
    "name": "planted",
    "seed": 1,
    "data": {"kind": "planted", "users": 120, "items": 60, "noise": 0.2, "seed": 1, "image_size": 8},
    "members": {"ease": {"kind": "ease", "l2": 20.0}, "item_knn": {"kind": "item_knn"}},
    "rules": {"average": {"kind": "average"}},
    "compress": {"quick": {"student": SMALL, "tables": {"bits": 8}, "max_drop": {"ndcg@10": 0.2}}},
    "evaluation": {"samples": 100, "metrics": ["ndcg@10"], "examples": 0, "never_worse": False},
    "export": {"enabled": False},
}
EXPORT = {"fast": "quick", "k_max": 20, "tflite": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[World, dict[str, Member], RankingCore]:
    """A planted world with cold items, and an ensemble whose text member speaks of those too."""
    folder, world = tmp_path_factory.mktemp("world"), World.planted()
    data = world.training(folder)
    text = {"kind": "content", "columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 16}}
    settings: dict[str, dict[str, Any]] = {
        "ease": {"kind": "ease", "l2": 20.0},
        "text": {**text, "scorer": "cosine"},
    }
    members = {name: fitted(part, data, folder / name) for name, part in settings.items()}
    rule = Average(Average.Config(), list(members), "candidates")
    return world, members, RankingCore(MemberScores(members), rule)


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory) -> tuple[Student, dict[str, Any]]:
    planted, _, core = world
    return distil(core, matrix_of(planted), SETTINGS, options(tmp_path_factory.mktemp("taught")))


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Run:
    return run_experiment(parse_experiment(CONFIG), tmp_path_factory.mktemp("ran"), quiet=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    config = {**CONFIG, "name": "served", "export": EXPORT}
    return artifact_of(run_experiment(parse_experiment(config), tmp_path_factory.mktemp("served"), quiet=True).folder)


def matrix_of(world: World) -> sparse.csr_matrix:
    return world.training(None).matrix  # type: ignore[arg-type]  # nothing is cached


def options(folder: Any) -> RunOptions:
    return RunOptions(3, folder, quiet=True)


def first(scores: np.ndarray, history: np.ndarray, among: np.ndarray, k: int = 10) -> list[set[int]]:
    """The k best unseen items of each row."""
    scores = np.where(among & np.isfinite(scores), scores, -np.inf)
    for row, items in zip(scores, history, strict=True):
        row[items[items >= 0]] = -np.inf
    return [set(row) for row in np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def agreement(scorer: Any, core: RankingCore, history: np.ndarray, among: np.ndarray, k: int = 10) -> float:
    ours = first(scorer(tf.constant(history)).numpy(), history, among, k)
    theirs = first(core(tf.constant(history)).numpy(), history, among, k)
    return float(np.mean([len(a & b) / k for a, b in zip(ours, theirs, strict=True)]))


class TestModel:
    def test_a_user_is_the_sum_of_the_views(self):
        """By a slow loop: each view weighs by its own decay and is divided by the length of its weights."""
        random = np.random.default_rng(0)
        table, history = random.normal(size=(6, 4)).astype(np.float32), np.array([[2, 5, -1], [-1, -1, -1], [0, 1, 3]])
        expected = np.zeros((3, 2), np.float32)
        for row, items in zip(expected, history, strict=True):
            items = items[items >= 0]
            for view, decay in enumerate((1.0, 0.5)):
                weights = decay ** np.arange(len(items))[::-1]
                vectors = table[items, 2 * view : 2 * view + 2]
                row += weights @ vectors / max(np.linalg.norm(weights), 1e-3)
        rows = tf.gather(table, np.maximum(history, 0))
        found = user_vectors(rows, tf.constant(history, tf.int32), (1.0, 0.5))
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_a_student_is_read_back_and_can_be_packed(self, taught, tmp_path):
        student, _ = taught
        student.save(tmp_path / "student.npz")
        again, history = Student.load(tmp_path / "student.npz").scorer(), tf.constant([[1, 2, -1]])
        expected = student.scorer()(history).numpy()
        np.testing.assert_array_equal(again(history), expected)
        pack(again, 8)
        assert 0 < np.abs(again(history).numpy() - expected).max() < 0.05 * np.ptp(expected)


class TestLessons:
    def test_histories_are_parts_in_their_order(self, world):
        """The whole one of each user first, then parts of it; some are nobody's and empty."""
        matrix = matrix_of(world[0])
        history, users = histories_of(matrix, SETTINGS, seed=1)
        lengths = np.diff(history.indptr)
        assert (lengths[users < 0] == 0).all() and (users < 0).any()
        for user in np.unique(users[users >= 0]):
            whole = list(matrix.indices[matrix.indptr[user] : matrix.indptr[user + 1]])
            own = [
                list(history.indices[history.indptr[n] : history.indptr[n + 1]]) for n in np.flatnonzero(users == user)
            ]
            assert own[0] == whole and len(own) == 1 + SETTINGS.parts
            for part in own:
                places = [whole.index(item) for item in part]
                assert places == sorted(places)
        few, _ = histories_of(matrix, SETTINGS.model_copy(update={"histories": 50}), seed=1)
        assert few.shape[0] == 52

    def test_the_list_is_the_teachers(self, world, tmp_path):
        """First the best unseen items, by a slow sort; others are not among them, and nothing that the user has."""
        planted, _, core = world
        found = lessons(core, matrix_of(planted), SETTINGS, options(tmp_path))
        rows = np.flatnonzero(found.users >= 0)[:20]
        history = history_rows(found.history, rows)
        said = core(tf.constant(history)).numpy()
        for row, items, scores, taken, all_said in zip(
            rows, found.items[rows], found.scores[rows], history, said, strict=True
        ):
            best = first(all_said[None], taken[None], np.ones(len(all_said), bool), SETTINGS.shortlist)[0]
            assert set(items[: SETTINGS.shortlist]) == best, row
            heard = ~np.isnan(scores)
            assert not set(items[heard]) & set(taken) and not set(items[SETTINGS.shortlist :][heard[20:]]) & best
            expected = (all_said - all_said.mean()) / all_said.std()
            np.testing.assert_allclose(scores[heard], expected[items[heard]], atol=1e-4)

    def test_answers_are_kept_for_a_training_that_was_interrupted(self, world, tmp_path):
        """The ensemble is not asked again."""
        planted, _, core = world
        before = lessons(core, matrix_of(planted), SETTINGS, options(tmp_path))

        def nobody(history: tf.Tensor) -> tf.Tensor:
            raise AssertionError("asked again")

        again = lessons(nobody, matrix_of(planted), SETTINGS, options(tmp_path))  # type: ignore[arg-type]
        assert isinstance(again, Lessons)
        np.testing.assert_array_equal(again.scores, before.scores)

    def test_nothing_to_learn_from_is_refused(self):
        with pytest.raises(DataError, match="must have histories to learn from"):
            histories_of(sparse.csr_matrix((3, 4), dtype=np.float32), SETTINGS, 0)


class TestLearning:
    def test_it_answers_as_the_ensemble_does(self, world, taught):
        """M2: list-wise from the ensemble, it agrees on most of the first ten for users' whole histories."""
        planted, _, core = world
        student, facts = taught
        history = history_rows(planted.asked().history, planted.asked().users)
        every = np.ones(core.members.items, bool)
        assert agreement(student.scorer(), core, history, every) > 0.6
        assert 0.5 < facts["agreement"] <= 1.0 and facts["parameters"] == student.parameters

    def test_cold_items_are_ranked_as_the_ensemble_ranks_them(self, world, taught):
        """No one took them in training: among them alone it agrees far beyond chance, and a history of them counts."""
        planted, _, core = world
        scorer = taught[0].scorer()
        cold = planted.counts == 0
        assert cold.sum() > 6
        history = history_rows(planted.asked().history, planted.asked().users)
        chance = 3 / cold.sum()
        assert agreement(scorer, core, history, cold, k=3) > 1.5 * chance
        one, other = (scorer(tf.constant([[item]])).numpy() for item in np.flatnonzero(cold)[:2])
        assert np.abs(one - other).max() > 1e-3

    def test_it_is_the_same_again(self, world, tmp_path):
        """The seed decides everything."""
        planted, _, core = world
        training = TrainingSettings(epochs=1, batch_size=32, learning_rate=0.03)
        settings = SETTINGS.model_copy(update={"training": training, "parts": 1})
        one, two = (distil(core, matrix_of(planted), settings, options(tmp_path / name)) for name in "ab")
        np.testing.assert_array_equal(one[0].item, two[0].item)
        assert one[1] == two[1]

    def test_all_users_learn_where_none_is_held_out(self, world, tmp_path):
        """As for the artifact: so many epochs as were best, and nothing to stop by."""
        planted, _, core = world
        training = TrainingSettings(epochs=1, batch_size=32, learning_rate=0.03)
        settings = SETTINGS.model_copy(update={"held_out": 0.0, "training": training, "parts": 1})
        _, facts = distil(core, matrix_of(planted), settings, options(tmp_path))
        assert facts["epochs"] == 1 and "agreement" not in facts

    def test_items_of_held_out_users_alone_follow_from_their_own_vectors(self, world, tmp_path):
        """By the ridge of what was learned: no history of theirs was, so that theirs are as random as they began."""
        planted, _, core = world
        training = TrainingSettings(epochs=1, batch_size=32, learning_rate=0.03)
        settings = SETTINGS.model_copy(update={"held_out": 0.5, "training": training, "parts": 0})
        matrix = matrix_of(planted)
        users = np.flatnonzero(np.diff(matrix.indptr))
        chosen = _held_out(users, settings, derive_seed(options(tmp_path).seed, "held out"))
        held = np.isin(np.arange(matrix.shape[0]), users[chosen])
        only = np.flatnonzero(planted.counts)[:3]
        keep = sparse.csr_matrix(held[:, None] | ~np.isin(np.arange(matrix.shape[1]), only)[None])
        matrix = sparse.csr_matrix(matrix.multiply(keep))
        assert np.array_equal(np.flatnonzero(np.diff(matrix.indptr)), users), "others would be held out"
        student, _ = distil(core, matrix, settings, options(tmp_path))
        known = matrix[~held].getnnz(axis=0) > 0
        assert matrix[held][:, only].nnz and not known[only].any()
        vectors = student.item[known]
        gram = vectors.T @ vectors
        gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        follows = np.linalg.solve(gram, vectors.T @ student.history[known])
        np.testing.assert_allclose(student.history[only], student.item[only] @ follows, atol=1e-4)

    def test_a_student_as_large_as_its_teacher_is_refused(self, world):
        """One sentence with both sizes."""
        _, members, _ = world
        with pytest.raises(ConfigError, match=r"fewer numbers than the ensemble .* it has [\d,]+, the ensemble [\d,]+"):
            check_smaller(SETTINGS.model_copy(update={"factors": 2000}), 80, members.values())
        check_smaller(SETTINGS.model_copy(update={"factors": 4}), 80, members.values())


class TestProfile:
    def test_a_recipe_makes_one_file_of_all_members(self, ran):
        """M2: the report says bytes, FLOPs, latency and the paired difference; the `.tflite` is what was measured."""
        report = json.loads(ran.path("compressed", "quick", "report.json").read_text())
        assert report["gate"] == {"ndcg@10": ""} and report["members"] == {}
        before, after = report["cost"]["before"], report["cost"]["after"]
        assert after["bytes"] < 0.8 * before["bytes"] and after["flops"] < before["flops"]
        assert {"low", "high", "difference"} <= report["differences"]["test"]["ndcg@10"].keys()
        assert report["student"]["histories"] > 100 and 0 < report["student"]["agreement"] <= 1
        path = ran.path("compressed", "quick", "core.tflite")
        assert path.stat().st_size == after["bytes"]
        scores = run_tflite(path, {"history": np.full((1, 32), -1, np.int32)})["scores"]
        assert scores.shape == (1, 60) and np.isfinite(scores).all()

    def test_a_broken_promise_leaves_the_artifact_without_it(self, ran):
        """K10: what loses more than was promised is not exported."""
        training = {"epochs": 1, "learning_rate": 1e-6}
        broken = parse(Recipe, {"student": {**SMALL, "training": training}, "max_drop": {"ndcg@10": 0}})
        with pytest.raises(GateError, match=r"recipe broken: ndcg@10 must not get worse by more than 0"):
            compress_run(ran, "broken", broken)

    def test_a_student_that_broke_its_promise_is_not_exported(self, ran):
        """K10: the export itself refuses, with what was lost, and learns nothing anew."""
        run = Run.open(ran.folder, quiet=True, export={"fast": "quick"})
        task, path = RankingTask(run), ran.path("compressed", "quick", "report.json")
        before = path.read_text()
        write_atomically(path, json.dumps({**json.loads(before), "gate": {"ndcg@10": "ndcg@10 must not get worse."}}))
        try:
            with pytest.raises(
                GateError, match=r"export\.fast: recipe quick: ndcg@10 must not get worse\. No artifact"
            ):
                fast_profile(task, "average", task.exported("average")[0])
        finally:
            write_atomically(path, before)

    def test_steps_for_a_member_without_network_are_refused(self, ran):
        """Named alone it would look done: tables are packed all the same."""
        named = parse(Recipe, {"members": {"ease": [{"kind": "float16"}]}, "tables": {"bits": 8}})
        with pytest.raises(ConfigError, match="a member with a network; 'ease', which recipe named names, has none"):
            compress_run(ran, "named", named)

    def test_members_are_no_longer_made_smaller(self, ran):
        """`student: ease` is a classifier's, and one that is too large says so before anything is learned."""
        step = {"kind": "distil", "student": {"kind": "dense"}}
        with pytest.raises(ConfigError, match=r"must be settings such as \{factors: 64\}; received 'ease'"):
            compress_run(ran, "named", parse(Recipe, {"student": "ease", "members": {"ease": [step]}}))
        with pytest.raises(ConfigError, match="fewer numbers than the ensemble"):
            compress_run(ran, "large", parse(Recipe, {"student": {"factors": 2000}}))

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            (
                {"export": {"fast": "packed"}},
                "a ranking's recipe with settings of a student; received 'packed'",
            ),
            ({"export": {"recipe": "quick"}}, "'quick' replaces them by a student. Name it in export.fast"),
            ({"compress": {"quick": {"student": {"factor": 8}}}}, "unknown key .*factor.*did you mean 'factors'"),
            ({"compress": {"quick": {"student": {}, "steps": [{"kind": "int8"}]}}}, "must stand without steps"),
        ],
    )
    def test_bad_configs(self, changes, match):
        with pytest.raises(ConfigError, match=match):
            parse_experiment({**CONFIG, **changes})


class TestServed:
    def test_it_leaves_out_what_the_ensemble_leaves_out(self, world, taught):
        """A8: seen items, those of the request, excluded ones, and all that are not included; and who is unknown."""
        planted, _, core = world
        data, asked, scorer = planted.data, planted.asked(), taught[0].scorer()
        module = ServedRecommender(core, data.item_ids, data.user_ids, asked.history, asked.seen, 80, None, scorer)
        fast = module.recommend_fast
        user = int(asked.users[0])
        seen, items = set(asked.seen[user].indices), list(data.item_ids)
        free = [item for number, item in enumerate(items) if number not in seen]
        answer = ids_of(fast(**request(data.user_ids[user], [free[0]], [free[1]], k=80)))
        assert set(answer) == set(free[2:])
        assert set(ids_of(module.recommend(**request(data.user_ids[user], [free[0]], [free[1]], k=80)))) == set(
            free[2:]
        )
        few = ids_of(fast(**request(data.user_ids[user], include=[free[3], items[min(seen)]])))
        assert few == [free[3]]
        nobody = fast(**request("nobody", [free[0]], k=3))
        assert not nobody["known_user"].numpy()[0] and len(ids_of(nobody)) == 3
        np.testing.assert_array_equal(nobody["contributions"][:, 0], nobody["scores"])

    def test_its_scores_are_the_students(self, world, taught):
        """For a stored history with newer items behind it, where one that stands twice counts where it stands last."""
        planted, _, core = world
        data, asked = planted.data, planted.asked()
        scorer = taught[0].scorer()
        module = ServedRecommender(core, data.item_ids, data.user_ids, asked.history, asked.seen, 80, None, scorer)
        user = int(asked.users[0])
        stored = list(asked.history[user].indices)
        new = int(np.flatnonzero(planted.counts)[-1])
        history = [item for item in stored if item not in (stored[0], new)] + [stored[0], new]
        expected = scorer(tf.constant([history], tf.int32)).numpy()[0]
        given = [data.item_ids[stored[0]], data.item_ids[new]]
        before = scorer(tf.constant([stored], tf.int32)).numpy()[0]
        for brought, scores in ((given, expected), ([""], before)):
            found = module.recommend_fast(**request(data.user_ids[user], brought, k=5))
            places = [list(data.item_ids).index(item) for item in ids_of(found)]
            np.testing.assert_allclose(found["scores"].numpy()[0][: len(places)], scores[places], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
class TestArtifact:
    def test_it_is_exported_beside_the_ensemble(self, artifact):
        """A8: the manifest says what it is; it is taught once more by the members that are exported."""
        told = verify_manifest(artifact).profiles["fast"]
        assert told["signature"] == SIGNATURE and told["member"] == "student" and told["recipe"] == "quick"
        assert "ndcg@10" in told["figures"]
        signatures = load(artifact).signatures
        user = pq.read_table(artifact / "users.parquet")[USER_ID][0].as_py()
        fast, whole = (ids_of(signatures[name](**request(user))) for name in (SIGNATURE, "recommend"))
        assert len(fast) == len(whole) == 5 and set(fast) & set(whole)

    def test_how_fast_it_is_can_be_measured(self, artifact):
        """Ratios to the bare product and top-k, in turns."""
        found = measure_fast(artifact, rounds=3, users=5)
        assert found["times_the_bare_one"].keys() == {SIGNATURE, "recommend"}
        assert found["settings"] == {"items": 60, "dimensions": 8, "k": 20, "rounds": 3}
        assert all(value > 0 for value in found["p50_ms"].values())


def ids_of(answer: dict[str, Any]) -> list[str]:
    """The ids of one row, without padding."""
    return [item.decode() for item in answer["item_ids"].numpy()[0] if item]


def request(user: str, history=("",), exclude=("",), include=("",), k: int = 5) -> dict[str, Any]:
    lists = {"history": history, "exclude": exclude, "include": include}
    return {
        "user_id": tf.constant([user]),
        "k": tf.constant([k]),
        **{name: tf.constant([list(ids)], tf.string) for name, ids in lists.items()},
    }
