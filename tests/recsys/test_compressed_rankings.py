"""What recipes of rankings are judged by, where members are refitted before the test, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fusion.config import parse
from fusion.errors import ConfigError, GateError
from fusion.types import RunOptions
from recsys.collaborative.content import read_items
from recsys.compressed_rankings import JUDGED, RankingCompression, dealt
from recsys.compression import compress_run
from recsys.evaluation import question
from recsys.metrics import parse_metric
from recsys.pipeline import run_experiment
from recsys.ranking_task import RankingTask
from recsys.recipes import Recipe
from recsys.results import values_of
from recsys.run import Run
from recsys.schema import VALIDATION
from recsys.settings import parse_experiment

pytestmark = pytest.mark.usefixtures("short_clocks")

CONFIG: dict[str, Any] = {
    "name": "planted",
    "seed": 1,
    "data": {"kind": "planted", "users": 120, "items": 60, "noise": 0.2, "seed": 1, "image_size": 8},
    "members": {"ease": {"kind": "ease", "l2": 20.0}, "ials": {"kind": "ials", "factors": 8}},
    "rules": {"average": {"kind": "average"}},
    "evaluation": {"samples": 100, "metrics": ["ndcg@10"], "examples": 0, "never_worse": False, "refit": True},
    "export": {"enabled": False},
}
PACKED = parse(Recipe, {"tables": {"bits": 8}})
WORDS = {"kind": "content", "columns": ["text"], "encoder": {"kind": "text_tfidf", "dimensions": 8}, "scorer": "cosine"}


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A member that packs, and one whose encoder reads other words once it is fitted with the validation rows."""
    members = {"ease": CONFIG["members"]["ease"], "text": WORDS}
    config = {**CONFIG, "members": members, "data": {**CONFIG["data"], "items": 90}}
    return run_experiment(parse_experiment(config), tmp_path_factory.mktemp("worded"), quiet=True)


def test_validation_asks_members_that_have_not_seen_it(tmp_path):
    """K7: members that were refitted with the validation rows would say that everything is well."""
    task = RankingTask(run_experiment(parse_experiment(CONFIG), tmp_path, quiet=True))
    compression = RankingCompression(task, "packed", PACKED)
    compression.members()
    before = compression.values("validation", after=False)["ndcg@10"]
    asked = question(task.interactions, task.parts, VALIDATION)
    lists = task.ranker({"rule": compression.rule}, VALIDATION)(asked, lambda done: None).lists
    own = values_of(lists, [parse_metric("ndcg@10", "candidates")], task.catalogue())["rule"]["ndcg@10"]
    np.testing.assert_allclose(before, own, atol=1e-6)
    assert np.nanmean(before) < np.nanmean(
        RefittedCompression(task, "leak", PACKED).values("validation", after=False)["ndcg@10"]
    )


class RefittedCompression(RankingCompression):
    """What must not be asked: members that know the validation rows."""

    def _before(self):
        return {name: self.task.test_members[name] for name in self.rule.members}


def test_packing_where_there_is_no_table_is_refused(tmp_path):
    """K1: a method that changes nothing is an error, and not a success."""
    members = {"popularity": {"kind": "popularity"}, "other": {"kind": "popularity"}}
    run = run_experiment(parse_experiment({**CONFIG, "members": members}), tmp_path, quiet=True)
    with pytest.raises(GateError, match=r"it packs tables, and the members that are served .* score by none"):
        compress_run(run, "packed", PACKED)


