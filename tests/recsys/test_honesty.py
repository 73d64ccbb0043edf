"""Honest ensembles: what is served when fusing does not pay, which members an artifact holds, alarms, and how members
differ (issue 4; rows A10, G8, H4, H7, H9)."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recsys
from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.export.manifest import verify_manifest
from fusion.files import load_arrays, save_arrays
from fusion.rules.average import Average
from fusion.rules.greedy import Greedy
from fusion.rules.probability import Probability
from recsys import controls, corruption, diversity, served
from recsys.classification_report import ClassificationEvaluation
from recsys.classification_task import ClassificationTask
from recsys.collaborative.base import PADDING
from recsys.controls import list_quality, out_of_fold, shuffled_labels
from recsys.core import MemberScores, RankingCore
from recsys.ensemble_study import joining_classes
from recsys.export import artifact_of
from recsys.fit_rows import FitRows
from recsys.growth import curve, joining_order
from recsys.metrics import RankedLists, parse_metric
from recsys.pipeline import TASKS, run_experiment
from recsys.ranking_report import RankingEvaluation
from recsys.ranking_task import RankingTask
from recsys.report_content import ReportExtras
from recsys.run import Run
from recsys.schema import TEST, VALIDATION
from recsys.settings import EvaluationSettings, parse_experiment
from recsys.summary import summary
from serving.predictor import Predictor

MEMBERS = ("popularity", "item_knn", "ease")
WEAK = {"kind": "average", "weights": {"popularity": 1.0, "item_knn": 0.0, "ease": 0.0}}

RANKING = {
    "name": "honest",
    "seed": 1,
    "data": {"kind": "planted", "users": 120, "items": 60, "noise": 0.1, "image_size": 8},
    "members": {"popularity": {"kind": "popularity"}, "item_knn": {"kind": "item_knn"}, "ease": {"kind": "ease"}},
    "rules": {
        "weak": WEAK,
    },
    "out_of_fold": {"folds": 1},
    "evaluation": {"samples": 100, "metrics": ["ndcg@10"], "examples": 1},
    "export": {"tflite": False, "k_max": 10},
}


def text_member(column: str) -> dict[str, Any]:
    training = {"epochs": 4, "batch_size": 64, "learning_rate": 0.05}
    return {"encoder": {"kind": "text_tfidf", "dimensions": 16}, "columns": [column], "training": training}


CLASSES = {
    "name": "honest_classes",
    "task": "classification",
    "seed": 1,
    "data": {"kind": "planted_classes", "examples": 400, "seed": 1},
    "split": {"strategy": "stratified", "validation": 0.3, "test": 0.3},
    "members": {"text": text_member("text"), "note": text_member("note")},
    "rules": {"average": {"kind": "average"}, "probability": {"kind": "probability"}},
    "evaluation": {"samples": 100, "examples": 0},
    "export": {"enabled": False},
}


def run_of(config: dict[str, Any], root: Path) -> Run:
    return run_experiment(parse_experiment(config), root, quiet=True)


def report_of(run: Run) -> dict[str, Any]:
    return json.loads(run.path("report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose only rule listens to popularity alone, and so falls behind the best member."""
    return run_of(RANKING, tmp_path_factory.mktemp("weak"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A learned rule over the same members; without clocks and page."""
    small = {"users": 100, "items": 40, "noise": 0.1, "image_size": 8}
    config = {**RANKING, "data": {**RANKING["data"], **small}, "rules": {"greedy": {"kind": "greedy"}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankingEvaluation, "_cost", lambda self: {})
        patch.setattr(RankingEvaluation, "extras", lambda self, report: ReportExtras("ndcg@10"))
        patch.setattr("recsys.ranking_report.write_report", lambda *_: None)
        return run_of({**config, "export": {"enabled": False}}, tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two hints, each wrong for three in ten."""
    return run_of(CLASSES, tmp_path_factory.mktemp("classes"))


# ---- never worse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "rule", "member", "never_worse", "expected"),
    [
        ("ndcg@10", [0.5, 0.7, np.nan], [0.4, 0.7, 0.9], True, "rule"),
        ("ndcg@10", [0.5, 0.6, 0.1], [0.4, 0.7, 0.1], True, "member"),  # a tie: the cheaper one
        ("ndcg@10", [0.5, 0.5], [0.4, 0.7], True, "member"),
        ("ndcg@10", [0.5, 0.5], [0.4, 0.7], False, "rule"),
        ("log_loss", [0.5, 0.5], [0.4, 0.7], True, "rule"),  # less is better
        ("rmse", 0.5, 0.4, True, "member"),  # one number by nature
        ("ndcg@10", [np.nan], [np.nan], True, "rule"),  # nothing was measured
    ],
)
def test_the_member_is_served_where_the_rule_is_not_better(
    metric: str, rule: Any, member: Any, never_worse: bool, expected: str
) -> None:
    """H4, H7: by the mean paired difference on validation."""
    values = {
        kind: {metric: np.array(v) if isinstance(v, list) else v} for kind, v in (("rule", rule), ("member", member))
    }
    settings = EvaluationSettings(never_worse=never_worse, samples=100)
    name, found = served.choose({"rule": "rule", "member": "member"}, values, parse_metric(metric), settings, 0)
    assert name == expected and set(found) == {"difference", "low", "high", "n"}


class TestNeverWorse:
    def test_the_run_says_so(self, weak: Run) -> None:
        """H7: in the report, its warnings, the page, the model card and the terminal."""
        report = report_of(weak)
        assert report["best_rule"] == "weak" and report["best_member"] in ("item_knn", "ease")
        assert report["served"] == report["best_member"] and report["serving"]["kind"] == "member"
        assert report["serving"]["difference"]["difference"] < 0
        sentence = "The rule 'weak' does not beat the best member"
        assert sentence in summary(report, weak.folder)
        for name in ("report.html", "model_card.md"):
            text = weak.path(name).read_text(encoding="utf-8")
            assert sentence.replace("'", "&#39;") in text or sentence in text, name
        assert weak.path("report.html").read_text(encoding="utf-8").count("does not beat the best member") == 1

    def test_the_artifact_answers_as_the_member(self, weak: Run) -> None:
        """H7: known users get the member's own list, and visitors without a history the most popular items."""
        report, task = report_of(weak), RankingTask(weak)
        name = report["served"]
        folder = artifact_of(weak.folder)
        manifest = verify_manifest(folder)
        assert manifest.members == (name, "popularity")
        assert manifest.metrics["ndcg@10"] == report["members"][name]["ndcg@10"]["value"]
        predictor = Predictor.load(folder)
        users = [str(user) for user in task.interactions.user_ids[:20]]
        answer = predictor.recommend(users, k=5)
        history, seen = task.known()
        scorer = task.refitted([name])[name].scorer()
        for row, user in enumerate(users):
            known = history.indices[history.indptr[row] : history.indptr[row + 1]]
            scores = scorer(tf.constant(known[None], tf.int32)).numpy()[0]
            scores[seen.indices[seen.indptr[row] : seen.indptr[row + 1]]] = -np.inf
            order = np.argsort(-scores, kind="stable")[:5]
            assert [item.decode() for item in answer["item_ids"][row]] == list(task.interactions.item_ids[order]), user
        assert (answer["contributions"][:, 1] == 0).all(), "popularity adds nothing where the member speaks"
        visitor = predictor.recommend(histories=[[]], k=5)
        popular = np.argsort(-task.known()[0].getnnz(axis=0), kind="stable")[:5]
        assert [item.decode() for item in visitor["item_ids"][0]] == list(task.interactions.item_ids[popular])

    def test_tables_have_the_members_of_the_artifact(self, weak: Run) -> None:
        """The Python API and the tool name contributions after what was exported, not after the config."""
        name = report_of(weak)["served"]
        table = recsys.Recommender.load(weak.folder).similar_items(
            [str(RankingTask(weak).interactions.item_ids[3])], k=3
        )
        assert list(table.columns) == ["row", "rank", "item_id", "score", name, "popularity"]
        np.testing.assert_allclose(table["popularity"] + table[name], table["score"], atol=1e-5)

    def test_a_classifier_alone_is_calibrated_as_in_the_rules(self, classes: Run) -> None:
        task = ClassificationTask(classes)
        rule = task.rule_to_serve("note")
        assert rule.members == ("note",)
        logits, _ = task.part_logits(TEST)
        temperature = next(iter(task.rules.values())).state()["temperatures"][1]
        assert abs(temperature - 1.0) > 1e-3
        fused = rule.probabilities(rule(logits[:, 1:])).numpy()
        np.testing.assert_allclose(fused, tf.nn.softmax(logits[:, 1] / temperature, axis=1).numpy(), rtol=1e-5)
        evaluation = ClassificationEvaluation(task)
        evaluation.logits, evaluation.mask = task.part_logits(TEST)
        evaluation.context, evaluation.primary = {}, parse_metric("log_loss", "classes")
        labels = task.labels[task.rows(TEST)]
        found = evaluation._served_figures("note")["log_loss"]["value"]
        own = -np.log(fused[np.arange(len(labels)), labels]).mean()
        raw = report_of(classes)["members"]["note"]["log_loss"]["value"]
        assert found == pytest.approx(own, rel=1e-5) and abs(found - raw) > 1e-4
        assert np.mean(evaluation._alone(labels)["note"]) == pytest.approx(own, rel=1e-5), "as it is compared"


# ---- members that are not needed ----------------------------------------------------------------------------------


def greedy_over(members: tuple[str, ...], weights: list[float]) -> Greedy:
    rule = Greedy(Greedy.Config(), members, "candidates")
    rule.load_state({"weights": np.array(weights, np.float32)})
    return rule


class TestUnusedMembers:
    def test_they_are_neither_fitted_again_nor_served(self, weak: Run) -> None:
        """H9: of popularity, item_knn and ease the greedy rule uses ease; popularity stays, for visitors alone."""
        task = RankingTask(weak)
        task.__dict__["rules"] = {"greedy": greedy_over(MEMBERS, [0.0, 0.0, 1.0])}
        core, members = task.exported("greedy")
        assert list(members) == core.members.names == ["popularity", "ease"] == list(core.rule.members)
        whole = RankingCore(MemberScores(task.refitted()), task.rules["greedy"])
        history = tf.constant([[3, 5, 7], [2, 4, PADDING], [PADDING] * 3])
        fused, terms = core.explained(history)
        np.testing.assert_allclose(fused, whole(history), rtol=1e-5, atol=1e-5)
        assert (terms[:2, 0].numpy() == 0).all() and (terms[2, 1].numpy() == 0).all()
        popular = task.refitted(["popularity"])["popularity"].scorer()(history[2:]).numpy()[0]
        assert (np.argsort(-fused[2].numpy(), kind="stable") == np.argsort(-popular, kind="stable")).all()

    def test_what_that_saves_is_told(self, weak: Run) -> None:
        """H9: the run's output says bytes and milliseconds."""
        report = report_of(weak)
        found, cost = report["serving"], report["cost"]
        assert found["members"] == [report["served"], "popularity"] and found["backup"] == ["popularity"]
        assert {*found["left_out"], *found["members"]} == set(MEMBERS)
        assert found["bytes"] == sum(cost[name]["bytes"] for name in found["members"])
        assert found["bytes_of_all"] - found["bytes"] == sum(cost[name]["bytes"] for name in found["left_out"])
        text = summary(report, weak.folder)
        assert "The artifact holds 2 of 3 members" in text and "ms an answer" in text
        assert "'popularity' is kept for what the others cannot answer: visitors without a history." in text

    def test_nobody_is_kept_whom_no_answer_needs(self) -> None:
        """A rule without a fall-back has nothing for visitors, whoever is kept; one with popularity needs no other."""
        rule = Probability(
            Probability.Config(weights={"a": 1.0, "b": 0.0, "pop": 0.0}), ("a", "b", "pop"), "candidates"
        )
        assert served.rule_to_serve({"p": rule}, "p", "candidates", ["pop"]).members == ("a",)
        for weights, expected in (([1, 0, 0], ("a", "pop")), ([1, 1, 0], ("a", "b", "pop")), ([1, 0, 1], ("a", "pop"))):
            chosen = greedy_over(("a", "b", "pop"), weights)
            assert served.rule_to_serve({"g": chosen}, "g", "candidates", ["pop"]).members == expected
        assert served.rule_to_serve({"p": rule}, "pop", "candidates", ["pop"]).members == ("pop",)


# ---- how members differ ---------------------------------------------------------------------------------------------


def test_diversity_by_hand() -> None:
    """G8: Kuncheva & Whitaker (2003): of ten answers 4 both right, 2 and 1 one right, 3 both wrong."""
    x = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], bool)
    y = np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0], bool)
    heard = {"x": np.ones(10, bool), "y": np.ones(10, bool), "z": np.arange(10) < 5}
    found = diversity.pairs({"x": x, "y": y, "z": x}, heard)
    assert found[0]["members"] == ["x", "y"] and found[0]["n"] == 10
    assert found[0]["disagreement"] == pytest.approx(0.3)
    assert found[0]["q"] == pytest.approx((4 * 3 - 2 * 1) / (4 * 3 + 2 * 1))
    assert found[0]["correlation"] == pytest.approx(10 / np.sqrt(6 * 4 * 5 * 5))
    assert found[1]["n"] == 5 and found[1]["disagreement"] == 0.0
    assert found[1]["q"] is None and found[1]["correlation"] is None, "both always right: nothing to tell apart"


