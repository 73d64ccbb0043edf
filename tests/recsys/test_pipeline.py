"""Whole experiments on the planted worlds, from a config to a report: what is learned, and what must not be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion import images
from fusion.compat import tf
from fusion.config import Part
from fusion.errors import ConfigError, DataError
from fusion.training.member import ClassifierMember
from recsys.classification_task import ClassificationTask
from recsys.collaborative.base import Member
from recsys.datasets.planted import PlantedClasses, write_folder
from recsys.evaluation import question
from recsys.export import artifact_of
from recsys.pipeline import TASKS, rerun, run_experiment
from recsys.ranking_report import RankingEvaluation
from recsys.ranking_task import RankingTask
from recsys.report_content import ReportExtras
from recsys.run import Run
from recsys.schema import LABEL, TEST, TRAIN
from recsys.settings import parse_experiment
from serving.predictor import Predictor
from worlds import random_ndcg

TOWERS = {"epochs": 8, "batch_size": 256, "learning_rate": 0.02}
TEXT = {
    "kind": "content",
    "columns": ["text"],
    "encoder": {"kind": "text_tfidf", "dimensions": 16},
    "dimensions": 16,
    "training": TOWERS,
}
IMAGE = {
    "kind": "content",
    "encoder": {"kind": "image_efficientnet", "image_size": 32},
    "dimensions": 16,
    "training": TOWERS,
}
RULES = ("average", "vote", "probability", "stacker")
FIGURE = {"value", "low", "high", "n"}
COST = {"parameters", "bytes", "flops", "train_s", "p50_ms", "p95_ms"}
RANKING_COST = COST | {"users_per_s", "fit_peak_bytes"}
PACE = {"samples_per_s", "input_wait"}


def ranking(members: dict[str, Any], *, data: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {
        "name": "planted",
        "seed": 1,
        "data": {"kind": "planted", "users": 200, "items": 120, "noise": 0.2, "seed": 1, **(data or {})},
        "members": members,
        "rules": {name: {"kind": name} for name in RULES},
        "out_of_fold": {"folds": 1},
        "evaluation": {"samples": 100, "metrics": ["ndcg@10", "recall@20", "auc"], "examples": 1},
        "export": {"enabled": False},
        **settings,
    }


SMALL = {"users": 60, "items": 40, "interactions_per_user": 10}
TWO_RULES = {name: {"kind": name} for name in ("average", "stacker")}


def cheap(members: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Seconds: no towers, a small world."""
    three = {"popularity": {"kind": "popularity"}, "ease": {"kind": "ease", "l2": 10.0}, "ials": {"kind": "ials"}}
    return ranking(members or three, data=SMALL, rules=TWO_RULES, **settings)


@pytest.fixture(scope="module")
def figures_alone() -> Iterator[None]:
    """Leaves out of the evaluation what only the page shows, and the clocks: two thirds of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankingEvaluation, "_cost", lambda self: {})
        patch.setattr(RankingEvaluation, "extras", lambda self, report: ReportExtras("ndcg@10"))
        patch.setattr("recsys.ranking_report.write_report", lambda *_: None)
        yield


quick = pytest.mark.usefixtures("figures_alone")


def run_of(config: dict[str, Any], root: Path, **options: Any) -> Run:
    return run_experiment(parse_experiment(config), root, quiet=True, **options)


def report_of(run: Run) -> dict[str, Any]:
    return json.loads(run.path("report.json").read_text(encoding="utf-8"))


def values(figures: dict[str, Any], metric: str) -> dict[str, float]:
    return {name: by_metric[metric]["value"] for name, by_metric in figures.items()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three parts of taste, and one member that can see each of them."""
    members = {"popularity": {"kind": "popularity"}, "ease": {"kind": "ease", "l2": 20.0}, "text": TEXT, "image": IMAGE}
    return run_of(ranking(members), tmp_path_factory.mktemp("planted"))


