"""What learned rules are fitted on, of either task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.rules.base import Rule


@dataclass(frozen=True)
class FitRows:
    """Scores that members gave to rows which they were not fitted on: the arguments of `Rule.fit`.

    Attributes:
        features: classes: logits `[N, S, C]`; candidates: `[N, F·S, K]`.
        mask: bool `[N, S]`, or `[N, S, K]`.
        labels: classes: int `[N]`; candidates: bool `[N, K]`.
        weights: classes: of the rows, `[N]`; candidates: `[N, K]`, 0 for padding.
        context: what rules may read beside, by name `[N, 1]` or `[N, K]`.
        distances: candidates: how far apart members are on each user's whole catalogue, `[N, S, S]`; None where the
            rule has no guard.
    """

    features: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    context: Mapping[str, np.ndarray]
    distances: np.ndarray | None = None

    @classmethod
    def join(cls, parts: Sequence[FitRows]) -> FitRows:
        """All blocks of lists, padded to the longest list of candidates with weight 0."""
        width = max(part.labels.shape[1] for part in parts)

        def joined(arrays: Sequence[Any]) -> np.ndarray:
            return np.concatenate([np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])]) for a in arrays])

        return cls(
            joined([part.features for part in parts]),
            joined([part.mask for part in parts]),
            joined([part.labels for part in parts]),
            joined([part.weights for part in parts]),
            {name: joined([part.context[name] for part in parts]) for name in parts[0].context},
            None if parts[0].distances is None else np.concatenate([part.distances for part in parts]),
        )

    def at(self, rows: np.ndarray) -> FitRows:
        """Some of the rows."""
        context = {name: values[rows] for name, values in self.context.items()}
        distances = None if self.distances is None else self.distances[rows]
        return FitRows(self.features[rows], self.mask[rows], self.labels[rows], self.weights[rows], context, distances)

    def fit(self, rule: Rule, seed: int) -> dict[str, Any]:
        """Fits the rule; returns what `Rule.fit` reports."""
        apart = {} if self.distances is None else {"distances": self.distances}
        return rule.fit(
            self.features, self.mask, self.labels, weights=self.weights, context=self.context, seed=seed, **apart
        )

    @property
    def open(self) -> np.ndarray:
        """Lists: bool `[N, K]`, the entries that are no padding and that a member speaks on."""
        speaks = self.mask & np.isfinite(self.features[:, : self.mask.shape[1]])
        counted: np.ndarray = speaks.any(axis=1) & (self.weights > 0)
        return counted
