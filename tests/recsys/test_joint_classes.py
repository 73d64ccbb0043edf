"""Whole classification experiments whose members are trained together, beside the same trained one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.errors import ConfigError
from recsys.classification_report import ClassificationEvaluation
from recsys.classification_task import ClassificationTask
from recsys.fitting import Fitted
from recsys.pipeline import run_experiment
from recsys.run import Run
from recsys.schema import TEST, TRAIN
from recsys.settings import parse_experiment

JOINT = {"mode": "joint", "epochs": 6, "batch_size": 16, "patience": 3}


def text_member(column: str, **settings: Any) -> dict[str, Any]:
    training = {"epochs": 6, "batch_size": 16, "learning_rate": 0.05}
    encoder = {"kind": "text_tfidf", "dimensions": 16}
    return {"encoder": encoder, "columns": [column], "training": training, **settings}


def config_of(**settings: Any) -> dict[str, Any]:
    return {
        "name": "joint",
        "task": "classification",
        "seed": 1,
        "data": {"kind": "planted_classes", "examples": 832, "image_size": 8, "seed": 1},
        "split": {"strategy": "stratified", "validation": 0.2, "test": 0.3},
        "members": {"text": text_member("text"), "note": text_member("note")},
        "rules": {name: {"kind": name} for name in ("vote", "average", "probability")},
        "out_of_fold": {"folds": 1},
        "training": JOINT,
        "evaluation": {"samples": 100, "examples": 0, "metrics": ["accuracy", "log_loss"], "never_worse": False},
        "export": {"enabled": False},
        **settings,
    }


def run_of(config: dict[str, Any], root: Path) -> Run:
    return run_experiment(parse_experiment(config), root, quiet=True)


def report_of(run: Run) -> dict[str, Any]:
    return json.loads(run.path("report.json").read_text(encoding="utf-8"))


def files_of(folder: Path) -> set[str]:
    """Names of files below a folder; what TensorFlow numbers is left out."""
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root, so that runs share the cache of members."""
    return tmp_path_factory.mktemp("joint")


@pytest.fixture(scope="module")
def joint(cache: Path) -> Run:
    """A member of each hint: a colour in the image, a word in each of two texts."""
    image = {
        "encoder": {"kind": "image_cnn", "image_size": 8, "widths": [8], "dropout": 0.0},
        "training": {"epochs": 1, "batch_size": 16, "learning_rate": 0.02},
    }
    members = {"image": image, "text": text_member("text"), "note": text_member("note")}
    with pytest.MonkeyPatch.context() as patch:  # the page is not looked at here
        patch.setattr(ClassificationEvaluation, "extras", lambda self, report: None)
        patch.setattr("recsys.classification_report.write_report", lambda *_: None)
        return run_of(config_of(members=members), cache)


@pytest.fixture(scope="module")
def separate(cache: Path) -> Run:
    """Two members trained each by itself, up to the folders of members."""
    run = Run.start(parse_experiment(config_of(training={**JOINT, "mode": "separate"})), cache, quiet=True)
    task = ClassificationTask(run)
    task.data()
    task.train()
    return run


def test_members_learn_and_fusing_pays(joint: Run) -> None:
    """G1: a hint is right for 70 %; trained through the mean of all, each member still knows its own."""
    report = report_of(joint)
    members = {name: figures["accuracy"]["value"] for name, figures in report["members"].items()}
    rules = {name: figures["accuracy"]["value"] for name, figures in report["rules"].items()}
    assert all(0.55 < value < 0.85 for value in members.values()), members
    assert max(members.values()) + 0.02 < rules["average"] and max(members.values()) + 0.02 < rules["probability"]


def test_the_report_tells_what_joint_training_did(joint: Run, separate: Run) -> None:
    """G8: the first rule with a gradient, who was trained through it, and how gradients agreed by epoch."""
    report = report_of(joint)
    facts = report["joint"]
    assert (facts["rule"], facts["members"]) == ("average", ["image", "text", "note"])
    assert set(facts["conflict"]) == {"image", "text", "note"}
    for cosines in facts["conflict"].values():
        assert len(cosines) == facts["epochs"] and all(-1.0 <= cosine <= 1.0 for cosine in cosines)
    assert all(cosines[0] > 0.2 for cosines in facts["conflict"].values()), "at first all want the same"
    counts = {name: report["cost"][name]["parameters"] for name in ("image", "text", "note")}
    assert 0 < facts["parameters"] <= sum(counts.values())
    assert ClassificationTask(separate).joint() == {}


def test_either_way_leaves_the_same_files(joint: Run, separate: Run) -> None:
    """G1: the same folders of members, which all later stages read."""
    for name in ("text", "note"):
        assert files_of(joint.path("submodels", name)) == files_of(separate.path("submodels", name))
        with np.load(joint.path("submodels", name, "state.npz")) as one:
            with np.load(separate.path("submodels", name, "state.npz")) as other:
                assert {key: one[key].shape for key in one} == {key: other[key].shape for key in other}
    texts = [json.loads(run.path("submodels", "text", "member.json").read_text()) for run in (joint, separate)]
    assert texts[0]["config"] == texts[1]["config"] and "accuracy/note" in texts[0]["history"]["epochs"][0]


