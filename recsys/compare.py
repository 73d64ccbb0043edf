"""Runs side by side: figures with intervals, paired differences over the same users, and what each system costs.

A side is a run, or several runs of one config that differ in a seed or in a key (`recsys.variations`); the figures of
the latter are means, with their deviation from run to run beside the interval over users. Sides are compared user by
user only where they answered the same question: one split, one rule for what is positive, the same candidates.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fusion.errors import ConfigError, DataError
from fusion.files import load_arrays, save_arrays
from fusion.registry import nearest
from recsys.metrics.lists import ratio
from recsys.report_words import higher_is_better
from recsys.significance import paired_difference

PER_USER = Path("evaluate", "per_user.npz")
"""Below a run's folder: the test value of every system, metric and user."""
SHOWN = {
    "recommendation": ("recall@20", "recall@10", "map@10", "coverage@10"),
    "classification": ("log_loss", "auc"),
}
"""Metrics beside the deciding one where none are asked for: the first two of these that the runs have."""
COSTS = ("p95_ms", "bytes", "train_s")
"""What decides on the Pareto front beside quality: less is better."""
_CELLS_AT_ONCE = 1 << 24
"""Drawn weights of users held in memory at a time (128 MB)."""

PerUser = dict[str, dict[str, np.ndarray]]
"""System -> metric -> float64 `[R, U]`, R runs; NaN where undefined, or where a run did not ask for the user."""


# ---- values by user ---------------------------------------------------------------------------------------------


def save_values(folder: Path, users: np.ndarray, values: Mapping[str, Mapping[str, np.ndarray | float]]) -> None:
    """Writes `evaluate/per_user.npz` into a run's folder.

    Args:
        folder: of the run.
        users: int `[U]`, the number of the user (or example) behind each value.
        values: by system and metric, float `[U]`; metrics that are one number are left out.
    """
    path = folder / PER_USER
    path.parent.mkdir(parents=True, exist_ok=True)
    by_name = {
        f"{system}/{metric}": np.asarray(value, np.float32)
        for system, by_metric in values.items()
        for metric, value in by_metric.items()
        if isinstance(value, np.ndarray)
    }
    save_arrays(path, {"users": np.asarray(users, np.int64), **by_name})


def load_values(folder: Path) -> tuple[np.ndarray, PerUser] | None:
    """Users int64 `[U]` in ascending order and their values `[1, U]`; None where the run has kept none.

    Raises GateError when the file is damaged.
    """
    path = folder / PER_USER
    if not path.is_file():
        return None
    arrays = load_arrays(path)
    users = arrays.pop("users")
    order = np.argsort(users, kind="stable")
    values: PerUser = {}
    for name, array in arrays.items():
        system, _, metric = name.partition("/")
        values.setdefault(system, {})[metric] = array[order].astype(np.float64)[None]
    return users[order], values


# ---- sides ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A member, a rule or a compressed variant of one side.

    Attributes:
        kind: `member`, `rule` or `variant`.
        chosen: in how many of the side's runs validation chose it as the best of its kind.
        figures: metric -> value, low, high, n; of several runs also `sd` and `by_run`.
        cost: as in `report.json`; of several runs the means.
    """

    kind: str
    chosen: int
    figures: Mapping[str, Mapping[str, Any]]
    cost: Mapping[str, float]


@dataclass(frozen=True)
class Side:
    """One run, or several runs of one config as one.

    Attributes:
        label: what it is called in tables.
        reports: `report.json` of each run.
        runs: what is told of each run: label, folder, seconds, peak_bytes.
        systems: by name, members first.
        users: int64 `[U]` ascending; None where a run has kept no values.
        values: see `PerUser`; None as `users` is.
    """

    label: str
    reports: Sequence[Mapping[str, Any]]
    runs: Sequence[Mapping[str, Any]]
    systems: Mapping[str, System]
    users: np.ndarray | None = None
    values: PerUser | None = None

    @property
    def primary(self) -> str:
        """The metric that decided in its runs."""
        return str(self.reports[0]["primary_metric"])

    @property
    def questions(self) -> list[dict[str, Any]]:
        """What each run was asked; sides with equal questions can be compared user by user."""
        return [
            {
                "split": report["split"]["hash"],
                "rule for positives": report["dataset"].get("positive"),
                "candidates": report["split"].get("candidates"),
                "catalogue size": report["dataset"].get("items"),
            }
            for report in self.reports
        ]

    def of(self, system: str, metric: str) -> np.ndarray | None:
        """Values `[R, U]` of a system, None where there are none."""
        return (self.values or {}).get(system, {}).get(metric)


def read_side(folder: Path, label: str = "") -> Side:
    """A run that was evaluated as one side.

    Raises ConfigError when the folder holds no such run, DataError or GateError when its files cannot be read.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"a run that is compared must have been evaluated; {folder} has no report.json. Give the folder that "
            "tools/train.py printed, or run its config again to continue it."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} must be JSON; received: {error}. Write it anew with tools/evaluate.py.") from None
    systems = {
        name: System(kind, int(name == report[f"best_{kind}"]), figures, report["cost"].get(name, {}))
        for kind in ("member", "rule")
        for name, figures in report[f"{kind}s"].items()
    }
    for name, reference in report.get("references", {}).items():
        systems[name] = System("reference", 0, reference["figures"], {})
    for name, variant in report.get("variants", {}).items():
        cost = {key: value for key, value in variant.items() if key != "figures"}
        systems[name] = System("variant", 0, variant.get("figures", {}), cost)
    label = label or f"{report['name']}/{folder.resolve().name}"
    run = {"label": label, "folder": str(folder), "mode": _mode(folder), **_spent(folder)}
    return Side(label, [report], [run], systems, *(load_values(folder) or (None, None)))


