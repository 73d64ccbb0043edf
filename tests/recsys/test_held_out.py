"""Learned rules over classes fitted on the validation part: members are fitted once, and choosing stays honest."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fusion.compat import tf
from fusion.errors import DataError
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.training.member import ClassifierMember
from recsys.classification_task import ClassificationTask
from recsys.held_out import HeldOut
from recsys.metrics import parse_metric
from recsys.pipeline import run_experiment
from recsys.plan import plan
from recsys.run import Run
from recsys.schema import TEST, VALIDATION
from recsys.settings import parse_experiment


def noise(rows: int, members: int, classes: int, seed: int) -> HeldOut:
    """Members and labels that have nothing to do with each other."""
    random = np.random.default_rng(seed)
    logits = 3 * random.normal(size=(rows, members, classes)).astype(np.float32)
    labels = random.permutation(np.arange(rows) % classes)
    context = {"words": random.normal(size=(rows, 1)).astype(np.float32)}
    return HeldOut(logits, np.ones((rows, members), bool), labels, context, seed=1)


class Remembers:
    """A rule's methods, of one that knows which rows it was fitted on: the first logit of a row is its number."""

    name = "remembers"

    def __init__(self, fitted: list[np.ndarray]) -> None:
        self._fitted = fitted

    def fit(self, logits: np.ndarray, mask: np.ndarray, labels: np.ndarray, **options: Any) -> dict[str, Any]:
        assert len(options["context"]["words"]) == len(labels) == len(mask)
        self._rows = logits[:, 0, 0].astype(int)
        self._fitted.append(self._rows)
        return {"rows": len(labels)}

    def __call__(self, logits: Any, mask: Any, context: Any) -> Any:
        known = np.isin(logits[:, 0, 0].numpy().astype(int), self._rows)
        return tf.constant(np.stack([known, ~known], axis=1).astype(np.float32))

    def probabilities(self, fused: Any) -> Any:
        return fused


def test_no_row_is_answered_by_a_rule_that_knows_it() -> None:
    """H3, H5: five folds with equal shares of each class; every row is in four fits and answered by the fifth."""
    held, fitted = noise(41, 2, 2, seed=0), []
    held.logits[:, 0, 0] = np.arange(41)
    assert held.fit(Remembers(fitted))["rows"] == 41  # type: ignore[arg-type]
    found = held.cross_fitted(lambda: Remembers(fitted))  # type: ignore[arg-type,return-value]
    assert (found == [0.0, 1.0]).all() and len(fitted) == 6
    assert (np.bincount(np.concatenate(fitted[1:])) == 4).all()
    for rows in fitted[1:]:
        left_out = np.bincount(held.labels[np.setdiff1d(np.arange(41), rows)], minlength=2)
        assert 8 <= left_out.sum() <= 9 and np.ptp(left_out) <= 1


def test_what_a_rule_says_of_its_own_rows_is_not_what_it_is_chosen_by() -> None:
    """H3: among members of noise the weights that fit best seem to help; cross-fitted they do not."""
    held = noise(60, 8, 3, seed=2)

    def weighted() -> Rule:
        kind = RULES["probability"]
        return kind(kind.Config(calibration="none", shrinkage=0.0), list("abcdefgh"), "classes")

    log_loss, rule = parse_metric("log_loss", "classes").of_classes, weighted()
    equal = np.mean(log_loss(held.labels, rule.probabilities(rule(held.logits, held.mask)).numpy()))
    held.fit(rule)
    own = np.mean(log_loss(held.labels, rule.probabilities(rule(held.logits, held.mask)).numpy()))
    assert own < equal - 0.01
    assert np.mean(log_loss(held.labels, held.cross_fitted(weighted))) > equal


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int]]:
    """A run with `folds: 1`, and how many rows each fit of a member had."""
    training = {"epochs": 4, "batch_size": 64, "learning_rate": 0.05}
    encoder = {"kind": "text_tfidf", "dimensions": 16}
    config = {
        "name": "held_out",
        "task": "classification",
        "seed": 1,
        "data": {"kind": "planted_classes", "examples": 400, "seed": 1},
        "split": {"strategy": "stratified", "validation": 0.25, "test": 0.25},
        "out_of_fold": {"folds": 1},
        "members": {c: {"encoder": encoder, "columns": [c], "training": training} for c in ("text", "note")},
        "rules": {
            "vote": {"kind": "vote", "calibration": "none"},
            "average": {"kind": "average", "calibration": "isotonic"},
            "weighted": {"kind": "probability", "calibration": "platt"},
        },
        "evaluation": {"samples": 100, "examples": 0, "primary": "log_loss"},
        "export": {"enabled": False},
    }
    experiment = parse_experiment(config)
    fits: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        whole = ClassifierMember.fit
        patch.setattr(
            ClassifierMember,
            "fit",
            lambda self, data, options: (fits.append(len(data.train.labels)), whole(self, data, options))[1],
        )
        run = run_experiment(experiment, tmp_path_factory.mktemp("held_out"), quiet=True)
    return run, fits