@pytest.mark.slow
def test_folds_and_the_artifact_are_of_members_trained_together(cache: Path) -> None:
    """G1: as many epochs as validation found best, on other rows; and nobody was trained by itself."""
    run = Run.start(parse_experiment(config_of(out_of_fold={"folds": 2})), cache, quiet=True)
    task = ClassificationTask(run)
    task.data()
    task.train()
    logits, _ = task._out_of_fold_logits()
    own, labels = task.part_logits(TRAIN)[0], task.labels[task.rows(TRAIN)]
    assert logits.shape == own.shape and not np.isclose(logits, own, atol=1e-3).all(axis=2).any()
    right = (logits.argmax(axis=2) == labels[:, None]).mean(axis=0)
    assert ((0.4 < right) & (right < 0.85)).all(), right
    task.fuse()
    rows = task.rows(TEST)
    ensemble = task.ensemble("average")
    found = ensemble.predict({name: task.values(name, rows) for name in ensemble.members})
    assert (found.argmax(axis=1) == task.labels[rows]).mean() > 0.55
    best = task.fitted["text"].history.best_epoch
    again = task._fit_all("members", np.arange(len(task.table)), None)
    assert [len(fitted.history.epochs) for fitted in again.values()] == [best + 1] * 2
    assert "joint" in json.loads((again["text"].folder / "member.json").read_text())


def fitted_again(run: Run, **settings: Any) -> dict[str, Fitted]:
    """The members of the run's config with some settings changed, on the run's data."""
    task = ClassificationTask(run)
    changed = {**task.experiment.model_dump(mode="json"), **settings}
    task.experiment = parse_experiment(changed)
    return task._fit_all("members", task.rows(TRAIN), task.rows(TRAIN)[:20])


@pytest.mark.slow
def test_the_cache_knows_what_each_member_depends_on(separate: Run) -> None:
    """G1: in joint training on the settings of all; the same again is taken from the cache."""
    short = {**JOINT, "epochs": 1}
    first = fitted_again(separate, training=short)
    again = fitted_again(separate, training=short)
    assert [first[name].folder for name in first] == [again[name].folder for name in first]
    members = {"text": text_member("text"), "note": text_member("note", head={"dropout": 0.1})}
    for change in ({"members": members}, {"training": {**short, "auxiliary": 1.0}}):
        other = fitted_again(separate, **{"training": short, **change})
        assert other["text"].folder != first["text"].folder
    rules = {name: {"kind": name} for name in ("vote", "average")}
    kept = fitted_again(separate, training=short, rules=rules)
    assert kept["text"].folder == first["text"].folder, "rules that are not trained through matter to no member"
    linear = text_member("text", kind="sklearn", estimator={"kind": "logistic_regression"})
    del linear["training"]
    members = {"linear": linear, "text": text_member("text"), "note": text_member("note")}
    mixed = fitted_again(separate, training=short, members=members)
    assert mixed["linear"].history.epochs == [], "it has no gradient, and is fitted alone"
    assert mixed["text"].folder == first["text"].folder


# ---- one encoder of several members --------------------------------------------------------------------------


def sharing(**settings: Any) -> dict[str, Any]:
    members = {name: text_member(name, encoder="words") for name in ("text", "note")}
    words = {"words": {"kind": "text_tfidf", "dimensions": 16}}
    return config_of(**{"encoders": words, "members": members, **settings})


def test_a_shared_encoder_is_one_object_fitted_on_all_that_read_by_it(separate: Run) -> None:
    """G7, D14m: named once in the config; it knows the words of both columns."""
    experiment = parse_experiment(sharing())
    assert {part.config.share for part in experiment.members.values()} == {"words"}
    assert parse_experiment(experiment.model_dump(mode="json")) == experiment, "a resolved config is read again"
    dumped = experiment.model_dump(mode="json")["members"]
    fitted = fitted_again(separate, members=dumped, training={**JOINT, "epochs": 1})
    text, note = (fitted[name].member.submodel for name in ("text", "note"))
    assert text.fingerprint() == note.fingerprint()
    assert fitted["text"].member.logits(["words of nobody"]).shape == (1, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"training": {"mode": "separate"}},
            r"members\.text\.share: .* in separate training each member moves its own",
        ),
        ({"encoders": {"wrods": {"kind": "text_tfidf"}}}, r"no encoder 'words' under encoders: did you mean 'wrods'"),
        (
            {"encoders": {"words": {"kind": "text_tfidf"}, "idle": {"kind": "text_tfidf"}}},
            r"encoders\.idle: a member must name it",
        ),
        (
            {
                "members": {"text": text_member("text", share="a"), "note": text_member("note", share="a")},
                "encoders": {},
            },
            None,
        ),
    ],
)
def test_sharing_is_refused_where_it_cannot_be(settings: dict[str, Any], message: str | None) -> None:
    config = sharing(**settings)
    if message is None:
        parse_experiment(config)  # equal settings may share by the word alone
        config["members"]["note"]["encoder"] = {"kind": "text_tfidf", "dimensions": 8}
        message = "those of note and text, which share 'a', differ"
    with pytest.raises(ConfigError, match=message):
        parse_experiment(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": {"vote": {"kind": "vote"}}}, "needs a rule with a gradient .* received vote, which has none"),
        ({"members": {"text": text_member("text")}}, "needs two members that learn by gradient .* received text"),
        (
            {"training": {**JOINT, "optimizers": {"txt": {}}}},
            r"training\.optimizers: no member 'txt': did you mean 'text'",
        ),
        ({"training": {"mode": "together"}}, r"training\.mode: input should be 'separate' or 'joint'"),
        (
            {"strategy": {"kind": "parameter_server"}},
            "devices step together .* received strategy.kind parameter_server",
        ),
    ],
)
def test_what_joint_training_cannot_do_is_refused_before_data_is_read(settings: dict[str, Any], message: str) -> None:
    """G1"""
    with pytest.raises(ConfigError, match=message):
        parse_experiment(config_of(**settings))
