"""A comparison as text, as a chart of quality against latency, and as a page. Nothing is computed here."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fusion.errors import ConfigError
from fusion.files import write_atomically
from recsys import plots
from recsys import report_words as say
from recsys.compare import pareto_front

ON_FRONT, BETTER, WORSE = "\N{BLACK DIAMOND}", "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}"
COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "p50_ms": ("p50 ms", lambda value: say.number(value, 2)),
    "p95_ms": ("p95 ms", lambda value: say.number(value, 2)),
    "users_per_s": ("users/s", lambda value: say.NOTHING if value is None else f"{value:,.0f}"),
    "bytes": ("size", say.bytes_of),
    "train_s": ("training", say.seconds_of),
    "fit_peak_bytes": ("fit memory", say.bytes_of),
}
"""Costs by their key in `report.json`: heading, and how they are written."""

_ROLES = {"variant": "worse"}
"""Colours of kinds that are not colours themselves."""


def text_of(comparison: Mapping[str, Any]) -> str:
    """Tables of figures, runs, and costs for a terminal."""
    tables = tables_of(comparison)
    parts = [f"{table['title']}\n{_boxed(table)}\n{table['note']}".rstrip() for table in tables]
    return "\n\n".join([*parts, *(f"note: {note}" for note in comparison["notes"])])


def text_across(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `recsys.compare.across` for a terminal: a line for each side, a column for each rule."""
    rules = list(dict.fromkeys(name for row in rows for name in [*row["rules"], *row["references"]]))
    lines = []
    for row in rows:
        found = {**row["rules"], **row["references"]}
        cells = [_figure(found.get(name)) + (" *" if name == row["rule"] else "") for name in rules]
        best = f"{row['member']} {_figure(row['members'][row['member']])}"
        lines.append([row["mode"], row["metric"], best, *cells, _gap(row["gain"], row["metric"])])
    head = ["members are trained", "metric", "best member", *rules, "* minus best member"]
    table = {"head": head, "names": [row["side"] for row in rows], "rows": lines, "bold": [False] * len(rows)}
    note = (
        f"[95 % bootstrap interval over users]; {BETTER} {WORSE} the interval of the paired difference excludes zero; "
        "* chosen on validation, as the best member was; all figures are of the test part"
    )
    return f"{_boxed(table)}\n{note}"


def tables_of(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables that there are something for: title, note, head and rows of text, `bold` rows."""
    shown = [_figures_table(comparison)]
    if any(row["of_runs"] > 1 for row in comparison["rows"]):
        shown.append(_runs_table(comparison))
    return [*shown, _cost_table(comparison), _spent_table(comparison)]


def figure_of(comparison: Mapping[str, Any]) -> Figure:
    """Quality against p95 latency, the systems that no other beats on both joined.

    Raises ConfigError when no system has both.
    """
    metric = comparison["metrics"][0]
    rows = _charted(comparison)
    if not rows:
        raise ConfigError(f"a chart needs systems with {metric} and a latency (p95_ms); the compared runs have none.")
    sign = 1 if say.higher_is_better(metric) else -1
    front = pareto_front([(sign * _quality(row, metric), -row["cost"]["p95_ms"]) for row in rows])
    roles = [f"best-{row['kind']}" if row["chosen"] else _ROLES.get(row["kind"], row["kind"]) for row in rows]
    spots = [
        plots.Spot(_name(comparison, row), row["cost"]["p95_ms"], _quality(row, metric), role, on_front)
        for row, role, on_front in zip(rows, roles, front, strict=True)
    ]
    return plots.trade_off(spots, "milliseconds an answer takes (p95)", metric)


def _charted(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that have a place in the chart."""
    metric = comparison["metrics"][0]
    return [r for r in comparison["rows"] if _quality(r, metric) is not None and (r["cost"].get("p95_ms") or 0) > 0]


def write_plot(comparison: Mapping[str, Any], path: Path) -> None:
    """The chart as PNG or SVG, by the suffix. Raises ConfigError for another one."""
    write_atomically(path, chart_format(path)(figure_of(comparison)))


def chart_format(path: Path) -> Callable[[Figure], bytes]:
    """What turns a chart into the bytes of such a file. Raises ConfigError unless it is .png or .svg."""
    formats = {".png": plots.as_png, ".svg": plots.as_svg}
    if path.suffix.lower() not in formats:
        raise ConfigError(f"--plot must name a .png or .svg file; received {path}.")
    return formats[path.suffix.lower()]


def write_page(comparison: Mapping[str, Any], path: Path) -> None:
    """The tables and the chart as one HTML file that needs no network and runs no script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chart = base64.b64encode(plots.as_svg(figure_of(comparison))).decode("ascii") if _charted(comparison) else ""
    sides = list(dict.fromkeys(row["side"] for row in comparison["rows"]))
    page = environment.get_template("compare.html.j2").render(
        title=" and ".join(sides), tables=tables_of(comparison), chart=chart, notes=comparison["notes"],
        metric=comparison["metrics"][0],
    )  # fmt: skip
    write_atomically(path, page)


# ---- tables -----------------------------------------------------------------------------------------------------


def _figures_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    metrics, against = comparison["metrics"], comparison["against"]
    paired = any(row["difference"] for row in comparison["rows"])
    head = [*metrics, *([f"{metrics[0]} minus {against['system']}'s"] if paired else [])]
    rows = []
    for row in comparison["rows"]:
        cells = [_figure(row["figures"].get(metric)) for metric in metrics]
        rows.append([*cells, *([_gap(row["difference"], metrics[0])] if paired else [])])
    several = any(row["of_runs"] > 1 for row in comparison["rows"])
    note = "[95 % bootstrap interval over users]"
    note += "; ± deviation from run to run" if several else ""
    note += f"; {BETTER} {WORSE} the interval of the paired difference excludes zero" if paired else ""
    note += (
        "; * chosen on validation" + (" (in how many runs)" if several else "") + "; all figures are of the test part"
    )
    return _table(comparison, "Quality", note, head, rows)


def _runs_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The deciding metric of every run; sides with other runs leave their cells empty."""
    metric = comparison["metrics"][0]
    labels = list(dict.fromkeys(run["label"] for run in comparison["runs"]))
    rows = []
    for row in comparison["rows"]:
        own = [run["label"] for run in comparison["runs"] if run["side"] == row["side"]]
        by_run = row["figures"].get(metric, {}).get("by_run") or [_quality(row, metric)]
        values = dict(zip(own, by_run, strict=True))
        rows.append([say.number(values[label]) if label in values else "" for label in labels])
    return _table(comparison, f"{metric} by run", "", labels, rows)


def _cost_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    metric = comparison["metrics"][0]
    kept = {key: column for key, column in COSTS.items() if any(key in row["cost"] for row in comparison["rows"])}
    rows = [
        [
            ON_FRONT if row["front"] else "",
            say.number(_quality(row, metric)),
            *(write(row["cost"].get(key)) for key, (_, write) in kept.items()),
        ]
        for row in comparison["rows"]
    ]
    note = f"{ON_FRONT} Pareto front: nothing is as good in {metric}, p95, size and training and better in one of them"
    return _table(comparison, "Quality and cost", note, ["", metric, *(head for head, _ in kept.values())], rows)


def _spent_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [say.seconds_of(run["seconds"]), say.bytes_of(run["peak_bytes"]), run["folder"]] for run in comparison["runs"]
    ]
    names = [run["label"] for run in comparison["runs"]]
    head = ["all stages", "peak memory", "folder"]
    return {"title": "Runs", "note": "", "head": head, "names": names, "rows": rows, "bold": [False] * len(rows)}


