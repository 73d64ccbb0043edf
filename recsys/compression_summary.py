"""What recipes made of the members, as a terminal shows it: bytes, speed and quality before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from recsys import report_words as say

if TYPE_CHECKING:
    from recsys.compression_search import Mix

COLUMNS = ("", ".tflite", "gzip", "zeros", "FLOPs", "p50 ms", "of before", "on validation", "change")


def summary(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each recipe: a row for each member, and one for what they answer together, on test."""
    return "\n\n".join(part for name, report in reports.items() for part in _told(name, report))


def pareto_table(mixes: Sequence[Mix]) -> str:
    """The mixes that no other beats, smallest first."""
    table = Table(title="no other mix is smaller and better", header_style="bold", title_justify="left")
    for column in ("size", "on validation", "recipes"):
        table.add_column(column, justify="left" if column == "recipes" else "right")
    for mix in mixes:
        recipes = ", ".join(f"{member}: {name}" for member, name in mix.recipes.items())
        table.add_row(say.bytes_of(mix.bytes), say.number(mix.quality), recipes)
    return _drawn(table)


def overview(reports: Mapping[str, Mapping[str, Any]], refused: Mapping[str, str]) -> str:
    """Recipes side by side, as Markdown: a row for each, a column for each member and one for all together, on test.

    A member's cell says size, how many times smaller and faster its `.tflite` is than in float32, and how its own
    quality changed on the validation rows.

    Args:
        reports: by recipe.
        refused: by recipe, why there is no report, or why its model is not to be used.
    """
    names = dict.fromkeys(member for report in reports.values() for member in report["members"])
    table = Table("recipe", *names, "together", box=box.MARKDOWN)
    for recipe, report in reports.items():
        cells = [_brief(report["members"][name]) if name in report["members"] else "" for name in names]
        table.add_row(recipe, *cells, _brief_together(report) + (" (refused)" if recipe in refused else ""))
    lines = [_drawn(table, width=400).strip()] if reports else []
    return "\n".join([*lines, *(f"{recipe}: {sentence}" for recipe, sentence in refused.items())])


def _brief(facts: Mapping[str, Any]) -> str:
    before, after = facts["before"], facts["after"]
    if facts["skipped"]:
        return "nothing to do"
    smaller = before["bytes"]["tflite"] / after["bytes"]["tflite"]
    faster = before["latency"]["litert_1"]["p50_ms"] / after["latency"]["litert_1"]["p50_ms"]
    changed = say.signed(after["quality"] - before["quality"])
    return f"{say.bytes_of(after['bytes']['tflite'])}, {smaller:.1f} ×, {faster:.1f} ×, {changed}"


def _brief_together(report: Mapping[str, Any]) -> str:
    found = report["differences"]["test"][report["metric"]]
    before, after = (report["cost"][when]["bytes"] for when in ("before", "after"))
    return f"{say.bytes_of(after)}, {before / after:.1f} ×, {_changed(found)}"


def _changed(found: Mapping[str, Any]) -> str:
    """A difference, and its interval where the metric has one."""
    if found["low"] is None:
        return say.signed(found["difference"])
    return f"{say.signed(found['difference'])} [{say.signed(found['low'])}, {say.signed(found['high'])}]"


def _drawn(table: Table, width: int = 120) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def _told(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    if not report["members"]:
        yield "\n".join([f"{name}: {report['served']} is served", *_together(report)])
        return
    table = Table(title=f"{name}: {report['served']} is served", header_style="bold", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for member, facts in report["members"].items():
        table.add_row(member, *_member_row(facts))
    yield _drawn(table)
    yield "\n".join([*_together(report), *left_alone(report)])


def _member_row(facts: Mapping[str, Any]) -> list[str]:
    before, after = facts["before"], facts["after"]
    smaller = before["bytes"]["tflite"] / after["bytes"]["tflite"]
    faster = before["latency"]["litert_1"]["p50_ms"] / after["latency"]["litert_1"]["p50_ms"]
    return [
        say.bytes_of(after["bytes"]["tflite"]),
        say.bytes_of(after["bytes"]["tflite_gzip"]),
        f"{100 * after['zeros']:.0f} %",
        say.number(after["flops"], 0),
        say.number(after["latency"]["litert_1"]["p50_ms"], 2),
        f"{smaller:.1f} x smaller, {faster:.1f} x faster",
        f"{after['metric']} {say.number(after['quality'], 4)}",
        say.signed(after["quality"] - before["quality"]),
    ]


def _together(report: Mapping[str, Any]) -> Iterator[str]:
    """What is served, before and after, on the test part."""
    before, after = report["cost"]["before"], report["cost"]["after"]
    yield (
        f"together: {say.bytes_of(after['bytes'])} of {say.bytes_of(before['bytes'])}, "
        f"{say.number(after['p50_ms'], 2)} of {say.number(before['p50_ms'], 2)} ms an answer (LiteRT, one thread)"
    )
    for metric in dict.fromkeys([report["metric"], *report["gate"]]):
        found = report["differences"]["test"][metric]
        value = report["figures"]["after"][metric]["value"]
        yield f"{metric} on test {say.number(value, 4)}, {_changed(found)} by compression"
    for metric, sentence in report["gate"].items():
        yield sentence or f"the promise on {metric} is kept"


def left_alone(report: Mapping[str, Any]) -> Iterator[str]:
    """Which layers were not touched, and why: a line for each member, method and reason."""
    for member, facts in report["members"].items():
        if facts["skipped"]:
            yield f"{member} is as it was: {facts['skipped']}"
        for step in facts["steps"]:
            by_reason: dict[str, list[str]] = {}
            for layer, reason in step["left_alone"].items():
                by_reason.setdefault(reason, []).append(layer)
            for reason, layers in by_reason.items():
                shown = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
                yield f"{member}: {step['kind']} left alone {shown}: {reason}"
