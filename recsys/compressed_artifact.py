"""The `.tflite` files of an artifact as a recipe makes them smaller (`export.recipe`).

The recipe is judged on the members that were evaluated; the artifact holds members that know more rows
(`export.refit`). So what keeps its promise is applied once more to those, unless they are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusion.compat import tf
from fusion.compression.base import told
from fusion.errors import ConfigError
from fusion.export.joining import with_output
from fusion.files import write_atomically
from fusion.types import Features
from recsys.compressed_classes import ClassCompression
from recsys.compressed_rankings import RankingCompression
from recsys.compression import KINDS, kept_promise
from recsys.compression_page import FOLDER, reports_of, variants
from recsys.core import RankingCore
from recsys.recipes import SEARCHED, Recipe, recipe_named
from recsys.tflite_files import ENCODERS, Checks, histories, write_core, write_joined, write_members

FIRST = 10
"""Items of two lists that are compared."""
_EXPORTED = ".exported"
"""Folder of what recipes made of members as they are exported, below `compressed`."""


class Applied(NamedTuple):
    """A recipe that kept its promise.

    Attributes:
        compression: it, over the members as they are exported.
        report: what it did to the members that were evaluated.
    """

    compression: Any
    report: Mapping[str, Any]


def applied(task: Any, served: str) -> Applied | None:
    """The recipe that `export.recipe` names, applied to the run where it has not been; None where none is named.

    Args:
        task: evaluated.
        served: name of the rule, or of the member alone, that is exported.

    Raises:
        GateError: it breaks its promise, or achieves nothing.
        ConfigError: a search is named that was not made, or another rule is exported than the one it is judged with.
    """
    name = task.experiment.export.recipe
    if not name:
        return None
    recipe = _recipe(task, name)
    report = kept_promise(task, "export.recipe", name, recipe, served)
    exported = copy.copy(task)
    again = task.to_export(task.rule_to_serve(served).members)
    exported.fitted = {**task.fitted, **again}
    compression = KINDS[task.OVER](exported, name, recipe)
    compression.folder = task.run.path(FOLDER, _EXPORTED, name)
    return Applied(compression, report)


def _recipe(task: Any, name: str) -> Recipe:
    if name != SEARCHED:
        return recipe_named(name, task.experiment.compress)
    report = reports_of(task.run.folder).get(name)
    if report is None:
        raise ConfigError(
            f"export.recipe '{SEARCHED}' is what a search found for the members of a classifier, and {task.run.folder} "
            "has none. Run tools/compress.py with --budget and --max-drop first; of a ranking, name the recipe that it "
            "chose."
        )
    return Recipe.model_validate(report["settings"])


def write_ranking(task: Any, found: Applied, core: RankingCore, folder: Path) -> tuple[Checks, dict[str, Any]]:
    """Writes `core.tflite`, `members/<name>.tflite`, and `encoders/<name>.tflite` of compressed encoders.

    Args:
        task: of a ranking.
        found: the recipe.
        core: what the SavedModel holds.
        folder: of the artifact.

    Returns how the files compare with the compressed members in memory, and what the manifest says of the recipe.
    """
    compression: RankingCompression = found.compression
    compression.task.member_scores = core.members
    facts, what = compression.members(), f"recipe {compression.name} in memory"
    small = compression.core(after=True)
    checks = [write_core(task, small, folder, what), *write_members(task, small, folder, what)]
    for name in facts:
        (folder / ENCODERS).mkdir(exist_ok=True)
        encoder = (compression.folder / name / "encoder.tflite").read_bytes()
        write_atomically(folder / ENCODERS / f"{name}.tflite", with_output(encoder, "embedding"))
    sample = tf.constant(histories(task, task.experiment.export.tflite_history))
    return checks, {**_facts(found, facts), "agreement": {f"overlap@{FIRST}": _overlap(core(sample), small(sample))}}


def write_classes(
    task: Any, found: Applied, sample: Features, expected: np.ndarray, folder: Path
) -> tuple[Checks, dict[str, Any]]:
    """Writes `members/<name>.tflite` and, fused, `core.tflite`; or `rule.tflite` where these cannot be one file.

    Args:
        task: of a classification.
        found: the recipe.
        sample: rows of inputs of what the SavedModel holds.
        expected: what it answers, probabilities `[n, C]`.
        folder: of the artifact.

    Returns how the files compare with each other, and what the manifest says of the recipe.
    """
    compression: ClassCompression = found.compression
    facts, rule = compression.members(), compression.rule_after
    parts = {name: (compression.folder / name / "model.tflite").read_bytes() for name in rule.members}
    places = [compression.rule.members.index(name) for name in rule.members]
    inputs = {name: array for name, array in sample.items() if not name.startswith("context_")}
    inputs |= {f"context_{name}": sample[f"context_{name}"] for name in rule.reads(rule.config)}
    checks, probabilities, apart = write_joined(parts, rule, {**inputs, "mask": sample["mask"][:, places]}, folder)
    same = float(np.mean(probabilities.argmax(axis=1) == expected.argmax(axis=1)))
    said = {**_facts(found, facts), "members": list(rule.members), "agreement": {"same class": round(same, 4)}}
    return checks, {**said, **({"apart": apart} if apart else {})}


def _facts(found: Applied, members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifest says: the recipe as it was judged, and what it leaves alone of the exported members."""
    report, name = found.report, found.compression.name
    alone = {}
    for member, facts in members.items():
        sentences = [facts["skipped"], *(told(step["left_alone"]) for step in facts["steps"])]
        if any(sentences):
            alone[member] = "; ".join(filter(None, sentences))
    return {
        "recipe": name,
        "settings": report["settings"],
        **variants({name: report})[name],
        "left_alone": alone,
    }


def _overlap(one: tf.Tensor, other: tf.Tensor) -> float:
    """The mean share of the first items that two lists have in common, of fused scores `[n, I]`."""
    k = min(FIRST, one.shape[1])
    first, second = (tf.math.top_k(scores, k).indices.numpy() for scores in (one, other))
    shares = [len(set(a) & set(b)) / k for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return round(float(np.mean(shares)), 4)