def _table(
    comparison: Mapping[str, Any], title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> dict[str, Any]:
    systems = comparison["rows"]
    names = [_name(comparison, row) + _mark(row) for row in systems]
    bold = [bool(row["chosen"]) for row in systems]
    return {"title": title, "note": note, "head": list(head), "names": names, "rows": list(rows), "bold": bold}


def _name(comparison: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    lone = len({other["side"] for other in comparison["rows"]}) == 1
    return str(row["system"]) if lone else f"{row['side']}: {row['system']}"


def _mark(row: Mapping[str, Any]) -> str:
    if not row["chosen"]:
        return ""
    return " *" if row["of_runs"] == 1 else f" *{row['chosen']}/{row['of_runs']}"


def _quality(row: Mapping[str, Any], metric: str) -> Any:
    return row["figures"].get(metric, {}).get("value")


def _figure(figure: Mapping[str, Any] | None) -> str:
    """`.1234 ± .0012 [.1200, .1270]` with what there is of it."""
    if not figure or figure["value"] is None:
        return say.NOTHING
    text = say.number(figure["value"])
    text += f" ± {say.number(figure['sd'])}" if figure.get("sd") is not None else ""
    return text if figure["low"] is None else f"{text} [{say.number(figure['low'])}, {say.number(figure['high'])}]"


def _gap(gap: Mapping[str, Any] | None, metric: str) -> str:
    if not gap or gap["difference"] is None:
        return ""
    text = say.signed(gap["difference"])
    text += f" ± {say.number(gap['sd'])}" if gap.get("sd") is not None else ""
    if gap["low"] is None:
        return text
    sign = 1 if say.higher_is_better(metric) else -1
    low, high = sorted((sign * gap["low"], sign * gap["high"]))
    mark = BETTER if low > 0 else WORSE if high < 0 else " "
    return f"{text} [{say.signed(gap['low'])}, {say.signed(gap['high'])}] {mark}"


def _boxed(table: Mapping[str, Any]) -> str:
    boxed = Table(header_style="bold")
    boxed.add_column("")
    for head in table["head"]:
        boxed.add_column(head, justify="right", no_wrap=True)
    for name, cells, bold in zip(table["names"], table["rows"], table["bold"], strict=True):
        boxed.add_row(name, *cells, style="bold" if bold else "")
    console = Console(
        width=1000, color_system=None, force_terminal=False, markup=False, emoji=False, highlight=False
    )  # a table is as wide as its text
    with console.capture() as captured:
        console.print(boxed)
    return captured.get().rstrip()
