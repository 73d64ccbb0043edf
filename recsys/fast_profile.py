"""The profile `fast` of an artifact: a student of the whole ensemble, served as `recommend_fast` beside `recommend`.

The recipe is judged on the members that were evaluated; the artifact holds members that know more rows
(`export.refit`). So a student that keeps its promise learns once more, from those, for as many epochs as were best.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion.config import content_hash
from fusion.files import sha256_of
from fusion.types import RunOptions, derive_seed
from recsys.compressed_rankings import STUDENT, STUDENT_FILE
from recsys.compression import cell, kept_promise
from recsys.compression_page import FOLDER
from recsys.core import RankingCore
from recsys.ranking_student import Student, StudentScorer, StudentSettings, distil
from recsys.recipes import recipe_named
from recsys.run import code_version

if TYPE_CHECKING:
    from recsys.ranking_task import RankingTask

SIGNATURE = "recommend_fast"


class FastProfile(NamedTuple):
    """A student that kept its promise.

    Attributes:
        scorer: histories int32 `[B, L]` -> scores float32 `[B, I]`.
        told: what the manifest says of it: `signature`, `member` (whose contributions it returns), `recipe`, and the
            `figures` and `differences` on test of the student that was judged.
    """

    scorer: StudentScorer
    told: dict[str, Any]


def fast_profile(task: RankingTask, served: str, core: RankingCore) -> FastProfile | None:
    """The student that `export.fast` names; None where it names none. Its recipe is applied where it has not been.

    The SavedModel keeps it in float32 whatever the recipe says of tables: to unpack them takes longer than to read
    them.

    Args:
        task: evaluated.
        served: name of the rule, or of the member alone, that is exported.
        core: what is exported of it.

    Raises:
        GateError: the student breaks the recipe's promise.
        ConfigError: it is judged beside another rule than the one that is exported.
    """
    name = task.experiment.export.fast
    if not name:
        return None
    recipe = recipe_named(name, task.experiment.compress)
    report = kept_promise(task, "export.fast", name, recipe, served)
    student = Student.load(task.run.path(FOLDER, name, STUDENT, STUDENT_FILE))
    if task.experiment.export.refit == "all":
        student = _taught_again(task, core, recipe.student, report["student"]["best_epoch"])
    told = {"signature": SIGNATURE, "member": STUDENT, "recipe": name}
    told |= {"figures": report["figures"]["after"], "differences": report["differences"]["test"]}
    return FastProfile(student.scorer(), told)


def _taught_again(task: RankingTask, core: RankingCore, settings: StudentSettings, epochs: int) -> Student:
    """Taught by the members that are exported, on all histories, for so many epochs."""
    training = settings.training.model_copy(update={"epochs": epochs, "patience": 0})
    again = settings.model_copy(update={"training": training, "held_out": 0.0})
    states = {
        name: sha256_of(fitted.folder / "state.npz") for name, fitted in task.to_export(core.rule.members).items()
    }
    rule = {name: sha256_of(task.run.path("rules", name, "state.npz")) for name in task.experiment.rules}
    key = content_hash([again.model_dump(mode="json"), states, rule, core.rule.name, code_version()])
    data = task.interactions

    def learn(folder: Path, options: RunOptions) -> None:
        distil(core, data.matrix(data.positive), again, options)[0].save(folder / STUDENT_FILE)

    kept = cell(task.run, key, STUDENT, derive_seed(task.experiment.seed, "compression", STUDENT), learn)
    return Student.load(kept / STUDENT_FILE)
