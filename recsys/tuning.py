"""Chooses settings of a member on validation: one key after the other, each value fitted and measured.

A coordinate search and not a grid: with keys that hardly interact it finds the same settings with the sum of the
numbers of values instead of their product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.config import Part, merge, parse_part
from fusion.errors import ConfigError

Grid = dict[str, list[Any]]
"""Values to try by key of a member's settings; `a.b` is the key b within a."""


@dataclass(frozen=True)
class Trial:
    """One fit: the key that was varied, its value, and the metric on validation."""

    key: str
    value: Any
    metric: float


def with_setting(part: Part, key: str, value: Any, where: str) -> Part:
    """The part with one setting changed; ConfigError when there is no such key or the value does not fit."""
    nested: Any = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    return parse_part(part.registry, merge(part.dump(), nested), where)


def check_grid(name: str, part: Part, grid: Grid) -> None:
    """Raises ConfigError, naming the key, for what cannot be tried."""
    for key, values in grid.items():
        if not values:
            raise ConfigError(f"tuning.{name}.{key} must list at least one value; received none.")
        for value in values:
            with_setting(part, key, value, f"tuning.{name}")


def tune(
    name: str, part: Part, grid: Grid, measure: Callable[[Part], float], higher_is_better: bool
) -> tuple[Part, list[Trial]]:
    """The best part on the path through the keys, in their order, and every trial.

    The first value of a key is what the later keys are tried with if nothing is better; of equals the first stays.
    """
    sign = 1.0 if higher_is_better else -1.0
    trials: list[Trial] = []
    measured: dict[str, float] = {}
    for key, values in grid.items():
        tried = [with_setting(part, key, value, f"tuning.{name}") for value in values]
        scores = []
        for value, candidate in zip(values, tried, strict=True):
            identity = str(candidate.dump())
            if identity not in measured:  # the best of the last key comes by again
                measured[identity] = measure(candidate)
            scores.append(measured[identity])
            trials.append(Trial(key, value, measured[identity]))
        ordered = [-np.inf if np.isnan(score) else sign * score for score in scores]
        part = tried[int(np.argmax(ordered))]
    return part, trials