def _spent(folder: Path) -> dict[str, Any]:
    """Seconds of all stages and the peak of memory of a run, as its state file tells."""
    try:
        stages = json.loads((folder / "run.json").read_text(encoding="utf-8"))["stages"].values()
    except (OSError, ValueError, KeyError):
        return {"seconds": None, "peak_bytes": None}
    seconds = round(sum(stage["seconds"] for stage in stages), 1)
    return {"seconds": seconds, "peak_bytes": max((stage["peak_bytes"] for stage in stages), default=None)}


def _mode(folder: Path) -> str:
    """How the members of a run were trained, joint or separate; empty where its settings are not told."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return str(settings["training"]["mode"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return ""


def pool(sides: Sequence[Side], label: str) -> Side:
    """Several runs of one config as one side: means over the runs and their deviation `sd` (ddof 1).

    Values by user are kept where every run has some and all runs read the same data, so that a number means the same
    user in each.
    """
    if len(sides) == 1:
        return sides[0]
    systems = {
        name: _pooled([side.systems[name] for side in sides])
        for name in sides[0].systems
        if all(name in side.systems for side in sides)
    }
    same_data = len({side.reports[0]["dataset"].get("hash") for side in sides}) == 1
    kept = same_data and all(side.values is not None for side in sides)
    return Side(
        label,
        [report for side in sides for report in side.reports],
        [run for side in sides for run in side.runs],
        systems,
        *(_joined(sides, systems) if kept else (None, None)),
    )


def _pooled(each: Sequence[System]) -> System:
    metrics = [metric for metric in each[0].figures if all(metric in system.figures for system in each)]
    figures = {metric: _mean_figure([system.figures[metric]["value"] for system in each]) for metric in metrics}
    costs = [system.cost for system in each]
    shared = [key for key in costs[0] if all(cost.get(key) is not None for cost in costs)]
    mean_cost = {key: float(np.mean([cost[key] for cost in costs])) for key in shared}
    return System(each[0].kind, sum(system.chosen for system in each), figures, mean_cost)


def _mean_figure(by_run: Sequence[float | None]) -> dict[str, Any]:
    defined = [value for value in by_run if value is not None]
    return {
        "value": float(np.mean(defined)) if defined else None,
        "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "by_run": list(by_run),
        "low": None,
        "high": None,
        "n": 0,
    }


def _joined(sides: Sequence[Side], names: Iterable[str]) -> tuple[np.ndarray, PerUser]:
    """The values of all runs over the users of all runs."""
    asked = [np.asarray(side.users) for side in sides]
    users = np.unique(np.concatenate(asked))
    values: PerUser = {}
    for name in names:
        of_runs = [(side.values or {}).get(name, {}) for side in sides]
        values[name] = {}
        for metric in set.intersection(*map(set, of_runs)):
            joined = np.full((len(sides), len(users)), np.nan)
            for row, own, by_metric in zip(joined, asked, of_runs, strict=True):
                row[np.searchsorted(users, own)] = by_metric[metric][0]
            values[name][metric] = joined
    return users, values


def mean_intervals(values: np.ndarray, samples: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap intervals over users of means over runs.

    The statistic is the mean over runs of each run's mean over its users. Users are drawn, with all their runs: a
    user's values in two runs are not independent. The spread from run to run is not in it (that is `sd`).

    Args:
        values: float64 `[N, R, U]`: N statistics at once, NaN where a run has no value for a user; each has some.
        samples: draws of U users with replacement.

    Returns the lower and the upper ends, float64 `[N]` each.
    """
    count, runs, users = values.shape
    defined = ~np.isnan(values)
    sums = np.where(defined, values, 0.0).reshape(count * runs, users).T
    weights_of = defined.reshape(count * runs, users).T.astype(np.float64)
    random = np.random.default_rng(seed)
    means = np.empty((samples, count))
    step = max(1, _CELLS_AT_ONCE // users)
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        drawn = random.multinomial(users, np.full(users, 1.0 / users), size=stop - start).astype(np.float64)
        by_run = ratio(drawn @ sums, drawn @ weights_of).reshape(stop - start, count, runs)
        means[start:stop] = ratio(np.nansum(by_run, axis=2), (~np.isnan(by_run)).sum(axis=2))
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return low, high


# ---- the comparison ---------------------------------------------------------------------------------------------


def compare(
    sides: Sequence[Side],
    metrics: Sequence[str] = (),
    *,
    against: str = "",
    unpaired: bool = False,
    samples: int = 1000,
) -> dict[str, Any]:
    """Everything that is shown, as plain data: rows of systems, their figures, differences and costs.

    Args:
        sides: at least one.
        metrics: columns, the deciding one first. Empty takes the first side's deciding metric and two others.
        against: the system of the first side that all others are held against; empty takes the rule it chose.
        unpaired: leave differences out.
        samples: bootstrap samples.

    Returns `{"metrics", "against", "runs", "rows", "notes"}`. A row has `side`, `system`, `kind`, `chosen` (in how many
    runs), `of_runs`, `figures`, `cost`, `difference` (paired, in the first metric; None where values are missing) and
    `front`: whether no other row is as good in quality and `COSTS` and better in one of them.

    Raises ConfigError when a metric or a system is unknown, two sides have one name, or sides that are paired were
    asked different questions.
    """
    labels = [side.label for side in sides]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ConfigError(f"sides must have different names to be told apart; received '{twice}' twice. Leave one out.")
    columns = _columns(sides, metrics)
    reference = _reference(sides[0], against)
    if not unpaired:
        for side in sides[1:]:
            _check_same_question(sides[0], side)
    rows: list[dict[str, Any]] = []
    for side in sides:
        figures = _figures(side, columns, samples)
        gaps = {} if unpaired else _differences(sides[0], reference, side, columns[0], samples)
        for name, system in side.systems.items():
            shares = {"chosen": system.chosen, "of_runs": len(side.runs)}
            row = {"side": side.label, "system": name, "kind": system.kind, **shares}
            rows.append(row | {"figures": figures[name], "cost": dict(system.cost), "difference": gaps.get(name)})
    for row, on_front in zip(rows, pareto_front([_goodness(row, columns[0]) for row in rows]), strict=True):
        row["front"] = on_front
    return {
        "metrics": columns,
        "against": {"side": sides[0].label, "system": reference},
        "runs": [{"side": side.label, **run} for side in sides for run in side.runs],
        "rows": rows,
        "notes": [] if unpaired else list(_notes(sides)),
    }


def across(sides: Sequence[Side], samples: int = 1000) -> list[dict[str, Any]]:
    """A row for each side, whatever its data: what its rules reached beside its best member, each by its own metric.

    Returns for each side `side`, `data`, `mode` (joint or separate), `metric`, `member` and `rule` (the names that
    validation chose, in most of the side's runs), `members`, `rules` and `references` (figures by name), and `gain`:
    the paired difference of rule and member on the test part, None where a run has kept no values.
    """
    rows = []
    for side in sides:
        metric = side.primary
        figures = _figures(side, [metric], samples)
        of_kind = {
            kind: {name: figures[name].get(metric) for name, system in side.systems.items() if system.kind == kind}
            for kind in ("member", "rule", "reference")
        }
        member, rule = (max(of_kind[kind], key=lambda name: side.systems[name].chosen) for kind in ("member", "rule"))
        ours, theirs = side.of(rule, metric), side.of(member, metric)
        rows.append(
            {
                "side": side.label,
                "data": str(side.reports[0]["dataset"].get("name", "")),
                "mode": str(side.runs[0].get("mode", "")),
                "metric": metric,
                "member": member,
                "rule": rule,
                **{f"{kind}s": named for kind, named in of_kind.items()},
                "gain": None if ours is None or theirs is None else _difference(ours, theirs, samples),
            }
        )
    return rows


def _columns(sides: Sequence[Side], metrics: Sequence[str]) -> list[str]:
    primary, task = sides[0].primary, str(sides[0].reports[0]["task"])
    known = list(dict.fromkeys(m for side in sides for system in side.systems.values() for m in system.figures))
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"--metrics: no run has measured '{metric}': {nearest(metric, known)}")
    return list(metrics) or [primary, *[m for m in SHOWN[task] if m in known and m != primary][:2]]


