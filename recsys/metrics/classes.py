"""Metrics of classification: labels int `[N]` against probabilities `[N, C]`.

`accuracy` and `log_loss` are one float64 value per example (their mean is the metric, and they can be
bootstrapped); `auc`, `rmse` and `ece` are one number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from fusion.errors import DataError
from recsys.metrics.definition import metric

_SMALLEST = 1e-15
"""Probabilities are clipped here before the logarithm: a certain mistake costs 34.5 nats, not infinity."""

_BINS = 15
"""Of equal width, for the calibration error: what published figures use (Guo et al. 2017)."""


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of fitting shapes and ranges; a DataError says what does not fit."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise DataError(
            f"labels must be of shape [N] and probabilities of shape [N, C]; received {labels.shape} "
            f"and {probabilities.shape}."
        )
    classes = probabilities.shape[1]
    if len(labels) and not (0 <= labels.min() and labels.max() < classes):
        raise DataError(f"labels must lie in 0..{classes - 1}; received {labels.min()} to {labels.max()}.")
    if not np.allclose(probabilities.sum(axis=1), 1.0, atol=1e-3) or np.any(probabilities < 0):
        raise DataError("probabilities must be at least 0 and sum to 1 in every row; received rows that do not.")
    return labels, probabilities


@metric("class")
def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Accuracy: whether the most probable class is the right one, float64 `[N]`.

    Formula: 1 if argmax_c p(c) is the label, else 0. Range 0 or 1, more is better. Ties: the lowest class
    number is taken. No examples: an empty array.
    Source: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning (2009), section 7.2 (0-1 loss).
    """
    labels, probabilities = _checked(labels, probabilities)
    if not len(labels):
        return np.zeros(0)
    right: np.ndarray = probabilities.argmax(axis=1) == labels
    return right.astype(np.float64)


@metric("class", higher_is_better=False)
def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Log-loss: the surprise at the right class in nats, float64 `[N]`.

    Formula: -ln max(p(label), 1e-15). Range 0 to 34.54, less is better; ln C by chance. Ties play no part.
    No examples: an empty array.
    Source: Bishop, Pattern Recognition and Machine Learning (2006), equation 4.108 (cross-entropy).
    """
    labels, probabilities = _checked(labels, probabilities)
    losses: np.ndarray = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], _SMALLEST))
    return losses


@metric("class")
def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Macro one-vs-rest AUC: the plain mean over classes of the area under each one's ROC curve.

    Formula: mean_c P(p_c(an example of c) > p_c(another one)). Range 0 to 1, 0.5 by chance, more is better.
    Ties: 1/2. Classes of which there are no examples, or nothing else, are left out.
    No examples: NaN, as with one class alone.
    Source: Provost and Domingos, Well-trained PETs, 2000; computed by scikit-learn's `roc_auc_score`.
    """
    labels, probabilities = _checked(labels, probabilities)
    present = np.unique(labels)
    if len(present) < 2:
        return float("nan")
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in present]))


@metric("class", higher_is_better=False)
def rmse(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Root mean squared error of ratings, or of probabilities against the one-hot label.

    Formula: predictions `[N]` are ratings, sqrt(mean_n (y_n - t_n)^2), targets float `[N]`; predictions `[N,
    C]` are probabilities, sqrt(mean over n and c of (p_nc - [c is the label of n])^2), targets int `[N]`
    (the square is the Brier score over C). Range 0 up, and to sqrt(2 / C) for probabilities; less is better.
    Ties play no part. No examples: NaN.
    Source: Brier, Verification of forecasts expressed in terms of probability, Monthly Weather Review 78(1),
    1950.
    """
    if not len(targets):
        return float("nan")
    if np.ndim(predictions) == 1:
        if np.shape(targets) != np.shape(predictions):
            raise DataError(
                "ratings and their predictions must be of one shape; received "
                f"{np.shape(targets)} and {np.shape(predictions)}."
            )
        errors = np.asarray(predictions, np.float64) - np.asarray(targets, np.float64)
    else:
        labels, errors = _checked(targets, predictions)
        errors = errors.copy()
        errors[np.arange(len(labels)), labels] -= 1.0
    return float(np.sqrt(np.mean(errors**2)))


class Reliability(NamedTuple):
    """How often answers of about one confidence are right: float64 `[bins]` each, bins without answers left out.

    Attributes:
        confidence: mean probability of the answers (the most probable classes) in the bin.
        accuracy: share of them that are right.
        share: share of all answers that lie in the bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, see `ece`; NaN without answers."""
        return float(self.share @ np.abs(self.accuracy - self.confidence)) if self.share.size else float("nan")


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> Reliability:
    """The reliability diagram of labels `[N]` and probabilities `[N, C]`, 15 bins of equal width (Niculescu-Mizil &
    Caruana 2005; of the most probable class as in Guo et al. 2017)."""
    labels, probabilities = _checked(labels, probabilities)
    confidence = probabilities.max(axis=1, initial=0.0)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    counts, sums, hits = (np.bincount(bins, values, _BINS) for values in (None, confidence, right))
    filled = counts > 0
    counts, sums, hits = counts[filled], sums[filled], hits[filled]
    return Reliability(sums / counts, hits / counts, counts / max(len(labels), 1))


@metric("class", higher_is_better=False)
def ece(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error: how far the confidence of answers is from how often they are right.

    Formula: sum over 15 bins of equal width of max_c p(c), of (examples in the bin / N) * |accuracy in the bin -
    mean of max_c p(c) in the bin|. Range 0 to 1, less is better. Ties: the lowest class number is the answer.
    With few examples it is too large, because bins differ by chance. No examples: NaN.
    Source: Naeini, Cooper, Hauskrecht, Obtaining well calibrated probabilities using Bayesian binning, AAAI 2015;
    bins as in Guo, Pleiss, Sun, Weinberger, On calibration of modern neural networks, ICML 2017, equation 5.
    """
    return reliability(labels, probabilities).error
