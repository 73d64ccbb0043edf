"""Members of a ranking trained in one graph, by the gradient of their fused scores (G1)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.errors import ConfigError
from fusion.rules import RULES
from fusion.types import RunOptions
from recsys import ranking_task
from recsys.collaborative.base import TrainingData
from recsys.collaborative.pairs import Towers, in_batch_cross_entropy, in_batch_softmax
from recsys.core import MemberScores
from recsys.evaluation import Ranker
from recsys.joint import JointModel, JointTraining, train_jointly
from recsys.metrics import parse_metric
from recsys.ranking_task import RankingTask
from recsys.run import Run
from recsys.schema import TRAIN, VALIDATION
from recsys.settings import parse_experiment
from tiny_bert import write_tiny_bert
from worlds import World, member_part, ndcg, random_ndcg

TRAINING = {"epochs": 1, "batch_size": 64, "learning_rate": 0.02}
FACTORIZATION: dict[str, Any] = {"kind": "matrix_factorization", "factors": 8, "training": TRAINING}
TFIDF: dict[str, Any] = {
    "kind": "content",
    "encoder": {"kind": "text_tfidf", "dimensions": 16},
    "columns": ["text"],
    "dimensions": 16,
    "training": TRAINING,
}
TOWERS: dict[str, Any] = {"kind": "two_tower", "dimensions": 8, "hidden": [], "interests": 2, "training": TRAINING}
JOINT = JointTraining(mode="joint", epochs=5, batch_size=64)
TINY_WORDS = {"dragon": "red", "detective": "blue", "robot": "war", "wedding": "sea"}
"""The planted words in a tiny BERT's vocabulary."""


@pytest.fixture(scope="module")
def world() -> World:
    return World.planted(users=200, items=80)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_size=16, intermediate_size=16)
    return {
        "kind": "content",
        "encoder": {"kind": "text_bert", "init_from": str(folder), "max_tokens": 12, "fine_tune": 1, "dropout": 0.0},
        "columns": ["text"],
        "dimensions": 16,
        "dropout": 0.0,
        "training": TRAINING,
        "fine_tuning": {"training": {"learning_rate": 0.01}},
    }


def data_of(world: World, cache: Path) -> TrainingData:
    """The planted world with texts that a tiny BERT of random weights can tell apart."""
    data = world.training(cache)
    kinds = data.catalogue["text"].str.extract(f"({'|'.join(TINY_WORDS)})")[0].map(TINY_WORDS)
    return replace(data, catalogue=data.catalogue.assign(text=kinds))


def jointly(
    settings: dict[str, dict[str, Any]], joint: JointTraining, data: TrainingData, folder: Path
) -> tuple[dict[str, Any], Any, dict[str, float]]:
    members = {name: member_part(part).make(3) for name, part in settings.items()}
    history, weights = train_jointly(members, joint, data, RunOptions(5, folder, quiet=True))
    return members, history, weights


# ---- the loss ------------------------------------------------------------------------------------------------


def batch_of(targets: list[int]) -> dict[str, tf.Tensor]:
    probability = np.random.default_rng(1).uniform(0.01, 0.5, len(targets)).astype(np.float32)
    return {"target": tf.constant(targets), "probability": tf.constant(probability)}


def test_the_loss_of_scores_is_that_of_the_retrieval_task() -> None:
    """For products of vectors: the same numbers as TensorFlow Recommenders gives, two targets being one item."""
    random = np.random.default_rng(0)
    vectors = {side: tf.constant(random.normal(size=(5, 3)).astype(np.float32)) for side in ("user", "item")}
    batch = batch_of([4, 7, 4, 1, 0])
    theirs = in_batch_softmax(lambda inputs, training: vectors, temperature=0.5)(batch)
    ours = in_batch_cross_entropy(tf.matmul(vectors["user"], vectors["item"], transpose_b=True) / 0.5, batch)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def model_of(user: np.ndarray, item: np.ndarray) -> keras.Model:
    """Towers that look numbers up in two fixed tables."""
    numbers = {name: keras.Input((), dtype=tf.int32, name=name) for name in ("user", "target")}
    tables = {
        name: keras.layers.Embedding(*table.shape, weights=[table])
        for name, table in (("user", user), ("target", item))
    }
    return keras.Model(numbers, {"user": tables["user"](numbers["user"]), "item": tables["target"](numbers["target"])})


