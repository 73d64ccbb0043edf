"""Writes artifacts: SavedModel, `.tflite`, what clients and servers need beside them, and a manifest; compared before
use."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.export.manifest import Manifest, verify_manifest, write_manifest
from fusion.export.savedmodel import load as load_savedmodel
from fusion.export.savedmodel import save as save_savedmodel
from fusion.export.savedmodel import signatures_of
from fusion.export.tflite import signatures_in
from fusion.export.verify import compare
from fusion.export.warmup import check_warmup, write_warmup
from fusion.files import atomic_folder, write_atomically
from recsys.baseline import EXAMPLES, USERS, classes_baseline, ranking_baseline, write_baseline
from recsys.compressed_artifact import applied, write_classes, write_ranking
from recsys.core import RankingCore
from recsys.examples import write_examples
from recsys.fast_profile import fast_profile
from recsys.growing import GrowingCore, GrowingScores
from recsys.item_tables import write_item_tables
from recsys.recommender import UNSCORED, ServedRecommender, contents_of
from recsys.run import PACKAGES
from recsys.schema import USER_ID, VALIDATION
from recsys.tflite_files import (
    SWAPPED_RANKS,
    Checks,
    classifier_inputs,
    classifier_sample,
    histories,
    named_function,
    write_classifier,
    write_core,
)
from recsys.warmup import BATCHES, ranking_requests

if TYPE_CHECKING:
    from recsys.classification_task import ClassificationTask
    from recsys.ranking_task import RankingTask

SAVEDMODEL_TOLERANCE = 1e-4
"""Largest difference of a fused score that passes."""
LONGEST = 512
"""Items of a history that is answered for the baseline."""


def export_recommender(task: RankingTask) -> Path:
    """Exports what `served` names, with the members that its answers need; returns the artifact's folder.

    Raises GateError when SavedModel or `.tflite` answer other numbers than the members in memory, or `export.recipe`
    did not keep its promise.
    """
    name = served(task)
    smaller = applied(task, name)
    core, members = task.exported(name)
    contents = contents_of(task.searchable(members))
    spare = task.experiment.export.spare_items
    if spare and not contents:
        raise ConfigError(
            f"export.spare_items must be 0 where no member reads the text or image of an item; received {spare}. Leave "
            "it out, or add a member of kind content."
        )
    history, seen = task.known()
    data, k_max = task.interactions, task.experiment.export.k_max
    fast = fast_profile(task, name, core)
    student = fast.scorer if fast else None
    growing = GrowingScores(members, core.members.counts, spare) if spare else None
    # What has no spare rows: `core`, of which the .tflite is made, and the student.
    wide = core if growing is None else GrowingCore(growing, core.rule, core.members.items)
    recommender = ServedRecommender(wide, data.item_ids, data.user_ids, history, seen, k_max, contents, student)

    def write_others(folder: Path) -> Checks:
        users = pd.DataFrame({USER_ID: data.user_ids})
        write_atomically(folder / "users.parquet", users.to_parquet(index=False))
        manifest["items"] = write_item_tables(folder, data, task.experiment.export, contents, history)
        write_examples(folder, contents)
        known = item_texts(data.item_ids, histories(task, LONGEST, USERS))
        write_baseline(folder, ranking_baseline(recommender.recommend, known, list(members)))
        requests = ranking_requests(task, wide, contents, signatures_of(folder))
        write_warmup(folder, task.experiment.name, requests)
        if smaller:
            checks, manifest["compression"] = write_ranking(task, smaller, core, folder)
            return checks
        return [write_core(task, core, folder, "Keras")] if task.experiment.export.tflite else []

    manifest = _described(task, "recommender", name, list(members))
    manifest["profiles"] = {"fast": fast.told} if fast else {}
    if spare:
        manifest["limits"]["spare_items"] = spare
    return _write_artifact(
        task, manifest, recommender, recommender.signatures(), write_others, lambda m: _compare_ranking(task, core, m)
    )


def export_classifier(task: ClassificationTask) -> Path:
    """Exports what `served` names, with the members that its answers need; returns the artifact's folder.

    Raises GateError when SavedModel or `.tflite` answer other numbers than the model in memory, or `export.recipe` did
    not keep its promise.
    """
    name = served(task)
    smaller = applied(task, name)
    ensemble = task.ensemble(name)
    model = ensemble.functional()
    sample = classifier_sample(task, ensemble)
    expected = {key: value.numpy() for key, value in model(sample, training=False).items()}
    # The variables without the model: of a Keras model every layer's functions would be written as well, which
    # nobody calls and which makes writing and loading ten times as slow.
    owner = tf.Module()
    owner.kept = model.variables

    def write_others(folder: Path) -> Checks:
        write_atomically(folder / "labels.json", json.dumps(task.classes))
        chosen = np.sort(np.random.default_rng(0).permutation(task.rows(VALIDATION))[:EXAMPLES])
        watched = classifier_inputs(task, ensemble, chosen)
        write_baseline(folder, classes_baseline(model, watched, list(ensemble.members)))
        sizes = {min(rows, len(sample["mask"])) for rows in BATCHES}
        requests = [("serving_default", {n: array[:size] for n, array in sample.items()}) for size in sorted(sizes)]
        write_warmup(folder, task.experiment.name, requests)
        if smaller:
            checks, manifest["compression"] = write_classes(task, smaller, sample, expected["probabilities"], folder)
            return checks
        if not task.experiment.export.tflite:
            return []
        return [write_classifier(model, owner, sample, expected["probabilities"], folder)]

    def compare_savedmodel(loaded: Any) -> dict[str, Any]:
        answered = loaded.signatures["serving_default"](**{name: tf.constant(array) for name, array in sample.items()})
        found = {name: tensor.numpy() for name, tensor in answered.items()}
        return compare(expected, found, SAVEDMODEL_TOLERANCE, "Keras and SavedModel")

    function = named_function(model, {name: (None, *array.shape[1:]) for name, array in sample.items()})
    signatures = {"serving_default": function}
    manifest = _described(task, "classifier", name, list(ensemble.members))
    return _write_artifact(task, manifest, owner, signatures, write_others, compare_savedmodel)


def served(task: Any) -> str:
    """What to export: the rule named in the config, or the rule, or member alone, that validation chose."""
    name, report = task.experiment.export.rule, _report(task)
    return name if name != "best" else report.get("served", report["best_rule"])  # older runs do not name it


def _report(task: Any) -> dict[str, Any]:
    return json.loads(task.run.path("report.json").read_text(encoding="utf-8"))


def artifact_of(folder: Path) -> Path:
    """The newest artifact of a run's folder. Raises ConfigError when the run exported none."""
    versions = [path for path in folder.glob("export/*/*") if path.name.isdecimal()]
    if not versions:
        raise ConfigError(f"the run must have exported an artifact; {folder} has none. Run tools/export.py on it.")
    return max(versions, key=lambda path: int(path.name))


