"""Turns the figures of a run into a page to look at, charts as files, and a model card.

It writes `report.html` (one file that needs no network and runs no script), `plots/*.png` and `model_card.md`.
It computes no metric: everything comes from the dictionary of `report.json` and from `ReportExtras`.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from matplotlib.figure import Figure

from fusion.errors import ConfigError
from fusion.files import write_atomically
from recsys import plots
from recsys.metrics import parse_metric
from recsys.schema import Dropped
from recsys.thumbnails import Picture, thumbnails

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
_MOST_CLASSES = 40
"""Above this many classes a confusion matrix is a grey square; the table of confused pairs is shown alone."""
_FEW = 100
"""Below this many users or examples the page says that figures are unsure."""

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""System -> metric -> value, low, high, n."""


@dataclass(frozen=True)
class Pictured:
    """An item as it is shown: its title, and its picture where there is one."""

    title: str
    image: Picture = None


@dataclass(frozen=True)
class Recommended:
    """One recommended item.

    Attributes:
        title, image: see `Pictured`.
        score: the fused score.
        contributions: what each member adds to the score.
        relevant: whether the user really took it.
    """

    title: str
    score: float
    contributions: Mapping[str, float]
    image: Picture = None
    relevant: bool = False


@dataclass(frozen=True)
class Example:
    """What one user took before, and what is recommended, best first."""

    user: str
    history: Sequence[Pictured]
    recommended: Sequence[Recommended]


@dataclass(frozen=True)
class Mistake:
    """An example that the ensemble classified wrongly, with the probability it gave to its answer."""

    title: str
    label: str
    predicted: str
    probability: float
    image: Picture = None


@dataclass(frozen=True)
class ReportExtras:
    """What a page shows beside the figures of `report.json`.

    Attributes:
        metric: the one that decides, such as `ndcg@10`.
        name: of the experiment.
        positive_rule: what counts as positive, in words.
        learning_curves: member -> one mapping of figures per epoch; members without epochs are left out.
        drop_one: member -> `value` of the best rule without it, `difference` (with it minus without it), `low`,
            `high`.
        rule_weights: rule -> member -> weight.
        examples: recommendations of a few users.
        mistakes: a few wrongly classified examples.
        confusion: int `[C, C]`, rows the true class, columns the predicted one; `classes` has their names.
        cleaning: what was dropped and why.
        config: the resolved config as YAML.
        warnings: sentences that a reader must not miss.
        environment: versions and machine.
    """

    metric: str
    name: str = ""
    positive_rule: str = ""
    learning_curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    drop_one: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    rule_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    mistakes: Sequence[Mistake] = ()
    confusion: np.ndarray | None = None
    classes: Sequence[str] = ()
    cleaning: Sequence[Dropped] = ()
    config: str = ""
    warnings: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)


def write_report(folder: str | Path, report: Mapping[str, Any], extras: ReportExtras) -> list[Path]:
    """Writes `report.html`, `model_card.md` and `plots/*.png` into `folder` and returns their paths.

    Args:
        folder: the run's folder; made when missing.
        report: the dictionary of `report.json`.
        extras: everything else that is shown.

    Raises:
        MachineError: the folder cannot be written.
    """
    folder = Path(folder)
    written: dict[Path, str | bytes] = {}
    charts = {}
    for name, figure in _charts(report, extras).items():
        written[folder / "plots" / f"{name}.png"] = plots.as_png(figure)
        charts[name] = _data_address("image/svg+xml", plots.as_svg(figure))
    view = _view(report, extras) | {"charts": charts}
    written[folder / "report.html"] = _environment(html=True).get_template("report.html.j2").render(view)
    written[folder / "model_card.md"] = _environment(html=False).get_template("model_card.md.j2").render(view)
    for path, content in written.items():
        write_atomically(path, content)
    return list(written)


# ---- words ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether fusing paid: one sentence, the sentences that qualify it, and its tone."""

    tone: Literal["good", "open", "bad"]
    sentence: str
    details: tuple[str, ...] = ()