class TestOneFold:
    def test_members_are_fitted_once(self, ran: tuple[Run, list[int]]) -> None:
        run, fits = ran
        assert fits == [len(ClassificationTask(run).manifest.parts) // 2] * 2
        assert plan(run.experiment, run.folder)["fits_per_member"] == 1 + 1  # the second before export

    def test_the_kept_rule_is_fitted_on_all_validation_rows(self, ran: tuple[Run, list[int]]) -> None:
        task = ClassificationTask(ran[0])
        logits, mask = task.part_logits(VALIDATION)
        rows = task.rows(VALIDATION)
        assert task.rule_reports["weighted"]["rows"] == len(rows)
        again = task._new_rule("average")
        again.fit(logits, mask, task.labels[rows], context=task.context(rows))
        for name, value in task.rules["average"].state().items():
            np.testing.assert_allclose(value, again.state()[name], rtol=1e-5, atol=1e-6)

    def test_it_is_chosen_by_rows_that_it_was_not_fitted_on(self, ran: tuple[Run, list[int]]) -> None:
        """H3: the validation figures of learned rules are cross-fitted, those of others and of the test are not."""
        task, report = ClassificationTask(ran[0]), json.loads(ran[0].path("report.json").read_text())
        assert set(task.cross_fitted) == {"average", "weighted"}
        log_loss = parse_metric("log_loss", "classes").of_classes
        for part, place in ((VALIDATION, report["validation"]), (TEST, report)):
            (logits, mask), rows = task.part_logits(part), task.rows(part)
            for name, rule in task.rules.items():
                own = rule.probabilities(rule(tf.constant(logits), tf.constant(mask), task.context(rows))).numpy()
                own_loss = np.mean(log_loss(task.labels[rows], own))
                shown = place["rules"][name]["log_loss"]["value"]
                if part == VALIDATION and name in task.cross_fitted:
                    assert shown == pytest.approx(np.mean(log_loss(task.labels[rows], task.cross_fitted[name])))
                    assert shown > own_loss
                else:
                    assert shown == pytest.approx(own_loss, rel=1e-4)

    def test_the_report_says_so_and_shows_calibration(self, ran: tuple[Run, list[int]]) -> None:
        """H3: expected calibration error of each member before and after, and of the fused answer."""
        run = ran[0]
        report, page = json.loads(run.path("report.json").read_text()), run.path("report.html").read_text()
        assert "were fitted on the validation rows" in page and "Can its probabilities be believed?" in page
        best = report["best_rule"]
        assert set(report["calibration"]) == {"text", "note", best}
        assert report["calibration"][best] == {"fused": pytest.approx(report["rules"][best]["ece"]["value"])}
        for name in ("text", "note"):
            found = report["calibration"][name]
            assert found["raw"] == pytest.approx(report["members"][name]["ece"]["value"])
            assert set(found) == {"raw", "calibrated"} and 0 <= found["calibrated"] < 0.3
        assert run.path("plots", "reliability.png").is_file()


def test_rows_that_nobody_can_read_are_refused_by_name() -> None:
    held = noise(20, 2, 2, seed=3)
    held.mask[:] = False
    kind = RULES["average"]
    with pytest.raises(DataError, match="calibration: none"):
        held.fit(kind(kind.Config(), ["a", "b"], "classes"))
