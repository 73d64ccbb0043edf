"""Calibration: what turns a member's logits into probabilities that come true as often as they say.

Fitted on rows that the member was not fitted on. Every method refines one temperature, and every fit is done as if
`PSEUDO_ROWS` more rows had been seen on which the member was right about itself: a member that always answered
rightly on twenty rows is not sure of everything, and with plenty of rows the imagined ones do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from scipy.optimize import isotonic_regression, minimize, minimize_scalar
from scipy.special import log_softmax

from fusion.compat import tf

Method = Literal["none", "temperature", "platt", "isotonic"]
CALIBRATION_STATE = ("temperatures", "platt_biases", "isotonic_knots")
"""Names of the numbers that the methods leave in the state of a rule, each `[S, ...]`."""
"""How members over classes are calibrated."""

PSEUDO_ROWS = 10.0
"""How many rows, on which the member is right about itself, a fit imagines beside the real ones."""

TEMPERATURES = (1e-2, 1e2)
"""Where a temperature is looked for."""

KNOTS = 16
"""Corners of an isotonic curve."""

BIAS_PULL = 10.0
"""Strength of the pull of biases to 0, on the loss summed over rows: it fades as rows grow."""

STEP = 1e-3
"""Logarithms of probabilities closer than this are one point of an isotonic curve, so that no piece of it is steeper
than float32 can follow."""

CELLS = 20_000
"""Points of an isotonic curve: probabilities below exp(-20) are one."""


class Calibration:
    """Leaves logits as they are: the method `none`, and the base of the others.

    The numbers of all members are arrays whose first axis is S; they are part of `Rule.state`.
    """

    def identity(self, members: int, classes: int | None) -> dict[str, np.ndarray]:
        """The numbers, float32 with leading axis S, that leave S members as they are.

        While `classes` is not known (None), those that have an axis C are left out.
        """
        return {}

    def classes(self, state: Mapping[str, np.ndarray]) -> int | None:
        """The number of classes that a state is of, None where no number tells."""
        return None

    def fit(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of one member (without the axis S), from at least one row.

        Args:
            logits: float `[N, C]` of rows that the member was not fitted on.
            labels: int `[N]`.
            weights: float64 `[N]` of the rows, > 0.
        """
        return {}

    def scores(self, logits: Any, numbers: Mapping[str, Any]) -> Any:
        """Calibrated scores `[B, S, C]` of finite logits: log-probabilities up to a constant of each row and member."""
        return logits


