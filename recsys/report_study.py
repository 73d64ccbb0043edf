"""Arranges what a report says of the members together: how they differ, and what each adds. It computes no metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from recsys import plots

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


def _heat_map(report: Mapping[str, Any]) -> Figure:
    names = list(report["members"])
    values = np.full((len(names), len(names)), np.nan)
    for pair in report["diversity"]["pairs"]:
        one, other = (names.index(name) for name in pair["members"])
        if pair[HEAT] is not None:
            values[one, other] = values[other, one] = pair[HEAT]
    return plots.heat_map(values, names)
