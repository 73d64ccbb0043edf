"""The charts of a report, drawn by matplotlib without a display. Nothing is computed here.

A chart becomes a PNG (light, for files) or an SVG whose colours are CSS variables, so that the same drawing follows
a page's light or dark scheme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from recsys.metrics.classes import Reliability

THEME = {
    # name: (light, dark). The light colours must be distinct: they are found again in the SVG by their value.
    "ink": ("#1b2431", "#e7ecf1"),
    "muted": ("#66717f", "#95a2b0"),
    "grid": ("#e4e8ed", "#2b343e"),
    "member": ("#b4c2d1", "#4a5b6d"),
    "best-member": ("#54718e", "#8fabc7"),
    "rule": ("#a5d8cf", "#2b665d"),
    "best-rule": ("#0c8c7c", "#35c4ae"),
    "worse": ("#d2603a", "#ee8a66"),
}
"""Colours by role, as (light, dark)."""

_LIGHT = {name: light for name, (light, _) in THEME.items()}
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so charts look alike everywhere
    "font.size": 10.5,
    "text.parse_math": False,  # a member may be called "$x$"
    "text.color": _LIGHT["ink"],
    "axes.labelcolor": _LIGHT["muted"],
    "axes.edgecolor": _LIGHT["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # equal charts give equal bytes
}
_INCHES = 5.0  # the width of a column of the page at 100 dots an inch


@dataclass(frozen=True)
class Bar:
    """One horizontal bar with its interval.

    Attributes:
        name: the label on the left.
        value: its length; None draws the label alone.
        low, high: the ends of the whisker, or None.
        role: a colour of `THEME`.
        group: bars of one group stand together, with the group's name above.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    role: str
    group: str = ""


def bars(entries: Sequence[Bar], label: str, *, signed: bool = False) -> Figure:
    """Horizontal bars from zero with whiskers and their values in figures; groups are set apart."""
    with _styled():
        groups = list(dict.fromkeys(bar.group for bar in entries))
        rows = len(entries) + sum(1.0 for group in groups if group)
        figure, axes = _figure(0.55 + 0.31 * rows)
        place = 0.0
        labels, places = [], []
        ends = [end for bar in entries for end in (bar.value, bar.low, bar.high) if end is not None] or [0.0]
        reach = max(max(ends), 0.0) - min(*ends, 0.0) or 1.0
        for group in groups:
            if group:
                axes.text(0.008 * reach, place, group, color=_LIGHT["muted"], va="center", fontsize=9.5)
                place += 0.9
            for bar in (bar for bar in entries if bar.group == group):
                labels.append(_shorten(bar.name))
                places.append(place)
                _bar(axes, bar, place, reach, signed)
                place += 1.0
            place += 0.15
        axes.set_yticks(places, labels)
        axes.set_ylim(place - 0.5, -0.6)
        axes.set_xlim(min(*ends, 0.0) - 0.02 * reach, max(*ends, 0.0) + 0.16 * reach)
        axes.tick_params(axis="y", length=0, labelcolor=_LIGHT["ink"], labelsize=10.5)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", color=_LIGHT["grid"], linewidth=0.8)
        axes.axvline(0.0, color=_LIGHT["muted"], linewidth=0.9)
        axes.set_axisbelow(True)
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=5)
        return figure


def _bar(axes: Axes, bar: Bar, place: float, reach: float, signed: bool) -> None:
    if bar.value is None:
        axes.text(0.01 * reach, place, "not defined", va="center", color=_LIGHT["muted"], fontsize=9)
        return
    axes.barh(place, bar.value, height=0.66, color=_LIGHT[bar.role], linewidth=0)
    end = max(bar.value, 0.0)
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [place, place], color=_LIGHT["ink"], linewidth=1.2, solid_capstyle="butt")
        end = max(end, bar.high)
    places = ".4f" if abs(bar.value) < 10 else ".1f"
    text = format(bar.value, ("+" if signed else "") + places).replace("-", "\N{MINUS SIGN}")
    weight = "bold" if bar.role.startswith("best") else "normal"
    axes.text(end + 0.015 * reach, place, text, va="center", fontsize=9.5, fontweight=weight)


