"""Evaluates a classification run: chooses on validation, measures on test, and writes `report.json` and the page."""

from __future__ import annotations

import functools
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.compat import tf
from fusion.files import write_atomically
from fusion.rules.base import Rule
from fusion.types import derive_seed
from recsys import results
from recsys.collaborative.content import join_columns
from recsys.compare import save_values
from recsys.metrics import parse_metric
from recsys.report import write_report
from recsys.report_content import Mistake, ReportExtras
from recsys.schema import IMAGE, LABEL, TEST, VALIDATION
from recsys.significance import paired_difference

if TYPE_CHECKING:
    from recsys.classification_task import ClassificationTask


def write_classification_report(task: ClassificationTask) -> dict[str, Any]:
    """Classifies validation and test, and writes `report.json`, `report.html`, `plots/` and `model_card.md`."""
    evaluation = ClassificationEvaluation(task)
    report = evaluation.report()
    save_values(task.run.folder, task.rows(TEST), evaluation.test_values)
    write_atomically(task.run.path("report.json"), json.dumps(report, indent=1))
    write_report(task.run.folder, report, evaluation.extras(report))
    return report


class ClassificationEvaluation:
    """The figures of one run. Everything is chosen on validation; the test part is classified once."""

    def __init__(self, task: ClassificationTask) -> None:
        self.task = task
        self.experiment = task.experiment
        self.samples = task.experiment.evaluation.samples
        self.seed = derive_seed(task.experiment.seed, "bootstrap")
        self.metrics = [parse_metric(name, "classes") for name in task.experiment.metrics]
        self.primary = parse_metric(task.experiment.primary, "classes")

    def report(self) -> dict[str, Any]:
        """The content of `report.json`."""
        task, members, rules = self.task, list(self.experiment.members), list(self.experiment.rules)
        values, found = {}, {}
        for name, part in (("validation", VALIDATION), ("test", TEST)):
            self.logits, self.mask = task.part_logits(part)
            self.context = task.context(task.rows(part))
            self.probabilities = self._probabilities()
            values[name] = self._values(self.probabilities, self.mask, task.labels[task.rows(part)])
            found[name] = results.figures(values[name], self.samples, self.seed, len(self.logits))
        self.test_values = values["test"]
        best_member = results.best(found["validation"], members, self.primary)
        best_rule = results.best(found["validation"], rules, self.primary)
        return {
            "schema_version": results.SCHEMA_VERSION,
            "name": self.experiment.name,
            "task": "classification",
            "primary_metric": self.primary.name,
            "dataset": {
                "name": task.facts["name"],
                "examples": len(task.table),
                "classes": len(task.classes),
                "notes": task.facts["notes"],
                "hash": task.run.state["data_hash"],
                "dropped": {rule.rule: rule.rows for rule in task.dropped()},
            },
            "split": {
                "name": self.experiment.split.strategy,
                "hash": task.manifest.sha256,
                **task.part_counts(),
            },
            **results.split_systems(found["test"], members, rules),
            "best_member": best_member,
            "best_rule": best_rule,
            "validation": results.split_systems(found["validation"], members, rules),
            "segments": {},
            "significance": results.significance(values["test"], best_rule, best_member, self.samples, self.seed),
            "cost": self._cost(),
            "variants": {},
        }

    def _probabilities(self) -> dict[str, np.ndarray]:
        """Probabilities `[N, C]` of each member by itself and of each rule."""
        alone = tf.nn.softmax(tf.constant(self.logits), axis=2).numpy()
        result = {name: alone[:, position] for position, name in enumerate(self.experiment.members)}
        for name, rule in self.task.rules.items():
            result[name] = self._fused(rule, self.mask)
        return result

    def _fused(self, rule: Rule, mask: np.ndarray) -> np.ndarray:
        """Probabilities `[N, C]` of a rule over the members that `mask` `[N, S]` lets speak."""
        return rule.probabilities(rule(tf.constant(self.logits), tf.constant(mask), self.context)).numpy()

    def _values(self, probabilities: dict[str, np.ndarray], mask: np.ndarray, labels: np.ndarray) -> results.Values:
        """Every metric of every system; a member that had nothing to read has no value for that example."""
        members = list(self.experiment.members)
        values: results.Values = {}
        for name, found in probabilities.items():
            read = mask[:, members.index(name)] if name in members else np.ones(len(labels), bool)
            values[name] = {}
            for metric in self.metrics:
                value = metric.of_classes(labels[read], found[read])
                if isinstance(value, np.ndarray):
                    filled = np.full(len(labels), np.nan)
                    filled[read] = value
                    value = filled
                values[name][metric.name] = value
        return values

    def _cost(self) -> dict[str, Any]:
        """Parameters, bytes, and milliseconds for one example; FLOPs of the members' graphs."""
        task, cost = self.task, {}
        for name, fitted in task.fitted.items():
            member = fitted.member
            sample = member.submodel.prepare(task.values(name, task.rows(TEST)[:1]))
            function = tf.function(lambda inputs, model=member.model: model(inputs)["logits"]).get_concrete_function(
                {key: tf.TensorSpec(array.shape, array.dtype, name=key) for key, array in sample.items()}
            )
            inputs = {key: tf.constant(array) for key, array in sample.items()}
            cost[name] = {
                "parameters": member.parameters,
                "bytes": int(sum(weight.nbytes for weight in member.model.get_weights())),
                "train_s": round(fitted.seconds, 3),
                "flops": results.count_flops(function),
                **results.latency(functools.partial(function, **inputs)),
            }
        total = {key: sum(member[key] for member in cost.values()) for key in next(iter(cost.values()))}
        for name, rule in task.rules.items():
            context = {name: values[:1] for name, values in self.context.items()}
            one = tf.constant(self.logits[:1]), tf.constant(self.mask[:1]), context
            started = time.perf_counter()
            rule(*one)
            extra = 1000.0 * (time.perf_counter() - started)
            times = {key: round(total[key] + extra, 3) for key in ("p50_ms", "p95_ms")}
            cost[name] = {**total, **times}
        return cost

    # ---- what only the page shows -----------------------------------------------------------------------

    def extras(self, report: dict[str, Any]) -> ReportExtras:
        """Learning curves, drop-one-member, rule weights, mistakes, confusion."""
        task, best_rule = self.task, report["best_rule"]
        labels, found = task.labels[task.rows(TEST)], self.probabilities[best_rule]
        predicted = found.argmax(axis=1)
        confusion = np.zeros((len(task.classes), len(task.classes)), int)
        np.add.at(confusion, (labels, predicted), 1)
        return ReportExtras(
            metric=self.primary.name,
            name=self.experiment.name,
            learning_curves={n: f.history.epochs for n, f in task.fitted.items() if f.history and f.history.epochs},
            drop_one=self._drop_one(best_rule),
            rule_weights={n: r["weights"] for n, r in task.rule_reports.items() if "weights" in r},
            mistakes=self._mistakes(predicted, labels, found),
            confusion=confusion,
            classes=task.classes,
            cleaning=task.dropped(),
            config=task.run.path("config.yaml").read_text(encoding="utf-8"),
            warnings=self._warnings(report),
            environment=json.loads(task.run.path("environment.json").read_text(encoding="utf-8")),
        )

    def _drop_one(self, best_rule: str) -> dict[str, dict[str, Any]]:
        """The primary metric of the best rule with one member silenced, and what that member adds (paired)."""
        members = list(self.experiment.members)
        whole = self.test_values[best_rule][self.primary.name]
        labels, rule = self.task.labels[self.task.rows(TEST)], self.task.rules[best_rule]
        result = {}
        for position, name in enumerate(members if len(members) > 1 and isinstance(whole, np.ndarray) else []):
            heard = self.mask & (np.arange(len(members)) != position)
            values = np.asarray(self.primary.of_classes(labels, self._fused(rule, heard)))
            difference = dict(paired_difference(np.asarray(whole), values, self.samples, self.seed))
            result[name] = {"value": float(np.mean(values)), **difference}
        return result

    def _mistakes(self, predicted: np.ndarray, labels: np.ndarray, found: np.ndarray) -> list[Mistake]:
        """The wrong answers that were given with the most confidence."""
        wrong = np.flatnonzero(predicted != labels)
        surest = wrong[np.argsort(-found[wrong, predicted[wrong]], kind="stable")][:12]
        table = self.task.table.iloc[self.task.rows(TEST)[surest]]
        columns = [c for member in self.experiment.members.values() for c in member.config.columns]
        texts = join_columns(table, list(dict.fromkeys(columns)))
        classes = self.task.classes
        mistakes = []
        for text, row, (_, record) in zip(texts, surest, table.iterrows(), strict=True):
            picture = record[IMAGE] if IMAGE in table else None
            answer = predicted[row]
            mistakes.append(Mistake(text, record[LABEL], classes[answer], float(found[row, answer]), picture))
        return mistakes

    def _warnings(self, report: dict[str, Any]) -> list[str]:
        difference = report["significance"].get(self.primary.name)
        if difference and difference["low"] is not None and difference["low"] <= 0 <= difference["high"]:
            return [
                f"The interval of {report['best_rule']} against {report['best_member']} on {self.primary.name} "
                "includes zero: fusing is not shown to pay here."
            ]
        return []
