"""Applies recipes to what a finished run serves, measures what that costs and says whether the promise holds.

What becomes of each member is a cell of its own in `compressed/<recipe>/<member>/`: the `.tflite`, what it answers and
a report. What is finished is never done again, whatever interrupts. A recipe's folder is replaced as a whole, and only
by what kept its promise; what broke it goes to `compressed/<recipe>.refused/`.
"""

from __future__ import annotations

import abc
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fusion.compression.recipe import Outcome
from fusion.config import Part, content_hash
from fusion.errors import ConfigError, GateError
from fusion.files import atomic_folder, sha256_of, write_atomically
from fusion.progress import note
from fusion.registry import Registry
from fusion.rules.base import Rule
from fusion.types import Over, RunOptions, derive_seed
from recsys import results
from recsys.compression_page import FOLDER, REFUSED, refused_of, renew, reports_of, variants
from recsys.fitting import keep_copy
from recsys.metrics import Metric, parse_metric
from recsys.pipeline import TASKS, machine_faults
from recsys.recipes import Recipe
from recsys.run import Run, code_version, compressing_version
from recsys.schema import TEST, VALIDATION
from recsys.significance import paired_difference

PARTS = {"validation": VALIDATION, "test": TEST}

KINDS = Registry(
    "kind of compression",
    {
        "classes": "recsys.compressed_classes:ClassCompression",
        "candidates": "recsys.compressed_rankings:RankingCompression",
    },
)

Values = dict[str, "np.ndarray | float"]
"""By metric one value a row (a user) `[n]`, or one number."""


def compress_run(run: Run, name: str, recipe: Recipe, max_drop: float | None = None) -> dict[str, Any]:
    """Compresses the members of what the run serves and fuses what is left; returns the recipe's report.

    The report goes to `compressed/<name>/report.json`, and the figures into `variants` of the run's report. Where the
    promise is broken, the report goes to `compressed/<name>.refused/`, and what stood under the name stays.

    Args:
        run: finished as far as its evaluation.
        name: of the recipe.
        recipe: what is done.
        max_drop: the most that may be lost of the deciding metric, in place of what the recipe says.

    Raises:
        ConfigError: the run is not evaluated, or the recipe names what it does not have.
        GateError: a method achieved nothing, or more was lost than was promised; the report says so too.
    """
    return _kept(_applied_to(run, name, recipe, max_drop))


def _applied_to(run: Run, name: str, recipe: Recipe, max_drop: float | None) -> dict[str, Any]:
    if max_drop is not None:
        recipe = recipe.model_copy(update={"max_drop": {run.experiment.primary: max_drop}})
    check_evaluated(run)
    with machine_faults(run.folder), run.locked():
        return _apply(TASKS[run.experiment.task](run), name, recipe)


