"""What rules read beside scores, on a scale of their own: standardised by the rows that the rule is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion.compat import tf
from fusion.types import Context


def counted(values: Any, weights: np.ndarray | None = None) -> np.ndarray:
    """The finite ones of the values `[N, 1]` or `[N, K]`, float64 `[n]`, less the padding that `weights` `[N, K]` tells
    by 0."""
    values = np.asarray(values, np.float64)
    if weights is not None and values.shape == weights.shape:
        values = values[weights > 0]
    return values[np.isfinite(values)]


def fit_scale(context: Context, names: Sequence[str], weights: np.ndarray | None = None) -> np.ndarray:
    """Mean and deviation of each number over the rows, NaN left out, float32 `[X, 2]`; a constant has deviation 1.

    Args:
        context: `[N, 1]` or `[N, K]` by name.
        weights: `[N, K]`; entries of weight 0 are padding and do not count.
    """
    scale = np.tile(np.array([0.0, 1.0], np.float32), (len(names), 1))
    for row, name in zip(scale, names, strict=True):
        values = counted(context[name], weights)
        if values.size:
            deviation = values.std()
            row[:] = values.mean(), deviation if deviation > 1e-6 * max(1.0, abs(values.mean())) else 1.0
    return scale


def standardised(context: Context, names: Sequence[str], scale: Any, shape: Any) -> Any:
    """The numbers as float32 `[B, X, C]`: less their mean, over their deviation; unknown ones at the mean, 0.

    Args:
        context: by name, each broadcastable to `[B, C]`.
        scale: `[X, 2]` of `fit_scale`.
        shape: `[B, C]` as a tensor of two numbers.
    """
    columns = []
    for position, name in enumerate(names):
        values = tf.cast(tf.convert_to_tensor(context[name]), tf.float32)
        known = tf.abs(values) < np.float32(1e30)  # False for NaN; LiteRT has no IsNan
        values = (tf.where(known, values, scale[position, 0]) - scale[position, 0]) / scale[position, 1]
        columns.append(tf.broadcast_to(values, shape))
    return tf.stack(columns, axis=1)
