"""What recipes are judged by, where members are refitted before the test, and where there is nothing to pack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusion.config import parse
from fusion.errors import GateError
from recsys.compressed_rankings import RankingCompression
from recsys.compression import compress_run
from recsys.evaluation import question
from recsys.metrics import parse_metric
from recsys.pipeline import run_experiment
from recsys.ranking_task import RankingTask
from recsys.recipes import Recipe
from recsys.results import values_of
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
