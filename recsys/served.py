"""What a run serves: the rule that validation chose, or the best member alone where fusing did not pay, and over which
members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.rules.average import Average
from fusion.rules.base import Rule
from fusion.rules.calibration import CALIBRATION_STATE
from fusion.rules.greedy import Greedy
from fusion.types import Over
from recsys.metrics import Metric
from recsys.report_words import bytes_of, higher_is_better, number, signed
from recsys.significance import paired_difference

if TYPE_CHECKING:
    from recsys.settings import EvaluationSettings

SAME = 1e-12
"""Differences below this are rounding."""


def choose(
    best: Mapping[str, str],
    values: Mapping[str, Mapping[str, np.ndarray | float]],
    metric: Metric,
    settings: EvaluationSettings,
    seed: int,
) -> tuple[str, dict[str, Any]]:
    """The system to serve, and by how much the rule beats the member on validation (paired, with its interval).

    With `never_worse` that is the member where the rule's mean is not better than its own.

    Args:
        best: the name of the best `rule` and of the best `member`, both chosen on validation.
        values: of these two by metric, one value a user or example of validation, `[N]`, or one number.
        metric: the one that decides.
        settings: `never_worse`, and `samples` of the bootstrap.
        seed: of the bootstrap.
    """
    rule, member = (values[kind][metric.name] for kind in ("rule", "member"))
    found: dict[str, Any]
    if isinstance(rule, np.ndarray) and isinstance(member, np.ndarray):
        found = dict(paired_difference(rule, member, settings.samples, seed))
    else:
        found = {"difference": float(np.mean(rule) - np.mean(member)), "low": None, "high": None, "n": 0}
    kept = "member" if settings.never_worse and not _beats(found["difference"], metric.higher_is_better) else "rule"
    return best[kept], found


def _beats(difference: float | None, higher_is_better: bool) -> bool:
    """Whether a difference, rule minus member, is in the rule's favour; what is undefined speaks against nobody."""
    return difference is None or (difference if higher_is_better else -difference) > SAME


def rule_to_serve(rules: Mapping[str, Rule], name: str, over: Over, everybody: Sequence[str] = ()) -> Rule:
    """The rule `name`, or a rule that is the member `name`, over just the members that its answers need.

    Args:
        rules: by name, over all members.
        name: of a rule or of a member.
        over: what is fused.
        everybody: members that answer whatever is missing (of somebody without a history, of an example without a
            text), the cheapest first. One of them is kept where no other would answer and the rule falls back on
            members without influence.
    """
    if name not in rules:
        return _alone(name, next(iter(rules.values())), over, everybody)
    rule = rules[name]
    kept = rule.used()
    if rule.falls_back and not set(kept) & set(everybody):
        kept += tuple(everybody[:1])
    return rule.restricted(kept)


def _alone(member: str, fitted: Rule, over: Over, everybody: Sequence[str]) -> Rule:
    """A rule that answers as the member does, and as one of `everybody` where the member says nothing at all.

    Classes: calibrated as in `fitted`, a rule over all members.
    """
    method = fitted.config.calibration
    rule: Rule
    if not everybody or member in everybody:
        rule = Average(Average.Config(calibration=method), (member,), over, name=member)
    else:
        rule = Greedy(Greedy.Config(calibration=method), (member, everybody[0]), over, name=member)
    places = [fitted.members.index(name) for name in rule.members]
    known = fitted.state()
    state = {name: known[name][places] for name in CALIBRATION_STATE if name in known}
    if isinstance(rule, Greedy):
        state["weights"] = np.array([1.0, 0.0], np.float32)
    rule.load_state(state)
    return rule


def serving(
    name: str, rule: Rule, difference: Mapping[str, Any], cost: Mapping[str, Any], members: Sequence[str]
) -> dict[str, Any]:
    """What `report.json` says under `serving`.

    Args:
        name: of the system that is served.
        rule: it, over the members that it needs.
        difference: of best rule and best member on validation.
        cost: by member `bytes` and `p50_ms`; the sums over the members are what their answers cost about, one by one.
        members: all of the run.
    """
    known = all(member in cost for member in members)

    def total(key: str, names: Sequence[str]) -> float | None:
        return round(sum(cost[member][key] for member in names), 3) if known else None

    used = rule.used()
    return {
        "kind": "member" if name in members else "rule",
        "members": list(rule.members),
        "backup": [member for member in rule.members if member not in used],
        "left_out": [member for member in members if member not in rule.members],
        "difference": dict(difference),
        **{key: total(key, rule.members) for key in ("bytes", "p50_ms")},
        **{f"{key}_of_all": total(key, members) for key in ("bytes", "p50_ms")},
    }


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What is served and what that saves, for people; empty for a report that does not say it."""
    return [*_choice(report), *_artifact(report)] if "serving" in report else []


def warnings(report: Mapping[str, Any]) -> list[str]:
    """The sentence that a reader must not miss: the rule is not worth its cost."""
    metric = report["primary_metric"]
    beats = _beats(report["serving"]["difference"]["difference"], higher_is_better(metric))
    return [] if beats else list(_choice(report))


def _choice(report: Mapping[str, Any]) -> Iterator[str]:
    found, rule, member = report["serving"], report["best_rule"], report["best_member"]
    difference = found["difference"]
    by = f"{signed(difference['difference'])} {report['primary_metric']}"
    if difference["low"] is not None:
        by += f" [{signed(difference['low'])}, {signed(difference['high'])}]"
    if found["kind"] == "member":
        yield (
            f"The rule '{rule}' does not beat the best member '{member}' on validation ({by}): "
            f"'{member}' is served alone (evaluation.never_worse)."
        )
    elif _beats(difference["difference"], higher_is_better(report["primary_metric"])):
        yield f"The rule '{rule}' is served: on validation it is ahead of the best member '{member}' by {by}."
    else:
        yield (
            f"The rule '{rule}' is served although it does not beat the best member '{member}' on validation ({by}); "
            "evaluation.never_worse: true would serve the member."
        )


def _artifact(report: Mapping[str, Any]) -> Iterator[str]:
    found = report["serving"]
    for name in found["backup"]:
        who = (
            "visitors without a history" if report["task"] == "recommendation" else "examples that lack what they read"
        )
        yield f"'{name}' is kept for what the others cannot answer: {who}."
    if not found["left_out"]:
        return
    kept, every = len(found["members"]), len(found["members"]) + len(found["left_out"])
    held = f"The artifact holds {kept} of {every} members, without {', '.join(found['left_out'])}"
    if found["bytes"] is None:
        yield f"{held}."
        return
    yield (
        f"{held}: {bytes_of(found['bytes'])} of {bytes_of(found['bytes_of_all'])}, and about "
        f"{number(found['p50_ms'], 1)} of {number(found['p50_ms_of_all'], 1)} ms an answer (p50, summed over members)."
    )
