"""What the stages of both tasks share: the run's folder as it is read and written, whatever is being learned."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from fusion.files import load_arrays, save_arrays, write_atomically
from fusion.rules import RULES
from fusion.rules.base import Rule
from fusion.types import Over
from recsys.fitting import Fitted, load_fitted
from recsys.run import Run
from recsys.schema import Dropped
from recsys.served import rule_to_serve


class Stages:
    """An experiment in the folder of one run; each stage reads what the earlier ones left there."""

    STAGES = ("data", "train", "fuse", "evaluate", "export")
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

    @property
    def everybody(self) -> list[str]:
        """Members that answer whatever is missing of a user or an example, the cheapest first."""
        return []

    def rule_to_serve(self, name: str) -> Rule:
        """The rule, or the member alone, over just the members that its answers need."""
        return rule_to_serve(self.rules, name, self.OVER, self.everybody)

    @property
    def rule_reports(self) -> dict[str, dict[str, Any]]:
        """What fitting each rule said: weights, losses."""
        return {
            name: json.loads(self.run.path("rules", name, "rule.json").read_text(encoding="utf-8"))
            for name in self.experiment.rules
        }
