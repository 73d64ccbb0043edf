"""The run's folder: which one a command works in, and what it holds first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import ConfigError
from recsys import run as run_module
from recsys.run import COMPRESSING, CONFIG, FITTING, Run, code_version, compressing_version
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


def test_code_that_compresses_has_a_version_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a method makes what it left invalid, and no member that was fitted."""
    home = Path(run_module.__file__).parent.parent
    assert all((home / place).exists() for place in FITTING + COMPRESSING)
    for place in (*FITTING, *COMPRESSING, "fusion/compression/pruning.py"):
        if place.endswith(".py"):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).touch()
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "recsys" / "run.py"))
    versions = []
    for text in ("one", "other"):
        (tmp_path / "fusion" / "compression" / "pruning.py").write_text(text)
        versions.append((code_version.__wrapped__(), compressing_version.__wrapped__()))
    assert versions[0][0] == versions[1][0] and versions[0][1] != versions[1][1]
