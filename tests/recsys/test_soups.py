"""Several copies as one member: how a config says it, what their mean is, and what is served (G5, G6)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras
from fusion.config import Part, Settings, parse
from fusion.errors import ConfigError, DataError
from fusion.training.trainer import TrainingSettings
from fusion.types import History, RunOptions
from recsys import soups
from recsys.classification_report import ClassificationEvaluation
from recsys.classification_task import ClassificationTask
from recsys.copies import SoupSettings
from recsys.export import artifact_of
from recsys.fitting import Fitted, fit_member
from recsys.pipeline import run_experiment
from recsys.plan import plan
from recsys.report_content import ReportExtras
from recsys.run import Run
from recsys.schema import TRAIN, VALIDATION
from recsys.settings import parse_experiment
from recsys.soups import Judge, Recipe, fit_soup
from recsys.workers import TRAINING, Portion
from serving.predictor import Predictor
from worlds import World, member_part

RULES = {"average": {"kind": "average"}}
FACTORS = {"kind": "matrix_factorization", "factors": 8}


def ranking(members: dict[str, Any], **keys: Any) -> Any:
    return parse_experiment({"name": "soup", "data": {"kind": "planted"}, "members": members, "rules": RULES, **keys})


# ---- what a config may say -----------------------------------------------------------------------------------


def test_copies_that_are_averaged_stay_one_member() -> None:
    """G5, G6: one member under its own name; what a run keeps of the config means the same."""
    experiment = ranking({"mf": {**FACTORS, "copies": 3, "aggregate": "mean"}, "ease": {"kind": "ease"}})
    assert list(experiment.members) == ["mf", "ease"]
    assert experiment.soups == {"mf": SoupSettings(copies=3, aggregate="mean")}
    assert parse_experiment(experiment.model_dump(mode="json", exclude_none=True)).hash() == experiment.hash()
    assert list(ranking({"mf": {**FACTORS, "copies": 3}}).members) == ["mf_1", "mf_2", "mf_3"], "as it was"


@pytest.mark.parametrize(
    ("members", "keys", "message"),
    [
        ({"mf": {**FACTORS, "aggregate": "mean"}}, {}, r"members.mf.aggregate must go with copies"),
        ({"mf": {**FACTORS, "copies": 2, "aggregate": "soup"}}, {}, r"members.mf.aggregate: .*received 'soup'"),
        ({"mf": {**FACTORS, "copies": 1, "aggregate": "mean"}}, {}, r"members.mf.copies: .*received 1"),
        (
            {"ease": {"kind": "ease", "copies": 2, "aggregate": "mean"}},
            {},
            r"members.ease.aggregate: .*\(matrix_factorization, light_gcn, mult_vae, gru4rec, sasrec\); received ease",
        ),
        (
            {"mf": {**FACTORS, "copies": 2, "aggregate": "mean", "vary": {"factor": [4, 8]}}},
            {},
            r"unknown key 'members.mf.vary.factor': did you mean 'factors'",
        ),
        ({"mf": {**FACTORS, "copies": 2, "aggregate": "mean", "vary": {"l2": []}}}, {}, "must list at least one value"),
        (
            {"mf": {**FACTORS, "copies": 2, "aggregate": "mean"}, "other": FACTORS},
            {"training": {"mode": "joint"}},
            r"members.mf.aggregate must go with training.mode separate",
        ),
        ({"mf": FACTORS}, {"soups": {"fm": {}}}, r"soups names the unknown member 'fm'"),
    ],
)
def test_what_cannot_be_averaged_is_refused(members: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ranking(members, **keys)


# ---- the mean of copies --------------------------------------------------------------------------------------


class Drawn:
    """A member whose weights are drawn: what training would make of them does not matter to averaging."""

    class Config(Settings):
        size: int = 4
        scale: float = 1.0
        training: TrainingSettings = TrainingSettings(epochs=3)

    averageable = True

    def __init__(self, config: Config, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    def fit(self, data: Any, options: RunOptions) -> History:
        random = np.random.default_rng(options.order_seed)
        self.table = (self.config.scale * random.normal(size=self.config.size)).astype(np.float32)
        epochs = [{"epoch": float(number)} for number in range(self.config.training.epochs)]
        return History(epochs, best_epoch=options.copy % 3)

    def state(self) -> dict[str, np.ndarray]:
        return {"table": self.table, "classes": np.int64(2)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.table = state["table"]

    def renew_statistics(self, data: Any) -> None:
        self.renewed = True

    @property
    def parameters(self) -> int:
        return self.table.size


@dataclass
class Rows:
    """Rows that do not matter."""

    cache: Path

    def fingerprint(self, part: Part) -> str:
        return "rows"


DRAWN: Any = {"drawn": Drawn}
LENGTH = Judge("length", True, lambda member: float(np.abs(member.table).sum()))


def drawn(**settings: Any) -> Part:
    return Part("drawn", parse(Drawn.Config, settings), DRAWN)


def soup_of(folder: Path, judge: Judge | None = LENGTH, known: Any = None, **settings: Any) -> tuple[Fitted, Recipe]:
    recipe = Recipe("net", drawn(), SoupSettings(**settings), judge, known)
    return fit_soup(recipe, Rows(folder), seed=7, quiet=True), recipe


def copies_of(folder: Path, count: int) -> list[Fitted]:
    return [fit_member("net", drawn(), Rows(folder), seed=7, quiet=True, copy=number) for number in range(count)]


def assert_mean(found: Fitted, copies: list[Fitted], weights: list[float]) -> None:
    """The state of a soup against the weighted mean of its copies, array by array, to 1e-7."""
    states = [copy.member.state() for copy in copies]
    for key, array in found.member.state().items():
        if array.dtype.kind == "f":
            expected = np.average([state[key].astype(np.float64) for state in states], axis=0, weights=weights)
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-7)


def test_a_soup_is_the_mean_of_its_copies(tmp_path: Path) -> None:
    """G5: to 1e-7; the copies lie in the cache, and the first of them is the member by itself."""
    found, copies = soup_of(tmp_path, copies=3, aggregate="mean")[0], copies_of(tmp_path, 3)
    assert_mean(found, copies, [1, 1, 1])
    assert len({copy.folder for copy in copies}) == 3 and len(list((tmp_path / "members").iterdir())) == 4
    assert copies[0].folder == fit_member("net", drawn(), Rows(tmp_path), seed=7, quiet=True).folder
    assert found.soup is not None and found.soup["value"] == LENGTH.measure(found.member)
    assert [copy["weight"] for copy in found.soup["copies"].values()] == [pytest.approx(1 / 3)] * 3
    assert found.seconds == pytest.approx(sum(copy.seconds for copy in copies))


def test_copies_count_by_their_value_on_validation(tmp_path: Path) -> None:
    """G6: proportional to the metric, and inversely where low is good."""
    copies = copies_of(tmp_path, 3)
    values = [LENGTH.measure(copy.member) for copy in copies]
    assert len(set(values)) == 3
    assert_mean(soup_of(tmp_path, copies=3, aggregate="by_validation")[0], copies, values)
    low = replace(LENGTH, metric="loss", higher_is_better=False)
    inverse = [1 / value for value in values]
    assert_mean(soup_of(tmp_path / "low", low, copies=3, aggregate="by_validation")[0], copies, inverse)


def test_greedy_takes_what_helps(tmp_path: Path) -> None:
    """G6: best is the mean of the first two; a copy of another scale would pull it away. Other rows: only these two are
    fitted, for as many epochs as were best for each, and averaged."""
    one, two = (copy.member.table for copy in copies_of(tmp_path, 2))
    near = Judge("distance", False, lambda member: float(np.abs(member.table - (one + two) / 2).mean()))
    found, _ = soup_of(tmp_path, near, copies=3, aggregate="greedy", vary={"scale": [1.0, 1.0, 9.0]})
    assert found.soup is not None
    copies = found.soup["copies"]
    assert {name: copy["weight"] for name, copy in copies.items()} == {"net_1": 0.5, "net_2": 0.5, "net_3": 0.0}
    assert found.soup["value"] < 1e-6 < min(copy["value"] for copy in copies.values())
    assert not soups.is_worse(found.soup) and soups.best_copy(found.soup) != "net_3"
    again, recipe = soup_of(tmp_path / "rows", None, copies, copies=3, aggregate="greedy")
    assert {n: part.config.training.epochs for n, part in recipe.parts().items()} == {0: 1, 1: 2}
    assert_mean(again, copies_of(tmp_path, 2), [1, 1])
    assert len(list((tmp_path / "rows" / "members").iterdir())) == 3
    assert again.folder == recipe.folder(Rows(tmp_path / "rows"), 7)
    assert again.soup is not None and again.soup["value"] is None


def test_copies_of_other_shapes_are_refused_and_named(tmp_path: Path) -> None:
    """G5, E-14: both shapes are said, as soon as the second copy is there."""
    message = r"members.net.vary: .*'table' is float32 \(4,\) in 'net_1' and float32 \(6,\) in 'net_2'"
    with pytest.raises(DataError, match=message):
        soup_of(tmp_path, copies=3, aggregate="mean", vary={"size": [4, 6]})
    assert len(list((tmp_path / "members").iterdir())) == 2


def test_copies_start_alike_and_see_other_orders(tmp_path: Path) -> None:
    """G5: with steps of nothing all copies stay where they start, and a soup of equal copies is the copy; with steps
    they part. The average over the steps of one run is what its member keeps: nearer to the start than its end."""
    data = World.planted(users=60, items=40).training(tmp_path)

    def factors(rate: float, **training: Any) -> Part:
        given = {"epochs": 1, "batch_size": 128, "learning_rate": rate, **training}
        return member_part({**FACTORS, "dropout": 0.0, "training": given})

    def table(part: Part, copy: int = 0) -> np.ndarray:
        return fit_member("mf", part, data, seed=7, quiet=True, copy=copy).member.tables[1]

    still = factors(1e-30)
    start = table(still)
    np.testing.assert_array_equal(table(still, 1), start)
    judge = Judge("length", True, lambda member: float(np.abs(member.tables[1]).sum()))
    found = fit_soup(Recipe("mf", still, SoupSettings(copies=2, aggregate="mean"), judge), data, seed=7, quiet=True)
    np.testing.assert_array_equal(found.member.tables[1], start)
    end = table(factors(0.05))
    assert not np.allclose(table(factors(0.05), 1), end, atol=1e-3)
    average = table(factors(0.05, average={"kind": "swa", "start": 0.0}))
    assert 0.2 < np.abs(average - start).sum() / np.abs(end - start).sum() < 0.8


def test_the_report_says_whether_averaging_paid() -> None:
    """G6: a mean that is worse than its best copy is a warning; log loss counts the other way round."""

    def report(value: float, metric: str = "accuracy") -> dict[str, Any]:
        copies = {f"cnn_{n}": {"value": v, "weight": 0.5, "epochs": 1} for n, v in ((1, 0.8), (2, 0.9))}
        higher = metric == "accuracy"
        soup = {"aggregate": "mean", "metric": metric, "higher_is_better": higher, "value": value, "copies": copies}
        return {"soups": {"cnn": soup}}

    assert soups.sentences(report(0.95)) == [
        "cnn is the mean of 2 of 2 copies (mean): accuracy 0.9500 on validation, better than the best copy cnn_2 with "
        "0.9000."
    ]
    assert not soups.warnings(report(0.95)) and not soups.warnings(report(0.9)) and not soups.warnings({})
    assert "worse than the best copy cnn_2" in soups.warnings(report(0.7))[0]
    assert "worse than the best copy cnn_1" in soups.warnings(report(0.85, "log_loss"))[0]
    assert not soups.warnings(report(0.75, "log_loss"))


# ---- from the config to what is served -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A network averaged out of two copies, and the artifact; a run without the page."""
    training = {"epochs": 2, "batch_size": 40, "learning_rate": 0.01}
    image = {"kind": "image_cnn", "image_size": 8, "widths": [8], "dropout": 0.0}
    config = {
        "name": "soup",
        "task": "classification",
        "data": {"kind": "planted_classes", "examples": 200, "image_size": 8},
        "split": {"strategy": "stratified", "validation": 0.2, "test": 0.2},
        "members": {"image": {"encoder": image, "training": training, "copies": 2, "aggregate": "by_validation"}},
        "rules": RULES,
        "out_of_fold": {"folds": 1},
        "evaluation": {"samples": 100, "examples": 0},
        "export": {"refit": "none", "tflite": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationEvaluation, "_cost", lambda self: {})
        patch.setattr(ClassificationEvaluation, "extras", lambda self, report: ReportExtras("accuracy"))
        patch.setattr("recsys.classification_report.write_report", lambda *_: None)
        yield run_experiment(parse_experiment(config), tmp_path_factory.mktemp("served"), quiet=True)


def _first_statistics(member: Any, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of what the first BatchNormalization reads, over all values at once."""
    model = member.model
    norm = next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    read = keras.Model(model.inputs, norm.input)(member.submodel.prepare(values), training=False).numpy()
    return read.mean(axis=(0, 1, 2)), read.var(axis=(0, 1, 2))


def test_what_is_served_is_the_mean(served: Run) -> None:
    """G5: from the config to the SavedModel, one model: weights of encoder and head are the mean of those of two, to
    1e-7, and BatchNormalization has the statistics of the mean over the training rows."""
    task = ClassificationTask(served)
    part, data = task.experiment.members["image"], task.portion_data(TRAINING, "image")
    copies = [fit_member("image", part, data, task.experiment.seed, quiet=True, copy=n) for n in range(2)]
    found = task.fitted["image"]
    assert found.soup is not None and data.validation is not None
    shares = [copy["value"] for copy in found.soup["copies"].values()]
    kept = [member.model.trainable_weights for member in (found.member, *(copy.member for copy in copies))]
    for weight, *theirs in zip(*kept, strict=True):
        expected = np.average([array.numpy() for array in theirs], axis=0, weights=shares)
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-7)
    mean, variance = _first_statistics(found.member, data.train.values)
    norm = next(layer for layer in found.member.model.layers if isinstance(layer, keras.layers.BatchNormalization))
    np.testing.assert_allclose(norm.moving_mean, mean, atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-3)  # the layer counts n / (n - 1)
    right = found.member.logits(data.validation.values).argmax(axis=1) == data.validation.labels
    assert found.soup["value"] == pytest.approx(right.mean())
    report = json.loads(served.path("report.json").read_text(encoding="utf-8"))
    assert report["soups"] == {"image": found.soup}
    ensemble = task.ensemble(report["served"])
    assert ensemble.members["image"].parameters == copies[0].member.parameters, "one model"
    raw = {"image": data.validation.values}
    given = {**ensemble.prepare(raw), "mask": np.ones((len(right), 1), bool)}
    answer = Predictor.load(artifact_of(served.folder)).predict("serving_default", given)
    np.testing.assert_allclose(answer["probabilities"], ensemble.predict(raw), atol=1e-5)


def test_rows_without_validation_are_fitted_by_the_same_recipe(served: Run) -> None:
    """G6: as folds and the last fit on every row are made: the weights and the epochs that validation left."""
    task = ClassificationTask(served)
    found = task.fit("image", task.recipes["image"], task.portion_data(Portion("parts", (TRAIN, VALIDATION)), "image"))
    known = (task.fitted["image"].soup or {})["copies"]
    assert found.soup is not None and found.soup["value"] is None
    assert {name: (copy["weight"], copy["epochs"]) for name, copy in found.soup["copies"].items()} == {
        name: (pytest.approx(copy["weight"]), copy["epochs"]) for name, copy in known.items()
    }


def test_a_plan_counts_every_copy(tmp_path: Path) -> None:
    """`--dry-run` says what a soup costs."""
    one, three = (
        plan(ranking({"mf": {**FACTORS, **more}}), tmp_path)["members"]["mf"]["fit_s"]
        for more in ({}, {"copies": 3, "aggregate": "mean"})
    )
    assert three == pytest.approx(3 * one, rel=0.01)


@pytest.mark.slow
def test_a_ranking_is_served_by_a_mean(tmp_path: Path) -> None:
    """G6: copies are compared by the metric that decides, and the artifact ranks with their mean."""
    training = {"epochs": 4, "batch_size": 128, "learning_rate": 0.02}
    members = {"mf": {**FACTORS, "training": training, "copies": 3, "aggregate": "greedy"}, "ease": {"kind": "ease"}}
    data = {"kind": "planted", "users": 120, "items": 60, "interactions_per_user": 15}
    run = run_experiment(ranking(members, data=data, evaluation={"samples": 100}), tmp_path, quiet=True)
    soup = json.loads(run.path("report.json").read_text(encoding="utf-8"))["soups"]["mf"]
    assert soup["metric"] == "ndcg@10" and soup["value"] >= max(copy["value"] for copy in soup["copies"].values())
    assert "mf is the mean of" in run.path("report.html").read_text(encoding="utf-8")
    checks = json.loads(run.path("verify.json").read_text(encoding="utf-8"))
    assert checks and all(check["largest_difference"] <= check["tolerance"] for check in checks)