class TestPlantedWorld:
    def test_collaborative_members_fail_on_cold_items_and_content_does_not(self, planted: Run) -> None:
        """D1m, D2m, D3m"""
        cold = values(report_of(planted)["segments"]["cold_items"]["members"], "ndcg@10")
        assert cold["popularity"] == 0.0 and cold["ease"] == 0.0
        assert cold["text"] > 0.25 and cold["image"] > 0.25

    def test_every_kind_of_taste_is_found(self, planted: Run) -> None:
        found = values(report_of(planted)["members"], "ndcg@10")
        task = RankingTask(planted)
        asked = question(task.interactions, task.parts, TEST)
        chance = max(random_ndcg(asked, seed) for seed in range(10))
        assert min(found["ease"], found["text"], found["image"]) > 1.5 * chance

    @pytest.mark.parametrize("rule", RULES)
    def test_fusing_beats_the_best_single_member(self, planted: Run, rule: str) -> None:
        """H1, H2, H3, H5: three members that each see a third of the taste are more than any of them."""
        report = report_of(planted)
        best = max(values(report["members"], "ndcg@10").values())
        assert values(report["rules"], "ndcg@10")[rule] > 1.1 * best

    def test_fusing_is_significant(self, planted: Run) -> None:
        """A6: paired bootstrap of the rule chosen on validation against the member chosen on validation."""
        report = report_of(planted)
        for what, chosen in (("members", report["best_member"]), ("rules", report["best_rule"])):
            found = values(report["validation"][what], "ndcg@10")
            assert found[chosen] == max(found.values())
        difference = report["significance"]["ndcg@10"]
        gain = report["rules"][report["best_rule"]]["ndcg@10"]["value"]
        gain -= report["members"][report["best_member"]]["ndcg@10"]["value"]
        assert 0 < difference["low"] <= difference["difference"] <= difference["high"]
        assert difference["difference"] == pytest.approx(gain, abs=1e-9)

    def test_learned_weights_go_to_who_knows(self, planted: Run) -> None:
        """H5: popularity, which sees no taste, gets the least."""
        for rule in ("probability", "stacker"):
            weights = json.loads(planted.path("rules", rule, "rule.json").read_text())["weights"]
            assert min(weights, key=weights.__getitem__) == "popularity"

    def test_the_report_has_its_fixed_form(self, planted: Run) -> None:
        """DESIGN: what stays fixed for everyone who reads it."""
        report = report_of(planted)
        members, rules = {"popularity", "ease", "text", "image"}, set(RULES)
        assert report["schema_version"] == 1 and {"name", "users", "items", "hash"} <= set(report["dataset"])
        assert {"name", "hash", "train", "validation", "test"} <= set(report["split"])
        assert sum(report["split"][part] for part in ("train", "validation", "test")) == 200 * 20
        assert report["best_member"] in members and report["best_rule"] in rules
        systems = [report, report["validation"], *report["segments"].values()]
        for place in systems:
            assert set(place["members"]) == members and set(place["rules"]) == rules
            for figures in (*place["members"].values(), *place["rules"].values()):
                assert set(figures) == {"ndcg@10", "recall@20", "auc"}
                assert all(set(figure) == FIGURE for figure in figures.values())
        for figures in report["members"].values():
            for figure in figures.values():
                assert figure["low"] <= figure["value"] <= figure["high"] and figure["n"] > 100
        assert set(report["significance"]) == {"ndcg@10", "recall@20", "auc"}
        assert all(set(d) == {"difference", "low", "high", "n"} for d in report["significance"].values())
        assert set(report["cost"]) == members | rules
        for name, cost in report["cost"].items():
            assert set(cost) == RANKING_COST | (PACE if name in ("text", "image") else set())
        assert report["variants"] == {} and {"warm_users", "cold_items"} <= set(report["segments"])
        assert all(cost["flops"] >= 0 and cost["bytes"] > 0 < cost["p50_ms"] for cost in report["cost"].values())

    def test_the_report_says_why_items_are_recommended(self, planted: Run) -> None:
        """A7: shares add up to the fused score, and the words of the trained text member to that member's."""
        (example,) = report_of(planted)["examples"]
        assert len(example["recommended"]) == 3 and any(why["words"] for why in example["recommended"])
        for why in example["recommended"]:
            assert sum(why["shares"].values()) + why["bias"] == pytest.approx(why["score"], abs=1e-4)
            assert why["liked"] and "popularity" not in why["liked_by_member"]
            for words in why["words"].values():
                assert sum(share for _, share in words["shares"]) == pytest.approx(words["score"], abs=1e-3)

    def test_training_tells_whether_it_waited_for_its_input(self, planted: Run) -> None:
        """F12: members that train by gradient, in the report and on the page."""
        costs = report_of(planted)["cost"]
        assert all(costs[name]["samples_per_s"] > 0 <= costs[name]["input_wait"] < 1 for name in ("text", "image"))
        page = planted.path("report.html").read_text(encoding="utf-8")
        assert f"{100 * costs['text']['input_wait']:.1f} %" in page and "rows/s, waiting" in page

    def test_the_folder_holds_what_each_stage_left(self, planted: Run) -> None:
        for path in (
            "config.yaml", "environment.json", "data/split.json", "data/cleaning.json", "submodels/text/state.npz",
            "rules/stacker/state.npz", "report.html", "model_card.md",
        ):  # fmt: skip
            assert planted.path(path).stat().st_size > 0, path
        assert not planted.path("export").exists()
        assert (planted.folder.parent / "latest").resolve() == planted.folder.resolve()
        assert planted.state["status"] == "finished" and list(planted.state["stages"]) == list(RankingTask.STAGES)