def test_fused_scores_are_the_rule_average_over_the_batch() -> None:
    """Against the rule itself, with items about which a member is silent, and sharpness and weights taken out."""
    random = np.random.default_rng(2)
    tables = [random.normal(size=(2, 6, 4)).astype(np.float32) for _ in range(3)]
    towers = {f"m{n}": Towers(model_of(*table), 0.1, [], lambda: None) for n, table in enumerate(tables)}
    speaks = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1]], bool)
    model = JointModel(towers, speaks, JointTraining(weights="learned"), seed=0)
    model.preference.assign(np.log([3.0, 2.0, 1.0]))
    targets = np.array([3, 0, 5, 1])
    batch = {"user": tf.constant([0, 1, 2, 3]), **batch_of(targets.tolist())}
    scores, known = model(batch)
    expected = [user[:4] @ item[targets].T / 0.1 for user, item in tables]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert model.weights_by_name() == pytest.approx({"m0": 1 / 2, "m1": 1 / 3, "m2": 1 / 6})
    average = RULES["average"](RULES["average"].Config(weights=model.weights_by_name()), list(towers), "candidates")
    mask = np.broadcast_to(speaks[:, targets], (4, 3, 4))
    stacked = tf.stack(scores, axis=1)
    by_rule = average.fuse(average.normalise(stacked, mask), mask)
    np.testing.assert_allclose(model.fuse(scores, known), 2.0 * by_rule.numpy(), atol=1e-4)


def test_a_silenced_member_leaves_another_to_speak() -> None:
    tables = np.random.default_rng(3).normal(size=(2, 5, 2)).astype(np.float32)
    towers = {name: Towers(model_of(*tables), 1.0, [], lambda: None) for name in ("one", "two")}
    model = JointModel(towers, np.ones((2, 5), bool), JointTraining(member_dropout=0.6), seed=0)
    heard = model._heard(tf.constant(1000), True).numpy()
    assert set(np.unique(heard)) == {0.0, 1.0} and heard.max(axis=1).min() == 1
    # Both silenced (0.36) is taken for both heard: .4² + .36
    assert heard.all(axis=1).mean() == pytest.approx(0.52, abs=0.05)
    assert model._heard(tf.constant(3), False).numpy().all()


# ---- training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world: World, bert: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("joint")
    settings = {"factorization": FACTORIZATION, "words": TFIDF, "text": bert}
    return jointly(settings, JOINT, data_of(world, folder / "cache"), folder)


def test_members_learn_together_and_each_alone_is_whole(world: World, trained: Any) -> None:
    """G1: one graph and one loss; each member answers by itself, is loaded from its state, and the fused answer is
    better than the best of them."""
    members, history, weights = trained
    asked = world.asked(among=world.counts > 0)
    losses = [row["train_loss"] for row in history.epochs]
    assert losses[-1] < losses[0]
    assert weights == pytest.approx(dict.fromkeys(members, 1 / 3))
    for name in ("factorization", "words"):
        assert ndcg(members[name], asked) > 1.5 * random_ndcg(asked, 0), name
    average = RULES["average"](RULES["average"].Config(), list(members), "candidates")
    lists = Ranker(MemberScores(members), {"average": average}, 10)(asked).lists
    figures = {
        n: float(np.nanmean(parse_metric("ndcg@10", "candidates").of_lists(found))) for n, found in lists.items()
    }
    assert figures["average"] > max(figures[name] for name in members), figures
    again = type(members["text"])(members["text"].config, 3)
    again.load_state(members["text"].state())
    history_of_two = tf.constant([[1, 4, 7], [2, -1, -1]])
    np.testing.assert_array_equal(again.scorer()(history_of_two), members["text"].scorer()(history_of_two))


def test_only_the_last_block_of_the_encoder_moves(bert: dict[str, Any], trained: Any) -> None:
    """E2, E3: what is frozen stays bit-identical; the table is what the encoder now says of the items."""
    text = trained[0]["text"]
    untouched = member_part(bert).make(3).encoder.encoder()
    moved = {
        layer.name.partition("_")[0]
        for layer in text.encoder.encoder().layers
        for old, new in zip(untouched.get_layer(layer.name).get_weights(), layer.get_weights(), strict=True)
        if not np.array_equal(old, new)
    }
    assert moved == {"layer1"}


