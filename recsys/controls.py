"""Alarms: two controls that must find nothing, because whatever they find is a leak.

1. *Shuffled labels.* Every learned rule is fitted once more, on half of its out-of-fold rows with shuffled labels, and
   judged on the shuffled labels of the other half. Nothing relates these two, so it must be at chance. Chance is the
   permutation distribution of the same answers against the labels shuffled again (Ojala & Garriga 2010, "Permutation
   tests for studying classifier performance"), which needs no further fit and is exact whatever the rule is. That such
   a rule does not beat the equal-weight mean on true labels would be no clean test: weights drawn by chance do now and
   then, where members differ in strength. Found are labels that reach a rule by another way than its rows: rows that
   it is judged on among those that it is fitted on, or a state, a context or a cache that carries labels.
2. *Out of fold.* A member that has seen the labels of the rows which it scores out of fold is better on them than on
   validation, which nobody was fitted on. Shuffling cannot find this once the scores are made (it destroys what such
   scores know); this comparison can. The folds' members have had fewer rows, so without a leak they are, if anything,
   worse. The margin leaves room for parts that differ, as those of a split by time do.

Neither finds a label that stands in the data themselves, in a text or a column: it helps on validation as well
(`recsys.leaks` looks at splits), nor a member that has seen labels and gained less than the margin from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fusion.compat import tf
from fusion.rules.base import Rule
from fusion.rules.greedy import sampled_ndcg
from fusion.types import derive_seed
from recsys.fit_rows import FitRows

ROWS = 1000
"""Rows or lists that a control looks at; of more a random part."""
FEWEST = 40
"""With fewer rows nothing can be said."""
SHUFFLES = 200
"""How often the labels are shuffled again to know chance."""
ERRORS = 5.0
"""An alarm needs so many standard errors: of the many rules and members of many runs none should ring by chance."""
MARGIN = 0.1
"""How much better, in accuracy or in AUC, a member must be out of fold than on validation."""
PLACES = 20
"""Lists are judged by the NDCG of so many places."""


# ---- shuffled labels ---------------------------------------------------------------------------------------------


def shuffled_labels(new_rule: Callable[[], Rule], rows: FitRows, seed: int) -> dict[str, Any]:
    """Fits a new rule on shuffled labels and judges it on those of other rows.

    Returns:
        `value` (accuracy, or NDCG), `chance` (its mean over further shuffles), `z` (the difference in standard
        deviations of these), `n` and `alarm`; empty where there are too few rows.
    """
    random = np.random.default_rng(derive_seed(seed, "shuffled labels"))
    usable = np.arange(len(rows.labels))
    if rows.labels.ndim == 2:
        taken = rows.labels & rows.open
        usable = np.flatnonzero(taken.any(axis=1) & (~rows.labels & rows.open).any(axis=1))
    chosen = random.permutation(usable)[:ROWS]
    if len(chosen) < FEWEST:
        return {}
    whole = rows.at(chosen)
    whole = replace(whole, labels=_shuffled(whole, random))
    fitted, judged = whole.at(np.arange(0, len(chosen), 2)), whole.at(np.arange(1, len(chosen), 2))
    rule = new_rule()
    fitted.fit(rule, seed)
    judge = _judge(rule, judged)
    value, chance = judge(judged.labels), np.array([judge(_shuffled(judged, random)) for _ in range(SHUFFLES)])
    z = (value - chance.mean()) / max(float(chance.std()), 1e-12)
    return {
        "value": value,
        "chance": float(chance.mean()),
        "z": float(z),
        "n": len(judged.labels),
        "alarm": bool(z > ERRORS),
    }


def _shuffled(rows: FitRows, random: np.random.Generator) -> np.ndarray:
    """Labels dealt anew: to other rows, or to other entries of the same list."""
    if rows.labels.ndim == 1:
        return random.permutation(rows.labels)
    order = np.argsort(np.where(rows.open, random.random(rows.labels.shape), 2.0), axis=1)  # the open ones first
    counts = (rows.labels & rows.open).sum(axis=1)
    result = np.zeros(rows.labels.shape, bool)
    np.put_along_axis(result, order, np.arange(order.shape[1]) < counts[:, None], axis=1)
    return result


def _judge(rule: Rule, rows: FitRows) -> Callable[[np.ndarray], float]:
    """How good the rule's answers to these rows are against labels."""
    given = tf.constant(rows.features), tf.constant(rows.mask), rows.context
    if rows.labels.ndim == 1:
        answered = rule(*given).numpy().argmax(axis=1)
        return lambda labels: float((answered == labels).mean())
    fused = np.where(rows.open, rule.fuse(*given).numpy(), -np.inf)
    return lambda labels: float(sampled_ndcg(fused, labels, rows.weights, PLACES).mean())


