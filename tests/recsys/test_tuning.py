"""Settings chosen on validation, presets, and members fitted again before the test."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fusion.config import Part
from fusion.errors import ConfigError
from recsys.pipeline import run_experiment
from recsys.presets import preset_names, with_preset
from recsys.ranking_task import RankingTask
from recsys.run import Run
from recsys.schema import TRAIN, VALIDATION
from recsys.settings import parse_experiment
from recsys.tuning import tune, with_setting
from worlds import member_part

EASE = {"kind": "ease", "l2": 100.0, "neighbours": 50}


def small(members: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {
        "name": "tuned",
        "data": {"kind": "planted", "users": 60, "items": 40, "interactions_per_user": 10},
        "members": members,
        "rules": {"average": {"kind": "average"}},
        "evaluation": {"samples": 100, "metrics": ["ndcg@10"], "examples": 0, "refit": True},
        "export": {"enabled": False},
        **settings,
    }


def test_one_key_after_the_other() -> None:
    """The best value of a key is kept for the next one, nothing is fitted twice, and equals keep the first."""
    asked: list[tuple[float, int]] = []

    def measure(part: Part) -> float:
        asked.append((part.config.l2, part.config.neighbours))
        return -abs(part.config.l2 - 30.0)

    grid = {"l2": [10.0, 40.0, 100.0], "neighbours": [50, 20]}
    best, trials = tune("ease", member_part(EASE), grid, measure, True)
    assert (best.config.l2, best.config.neighbours) == (40.0, 50)
    assert asked == [(10.0, 50), (40.0, 50), (100.0, 50), (40.0, 20)]
    assert [(trial.key, trial.value, trial.metric) for trial in trials][3] == ("neighbours", 50, -10.0)
    worst, _ = tune("ease", member_part(EASE), grid, measure, False)
    assert worst.config.l2 == 100.0


def test_an_undefined_figure_never_wins() -> None:
    values = {10.0: np.nan, 20.0: 0.1}
    best, _ = tune("ease", member_part(EASE), {"l2": [10.0, 20.0]}, lambda part: values[part.config.l2], True)
    assert best.config.l2 == 20.0


def test_a_key_within_a_part() -> None:
    part = member_part({"kind": "matrix_factorization"})
    assert with_setting(part, "training.epochs", 3, "x").config.training.epochs == 3


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"eese": {"l2": [1.0]}}, "unknown member 'eese'.*did you mean 'ease'"),
        ({"ease": {"l3": [1.0]}}, r"unknown key 'tuning\.ease\.l3'.*known are "),
        ({"ease": {"l2": [-1.0]}}, r"tuning\.ease\.l2.*greater than 0.*received -1"),
        ({"ease": {"l2": []}}, r"tuning\.ease\.l2 must list at least one value"),
    ],
)
def test_what_cannot_be_tried_is_refused(tuning: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_experiment(small({"ease": EASE}, tuning=tuning))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    members = {"ease": EASE, "popularity": {"kind": "popularity"}}
    config = small(members, tuning={"ease": {"l2": [1.0, 30.0, 100_000.0]}})
    return run_experiment(parse_experiment(config), tmp_path_factory.mktemp("tuned"), quiet=True)


def report_of(run: Run) -> dict[str, Any]:
    return json.loads(run.path("report.json").read_text(encoding="utf-8"))


class TestTunedRun:
    def test_the_best_value_is_used_everywhere(self, tuned: Run) -> None:
        task = RankingTask(Run.open(tuned.folder))
        trials = report_of(tuned)["tuning"]["ease"]
        chosen = max(trials, key=lambda trial: trial["metric"])["value"]
        assert [trial["value"] for trial in trials] == [1.0, 30.0, 100_000.0]
        assert len({trial["metric"] for trial in trials}) > 1
        assert task.fitted["ease"].part.config.l2 == task.recipes["ease"].config.l2 == chosen
        assert json.loads(tuned.path("submodels", "ease", "member.json").read_text())["config"]["l2"] == chosen

    def test_members_of_the_test_have_seen_validation_and_nothing_more(self, tuned: Run) -> None:
        task = RankingTask(tuned)
        data = task.interactions
        rows = np.isin(task.parts, (TRAIN, VALIDATION)) & data.positive
        counts = np.bincount(data.items[rows], minlength=data.shape[1])
        np.testing.assert_array_equal(task.catalogue().popularity, counts)
        np.testing.assert_array_equal(task.test_members["popularity"].speaks, counts > 0)
        assert report_of(tuned)["split"]["members_of_test_fitted_on"] == "train + validation"
        trained = np.bincount(data.items[(task.parts == TRAIN) & data.positive], minlength=data.shape[1])
        np.testing.assert_array_equal(task.fitted["popularity"].member.speaks, trained > 0)


class TestPresets:
    def test_the_config_wins_and_null_removes(self) -> None:
        base = with_preset({"collaborative": "best"})
        config = {"collaborative": "best", "members": {"popularity": None, "mine": EASE}, "seed": 4}
        merged = with_preset(config)
        assert set(merged["members"]) == set(base["members"]) - {"popularity"} | {"mine"}
        assert merged["rules"] == base["rules"] and merged["seed"] == 4

    @pytest.mark.parametrize("name", preset_names())
    def test_every_preset_is_a_valid_experiment(self, name: str) -> None:
        experiment = parse_experiment({"name": "x", "data": {"kind": "long_tail"}, "collaborative": name})
        assert experiment.collaborative == name and len(experiment.members) > 2

    def test_an_unknown_preset_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown preset 'bset'.*did you mean 'best'"):
            parse_experiment(small({}, collaborative="bset"))
