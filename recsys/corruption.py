"""What the chosen rule loses when one member goes wrong, beside what that member loses itself (A10).

A member that gives NaN or nothing is silent, and the others answer. One that gives noise is believed by a rule without
a guard, and silent on the rows on which a guard notices it (`fusion.rules.guard`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.registry import nearest
from fusion.rules.base import Rule
from fusion.rules.normalisation import speaking_rows
from fusion.types import Context, derive_seed
from recsys.ensemble_study import without
from recsys.evaluation import blocks, question
from recsys.metrics import parse_metric
from recsys.pipeline import TASKS
from recsys.report_words import higher_is_better, number, signed
from recsys.run import Run
from recsys.schema import TEST
from recsys.significance import paired_difference

if TYPE_CHECKING:
    from recsys.classification_task import ClassificationTask
    from recsys.ranking_task import RankingTask

How = Literal["noise", "nan", "missing"]
"""noise: its scores are dealt anew among what it speaks on; nan: not a number; missing: it does not answer."""


class Corruption:
    """Spoils one member's scores `[B, S, C]`, and may say so in the mask `[B, S, C]`."""

    def __init__(self, member: int, how: How, seed: int) -> None:
        self.member = member
        self.how = how
        self.seed = seed

    def __call__(self, scores: Any, mask: Any) -> tuple[Any, Any]:
        """The scores and the mask as they then are."""
        struck = tf.range(tf.shape(scores)[1])[None, :, None] == self.member
        if self.how == "missing":
            return scores, mask & ~struck
        spoilt = np.float32(np.nan) if self.how == "nan" else self._dealt_anew(scores[:, self.member], mask)[:, None]
        return tf.where(struck, spoilt, scores), mask

    def _dealt_anew(self, scores: Any, mask: Any) -> Any:
        """`[B, C]`: the same numbers, where the member speaks, in a random order."""
        speaks = tf.broadcast_to(mask, tf.concat([tf.shape(mask)[:2], tf.shape(scores)[1:]], axis=0))[:, self.member]
        drawn = tf.random.stateless_uniform(tf.shape(scores), [self.seed, 0])
        source = tf.argsort(tf.where(speaks, drawn, 2.0), axis=1)
        target = tf.argsort(tf.where(speaks, 0.0, 1.0), axis=1, stable=True)
        dealt = tf.gather(scores, source, axis=1, batch_dims=1)
        return tf.gather(dealt, tf.argsort(target, axis=1), axis=1, batch_dims=1)


def corrupt_run(run: Run, member: str, how: How) -> dict[str, Any]:
    """`corrupt` of a run that was evaluated. Raises ConfigError where it was not, or has no such member."""
    if not run.done("evaluate"):
        raise ConfigError(f"--corrupt needs an evaluated run; {run.folder} did not get that far. Train it first.")
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    return corrupt(TASKS[run.experiment.task](run), report, member, how)


def corrupt(task: Any, report: Mapping[str, Any], member: str, how: How) -> dict[str, Any]:
    """The test figures of the best rule with one member's scores spoilt.

    Returns:
        `member`, `how`, `rule`, `metric`; of the rule `whole`, `corrupted`, `without` (the member) and `loss`, of the
        member alone `own`, `own_corrupted` and `own_loss`; `drop_one`, the loss without it. Losses have their paired
        interval and are positive where it is for the worse. `spoke`: by member the share of users or examples about
        whom it then said anything that the rule listened to.

    Raises:
        ConfigError: the run has no such member.
    """
    names = list(task.experiment.members)
    if member not in names:
        raise ConfigError(f"--corrupt must name a member of the run; received '{member}': {nearest(member, names)}")
    name, metric = report["best_rule"], report["primary_metric"]
    seed = derive_seed(task.experiment.seed, "corruption", member)
    values, spoke = (_of_lists if task.OVER == "candidates" else _of_classes)(
        task, task.rules[name], Corruption(names.index(member), how, seed), member
    )
    sign = 1.0 if higher_is_better(metric) else -1.0

    def loss(before: str, after: str) -> dict[str, Any]:
        pair = sign * values[before], sign * values[after]
        return dict(paired_difference(*pair, task.experiment.evaluation.samples, seed))

    return {
        "member": member,
        "how": how,
        "rule": name,
        "metric": metric,
        **{key: float(np.nanmean(found)) for key, found in values.items()},
        "loss": loss("whole", "corrupted"),
        "own_loss": loss("own", "own_corrupted"),
        "drop_one": loss("whole", "without"),
        "spoke": {name: float(share) for name, share in zip(names, spoke, strict=True)},
    }