def verdict(report: Mapping[str, Any], metric: str) -> Verdict:
    """What the paired comparison of best rule and best member says, in plain words and without flattery."""
    rule, member = report.get("best_rule"), report.get("best_member")
    found = report.get("significance", {}).get(metric)
    if not rule or not member or not found or found["difference"] is None:
        return Verdict("open", f"There is no comparison of a rule with a member on {metric}.")
    sign = 1.0 if higher_is_better(metric) else -1.0
    low, high = sorted((sign * found["low"], sign * found["high"]))
    by = (
        f"{signed(found['difference'])} [{signed(found['low'])}, {signed(found['high'])}] "
        f"(95 % paired bootstrap, {found['n']} {rows_are(metric)})"
    )
    names = f"The rule '{rule}'", f"the best member '{member}'"
    if low > 0:
        tone, sentence = "good", f"{names[0]} beats {names[1]} on {metric} by {by}."
    elif high < 0:
        tone, sentence = "bad", f"Fusing did not pay: {names[0][0].lower()}{names[0][1:]} falls behind {names[1]} on {metric}, by {by}."
    else:
        tone, sentence = (
            "open",
            f"Whether fusing paid is not settled: {names[0][0].lower()}{names[0][1:]} differs from {names[1]} "
            f"on {metric} by {by}, and that interval holds zero.",
        )
    return Verdict(tone, sentence, tuple(_qualifications(report, metric, found["n"])))


def _qualifications(report: Mapping[str, Any], metric: str, n: int) -> Iterator[str]:
    rule, member = report["best_rule"], report["best_member"]
    systems = {**report.get("members", {}), **report.get("rules", {})}
    values = {name: _value(figures, metric) for name, figures in systems.items()}
    before, after = values.get(member), values.get(rule)
    if before is not None and after is not None:
        change = f", {signed(100 * (after - before) / before, 1)} %" if before > 0 else ""
        yield f"From {number(before)} to {number(after)}{change}. Both were chosen on validation and are measured on test."
    best = _best(values, metric)
    if best is not None and after is not None and best not in (rule, member) and values[best] != after:
        yield f"On test, '{best}' reaches {number(values[best])}, but validation did not choose it."
    if n < _FEW:
        yield f"With {n} {rows_are(metric)} the figures are unsure; look at the intervals."


def higher_is_better(metric: str) -> bool:
    """The direction of a metric; a name that is not in our table counts as higher is better."""
    try:
        return parse_metric(metric).higher_is_better
    except ConfigError:
        return True


def rows_are(metric: str) -> str:
    """What a metric is averaged over: users or examples."""
    try:
        return "examples" if parse_metric(metric).kind == "class" else "users"
    except ConfigError:
        return "rows"


def number(value: Any, digits: int = 4) -> str:
    """A figure for people: 0.1234, 12.3, 1,234; an en dash when there is none.

    >>> number(0.123456), number(12.3456), number(123456), number(None)
    ('0.1235', '12.35', '123,456', '–')
    """
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return NOTHING
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", MINUS)
    places = digits if abs(value) < 10 else 2
    return f"{value:.{places}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 4) -> str:
    """A difference with its sign."""
    return NOTHING if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def bytes_of(value: float | None) -> str:
    """A size in decimal units: 1.2 MB."""
    if value is None:
        return NOTHING
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def count_of(value: float | None) -> str:
    """A large count: 1.2 M."""
    if value is None:
        return NOTHING
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.1f} {unit}"
    return f"{value:,.0f}"


def seconds_of(value: float | None) -> str:
    """A duration: 0.8 s, 3 min 20 s."""
    if value is None:
        return NOTHING
    return f"{value:.1f} s" if value < 100 else f"{int(value // 60)} min {int(value % 60)} s"


def words(name: str) -> str:
    """`short_history` as it is read: short history."""
    return str(name).replace("_", " ")


# ---- what the templates see ----------------------------------------------------------------------------------


def _view(report: Mapping[str, Any], extras: ReportExtras) -> dict[str, Any]:
    members, rules = report.get("members", {}), report.get("rules", {})
    validation = report.get("validation", {})
    order = _metric_order(extras.metric, members, rules)
    return {
        "report": report,
        "extras": extras,
        "metric": extras.metric,
        "rows": rows_are(extras.metric),
        "task": "classification" if rows_are(extras.metric) == "examples" else "recommendation",
        "verdict": verdict(report, extras.metric),
        "headline": _headline(report, extras.metric),
        "comparison": _comparison(report, order),
        "tables": [
            ("Test", _table(report, members, rules, order)),
            ("Validation", _table(report, validation.get("members", {}), validation.get("rules", {}), order)),
        ],
        "segments": _segments(report, extras.metric),
        "weights": _weights(extras.rule_weights, list(members)),
        "cost": _cost(report, extras.metric),
        "colours": {name: index % 8 for index, name in enumerate(members)},
        "examples": _examples(extras.examples),
        "mistakes": _mistakes(extras.mistakes),
        "confused": _confused(extras),
        "epochs": {name: len(rows) for name, rows in extras.learning_curves.items() if rows},
    }


