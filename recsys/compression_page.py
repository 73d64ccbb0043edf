"""What recipes made of a run's model, for its page: a section of `report.html` and `plots/pareto.png`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from fusion.files import write_atomically
from recsys import plots
from recsys import report_words as say
from recsys.compression_summary import left_alone

FOLDER = "compressed"
"""Of a run, in which each recipe has a folder."""

REFUSED = ".refused"
"""Ends the folder of what broke its promise; names of recipes hold no dot."""

BEGIN, END = "<!-- compression -->", "<!-- end of compression -->"
"""Between these the section stands in the page, so that it can be written anew alone."""

ORIGINAL = "as it was"


def reports_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The reports of all recipes that were applied to a run and kept their promises, by name."""
    return {name: report for name, report in _reports(folder).items() if not name.endswith(REFUSED)}


def refused_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The reports of recipes that broke their promises, by name; a recipe of the same name may have kept one before."""
    found = _reports(folder)
    return {name.removesuffix(REFUSED): report for name, report in found.items() if name.endswith(REFUSED)}


def _reports(folder: Path) -> dict[str, dict[str, Any]]:
    paths = [path for path in sorted(folder.glob(f"{FOLDER}/*/report.json")) if not path.parent.name.startswith(".")]
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def variants(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `report.json` says of them: figures on test, and costs."""
    return {name: {"figures": found["figures"]["after"], **found["cost"]["after"]} for name, found in reports.items()}


def section(folder: Path, metric: str) -> Markup:
    """The section between its marks, empty where no recipe was applied; draws `plots/pareto.png` of those that kept
    their promises."""
    from recsys.report import data_address, environment

    reports, refused = reports_of(folder), refused_of(folder)
    if not reports and not refused:
        return Markup(BEGIN + END)
    rows = [_row(name, report, metric) for name, report in reports.items()]
    rows += [_row(name, report, metric) | {"refused": True} for name, report in refused.items()]
    view = {"metric": metric, "recipes": rows, "chart": ""}
    if reports:
        figure = pareto(reports, metric)
        write_atomically(folder / "plots" / "pareto.png", plots.as_png(figure))
        view["chart"] = data_address("image/svg+xml", plots.as_svg(figure))
    return Markup(BEGIN + environment(html=True).get_template("compression.html.j2").render(view) + END)


def renew(folder: Path, metric: str) -> None:
    """Writes the section anew into the page of a run, where it has one that knows of the section."""
    page = folder / "report.html"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    begin, end = text.find(BEGIN), text.find(END)
    if begin >= 0:
        write_atomically(page, text[:begin] + str(section(folder, metric)) + text[end + len(END) :])


def pareto(reports: Mapping[str, Mapping[str, Any]], metric: str) -> Figure:
    """Quality against bytes, of what is served as it was and after each recipe: on validation, because one chooses by
    it, unless one of the reports is so old that it tells figures of the test part alone."""
    told = all("validation" in report for report in reports.values())
    part, key = ("validation", "validation") if told else ("test", "figures")
    found = {name: _spot(report, "after", key, metric) for name, report in reports.items()}
    found = {ORIGINAL: _spot(next(iter(reports.values())), "before", key, metric)} | found
    sign = 1 if say.higher_is_better(metric) else -1
    spots = [
        plots.Spot(
            name,
            size / 1e6,
            quality,
            "best-rule" if name == ORIGINAL else "rule",
            not any(_beats(other, (size, quality), sign) for other in found.values()),
        )
        for name, (size, quality) in found.items()
    ]
    return plots.trade_off(spots, "MB, .tflite", f"{metric} on {part}")


def _spot(report: Mapping[str, Any], when: str, key: str, metric: str) -> tuple[float, float]:
    return report["cost"][when]["bytes"], report[key][when][metric]["value"]


def _beats(a: Sequence[float], b: Sequence[float], sign: int) -> bool:
    return a[0] <= b[0] and sign * a[1] >= sign * b[1] and tuple(a) != tuple(b)


def _row(name: str, report: Mapping[str, Any], metric: str) -> dict[str, Any]:
    before, after = report["cost"]["before"], report["cost"]["after"]
    change = report["differences"]["test"].get(metric, {"difference": None, "low": None, "high": None})
    promises = [sentence or f"kept ({metric})" for metric, sentence in report["gate"].items()]
    return {
        "name": name,
        "refused": False,
        "bytes": after["bytes"],
        "smaller": before["bytes"] / after["bytes"],
        "p50_ms": after["p50_ms"],
        "faster": before["p50_ms"] / after["p50_ms"],
        "quality": report["figures"]["after"][metric]["value"],
        **{key: change[key] for key in ("difference", "low", "high")},
        "promise": " ".join(promises) or "none was asked for",
        "members": [{"name": member, **facts} for member, facts in report["members"].items()],
        "left_alone": list(left_alone(report)),
    }
