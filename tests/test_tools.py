"""The command line: help, exit codes, and what bad input gets: one clear sentence and no run that looks whole."""

from __future__ import annotations

import json
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import ROOT, TOOLS, Ended, finished_runs, refusal, run_tool, start_tool
from recsys.pipeline import load_experiment
from recsys.run import Run

SMOKE = ROOT / "configs" / "smoke.yaml"

# ---- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_examples_and_exit_codes(tool: str) -> None:
    ended = run_tool(tool, "--help")
    assert ended.code == 0 and ended.err == ""
    assert f"python tools/{tool}.py" in ended.out.split("examples:")[1]
    for code in ("0 done", "2 config or command line", "3 data", "5 the machine refuses", "130 interrupted"):
        assert code in ended.out.split("exit codes:")[1]


def test_help_needs_neither_tensorflow_nor_numpy() -> None:
    """A person who asks for help does not wait: all tools in one process, which is clean at its end."""
    code = "import runpy, sys\nfor tool in sys.argv[1:]:\n    sys.argv = [tool, '--help']\n"
    code += "    try: runpy.run_path(tool, run_name='__main__')\n    except SystemExit as end: assert not end.code\n"
    code += "sys.exit(', '.join({'tensorflow', 'numpy', 'pandas'} & set(sys.modules)) or 0)"
    scripts = [str(ROOT / "tools" / f"{tool}.py") for tool in TOOLS]
    environment = {"PYTHONPATH": str(ROOT / "tools"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_option_is_a_fault_of_the_command_line(tool: str) -> None:
    ended = run_tool(tool, "--no-such-option")
    assert ended.code == 2 and "usage:" in ended.err and ended.out == ""


# ---- train --------------------------------------------------------------------------------------------------


def train(config: Path, runs: Path, *arguments: object) -> Ended:
    return run_tool("train", config, "--run-dir", runs, "--quiet", *arguments)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    """A4, A11."""
    ended = train(SMOKE, tmp_path / "runs", "--dry-run")
    assert ended.code == 0 and list(tmp_path.iterdir()) == []
    for words in ("300 users", "4,800 train", "matrix_factorization", "parameters", "stacker", "estimated time", "GB"):
        assert words in ended.out
    plan = json.loads(train(SMOKE, tmp_path / "runs", "--dry-run", "--json", "--set", "members.image=null").out)
    assert plan["rows"] == {"train": 4800, "validation": 600, "test": 600, "history": 0}
    assert plan["members"]["popularity"]["parameters"] == 200 and "image" not in plan["members"]
    assert 0 < plan["estimated_bytes"] < plan["machine_bytes"] and list(tmp_path.iterdir()) == []


BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "unknown member": (["members.new.kind=eese"], "members.new.kind: unknown member 'eese': did you mean 'ease'?"),
    "unknown rule": (["rules.new.kind=voet"], "rules.new.kind: unknown rule 'voet': did you mean 'vote'?"),
    "unknown reader": (["data.kind=plantd"], "data.kind: unknown data set reader 'plantd': did you mean 'planted'?"),
    "unknown encoder": (["members.text.encoder.kind=bert"], "members.text.encoder.kind: unknown submodel 'bert'"),
    "unknown metric": (["evaluation.metrics=[ndgc@10]"], "unknown metric 'ndgc@10': did you mean 'ndcg'?"),
    "metric without k": (["evaluation.metrics=[ndcg]"], "'ndcg' must name its list length"),
    "primary that is no relevance": (["evaluation.primary=coverage@10"], "evaluation.primary must judge each user's"),
    "unknown task": (["task=recommendations"], "task: unknown task 'recommendations': did you mean"),
    "unknown key": (["spilt.strategy=random"], "unknown key 'spilt': did you mean 'split'?"),
    "unknown key of a member": (
        ["members.text.training.epoch=1"],
        "'members.text.training.epoch': did you mean 'epochs'?",
    ),
    "out of range": (["split.test=1.5"], "split.test: input should be less than 1; received 1.5."),
    "negative": (["members.ials.factors=-1"], "members.ials.factors: input should be greater than or equal to 1"),
    "weights without a member": (["rules.probability.weights={ease: 1}"], "rules.probability: the weights of the rule"),
    "weights for nobody": (["rules.probability.weights={eese: 1}"], "unknown member 'eese': did you mean 'ease'?"),
    "batch on two devices": (
        ["strategy.kind=mirrored", "strategy.devices=[CPU:0, CPU:1]", "members.text.training.batch_size=255"],
        "members.text: batch_size must be a multiple of the 2 devices",
    ),
    "strategy that is not there": (["strategy.kind=tpus"], "strategy.kind: input should be 'default', 'mirrored'"),
    "member named as a rule": (["rules.ease.kind=vote"], "both have 'ease'"),
    "name that is no folder": (["name=../up"], "the name of a run must be a letter"),
    "no members": (["members=null"], "the key 'members' is required"),
    "rule to export": (["export.rule=stakcer"], "export.rule: no rule 'stakcer': did you mean 'stacker'?"),
    "text without columns": (["members.text.columns=[]"], "members.text: a text member must name its columns"),
    "positive": (["positive=rating >="], "must read 'column sign value'"),
    "split of the other task": (["split.strategy=stratified"], "received 'stratified', which is for classification"),
    "override without value": (["seed"], "--set takes KEY=VALUE"),
    "unset variable": (
        ["data=null", "data={kind: folder, path: $NO_SUCH_VARIABLE/x}"],
        "$NO_SUCH_VARIABLE, which is not set",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_end_with_2(case: str, tmp_path: Path) -> None:
    """A4: everything that can be checked is checked before anything is fitted."""
    overrides, message = BAD_SETTINGS[case]
    ended = train(SMOKE, tmp_path, *(argument for text in overrides for argument in ("--set", text)))
    assert message in refusal(ended, 2)
    assert finished_runs(tmp_path) == []


def test_bad_config_files_end_with_2(tmp_path: Path) -> None:
    assert "did you mean" in refusal(train(ROOT / "configs/smok.yaml", tmp_path), 2)
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert "must be valid YAML" in refusal(train(tmp_path / "bad.yaml", tmp_path), 2)
    assert "cannot be read" in refusal(train(tmp_path, tmp_path), 2)


def test_a_run_folder_that_cannot_be_written_ends_with_5(tmp_path: Path) -> None:
    """A file stands where the folder should, which stops even root."""
    (tmp_path / "runs").write_text("")
    assert "must be writable" in refusal(train(SMOKE, tmp_path / "runs"), 5)
    assert (tmp_path / "runs").read_text() == ""


def test_one_writer_holds_a_run(tmp_path: Path) -> None:
    with Run.start(load_experiment(SMOKE), tmp_path).locked():
        assert "one process at a time" in refusal(train(SMOKE, tmp_path), 5)


# ---- data ---------------------------------------------------------------------------------------------------

HEADER = "user_id,item_id,rating,timestamp\n"
GRID = [(f"u{user}", f"i{item}", 1 + (user * item) % 5, 100 * user + item) for user in range(8) for item in range(8)]


def rows(table: Any) -> str:
    return HEADER + "".join(",".join(map(str, row)) + "\n" for row in table)


BAD_DATA: dict[str, tuple[str | bytes | None, str]] = {
    "missing column": (rows(GRID).replace("item_id", "itemid"), "must have a column 'item_id': did you mean 'itemid'?"),
    "unreadable file": (rows(GRID).encode() + b"\xff\xfe,x,1,1\n", "must be readable"),
    "no file": (None, "must hold interactions.* or examples.*"),
    "empty file": ("", "is empty"),
    "no rows": (HEADER, "must have interactions"),
    "one user": (rows([("a", item, 1, time) for _, item, _, time in GRID[:8]]), "at least two users must remain"),
    "one item": (rows([(user, "x", 1, time) for user, _, _, time in GRID]), "at least two items must remain"),
    "NaN ratings": (rows([(user, item, "nan", time) for user, item, _, time in GRID]), "ratings that are not finite"),
    "ids with NUL": (rows([(f"{user}\0", *rest) for user, *rest in GRID]), "with NUL or control characters"),
    "ids of 10,000 characters": (rows([(user * 5_000, *rest) for user, *rest in GRID]), "longer than 256 bytes"),
    "too few to split": (rows(GRID[:2] + GRID[8:10]), "train, validation and test must each have a row"),
    "users of one item": (rows([(f"u{n}", f"i{n}", 1, n) for n in range(20)]), "members.factorization: training needs"),
}  # fmt: skip


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Path]:
    """A folder with a config over a data folder that a test fills."""
    (tmp_path / "data").mkdir()
    (tmp_path / "shop.yaml").write_text(
        f"""
name: shop
task: recommendation
data: {{kind: folder, path: {tmp_path / "data"}}}
members:
  popularity: {{kind: popularity}}
  factorization: {{kind: matrix_factorization, factors: 4, training: {{epochs: 1, batch_size: 16}}}}
rules: {{average: {{kind: average}}, vote: {{kind: vote}}}}
evaluation: {{metrics: [ndcg@10], samples: 100}}
export: {{refit: none, k_max: 10}}
""",
        encoding="utf-8",
    )
    yield tmp_path


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_end_with_3(case: str, shop: Path) -> None:
    """B2, and section 8 of the plan: every one is a sentence, and no run looks whole."""
    content, message = BAD_DATA[case]
    if content is not None:
        (shop / "data/interactions.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(train(shop / "shop.yaml", shop / "runs"), 3)
    assert finished_runs(shop / "runs") == []


STRANGE = ("plain", "with space", 'with "quotes"', "it's", "ä,ö;ü", "日本 🎬", "#1=x", "../up", "-1", "NA", "null")
"""Ids that are unusual and allowed."""


def write_strange_world(folder: Path) -> None:
    """A data set with something wrong of every kind among rows that are fine."""

    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    random = np.random.default_rng(0)
    items = [f"film {n}" for n in range(20)]
    lines = [HEADER]
    for number, user in enumerate([*STRANGE, *(f"u{n}" for n in range(20))]):
        for order, item in enumerate(random.permutation(items)[:10]):
            lines.append(f"{cell(user)},{cell(item)},4,{1000 * order + number}\n")
    lines += [f"plain\0,{items[0]},4,1\n", f"{'x' * 10_000},{items[0]},4,1\n", f"plain,{items[0]},nan,1\n", ",x,4,1\n"]
    lines += [f"u0,{items[1]},4,never\n", lines[1], lines[1]]
    (folder / "interactions.csv").write_text("".join(lines), encoding="utf-8")

    (folder / "posters").mkdir()
    for number in range(len(items)):
        picture = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        picture.save(folder / "posters" / f"{number}.jpg")
    whole = (folder / "posters/0.jpg").read_bytes()
    (folder / "posters/0.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "posters/1.jpg").write_bytes(bomb(60_000))
    (folder / "posters/2.jpg").write_bytes(b"no picture at all")
    (folder / "posters/3.jpg").unlink()
    table = ["item_id,title,image\n"]
    table += [f"{cell(item)},{cell(item.title())},posters/{number}.jpg\n" for number, item in enumerate(items)]
    (folder / "items.csv").write_text("".join(table), encoding="utf-8")


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises side × side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")


IMAGE = "members.image={kind: content, encoder: {kind: image_cnn, image_size: 16, widths: [8]}, scorer: cosine}"


@pytest.mark.slow
def test_among_good_rows_bad_ones_are_counted_and_the_rest_is_served(shop: Path) -> None:
    """B2, B6: NaN, NUL, 10,000 characters, a truncated JPEG and a bomb cost their own rows and nothing else."""
    write_strange_world(shop / "data")
    ended = train(shop / "shop.yaml", shop / "runs", "--set", IMAGE)
    assert ended.code == 0 and "Traceback" not in ended.err
    (run,) = finished_runs(shop / "runs")
    dropped = json.loads((run / "data/cleaning.json").read_text(encoding="utf-8"))["dropped"]
    counts = {entry["rule"]: entry["rows"] for entry in dropped}
    assert counts == {
        "images: cannot be decoded": 1,
        "images: not a JPEG, PNG, WebP, GIF or BMP file": 1,
        "images: more than 64000000 pixels": 1,
        "user ids missing": 1,
        "user ids longer than 256 bytes": 1,
        "user ids with NUL or control characters": 1,
        "ratings that are not finite numbers": 1,
        "timestamps that are no seconds before the year 10000": 1,
        "repeated interactions of a user with an item": 2,
    }
    for user in STRANGE[1::4]:
        answer = run_tool("recommend", run, f"--user={user}", "-k", 3, "--json")
        assert answer.code == 0, answer.err
        assert len(json.loads(answer.out)["items"]) == 3 and json.loads(answer.out)["known_user"]
    strict = train(shop / "shop.yaml", shop / "strict", "--strict")
    assert "with cleaning.strict no rule may find anything" in refusal(strict, 3)
    assert finished_runs(shop / "strict") == []


# ---- interruptions and full disks ---------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_same_command_continues(shop: Path) -> None:
    """A real process is interrupted while it trains; the run then goes on where it was."""
    (shop / "data/interactions.csv").write_text(rows(row for row in GRID if row[2] != 3))
    config = shop / "shop.yaml"
    longer = config.read_text().replace("epochs: 1,", "epochs: 50,").replace("export: {", "export: {enabled: false, ")
    config.write_text(longer)
    process = start_tool("train", config, "--run-dir", shop / "runs")
    until(lambda: list(shop.glob("runs/.cache/work/*/factorization/checkpoints/*.index")), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert "run the same command again to continue" in err.splitlines()[-1]
    assert finished_runs(shop / "runs") == []

    (state,) = shop.glob("runs/shop/2*/run.json")
    before = json.loads(state.read_text())
    assert list(before["stages"]) == ["data"] and before["status"] == "interrupted"
    assert train(config, shop / "runs").code == 0
    after = json.loads(state.read_text())
    assert after["status"] == "finished" and after["stages"]["data"] == before["stages"]["data"], "not read again"
    assert finished_runs(shop / "runs") == [state.parent] == list(shop.glob("runs/shop/2*")), "in the same folder"
    history = json.loads((state.parent / "submodels/factorization/member.json").read_text())["history"]
    assert len(history["epochs"]) == 50


def until(condition: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_disk_ends_with_5(shop: Path) -> None:
    """A process that may write files of 2,000 bytes only meets what a full disk gives."""
    (shop / "data/interactions.csv").write_text(rows(GRID))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    process = start_tool("train", shop / "shop.yaml", "--run-dir", shop / "runs", "--quiet", prepare=small_files)
    out, err = process.communicate(timeout=120)
    assert "must be writable" in refusal(Ended(process.returncode, out, err), 5)
    assert finished_runs(shop / "runs") == [] and not list(shop.rglob("*.partial"))


# ---- the other tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["evaluate", "export", "recommend"])
def test_a_folder_that_is_no_run_is_refused(tool: str, tmp_path: Path) -> None:
    arguments = ["--user", "u1"] if tool == "recommend" else ["--quiet"]
    assert str(tmp_path) in refusal(run_tool(tool, tmp_path, *arguments), 2)
    assert str(tmp_path / "none") in refusal(run_tool(tool, tmp_path / "none", *arguments), 2)


@pytest.mark.parametrize("tool", ["evaluate", "export"])
def test_a_run_that_did_not_get_that_far_is_refused(tool: str, tmp_path: Path) -> None:
    run = Run.start(load_experiment(SMOKE), tmp_path)
    assert "did not get that far" in refusal(run_tool(tool, run.folder, "--quiet"), 2)
    (run.folder / "run.json").write_text("{")
    assert "run.json" in refusal(run_tool(tool, run.folder, "--quiet"), 2)


def test_doctor_finds_a_working_installation_well() -> None:
    """Memory and disk are what they are; everything else must be well where the tests run."""
    ended = run_tool("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(ended.out)["findings"]}
    unwell = {name for name, finding in findings.items() if finding["ok"] is False}
    assert unwell <= {"memory", "disk"} and (ended.code == 0) == (not unwell)
    assert {"python", "packages", "keras in use", "devices", "weights", "self-check", "extra 'dev'"} <= set(findings)


def test_benchmark_agrees_with_numpy() -> None:
    sizes = ["--users", 300, "--items", 500, "--dimensions", 8, "--block", 128, "-k", 5]
    measured = json.loads(run_tool("benchmark", "scoring", *sizes, "--json").out)
    assert measured["rows equal to numpy"] == 64 and measured["users per second"] > 0
    assert "users per second" in run_tool("benchmark", "scoring", *sizes).out
    assert run_tool("benchmark", "scoring", "--users", 0).code == 2