def test_diversity_of_lists_by_hand() -> None:
    """G8: two users; the first lists share one of two items, the second are the same."""
    indptr, relevant = np.array([0, 2, 3]), np.array([1, 2, 5])

    def lists(top: list[list[int]]) -> RankedLists:
        return RankedLists(np.array(top, np.int32), indptr, relevant, np.array([1, 2, 1]), np.array([9, 9]))

    values = {"a": np.array([0.1, 0.9]), "b": np.array([0.2, 0.4])}
    found = diversity.of_lists({"a": lists([[1, 3], [5, -1]]), "b": lists([[1, 2], [5, -1]])}, values, "ndcg@10")
    (pair,) = found["pairs"]
    assert pair["overlap@10"] == pytest.approx(0.75) and pair["ndcg@10_correlation"] == pytest.approx(1.0)
    assert pair["n"] == 3 and pair["disagreement"] == pytest.approx(1 / 3), "only b lists item 2"
    assert found["mean"]["overlap@10"] == pytest.approx(0.75)


def test_members_join_by_what_they_add() -> None:
    """H9: the second best member repeats the best one, and so joins last; costs add up."""
    labels = np.array([0, 0, 1, 1, 0, 1])
    right = {"best": [1, 1, 1, 1, 1, 0], "again": [1, 1, 1, 1, 0, 0], "other": [1, 0, 0, 0, 1, 1]}
    sure = {"best": 0.9, "again": 0.9, "other": 0.99}

    def answers(name: str) -> np.ndarray:
        p = np.where(np.array(right[name], bool), sure[name], 1 - sure[name])
        return np.where(np.arange(2) == labels[:, None], p[:, None], 1 - p[:, None])

    heard = {name: np.ones(6, bool) for name in right}
    metric = parse_metric("log_loss", "classes")
    order, joined = joining_classes({name: answers(name) for name in right}, heard, labels, metric)
    assert order[0] == "best" and len(joined) == 3
    by_hand = metric.of_classes(labels, (answers(order[0]) + answers(order[1])) / 2)
    np.testing.assert_allclose(joined[1], by_hand)
    found = curve(order, joined, metric, {name: {"p50_ms": 2.0} for name in right}, 100, 0)
    assert [step["p50_ms"] for step in found["steps"]] == [2.0, 4.0, 6.0] and found["steps"][0]["joins"] == "best"
    assert joining_order(["a", "b"], lambda chosen: 0.0) == ["a", "b"], "ties go to the first"


