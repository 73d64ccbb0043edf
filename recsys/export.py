"""Writes the artifact of a recommender: SavedModel, `.tflite` of the core, items, manifest; compared before it counts."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.export.litert import run as run_tflite
from fusion.export.manifest import Manifest, verify_manifest, write_manifest
from fusion.export.savedmodel import load as load_savedmodel
from fusion.export.savedmodel import save as save_savedmodel
from fusion.export.savedmodel import signatures_of
from fusion.export.tflite import check_runs, convert
from fusion.export.verify import compare
from fusion.files import atomic_folder, write_atomically
from recsys.core import RankingCore
from recsys.evaluation import history_rows
from recsys.recommender import ServedRecommender
from recsys.run import PACKAGES
from recsys.schema import ITEM_ID, TITLE

if TYPE_CHECKING:
    from recsys.ranking_task import RankingTask

ROWS = 100
TOLERANCE = {"savedmodel": 1e-4, "tflite": 1e-3}
"""Largest difference of a fused score that passes. TFLite sums in another order, and standardised scores
magnify what is left of it."""


def export_recommender(task: RankingTask) -> Path:
    """Exports the rule that was chosen on validation with all members; returns the artifact's folder.

    Raises GateError when SavedModel or `.tflite` answer other numbers than the members in memory.
    """
    report = json.loads(task.run.path("report.json").read_text(encoding="utf-8"))
    settings = task.experiment.export
    name = report["best_rule"] if settings.rule == "best" else settings.rule
    members = task.refitted()
    core = task.core(members, task.rules[name])
    served = _served(task, core, members)
    shelf = task.run.path("export", task.experiment.name)
    shelf.mkdir(exist_ok=True)
    folder = shelf / str(1 + max((int(p.name) for p in shelf.iterdir() if p.name.isdecimal()), default=0))
    with atomic_folder(folder) as aside:
        model = aside / "model"
        save_savedmodel(served, model, served.signatures())
        for path in list(model.iterdir()):
            path.rename(aside / path.name)
        model.rmdir()
        _write_items(task, aside)
        checks = [] if not settings.tflite else [_write_tflite(task, core, aside)]
        content = _manifest(task, aside, name, report)
        write_manifest(aside, content)
        checks.append(_compare_savedmodel(task, core, aside))
        write_atomically(task.run.path("verify.json"), json.dumps(checks, indent=2))
    verify_manifest(folder)
    return folder


def _served(task: RankingTask, core: RankingCore, members: dict[str, Any]) -> ServedRecommender:
    data = task.interactions
    history, seen = task.known()
    encoders = {name: m.signatures()["embed_item"] for name, m in members.items() if m.signatures()}
    return ServedRecommender(
        core, data.item_ids, data.user_ids, history, seen, task.experiment.export.k_max, encoders
    )


def _write_items(task: RankingTask, folder: Path) -> None:
    catalogue = task.interactions.catalogue
    table = catalogue[[c for c in catalogue.columns if c in (ITEM_ID, TITLE)]].copy()
    table[ITEM_ID] = task.interactions.item_ids
    write_atomically(folder / "items.parquet", table.to_parquet(index=False))


def _manifest(task: RankingTask, folder: Path, rule: str, report: dict[str, Any]) -> Manifest:
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return Manifest(
        kind="recommender",
        members=tuple(task.experiment.members),
        signatures=signatures_of(folder),
        config_hash=task.experiment.hash(),
        data_hash=report["dataset"]["hash"],
        split_hash=report["split"]["hash"],
        rows_seen="all" if task.experiment.export.refit == "all" else "train",
        metrics={metric: figure["value"] for metric, figure in report["rules"][rule].items()},
        libraries=versions,
        limits={"k_max": task.experiment.export.k_max},
    )


def _sample(task: RankingTask, longest: int) -> np.ndarray:
    """Histories int32 `[ROWS, longest]` of random users, cut to the artifact's length."""
    history, _ = task.known()
    users = np.flatnonzero(np.diff(history.indptr) > 0)
    chosen = np.random.default_rng(0).permutation(users)[:ROWS]
    rows = history_rows(history, np.sort(chosen))[:, :longest]
    return np.pad(rows, [(0, 0), (0, longest - rows.shape[1])], constant_values=-1)


def _write_tflite(task: RankingTask, core: RankingCore, folder: Path) -> dict[str, Any]:
    length = task.experiment.export.tflite_history
    function = tf.function(
        lambda history: dict(zip(("scores", "contributions"), core.explained(history), strict=True)),
        input_signature=[tf.TensorSpec([1, length], tf.int32, name="history")],
    )
    path = folder / "core.tflite"
    write_atomically(path, convert({"serving_default": function}, core))
    sample = _sample(task, length)
    check_runs(path, {"history": sample[:1]})
    expected, found = [], []
    for row in sample:
        expected.append(function(tf.constant(row[None]))["scores"].numpy())
        found.append(run_tflite(path, {"history": row[None]})["scores"])
    return compare(
        {"scores": np.concatenate(expected)}, {"scores": np.concatenate(found)}, TOLERANCE["tflite"], "Keras and TFLite"
    )


def _compare_savedmodel(task: RankingTask, core: RankingCore, folder: Path) -> dict[str, Any]:
    item_ids = task.interactions.item_ids.astype(object)
    sample = _sample(task, 64)
    histories = np.where(sample < 0, "", item_ids[np.maximum(sample, 0)])
    candidates = np.broadcast_to(item_ids, (len(sample), len(item_ids)))
    loaded = load_savedmodel(folder).signatures["serving_default"]
    answered = loaded(history=tf.constant(histories, tf.string), candidates=tf.constant(candidates, tf.string))
    expected = core(tf.constant(sample)).numpy()
    expected = np.where(np.isfinite(expected), expected, np.finfo(np.float32).min)
    return compare({"scores": expected}, {"scores": answered["scores"].numpy()}, TOLERANCE["savedmodel"], "Keras and SavedModel")


def artifact_of(folder: Path) -> Path:
    """The newest artifact of a run's folder. Raises ConfigError when the run exported none."""
    versions = [p for p in folder.glob("export/*/*") if p.name.isdecimal()]
    if not versions:
        raise ConfigError(f"the run must have exported an artifact; {folder} has none. Run tools/export.py on it.")
    return max(versions, key=lambda path: int(path.name))
