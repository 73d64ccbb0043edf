"""What the stages of both tasks share: the run's folder as it is read and written, whatever is being learned."""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fusion.config import Part
from fusion.errors import ConfigError, EngineError, GateError
from fusion.files import load_arrays, save_arrays, write_atomically
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.training.strategy import strategy_of
from fusion.types import Over
from recsys.fitting import FitData, Fitted, fit_member, folder_of, load_fitted
from recsys.plan import estimate
from recsys.run import Run
from recsys.schema import Dropped
from recsys.served import rule_to_serve
from recsys.soups import Judge, Recipe, fit_soup
from recsys.tuning import Grid
from recsys.warm_starts import warnings
from recsys.workers import Job, Portion, work


class Stages(abc.ABC):
    """An experiment in the folder of one run; each stage reads what the earlier ones left there."""

    STAGES = ("data", "train", "fuse", "evaluate", "export", "compress")
    OVER: ClassVar[Over]
    """What the rules fuse: classes or candidates."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.experiment = run.experiment

    def _keep_facts(self, name: str, notes: list[str], dropped: list[Dropped]) -> None:
        facts = {"name": name, "notes": notes, "dropped": [vars(rule) for rule in dropped]}
        write_atomically(self.run.path("data", "cleaning.json"), json.dumps(facts, indent=2))

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Name, notes and what cleaning dropped."""
        return json.loads(self.run.path("data", "cleaning.json").read_text(encoding="utf-8"))

    def dropped(self) -> list[Dropped]:
        """What cleaning removed."""
        return [Dropped(**rule) for rule in self.facts["dropped"]]

    @functools.cached_property
    def fitted(self) -> dict[str, Fitted]:
        """The members that `train` left."""
        return {
            name: load_fitted(self.run.path("submodels", name), name, part.registry, self.experiment.seed)
            for name, part in self.experiment.members.items()
        }

    @property
    @abc.abstractmethod
    def joined(self) -> list[str]:
        """Names of the members that are trained together."""

    def joint(self) -> dict[str, Any]:
        """What joint training did: facts that it told, members, epochs, and by epoch the cosines of
        `fusion.training.conflict`; empty where each member was trained by itself."""
        if not self.joined:
            return {}
        facts = json.loads(self.run.path("submodels", self.joined[0], "member.json").read_text(encoding="utf-8"))
        epochs = facts["history"]["epochs"]
        measured = [name for name in epochs[0] if name.startswith("conflict/")]
        return {
            **facts.get("joint", {}),  # older runs do not tell
            "members": self.joined,
            "epochs": len(epochs),
            "best_epoch": facts["history"]["best_epoch"] + 1,
            "conflict": {name.removeprefix("conflict/"): [row[name] for row in epochs] for name in measured},
        }

    @property
    def recipes(self) -> dict[str, Part]:
        """By member the settings with which it is fitted on other rows than those of training."""
        return {name: fitted.recipe for name, fitted in self.fitted.items()}

    @property
    def soups(self) -> dict[str, dict[str, Any]]:
        """What became of the copies of each member that is the mean of several, see `recsys.soups.fit_soup`."""
        return {name: fitted.soup for name, fitted in self.fitted.items() if fitted.soup}

    def fit(self, name: str, part: Part, data: FitData) -> Fitted:
        """The member `name` by the settings `part`, fitted or out of the cache."""
        given: dict[str, Any] = {"strategy": strategy_of(self.experiment.strategy, name), "quiet": self.run.quiet}
        if recipe := self._soup(name, part, data):
            return fit_soup(recipe, data, self.experiment.seed, **given)
        return fit_member(name, part, data, self.experiment.seed, **given)

    def _soup(self, name: str, part: Part, data: FitData) -> Recipe | None:
        """How the member is averaged out of copies, if it is."""
        if name not in self.experiment.soups:
            return None
        judge = self.judge(name, data)
        known = None if judge else (self.fitted[name].soup or {}).get("copies")
        return Recipe(name, part, self.experiment.soups[name], judge, known)

    def _folder(self, name: str, part: Part, data: FitData) -> Path:
        """Where the cache keeps the member once it is fitted."""
        recipe = self._soup(name, part, data)
        seed = self.experiment.seed
        return recipe.folder(data, seed) if recipe else folder_of(name, part, data, seed)

    @abc.abstractmethod
    def judge(self, name: str, data: FitData) -> Judge | None:
        """What copies of the member are compared by on the validation rows of `data`; None where it has none."""

    @abc.abstractmethod
    def portion_data(self, portion: Portion, name: str) -> FitData:
        """The rows of a portion as the member `name` is fitted on them."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int, int, int]:
        """Users, items, rows to be fitted on, and texts or images: what the time of a fit goes with."""

    def _fit_ahead(
        self, portions: Sequence[Portion], parts: Mapping[str, Part], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Where `training.processes` asks for several processes, these now fit what does not lie in the cache yet.

        Returns by member of `grids` what the search for its settings found (see `recsys.worker.answer`): nothing where
        this process is to do everything itself.
        """
        processes = self.experiment.training.processes
        if processes == 1:
            return {}
        jobs = []
        for portion in portions:
            for name, part in parts.items():
                grid = (grids or {}).get(name, {})
                folder = self._folder(name, part, self.portion_data(portion, name))
                if grid or not folder.exists():
                    seconds = self._seconds(name, part) * max(1, sum(map(len, grid.values())))
                    jobs.append(Job(name, part, portion, "" if grid else folder.name, seconds, grid))
        answers = work(jobs, processes, self.run.folder, quiet=self.run.quiet)
        return {job.name: answer for job, answer in zip(jobs, answers, strict=True) if job.grid}

    def _seconds(self, name: str, part: Part) -> float:
        """About how long a fit takes: as long as the one on the training rows did, or what `recsys.plan` expects."""
        kept = self.run.folder / "submodels" / name / "member.json"
        if kept.is_file():
            return float(json.loads(kept.read_text(encoding="utf-8"))["seconds"])
        expected = estimate(part, *self.size)
        return float(expected["embed_s"] + expected["fit_s"])

    def _new_rules(self) -> dict[str, Rule]:
        return {name: self._new_rule(name) for name in self.experiment.rules}

    def _new_rule(self, name: str) -> Rule:
        part = self.experiment.rules[name]
        rule: Rule = RULES[part.kind](part.config, list(self.experiment.members), self.OVER, name=name)
        return rule

    def _keep_rules(self, rules: Mapping[str, Rule], reports: Mapping[str, dict[str, Any]]) -> None:
        """Writes every rule, and what fitting it said, to `rules/<name>/`."""
        for name, rule in rules.items():
            folder = self.run.path("rules", name)
            folder.mkdir(exist_ok=True)
            save_arrays(folder / "state.npz", rule.state())
            write_atomically(folder / "rule.json", json.dumps(reports.get(name, {}), indent=2, default=float))

    @functools.cached_property
    def rules(self) -> dict[str, Rule]:
        """The rules that `fuse` left."""
        rules = self._new_rules()
        for name, rule in rules.items():
            rule.load_state(load_arrays(self.run.path("rules", name, "state.npz")))
        return rules

    @abc.abstractmethod
    def to_export(self, names: Collection[str] | None = None) -> dict[str, Fitted]:
        """The members, all or some, as they are exported: once more fitted where `export.refit` says so."""

    def compress(self) -> None:
        """Applies the recipes of the config to what is served; the artifact is there whatever becomes of them, but for
        the one that it is made of (`export.recipe`), which has been applied by then.

        Each is applied, whatever becomes of the others.

        Raises:
            GateError: recipes broke their promises, or achieved nothing; where it is several, all are named.
            ConfigError: the only one that failed asks for what the run does not have.
        """
        from recsys.compression import compress_task

        export = self.experiment.export
        failed: dict[str, EngineError] = {}
        for name, recipe in self.experiment.compress.items():
            if not (export.enabled and name in (export.recipe, export.fast)):
                try:
                    compress_task(self, name, recipe)
                except (GateError, ConfigError) as error:
                    failed[name] = error
        if len(failed) == 1:
            raise next(iter(failed.values()))
        if failed:
            sentences = " ".join(f"{name}: {error}" for name, error in failed.items())
            raise GateError(f"the recipes {', '.join(failed)} of compress failed, all others were applied. {sentences}")

    @property
    def everybody(self) -> list[str]:
        """Members that answer whatever is missing of a user or an example, the cheapest first."""
        return []

    def rule_to_serve(self, name: str) -> Rule:
        """The rule, or the member alone, over just the members that its answers need."""
        return rule_to_serve(self.rules, name, self.OVER, self.everybody)

    def warm_starts(self, split: str) -> Iterable[str]:
        """What a reader must know of members that started from others; `split` is the hash of this run's."""
        refitted = self.experiment.fits_out_of_fold > 0 and any(rule.learned for rule in self.rules.values())
        return warnings({n: f.start for n, f in self.fitted.items()}, split, refitted_rules=refitted)

    @property
    def rule_reports(self) -> dict[str, dict[str, Any]]:
        """What fitting each rule said: weights, losses."""
        return {
            name: json.loads(self.run.path("rules", name, "rule.json").read_text(encoding="utf-8"))
            for name in self.experiment.rules
        }