# ---- out of fold ---------------------------------------------------------------------------------------------------


def list_quality(features: np.ndarray, mask: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of each list and member the share of pairs of a taken and another candidate that stand rightly (AUC), `[N, S]`.

    NaN where the member speaks on no such pair; ties count half; a candidate counts as often as its weight says.
    """
    members = mask.shape[1]
    result = np.full((len(labels), members), np.nan)
    for row in range(len(labels)):
        for member in range(members):
            heard = mask[row, member] & np.isfinite(features[row, member]) & (weights[row] > 0)
            scores, positive, weight = (part[heard] for part in (features[row, member], labels[row], weights[row]))
            taken, others = scores[positive], scores[~positive]
            if len(taken) and len(others):
                above = (taken[:, None] > others) + 0.5 * (taken[:, None] == others)
                result[row, member] = np.average(above.mean(axis=0), weights=weight[~positive])
    return result


def out_of_fold(seen: Mapping[str, np.ndarray], held_out: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Whether members are better on what they scored out of fold than on validation.

    Args:
        seen: by member, how good it is on each row that it scored out of fold: 0 to 1, NaN where it is silent.
        held_out: the same of validation rows.

    Returns:
        By member `out_of_fold`, `held_out` (means), `difference`, its standard `error`, and `alarm`. Members with too
        few rows are left out.
    """
    result = {}
    for name in seen:
        ours, theirs = (values[~np.isnan(values)] for values in (seen[name], held_out[name]))
        if min(len(ours), len(theirs)) < FEWEST:
            continue
        difference = float(ours.mean() - theirs.mean())
        error = float(np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs)))
        alarm = difference > MARGIN and difference > ERRORS * error
        result[name] = {
            "out_of_fold": float(ours.mean()),
            "held_out": float(theirs.mean()),
            "difference": difference,
            "error": error,
            "alarm": bool(alarm),
        }
    return result


# ---- what is told --------------------------------------------------------------------------------------------------


def controls(rule_reports: Mapping[str, Mapping[str, Any]], members: Mapping[str, Any]) -> dict[str, Any]:
    """What `report.json` says under `controls`, from what fitting the rules said and from `out_of_fold`."""
    shuffled = {name: found["shuffled_labels"] for name, found in rule_reports.items() if found.get("shuffled_labels")}
    return {"shuffled_labels": shuffled, "out_of_fold": dict(members)}


def alarms(report: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each control that found something."""
    found = report.get("controls", {"shuffled_labels": {}, "out_of_fold": {}})
    for name, control in found["shuffled_labels"].items():
        if control["alarm"]:
            yield (
                f"Alarm: the rule '{name}', fitted on shuffled labels, foretells the shuffled labels of other rows "
                f"({control['value']:.3f}, by chance {control['chance']:.3f}). Labels leak into it: believe none of "
                "its figures."
            )
    for name, control in found["out_of_fold"].items():
        if control["alarm"]:
            yield (
                f"Alarm: the member '{name}' is better on the rows that it scored out of fold "
                f"({control['out_of_fold']:.3f}) than on validation ({control['held_out']:.3f}). It seems to have seen "
                "their labels, and learned rules trust it too much."
            )
