"""Whether the input keeps up with the model: samples a second of either alone and of both, for each kind of member.

Each case is a member that is fitted as in a run, up to the point where its training loop is ready; the loop is then
driven in parts (`fusion.training.throughput`). Data are made up, and images lie on disk as PNG files before they are
decoded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fusion.config import parse_part
from fusion.errors import ConfigError
from fusion.images import load_images
from fusion.progress import progress
from fusion.registry import nearest
from fusion.training.member import CLASSIFIERS, LabelledData
from fusion.training.separate import Examples
from fusion.training.throughput import measure_throughput
from fusion.training.trainer import Loop
from fusion.types import History, RunOptions
from recsys.benchmarks import World
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import TrainingData
from recsys.datasets.planted import FILLERS, PlantedClasses, write_folder

EXAMPLES = 2048
CLASSES = 4
LONGEST = 30
"""Words of the longest text; lengths are drawn evenly from 3."""

Measured = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A member, and what it reads: `pairs` of a world, `text` or `image`."""

    reads: str
    config: dict[str, Any]


def _classifier(encoder: dict[str, Any], batch_size: int, **settings: Any) -> dict[str, Any]:
    columns = ["text"] if encoder["kind"].startswith("text") else []
    return {"encoder": encoder, "columns": columns, "training": {"batch_size": batch_size}, **settings}


_BERT = {"kind": "text_bert", "fine_tune": "all"}
_VIEWS = {"flip_horizontal": True, "rotation": 15.0, "zoom": 0.1, "crop": 0.1, "noise": 4.0}

CASES = {
    "factorisation": Case(
        "pairs", {"kind": "matrix_factorization", "training": {"batch_size": 1024, "learning_rate": 0.005}}
    ),
    "text": Case("text", _classifier(_BERT, 32)),
    "text_augmented": Case("text", _classifier(_BERT, 32, augmentation={"text": {"drop": 0.1, "swap": 0.1}})),
    "image": Case("image", _classifier({"kind": "image_cnn"}, 64)),
    "image_augmented": Case("image", _classifier({"kind": "image_cnn"}, 64, augmentation={"image": _VIEWS})),
    "image_efficientnet": Case(
        "image",
        _classifier({"kind": "image_efficientnet", "weights": "none", "fine_tune": "all", "image_size": 96}, 32),
    ),
}
"""What is measured, by name: all that trains by gradient on inputs that are read anew in every epoch."""


def measure_pipelines(
    names: Sequence[str] = tuple(CASES), *, world: str = "gowalla-size", rounds: int = 5, seconds: float = 3.0
) -> Measured:
    """The throughput of each case, see `fusion.training.throughput.measure_throughput`.

    Args:
        names: of `CASES`; ConfigError for others.
        world: of `recsys.benchmarks.WORLDS`, for the pairs.
        rounds, seconds: how often the three take turns, and for how long.
    """
    for name in names:
        if name not in CASES:
            raise ConfigError(f"no case '{name}': {nearest(name, CASES)}")
    result: Measured = {"settings": {"world": world, "rounds": rounds, "seconds": seconds}}
    with progress("measure", len(names), "cases") as bar:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                result[name] = _measured(CASES[name], Path(folder), world, rounds, seconds)
            bar.advance(1)
    return result


def _measured(case: Case, folder: Path, world: str, rounds: int, seconds: float) -> Measured:
    found: Measured = {}

    def drive(loop: Loop) -> History:
        found.update(measure_throughput(loop, rounds, seconds))
        return History()

    options = RunOptions(seed=0, directory=folder / "training", quiet=True, drive=drive)
    told = _fit_on_pairs(case, folder, options, world) if case.reads == "pairs" else _fit_classes(case, folder, options)
    return {**told, **found}


def _fit_on_pairs(case: Case, folder: Path, options: RunOptions, world: str) -> Measured:
    matrix = World.made(world).train
    member = parse_part(MEMBERS, case.config, "member").make(0)
    member.fit(TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), folder), options)
    return {"batch": member.config.training.batch_size}


def _fit_classes(case: Case, folder: Path, options: RunOptions) -> Measured:
    member = parse_part(CLASSIFIERS, {"kind": "neural", **case.config}, "member").make(0)
    told: Measured = {"batch": member.config.training.batch_size}
    if case.reads == "text":
        values: Any = _texts()
    else:
        values, told["decoded_per_s"] = _decoded(member.config.encoder.config.image_size, folder)
    train = Examples(values, np.arange(len(values)) % CLASSES)
    member.fit(LabelledData(train, None, CLASSES, folder / "cache", "made up"), options)
    return told


def _texts() -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(FILLERS, length)) for length in random.integers(3, LONGEST + 1, EXAMPLES)]


def _decoded(size: int, folder: Path) -> tuple[np.ndarray, float]:
    """Images out of files, as the memory map that they are decoded into, and how many were decoded a second."""
    tables = PlantedClasses.read(PlantedClasses.Config(examples=EXAMPLES, image_size=size))
    write_folder(tables, folder)
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    began = time.perf_counter()
    pixels, _, _ = load_images(paths, size, folder / "cache")
    return pixels, len(paths) / (time.perf_counter() - began)