@pytest.mark.parametrize("which", ["weak", "classes"])
def test_the_report_shows_how_members_differ(which: str, request: pytest.FixtureRequest) -> None:
    """G8, H9: pairs, curve and their charts, for rankings and classes; the first point is the best member alone."""
    run: Run = request.getfixturevalue(which)
    report, members = report_of(run), list(run.experiment.members)
    pairs = report["diversity"]["pairs"]
    assert len(pairs) == len(members) * (len(members) - 1) // 2
    assert all(0 <= pair["disagreement"] <= 1 and -1 <= pair["correlation"] <= 1 for pair in pairs)
    steps, metric = report["curve"]["steps"], report["primary_metric"]
    assert sorted(step["joins"] for step in steps) == sorted(members) and [s["members"] for s in steps] == [
        *range(1, len(members) + 1)
    ]
    first = report["validation"]["members"][steps[0]["joins"]][metric]["value"]
    assert steps[0]["value"] == pytest.approx(first)
    assert steps[-1]["p50_ms"] == pytest.approx(sum(report["cost"][name]["p50_ms"] for name in members), abs=0.01)
    for name in ("diversity", "curve"):
        assert run.path("plots", f"{name}.png").stat().st_size > 5000
    page = run.path("report.html").read_text(encoding="utf-8")
    assert "How members differ" in page and "How many members" in page
    assert ("No leak was found" in page) == (which == "classes"), "the other run has nothing that learns"