@quick
def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    """H5, negative control: all users draw alike, so no member and no rule may be better than chance."""
    members = {"popularity": {"kind": "popularity"}, "ease": {"kind": "ease", "l2": 20.0}, "text": TEXT}
    world = {"shuffle_labels": True, "cold_share": 0.0}
    run = run_of(ranking(members, data=world), tmp_path)
    report, task = report_of(run), RankingTask(run)
    asked = question(task.interactions, task.parts, TEST)
    by_chance = [random_ndcg(asked, seed) for seed in range(30)]
    # The lists of different users hold the same items, so a system scatters more widely than random lists do.
    limit = np.mean(by_chance) + 6 * np.std(by_chance)
    for name, value in {**values(report["members"], "ndcg@10"), **values(report["rules"], "ndcg@10")}.items():
        assert value < limit, name
    assert all(abs(value - 0.5) < 0.05 for value in values(report["rules"], "auc").values())


# ---- interruption, caches, repetition ------------------------------------------------------------------------


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Every fit of a member: its kind, and the rows that it saw."""
    from recsys.collaborative.ease import Ease
    from recsys.collaborative.ials import ImplicitALS
    from recsys.collaborative.popularity import Popularity

    seen: list[tuple[str, Any]] = []

    def spied(kind: type[Member]) -> Callable[..., Any]:
        original = kind.fit

        def fit(self: Member, data: Any, options: Any) -> Any:
            seen.append((kind.__name__, data.matrix))
            return original(self, data, options)

        return fit

    for kind in (Popularity, Ease, ImplicitALS):
        monkeypatch.setattr(kind, "fit", spied(kind))
    return seen


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, figures_alone: None) -> Run:
    return run_of(cheap(), tmp_path_factory.mktemp("uninterrupted"))


@quick
def test_an_interrupted_run_goes_on_and_ends_the_same(
    uninterrupted: Run, fits: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10: stopped in the middle of three stages, the same command finishes it, with the same figures."""
    from recsys.collaborative.ials import ImplicitALS

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    folders = []
    for where, what in ((ImplicitALS, "fit"), (RankingTask, "_out_of_fold_scores"), (RankingTask, "evaluate")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, fails)
            with pytest.raises(KeyboardInterrupt):
                run_of(cheap(), tmp_path)
        (folder,) = (path for path in (tmp_path / "planted").iterdir() if not path.is_symlink())
        folders.append(folder)
        assert not (folder / "report.json").exists(), "no half-written run that looks whole"
    run = run_of(cheap(), tmp_path)
    assert set(folders) == {run.folder}
    assert report_of(run) == report_of(uninterrupted)
    assert len(fits) == 3 + 3, "each member once on training and once on the fold, in all four attempts together"


