"""The table of metrics, and how a name such as `ndcg@10` in a config becomes a function.

Pure numpy: nothing here touches TensorFlow, so evaluation can run where no model does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.errors import ConfigError
from fusion.registry import Registry, nearest
from fusion.types import Over
from recsys.metrics.definition import Definition, Kind, Needs
from recsys.metrics.lists import Catalogue, RankedLists, multi_hot

METRICS: dict[Over, Registry] = {
    "candidates": Registry(
        "ranking metric",
        {
            "recall": "recsys.metrics.ranking:recall",
            "precision": "recsys.metrics.ranking:precision",
            "ndcg": "recsys.metrics.ranking:ndcg",
            "map": "recsys.metrics.ranking:map",
            "mrr": "recsys.metrics.ranking:mrr",
            "hit_rate": "recsys.metrics.ranking:hit_rate",
            "auc": "recsys.metrics.ranking:auc",
            "coverage": "recsys.metrics.beyond_accuracy:coverage",
            "gini": "recsys.metrics.beyond_accuracy:gini",
            "novelty": "recsys.metrics.beyond_accuracy:novelty",
            "average_popularity": "recsys.metrics.beyond_accuracy:average_popularity",
            "diversity": "recsys.metrics.beyond_accuracy:diversity",
        },
    ),
    "classes": Registry(
        "classification metric",
        {
            "accuracy": "recsys.metrics.classes:accuracy",
            "log_loss": "recsys.metrics.classes:log_loss",
            "auc": "recsys.metrics.classes:auc",
            "rmse": "recsys.metrics.classes:rmse",
            "ece": "recsys.metrics.classes:ece",
        },
    ),
}
"""Metrics by what a run ranks: the candidates of a recommender, or the classes of a classifier."""


@dataclass(frozen=True)
class Metric:
    """A metric as a config names it.

    Attributes:
        name: as written in configs and reports, `ndcg@10`.
        function: see `Definition.function`; its docstring has formula, range, ties and source.
        k: the list length, None for metrics without one.
        higher_is_better: which direction an improvement has.
        kind: `ranking` (per user), `list` (one number) or `class`.
        needs: the field of `Catalogue` that the metric takes, or None.
    """

    name: str
    function: Callable[..., Any]
    k: int | None
    higher_is_better: bool
    kind: Kind
    needs: Needs | None = None

    def of_lists(self, lists: RankedLists, catalogue: Catalogue | None = None) -> np.ndarray | float:
        """The value per user, float64 `[U]` with NaN where undefined, or one number for kind `list`.

        Raises ConfigError when the metric needs a fact that the catalogue does not have.
        """
        if self.kind == "class":
            raise ConfigError(f"'{self.name}' is a metric of classes and cannot judge ranked lists.")
        arguments: list[Any] = [lists] if self.k is None else [lists, self.k]
        if self.needs is not None:
            fact = getattr(catalogue, self.needs, None)
            if fact is None:
                raise ConfigError(
                    f"'{self.name}' needs the {self.needs} of the catalogue, which this run does not have. "
                    "Give them or remove the metric."
                )
            arguments.append(fact)
        value: np.ndarray | float = self.function(*arguments)
        return value

    def of_classes(self, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray | float:
        """The value per example, float64 `[N]`, or one number, of labels `[N]` and probabilities `[N, C]`."""
        if self.kind != "class":
            raise ConfigError(f"'{self.name}' is a metric of ranked lists and cannot judge classes.")
        value: np.ndarray | float = self.function(labels, probabilities)
        return value


def parse_metric(text: str, over: Over | None = None) -> Metric:
    """Reads `ndcg@10` or `accuracy`.

    Args:
        text: a name of the table, with `@k` exactly where the metric has a list length.
        over: look among the metrics of `candidates` or of `classes` alone; None takes the first that has the
            name, so `auc` is then the one of rankings.

    Raises:
        ConfigError: the name is unknown (with the nearest known one), of the other task, or its k is missing,
            not welcome or below 1.

    >>> parse_metric("ndcg@10").k
    10
    >>> parse_metric("ndgc@10")
    Traceback (most recent call last):
    fusion.errors.ConfigError: unknown metric 'ndgc@10': did you mean 'ndcg'?
    """
    name, at, length = str(text).partition("@")
    definition = _find(name, text, over)
    if definition.at_k != bool(at):
        example = f"'{name}@10'" if definition.at_k else f"'{name}'"
        must = "must name its list length" if definition.at_k else "has no list length"
        raise ConfigError(f"the metric '{name}' {must}, as in {example}; received '{text}'.")
    if at and not re.fullmatch("[1-9][0-9]{0,5}", length):
        raise ConfigError(f"a list length must be a whole number from 1 to 999999; received '{text}'.")
    return Metric(
        name=str(text),
        function=definition.function,
        k=int(length) if at else None,
        higher_is_better=definition.higher_is_better,
        kind=definition.kind,
        needs=definition.needs,
    )


def _find(name: str, text: str, over: Over | None) -> Definition:
    tables = METRICS if over is None else {over: METRICS[over]}
    for table in tables.values():
        if name in set(table):
            definition: Definition = table[name]
            return definition
    known = [other for table in tables.values() for other in table]
    if any(name in set(table) for table in METRICS.values()):
        raise ConfigError(f"the metric '{text}' does not judge {over}; known for these are {', '.join(known)}.")
    raise ConfigError(f"unknown metric '{text}': {nearest(name, known)}")


__all__ = ["METRICS", "Catalogue", "Metric", "RankedLists", "multi_hot", "parse_metric"]