# ---- alarms ---------------------------------------------------------------------------------------------------------


class Memorises:
    """A rule that knows every row it was fitted on by heart, and says the nearest one's label."""

    def fit(
        self, features: np.ndarray, mask: Any, labels: np.ndarray, weights: Any, context: Any, *, seed: int
    ) -> None:
        self.features, self.labels = features.reshape(len(features), -1), labels

    def __call__(self, features: Any, mask: Any, context: Any) -> Any:
        asked = np.asarray(features).reshape(len(features), -1)
        nearest = np.square(asked[:, None] - self.features[None]).sum(axis=2).argmin(axis=1)
        return tf.one_hot(self.labels[nearest], 3)


def rows_of(n: int = 300) -> FitRows:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, n)
    logits = (np.eye(3)[labels][:, None] * 2 + random.normal(size=(n, 2, 3))).astype(np.float32)
    return FitRows(logits, np.ones((n, 2), bool), labels, np.ones(n), {})


def lists_of(n: int = 300) -> FitRows:
    random = np.random.default_rng(0)
    labels = random.random((n, 30)) < 0.1
    scores = (labels[:, None] + random.normal(size=(n, 2, 30))).astype(np.float32)
    return FitRows(scores, np.ones(scores.shape, bool), labels, np.ones(labels.shape, np.float32), {})


