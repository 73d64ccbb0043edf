"""What learned rules over classes are fitted on, and what such a rule says of rows that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.compat import tf
from fusion.rules.base import Rule
from fusion.training.out_of_fold import out_of_fold, out_of_fold_logits
from fusion.types import derive_seed
from recsys.fit_rows import FitRows

FOLDS = 5
"""Parts of the rows, of which a cross-fitted rule answers one and is fitted on the others."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that the members were not fitted on.

    Attributes:
        logits: float32 `[N, S, C]`.
        mask: bool `[N, S]`, who could read.
        labels: int64 `[N]`.
        context: what rules may read beside, `[N, 1]` by name.
        seed: of the experiment.
    """

    logits: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    context: dict[str, np.ndarray]
    seed: int

    @property
    def known(self) -> FitRows:
        """All rows."""
        return FitRows(self.logits, self.mask, self.labels, np.ones(len(self.labels)), self.context)

    def fit(self, rule: Rule) -> dict[str, Any]:
        """Fits the rule on all rows; returns what `Rule.fit` reports."""
        return self._fit(rule, self.known)

    def cross_fitted(self, new_rule: Callable[[], Rule]) -> np.ndarray:
        """Probabilities float32 `[N, C]`, each row's by a new rule that was fitted without the row's fold.

        Folds have equal shares of every class.
        """
        seed = derive_seed(self.seed, "cross fitting")
        fold_of = out_of_fold(len(self.labels), min(FOLDS, len(self.labels)), seed, self.labels)

        def fit_and_score(_: int, rows: np.ndarray, held: np.ndarray) -> np.ndarray:
            rule = new_rule()
            self._fit(rule, self.known.at(rows))
            asked = self.known.at(held)
            fused = rule(tf.constant(asked.features), tf.constant(asked.mask), asked.context)
            probabilities: np.ndarray = rule.probabilities(fused).numpy()
            return probabilities

        return out_of_fold_logits(fit_and_score, fold_of, quiet=True)

    def _fit(self, rule: Rule, rows: FitRows) -> dict[str, Any]:
        return rows.fit(rule, derive_seed(self.seed, "rule", rule.name))
