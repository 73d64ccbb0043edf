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
from recsys import compression, compression_search
from recsys.classification_task import ClassificationTask
from recsys.compressed_rankings import RankingCompression
from recsys.compression import compress_all, compress_run, kept_promise
from recsys.compression_search import Mix, front, improved, reduced, search, search_run
from recsys.compression_summary import overview
from recsys.pipeline import run_experiment
from recsys.recipes import BUILT_IN, Recipe, recipe_named
from recsys.run import Run
from recsys.settings import parse_experiment

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
        path = classified.path("compressed", "coarse", "report.json")
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

    def test_another_rule(self, classified, task, half, asked):
        self.changed(classified, served="image")
        kept_promise(task, "export.fast", "half", half, "average")
        assert asked == ["half"]
        with pytest.raises(
            ConfigError, match=r"'half' is with 'average', and 'image' is .* Leave export.rule or export.f"
        ):
            kept_promise(task, "export.fast", "half", half, "image")


def test_a_small_catalogue_has_items_to_judge_by(tmp_path):
    """Where every item was learned from and none is left of those that ranges are read from, some count for both."""
    table = np.eye(30, dtype=np.float32)
    encoder = SimpleNamespace(prepare=lambda values, **_: {"x": values})
    member = SimpleNamespace(encoder=encoder, table=table, speaks=np.ones(30, bool))
    made = object.__new__(RankingCompression)
    interactions = SimpleNamespace(matrix=lambda _: sparse.csr_matrix(np.ones((1, 30))))
    made.task = SimpleNamespace(
        fitted={"text": SimpleNamespace(member=member)}, parts=np.zeros(1), interactions=interactions
    )
    data = made._data("text", table, RunOptions(0, tmp_path, quiet=True))
    np.testing.assert_array_equal(data.judge(lambda features: features["x"]), np.ones(30))


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
        assert report["recipe"] == "packed" and len(mixes) == 1


def test_a_recipe_of_no_use_ends_no_search_of_rankings(monkeypatch):
    """A5: one that changes nothing is left out; where all are, it is said."""

    def compressed(task, name, recipe):
        if name == "useless":
            raise GateError("it changes nothing.")
        difference = {"validation": {"ndcg@10": {"difference": -0.001}}}
        return {"recipe": name, "differences": difference, "cost": {"after": {"bytes": 10}}}

    monkeypatch.setattr(compression_search, "compress_task", compressed)
    task = SimpleNamespace(
        OVER="candidates", experiment=SimpleNamespace(primary="ndcg@10"), run=SimpleNamespace(quiet=True)
    )
    report, mixes = search(task, {"useless": recipe(), "packed": recipe()}, 100, 0.01)
    assert report["recipe"] == "packed" and [mix.recipes for mix in mixes] == [{"all": "packed"}]
    with pytest.raises(GateError, match="must have a recipe that is of use; none of useless is"):
        search(task, {"useless": recipe()}, 100, 0.01)


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