def test_the_table_is_made_by_the_trained_encoder(world: World, trained: Any, tmp_path: Path) -> None:
    text, data = trained[0]["text"], data_of(world, tmp_path)
    vectors = text.encoder.encode(text.encoder.prepare(list(data.catalogue["text"])))
    np.testing.assert_allclose(text.table, vectors, atol=0.01)  # activations were kept as float16


def test_the_fused_loss_alone_moves_members(world: World, tmp_path: Path) -> None:
    """Without auxiliary losses members are trained by the fused scores, and weights are learned; twice the same."""
    settings = {"factorization": FACTORIZATION, "words": TFIDF}
    joint = JOINT.model_copy(update={"epochs": 2, "auxiliary": 0.0, "weights": "learned"})
    data = data_of(world, tmp_path / "cache")
    (members, _, weights), (again, _, _) = (jointly(settings, joint, data, tmp_path / run) for run in ("one", "two"))
    asked = world.asked(among=world.counts > 0)
    assert ndcg(members["words"], asked) > 1.5 * random_ndcg(asked, 0)
    assert sum(weights.values()) == pytest.approx(1) and weights["words"] != 0.5
    for name, array in members["words"].state().items():
        np.testing.assert_array_equal(array, again["words"].state()[name])


# ---- by one word of the config -------------------------------------------------------------------------------


def experiment(members: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "name": "planted",
        "seed": 1,
        "data": {"kind": "planted", "users": 60, "items": 40, "interactions_per_user": 10, "noise": 0.2},
        "members": members,
        "rules": {"average": {"kind": "average"}, "stacker": {"kind": "stacker"}},
        "training": training,
        "out_of_fold": {"folds": 1},
        "evaluation": {"samples": 100, "metrics": ["ndcg@10"], "examples": 0, "refit": True},
        "export": {"enabled": False},
    }


MEMBERS = {"popularity": {"kind": "popularity"}, "towers": TOWERS, "text": TFIDF}


def test_joint_and_separate_leave_the_same_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1: `mode` changes how members are trained and nothing after it; fits on other rows are joint as well, for the
    epochs that were best, and one training serves all that ask for its members."""
    trained: list[tuple[list[str], int, bool]] = []
    real = ranking_task.train_jointly

    def spied(members: Any, settings: Any, data: Any, options: Any) -> Any:
        trained.append((list(members), settings.epochs, data.validate is not None))
        return real(members, settings, data, options)

    monkeypatch.setattr(ranking_task, "train_jointly", spied)
    files, facts = {}, {}
    for mode in ("separate", "joint"):
        config = parse_experiment(experiment(MEMBERS, mode=mode, epochs=2, batch_size=64))
        task = RankingTask(Run.start(config, tmp_path / mode, quiet=True))
        task.data()
        task.train()
        folder = task.run.path("submodels")
        files[mode] = {path.relative_to(folder) for path in folder.rglob("*") if "events" not in path.name}
        facts = {name: json.loads((folder / name / "member.json").read_text()) for name in MEMBERS}
        assert ("joint_weights" in facts["text"]) == (mode == "joint") and "joint_weights" not in facts["popularity"]
    assert files["joint"] == files["separate"]
    assert set(task.member_scores.names) == set(MEMBERS)
    best = facts["text"]["history"]["best_epoch"] + 1
    assert facts["text"]["history"] == facts["towers"]["history"]
    assert set(task.test_members) == set(MEMBERS)  # fitted again, with the validation rows
    assert list(task._fit_again((TRAIN, VALIDATION), ["text"])) == ["text"]  # out of the cache, all of its group
    group = ["towers", "text"]
    assert trained == [(group, 2, True), (group, best, False)]


def test_what_cannot_be_trained_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two members .* received text"):
        parse_experiment(experiment({"popularity": {"kind": "popularity"}, "text": TFIDF}, mode="joint"))
    pairwise = {"bpr": {**FACTORIZATION, "loss": "bpr"}, "cosine": {**TFIDF, "scorer": "cosine"}}
    with pytest.raises(ConfigError, match="received none"):
        parse_experiment(experiment(pairwise, mode="joint"))
    assert parse_experiment(experiment(pairwise)).training.mode == "separate"
