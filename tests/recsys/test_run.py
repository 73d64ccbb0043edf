"""The run's folder: which one a command works in, and what it holds first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import ConfigError
from recsys.run import CONFIG, Run
from recsys.settings import parse_experiment


def experiment(**settings: Any) -> Any:
    return parse_experiment(
        {
            "name": "folder",
            "data": {"kind": "planted"},
            "members": {"popularity": {"kind": "popularity"}},
            "rules": {"average": {"kind": "average"}},
            **settings,
        }
    )


def test_an_unfinished_run_is_continued_and_a_finished_one_is_not(tmp_path: Path) -> None:
    """F10: the same config goes on in its folder, another config and a finished one get a new folder."""
    first = Run.start(experiment(), tmp_path)
    assert Run.start(experiment(), tmp_path).folder == first.folder
    assert Run.start(experiment(), tmp_path, resume=True).folder == first.folder
    assert Run.start(experiment(seed=1), tmp_path).folder != first.folder
    first.set(status="finished")
    assert Run.start(experiment(), tmp_path).folder != first.folder


def test_fresh_always_starts_and_resume_never_does(tmp_path: Path) -> None:
    """Both insist; resume says what it misses."""
    with pytest.raises(ConfigError, match="needs an unfinished run of this very config"):
        Run.start(experiment(), tmp_path, resume=True)
    first = Run.start(experiment(), tmp_path)
    assert Run.start(experiment(), tmp_path, fresh=True).folder != first.folder


def test_the_resolved_config_comes_first_and_opens_again(tmp_path: Path) -> None:
    """A4: every default is filled in, and reading it back gives the same experiment."""
    run = Run.start(experiment(), tmp_path)
    assert "k_max: 100" in (run.folder / CONFIG).read_text()
    again = Run.open(tmp_path / "folder" / "latest")
    assert again.folder == run.folder.resolve() and again.experiment.hash() == run.experiment.hash()
    assert json.loads((run.folder / "environment.json").read_text())["packages"]["tensorflow"]