Found = tuple[dict[str, np.ndarray], np.ndarray]
"""Values of every user or example by system, and the share of them about whom each member speaks, `[S]`."""


def _of_lists(task: RankingTask, rule: Rule, corruption: Corruption, member: str) -> Found:
    metric = parse_metric(task.experiment.primary, "candidates")
    asked = question(task.interactions, task.parts, TEST, held_out=task.experiment.held_out_candidates)

    def alone(scores: Any, mask: Any, context: Context) -> Any:
        spoilt, heard = corruption(scores, mask)
        return tf.where(heard, spoilt, np.float32(np.nan))[:, corruption.member]

    systems: dict[str, Callable[..., Any]] = {
        "whole": rule,
        "corrupted": lambda scores, mask, context: rule(*corruption(scores, mask), context),
        "without": without(rule, member),
        "own_corrupted": alone,
    }
    lists = task.ranker(systems)(asked).lists
    values = {name: np.asarray(metric.of_lists(lists[name], task.catalogue())) for name in systems}
    values["own"] = np.asarray(metric.of_lists(lists[member], task.catalogue()))
    spoke, users = np.zeros(len(rule.members)), asked.users
    for _, history in blocks(asked.history, users, task.test_scores.items * len(rule.members)):
        heard = rule.heard(*corruption(*task.test_scores(tf.constant(history))))
        spoke += tf.reduce_any(heard, axis=2).numpy().sum(axis=0)
    return values, spoke / max(len(users), 1)


def _of_classes(task: ClassificationTask, rule: Rule, corruption: Corruption, member: str) -> Found:
    metric, rows = parse_metric(task.experiment.primary, "classes"), task.rows(TEST)
    logits, mask = task.part_logits(TEST)
    labels, context = task.labels[rows], task.context(rows)
    spoilt, heard = corruption(tf.constant(logits), tf.constant(mask)[:, :, None])
    heard = speaking_rows(spoilt, heard)
    answers = {
        "whole": rule(logits, mask, context),
        "corrupted": rule(spoilt, heard, context),
        "without": rule(logits, mask & (np.array(rule.members) != member), context),
    }
    found = {name: rule.probabilities(fused).numpy() for name, fused in answers.items()}
    for name, scores, speaks in (("own", logits, mask[:, :, None]), ("own_corrupted", spoilt, heard)):
        own = tf.where(speaks, scores, 0.0)[:, corruption.member]  # uniform where it says nothing
        found[name] = tf.nn.softmax(own, axis=1).numpy()
    values = {name: np.atleast_1d(metric.of_classes(labels, probabilities)) for name, probabilities in found.items()}
    return values, rule.heard(spoilt, heard).numpy()[:, :, 0].mean(axis=0)


def told(found: Mapping[str, Any]) -> str:
    """The result in sentences."""
    what = {"noise": "noise", "nan": "NaN", "missing": "missing"}[found["how"]]
    spoke = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["spoke"].items())
    kept = found["loss"]["difference"] < found["own_loss"]["difference"]
    return "\n".join(
        [
            f"{found['metric']} on test with the scores of '{found['member']}' {what}:",
            f"  rule '{found['rule']}': {number(found['whole'])} -> {number(found['corrupted'])}, "
            f"it loses {_interval(found['loss'])}",
            f"  '{found['member']}' alone: {number(found['own'])} -> {number(found['own_corrupted'])}, "
            f"it loses {_interval(found['own_loss'])}",
            f"  the rule without '{found['member']}' loses {_interval(found['drop_one'])}",
            f"  who spoke: {spoke}",
            f"The rule loses {'less' if kept else 'no less'} than the member does.",
        ]
    )


def _interval(loss: Mapping[str, Any]) -> str:
    return f"{signed(loss['difference'])} [{signed(loss['low'])}, {signed(loss['high'])}]"
