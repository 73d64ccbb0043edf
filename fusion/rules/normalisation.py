"""Puts the scores of one member on a scale that can be compared with another's; mixes no members.

Every function here treats each member alone, so silencing one never changes what the others say. Silence
travels inside the numbers: a normalised score is NaN where its member does not speak, and `speaking` reads
that back. NaN is only ever selected, never reckoned with: LiteRT's kernels may turn it into a number (exp
does). Only operations that LiteRT has as builtins are used (no IsFinite, no sort over the full axis).

Axes: B batch, S submodel, C class or candidate. Scores float32 `[B, S, C]`, `speaks` bool `[B, S, C]`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fusion.compat import tf

LARGEST = 1e30
"""Scores beyond ±1e30 count as non-finite: such values are other people's masks (float32's minimum), and
differences of them overflow."""

FLAT = 1e-6
"""A range below this share of the largest magnitude is rounding of float32: the scores count as constant."""

Normalisation = Literal["standardise", "rank", "log_rank", "softmax", "none"]
"""How a member's scores over candidates are made comparable."""


def speaking(scores: Any, mask: Any = None) -> Any:
    """Where a member answers: finite scores that the mask lets through, bool `[B, S, C]`.

    Args:
        scores: `[B, S, C]`.
        mask: None, `[B, S]`, or anything broadcastable to `[B, S, C]`; True means it may speak.
    """
    finite = tf.abs(scores) <= LARGEST  # False for NaN and for both infinities
    if mask is None:
        return finite
    mask = tf.cast(mask, tf.bool)
    return tf.logical_and(finite, mask[:, :, tf.newaxis] if mask.shape.rank == 2 else mask)


def speaking_rows(scores: Any, mask: Any = None) -> Any:
    """Classes: a member speaks on a row wholly or not at all, bool `[B, S, 1]`."""
    return tf.reduce_all(speaking(scores, mask), axis=2, keepdims=True)


def speaking_candidates(scores: Any, mask: Any = None) -> Any:
    """Candidates: as `speaking`, but a member that scores all items alike is silent for that user.

    Constant scores are what a member gives that knows nothing, for instance about an empty history;
    their ranks would be the order of item numbers.
    """
    return _voices(scores, mask)[0]


def _voices(scores: Any, mask: Any) -> tuple[Any, tuple[Any, Any]]:
    """`speaking_candidates`, and the range of what was said before those that score all alike were silenced."""
    speaks = speaking(scores, mask)
    low, high = _range(scores, speaks)
    largest = tf.maximum(tf.abs(low), tf.abs(high))
    return tf.logical_and(speaks, high - low > FLAT * largest), (low, high)


def silence(values: Any, speaks: Any) -> Any:
    """`values` with NaN where the member does not speak."""
    return tf.where(speaks, values, np.float32("nan"))


def _range(scores: Any, speaks: Any) -> tuple[Any, Any]:
    """Smallest and largest score of each member, `[B, S, 1]`; high < low where it says nothing."""
    low = tf.reduce_min(tf.where(speaks, scores, LARGEST), axis=2, keepdims=True)
    high = tf.reduce_max(tf.where(speaks, scores, -LARGEST), axis=2, keepdims=True)
    return low, high


def standardise(scores: Any, speaks: Any, bounds: tuple[Any, Any] | None = None) -> Any:
    """Z-scores of each member over the items that it speaks on, NaN elsewhere; population deviation.

    Scores are moved to [0, 1] first, so that squares neither overflow nor vanish in float32.

    Args:
        scores, speaks: `[B, S, C]`.
        bounds: smallest and largest score of each member, `[B, S, 1]`, where they are known already.
    """
    low, high = _range(scores, speaks) if bounds is None else bounds
    varies = high > low
    low, width = tf.where(varies, low, 0.0), tf.where(varies, high - low, 1.0)
    count = tf.reduce_sum(tf.cast(speaks, tf.float32), axis=2, keepdims=True)
    count = tf.maximum(count, 1.0)
    values = (tf.where(speaks, scores, low) - low) / width
    mean = tf.reduce_sum(values, axis=2, keepdims=True) / count
    values = tf.where(speaks, values - mean, 0.0)
    variance = tf.reduce_sum(tf.square(values), axis=2, keepdims=True) / count
    return silence(values / tf.sqrt(tf.where(variance > 0.0, variance, 1.0)), speaks)


