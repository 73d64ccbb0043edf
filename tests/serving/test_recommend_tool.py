"""`tools/recommend.py` over the toy artifact: tables, JSON, batch files, and what unknown ids get."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def recommend(monkeypatch, capsys, artifact):
    """Runs the tool in this process: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(TOOLS))
    tool, cli = importlib.import_module("recommend"), importlib.import_module("cli")

    def call(*arguments, source=artifact):
        monkeypatch.setattr(sys, "argv", ["recommend.py", str(source), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.run(tool.main)
        return (end.value.code, *capsys.readouterr())

    return call


def test_table_has_titles_scores_and_contributions(recommend):
    """A7: the contribution of every member stands beside the score."""
    code, out, _ = recommend("--user", "u0", "-k", "3")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0] == ["rank", "item_id", "title", "score", "place", "history"]
    assert lines[1] == ["1", "i1", "One", "[bold]", "9.000", "-1.000", "+10.000"]
    assert lines[2] == ["2", "i2", "-2.000", "-2.000", "+0.000"] and len(lines) == 4


def test_json_history_exclude_and_include(recommend):
    code, out, err = recommend("--history", "i0,nothing", "--exclude", "i1", "--include", "i1,i3,ä ö", "--json")
    answer = json.loads(out)
    assert code == 0 and [row["item_id"] for row in answer["items"]] == ["i3", "ä ö"]
    assert answer["known_user"] is False and answer["items"][0]["contributions"] == {"place": -3.0, "history": 0.0}
    assert "not in the catalogue, so without effect: nothing" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("--user", "nobody"), "'nobody' is not known"), (("--history", "x,y"), "none of the items of --history")],
)
def test_unknown_users_and_histories_end_with_3(recommend, arguments, sentence):
    code, out, err = recommend(*arguments)
    assert (code, out) == (3, "") and sentence in err and "--history ID,ID" in err


def test_an_unknown_user_with_a_history_is_answered(recommend):
    code, out, err = recommend("--user", "nobody", "--history", "i0", "-k", "1")
    assert code == 0 and "One" in out and "answered from --history alone" in err


def test_all_users_go_to_a_file(recommend, tmp_path):
    """O16"""
    code, out, _ = recommend("--all", "--out", str(tmp_path / "recs.parquet"), "-k", "2", "--json")
    assert code == 0 and json.loads(out)["rows"] == 6
    assert pq.read_table(tmp_path / "recs.parquet").num_rows == 6


def test_a_folder_of_shards_is_continued_and_not_mixed_up(recommend, tmp_path):
    """O16: run again, it is done; asked for something else, it is refused; unknown users are named."""
    (tmp_path / "users.txt").write_text("u0\nnobody\nu1\n")
    out = ("--all", "--out", str(tmp_path / "recs"), "--users", str(tmp_path / "users.txt"), "--shard-users", "2")
    for _ in range(2):
        code, text, err = recommend(*out, "-k", "2", "--filter", "title=Three,Four", "--json")
        told = json.loads(text)
        assert code == 0 and (told["rows"], told["users"], told["unknown_users"]) == (4, 2, 1)
        assert "1 users are not known, so without a list: nobody" in err and "recommend" in err
    table = pq.read_table(tmp_path / "recs").to_pandas()
    assert table.item_id.tolist() == ["i3", "i4"] * 2 and table.user_id.tolist() == ["u0", "u0", "u1", "u1"]
    code, _, err = recommend(*out, "-k", "3", "--filter", "title=Three,Four")
    assert code == 2 and "holds another job, whose 'request' is" in err
    (tmp_path / "flat").write_text("")
    code, _, err = recommend("--all", "--out", str(tmp_path / "flat" / "recs"), "-k", "2")
    assert code == 5 and "must be writable" in err