def test_honest_rules_ring_no_alarm() -> None:
    """H4, H5: fitted on shuffled labels, rules are at chance on other shuffled rows, however good the members are."""
    for over, rows in (("classes", rows_of()), ("candidates", lists_of())):
        for kind in (Probability, Greedy):
            found = shuffled_labels(lambda kind=kind, over=over: kind(kind.Config(), ("a", "b"), over), rows, 1)
            assert abs(found["z"]) < 4 and not found["alarm"] and found["n"] > 100, (over, kind)
    assert not shuffled_labels(Memorises, rows_of(), 1)["alarm"], "knowing rows by heart is no leak"
    assert shuffled_labels(Memorises, rows_of(30), 1) == {}, "too few rows to say anything"


def test_a_rule_that_is_judged_on_what_it_was_fitted_on_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """H4: the planted fault: the halves are not apart, so the memorising rule foretells shuffled labels."""
    monkeypatch.setattr(FitRows, "at", lambda self, rows: replace(self))
    found = shuffled_labels(Memorises, rows_of(), 1)
    assert found["alarm"] and found["value"] > 0.9 and found["chance"] < 0.5
    report = {"controls": controls.controls({"knn": {"shuffled_labels": found}}, {})}
    assert "Alarm: the rule 'knn', fitted on shuffled labels" in next(controls.alarms(report))


def test_list_quality_by_hand() -> None:
    """The taken one stands above one of two others, the lower of which counts three times; silence is not judged."""
    features = np.array([[[2.0, 3.0, 1.0, np.nan], [1.0, 1.0, 1.0, 1.0]]])
    labels, weights = np.array([[True, False, False, True]]), np.array([[1.0, 1.0, 3.0, 1.0]])
    mask = np.ones((1, 2, 4), bool)
    np.testing.assert_allclose(list_quality(features, mask, labels, weights), [[0.75, 0.5]])
    assert np.isnan(list_quality(features, mask & ~labels[:, None], labels, weights)).all()


def test_a_member_that_saw_the_labels_rings(classes: Run, learned: Run) -> None:
    """H4, H5: honest runs have no alarm; scores that hold the labels of their rows have, in the report and its page."""
    for run, rules in ((classes, {"probability"}), (learned, {"greedy"})):
        found = report_of(run)["controls"]
        assert set(found["shuffled_labels"]) == rules and set(found["out_of_fold"]) == set(run.experiment.members)
        assert not list(controls.alarms(report_of(run)))
    lists = RankingEvaluation(RankingTask(learned))._lists(
        RankingEvaluation(RankingTask(learned))._question(VALIDATION)
    )
    seen = list_quality(np.where(lists.labels, 1.0, 0.0)[:, None], lists.mask[:, :1], lists.labels, lists.weights)
    held_out = list_quality(lists.features, lists.mask, lists.labels, lists.weights)
    assert out_of_fold({"ease": seen[:, 0]}, {"ease": held_out[:, 2]})["ease"]["alarm"], (
        "a ranking that knows what is taken"
    )
    path, task = classes.path("out_of_fold", "logits.npz"), ClassificationTask(classes)
    honest = load_arrays(path)
    labels = task.labels[task.rows(0)]
    leaked = honest["logits"].copy()
    leaked[:, 1] = np.eye(len(task.classes), dtype=np.float32)[labels] * 5
    save_arrays(path, {**honest, "logits": leaked})
    evaluation = ClassificationEvaluation(ClassificationTask(classes))
    report = evaluation.report()
    save_arrays(path, honest)
    found = report["controls"]["out_of_fold"]
    assert found["note"]["alarm"] and not found["text"]["alarm"]
    for told in (summary(report, classes.folder), *evaluation.extras(report).warnings[:1]):
        assert "Alarm: the member 'note' is better on the rows that it scored out of fold" in told
    assert out_of_fold({"m": np.full(200, 0.6)}, {"m": np.full(200, 0.55)})["m"]["alarm"] is False, "within the margin"


