"""Greedy ensemble selection: few members, each as often as it helps, found on rows that they were not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.rules.base import weighted_mean
from fusion.rules.fitting import CandidateLists, ClassRows
from fusion.rules.normalisation import Normalisation, speaking
from fusion.rules.scaled import ScaledRule, ScaledSettings
from fusion.types import Context, Over, derive_seed

Goodness = Callable[[tuple[int, ...]], np.ndarray]
"""How often each member is in the ensemble -> how good that ensemble is on every row, `[N]`, higher is better."""


@keras.saving.register_keras_serializable("fusion")
class Greedy(ScaledRule):
    """Forward selection with replacement (Caruana et al. 2004, "Ensemble selection from libraries of models").

    Starting from nothing, the member is added, again if need be, whose addition helps the mean most: NDCG@k of
    lists of candidates, the log-likelihood of classes. Of the path the prefix is kept that is best on rows that it was
    not chosen on, or, by the key `standard_errors`, the shortest one that is not clearly worse. The whole is repeated
    on bags of rows; a member's weight is its mean share over the bags, and shares below `least` are dropped. So weak
    members leave instead of being given small weights, and what stays is close to an equal mean.

    For a row on which no chosen member says anything (somebody without a history), the dropped ones answer in
    equal parts.
    """

    learned = True
    differentiable = False
    falls_back = True

    class Config(ScaledSettings):
        """Settings of the selection."""

        normalisation: Normalisation = "standardise"
        """Candidates: the scale on which members are averaged: standardise, rank, log_rank, softmax or none."""
        k: int = Field(20, ge=1, le=1000)
        """Candidates: the length of the lists whose NDCG counts."""
        steps: int = Field(12, ge=1, le=100)
        """How many members are added at most, counting repeats."""
        bags: int = Field(10, ge=1, le=100)
        """How often the selection is repeated, each time on half of the rows and judged on the other half."""
        standard_errors: float = Field(1.0, ge=0, le=5, allow_inf_nan=False)
        """The shortest prefix is kept that is at most so many standard errors worse than the best one; 0: the best."""
        least: float = Field(0.08, ge=0, lt=1)
        """A member with a smaller share of the whole is dropped; the best one never is."""
        max_rows: int = Field(5000, ge=10)
        """Rows that the selection looks at; more are drawn from at random."""

    config: Config

    def __init__(self, config: Config, members: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(config, members, over, **kwargs)
        self._number("weights", np.full(len(self.members), 1.0 / len(self.members), np.float32))

    def _shares(self) -> np.ndarray:
        return self._numbers["weights"].numpy()

    def _learns(self) -> bool:
        return True

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """The mean over the chosen members, or over all where no chosen one speaks on any entry of a row."""
        speaks = speaking(features, mask)
        terms, voiced = weighted_mean(features, speaks, self._numbers["weights"])
        anyone, heard = weighted_mean(features, speaks, tf.ones([len(self.members)]))
        answered = tf.reduce_any(voiced, axis=1, keepdims=True)
        terms = tf.where(answered[:, tf.newaxis], terms, anyone)
        return terms, self._voiceless(tf.where(answered, voiced, heard), tf.shape(features)[2])

    def _fit_classes(self, rows: ClassRows, seed: int) -> dict[str, Any]:
        self._fit_calibration(rows)
        before = self._log_loss(rows)
        calibrated = self._log_probabilities(tf.constant(rows.logits), tf.constant(rows.speaks)).numpy()
        picked = np.take_along_axis(calibrated, rows.labels[:, None, None], axis=2)[:, :, 0]
        likely = np.exp(np.where(rows.speaks, picked, -np.inf).astype(np.float64))

        def goodness(counts: tuple[int, ...]) -> np.ndarray:
            share = np.asarray(counts) * rows.speaks
            mean = (share * likely).sum(axis=1) / np.maximum(share.sum(axis=1), 1)
            return rows.weights * np.log(np.maximum(mean, 1e-15))

        report = self._select(goodness, len(rows.labels), seed)
        return {"loss_before": before, "loss_after": self._log_loss(rows), **report}

    def _fit_candidates(self, lists: CandidateLists, seed: int) -> dict[str, Any]:
        random = np.random.default_rng(derive_seed(seed, "rows"))
        rows = np.arange(len(lists.positives))
        if len(rows) > self.config.max_rows:
            rows = np.sort(random.choice(rows, self.config.max_rows, replace=False))
        speaks = lists.speaks[rows]
        values = np.where(speaks, lists.features[rows], np.float32(0))
        positives, weights = lists.positives[rows], lists.weights[rows]

        def goodness(counts: tuple[int, ...]) -> np.ndarray:
            share = np.asarray(counts, np.float32)
            total = np.einsum("s,nsk->nk", share, speaks.astype(np.float32))
            fused = np.einsum("s,nsk->nk", share, values) / np.maximum(total, 1)
            return sampled_ndcg(np.where(total > 0, fused, -np.inf), positives, weights, self.config.k)

        equal = float(goodness((1,) * len(self.members)).mean())
        report = self._select(goodness, len(rows), seed)
        return {"loss_before": 1.0 - equal, "loss_after": 1.0 - report["goodness"], **report}

    def _select(self, goodness: Goodness, rows: int, seed: int) -> dict[str, Any]:
        known: dict[tuple[int, ...], np.ndarray] = {}

        def remembered(counts: tuple[int, ...]) -> np.ndarray:
            if counts not in known:
                known[counts] = goodness(counts)
            return known[counts]

        # Drawn by the names' order, so that the order of members in a config does not matter.
        order = np.argsort(np.array(self.members))
        shares = np.zeros(len(self.members))
        for bag in range(self.config.bags):
            random = np.random.default_rng(derive_seed(seed, "bag", bag))
            inside = random.permutation(rows) < (rows + 1) // 2
            chosen = forward_selection(remembered, inside, order, self.config.steps, self.config.standard_errors)
            shares += chosen / self.config.bags
        shares[(shares < self.config.least) & (shares < shares.max())] = 0.0
        weights = shares / shares.sum()
        self._numbers["weights"].assign(weights.astype(np.float32))
        whole = tuple(np.round(weights * 1000).astype(int).tolist())
        return {
            "iterations": len(known),
            "goodness": float(goodness(whole).mean()),
            "weights": self._by_member(self._numbers["weights"].numpy()),
        }


def forward_selection(
    goodness: Goodness, inside: np.ndarray, order: np.ndarray, steps: int, standard_errors: float = 0.0
) -> np.ndarray:
    """Shares `[S]`, sum 1, of one greedy path over the rows `inside` (bool `[N]`), cut by the other rows.

    Ties go to a member that is in already, so that nobody joins for nothing, then to the first in `order`.

    The path is cut at its shortest prefix that is at most `standard_errors` standard errors worse than its best one:
    the rule of Breiman et al. (1984, section 3.4.3), with the error of the paired difference, because both prefixes
    are judged on the same rows.
    """
    outside = ~inside if (~inside).any() else inside
    counts = [0] * len(order)
    path = []
    for _ in range(steps):
        extended = {s: (*counts[:s], counts[s] + 1, *counts[s + 1 :]) for s in order}
        value = {s: float(goodness(extended[s])[inside].mean()) for s in order}
        chosen = max(order, key=lambda s: (round(value[s], 9), counts[s] > 0))
        counts = list(extended[chosen])
        path.append(extended[chosen])
    judged = [goodness(prefix)[outside] for prefix in path]
    best = max(judged, key=lambda values: float(values.mean()))
    kept = next(prefix for prefix, values in zip(path, judged, strict=True) if _no_worse(values, best, standard_errors))
    return np.asarray(kept) / sum(kept)


def _no_worse(values: np.ndarray, best: np.ndarray, standard_errors: float) -> bool:
    """Whether the mean of `values` `[N]` is at most so many standard errors of the difference below that of `best`."""
    difference = best - values
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return bool(difference.mean() <= standard_errors * error + 1e-9)


def sampled_ndcg(fused: np.ndarray, positives: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k `[N]` of lists of sampled candidates (Järvelin & Kekäläinen 2002, gains of 0 and 1).

    Args:
        fused: `[N, K]` scores, -inf where nobody speaks.
        positives: bool `[N, K]`.
        weights: `[N, K]`, how many candidates each one stands for: what lies above pushes down by that many places.
    """
    width = min(k, fused.shape[1])
    listed = np.sort(np.argpartition(-fused, width - 1, axis=1)[:, :width], axis=1)
    order = np.take_along_axis(
        listed, np.argsort(-np.take_along_axis(fused, listed, axis=1), axis=1, kind="stable"), axis=1
    )
    counted = np.where(np.isfinite(fused), weights, 0.0)
    above = np.take_along_axis(counted, order, axis=1)
    rank = np.cumsum(above, axis=1) - above + 1.0
    hit = np.take_along_axis(positives & np.isfinite(fused), order, axis=1) & (rank <= k)
    gains = np.where(hit, 1.0 / np.log2(rank + 1.0), 0.0).sum(axis=1)
    ideal = np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))
    most = np.minimum(positives.sum(axis=1), k)
    return gains / np.where(most > 0, ideal[np.maximum(most, 1) - 1], 1.0)
