"""Which recipe for which member, under a budget of bytes, judged by what is served on the validation rows.

Members of a classifier are compressed by each recipe once; what they then say is kept, so that a mix of recipes is
judged by fusing alone. The scoring model of a ranking is one file, so there whole recipes are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusion.errors import ConfigError, GateError
from fusion.files import load_arrays
from fusion.progress import note
from recsys.compressed_classes import ClassCompression
from recsys.compression import aside, check_evaluated, compress_task
from recsys.metrics import parse_metric
from recsys.pipeline import TASKS, machine_faults
from recsys.recipes import SEARCHED, Recipe, recipe_named
from recsys.run import Run

ORIGINAL = "as it was"
"""In the place of a recipe's name: the member in float32."""

CLASSES = ("float16", "dynamic_range", "int8", "int4", "prune_int8")
RANKINGS = ("packed", "packed4")
"""Recipes that are tried where none are named: those that take minutes."""


class Mix(NamedTuple):
    """A recipe for each member (of rankings one for `all`): bytes of all files together, and the mean of the deciding
    metric on validation."""

    recipes: dict[str, str]
    bytes: int
    quality: float


def search_run(
    run: Run, recipes: Mapping[str, Recipe], budget: int, max_drop: float
) -> tuple[dict[str, Any], list[Mix]]:
    """As `search`, of a run that is evaluated; among recipes that take minutes where none are named."""
    check_evaluated(run)
    task = TASKS[run.experiment.task](run)
    names = CLASSES if task.OVER == "classes" else RANKINGS
    recipes = recipes or {name: recipe_named(name, {}) for name in names}
    with machine_faults(run.folder), run.locked():
        return search(task, recipes, budget, max_drop)


def search(task: Any, recipes: Mapping[str, Recipe], budget: int, max_drop: float) -> tuple[dict[str, Any], list[Mix]]:
    """The report of the best mix that fits into `budget` bytes, and the mixes that no other beats, smallest first.

    Raises:
        GateError: nothing fits, or all that does loses more than `max_drop` of the deciding metric.
        ConfigError: a recipe for a classifier makes a student of all members.
    """
    if task.OVER == "classes":
        return _of_members(task, recipes, budget, max_drop)
    return _of_recipes(task, recipes, budget, max_drop)


def _of_members(
    task: Any, recipes: Mapping[str, Recipe], budget: int, max_drop: float
) -> tuple[dict[str, Any], list[Mix]]:
    for name, recipe in recipes.items():
        if recipe.student:
            raise ConfigError(
                f"a search chooses a recipe for each member; '{name}' makes one student of all of them. Leave it out, "
                f"or apply it alone with --recipe {name}."
            )
    options = _options(task, recipes)
    fused = ClassCompression(task, SEARCHED, Recipe())
    sign = 1.0 if fused.metric.higher_is_better else -1.0
    seen: dict[tuple[str, ...], Mix] = {}

    def judged(chosen: Mapping[str, str]) -> Mix:
        key = tuple(chosen.values())
        if key not in seen:
            said = {member: options[member][name][1] for member, name in chosen.items()}
            quality = float(np.mean(fused.fused("validation", said)[fused.metric.name]))
            size = sum(options[member][name][0] for member, name in chosen.items())
            seen[key] = Mix(dict(chosen), size, quality)
        return seen[key]

    first = judged(dict.fromkeys(options, ORIGINAL))
    best = improved(reduced(first, options, judged, budget, sign), options, judged, budget, sign)
    if best == first:
        raise GateError(
            f"a search must find something smaller; within {budget:,} bytes nothing is better than the members as they "
            f"are, {first.bytes:,} bytes. Give a smaller budget."
        )
    lost = sign * (first.quality - best.quality)
    if lost > max_drop:
        raise GateError(
            f"{fused.metric.name} must not get worse by more than {max_drop:g} on the validation rows; the best mix of "
            f"{', '.join(recipes)} within {budget:,} bytes loses {lost:.4f}. Allow more of either, or name others."
        )
    members = {
        member: () if name == ORIGINAL else recipes[name].steps_for(member) for member, name in best.recipes.items()
    }
    report = compress_task(task, SEARCHED, Recipe(members=members, max_drop={fused.metric.name: max_drop}))
    return report, front([*seen.values()], sign)


Options = Mapping[str, Mapping[str, tuple[int, np.ndarray]]]
"""By member and recipe: bytes of its file, and its logits `[n, C]` of the validation rows."""


