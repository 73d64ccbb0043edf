"""Writes artifacts: SavedModel, `.tflite`, what a client needs beside them, and a manifest; compared before use."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fusion.compat import keras, tf
from fusion.ensemble import Ensemble
from fusion.errors import ConfigError
from fusion.export.litert import run as run_tflite
from fusion.export.manifest import Manifest, verify_manifest, write_manifest
from fusion.export.savedmodel import load as load_savedmodel
from fusion.export.savedmodel import save as save_savedmodel
from fusion.export.savedmodel import signatures_of
from fusion.export.tflite import check_runs, convert
from fusion.export.verify import compare
from fusion.files import atomic_folder, write_atomically
from fusion.types import Features
from recsys.collaborative.base import PADDING
from recsys.core import RankingCore
from recsys.examples import write_examples
from recsys.recommender import UNSCORED, ServedRecommender, contents_of
from recsys.run import PACKAGES
from recsys.schema import ITEM_ID, TEST, TITLE, USER_ID

if TYPE_CHECKING:
    from recsys.classification_task import ClassificationTask
    from recsys.ranking_task import RankingTask

ROWS = 100
"""Rows on which the forms of a model are compared."""
SAVEDMODEL_TOLERANCE, TFLITE_TOLERANCE = 1e-4, 1e-3
"""Largest difference of a fused score that passes. TFLite sums in another order, and standardised scores
magnify what is left of it."""
SWAPPED_RANKS = 1e-3
"""Share of fused scores that may differ by more, because near-equal scores of a member swapped ranks."""
TFLITE = "core.tflite"

Checks = list[dict[str, Any]]


def export_recommender(task: RankingTask) -> Path:
    """Exports what `served` names, with the members that its answers need; returns the artifact's folder.

    Raises GateError when SavedModel or `.tflite` answer other numbers than the members in memory.
    """
    name = served(task)
    core, members = task.exported(name)
    contents = contents_of(task.searchable(members))
    history, seen = task.known()
    data, k_max = task.interactions, task.experiment.export.k_max
    recommender = ServedRecommender(core, data.item_ids, data.user_ids, history, seen, k_max, contents)

    def write_others(folder: Path) -> Checks:
        table = data.catalogue[[c for c in data.catalogue.columns if c == TITLE]].copy()
        table.insert(0, ITEM_ID, data.item_ids)
        write_atomically(folder / "items.parquet", table.to_parquet(index=False))
        users = pd.DataFrame({USER_ID: data.user_ids})
        write_atomically(folder / "users.parquet", users.to_parquet(index=False))
        write_examples(folder, contents)
        return [_write_ranking_tflite(task, core, folder)] if task.experiment.export.tflite else []

    manifest = _described(task, "recommender", name, list(members))
    return _write_artifact(
        task, manifest, recommender, recommender.signatures(), write_others, lambda f: _compare_ranking(task, core, f)
    )


def export_classifier(task: ClassificationTask) -> Path:
    """Exports what `served` names, with the members that its answers need; returns the artifact's folder.

    Raises GateError when SavedModel or `.tflite` answer other numbers than the model in memory.
    """
    name = served(task)
    ensemble = task.ensemble(name)
    model = ensemble.functional()
    sample = _classifier_sample(task, ensemble)
    expected = {key: value.numpy() for key, value in model(sample, training=False).items()}
    # The variables without the model: of a Keras model every layer's functions would be written as well, which
    # nobody calls and which makes writing and loading ten times as slow.
    owner = tf.Module()
    owner.kept = model.variables

    def write_others(folder: Path) -> Checks:
        write_atomically(folder / "labels.json", json.dumps(task.classes))
        if not task.experiment.export.tflite:
            return []
        function = _named_function(model, {name: array[:1].shape for name, array in sample.items()})
        path = folder / TFLITE
        write_atomically(path, convert({"serving_default": function}, owner))
        rows = [{name: array[i : i + 1] for name, array in sample.items()} for i in range(len(sample["mask"]))]
        check_runs(path, rows[0])
        answers = [run_tflite(path, row)["probabilities"] for row in rows]
        found = {"probabilities": np.concatenate(answers)}
        known = {"probabilities": expected["probabilities"]}
        return [compare(known, found, TFLITE_TOLERANCE, "Keras and TFLite")]

    def compare_savedmodel(folder: Path) -> dict[str, Any]:
        loaded = load_savedmodel(folder).signatures["serving_default"]
        answered = loaded(**{name: tf.constant(array) for name, array in sample.items()})
        found = {name: tensor.numpy() for name, tensor in answered.items()}
        return compare(expected, found, SAVEDMODEL_TOLERANCE, "Keras and SavedModel")

    function = _named_function(model, {name: (None, *array.shape[1:]) for name, array in sample.items()})
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
    compare_savedmodel: Callable[[Path], dict[str, Any]],
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
        write_manifest(aside, Manifest(**manifest, signatures=signatures_of(aside)))
        checks.append(compare_savedmodel(aside))
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


# ---- rankings ------------------------------------------------------------------------------------------------


def _histories(task: RankingTask, longest: int) -> np.ndarray:
    """Histories int32 `[ROWS, longest]` of random users; of longer ones the latest items."""
    history, _ = task.known()
    users = np.flatnonzero(np.diff(history.indptr) > 0)
    chosen = np.random.default_rng(0).permutation(users)[:ROWS]
    result = np.full((len(chosen), longest), PADDING, np.int32)
    for row, user in zip(result, chosen, strict=True):
        latest = history.indices[history.indptr[user] : history.indptr[user + 1]][-longest:]
        row[: len(latest)] = latest
    return result


def _write_ranking_tflite(task: RankingTask, core: RankingCore, folder: Path) -> dict[str, Any]:
    length = task.experiment.export.tflite_history
    function = tf.function(
        # The contributions to all items cost next to nothing where a rule is additive, and too much elsewhere.
        lambda history: (
            dict(zip(("scores", "contributions"), core.explained(history), strict=True))
            if core.rule.additive
            else {"scores": core(history)}
        ),
        input_signature=[tf.TensorSpec([1, length], tf.int32, name="history")],
    )
    path = folder / TFLITE
    write_atomically(path, convert({"serving_default": function}, core))
    sample = _histories(task, length)
    check_runs(path, {"history": sample[:1]})
    expected = [function(tf.constant(row[None]))["scores"].numpy() for row in sample]
    found = [run_tflite(path, {"history": row[None]})["scores"] for row in sample]
    known, answered = {"scores": np.concatenate(expected)}, {"scores": np.concatenate(found)}
    return compare(known, answered, TFLITE_TOLERANCE, "Keras and TFLite", SWAPPED_RANKS)


def _compare_ranking(task: RankingTask, core: RankingCore, folder: Path) -> dict[str, Any]:
    item_ids = task.interactions.item_ids.astype(object)
    sample = _histories(task, 64)
    histories = np.where(sample < 0, "", item_ids[np.maximum(sample, 0)])
    candidates = np.broadcast_to(item_ids, (len(sample), len(item_ids)))
    loaded = load_savedmodel(folder).signatures["serving_default"]
    answered = loaded(history=tf.constant(histories, tf.string), candidates=tf.constant(candidates, tf.string))
    fused = core(tf.constant(sample)).numpy()
    expected = {"scores": np.where(np.isfinite(fused), fused, UNSCORED)}
    found = {"scores": answered["scores"].numpy()}
    return compare(expected, found, SAVEDMODEL_TOLERANCE, "Keras and SavedModel", SWAPPED_RANKS)


# ---- classes -------------------------------------------------------------------------------------------------


def _classifier_sample(task: ClassificationTask, ensemble: Ensemble) -> Features:
    """Inputs of the functional model for rows of the test part."""
    rows = task.rows(TEST)[:ROWS]
    names = list(ensemble.members)
    inputs = ensemble.prepare({name: task.values(name, rows) for name in names}, task.context(rows))
    return {**inputs, "mask": np.stack([task.available(name)[rows] for name in names], axis=1)}


def _named_function(model: keras.Model, shapes: dict[str, tuple[int | None, ...]]) -> Any:
    """The model as a function whose inputs and outputs keep their names; shapes of the inputs as given."""
    dtypes = {tensor.name.split(":")[0]: tensor.dtype for tensor in model.inputs}
    specs = {name: tf.TensorSpec(shape, dtypes[name], name=name) for name, shape in shapes.items()}
    function = tf.function(lambda **inputs: model(inputs, training=False))
    return function.get_concrete_function(**specs)
