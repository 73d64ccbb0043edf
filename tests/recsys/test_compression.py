"""Recipes on whole runs: cells, the promise, what the report and the page say, and the tool (K10, A5)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from command_line import run_tool
from fusion.config import parse
from fusion.errors import ConfigError, GateError
from fusion.export.litert import run as run_tflite
from fusion.files import load_arrays, write_atomically
from fusion.types import RunOptions
from recsys import compression, compression_page, compression_search, fitting
from recsys.classification_task import ClassificationTask
from recsys.compressed_rankings import RankingCompression
from recsys.compression import Compression, cell, compress_all, compress_run, difference_of, kept_promise
from recsys.compression_search import Mix, front, improved, reduced, search, search_run
from recsys.compression_summary import overview, summary
from recsys.fitting import keep_copy
from recsys.pipeline import run_experiment
from recsys.recipes import BUILT_IN, Recipe, recipe_named
from recsys.run import Run
from recsys.settings import parse_experiment
from recsys.stages import Stages

pytestmark = pytest.mark.usefixtures("short_clocks")

TRAINING = {"epochs": 5, "batch_size": 32, "learning_rate": 0.02}
CLASSES = {
    "name": "classes",
    "task": "classification",
    "seed": 1,
    "data": {"kind": "planted_classes", "examples": 400, "seed": 1},
    "split": {"strategy": "stratified", "validation": 0.2, "test": 0.3},
    "members": {
        "image": {"encoder": {"kind": "image_cnn", "image_size": 16, "widths": [8, 16]}, "training": TRAINING},
        "text": {"encoder": {"kind": "text_tfidf", "dimensions": 16}, "columns": ["text"], "training": TRAINING},
    },
    "rules": {"average": {"kind": "average"}},
    "evaluation": {"samples": 100, "examples": 0, "never_worse": False},
    "export": {"enabled": False},
}
RANKING = {
    "name": "planted",
    "seed": 1,
    "data": {"kind": "planted", "users": 100, "items": 60, "noise": 0.2, "seed": 1, "image_size": 8},
    "members": {
        "ease": {"kind": "ease", "l2": 20.0},
        "ials": {"kind": "ials", "factors": 16},
        "text": {
            "kind": "content",
            "encoder": {"kind": "text_convolution", "max_words": 12, "min_count": 1, "filters": 16},
            "columns": ["text"],
            "dimensions": 16,
            "training": {"epochs": 3, "batch_size": 64, "learning_rate": 0.02},
            "fine_tuning": {"pairs": 256, "training": {"epochs": 1, "batch_size": 32, "learning_rate": 0.003}},
        },
    },
    "rules": {"average": {"kind": "average"}},
    "evaluation": {"samples": 100, "metrics": ["ndcg@10", "recall@20"], "examples": 1, "never_worse": False},
    "export": {"enabled": False},
}


def made(config: dict[str, Any], root: Path) -> Run:
    return run_experiment(parse_experiment(config), root, quiet=True)


def recipe(**settings: Any) -> Recipe:
    return parse(Recipe, settings)


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    config = {**CLASSES, "compress": {"half": {"steps": [{"kind": "float16"}], "max_drop": {"accuracy": 0.02}}}}
    return made(config, tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    return made(RANKING, tmp_path_factory.mktemp("ranked"))


class TestClasses:
    def test_a_run_applies_the_recipes_of_its_config(self, classified):
        """O15: training, fusion, compression: one command; each member leaves a file that runs."""
        assert classified.done("compress")
        report = json.loads(classified.path("compressed", "half", "report.json").read_text())
        assert list(report["members"]) == ["image", "text"]
        for member, facts in report["members"].items():
            assert facts["after"]["bytes"]["tflite"] < facts["before"]["bytes"]["tflite"], member
            assert abs(facts["after"]["quality"] - facts["before"]["quality"]) < 0.02
        answers = load_arrays(classified.path("compressed", "half", "image", "answers.npz"))
        image = np.zeros((1, 16, 16, 3), np.uint8)
        found = run_tflite(classified.path("compressed", "half", "image", "model.tflite"), {"image": image})
        assert next(iter(found.values())).shape[1] == answers["test"].shape[1]

    def test_the_report_and_the_page_say_it(self, classified):
        """A5: quality, bytes and latency of the variant stand beside members and rules, and in the page."""
        report = json.loads(classified.path("report.json").read_text())
        variant = report["variants"]["half"]
        assert {"bytes", "flops", "p50_ms", "p95_ms"} <= variant.keys()
        assert variant["figures"]["accuracy"]["value"] == pytest.approx(
            report["rules"]["average"]["accuracy"]["value"], abs=0.02
        )
        assert '<section id="compression">' in classified.path("report.html").read_text()
        assert classified.path("plots", "pareto.png").stat().st_size > 5000

    @pytest.mark.slow
    def test_what_is_done_is_not_done_again(self, classified):
        """A cell stays as it is until its member, its steps or the code change."""
        path = classified.path("compressed", "half", "text", "model.tflite")
        before = path.stat().st_ino
        compress_run(classified, "half", classified.experiment.compress["half"])
        assert path.stat().st_ino == before
        compress_run(classified, "half", recipe(steps=[{"kind": "int8"}]))
        assert path.stat().st_ino != before

    def test_a_broken_promise_ends_the_tool_with_4(self, classified):
        """K10: what loses more than was promised is refused, and says by how much; the report is there."""
        path = classified.path("compressed", "coarse.refused", "report.json")
        barely = {"epochs": 1, "batch_size": 64, "learning_rate": 1e-6}
        bare = {"kind": "prune", "sparsity": 0.97, "criterion": "random", "training": barely}
        coarse = recipe(members={"image": [bare]}, max_drop={"log_loss": 0.001})
        with pytest.raises(
            GateError, match=r"recipe coarse: log_loss must not get worse by more than 0.001 .* it did by"
        ):
            compress_run(classified, "coarse", coarse)
        assert json.loads(path.read_text())["gate"]["log_loss"]
        ended = run_tool("compress", classified.folder, "--recipe", "half", "--max-drop", "0.05", "--quiet")
        assert ended.code == 0 and "the promise on accuracy is kept" in ended.out

    def test_one_of_several_recipes_that_is_refused_stops_no_other(self, classified):
        """The tool ends with 4 and names it; what the others made is printed and kept."""
        ended = run_tool("compress", classified.folder, "--recipe", "packed", "--recipe", "half", "--quiet")
        assert ended.code == 4 and "1 of 2 recipes were refused. packed: " in ended.err
        assert "half" in ended.out and "packed" not in ended.out

    def test_what_a_member_is_too_small_for_is_told(self, classified):
        """Steps for all members leave alone those that they have nothing to do for, but never all of them."""
        found = compress_run(
            classified, "wide", recipe(steps=[{"kind": "dynamic_range"}], members={"image": [{"kind": "int8"}]})
        )
        assert "must find a kernel" in found["members"]["text"]["skipped"] and found["members"]["text"]["steps"] == []
        with pytest.raises(GateError, match=r"nothing of recipe none was of use: .*must find a kernel"):
            compress_run(classified, "none", recipe(steps=[{"kind": "dynamic_range"}], members={"image": []}))
        with pytest.raises(GateError, match="must find a kernel"):
            compress_run(classified, "named", recipe(members={"text": [{"kind": "dynamic_range"}]}))

    @pytest.mark.slow
    def test_the_whole_ensemble_becomes_one_student(self, classified):
        """M2: a small network learns what the fused members say, and answers alone: smaller than all of them."""
        step = {"kind": "distil", "student": {"kind": "cnn", "widths": [8, 8]}, "weight": 1.0}
        step["training"] = {"epochs": 6, "batch_size": 32, "learning_rate": 0.01}
        found = compress_run(classified, "fast", recipe(members={"image": [step]}, student="image"))
        own = found["members"]["image"]["after"]
        assert found["cost"]["after"]["bytes"] == own["bytes"]["tflite"] < 0.7 * found["cost"]["before"]["bytes"]
        assert found["members"]["text"]["steps"] == []
        assert found["figures"]["after"]["accuracy"]["value"] > 0.6
        with pytest.raises(ConfigError, match="must hold one of kind distil"):
            compress_run(classified, "wrong", recipe(steps=[{"kind": "float16"}], student="image"))

    def test_members_can_be_left_as_they_are(self, classified):
        """`members: {text: []}`: its float32 file is measured all the same."""
        found = compress_run(classified, "some", recipe(steps=[{"kind": "float16"}], members={"text": []}))
        assert found["members"]["text"]["steps"] == []
        assert found["members"]["text"]["after"]["bytes"] == found["members"]["text"]["before"]["bytes"]


@pytest.mark.slow
class TestRankings:
    def test_packed_tables_keep_the_lists(self, ranked):
        """L1, A5: a scoring model in 8 bits is smaller and ranks nearly alike; its file is what was measured."""
        found = compress_run(ranked, "packed", recipe_named("packed", {}), max_drop=0.05)
        assert found["cost"]["after"]["bytes"] < found["cost"]["before"]["bytes"]
        assert ranked.path("compressed", "packed", "core.tflite").stat().st_size == found["cost"]["after"]["bytes"]
        assert abs(found["differences"]["test"]["ndcg@10"]["difference"]) < 0.05
        assert found["gate"] == {"ndcg@10": ""}

    @pytest.mark.slow
    def test_an_encoder_is_compressed_and_embeds_the_catalogue_anew(self, ranked):
        """Its table is what the smaller encoder says, and lists are made of that."""
        found = compress_run(ranked, "encoder", recipe(members={"text": [{"kind": "dynamic_range"}]}))
        facts = found["members"]["text"]
        assert facts["after"]["metric"] == "cosine" and facts["after"]["quality"] > 0.98
        table = load_arrays(ranked.path("compressed", "encoder", "text", "table.npz"))["table"]
        lengths = np.linalg.norm(table, axis=1)
        assert ((np.abs(lengths - 1) < 1e-3) | (lengths == 0)).all() and (lengths > 0).mean() > 0.5

    def test_the_page_shows_it(self, ranked):
        """The section is written anew with each recipe."""
        compress_run(ranked, "again", recipe_named("packed", {}))
        text = ranked.path("report.html").read_text()
        assert ">packed<" in text and ">again<" in text


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "a recipe must have steps"),
        ({"members": {"imag": [{"kind": "float16"}]}}, "unknown member 'imag': did you mean 'image'"),
        ({"steps": [{"kind": "float16"}], "max_drop": {"acuracy": 0.1}}, "did you mean 'accuracy'"),
        ({"steps": [{"kind": "int9"}]}, "unknown compression method 'int9'"),
        ({"steps": [{"kind": "prune", "sparsity": 1.0}]}, "sparsity"),
    ],
)
def test_bad_recipes(settings, match):
    """One sentence each, before anything is trained."""
    with pytest.raises(ConfigError, match=match):
        parse_experiment({**CLASSES, "compress": {"bad": settings}})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--all", "--max-drop", "0.1"), "--max-drop goes with --recipe or --budget"),
        (("--recipe", "int8", "--max-drop=-0.1"), "must be a number from 0 on"),
        (("--recipe", "int8", "--max-drop", "nan"), "must be a number from 0 on"),
    ],
)
def test_promises_that_would_mean_nothing(arguments, sentence, tmp_path):
    ended = run_tool("compress", tmp_path, *arguments)
    assert ended.code == 2 and sentence in ended.err


class TestWhatStands:
    """What a recipe's folder holds, whatever becomes of later calls (K10)."""

    def test_only_what_keeps_its_promise_takes_the_place(self, classified, monkeypatch):
        """A recipe of the same name that breaks its promise goes aside, and every reader knows; a later one that keeps
        it takes both places."""
        good = recipe(steps=[{"kind": "float16"}])
        worse = recipe(steps=[{"kind": "float16"}], members={"text": []}, max_drop={"accuracy": 0.0})
        compress_run(classified, "mine", good)
        folder, refused = (classified.path("compressed", name) for name in ("mine", "mine.refused"))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        variant = json.loads(classified.path("report.json").read_text())["variants"]["mine"]
        with monkeypatch.context() as patch:
            patch.setattr(Compression, "_broken", lambda *_: "accuracy must not get worse.")
            with pytest.raises(GateError, match=r"recipe mine: accuracy must not get worse\. What is served stays"):
                compress_run(classified, "mine", worse)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert json.loads((refused / "report.json").read_text())["settings"]["members"] == {"text": []}
        assert (refused / "text" / "model.tflite").is_file()
        variants = json.loads(classified.path("report.json").read_text())["variants"]
        assert variants["mine"] == variant and "mine.refused" not in variants
        assert ">mine</th>" in (page := classified.path("report.html").read_text())
        assert ">mine (refused)</th>" in page
        with monkeypatch.context() as patch:
            patch.setattr(compression, "compress_task", None)
            with pytest.raises(GateError, match=r"export\.recipe: recipe mine: accuracy must not get worse\."):
                kept_promise(ClassificationTask(classified), "export.recipe", "mine", worse, "average")
        compress_run(classified, "mine", worse.model_copy(update={"max_drop": {}}))
        assert not refused.exists() and "mine (refused)" not in classified.path("report.html").read_text()

    def test_what_is_interrupted_changes_nothing(self, classified, monkeypatch):
        """Killed after the first member, the folder is as it was."""
        folder = classified.path("compressed", "half")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        def killed(self, *_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(Compression, "_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_run(classified, "half", recipe(steps=[{"kind": "float16"}], members={"text": []}))
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_a_search_changes_no_recipe(self, classified):
        """It asks what members say after each recipe; what lies under the recipes' names is not its to replace."""
        folder = classified.path("compressed", "half")
        before = {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
        other = recipe(steps=[{"kind": "float16"}], members={"text": []})
        options = compression_search._options(ClassificationTask(classified), {"half": other})
        assert set(options["image"]) == {"as it was", "half"} and set(options["text"]) == {"as it was"}
        assert {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()} == before

    def test_a_copy_takes_its_place_as_a_whole(self, tmp_path, monkeypatch):
        """Interrupted, the old files are there, all of them; without links the source stays whole, too."""
        for name in ("old", "new"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        keep_copy(tmp_path / "old", tmp_path / "kept")
        with monkeypatch.context() as patch:
            patch.setattr(fitting.shutil, "copytree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                keep_copy(tmp_path / "new", tmp_path / "kept")
        assert (tmp_path / "kept" / "file").read_text() == "old"

        def refused(*_, **__):
            raise OSError("no links here")

        monkeypatch.setattr(fitting.os, "link", refused)
        keep_copy(tmp_path / "new", tmp_path / "kept")
        assert (tmp_path / "kept" / "file").read_text() == "new" == (tmp_path / "new" / "file").read_text()
        assert {path.name for path in tmp_path.iterdir()} == {"old", "new", "kept"}

    def test_a_cell_is_of_the_code_that_made_it(self, tmp_path, monkeypatch):
        """Other sources of compression, another cell."""
        run, made_by = Run(tmp_path, None, quiet=True), []
        for version in ("one", "one", "other"):
            monkeypatch.setattr(compression, "compressing_version", lambda version=version: version)
            cell(run, "key", "name", 0, lambda *_, version=version: made_by.append(version))
        assert made_by == ["one", "other"]


class TestOneNumberOfAllRows:
    """Metrics such as AUC have no value for each row, so that their differences have no bounds."""

    @pytest.fixture
    def by_auc(self, classified):
        evaluation = {**CLASSES["evaluation"], "primary": "auc", "metrics": ["accuracy", "auc"]}
        return Run(classified.folder, parse_experiment({**CLASSES, "evaluation": evaluation}), quiet=True)

    def test_they_decide(self, by_auc):
        """K10: a promise on one is held to the plain difference, and everything can be shown."""
        found = compress_run(by_auc, "auc", recipe(steps=[{"kind": "float16"}]), 0.1)
        told = found["differences"]["validation"]["auc"]
        change = (found["validation"][when]["auc"]["value"] for when in ("after", "before"))
        assert told["low"] is None is told["high"] and told["difference"] == pytest.approx(next(change) - next(change))
        assert found["gate"] == {"auc": ""}
        assert found["figures"]["after"]["auc"]["n"] == 120
        assert "[" not in summary({"auc": found}).split("together: ")[1]
        assert overview({"auc": found}, {}).count("| auc") == 1

    @pytest.mark.slow
    def test_a_search_goes_by_them(self, by_auc):
        report, mixes = search_run(by_auc, {"half": recipe(steps=[{"kind": "float16"}])}, 10_000, 0.1)
        assert report["gate"] == {"auc": ""} and all(0.5 < mix.quality <= 1 for mix in mixes)

    def test_what_is_undefined_keeps_no_promise(self):
        assert difference_of(float("nan"), 0.5, 10, 0)["difference"] is None
        made = object.__new__(RankingCompression)
        assert "must be defined on the validation rows" in made._broken("auc", 1.0, {"auc": {"difference": None}})

    def test_rows_are_counted_without_one_that_has_them(self):
        made = object.__new__(RankingCompression)
        made.task = SimpleNamespace(rows=lambda part: np.arange(100 + part))
        assert made._rows("test", {"auc": 0.5, "accuracy": np.ones(7)}) == 7
        assert made._rows("test", {"auc": 0.5, "rmse": 0.5}) == 100 + compression.PARTS["test"]

    def test_what_was_not_measured_is_refused_before_work(self):
        """A metric that needs what the catalogue does not have has no value to hold a promise to."""
        made = object.__new__(RankingCompression)
        made.recipe = recipe(max_drop={"ndcg@10": 0.1, "diversity@10": 0.1})
        made.task = SimpleNamespace(catalogue=lambda: SimpleNamespace(vectors=None))
        with pytest.raises(ConfigError, match="'diversity@10' needs the vectors of the catalogue, which this run does"):
            made.check_promise()
        made.task = SimpleNamespace(catalogue=lambda: SimpleNamespace(vectors=np.ones((1, 1))))
        made.check_promise()


def test_the_picture_is_of_validation(monkeypatch):
    """Who chooses a recipe by it must not choose by the test part; reports that do not tell are of the test part."""

    def told(value, **more):
        part = {when: {"accuracy": {"value": number}} for when, number in (("before", 0.9), ("after", value))}
        return {"figures": {w: {"accuracy": {"value": 0.5}} for w in part}, "cost": costs, **more, "validation": part}

    costs = {"before": {"bytes": 40e6}, "after": {"bytes": 10e6}}
    reports = {"good": told(0.8), "bad": told(0.7)}
    drawn = []
    monkeypatch.setattr(compression_page.plots, "trade_off", lambda *arguments: drawn.append(arguments))
    compression_page.pareto(reports, "accuracy")
    spots, _, axis = drawn.pop()
    assert axis == "accuracy on validation"
    assert {spot.name: (spot.quality, spot.best) for spot in spots} == {
        "as it was": (0.9, True),
        "good": (0.8, True),
        "bad": (0.7, False),
    }
    del reports["bad"]["validation"]
    compression_page.pareto(reports, "accuracy")
    spots, _, axis = drawn.pop()
    assert axis == "accuracy on test" and {spot.quality for spot in spots} == {0.5}


@pytest.mark.parametrize(
    ("failing", "error", "match"),
    [
        ({"a": GateError}, GateError, "^a came to nothing$"),
        ({"b": ConfigError}, ConfigError, "^b came to nothing$"),
        ({"a": GateError, "b": ConfigError}, GateError, "recipes a, b of compress failed.* a: a came .* b: b came"),
    ],
)
def test_a_recipe_that_fails_stops_no_other_of_the_config(failing, error, match, monkeypatch):
    """O15: all are applied, and then the stage says which failed."""
    applied = []

    def compressed(task, name, recipe):
        applied.append(name)
        if name in failing:
            raise failing[name](f"{name} came to nothing")

    monkeypatch.setattr(compression, "compress_task", compressed)
    export = SimpleNamespace(enabled=False, recipe="", fast="")
    stages = SimpleNamespace(experiment=SimpleNamespace(export=export, compress=dict.fromkeys("abc")))
    with pytest.raises(error, match=match):
        Stages.compress(stages)
    assert applied == ["a", "b", "c"]


class TestPromiseOfAnExport:
    """What `kept_promise` lets through, on reports as other calls leave them (K10)."""

    REPORT = "compressed/half/report.json"

    @pytest.fixture
    def asked(self, classified, monkeypatch):
        """The names of recipes that were applied once more."""
        names = []

        def applied(task, name, recipe):
            names.append(name)
            return {**json.loads(classified.path(self.REPORT).read_text()), "settings": recipe.model_dump(mode="json")}

        monkeypatch.setattr(compression, "compress_task", applied)
        return names

    @pytest.fixture
    def task(self, classified):
        return ClassificationTask(classified)

    @pytest.fixture
    def half(self, classified):
        """The recipe of the config, and its report in a folder that is put back."""
        path = classified.path(self.REPORT)
        before = path.read_text()
        own = classified.experiment.compress["half"]
        own_report = {**json.loads(before), "settings": own.model_dump(mode="json"), "gate": {"accuracy": ""}}
        write_atomically(path, json.dumps(own_report))
        yield own
        write_atomically(path, before)

    def changed(self, run, **facts):
        path = run.path(self.REPORT)
        write_atomically(path, json.dumps({**json.loads(path.read_text()), **facts}))

    def test_what_was_judged_is_taken(self, classified, task, half, asked):
        report = kept_promise(task, "export.recipe", "half", half, "average")
        assert report["gate"] == {"accuracy": ""} and asked == []
        self.changed(classified, gate={"accuracy": "accuracy must not get worse by more."})
        with pytest.raises(
            GateError, match=r"export\.recipe: recipe half: accuracy must not get worse by more\. No art"
        ):
            kept_promise(task, "export.recipe", "half", half, "average")

    def test_a_promise_of_a_call_or_of_a_search_is_none_of_the_config(self, classified, task, half, asked):
        """Judged with a weaker promise, or with none as a search does it, a recipe is judged once more."""
        for promise in ({"accuracy": 1.0}, {}):
            self.changed(classified, settings={**half.model_dump(mode="json"), "max_drop": promise})
            kept_promise(task, "export.recipe", "half", half, "average")
        assert asked == ["half", "half"]
        bare = half.model_copy(update={"max_drop": {}})
        self.changed(classified, settings={**half.model_dump(mode="json"), "max_drop": {"accuracy": 0.1}})
        kept_promise(task, "export.recipe", "half", bare, "average")
        assert len(asked) == 2, "one that promises nothing keeps what its caller asked for"

    def test_what_other_code_judged_is_judged_anew(self, classified, task, half, asked, monkeypatch):
        """So is a report that does not say what it was made of."""
        monkeypatch.setattr(compression, "compressing_version", lambda: "other")
        kept_promise(task, "export.recipe", "half", half, "average")
        assert asked == ["half"]
        monkeypatch.undo()
        monkeypatch.setattr(compression, "compress_task", lambda *_: pytest.fail("it is of this code"))
        kept_promise(task, "export.recipe", "half", half, "average")

    def test_another_rule(self, classified, task, half, asked):
        self.changed(classified, served="image")
        kept_promise(task, "export.fast", "half", half, "average")
        assert asked == ["half"]
        with pytest.raises(
            ConfigError, match=r"'half' is with 'average', and 'image' is .* Leave export.rule or export.f"
        ):
            kept_promise(task, "export.fast", "half", half, "image")


def test_a_small_catalogue_has_items_to_judge_by(tmp_path):
    """Where every item stands in the training rows a third judges, and is not learned from."""
    table = np.eye(30, dtype=np.float32)
    encoder = SimpleNamespace(prepare=lambda values, **_: {"x": values})
    member = SimpleNamespace(encoder=encoder, table=table, speaks=np.ones(30, bool))
    made = object.__new__(RankingCompression)
    interactions = SimpleNamespace(matrix=lambda _: sparse.csr_matrix(np.ones((1, 30))))
    made.task = SimpleNamespace(
        fitted={"text": SimpleNamespace(member=member)}, parts=np.zeros(1), interactions=interactions
    )
    data = made._data("text", table, RunOptions(0, tmp_path, quiet=True))
    np.testing.assert_array_equal(data.judge(lambda features: features["x"]), np.ones(10))
    assert data.rows.n == 20


@pytest.mark.slow
def test_all_recipes_side_by_side(classified):
    """A5, K10: one that has nothing to do and one that breaks its promise stop no other; cells are not made twice."""
    lost = {"kind": "prune", "criterion": "random", "sparsity": 0.9, "training": {"epochs": 1, "learning_rate": 1e-6}}
    recipes = {
        "float16": recipe(steps=[{"kind": "float16"}]),
        "packed": recipe(tables={"bits": 8}),
        "strict": recipe(steps=[lost], max_drop={"log_loss": 0.0}),
    }
    reports, refused = compress_all(classified, recipes)
    assert set(reports) == {"float16", "strict"} and set(refused) == {"packed", "strict"}
    made = {path: path.stat().st_mtime_ns for path in classified.path("compressed", ".cells").glob("*/report.json")}
    assert compress_all(classified, recipes) == (reports, refused)
    assert made == {
        path: path.stat().st_mtime_ns for path in classified.path("compressed", ".cells").glob("*/report.json")
    }
    lines = overview(reports, refused).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["recipe", "image", "text", "together"]
    assert lines[2].startswith("| float16") and lines[3].rstrip().endswith("(refused) |")
    assert lines[4].startswith("packed: ") and "log_loss must not get worse" in lines[5]


def test_recipes_that_are_built_in_can_be_read():
    """Each names methods that exist, with settings that they have."""
    for name in BUILT_IN:
        assert recipe_named(name, {}).steps or recipe_named(name, {}).tables
    with pytest.raises(ConfigError, match="unknown recipe 'in8': did you mean 'int8'"):
        recipe_named("in8", {})


@pytest.mark.slow
class TestSearch:
    def test_the_mix_fits_and_keeps_its_promise(self, classified):
        """K10, A5: within the budget, one recipe for each member; mixes that others beat are not told."""
        sizes = json.loads(classified.path("compressed", "half", "report.json").read_text())["cost"]
        budget = (sizes["before"]["bytes"] + sizes["after"]["bytes"]) // 2
        recipes = {"half": recipe(steps=[{"kind": "float16"}]), "whole": recipe(steps=[{"kind": "int8"}])}
        report, mixes = search_run(classified, recipes, budget, 0.05)
        assert report["cost"]["after"]["bytes"] <= budget
        assert set(report["settings"]["members"]) == {"image", "text"}
        assert [mix.bytes for mix in mixes] == sorted(mix.bytes for mix in mixes)
        qualities = [mix.quality for mix in mixes]
        assert qualities == sorted(qualities) and len(set(qualities)) == len(qualities)

    def test_what_cannot_be_had_is_refused(self, classified):
        """A budget below the smallest mix, and one that needs nothing."""
        recipes = {"half": recipe(steps=[{"kind": "float16"}])}
        with pytest.raises(GateError, match=r"must fit into 100 bytes; the smallest mix of these recipes has"):
            search_run(classified, recipes, 100, 0.05)
        ended = run_tool("compress", classified.folder, "--budget", "lots", "--max-drop", "0.1")
        assert ended.code == 2 and "as in 5MB" in ended.err

    def test_rankings_choose_among_recipes(self, ranked):
        """The scoring model is one file: the recipe with the best lists that fits."""
        report, mixes = search_run(ranked, {"packed": recipe_named("packed", {})}, 10**9, 0.2)
        assert report["recipe"] == "packed" and mixes[0].recipes == {"all": "packed"}
        assert {mix.recipes["all"] for mix in mixes} <= {"packed", "as it was"}
        assert mixes[0].quality == report["validation"]["after"]["ndcg@10"]["value"]


def test_a_recipe_of_no_use_ends_no_search_of_rankings(monkeypatch):
    """A5: one that changes nothing is left out; where all are, it is said. What is told of mixes are values on
    validation, and what is served as it was is one of them."""

    def compressed(task, name, recipe):
        if name == "useless":
            raise GateError("it changes nothing.")
        found = {when: {"ndcg@10": {"value": value}} for when, value in (("before", 0.301), ("after", 0.3))}
        return {"recipe": name, "validation": found, "cost": {"before": {"bytes": 40}, "after": {"bytes": 10}}}

    monkeypatch.setattr(compression_search, "compress_task", compressed)
    task = SimpleNamespace(
        OVER="candidates", experiment=SimpleNamespace(primary="ndcg@10"), run=SimpleNamespace(quiet=True)
    )
    report, mixes = search(task, {"useless": recipe(), "packed": recipe()}, 100, 0.01)
    assert report["recipe"] == "packed"
    assert mixes == [Mix({"all": "packed"}, 10, 0.3), Mix({"all": "as it was"}, 40, 0.301)]
    with pytest.raises(GateError, match=r"lose at most 0\.0001 of ndcg@10"):
        search(task, {"packed": recipe()}, 100, 0.0001)
    with pytest.raises(GateError, match="must have a recipe that is of use; none of useless is"):
        search(task, {"useless": recipe()}, 100, 0.01)


def test_a_student_of_all_members_is_in_no_mix():
    """Mixed with others, it would be taught by other members than those it was judged with."""
    step = {"kind": "distil", "student": {"kind": "dense"}}
    student = recipe(members={"image": [step]}, student="image")
    with pytest.raises(ConfigError, match=r"'small' makes one student of all of them\. Leave it out"):
        search(SimpleNamespace(OVER="classes"), {"small": student}, 100, 0.1)


def test_fewer_bytes_are_bought_where_they_cost_least():
    """By hand: two members; the second loses nothing in the smaller form."""
    options = {"a": {"big": (10, 0.0), "small": (4, 0.2)}, "b": {"big": (10, 0.0), "small": (5, 0.0)}}

    def judged(chosen):
        size, lost = (sum(options[member][name][place] for member, name in chosen.items()) for place in (0, 1))
        return Mix(dict(chosen), size, 1.0 - lost)

    first = judged({"a": "big", "b": "big"})
    assert reduced(first, options, judged, 16, 1.0).recipes == {"a": "big", "b": "small"}
    assert reduced(first, options, judged, 10, 1.0).recipes == {"a": "small", "b": "small"}
    worse = judged({"a": "small", "b": "big"})
    assert improved(worse, options, judged, 16, 1.0).recipes == {"a": "big", "b": "small"}
    assert [mix.bytes for mix in front([first, worse, judged({"a": "big", "b": "small"})], 1.0)] == [14, 15]
