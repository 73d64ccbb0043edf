"""Arranges what a report says of the members together, how they differ and what each adds, and of how members and rules
learned. It computes no metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from recsys import plots
from recsys.report_content import ReportExtras

HEAT = "correlation"
"""The measure that the heat map shows; the table beside it has all."""


def diversity_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of every pair of members as columns and rows; empty for fewer than two members."""
    found = report.get("diversity", {})
    columns = list(found.get("mean", {}))
    rows = [
        {"pair": " \N{MULTIPLICATION SIGN} ".join(pair["members"]), "cells": [pair[name] for name in columns]}
        for pair in found.get("pairs", ())
    ]
    return {"of": found.get("of", ""), "columns": columns, "rows": rows, "mean": found.get("mean", {})}


def controls_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the alarms looked at, a row each: found, and what it must not exceed."""
    found = report.get("controls", {"shuffled_labels": {}, "out_of_fold": {}})
    rows = [
        {"name": name, "kind": "rule", "what": "fitted on shuffled labels, against chance", **control}
        | {"limit": control["chance"]}
        for name, control in found["shuffled_labels"].items()
    ]
    rows += [
        {"name": name, "kind": "member", "what": "out of fold, against validation", **control}
        | {"value": control["out_of_fold"], "limit": control["held_out"]}
        for name, control in found["out_of_fold"].items()
    ]
    return rows


def study_charts(report: Mapping[str, Any]) -> dict[str, Figure]:
    """The heat map of pairs and the curve over the number of members, by file name."""
    charts = {}
    if report.get("diversity", {}).get("pairs"):
        charts["diversity"] = _heat_map(report)
    steps = report.get("curve", {}).get("steps", ())
    if len(steps) > 1:
        points = [
            plots.Step(step["joins"], step["value"], step["low"], step["high"], step["p50_ms"])
            for step in steps
            if step["value"] is not None
        ]
        charts["curve"] = plots.growth(points, f"{report['curve']['metric']} on validation")
    return charts


def hints_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the epochs of members say, a row each; members that were trained together have one row."""
    found: dict[str, list[str]] = {}
    for name, learned in report.get("learning", {}).items():
        if learned["hint"]:
            found.setdefault(learned["hint"], []).append(name)
    return [{"members": ", ".join(names), "hint": sentence} for sentence, names in found.items()]


def starts_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The members that began with another's weights, a row each."""
    learning = report.get("learning", {})
    return [{"member": name, **learned["start"]} for name, learned in learning.items() if learned.get("start")]


def learning_charts(report: Mapping[str, Any], extras: ReportExtras) -> dict[str, Figure]:
    """How members learned by epoch, and how rules were fitted by iteration, by file name."""
    charts = {}
    curves = {name: rows for name, rows in extras.learning_curves.items() if rows}
    if curves:
        best = {name: learned["best_epoch"] for name, learned in report.get("learning", {}).items()}
        charts["learning_curves"] = plots.curves(curves, best)
    descents = {name: losses for name, losses in extras.rule_histories.items() if len(losses) > 1}
    if descents:
        charts["rule_fitting"] = plots.descents(descents)
    return charts


def _heat_map(report: Mapping[str, Any]) -> Figure:
    names = list(report["members"])
    values = np.full((len(names), len(names)), np.nan)
    for pair in report["diversity"]["pairs"]:
        one, other = (names.index(name) for name in pair["members"])
        if pair[HEAT] is not None:
            values[one, other] = values[other, one] = pair[HEAT]
    return plots.heat_map(values, names)