def curves(members: Mapping[str, Sequence[Mapping[str, float]]], best: Mapping[str, int] | None = None) -> Figure:
    """One row per member: losses by epoch on the left, everything else that was measured on the right.

    A dashed line stands at the epoch that was kept, where `best` names it.
    """
    with _styled():
        figure = Figure(
            figsize=(2 * _INCHES, 0.3 + 1.75 * len(members)), layout=ConstrainedLayoutEngine(hspace=0.08, wspace=0.05)
        )
        grid = figure.subplots(len(members), 2, squeeze=False)
        for (name, epochs), (left, right) in zip(members.items(), grid, strict=True):
            keys = [key for key in dict.fromkeys(k for row in epochs for k in row) if _is_curve(key, epochs)]
            _curve(left, epochs, [key for key in keys if "loss" in key], f"{_shorten(name)}: loss")
            _curve(right, epochs, [key for key in keys if "loss" not in key], f"{_shorten(name)}: validation")
            if best and best.get(name):
                for axes in (left, right):
                    axes.axvline(best[name], color=_LIGHT["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
        return figure


def _is_curve(key: str, epochs: Sequence[Mapping[str, float]]) -> bool:
    beside_the_point = key.partition("/")[0] in ("epoch", "step", "seconds", "learning_rate", "conflict")
    return not beside_the_point and any(_number(row.get(key)) is not None for row in epochs)


def _curve(axes: Axes, epochs: Sequence[Mapping[str, float]], keys: Sequence[str], title: str) -> None:
    axes.set_title(title)
    if not keys:
        axes.set_axis_off()
        axes.text(0.0, 0.8, "nothing measured", transform=axes.transAxes, color=_LIGHT["muted"], fontsize=9.5)
        return
    ends = []
    for key, role in zip(keys, ("best-rule", "best-member", "worse", "muted"), strict=False):
        points = [(row.get("epoch", index), _number(row.get(key))) for index, row in enumerate(epochs, 1)]
        numbers, values = zip(*((number, value) for number, value in points if value is not None), strict=True)
        axes.plot(numbers, values, color=_LIGHT[role], linewidth=1.8, marker="o", markersize=3)
        ends.append((key, role, numbers[-1], values[-1]))
    unit = (np.ptp(axes.get_ylim()) or 1.0) / 90.0  # the axes are about 90 points high
    heights = _spread([value / unit for *_, value in ends])
    for (key, role, number, value), height in zip(ends, heights, strict=True):
        axes.annotate(
            _shorten(key),
            (number, value),
            xytext=(6, height - value / unit),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_LIGHT[role],
        )
    axes.grid(axis="y", color=_LIGHT["grid"], linewidth=0.8)
    last = max(row.get("epoch", index) for index, row in enumerate(epochs, 1))
    axes.set_xlim(1 - 0.03 * last, 1.2 * last)  # room on the right for the names of the lines
    axes.xaxis.set_major_locator(
        FixedLocator([t for t in MaxNLocator(6, integer=True).tick_values(1, last) if 1 <= t <= last])
    )
    axes.tick_params(length=0)
    axes.locator_params(axis="y", nbins=4)


def descents(rules: Mapping[str, Sequence[float]]) -> Figure:
    """One square per rule: what its fitting minimised, at the start and after each iteration."""
    with _styled():
        rows = -(-len(rules) // 4)
        figure = Figure(
            figsize=(2 * _INCHES, 0.3 + 1.9 * rows), layout=ConstrainedLayoutEngine(h_pad=0.07, hspace=0.04)
        )
        grid = figure.subplots(rows, 4, squeeze=False).ravel()
        for axes, (name, losses) in zip(grid, rules.items(), strict=False):
            axes.plot(range(len(losses)), losses, color=_LIGHT["best-rule"], linewidth=1.8)
            axes.scatter(len(losses) - 1, losses[-1], s=16, color=_LIGHT["best-rule"], zorder=3)
            axes.set_title(_shorten(name, 22))
            axes.grid(axis="y", color=_LIGHT["grid"], linewidth=0.8)
            axes.tick_params(length=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.locator_params(axis="y", nbins=4)
        for axes in grid[len(rules) :]:
            axes.set_axis_off()
        figure.supxlabel("iteration", color=_LIGHT["muted"], fontsize=10.5)
        figure.supylabel("loss", color=_LIGHT["muted"], fontsize=10.5)
        return figure


@dataclass(frozen=True)
class Spot:
    """One system in the chart of quality against cost; `best` are those that no other beats on both."""

    name: str
    cost: float
    quality: float
    role: str
    best: bool


def trade_off(spots: Sequence[Spot], cost: str, quality: str) -> Figure:
    """Quality against cost on a logarithmic axis; the systems that no other beats on both are joined by steps."""
    with _styled():
        figure, axes = _figure(3.6)
        front = sorted((spot for spot in spots if spot.best), key=lambda spot: spot.cost)
        if len(front) > 1:
            axes.step(
                [spot.cost for spot in front],
                [spot.quality for spot in front],
                where="post",
                color=_LIGHT["grid"],
                linewidth=2,
                zorder=1,
            )
        for spot in spots:
            axes.scatter(spot.cost, spot.quality, s=64, color=_LIGHT[spot.role], zorder=3, linewidths=0)
        for spot, shift in zip(spots, _label_shifts(spots), strict=True):
            axes.annotate(
                _shorten(spot.name),
                (spot.cost, spot.quality),
                xytext=(8, shift),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=_LIGHT["ink" if spot.best else "muted"],
            )
        axes.set_xscale("log")
        costs = [spot.cost for spot in spots]
        steps = (1.0, 2.0, 5.0) if max(costs) < 30 * min(costs) else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(cost)
        axes.set_ylabel(quality)
        axes.margins(x=0.22, y=0.12)
        axes.grid(color=_LIGHT["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        return figure


def _label_shifts(spots: Sequence[Spot]) -> list[float]:
    """Points by which each label moves up so that labels of systems that cost about the same stay apart."""
    unit = (np.ptp([spot.quality for spot in spots]) or 1.0) / 170.0  # the axes are about 170 points high
    wanted = [spot.quality / unit for spot in spots]
    placed = _spread(wanted, [float(np.log10(spot.cost)) for spot in spots], near=0.6)
    return [height - want for height, want in zip(placed, wanted, strict=True)]


def _spread(heights: Sequence[float], beside: Sequence[float] | None = None, near: float = 1.0) -> list[float]:
    """Lifts labels, from the lowest up, until those that stand beside each other are a line (11 points) apart."""
    places = [0.0] * len(heights) if beside is None else beside
    placed: dict[int, float] = {}
    for index in sorted(range(len(heights)), key=lambda label: heights[label]):
        height = heights[index]
        for other in sorted(placed.values()):
            crosses = any(placed[o] == other and abs(places[o] - places[index]) < near for o in placed)
            if crosses and abs(other - height) < 11.0:
                height = other + 11.0
        placed[index] = height
    return [placed[index] for index in range(len(heights))]


def reliability(systems: Mapping[str, Mapping[str, Reliability]]) -> Figure:
    """One square per system: how often answers of a confidence are right, on the diagonal where they keep their word.

    The area of a dot is the share of answers that it stands for, and those of 2 % and more are joined; the calibration
    error stands above.
    """
    roles = {"raw": "worse", "calibrated": "best-rule", "fused": "best-member"}
    with _styled():
        columns = min(len(systems), 4)
        rows = -(-len(systems) // columns)
        side = 2 * _INCHES / 4
        figure = Figure(
            figsize=(side * columns, 0.7 + (side + 0.3) * rows), layout=ConstrainedLayoutEngine(h_pad=0.07, hspace=0.04)
        )
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, (name, kinds) in zip(grid, systems.items(), strict=False):
            axes.plot([0, 1], [0, 1], color=_LIGHT["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
            for kind, found in kinds.items():
                colour = _LIGHT[roles[kind]]
                told = found.share >= 0.02  # a line through bins of one or two answers would be all that is seen
                axes.plot(found.confidence[told], found.accuracy[told], color=colour, linewidth=1.4, alpha=0.5)
                axes.scatter(found.confidence, found.accuracy, s=7 + 160 * found.share, color=colour, alpha=0.8, lw=0)
            errors = " \N{RIGHTWARDS ARROW} ".join(f"{found.error:.3f}" for found in kinds.values())
            axes.set_title(f"{_shorten(name, 22)}\nECE {errors}")
            axes.set_aspect("equal")
            axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.grid(color=_LIGHT["grid"], linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        for axes in grid[len(systems) :]:
            axes.set_axis_off()
        drawn = {kind for kinds in systems.values() for kind in kinds}
        dots = [
            Line2D([], [], color=_LIGHT[role], marker="o", linewidth=1, label=kind)
            for kind, role in roles.items()
            if kind in drawn
        ]
        figure.legend(handles=dots, loc="outside upper left", ncols=3, frameon=False, fontsize=9.5)
        figure.supxlabel("confidence", color=_LIGHT["muted"], fontsize=10.5)
        figure.supylabel("share that is right", color=_LIGHT["muted"], fontsize=10.5)
        return figure


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts `[C, C]`, rows the true class, as shares of their row; the diagonal is what was right."""
    with _styled():
        size = len(classes)
        figure = Figure(figsize=(_INCHES, _INCHES * 0.94), layout="constrained")
        axes = figure.subplots()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        colours = np.zeros((size, size, 4))
        right = matplotlib.colors.to_rgb(_LIGHT["best-rule"])
        wrong = matplotlib.colors.to_rgb(_LIGHT["worse"])
        colours[..., :3] = np.where(np.eye(size, dtype=bool)[..., None], right, wrong)
        colours[..., 3] = np.sqrt(shares) * 0.9  # the root lets rare mistakes be seen
        axes.imshow(colours, aspect="equal", interpolation="nearest")
        if size <= 15:
            for row, column in zip(*np.nonzero(counts), strict=True):
                axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=9)
        names = [_shorten(name, 14) for name in classes]
        axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(size), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure


def heat_map(values: np.ndarray, names: Sequence[str]) -> Figure:
    """Values from -1 to 1 `[S, S]` of pairs, symmetric, drawn below the diagonal; NaN is left out."""
    with _styled():
        size = len(names) - 1
        figure = Figure(figsize=(_INCHES, 1.0 + 0.42 * size), layout="constrained")
        axes = figure.subplots()
        shown = np.where(np.tril(np.ones((size, size), bool)), values[1:, :-1], np.nan)
        colours = np.zeros((size, size, 4))
        above, below = (matplotlib.colors.to_rgb(_LIGHT[role]) for role in ("worse", "best-rule"))
        colours[..., :3] = np.where((shown > 0)[..., None], above, below)
        colours[..., 3] = np.nan_to_num(np.abs(shown)) * 0.9
        axes.imshow(colours, aspect="auto", interpolation="nearest")
        for row, column in zip(*np.nonzero(~np.isnan(shown)), strict=True):
            text = f"{shown[row, column]:.2f}".replace("-", "\N{MINUS SIGN}")
            axes.text(column, row, text, ha="center", va="center", fontsize=9)
        labels = [_shorten(name, 16) for name in names]
        axes.set_xticks(range(size), labels[:-1], rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), labels[1:])
        axes.tick_params(length=0, labelcolor=_LIGHT["ink"])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure


@dataclass(frozen=True)
class Step:
    """One more member: who joins, what the ensemble then reaches, and the milliseconds it then takes, or None."""

    name: str
    value: float
    low: float | None
    high: float | None
    milliseconds: float | None


def growth(steps: Sequence[Step], label: str) -> Figure:
    """Quality against the number of members with its interval, above the milliseconds of an answer."""
    with _styled():
        timed = all(step.milliseconds is not None for step in steps)
        figure = Figure(figsize=(_INCHES, 4.2 if timed else 3.2), layout="constrained")
        grid = figure.subplots(2 if timed else 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + timed])
        quality, numbers = grid[0, 0], np.arange(1, len(steps) + 1)
        for number, step in zip(numbers, steps, strict=True):
            if step.low is not None and step.high is not None:
                quality.plot([number, number], [step.low, step.high], color=_LIGHT["rule"], linewidth=4, zorder=1)
        values = [step.value for step in steps]
        quality.plot(numbers, values, color=_LIGHT["best-rule"], linewidth=1.8, marker="o", markersize=5, zorder=2)
        quality.set_ylabel(label)
        if timed:
            grid[1, 0].bar(numbers, [step.milliseconds for step in steps], color=_LIGHT["member"], width=0.5)
            grid[1, 0].set_ylabel("ms, p50")
        names = [f"{'' if number == 1 else '+ '}{_shorten(step.name, 16)}" for number, step in enumerate(steps, 1)]
        grid[-1, 0].set_xticks(numbers, names, rotation=35, ha="right", rotation_mode="anchor")
        for axes in grid[:, 0]:
            axes.grid(axis="y", color=_LIGHT["grid"], linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelcolor=_LIGHT["ink"])
            axes.locator_params(axis="y", nbins=4)
        return figure


def as_png(figure: Figure) -> bytes:
    """The chart in light colours on white, 200 dots an inch."""
    FigureCanvasAgg(figure)
    return _saved(figure, format="png", dpi=200, facecolor="white")


def as_svg(figure: Figure) -> bytes:
    """The chart without a background, with its colours as variables that follow `prefers-color-scheme`."""
    FigureCanvasSVG(figure)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = _saved(figure, format="svg", transparent=True, metadata=nothing).decode("utf-8")
    for name, light in _LIGHT.items():
        text = text.replace(light, f"var(--{name})")
    text = text.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans'")
    first_tag = re.search(r"<svg[^>]*>", text)
    assert first_tag is not None, "matplotlib writes an <svg> element"
    return (text[: first_tag.end()] + f"<style>{_variables()}</style>" + text[first_tag.end() :]).encode("utf-8")


def _variables() -> str:
    light = "".join(f"--{name}:{colour};" for name, (colour, _) in THEME.items())
    dark = "".join(f"--{name}:{colour};" for name, (_, colour) in THEME.items())
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _styled() -> Any:
    return matplotlib.rc_context(_STYLE)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_INCHES, height), layout="constrained")
    return figure, figure.subplots()


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with _styled(), warnings.catch_warnings():
        # a name in a script that the font does not have is drawn as boxes in the PNG and well in the SVG
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _shorten(text: str, length: int = 26) -> str:
    """A label that fits; control characters, which XML forbids, are replaced."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
