"""`recsys.Recommender`: fit, evaluate, recommend, export and load from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recsys
from fusion.errors import DataError

CONFIG: dict[str, Any] = {
    "name": "api",
    "data": {"kind": "planted", "users": 60, "items": 40},
    "split": {"strategy": "random"},
    "members": {"popularity": {"kind": "popularity"}, "ease": {"kind": "ease", "l2": 10}},
    "rules": {"average": {"kind": "average"}},
    "evaluation": {"metrics": ["ndcg@10"], "samples": 100, "examples": 1},
    "export": {"tflite": False, "k_max": 20},
}


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> recsys.Recommender:
    return recsys.Recommender.fit(CONFIG, tmp_path_factory.mktemp("runs"), quiet=True)


def test_lists_for_users_and_visitors(recommender: recsys.Recommender) -> None:
    """A known user gets unseen items; a visitor's list depends on what was liked."""
    liked = recommender.recommend(user_ids=["u01"], k=3)["item_id"].tolist()
    first = recommender.recommend(histories=[liked, []], k=5)
    assert first.groupby("row").size().tolist() == [5, 5]
    assert set(first[first.row == 0].item_id).isdisjoint(liked)
    assert first[first.row == 0].item_id.tolist() != first[first.row == 1].item_id.tolist()


def test_contributions_sum_to_the_score(recommender: recsys.Recommender) -> None:
    """A7: the members' columns add up to the score, and scores fall with the rank."""
    table = recommender.recommend(user_ids=["u01", "u02"], k=8)
    np.testing.assert_allclose(table["popularity"] + table["ease"], table["score"], atol=1e-5)
    assert all(rows.score.is_monotonic_decreasing for _, rows in table.groupby("row"))


def test_an_answer_is_explained(recommender: recsys.Recommender) -> None:
    """A7: score and shares are those of `recommend`; EASE's reasons are liked items; errors name what is wrong."""
    asked = {"u01": recommender.recommend(user_ids=["u01"], k=2), "": recommender.recommend(histories=[["i03", "i05"]])}
    for user, table in asked.items():
        first = table.iloc[0]
        given: dict[str, Any] = {"user_id": user} if user else {"history": ["i05", "no such item", "i03", "i05"]}
        why = recommender.explain(first.item_id, **given)
        assert why.item_id == first.item_id and why.score == pytest.approx(first.score, abs=1e-5)
        assert why.shares == {name: pytest.approx(first[name], abs=1e-5) for name in ("popularity", "ease")}
        assert set(why.liked_by_member) <= {"ease"} and not why.words and not why.regions
        named = {liked.item_id for liked in (*why.liked, *why.liked_by_member.get("ease", ()))}
        assert named and (user or named <= {"i03", "i05"})
    with pytest.raises(DataError, match="either a user_id or a history"):
        recommender.explain("i01")
    with pytest.raises(DataError, match="'nothing' is not in the catalogue"):
        recommender.explain("nothing", history=["i03"])
    with pytest.raises(DataError, match="'nobody' is not known"):
        recommender.explain("i01", user_id="nobody")


def test_exclude_and_include(recommender: recsys.Recommender) -> None:
    """Filters hold for every row."""
    items = recommender.recommend(histories=[["i01"]], k=6)["item_id"].tolist()
    assert items[0] not in recommender.recommend(histories=[["i01"]], k=6, exclude=items[:1])["item_id"].tolist()
    assert recommender.recommend(histories=[["i01"]], k=6, include=items[3:5])["item_id"].tolist() == items[3:5]


def test_an_unknown_user_is_named(recommender: recsys.Recommender) -> None:
    """No list is made up for somebody who is not known."""
    with pytest.raises(DataError, match="'nobody' is not known"):
        recommender.recommend(user_ids=["u01", "nobody"])


def test_load_export_and_publish(recommender: recsys.Recommender, tmp_path: Path) -> None:
    """O9: a loaded experiment answers the same, and publishes numbered versions."""
    again = recsys.Recommender.load(recommender.run.folder)
    asked: dict[str, Any] = {"histories": [["i03", "i05"]], "k": 4}
    assert again.recommend(**asked).equals(recommender.recommend(**asked))
    assert again.evaluate()["best_rule"] == "average"
    assert again.export(models=tmp_path / "models") == tmp_path / "models" / "api" / "1"
    assert again.recommend(**asked)["item_id"].tolist() == recommender.recommend(**asked)["item_id"].tolist()