def _write_artifact(
    task: Any,
    manifest: dict[str, Any],
    module: Any,
    signatures: dict[str, Any],
    write_others: Callable[[Path], Checks],
    compare_savedmodel: Callable[[Any], dict[str, Any]],
) -> Path:
    """Everything in a folder aside, compared with the numbers in memory, and only then renamed to its version."""
    shelf = task.run.path("export", task.experiment.name)
    shelf.mkdir(exist_ok=True)
    folder = shelf / str(1 + max((int(p.name) for p in shelf.iterdir() if p.name.isdecimal()), default=0))
    with atomic_folder(folder) as aside:
        model = aside / "model"
        save_savedmodel(module, model, signatures)
        for path in list(model.iterdir()):
            path.rename(aside / path.name)
        model.rmdir()
        checks = write_others(aside)
        if (page := task.run.path("report.html")).exists():  # a server shows it
            write_atomically(aside / page.name, page.read_bytes())
        files = {path.relative_to(aside).as_posix(): signatures_in(path) for path in aside.rglob("*.tflite")}
        write_manifest(aside, Manifest(**manifest, signatures=signatures_of(aside), tflite=files))
        loaded = load_savedmodel(aside)
        checks.append(compare_savedmodel(loaded))
        check_warmup(loaded, aside)
        write_atomically(task.run.path("verify.json"), json.dumps(checks, indent=2))
    verify_manifest(folder)
    return folder


def _described(task: Any, kind: str, name: str, members: Sequence[str]) -> dict[str, Any]:
    """What the manifest says beside signatures and files."""
    report, settings = _report(task), task.experiment.export
    figures = {**report["members"], **report["rules"]}[name]
    if name == report.get("served"):  # a classifier alone is calibrated, which its figures as a member are not
        figures = report.get("serving", {}).get("figures", figures)
    return {
        "kind": kind,
        "members": tuple(members),
        "config_hash": task.experiment.hash(),
        "data_hash": report["dataset"]["hash"],
        "split_hash": report["split"]["hash"],
        "rows_seen": "all" if settings.refit == "all" else "train",
        "metrics": {metric: figure["value"] for metric, figure in figures.items()},
        "libraries": {package: importlib.metadata.version(package) for package in PACKAGES},
        "limits": {"k_max": settings.k_max} if kind == "recommender" else {},
    }


def item_texts(item_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Ids of item numbers, object of str and of the same shape; '' for -1."""
    return np.where(numbers < 0, "", item_ids.astype(object)[np.maximum(numbers, 0)])


def _compare_ranking(task: RankingTask, core: RankingCore, loaded: Any) -> dict[str, Any]:
    item_ids = task.interactions.item_ids.astype(object)
    sample = histories(task, 64)
    texts = item_texts(item_ids, sample)
    candidates = np.broadcast_to(item_ids, (len(sample), len(item_ids)))
    asked = {"history": tf.constant(texts, tf.string), "candidates": tf.constant(candidates, tf.string)}
    answered = loaded.signatures["serving_default"](**asked)
    fused = core(tf.constant(sample)).numpy()
    expected = {"scores": np.where(np.isfinite(fused), fused, UNSCORED)}
    found = {"scores": answered["scores"].numpy()}
    return compare(expected, found, SAVEDMODEL_TOLERANCE, "Keras and SavedModel", SWAPPED_RANKS)