def _options(task: Any, recipes: Mapping[str, Recipe]) -> Options:
    options: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
    for name, recipe in recipes.items():
        applied = ClassCompression(task, name, recipe)
        with aside(task.run, name) as applied.folder:  # what stands under the name may have been made otherwise
            try:
                facts = applied.members()
            except GateError as error:
                _leave_out(task, name, error)
                continue
            for member, found in facts.items():
                own = options.setdefault(member, {ORIGINAL: (found["before"]["bytes"]["tflite"], applied.said(member))})
                if found["steps"]:
                    said = load_arrays(applied.folder / member / "answers.npz")["validation"]
                    own[name] = (found["after"]["bytes"]["tflite"], said)
    if not options:
        raise _of_no_use(recipes)
    return options


def _leave_out(task: Any, name: str, error: GateError) -> None:
    note(f"{name} is left out: {error}", quiet=task.run.quiet)


def _of_no_use(recipes: Mapping[str, Recipe]) -> GateError:
    return GateError(f"a search must have a recipe that is of use; none of {', '.join(recipes)} is.")


def _swaps(mix: Mix, options: Options, judged: Callable[[Mapping[str, str]], Mix]) -> list[Mix]:
    """All mixes that differ in one member."""
    return [
        judged({**mix.recipes, member: name})
        for member, own in options.items()
        for name in own
        if name != mix.recipes[member]
    ]


def reduced(mix: Mix, options: Options, judged: Callable[[Mapping[str, str]], Mix], budget: int, sign: float) -> Mix:
    """Swaps one member's recipe after the other, each time the one that loses least for a byte, until all fit."""
    while mix.bytes > budget:
        smaller = [other for other in _swaps(mix, options, judged) if other.bytes < mix.bytes]
        if not smaller:
            raise GateError(
                f"the members must fit into {budget:,} bytes; the smallest mix of these recipes has {mix.bytes:,}. "
                "Allow more, or name recipes that make them smaller."
            )
        lost = [(sign * (mix.quality - other.quality)) / (mix.bytes - other.bytes) for other in smaller]
        mix = smaller[int(np.argmin(lost))]
    return mix


def improved(mix: Mix, options: Options, judged: Callable[[Mapping[str, str]], Mix], budget: int, sign: float) -> Mix:
    """Swaps as long as one makes it better within the budget; of equals the smaller one."""
    while True:
        fitting = [other for other in _swaps(mix, options, judged) if other.bytes <= budget]
        best = max(fitting, key=lambda other: (sign * other.quality, -other.bytes), default=mix)
        if (sign * best.quality, -best.bytes) <= (sign * mix.quality, -mix.bytes):
            return mix
        mix = best


def front(mixes: Sequence[Mix], sign: float) -> list[Mix]:
    """Those than which no other is both smaller and better, smallest first."""
    kept: list[Mix] = []
    for mix in sorted(mixes, key=lambda mix: (mix.bytes, -sign * mix.quality)):
        if not kept or sign * mix.quality > sign * kept[-1].quality:
            kept.append(mix)
    return kept


def _of_recipes(
    task: Any, recipes: Mapping[str, Recipe], budget: int, max_drop: float
) -> tuple[dict[str, Any], list[Mix]]:
    metric, reports, mixes = task.experiment.primary, {}, list[Mix]()
    for name, recipe in recipes.items():
        try:
            reports[name] = compress_task(task, name, recipe.model_copy(update={"max_drop": {}}))
        except GateError as error:
            _leave_out(task, name, error)
            continue
        mixes.append(_mix(reports[name], name, "after", metric))
    if not mixes:
        raise _of_no_use(recipes)
    first = _mix(next(iter(reports.values())), ORIGINAL, "before", metric)
    sign = 1.0 if parse_metric(metric, "candidates").higher_is_better else -1.0
    fitting = [mix for mix in mixes if mix.bytes <= budget and sign * (first.quality - mix.quality) <= max_drop]
    if not fitting:
        smallest = min(mix.bytes for mix in mixes)
        raise GateError(
            f"a recipe must fit into {budget:,} bytes and lose at most {max_drop:g} of {metric} on the validation "
            f"rows; none of {', '.join(recipes)} does (the smallest: {smallest:,} bytes). Allow more, or name others."
        )
    best = max(fitting, key=lambda mix: sign * mix.quality)
    return reports[best.recipes["all"]], front([first, *mixes], sign)


def _mix(report: Mapping[str, Any], name: str, when: str, metric: str) -> Mix:
    return Mix({"all": name}, report["cost"][when]["bytes"], report["validation"][when][metric]["value"])
