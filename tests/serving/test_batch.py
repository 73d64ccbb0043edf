"""Batch jobs: the same answers as one by one, whole files only."""

import os

import pyarrow.parquet as pq
import pytest

from serving.batch import recommend_all
from serving.errors import InvalidRequest, ServingError
from serving.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(artifact):
    return Predictor.load(artifact)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_equals_single_answers(predictor, tmp_path, block):
    """O16: every known user once, in order, whatever the block; unknown ones are named."""
    seen = []
    users = ["u0", "nobody", "u 2", "u1"]
    summary = recommend_all(predictor, users, 3, tmp_path / "recs.parquet", block, lambda *done: seen.append(done))
    table = pq.read_table(tmp_path / "recs.parquet").to_pandas()
    assert list(table) == ["user_id", "rank", "item_id", "score", "contribution_place", "contribution_history"]
    assert (summary.rows, summary.users, summary.unknown_users) == (9, 3, ("nobody",)) and len(table) == 9
    assert table.user_id.tolist() == [user for user in ("u0", "u 2", "u1") for _ in range(3)]
    for user, rows in table.groupby("user_id"):
        answer = predictor.recommend(user_ids=[user], k=3)
        assert rows.item_id.tolist() == [item.decode() for item in answer["item_ids"][0]]
        assert rows["rank"].tolist() == [1, 2, 3]
        assert rows.score.tolist() == (rows.contribution_place + rows.contribution_history).tolist()
    assert seen[-1] == (4, 4) and len(seen) == -(-4 // block)
    assert os.listdir(tmp_path) == ["recs.parquet"]


def test_a_job_that_stops_leaves_the_old_file(predictor, tmp_path):
    path = tmp_path / "recs.parquet"
    path.write_text("old")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recommend_all(predictor, ["u0", "u1"], 3, path, 1, stop)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["recs.parquet"]


def test_bad_lists_of_users_and_folders_are_refused(predictor, tmp_path):
    for users in ([], ["u0", "u0"]):
        with pytest.raises(InvalidRequest, match="each id once"):
            recommend_all(predictor, users, 3, tmp_path / "recs.parquet")
    with pytest.raises(ServingError, match="must be writable"):
        recommend_all(predictor, ["u0"], 3, tmp_path / "missing" / "recs.parquet")