# ---- corruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["weak", "classes"])
def test_a_corrupted_member_costs_less_than_it_loses(which: str, request: pytest.FixtureRequest) -> None:
    """A10: NaN and a missing member are silence; noise costs the rule less than the member; who spoke is said."""
    run: Run = request.getfixturevalue(which)
    task, report = TASKS[run.experiment.task](run), report_of(run)
    member = list(run.experiment.members)[-1]
    task.__dict__["rules"] = {"equal": Average(Average.Config(), list(run.experiment.members), task.OVER)}
    report |= {"best_rule": "equal"}
    found = {how: corruption.corrupt(task, report, member, how) for how in ("noise", "nan", "missing")}
    for how in ("nan", "missing"):
        silent = found[how]
        assert silent["spoke"][member] == 0.0 and max(silent["spoke"].values()) == 1.0
        assert silent["loss"] == pytest.approx(silent["drop_one"])
        assert silent["corrupted"] == silent["without"]
    noise = found["noise"]
    assert noise["spoke"][member] == 1.0 and noise["own_loss"]["low"] > 0
    assert noise["own"] == pytest.approx(report["members"][member][noise["metric"]]["value"])
    assert noise["loss"]["difference"] < noise["own_loss"]["difference"]
    assert "who spoke" in corruption.told(noise) and "The rule loses less" in corruption.told(noise)
    with pytest.raises(ConfigError, match="did you mean"):
        corruption.corrupt(task, report, member[:-1], "nan")


def test_a_guard_does_not_listen_to_noise(weak: Run) -> None:
    """A10: on real rankings of the planted world the member is silent for nearly everybody, and the report says so."""
    task, report = TASKS[weak.experiment.task](weak), report_of(weak) | {"best_rule": "equal"}
    members = list(weak.experiment.members)
    plain, guarded = (Average(Average.Config(guard=guard), members, task.OVER) for guard in (False, True))
    guarded.load_state({"guard": np.full(len(members), 0.8, np.float32)})
    found = {}
    for name, rule in (("plain", plain), ("guarded", guarded)):
        task.__dict__["rules"] = {"equal": rule}
        found[name] = corruption.corrupt(task, report, "ease", "noise")
    assert found["plain"]["spoke"]["ease"] == 1.0 and found["guarded"]["spoke"]["ease"] < 0.3
    assert found["guarded"]["loss"]["difference"] < found["plain"]["loss"]["difference"]


def test_noise_is_the_members_own_scores_dealt_anew() -> None:
    """Only where it speaks, only of this member, and the same for the same seed."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(4, 3, 50)).astype(np.float32)
    mask = random.random((4, 3, 50)) < 0.7
    noise = corruption.Corruption(1, "noise", 3)
    spoilt, heard = (part.numpy() for part in noise(tf.constant(scores), tf.constant(mask)))
    np.testing.assert_array_equal(heard, mask)
    np.testing.assert_array_equal(spoilt[:, [0, 2]], scores[:, [0, 2]])
    for row in range(4):
        np.testing.assert_array_equal(np.sort(spoilt[row, 1][mask[row, 1]]), np.sort(scores[row, 1][mask[row, 1]]))
        assert abs(np.corrcoef(spoilt[row, 1][mask[row, 1]], scores[row, 1][mask[row, 1]])[0, 1]) < 0.6
    np.testing.assert_array_equal(noise(tf.constant(scores), tf.constant(mask))[0], spoilt)


def test_the_tool_says_what_a_corrupted_member_costs(
    classes: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A10: `python tools/evaluate.py RUN --corrupt MEMBER --how missing`"""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    tool, cli = importlib.import_module("evaluate"), importlib.import_module("cli")
    arguments = ["evaluate.py", str(classes.folder), "--corrupt", "note", "--how", "missing", "--quiet"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.run(tool.main)
    assert end.value.code == 0 and "'note' alone" in capsys.readouterr().out