@quick
def test_a_finished_run_is_not_continued_and_members_come_from_the_cache(
    uninterrupted: Run, fits: list[tuple[str, Any]]
) -> None:
    """G2: what a config, its rows and the code have already made is not made again."""
    root = uninterrupted.folder.parent.parent
    again = run_of(cheap(), root)
    assert again.folder != uninterrupted.folder and fits == []
    assert report_of(again) == report_of(uninterrupted)
    run_of(cheap({"ease": {"kind": "ease", "l2": 11.0}, "popularity": {"kind": "popularity"}}), root)
    assert [kind for kind, _ in fits] == ["Ease", "Ease"], "one setting of one member changed"


@quick
def test_the_same_seed_gives_the_same_figures_and_no_member_sees_what_it_is_asked(
    uninterrupted: Run, fits: list[tuple[str, Any]], tmp_path: Path
) -> None:
    """Two runs that share nothing agree to the last digit; before the report no fit holds a held-out row."""
    run = run_of(cheap(), tmp_path)
    assert report_of(run) == report_of(uninterrupted)
    task = RankingTask(run)
    trained = task.interactions.matrix(task.parts == TRAIN)
    assert len(fits) == 6
    for _, matrix in fits:
        assert matrix.multiply(trained).nnz == matrix.nnz <= trained.nnz
    other = run_of({**cheap(), "seed": 2}, tmp_path / "other")
    assert report_of(other)["rules"] != report_of(run)["rules"]


@quick
def test_stages_can_be_run_again_alone(uninterrupted: Run) -> None:
    before = report_of(uninterrupted)
    uninterrupted.path("report.json").unlink()
    rerun(uninterrupted, ["evaluate"])
    assert report_of(uninterrupted) == before


def test_a_stage_needs_the_earlier_ones(tmp_path: Path) -> None:
    run = Run.start(parse_experiment(cheap()), tmp_path, quiet=True)
    with pytest.raises(ConfigError, match="the stage evaluate needs what data leaves"):
        rerun(run, ["evaluate"])


@quick
def test_refitting_takes_as_many_epochs_as_were_best(tmp_path: Path) -> None:
    """Nothing can be validated on every row: the recipe is the one that validation chose."""
    members = {"text": {**TEXT, "training": {**TOWERS, "epochs": 4, "patience": 1}}}
    run = run_of(cheap(members), tmp_path)
    best = RankingTask(run).fitted["text"].history.best_epoch
    cached = [json.loads(path.read_text()) for path in (run.cache / "members").glob("*/member.json")]
    loops = sorted((fit["config"]["training"]["patience"], fit["config"]["training"]["epochs"]) for fit in cached)
    assert loops == [(0, best + 1), (1, 4)]


@quick
@pytest.mark.parametrize(
    "strategy",
    [
        "user_holdout",
        "item_holdout",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("leave_last_out", "temporal_per_user", "random")),
    ],
)
def test_every_split_goes_all_the_way(strategy: str, tmp_path: Path) -> None:
    """With item_holdout the candidates are the held-out items, which only content can tell apart."""
    members = {"ease": {"kind": "ease"}, "text": {**TEXT, "scorer": "cosine"}}
    config = cheap(members, split={"strategy": strategy, "validation": 0.2, "test": 0.2})
    report = report_of(run_of(config, tmp_path))
    found = values(report["members"], "ndcg@10")
    assert report["split"]["name"] == strategy and report["split"]["test_users"] > 5
    held_out = strategy == "item_holdout"
    assert report["split"]["candidates"] == ("held-out items" if held_out else "all unseen items")
    assert found["text"] > 0 and (found["ease"] == 0.0) == held_out
    assert ("cold_users" in report["segments"]) is False


# ---- classification ------------------------------------------------------------------------------------------


