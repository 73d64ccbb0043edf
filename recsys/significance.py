"""How sure a figure is: percentile bootstrap over users (or examples), single and paired.

Users are drawn with replacement, never single interactions: a user's rows are not independent of each other.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 15; for retrieval
Sakai, Evaluating evaluation metrics based on the bootstrap, SIGIR 2006.
"""

from __future__ import annotations

import functools
from typing import TypedDict

import numpy as np

from fusion.errors import ConfigError, DataError

_DRAWS_AT_ONCE = 1 << 22
"""Drawn indices held in memory at a time (32 MB)."""
_DRAWS_KEPT = 1 << 25
"""Up to so many draws are kept for the next figure of as many users (256 MB)."""


class Interval(TypedDict):
    """A mean with its confidence interval over `n` users; all None where nothing was defined."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Difference(TypedDict):
    """A mean difference with its confidence interval over `n` users; all None where nothing was defined."""

    difference: float | None
    low: float | None
    high: float | None
    n: int


def interval(values: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of `values` float `[U]` with a bootstrap percentile interval.

    NaN (undefined for that user) is left out and not counted in `n`. One user gives an interval of no width.
    The same seed and n draw the same users, so figures of one test set move together.

    Raises ConfigError when `samples` < 1 or `level` is not between 0 and 1.

    >>> interval(np.array([0.0, 1.0, np.nan, 1.0, 0.0]))["n"]
    4
    """
    if samples < 1 or not 0 < level < 1:
        raise ConfigError(
            f"a bootstrap needs samples >= 1 and 0 < level < 1; received samples={samples}, level={level}."
        )
    values = np.asarray(values, np.float64).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "low": None, "high": None, "n": 0}
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(_resampled_means(values, samples, seed), [tail, 100.0 - tail])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def paired_difference(
    a: np.ndarray, b: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> Difference:
    """The mean of a - b over the same users, float `[U]` each and in the same order, with its interval.

    Users for whom either is NaN are left out. The pairing removes what makes users easy or hard, so this is
    narrower, and the right test, when two intervals of the same users overlap.

    Raises DataError when the shapes differ.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise DataError(f"a paired comparison needs the same users on both sides; received {a.shape} and {b.shape}.")
    found = interval(a - b, samples, seed, level)
    return {"difference": found["value"], "low": found["low"], "high": found["high"], "n": found["n"]}


def point(value: float, n: int) -> Interval:
    """A figure that is one number by nature (coverage, macro AUC), as an interval without bounds."""
    return {"value": None if np.isnan(value) else float(value), "low": None, "high": None, "n": n}


def _resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means of `samples` draws of n users with replacement, float64 `[samples]`, memory bounded."""
    users = len(values)
    if samples * users <= _DRAWS_KEPT:
        return _shares(users, samples, seed) @ values
    random = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // users)
    parts = [min(step, samples - start) for start in range(0, samples, step)]
    return np.concatenate([values[random.integers(users, size=(count, users))].mean(axis=1) for count in parts])


@functools.lru_cache(maxsize=2)
def _shares(users: int, samples: int, seed: int) -> np.ndarray:
    """How much each user counts in the mean of each draw, float64 `[samples, users]`: many figures of the same users
    are resampled alike, and each is then one product."""
    random = np.random.default_rng(seed)
    shares = np.empty((samples, users))
    for row in shares:
        row[:] = np.bincount(random.integers(users, size=users), minlength=users)
    return shares / users