@pytest.mark.parametrize(
    "settings",
    [
        {"members": {"text": [{"kind": "float16"}]}, "tables": {"bits": 8}},
        {"student": {"factors": 4, "parts": 1, "training": {"epochs": 1, "batch_size": 32}}},
    ],
    ids=["members", "student"],
)
def test_the_test_asks_the_members_that_the_run_asked(worded, settings):
    """Before and after are of refitted members there, as all other figures of the run's report; the promise is judged
    by the others."""
    recipe = parse(Recipe, settings)
    found = compress_run(worded, "both", recipe)
    served = json.loads(worded.path("report.json").read_text())["rules"]["average"]["ndcg@10"]["value"]
    assert found["figures"]["before"]["ndcg@10"]["value"] == pytest.approx(served, abs=1e-6)
    task = RankingTask(worded)
    compression = RankingCompression(task, "both", recipe)
    compression.members()
    tested = compression._tested
    assert tested.task.fitted["text"].member is task.test_members["text"]
    own, refitted = (of.core(after=True)(np.arange(5, dtype=np.int32)[None]).numpy() for of in (compression, tested))
    assert np.abs(own - refitted).max() > 1e-3, "made of the same members"
    after = tested._measured("test", tested._ranker(after=True))["ndcg@10"]
    assert found["figures"]["after"]["ndcg@10"]["value"] == pytest.approx(np.nanmean(after), abs=1e-6)


def test_steps_without_effect_are_refused_beside_tables(worded):
    """K1: packed tables do not make up for a method that changes nothing."""
    settings = {"members": {"text": []}, "steps": [{"kind": "float16"}], "tables": {"bits": 8}}
    with pytest.raises(GateError, match=r"nothing of recipe both was of use: it has no steps for the members\."):
        RankingCompression(RankingTask(worded), "both", parse(Recipe, settings)).members()


def test_an_encoder_is_judged_by_what_it_said_itself(worded, tmp_path):
    """Judge, target and encoder are of one member; uncompressed it agrees with itself, whoever was refitted."""
    task = RankingTask(worded)
    member, other = task.fitted["text"].member, task.test_members["text"]
    values, _ = read_items(member.encoder, member.config.columns, task.interactions.catalogue)
    data = RankingCompression(task, "itself", PACKED)._data("text", values, RunOptions(1, tmp_path, quiet=True))
    own, refitted = (data.judge(lambda given, by=by: by.encoder.encoder()(given).numpy()) for by in (member, other))
    np.testing.assert_allclose(own, 1.0, atol=1e-5)
    assert refitted.mean() < 0.999, "the two members are the same: nothing was tested"


def test_a_student_cuts_no_lists_of_neighbours(worded):
    """`mass` beside a student would do nothing: one sentence, before anything is learned."""
    recipe = parse(Recipe, {"student": {"factors": 4}, "tables": {"bits": 8, "mass": 0.65}})
    with pytest.raises(ConfigError, match=r"tables\.mass must be left out of recipe fast: .* received 0\.65"):
        RankingCompression(RankingTask(worded), "fast", recipe).members()


@pytest.mark.parametrize(
    ("warm", "cold", "expected"),
    [
        (900, 500, (900, 0)),
        (900, 1, (601, 299)),
        (900, 0, (600, 300)),
        (60, 1, (40, 20)),
        (60, 0, (40, 20)),
    ],
)
def test_an_encoder_is_judged_by_items_that_it_did_not_learn_from(warm, cold, expected):
    """Enough of them: those that nobody took, and of training items at most a third, which are then not trained on."""
    counts = np.concatenate([np.ones(warm + 5), np.zeros(cold + 5)])
    speaks = np.ones(len(counts), bool)
    speaks[[*range(5), *range(-5, 0)]] = False
    train, judged = dealt(speaks, counts, np.random.default_rng(0))
    assert not set(train) & set(judged) and speaks[train].all() and speaks[judged].all() and (counts[train] > 0).all()
    assert (len(train), int((counts[judged] > 0).sum())) == expected
    assert len(judged) == len(set(judged)) == min(JUDGED, cold + warm // 3)


def test_of_a_single_item_both_are_the_same():
    train, judged = dealt(np.array([True]), np.array([1]), np.random.default_rng(0))
    assert list(train) == list(judged) == [0]
