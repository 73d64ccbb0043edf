"""The result of a run as a terminal shows it: one sentence, one table, and where to look next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recsys import served, soups
from recsys.controls import alarms
from recsys.report_words import reference_sentences, verdict

SHOWN = {
    "recommendation": ("ndcg@10", "recall@10", "recall@20", "hit_rate@10", "auc", "coverage@10"),
    "classification": ("accuracy", "log_loss", "auc"),
}


def summary(report: Mapping[str, Any], folder: Path) -> str:
    """Members and rules on test with the interval of the deciding metric; the best of each by validation is marked."""
    primary = report["primary_metric"]
    names = [primary, *(m for m in SHOWN[report["task"]] if m != primary and _has(report, m))]
    table = Table(header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for group in ("members", "rules"):
        for system, figures in report[group].items():
            chosen = system in (report["best_member"], report["best_rule"])
            row = [f"{system}{' *' if chosen else ''}", _interval(figures[primary])]
            table.add_row(*row, *(_value(figures.get(name)) for name in names[1:]), style="bold" if chosen else "")
        table.add_section()
    for system, reference in report.get("references", {}).items():
        figures = reference["figures"]
        table.add_row(system, _interval(figures[primary]), *(_value(figures.get(name)) for name in names[1:]))
    console = Console(width=120, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    lines = [
        _title(report),
        captured.get().rstrip(),
        "* chosen on validation; all figures are of the test part",
        "",
        verdict(report, primary).sentence,
        *reference_sentences(report),
        *served.sentences(report),
        *soups.sentences(report),
        *alarms(report),
        f"page: {folder / 'report.html'}",
    ]
    if any((folder / "export").glob("*/*")):
        ask = "tools/recommend.py {} --user ID" if report["task"] == "recommendation" else ""
        lines.append(f"artifact: {folder / 'export'}" + (f"   ask it: python {ask.format(folder)}" if ask else ""))
    return "\n".join(lines)


def _title(report: Mapping[str, Any]) -> str:
    data, split = report["dataset"], report["split"]
    if report["task"] == "recommendation":
        size = f"{data['users']:,} users × {data['items']:,} items, positive: {data['positive']}"
        asked = f"{split['test_users']:,} test users, {split['candidates']}"
    else:
        size = f"{data['examples']:,} examples, {data['classes']} classes"
        asked = f"{split['test']:,} test examples"
    return f"{data['name']}: {size}; {split['name']}, {asked}"


def _has(report: Mapping[str, Any], metric: str) -> bool:
    return any(metric in figures for figures in report["members"].values())


def _interval(figure: Mapping[str, Any]) -> str:
    if figure["low"] is None:
        return _value(figure)
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


def _value(figure: Mapping[str, Any] | None) -> str:
    return "–" if figure is None or figure["value"] is None else f"{figure['value']:.4f}"