def _reference(side: Side, against: str) -> str:
    if against and against not in side.systems:
        raise ConfigError(f"--against: {side.label} has no system '{against}': {nearest(against, side.systems)}")
    rules = {name: system.chosen for name, system in side.systems.items() if system.kind == "rule"}
    return against or max(rules, key=lambda name: rules[name])


def _check_same_question(a: Side, b: Side) -> None:
    nothing: dict[str, Any] = {}
    for ours, theirs in itertools.zip_longest(a.questions, b.questions, fillvalue=nothing):
        for what in ours or theirs:
            if ours.get(what) != theirs.get(what):
                raise ConfigError(
                    f"sides that are compared user by user must be asked the same; {a.label} and {b.label} differ in "
                    f"their {what} ({str(ours.get(what))[:12]} and {str(theirs.get(what))[:12]}). Give runs of one "
                    "split, or --unpaired to see figures only."
                )


def _figures(side: Side, columns: Sequence[str], samples: int) -> dict[str, dict[str, dict[str, Any]]]:
    """The figures of a side by system; those of several runs with their intervals over users."""
    figures = {
        name: {metric: dict(system.figures[metric]) for metric in columns if metric in system.figures}
        for name, system in side.systems.items()
    }
    if len(side.runs) == 1:
        return figures
    places = [(name, metric) for name, by_metric in figures.items() for metric in by_metric]
    kept = ((place, side.of(*place)) for place in places)
    found = {place: values for place, values in kept if values is not None and not np.isnan(values).all()}
    if found:
        low, high = mean_intervals(np.stack(list(found.values())), samples)
        for (name, metric), values, *ends in zip(found, found.values(), low, high, strict=True):
            users = int((~np.isnan(values)).any(axis=0).sum())
            figures[name][metric] |= {"low": float(ends[0]), "high": float(ends[1]), "n": users}
    return figures