def list_length(scores: Any, top_n: int) -> Any:
    """How many places a ranking has: `top_n`, or C where there are fewer candidates; int32 scalar."""
    return tf.minimum(top_n, tf.shape(scores)[2])


def spread_by_rank(scores: Any, speaks: Any, points: Any) -> Any:
    """Gives the r-th best item of each member `points[r]`, others 0, silent ones NaN.

    Equal scores are ranked by item number, the lower first.

    Args:
        scores, speaks: `[B, S, C]`.
        points: float32 `[N]`, N at most C, best place first.
    """
    shape = tf.shape(scores)
    rows, places = shape[0] * shape[1], tf.shape(points)[0]
    sortable = tf.reshape(tf.where(speaks, scores, -2.0 * LARGEST), [rows, shape[2]])
    best = tf.math.top_k(sortable, k=places).indices  # [B·S, N]
    cells = best + tf.range(rows)[:, tf.newaxis] * shape[2]
    given = tf.broadcast_to(points[tf.newaxis, :], [rows, places])
    # Each cell is met once at most: these sums are a scatter, at a fifth of the time that scatter_nd takes.
    spread = tf.math.unsorted_segment_sum(tf.reshape(given, [-1]), tf.reshape(cells, [-1]), rows * shape[2])
    return silence(tf.reshape(spread, shape), speaks)


def ranks(scores: Any, speaks: Any, top_n: int) -> Any:
    """Normalised ranks: 1 for a member's best item, in equal steps to 1/N for its N-th, 0 below."""
    places = list_length(scores, top_n)
    points = 1.0 - tf.cast(tf.range(places), tf.float32) / tf.cast(places, tf.float32)
    return spread_by_rank(scores, speaks, points)


def log_ranks(scores: Any, speaks: Any, top_n: int) -> Any:
    """Normalised logarithms of ranks: 1 for a member's best item, 1 - ln r / ln(N + 1) for its r-th, 0 below N.

    Twice as far down costs the same everywhere, so the first places differ most, as they do for NDCG.
    """
    places = list_length(scores, top_n)
    logarithms = tf.math.log(tf.cast(tf.range(places), tf.float32) + 1.0)
    points = 1.0 - logarithms / tf.math.log(tf.cast(places, tf.float32) + 1.0)
    return spread_by_rank(scores, speaks, points)


def log_softmax(scores: Any, speaks: Any, temperature: Any = 1.0) -> Any:
    """Log-softmax of `scores / temperature` over the entries that a member speaks on, NaN elsewhere."""
    return silence(tf.nn.log_softmax(tf.where(speaks, scores / temperature, -LARGEST), axis=2), speaks)


def exponential(logarithms: Any) -> Any:
    """`exp` where a member speaks, NaN elsewhere."""
    speaks = speaking(logarithms)
    return silence(tf.exp(tf.where(speaks, logarithms, 0.0)), speaks)


def over_candidates(kind: Normalisation, scores: Any, mask: Any, top_n: int, temperature: float) -> Any:
    """The members' scores over the whole catalogue on one scale, `[B, S, C]`, NaN where silent.

    Args:
        kind: `standardise`, `rank`, `log_rank`, `softmax` (log-softmax of z-scores / temperature) or `none`.
        scores, mask: as `speaking` takes them; C must be the whole catalogue, never a part of it.
        top_n: places of a ranking (`rank`, `log_rank`).
        temperature: of the softmax (`softmax`).
    """
    speaks, bounds = _voices(scores, mask)
    if kind == "none":
        return silence(scores, speaks)
    if kind == "rank":
        return ranks(scores, speaks, top_n)
    if kind == "log_rank":
        return log_ranks(scores, speaks, top_n)
    standardised = standardise(scores, speaks, bounds)
    return standardised if kind == "standardise" else log_softmax(standardised, speaks, temperature)
