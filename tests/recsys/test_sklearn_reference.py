"""scikit-learn's VotingClassifier and StackingClassifier over stored answers of members, beside our rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_wine
from sklearn.ensemble import StackingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import GaussianNB
from sklearn.tree import DecisionTreeClassifier

from fusion.errors import ConfigError
from recsys.compare import read_side
from recsys.metrics import parse_metric
from recsys.pipeline import run_experiment
from recsys.settings import parse_experiment
from recsys.sklearn_reference import STACKING, VOTING, Answers, StoredMember, references
from recsys.summary import summary

ACCURACY, LOG_LOSS = parse_metric("accuracy", "classes"), parse_metric("log_loss", "classes")


@pytest.fixture(scope="module")
def world():
    """Two scikit-learn classifiers on wine: their answers out of fold on rows to learn from, and as fitted on them."""
    rows, labels = load_wine(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(rows))
    learned, deciding, asked = order[:100], order[100:130], order[130:]
    models = {"bayes": GaussianNB(), "tree": DecisionTreeClassifier(max_depth=2, random_state=0)}
    folds = StratifiedKFold(4)
    logits = {}
    for name, model in models.items():
        held = cross_val_predict(model, rows[learned], labels[learned], cv=folds, method="predict_proba")
        every = model.fit(rows[learned], labels[learned]).predict_proba(rows)
        every[learned] = held
        logits[name] = np.log(np.maximum(every, 1e-12))
    return rows, labels, models, folds, Answers(logits, labels, learned, deciding, asked)


def test_voting_is_scikit_learns_own(world):
    """The same probabilities as a VotingClassifier that fits its members itself."""
    rows, labels, models, _, answers = world
    voting = VotingClassifier(list(models.items()), voting="soft").fit(rows[answers.learned], labels[answers.learned])
    found = references(answers, ACCURACY)[VOTING]
    if found.form == "soft, equal weights":
        np.testing.assert_allclose(found.probabilities, voting.predict_proba(rows[answers.asked]), atol=1e-6)
    by_hand = np.mean([softmax(answers.logits[name][answers.asked], axis=1) for name in models], axis=0)
    np.testing.assert_allclose(voting.predict_proba(rows[answers.asked]), by_hand, atol=1e-6)
    assert found.form.startswith("soft")


def test_stacking_learns_what_scikit_learns_own_learns(world):
    """StackingClassifier that fits the members in the same folds has the same probabilities as over stored answers."""
    rows, labels, models, folds, answers = world
    own = StackingClassifier(list(models.items()), LogisticRegression(max_iter=5000), cv=folds)
    own.fit(rows[answers.learned], labels[answers.learned])
    stored = [(name, StoredMember(logits)) for name, logits in answers.logits.items()]
    ours = StackingClassifier(stored, LogisticRegression(max_iter=5000), cv="prefit", stack_method="predict_proba")
    ours.fit(answers.learned[:, None], labels[answers.learned])
    np.testing.assert_allclose(
        ours.predict_proba(answers.asked[:, None]), own.predict_proba(rows[answers.asked]), atol=1e-5
    )


def test_the_form_is_chosen_on_the_deciding_rows_alone(world):
    """Labels of the rows that are asked about are not looked at; those of the deciding rows are."""
    _, labels, _, _, answers = world
    shuffled = labels.copy()
    shuffled[answers.asked] = 0
    blind = references(Answers(answers.logits, shuffled, answers.learned, answers.deciding, answers.asked), LOG_LOSS)
    seeing = references(answers, LOG_LOSS)
    for name in (VOTING, STACKING):
        assert blind[name].form == seeing[name].form
        np.testing.assert_array_equal(blind[name].probabilities, seeing[name].probabilities)
        assert seeing[name].probabilities.shape == (len(answers.asked), 3)


def test_forms_are_cross_validated_where_no_other_rows_decide(world):
    _, labels, _, _, answers = world
    alone = references(Answers(answers.logits, labels, answers.deciding, answers.deciding, answers.asked), ACCURACY)
    for reference in alone.values():
        assert np.mean(reference.probabilities.argmax(axis=1) == labels[answers.asked]) > 0.8


def test_two_classes_and_a_class_that_nobody_learned(world):
    """Binary margins have one column in scikit-learn; a class without rows keeps a column of zeros."""
    _, labels, _, _, answers = world
    two = {name: logits[:, :2] for name, logits in answers.logits.items()}
    few = [rows[labels[rows] < 2] for rows in (answers.learned, answers.deciding, answers.asked)]
    found = references(Answers(two, labels, *few), ACCURACY)
    assert all(np.mean(r.probabilities.argmax(axis=1) == labels[few[2]]) > 0.8 for r in found.values())
    wide = references(Answers(answers.logits, labels, few[0], few[1], few[2]), ACCURACY)
    assert wide[STACKING].probabilities.shape[1] == 3 and (wide[STACKING].probabilities[:, 2] == 0).all()


def test_rankings_have_no_such_reference():
    config = {
        "name": "x",
        "data": {"kind": "planted"},
        "members": {"ease": {"kind": "ease"}},
        "rules": {"mean": {"kind": "average"}},
    }
    with pytest.raises(ConfigError, match=r"evaluation.sklearn compares with ensembles of classifiers"):
        parse_experiment({**config, "evaluation": {"sklearn": True}})


def test_a_run_lists_them_beside_its_rules(tmp_path: Path):
    """D10m, A3: members over columns of a table, fused, and scikit-learn's ensembles in the same table."""
    columns = {"kind": "sklearn", "encoder": {"kind": "dense", "widths": []}, "columns": ["*"]}
    config = {
        "name": "iris",
        "task": "classification",
        "data": {"kind": "sklearn_tables", "name": "iris"},
        "split": {"strategy": "stratified", "validation": 0.2, "test": 0.4},
        "members": {
            "linear": {**columns, "estimator": {"kind": "logistic_regression"}},
            "near": {**columns, "estimator": {"kind": "knn", "neighbours": 5}},
        },
        "rules": {"average": {"kind": "average"}, "stacker": {"kind": "stacker"}},
        "evaluation": {"sklearn": True, "samples": 200, "metrics": ["accuracy", "log_loss"]},
        "export": {"enabled": False},
    }
    run = run_experiment(parse_experiment(config), tmp_path, quiet=True)
    report = json.loads((run.folder / "report.json").read_text())
    assert set(report["references"]) == {VOTING, STACKING}
    for reference in report["references"].values():
        assert reference["figures"]["accuracy"]["value"] > 0.85
        assert reference["difference"]["accuracy"]["n"] == report["split"]["test"]
    text = summary(report, run.folder)
    assert "sklearn_voting" in text and f"Beside {STACKING} ({report['references'][STACKING]['form']})" in text
    side = read_side(run.folder)
    assert side.systems[STACKING].kind == "reference" and side.of(STACKING, "accuracy").shape == (1, 60)
    assert STACKING in (run.folder / "report.html").read_text()
    assert min(figures["accuracy"]["value"] for figures in report["members"].values()) > 0.85