def classes(members: dict[str, Any], *, data: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {
        "name": "classes",
        "task": "classification",
        "seed": 1,
        "data": {"kind": "planted_classes", "examples": 600, "seed": 1, **(data or {})},
        "split": {"strategy": "stratified", "validation": 0.2, "test": 0.3},
        "members": members,
        "rules": {name: {"kind": name} for name in RULES},
        "evaluation": {"samples": 100, "examples": 0},
        **settings,
    }


def text_member(column: str, epochs: int = 10) -> dict[str, Any]:
    training = {"epochs": epochs, "batch_size": 64, "learning_rate": 0.05, "patience": 3}
    return {"encoder": {"kind": "text_tfidf", "dimensions": 16}, "columns": [column], "training": training}


def test_images_are_decoded_once_for_all_members_folds_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F12: cleaning drops an example and a broken image, and nothing is decoded again for that."""
    tables = PlantedClasses.read(PlantedClasses.Config(examples=41))
    tables.items.loc[3, LABEL] = ""
    write_folder(tables, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "images").iterdir())[7]
    broken.write_bytes(broken.read_bytes()[:60])
    decoded: list[str] = []
    read = images._from_file
    monkeypatch.setattr(images, "_from_file", lambda path, size: (decoded.append(str(path)), read(path, size))[1])

    def task(*names: str) -> ClassificationTask:
        member = {"encoder": {"kind": "image_cnn", "image_size": 16, "widths": [8]}}
        config = classes(dict.fromkeys(names, member))
        config["data"] = {"kind": "folder", "path": str(tmp_path / "data")}
        made = ClassificationTask(Run.start(parse_experiment(config), tmp_path / "runs", quiet=True))
        made.data()
        return made

    for names in (("one", "two"), ("three",)):
        begun = task(*names)
        for name in names:
            for rows in (begun.rows(TRAIN), begun.rows(TEST), begun.rows(TRAIN)[::2]):
                assert len(begun.values(name, rows)) == len(rows)
    assert len(begun.table) == 40 and begun.available("three").sum() == 39
    whole = [path for path in decoded if path != str(broken)]
    assert len(whole) == len(set(whole)) == 40


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One hint in the image, one in each of two texts, each wrong for three in ten; two members of one encoder."""
    image = {
        "encoder": {"kind": "image_cnn", "image_size": 16, "widths": [8, 16]},
        "training": {"epochs": 5, "batch_size": 32, "learning_rate": 0.02},
    }
    members = {"image": image, "text": text_member("text"), "note": text_member("note")}
    return run_of(classes(members), tmp_path_factory.mktemp("classes"))


class TestClassification:
    def test_fusing_beats_the_best_single_member(self, classified: Run) -> None:
        """H1, H2, H3, H5: a hint is right for 70 %; of three hints more can be made."""
        report = report_of(classified)
        members, rules = values(report["members"], "accuracy"), values(report["rules"], "accuracy")
        assert all(0.6 < value < 0.8 for value in members.values())
        assert all(value > max(members.values()) + 0.02 for value in rules.values())
        assert values(report["rules"], "log_loss")["stacker"] < min(values(report["members"], "log_loss").values())

    def test_the_report_has_its_fixed_form(self, classified: Run) -> None:
        report = report_of(classified)
        assert report["task"] == "classification" and report["primary_metric"] == "accuracy"
        assert report["dataset"]["classes"] == 4 and report["segments"] == {} and report["variants"] == {}
        for place in (report, report["validation"]):
            for figures in (*place["members"].values(), *place["rules"].values()):
                assert set(figures) == {"accuracy", "log_loss", "auc", "rmse", "ece"}
                assert all(set(figure) == FIGURE for figure in figures.values())
        assert set(report["cost"]) == {"image", "text", "note", *RULES}
        for name, cost in report["cost"].items():
            assert set(cost) == COST | (set() if name in RULES else PACE)
        assert report["rules"][report["best_rule"]]["accuracy"]["n"] == report["split"]["test"]

    def test_all_forms_answer_alike(self, classified: Run) -> None:
        """O1, O5: what was compared at export, and the artifact against the model made again from the folder."""
        checks = json.loads(classified.path("verify.json").read_text())
        assert {check["what"] for check in checks} == {"Keras and TFLite", "Keras and SavedModel"}
        assert all(check["largest_difference"] <= check["tolerance"] for check in checks)
        task, predictor = ClassificationTask(classified), Predictor.load(artifact_of(classified.folder))
        ensemble = task.ensemble(report_of(classified)["best_rule"])
        rows = task.rows(TEST)[:50]
        raw = {name: task.values(name, rows) for name in ensemble.members}
        mask = np.ones((50, 3), bool)
        mask[::7, 1] = False  # some have no text
        answer = predictor.predict("serving_default", {**ensemble.prepare(raw), "mask": mask})
        np.testing.assert_allclose(answer["probabilities"], ensemble.predict(raw, mask), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answer["probabilities"].sum(axis=1), 1.0, rtol=1e-5)
        assert (answer["contributions"][::7, 1] == 0).all() and (answer["contributions"][1::7, 1] != 0).any()
        labels = json.loads((artifact_of(classified.folder) / "labels.json").read_text())
        assert labels == task.classes == sorted(labels)

    def test_members_survive_their_folder(self, classified: Run) -> None:
        """D0: the fitted members that evaluation loaded are those that training made."""
        task = ClassificationTask(classified)
        probabilities = tf.nn.softmax(task.part_logits(TEST)[0][:, 0]).numpy()
        accuracy = (probabilities.argmax(axis=1) == task.labels[task.rows(TEST)]).mean()
        assert accuracy == pytest.approx(report_of(classified)["members"]["image"]["accuracy"]["value"])

    def test_out_of_fold_logits_are_not_those_of_the_training_rows(self, classified: Run) -> None:
        """H5: a stacker that saw members on their own training rows would trust who memorises best."""
        task = ClassificationTask(classified)
        with np.load(classified.path("out_of_fold", "logits.npz")) as arrays:
            logits = arrays["logits"]
        own = task.part_logits(TRAIN)[0]
        assert logits.shape == own.shape and not np.allclose(logits, own, atol=1e-3)
        labels = task.labels[task.rows(TRAIN)]
        right = lambda found: (found.argmax(axis=2) == labels[:, None]).mean(axis=0)  # noqa: E731
        assert (right(logits) < 0.8).all(), "a hint is right for seven in ten, and nobody can know more out of fold"


def test_shuffled_labels_leave_every_classifier_at_chance(tmp_path: Path) -> None:
    """H5, the negative control that is shipped: of four classes the stacker names a quarter rightly."""
    config = classes(
        {"text": text_member("text", 4), "note": text_member("note", 4)},
        data={"shuffle_labels": True},
        export={"enabled": False},
    )
    report = report_of(run_of(config, tmp_path))
    rows = report["split"]["test"]
    margin = 4 * np.sqrt(0.25 * 0.75 / rows)
    for name, value in {**values(report["members"], "accuracy"), **values(report["rules"], "accuracy")}.items():
        assert abs(value - 0.25) < margin, name
    assert abs(values(report["rules"], "auc")["stacker"] - 0.5) < 0.08
    assert values(report["rules"], "log_loss")["stacker"] < np.log(4) + 0.05, "and it does not claim to know"


def test_a_class_without_a_training_example_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.start(parse_experiment(classes({"text": text_member("text")})), tmp_path, quiet=True)
    task = ClassificationTask(run)
    task.data()
    task.table.loc[task.rows(TEST)[0], "label"] = "never trained"
    with pytest.raises(DataError, match="'never trained' has none"):
        _ = task.classes


def test_every_task_has_the_stages_of_the_design() -> None:
    for name in TASKS:
        assert TASKS[name].STAGES == ("data", "train", "fuse", "evaluate", "export", "compress")
    assert isinstance(parse_experiment(cheap()).members["ease"], Part)
    assert issubclass(ClassifierMember, object)
