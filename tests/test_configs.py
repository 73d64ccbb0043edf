"""Every experiment in `configs/` is a lab note that loads: its comment holds its command, its keys are known."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from fusion.errors import ConfigError
from recsys.pipeline import load_experiment

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_opens_with_its_command(path: Path) -> None:
    """A4: what can be checked without data is checked here, for every config."""
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert any(f"python tools/train.py configs/{path.name}" in line for line in comment)
    assert len(experiment.members) >= 2 and len(experiment.rules) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_letter_too_many_is_noticed(path: Path) -> None:
    member = next(name for name in load_experiment(path).members if not re.search(r"_\d+$", name))  # not a copy
    for override, nearest in [
        ("sseed=1", "seed"),
        (f"members.{member}.kinds=x", None),
        ("split.sttrategy=x", "strategy"),
    ]:
        key = override.split("=")[0]
        with pytest.raises(
            ConfigError, match=f"unknown key '{key}'" + (f".*did you mean '{nearest}'" if nearest else "")
        ):
            load_experiment(path, [override])


def test_there_are_the_configs_that_the_readme_names() -> None:
    assert {"quickstart", "smoke", "movielens_posters", "digits"} <= {path.stem for path in CONFIGS}