def compress_all(
    run: Run, recipes: Mapping[str, Recipe], max_drop: float | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every recipe, one after the other, as `compress_run`; by name the reports, and what was refused and why.

    A recipe that keeps its promise not, achieves nothing or does not fit the run stops no other one. Cells that are
    there are not made again, so an interrupted call is continued by the next one.
    """
    reports, refused = {}, {}
    for name, recipe in recipes.items():
        try:
            reports[name] = _applied_to(run, name, recipe, max_drop)
            _kept(reports[name])
        except (GateError, ConfigError) as error:
            note(f"{name}: {error}", quiet=run.quiet)
            refused[name] = str(error)
    return reports, refused


def check_evaluated(run: Run) -> None:
    """Raises ConfigError for a run that did not get as far as its evaluation."""
    if not run.done("evaluate"):
        raise ConfigError(
            f"what is compressed must be an evaluated run; {run.folder} did not get that far. Run tools/train.py with "
            "its config again to continue it."
        )


def compress_task(task: Any, name: str, recipe: Recipe) -> dict[str, Any]:
    """As `compress_run`, for a task whose run is locked."""
    return _kept(_apply(task, name, recipe))


def _apply(task: Any, name: str, recipe: Recipe) -> dict[str, Any]:
    """The report of a recipe, which is made aside: whatever happens on the way, what stands under its name stays."""
    recipe.check(task.experiment.members, task.experiment.metrics)
    made: Compression = KINDS[task.OVER](task, name, recipe)
    made.check_promise()
    kept = task.run.path(FOLDER, name)
    refused = kept.with_name(name + REFUSED)
    with aside(task.run, name) as folder:
        made.folder = folder
        found = made.report()
        write_atomically(folder / "report.json", json.dumps(found, indent=2))
        keep_copy(folder, refused if _broken_promise(found) else kept)
    if not _broken_promise(found):
        shutil.rmtree(refused, ignore_errors=True)  # of an earlier call, with other settings or another promise
    _keep_variants(task.run)
    return found


def _broken_promise(report: Mapping[str, Any]) -> str:
    """What is wrong with the first promise that is broken; empty where all are kept."""
    return next(filter(None, report["gate"].values()), "")


def _kept(report: dict[str, Any]) -> dict[str, Any]:
    """The report; GateError where it says that a promise is broken."""
    if broken := _broken_promise(report):
        raise GateError(f"recipe {report['recipe']}: {broken} What is served stays as it is.")
    return report


@contextlib.contextmanager
def aside(run: Run, name: str) -> Iterator[Path]:
    """A folder for what the recipe `name` makes until it is judged; it is gone afterwards."""
    folder = run.path(FOLDER, ".aside", name)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kept_promise(task: Any, key: str, name: str, recipe: Recipe, served: str) -> dict[str, Any]:
    """The report of a recipe that is to be exported; it is applied where it has not been, or was by other code.

    Args:
        task: evaluated.
        key: of the config, which names the recipe.
        name: of the recipe.
        recipe: what is done.
        served: name of the rule, or of the member alone, that is exported.

    Raises:
        GateError: the recipe breaks its promise, or achieves nothing.
        ConfigError: another rule is exported than the one it is judged with.
    """
    asked: Compression = KINDS[task.OVER](task, name, recipe)
    if asked.served != served:
        raise ConfigError(
            f"a recipe must be judged with the rule that is exported; '{name}' is with '{asked.served}', and "
            f"'{served}' is to be exported. Leave export.rule or {key} out."
        )
    report = _judged(asked) or compress_task(task, name, recipe)
    if broken := _broken_promise(report):
        raise GateError(
            f"{key}: recipe {name}: {broken} No artifact is made of it, and the last one stays; name another recipe."
        )
    return report


def _judged(asked: Compression) -> dict[str, Any] | None:
    """The report of just this recipe over just this run by this code, the one that kept its promise first; None where
    there is none. A recipe that promises nothing may have been held to a promise of its caller's."""
    told, basis = asked.recipe.model_dump(mode="json"), asked.basis()
    for reports in (reports_of(asked.task.run.folder), refused_of(asked.task.run.folder)):
        report = reports.get(asked.name)
        if report is not None and report["served"] == asked.served and report.get("basis") == basis:
            promised = told["max_drop"] or report["settings"]["max_drop"]
            if report["settings"] == told | {"max_drop": promised}:
                return report
    return None


def cell(run: Run, key: str, name: str, seed: int, make: Callable[[Path, RunOptions], None]) -> Path:
    """The folder in `compressed/.cells` of this `key` and the code, which `make` fills, aside, unless it is there
    already. What is interrupted in training is continued by the next call. Progress is shown under `name`."""
    key = content_hash([key, compressing_version()])
    kept = run.path(FOLDER, ".cells", key)
    if not kept.exists():
        work = run.path(FOLDER, ".work", key)
        with atomic_folder(kept) as aside:
            make(aside, RunOptions(seed, work / name, quiet=run.quiet))
        shutil.rmtree(work, ignore_errors=True)
    return kept


def _keep_variants(run: Run) -> None:
    """Beside members and rules in the run's report, where `tools/compare.py` finds them, and on its page."""
    path = run.path("report.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    report["variants"] = variants(reports_of(run.folder))
    write_atomically(path, json.dumps(report, indent=1))
    renew(run.folder, report["primary_metric"])


class Compression(abc.ABC):
    """One recipe over what a run serves.

    Attributes:
        served: the name of the rule, or of the member alone, that is served.
        rule: it, over just the members that its answers need.
        folder: where the members' cells are linked, and files of the whole are written.
        metric: the one that decides.
    """

    OVER: ClassVar[Over]

    def __init__(self, task: Any, name: str, recipe: Recipe) -> None:
        self.task, self.name, self.recipe = task, name, recipe
        report = json.loads(task.run.path("report.json").read_text(encoding="utf-8"))
        self.served: str = report.get("served", report["best_rule"])  # older runs do not name it
        self.rule: Rule = task.rule_to_serve(self.served)
        self.folder: Path = task.run.path(FOLDER, name)
        self.metric = parse_metric(task.experiment.primary, self.OVER)

    @abc.abstractmethod
    def members(self) -> dict[str, dict[str, Any]]:
        """Compresses what is not compressed yet; by member with a network what `Outcome.dump` says of it."""

    @abc.abstractmethod
    def values(self, part: str, *, after: bool) -> Values:
        """Every metric of what is served, on a part, as it was or `after` compression."""

    @abc.abstractmethod
    def cost(self, *, after: bool) -> dict[str, Any]:
        """`bytes`, `flops`, `p50_ms` and `p95_ms` of an answer in LiteRT, of all members together."""

    def report(self) -> dict[str, Any]:
        """Compresses what is not compressed yet, and what that changed of what is served."""
        members = self.members()
        settings, seed = self.task.experiment.evaluation, self.task.experiment.seed
        values = {
            part: {when: self.values(part, after=when == "after") for when in ("before", "after")} for part in PARTS
        }
        differences = {
            part: {
                metric: difference_of(new, found["before"][metric], settings.samples, seed)
                for metric, new in found["after"].items()
            }
            for part, found in values.items()
        }
        figures = {
            part: results.figures(found, settings.samples, seed, self._rows(part, found["after"]))
            for part, found in values.items()
        }
        return {
            "schema_version": results.SCHEMA_VERSION,
            "recipe": self.name,
            "settings": self.recipe.model_dump(mode="json"),
            "basis": self.basis(),
            "served": self.served,
            "metric": self.metric.name,
            "members": members,
            "figures": figures["test"],
            "validation": figures["validation"],
            "differences": differences,
            "gate": {m: self._broken(m, most, differences["validation"]) for m, most in self.recipe.max_drop.items()},
            "cost": {when: self.cost(after=when == "after") for when in ("before", "after")},
        }

    def check_promise(self) -> None:
        """Raises ConfigError where a promise is made on a metric that needs what the catalogue does not have."""
        for name in self.recipe.max_drop:
            needs = parse_metric(name, self.OVER).needs
            if needs and getattr(self.task.catalogue(), needs) is None:
                raise ConfigError(
                    f"max_drop must name metrics that can be measured; '{name}' needs the {needs} of the catalogue, "
                    "which this run does not have. Name another one."
                )

    def _rows(self, part: str, values: Values) -> int:
        """Rows (users) of a part, also where every metric is one number of all of them."""
        counts = [len(value) for value in values.values() if isinstance(value, np.ndarray)]
        return counts[0] if counts else len(self.task.rows(PARTS[part]))

    def _broken(self, name: str, most: float, differences: Mapping[str, Any]) -> str:
        """What is wrong where more was lost of a metric on the validation rows than was promised; else empty."""
        metric: Metric = parse_metric(name, self.OVER)
        difference = differences[name]["difference"]
        if difference is None:
            return f"{name} must be defined on the validation rows for a promise to be held to it; it is not."
        lost = difference * (-1 if metric.higher_is_better else 1)
        if lost <= most:
            return ""
        return f"{name} must not get worse by more than {most:g} on the validation rows; it did by {lost:.4f}."

    @staticmethod
    def tried(compressed: Callable[[], Outcome]) -> tuple[Outcome | None, str]:
        """What compression gives, or None and why: steps for all members may have nothing to do for one of them."""
        try:
            return compressed(), ""
        except GateError as error:
            return None, str(error)

    def check_useful(self, members: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises GateError where no step was of use to any member."""
        if not any(facts["steps"] for facts in members.values()):
            reasons = " ".join(dict.fromkeys(facts["skipped"] for facts in members.values() if facts["skipped"]))
            raise GateError(
                f"nothing of recipe {self.name} was of use: {reasons or 'it has no steps for the members.'}"
            )

    def steps_for(self, member: str, *, network: bool) -> tuple[Part, ...]:
        """The methods for the network of a member, which may have none; ConfigError where these were asked for by the
        name of one that has none."""
        steps = self.recipe.steps_for(member)
        if steps and not network and member in self.recipe.members:
            raise ConfigError(
                f"steps must be for a member with a network; '{member}', which recipe {self.name} names, has none. "
                "Leave it out."
            )
        return steps if network else ()

    def cell(
        self, member: str, steps: tuple[Part, ...], make: Callable[[Path, RunOptions], dict[str, Any]]
    ) -> dict[str, Any]:
        """The report of a member's cell, which `make` fills, in a folder aside, unless it is there already. GateError
        where steps that were asked for by the member's name had nothing to do.

        Recipes share cells, which are linked to the recipe's own folder.
        """

        def filled(folder: Path, options: RunOptions) -> None:
            note(f"{self.name}: {member}", quiet=options.quiet)
            write_atomically(folder / "report.json", json.dumps(make(folder, options), indent=2))

        seed = derive_seed(self.task.experiment.seed, "compression", member)
        kept = cell(self.task.run, self._key(member, steps), member, seed, filled)
        keep_copy(kept, self.folder / member)
        found: dict[str, Any] = json.loads((kept / "report.json").read_text(encoding="utf-8"))
        if found["skipped"] and member in self.recipe.members:
            raise GateError(found["skipped"])
        return found

    def basis(self) -> str:
        """Names all that the report depends on beside the recipe: what is served, the data and the code."""
        return content_hash([self._teacher(), self.task.manifest.sha256, code_version(), compressing_version()])

    def _key(self, member: str, steps: tuple[Part, ...]) -> str:
        """Names all that the cell depends on but for the code of compression, which `cell` adds."""
        told = [part.dump() for part in steps]
        teacher = self._teacher() if member == self.recipe.student else ""
        fitted = self._fitted(member)
        return content_hash([member, told, fitted, teacher, code_version(), self.task.manifest.sha256])

    def _fitted(self, member: str) -> str:
        """Names what is compressed of a member."""
        return sha256_of(self.task.fitted[member].folder / "state.npz")

    def _teacher(self) -> str:
        """Names all that what is served depends on, for cells that learn from all of it."""
        states = {name: sha256_of(self.task.fitted[name].folder / "state.npz") for name in self.rule.members}
        rules = [sha256_of(path) for path in sorted(self.task.run.path("rules").glob("*/state.npz"))]
        return content_hash([self.served, states, rules])


def difference_of(new: np.ndarray | float, old: np.ndarray | float, samples: int, seed: int) -> dict[str, Any]:
    """`difference` new - old, `low`, `high` and `n`, paired over rows; of metrics that are one number of all rows the
    plain difference without bounds, None where it is undefined."""
    if isinstance(new, np.ndarray) and isinstance(old, np.ndarray):
        return dict(paired_difference(new, old, samples, seed))
    difference = float(np.mean(new) - np.mean(old))
    return {"difference": None if np.isnan(difference) else difference, "low": None, "high": None, "n": 0}
