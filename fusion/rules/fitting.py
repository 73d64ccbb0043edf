"""What learned rules are fitted on, their two losses, and the minimiser; knows no rule.

Rows on which no member speaks, and lists that teach nothing, are left out here, once for all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, minimize

from fusion.compat import tf
from fusion.errors import DataError
from fusion.rules.normalisation import LARGEST
from fusion.types import Context, derive_seed

BLOCK = 4_000_000
"""Numbers of the largest array that are cast to float64 at a time."""


@dataclass(frozen=True)
class ClassRows:
    """Out-of-fold answers of a classifier's members.

    Attributes:
        logits: float32 `[N, S, C]`, 0 where silent.
        speaks: bool `[N, S]`, at least one in each row.
        labels: int64 `[N]`.
        weights: float64 `[N]` of the rows.
        context: float32 `[N, 1]` by name.
    """

    logits: np.ndarray
    speaks: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    context: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateLists:
    """Out-of-fold answers over sampled candidates, one list a user.

    Attributes:
        features: float32 `[N, F·S, K]` as the rule normalises them, NaN where silent.
        speaks: bool `[N, S, K]`.
        positives: bool `[N, K]`, at least one in each list on which a member speaks.
        weights: float64 `[N, K]`: how many candidates of the catalogue each one stands for.
        context: float32 `[N, 1]` or `[N, K]` by name.
    """

    features: np.ndarray
    speaks: np.ndarray
    positives: np.ndarray
    weights: np.ndarray
    context: dict[str, np.ndarray] = field(default_factory=dict)


def class_rows(
    logits: np.ndarray,
    mask: np.ndarray | None,
    labels: np.ndarray,
    weights: np.ndarray | None,
    context: Context | None = None,
) -> ClassRows:
    """Checks and cuts what `Rule.fit` takes over classes; DataError when shapes or labels do not fit."""
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    row_weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    if logits.ndim != 3 or labels.shape != logits.shape[:1] or row_weights.shape != labels.shape:
        raise DataError(
            "a rule over classes is fitted on logits [N, S, C], labels [N] and weights [N]; received "
            f"{logits.shape}, {labels.shape} and {row_weights.shape}. Pass one label a row."
        )
    if len(labels) and not (0 <= labels.min() and labels.max() < logits.shape[2]):
        raise DataError(
            f"labels must be class numbers from 0 to {logits.shape[2] - 1}; received {labels.min()} to "
            f"{labels.max()}. Number the classes in the order of the logits."
        )
    speaks: np.ndarray = np.asarray(_speaking(logits, mask).all(axis=2))
    kept = speaks.any(axis=1) & (row_weights > 0)
    if not kept.any():
        raise DataError(
            f"a rule is fitted on rows that a member answers; received {len(labels)} rows and no such row. "
            "Use calibration: none with a rule that is not learned, or more data."
        )
    logits, speaks = logits[kept], speaks[kept]
    logits = np.where(speaks[:, :, None], logits, np.float32(0))
    return ClassRows(logits, speaks, labels[kept].astype(np.int64), row_weights[kept], _rows_of(context, kept))


def candidate_lists(
    features: np.ndarray,
    mask: np.ndarray | None,
    positives: np.ndarray,
    weights: np.ndarray | None,
    members: int,
    context: Context | None = None,
) -> CandidateLists:
    """Checks and cuts what `Rule.fit` takes over candidates; DataError when no list can teach anything."""
    features, positives = np.asarray(features, np.float32), np.asarray(positives, bool)
    importance = np.ones(positives.shape) if weights is None else np.asarray(weights, np.float64)
    expected = (features.shape[0], features.shape[-1])
    if features.ndim != 3 or positives.shape != expected or importance.shape != expected:
        raise DataError(
            "a rule over candidates is fitted on features [N, F*S, K], labels [N, K] and weights [N, K]; "
            f"received {features.shape}, {positives.shape} and {importance.shape}. Cut all to the same K."
        )
    speaks = _speaking(features[:, :members], mask)
    counted = speaks.any(axis=1) & (importance > 0)
    kept = (counted & positives).any(axis=1) & (counted & ~positives).any(axis=1)
    if not kept.any():
        raise DataError(
            "a rule is fitted on lists that hold a positive and another candidate which members score; "
            f"received {len(features)} lists and no such list. Use a rule that is not learned, or more data."
        )
    return CandidateLists(
        features[kept], speaks[kept], (positives & counted)[kept], importance[kept], _rows_of(context, kept)
    )


def _rows_of(context: Context | None, kept: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, np.float32)[kept] for name, values in (context or {}).items()}


def _speaking(scores: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    finite: np.ndarray = np.asarray(np.abs(scores) <= LARGEST)
    if mask is None:
        return finite
    mask = np.asarray(mask, bool)
    return np.logical_and(finite, mask[:, :, None] if mask.ndim == 2 else mask)


def drop_members(spoken: np.ndarray, members: Sequence[str], chance: float, seed: int) -> np.ndarray:
    """`spoken`, bool `[N, S]`, with members silenced at random, each with this chance, but never all of a row.

    A rule that is fitted on it has met every subset of its members.
    """
    # Drawn by name, so that the order of members does not matter.
    draws = [np.random.default_rng(derive_seed(seed, "member dropout", name)).random(len(spoken)) for name in members]
    kept = spoken & (np.stack(draws, axis=1) >= chance)
    return np.where(kept.any(axis=1, keepdims=True), kept, spoken)


def class_loss(fused: Any, labels: Any) -> Any:
    """Cross-entropy `[N]` of `softmax(fused)`, fused `[N, C]`."""
    picked = tf.gather(fused, labels, batch_dims=1)
    return tf.reduce_logsumexp(fused, axis=1) - picked


def list_wise_loss(fused: Any, voiced: Any, positives: Any, weights: Any) -> Any:
    """Softmax cross-entropy `[N]` of each list, the positives of a list sharing one unit of mass.

    A sampled candidate with weight q stands for q candidates: it enters the partition sum as q·exp(score)
    (ListNet, Cao et al. 2007, with self-normalised importance sampling).

    Args:
        fused: `[N, K]`; voiced: bool, where a member speaks; positives: bool; weights: q ≥ 0; all `[N, K]`.
    """
    counted = tf.logical_and(voiced, weights > 0)
    logits = tf.where(counted, fused + tf.math.log(tf.where(counted, weights, 1.0)), -LARGEST)
    share = tf.cast(tf.logical_and(positives, counted), fused.dtype)
    share /= tf.maximum(tf.reduce_sum(share, axis=1, keepdims=True), 1.0)
    # A list whose positives are all silenced teaches nothing: its shares are zero, and so is its loss.
    taught = tf.reduce_sum(share, axis=1)
    return taught * tf.reduce_logsumexp(logits, axis=1) - tf.reduce_sum(share * fused, axis=1)


class RowLoss:
    """A loss of parameters over rows: traced once, summed block by block in float64, with its gradient.

    Args:
        loss: `loss(parameters [P], *rows of a block) -> [n]`; floats of the rows arrive as float64.
        rows: arrays with the same leading axis, of which only shapes and dtypes are taken here.
    """

    def __init__(self, loss: Callable[..., Any], rows: Sequence[np.ndarray]) -> None:
        def of_block(parameters: Any, *block: Any) -> Any:
            block = tuple(tf.cast(part, tf.float64) if part.dtype.is_floating else part for part in block)
            with tf.GradientTape() as tape:
                tape.watch(parameters)
                total = tf.reduce_sum(loss(parameters, *block))
            return total, tape.gradient(total, parameters, unconnected_gradients="zero")

        signature = [tf.TensorSpec([None, *array.shape[1:]], array.dtype) for array in rows]
        parameters = tf.TensorSpec([None], tf.float64)
        self._of_block = tf.function(of_block, input_signature=[parameters, *signature], autograph=False)
        self._block = max(1, BLOCK // max(1, max(array[0].size for array in rows)))

    def mean(self, parameters: np.ndarray, rows: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """The mean loss of the rows and its gradient `[P]`."""
        value, slope, count = 0.0, np.zeros(len(parameters)), len(rows[0])
        for at in range(0, count, self._block):
            block = [array[at : at + self._block] for array in rows]
            total, gradient = self._of_block(tf.constant(parameters, tf.float64), *block)
            value += float(total)
            slope += gradient.numpy()
        return value / count, slope / count


@dataclass(frozen=True)
class Minimum:
    """Where a loss is least.

    Attributes:
        parameters: all of them, `[P]`.
        iterations: how many were taken.
        history: what was minimised, at the start and after each iteration.
    """

    parameters: np.ndarray
    iterations: int
    history: list[float] = field(default_factory=list)


Penalty = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Of the free parameters `[d]`: the value and its gradient `[d]`."""