def test_filters_of_one_column_are_taken_together(recommend, tmp_path):
    out = ("--all", "--out", str(tmp_path / "recs.parquet"), "-k", "2")
    assert recommend(*out, "--filter", "title=Three", "--filter", "title=Four")[0] == 0
    assert set(pq.read_table(tmp_path / "recs.parquet").to_pandas().item_id) == {"i3", "i4"}


@pytest.mark.parametrize("k", ["0", "-5", "99"])
@pytest.mark.parametrize("more", [(), ("--diversity", "0.5")])
def test_a_k_out_of_range_claims_no_folder(recommend, tmp_path, k, more):
    """O16: the sentence is that of an answer online."""
    code, _, err = recommend("--all", "--out", str(tmp_path / "recs"), "-k", k, *more)
    assert code == 2 and f"'k' must be between 1 and 4; received {k}." in err
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_an_id_is_refused(recommend, tmp_path):
    users = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": ["u0", None]}), users)
    code, _, err = recommend("--all", "--out", str(tmp_path / "recs"), "--users", str(users))
    assert code == 2 and f"{users} is not: a row has no user_id" in err and not (tmp_path / "recs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--like-item", "i1", "--exclude", "i2"), "--exclude and --include go with"),
        (("--like-text", "x", "--include", "i2"), "--exclude and --include go with"),
        (("--user", "u0", "--member", "text"), "--member goes with --like-text or --like-image"),
        (("--all", "--out", "x", "--member", "text"), "--member goes with --like-text or --like-image"),
        (("--like-item", "i1", "--member", "text"), "--member goes with --like-text or --like-image"),
        (("--all", "--out", "x", "--beam-option=--runner=X"), "--beam-option goes with --engine beam"),
    ],
)
def test_options_that_would_do_nothing_are_refused(recommend, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, _, err = recommend(*arguments)
    assert code == 2 and sentence in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["users.txt", "users.parquet"])
def test_a_file_without_users_is_refused(recommend, tmp_path, name):
    """Neither text nor Parquet: one sentence that names it."""
    (tmp_path / name).write_bytes(b"\xff\xfe")
    code, _, err = recommend("--all", "--out", str(tmp_path / "recs"), "--users", str(tmp_path / name))
    assert code == 2 and f"users must be ids, one a line, or Parquet with user_id; {tmp_path / name} is not" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--user", "u0", "--diversity", "0.5"),
        ("--user", "u0", "--engine", "beam"),
        ("--all", "--out", "x.parquet", "--engine", "beam"),
        ("--all", "--out", "x", "--filter", "title"),
        ("--all", "--out", "x", "--users", "missing.txt"),
        ("--all", "--out", "x", "--filter", "titel=Zero"),
        ("--all", "--out", "x", "--profile", "fast"),
    ],
)
def test_bad_command_lines_of_batch_jobs(recommend, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, err = recommend(*arguments)
    assert code == 2 and err and list(tmp_path.iterdir()) == []


def test_bad_command_lines_and_sources(recommend, tmp_path):
    assert recommend()[0] == 2
    assert recommend("--all", "--user", "u0")[0] == 2
    assert recommend("--user", "u0", "--all", "--out", "x")[0] == 2
    code, _, err = recommend("--user", "u0", "-k", "99")
    assert code == 2 and "'k' must be between 1 and 4" in err
    code, _, err = recommend("--user", "u0", source=tmp_path)
    assert code == 2 and "must have exported an artifact" in err
    (tmp_path / "manifest.json").write_text("{")
    code, _, err = recommend("--user", "u0", source=tmp_path)
    assert code == 4 and "is refused" in err


@pytest.mark.parametrize("tool", ["recommend", "benchmark", "doctor"])
def test_help_does_not_load_tensorflow(tool):
    code = f"import sys, runpy; sys.argv = ['x', '--help']; sys.path.insert(0, {str(TOOLS)!r})\n"
    code += f"try: runpy.run_path({str(TOOLS / (tool + '.py'))!r}, run_name='__main__')\n"
    code += "except SystemExit as end: sys.exit(end.code or 'tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "examples:" in done.stdout