def _metric_order(first: str, *parts: Figures) -> list[str]:
    """All metrics that any system has, the deciding one first."""
    found = dict.fromkeys(metric for figures in parts for system in figures.values() for metric in system)
    return [first, *(metric for metric in found if metric != first)] if found else []


def _value(figures: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
    found = figures.get(metric, {}).get("value")
    return None if found is None or not math.isfinite(found) else float(found)


def _best(values: Mapping[str, float | None], metric: str) -> str | None:
    """The name with the best defined value."""
    defined = {name: value for name, value in values.items() if value is not None}
    if not defined:
        return None
    return (max if higher_is_better(metric) else min)(defined, key=lambda name: defined[name])


def _headline(report: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """The few figures above the fold."""
    tiles = []
    for kind, part in (("rule", "rules"), ("member", "members")):
        name = report.get(f"best_{kind}")
        if name in report.get(part, {}):
            tiles.append({"label": f"best {kind}", "name": name, **report[part][name].get(metric, {})})
    return tiles


def _comparison(report: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """Best rule minus best member on every metric, placed on a line from -reach to reach in percent."""
    result = []
    significance = report.get("significance", {})
    for metric in [name for name in order if name in significance]:
        found = significance[metric]
        if found["difference"] is None:
            continue
        reach = max(abs(found["low"]), abs(found["high"]), 1e-12)
        low, high = (50 + 46 * found[end] / reach for end in ("low", "high"))
        sign = 1 if higher_is_better(metric) else -1
        better, worse = min(sign * found["low"], sign * found["high"]) > 0, max(
            sign * found["low"], sign * found["high"]
        ) < 0
        result.append(
            {
                "metric": metric,
                **found,
                "left": low,
                "width": max(high - low, 0.8),
                "at": 50 + 46 * found["difference"] / reach,
                "tone": "good" if better else "bad" if worse else "open",
                "less": sign < 0,
            }
        )
    return result


def _table(report: Mapping[str, Any], members: Figures, rules: Figures, order: Sequence[str]) -> dict[str, Any]:
    """Rows of systems by columns of metrics, the best of each column marked."""
    systems = {**members, **rules}
    columns = [metric for metric in order if any(metric in figures for figures in systems.values())]
    best = {}
    for metric in columns:
        values = {name: _value(figures, metric) for name, figures in systems.items()}
        winner = _best(values, metric)
        best[metric] = None if winner is None else values[winner]
    chosen = {report.get("best_member"), report.get("best_rule")}
    rows = [
        {
            "name": name,
            "kind": kind,
            "chosen": name in chosen,
            "cells": [
                {**figures.get(metric, {}), "best": _value(figures, metric) is not None and _value(figures, metric) == best[metric]}
                for metric in columns
            ],
        }
        for kind, part in (("member", members), ("rule", rules))
        for name, figures in part.items()
    ]
    return {"columns": [{"name": m, "less": not higher_is_better(m)} for m in columns], "rows": rows}


def _segments(report: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Rows of systems by columns of segments, on the deciding metric."""
    parts = {
        name: {**part.get("members", {}), **part.get("rules", {})} for name, part in report.get("segments", {}).items()
    }
    columns = [{"name": name, "n": _largest_n(systems, metric)} for name, systems in parts.items()]
    columns = [column for column in columns if column["n"]]
    kinds = {**dict.fromkeys(report.get("members", {}), "member"), **dict.fromkeys(report.get("rules", {}), "rule")}
    rows = []
    for system, kind in kinds.items():
        cells = []
        for column in columns:
            systems = parts[column["name"]]
            values = {name: _value(figures, metric) for name, figures in systems.items()}
            cells.append(
                {
                    **systems.get(system, {}).get(metric, {}),
                    "best": values.get(system) is not None and values[system] == values[_best(values, metric) or ""],
                    "strength": _strength(values.get(system), values, metric),
                }
            )
        rows.append({"name": system, "kind": kind, "cells": cells})
    return {"columns": columns, "rows": rows if columns else []}


def _largest_n(systems: Figures, metric: str) -> int:
    return max((int(figures.get(metric, {}).get("n", 0)) for figures in systems.values()), default=0)


def _strength(value: float | None, all_values: Mapping[str, float | None], metric: str) -> int:
    """0 for the worst of a column to 5 for the best: the depth of a cell's tint."""
    defined = [v for v in all_values.values() if v is not None]
    if value is None or max(defined) == min(defined):
        return 0
    share = (value - min(defined)) / (max(defined) - min(defined))
    return round(5 * (share if higher_is_better(metric) else 1 - share))


def _weights(weights: Mapping[str, Mapping[str, float]], members: Sequence[str]) -> dict[str, Any]:
    """Rules by members; each bar is as long as its share of the rule's largest weight."""
    columns = [name for name in members if any(name in by_member for by_member in weights.values())]
    rows = []
    for rule, by_member in weights.items():
        largest = max((abs(weight) for weight in by_member.values()), default=0.0) or 1.0
        cells = [
            {"value": by_member.get(name), "width": 100 * abs(by_member.get(name, 0.0)) / largest} for name in columns
        ]
        rows.append({"rule": rule, "cells": cells})
    return {"columns": columns, "rows": rows if columns else []}


def _cost(report: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """One row per system and variant, with its quality and whether another is at least as good in everything."""
    figures = {**report.get("members", {}), **report.get("rules", {})}
    kinds = {**dict.fromkeys(report.get("members", {}), "member"), **dict.fromkeys(report.get("rules", {}), "rule")}
    rows = [
        {"name": name, "kind": kinds.get(name, "variant"), "quality": _value(figures.get(name, {}), metric), **cost}
        for name, cost in {**report.get("cost", {}), **report.get("variants", {})}.items()
    ]
    sign = 1 if higher_is_better(metric) else -1
    for row in rows:
        row["on_front"] = row["quality"] is not None and not any(_beats(other, row, sign) for other in rows)
    return rows


def _beats(a: Mapping[str, Any], b: Mapping[str, Any], sign: int) -> bool:
    """Whether a is at least as good as b in quality, bytes and latency, and better in one of them."""
    if a["quality"] is None:
        return False
    pairs = [(sign * a["quality"], sign * b["quality"])]
    pairs += [(-a[key], -b[key]) for key in ("bytes", "p95_ms") if a.get(key) is not None and b.get(key) is not None]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def _examples(examples: Sequence[Example]) -> list[dict[str, Any]]:
    pictures = iter(
        thumbnails([shown.image for example in examples for shown in (*example.history, *example.recommended)])
    )
    result = []
    for example in examples:
        history = [{"title": item.title, "picture": next(pictures)} for item in example.history]
        recommended = [_recommended(item, next(pictures)) for item in example.recommended]
        _place_contributions(recommended)
        pictured = any(item["picture"] for item in (*history, *recommended))
        result.append(
            {"user": example.user, "history": history, "recommended": recommended, "pictured": pictured}
        )
    return result


def _recommended(item: Recommended, picture: str | None) -> dict[str, Any]:
    parts = {name: float(value) for name, value in item.contributions.items() if math.isfinite(value)}
    return {
        "title": item.title,
        "picture": picture,
        "score": item.score,
        "relevant": item.relevant,
        "contributions": sorted(parts.items(), key=lambda part: -abs(part[1])),
        "segments": [],
        "zero": 0.0,
        "parts": parts,
    }


def _place_contributions(items: Sequence[dict[str, Any]]) -> None:
    """Stacks contributions on one scale for a whole list: what adds to the right of zero, what takes to its left."""
    above = max((sum(v for v in item["parts"].values() if v > 0) for item in items), default=0.0)
    below = max((sum(-v for v in item["parts"].values() if v < 0) for item in items), default=0.0)
    whole = above + below or 1.0
    zero = 100 * below / whole
    for item in items:
        right, left = zero, zero
        for name, value in item["parts"].items():
            width = 100 * abs(value) / whole
            left -= width if value < 0 else 0
            item["segments"].append({"member": name, "left": right if value >= 0 else left, "width": width})
            right += width if value >= 0 else 0
        item["zero"] = zero


def _mistakes(mistakes: Sequence[Mistake]) -> list[dict[str, Any]]:
    pictures = thumbnails([mistake.image for mistake in mistakes])
    return [
        {"mistake": mistake, "picture": picture} for mistake, picture in zip(mistakes, pictures, strict=True)
    ]


def _confused(extras: ReportExtras, most: int = 10) -> list[dict[str, Any]]:
    """The pairs of classes that are most often taken for each other."""
    if extras.confusion is None:
        return []
    counts = np.array(extras.confusion, copy=True)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(counts)) for place in order]
    return [
        {"true": extras.classes[t], "predicted": extras.classes[p], "count": int(counts[t, p]), "of": int(totals[t])}
        for t, p in pairs
        if counts[t, p]
    ]


# ---- charts --------------------------------------------------------------------------------------------------


def _charts(report: Mapping[str, Any], extras: ReportExtras) -> dict[str, Figure]:
    """The charts for which there is something to show, by file name."""
    charts = {}
    if report.get("members") or report.get("rules"):
        charts["comparison"] = _comparison_chart(report, extras.metric)
    if extras.drop_one:
        charts["drop_one"] = _drop_one_chart(extras)
    curves = {name: rows for name, rows in extras.learning_curves.items() if rows}
    if curves:
        charts["learning_curves"] = plots.curves(curves)
    spots = _spots(report, extras.metric)
    if len(spots) > 1:
        charts["cost"] = plots.trade_off(spots, "milliseconds an answer takes (p95)", extras.metric)
    if extras.confusion is not None and len(extras.classes) <= _MOST_CLASSES:
        charts["confusion"] = plots.confusion(np.asarray(extras.confusion), extras.classes)
    return charts


def _comparison_chart(report: Mapping[str, Any], metric: str) -> Figure:
    entries = []
    sign = -1 if higher_is_better(metric) else 1
    for kind, part in (("member", "members"), ("rule", "rules")):
        systems = report.get(part, {})
        order = sorted(systems, key=lambda name: sign * (_value(systems[name], metric) or 0.0))
        for name in order:
            figure = systems[name].get(metric, {})
            role = f"best-{kind}" if name == report.get(f"best_{kind}") else kind
            entries.append(
                plots.Bar(name, _value(systems[name], metric), figure.get("low"), figure.get("high"), role, part)
            )
    return plots.bars(entries, metric + ("" if sign < 0 else " (less is better)"))


def _drop_one_chart(extras: ReportExtras) -> Figure:
    """What is lost without each member; for metrics where less is better the sign is turned."""
    sign = 1.0 if higher_is_better(extras.metric) else -1.0
    entries = []
    for member, found in extras.drop_one.items():
        difference, low, high = (
            None if found.get(key) is None else sign * float(found[key] or 0.0) for key in ("difference", "low", "high")
        )
        if low is not None and high is not None:
            low, high = min(low, high), max(low, high)
        helps = difference is not None and difference >= 0
        clear = low is not None and high is not None and (low > 0 or high < 0)
        role = ("best-rule" if clear else "rule") if helps else "worse"
        entries.append(plots.Bar(member, difference, low, high, role))
    entries.sort(key=lambda bar: -(bar.value or 0.0))
    return plots.bars(entries, f"{extras.metric} lost without the member", signed=True)


def _spots(report: Mapping[str, Any], metric: str) -> list[plots.Spot]:
    rows = [row for row in _cost(report, metric) if row["quality"] is not None and (row.get("p95_ms") or 0) > 0]
    sign = 1 if higher_is_better(metric) else -1
    spots = []
    for row in rows:
        beaten = any(
            sign * other["quality"] >= sign * row["quality"]
            and other["p95_ms"] <= row["p95_ms"]
            and (other["quality"], other["p95_ms"]) != (row["quality"], row["p95_ms"])
            for other in rows
        )
        best = row["name"] == report.get(f"best_{row['kind']}")
        kind = row["kind"] if row["kind"] in ("member", "rule") else "worse"
        role = f"best-{kind}" if best else kind
        spots.append(plots.Spot(row["name"], row["p95_ms"], row["quality"], role, not beaten))
    return spots


# ---- rendering -----------------------------------------------------------------------------------------------

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(value: Any) -> Any:
    """Text without characters that HTML and UTF-8 forbid (NUL, control characters, lone surrogates)."""
    if type(value) is str:
        return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    return value


def markdown(value: Any) -> Any:
    """Text that Markdown takes literally and that does not break out of a table's cell."""
    if type(value) is not str:
        return value
    value = " ".join(printable(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`\[\]*])", r"\\\1", value)


def shorten(text: Any, length: int = 80) -> str:
    """At most `length` characters."""
    text = str(text)
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _environment(*, html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=html,
        finalize=printable if html else markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "bytes": bytes_of,
        "count": count_of,
        "seconds": seconds_of,
        "words": words,
        "shorten": shorten,
    }
    return environment


def _data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