def minimise(
    loss: RowLoss,
    rows: Sequence[np.ndarray],
    start: np.ndarray,
    directions: np.ndarray,
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
    penalty: Penalty | None = None,
    watch: Callable[[np.ndarray], None] | None = None,
) -> Minimum:
    """Minimises `mean loss + penalty / N` over `start + t @ directions` by L-BFGS-B with exact gradients.

    Args:
        start: `[P]`, where t = 0.
        directions: `[d, P]`, what may move; rows of the identity free single parameters.
        bounds: `(low, high)` of each t.
        penalty: of t; counted once whatever the number of rows is.
        watch: called with all parameters after each iteration; StopIteration ends the search there.
    """
    count = len(rows[0])
    history: list[float] = []

    def penalised(steps: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss.mean(start + steps @ directions, rows)
        added, slope = (0.0, 0.0) if penalty is None else penalty(steps)
        return value + added / count, directions @ gradient + slope / count

    def remember(intermediate_result: OptimizeResult) -> None:
        history.append(float(intermediate_result.fun))
        if watch is not None:
            watch(start + intermediate_result.x @ directions)

    history.append(float(penalised(np.zeros(len(directions)))[0]))
    best = minimize(
        penalised,
        np.zeros(len(directions)),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        callback=remember,
        options={"maxiter": 300, "ftol": 1e-12, "gtol": 1e-8},
    )
    return Minimum(start + best.x @ directions, int(best.nit), history)