def _differences(first: Side, reference: str, side: Side, metric: str, samples: int) -> dict[str, dict[str, Any]]:
    """Each system minus the reference over the same users of the same runs; nothing where values are missing."""
    theirs = first.of(reference, metric)
    if theirs is None or side.users is None or first.users is None:
        return {}
    if not np.array_equal(side.users, first.users):
        raise ConfigError(
            f"sides that are compared user by user must have measured the same users; {first.label} has "
            f"{len(first.users):,} and {side.label} {len(side.users):,} others. Use --unpaired to see figures only."
        )
    gaps: dict[str, dict[str, Any]] = {}
    for name in side.systems:
        ours = side.of(name, metric)
        if ours is not None and not (side is first and name == reference):
            gaps[name] = _difference(ours, theirs, samples)
    return gaps


def _difference(ours: np.ndarray, theirs: np.ndarray, samples: int) -> dict[str, Any]:
    """Of values `[R, U]`; of several runs the mean difference, its deviation, and the interval over users."""
    if len(ours) == 1:
        return dict(paired_difference(ours[0], theirs[0], samples))
    gaps = ours - theirs
    defined = ~np.isnan(gaps)
    by_run = ratio(np.nansum(gaps, axis=1), defined.sum(axis=1))
    figure = _mean_figure([None if np.isnan(value) else value for value in by_run.tolist()])
    ends = [float(end[0]) for end in mean_intervals(gaps[None], samples)] if defined.any() else [None, None]
    users = int(defined.any(axis=0).sum())
    return {"difference": figure["value"], "sd": figure["sd"], "low": ends[0], "high": ends[1], "n": users}


def _goodness(row: Mapping[str, Any], metric: str) -> tuple[float, ...] | None:
    """Quality and costs with more as better; None where something was not measured."""
    quality = row["figures"].get(metric, {}).get("value")
    costs = [row["cost"].get(key) for key in COSTS]
    if quality is None or any(cost is None for cost in costs):
        return None
    return (quality if higher_is_better(metric) else -quality, *(-cost for cost in costs))


def pareto_front(points: Sequence[tuple[float, ...] | None]) -> list[bool]:
    """Which points no other beats by being as good in everything and better in something. None is on no front.

    >>> pareto_front([(0.5, -1.0), (0.4, -2.0), (0.6, -3.0), None])
    [True, False, True, False]
    """
    defined = [point for point in points if point is not None]

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(x >= y for x, y in zip(other, point, strict=True)) for other in defined)

    return [point is not None and not beaten(point) for point in points]


def _notes(sides: Iterable[Side]) -> Iterable[str]:
    for side in sides:
        if side.values is None:
            folders = ", ".join(run["folder"] for run in side.runs)
            yield f"{side.label}: no values by user, so no differences; tools/evaluate.py makes them for {folders}."


__all__ = [
    "Side",
    "System",
    "across",
    "compare",
    "load_values",
    "mean_intervals",
    "pareto_front",
    "pool",
    "read_side",
    "save_values",
]