class Temperature(Calibration):
    """One temperature: `softmax(logits / T)` (Guo et al. 2017, section 4.2). The order of classes stays."""

    def identity(self, members: int, classes: int | None) -> dict[str, np.ndarray]:
        """As `Calibration.identity`: `temperatures` `[S]`."""
        return {"temperatures": np.ones(members, np.float32)}

    def fit(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """As `Calibration.fit`."""
        return {"temperatures": np.array(fit_temperature(logits, labels, weights))}

    def scores(self, logits: Any, numbers: Mapping[str, Any]) -> Any:
        """As `Calibration.scores`."""
        return logits / numbers["temperatures"][:, tf.newaxis]


class Platt(Temperature):
    """One temperature and a bias for each class: `softmax(logits / T + b)`.

    That is vector scaling (Guo et al. 2017, section 4.2) with one scale in place of C, known as bias-corrected
    temperature scaling (Alexandari et al. 2020), and for two classes the sigmoid of Platt (1999). A scale for each
    class, as in a logistic regression for each, would need C times the rows and no longer be a softmax.
    The biases may change the order of classes: they lift a class that the member names too rarely.
    """

    def identity(self, members: int, classes: int | None) -> dict[str, np.ndarray]:
        """As `Calibration.identity`: `temperatures` `[S]` and `platt_biases` `[S, C]`."""
        biases = {} if classes is None else {"platt_biases": np.zeros((members, classes), np.float32)}
        return {**super().identity(members, classes), **biases}

    def classes(self, state: Mapping[str, np.ndarray]) -> int | None:
        """As `Calibration.classes`."""
        biases = np.asarray(state.get("platt_biases", 0.0))
        return biases.shape[1] if biases.ndim == 2 else None

    def fit(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """As `Calibration.fit`. Biases are pulled to 0 (L2): rows that are surely right tell nothing of them."""
        logits, temperature = logits.astype(np.float64), fit_temperature(logits, labels, weights)
        targets = _targets(log_softmax(logits, axis=1), labels, weights)
        cooled = log_softmax(logits / temperature, axis=1)

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            scale, biases = np.exp(parameters[0]), parameters[1:]
            logs = log_softmax(scale * cooled + biases, axis=1)
            errors = weights[:, None] * (np.exp(logs) - targets)
            value = BIAS_PULL / 2 * float(biases @ biases) - float(weights @ (targets * logs).sum(axis=1))
            slope = np.append(scale * (errors * cooled).sum(), errors.sum(axis=0) + BIAS_PULL * biases)
            return value / weights.sum(), slope / weights.sum()

        best = minimize(loss, np.zeros(1 + logits.shape[1]), jac=True, method="L-BFGS-B").x
        biases = best[1:] - best[1:].mean()
        return {"temperatures": np.array(temperature / np.exp(best[0])), "platt_biases": biases}

    def scores(self, logits: Any, numbers: Mapping[str, Any]) -> Any:
        """As `Calibration.scores`."""
        return super().scores(logits, numbers) + numbers["platt_biases"]


class Isotonic(Temperature):
    """A rising curve of probabilities: how often a class that is given p is the right one, then normalised.

    One curve for all classes of a member, fitted to all pairs of row and class by isotonic regression (Zadrozny &
    Elkan 2002, with the pairs pooled as in Zhang et al. 2020). A curve for each class has too few rows where there
    are many classes, and may swap classes; one rising curve leaves their order as it is. The curve is drawn over
    logarithms, with straight lines between at most `KNOTS` corners and slope 1 beyond, so a probability of 0 never
    comes out. It refines a temperature, which brings the certain answers of an overconfident member apart.
    """

    def identity(self, members: int, classes: int | None) -> dict[str, np.ndarray]:
        """As `Calibration.identity`: `temperatures` `[S]` and `isotonic_knots` `[S, 2, KNOTS]`, see `fit_curve`."""
        line = np.arange(1 - KNOTS, 1, dtype=np.float32)
        return {**super().identity(members, classes), "isotonic_knots": np.tile(line, (members, 2, 1))}

    def fit(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """As `Calibration.fit`."""
        temperature = fit_temperature(logits, labels, weights)
        logs = log_softmax(logits.astype(np.float64) / temperature, axis=1)
        return {"temperatures": np.array(temperature), "isotonic_knots": fit_curve(logs, labels, weights)}

    def scores(self, logits: Any, numbers: Mapping[str, Any]) -> Any:
        """As `Calibration.scores`."""
        logs = tf.nn.log_softmax(super().scores(logits, numbers), axis=2)
        return curve(logs, numbers["isotonic_knots"])


CALIBRATIONS: Mapping[Method, Calibration] = {
    "none": Calibration(),
    "temperature": Temperature(),
    "platt": Platt(),
    "isotonic": Isotonic(),
}
"""The methods by the name that the key `calibration` of a rule takes."""


def fit_temperature(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The temperature T > 0 that minimises the log-loss of `softmax(logits / T)` (Guo et al. 2017).

    Args:
        logits: `[N, C]` of rows that the member was not fitted on, at least one.
        labels: int `[N]`.
        weights: `[N]` of the rows; None means equal.

    Returns:
        T within `TEMPERATURES`, pulled to 1 by `PSEUDO_ROWS`.
    """
    logits = logits.astype(np.float64)
    weights = np.ones(len(labels)) if weights is None else weights
    targets = _targets(log_softmax(logits, axis=1), labels, weights)

    def loss(log_temperature: float) -> float:
        return -float(weights @ (targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(axis=1))

    low, high = np.log(TEMPERATURES)
    best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(best.x))


def _targets(logs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What to fit to, `[N, C]`: the right class, mixed with the member's own probabilities exp(logs) as if those had
    been right on `PSEUDO_ROWS` more rows."""
    share = PSEUDO_ROWS / (weights.sum() + PSEUDO_ROWS)
    targets = share * np.exp(logs)
    targets[np.arange(len(labels)), labels] += 1.0 - share
    return targets


def fit_curve(logs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The isotonic curve of one member, over logarithms.

    Pairs of row and class are put into bins by what they claim, each so wide that it claims to be right, and to be
    wrong, about `PSEUDO_ROWS` times: with fewer there is nothing to tell. Then the bins are made to rise.

    Args:
        logs: log-probabilities float64 `[N, C]`.
        labels: int `[N]`.
        weights: float64 `[N]` of the rows.

    Returns:
        float64 `[2, KNOTS]`, both rows rising: the logarithms of what is claimed, and of how often it comes true.
    """
    cells = np.minimum(np.rint(-logs / STEP), CELLS).astype(np.int64)
    labelled = cells[np.arange(len(labels)), labels]
    probabilities = np.exp(-STEP * np.arange(CELLS + 1))
    share = PSEUDO_ROWS / (weights.sum() + PSEUDO_ROWS)
    counts = np.bincount(cells.ravel(), np.repeat(weights, cells.shape[1]), CELLS + 1)  # a pair counts as its row
    claimed = counts * probabilities
    right = share * claimed + (1.0 - share) * np.bincount(labelled, weights, CELLS + 1)

    told = np.cumsum((counts * np.minimum(probabilities, 1.0 - probabilities))[::-1])[::-1] / PSEUDO_ROWS
    bins = np.minimum(told, told[0] - 1.0).clip(0.0).astype(np.int64)  # the last one takes what is left over
    sums = np.stack([np.bincount(bins, values) for values in (counts, claimed, right)])
    sums = sums[:, sums[0] > 0]
    blocks = isotonic_regression(sums[2] / sums[0], weights=sums[0]).blocks[:-1]
    counts, claimed, right = np.add.reduceat(sums, blocks, axis=1)
    return _corners(np.log(claimed / counts), np.log(right / counts), claimed)


def _corners(at: np.ndarray, values: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """The `KNOTS` points `[2, KNOTS]` that keep a line nearest to all points; fewer are continued with slope 1.

    Starting from both ends, the point is added that lies farthest from the line, weighed by its mass.
    """
    kept = np.unique([0, len(at) - 1])
    while len(kept) < min(KNOTS, len(at)):
        gaps = mass * np.abs(values - np.interp(at, at[kept], values[kept]))
        gaps[kept] = -1.0
        kept = np.sort(np.append(kept, gaps.argmax()))
    further = np.arange(1.0, KNOTS + 1 - len(kept))
    return np.stack([np.append(line[kept], line[kept][-1] + further) for line in (at, values)])


def curve(logs: Any, knots: Any) -> Any:
    """The curves of `fit_curve` at log-probabilities `[B, S, C]`; knots `[S, 2, KNOTS]`.

    A sum of ramps, each from 0 to the rise between two corners: no lookup, and it rises whatever is rounded.
    """
    at, values = knots[:, 0], knots[:, 1]
    result = values[:, :1] + tf.minimum(logs - at[:, :1], 0.0) + tf.maximum(logs - at[:, -1:], 0.0)
    for left in range(KNOTS - 1):
        right = left + 1
        width, rise = (
            at[:, left + 1 : right + 1] - at[:, left:right],
            values[:, right : right + 1] - values[:, left:right],
        )
        result += rise * tf.clip_by_value((logs - at[:, left:right]) / width, 0.0, 1.0)
    return result
