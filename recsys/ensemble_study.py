"""What an ensemble's report says of its members together: how they differ, and what each of them adds as they join.

Everything here looks at validation alone, because it is read to choose members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion.rules.average import Average
from fusion.rules.base import Rule
from fusion.rules.greedy import sampled_ndcg
from fusion.types import Context
from recsys.core import MemberScores
from recsys.evaluation import Question
from recsys.fit_rows import FitRows
from recsys.growth import joining_order
from recsys.metrics import Metric
from recsys.out_of_fold import sampled_scores
from recsys.settings import OutOfFoldSettings

JOINING_USERS = 1000
"""Validation users by whom it is decided which member joins next; of more a random part."""


class Hearing:
    """A rule that hears only some members, bool `[S]`."""

    def __init__(self, rule: Rule, heard: np.ndarray) -> None:
        self.rule = rule
        self.heard = heard

    def __call__(self, scores: Any, mask: Any, context: Context) -> Any:
        # Members are scaled each for itself, so all rules that hear others share this, the costly part.
        features, heard = self.rule.scale(scores, mask), mask & self.heard[None, :, None]
        return self.rule.fuse(self.rule.guarded(features, scores, heard), heard, context)


def without(rule: Rule, member: str) -> Hearing:
    """The rule with one member silenced."""
    return Hearing(rule, np.array(rule.members) != member)


def validation_lists(members: MemberScores, asked: Question, settings: OutOfFoldSettings, seed: int) -> FitRows:
    """What the members say about the best items of each other, for some validation users: standardised scores
    `[N, S, K]` and who took what, as learned rules get them of a fold."""
    rule = Average(Average.Config(), members.names, "candidates")
    some = settings.model_copy(update={"max_users": min(settings.max_users, JOINING_USERS)})
    return FitRows.join(sampled_scores(members, {"equal": rule}, asked, some, seed)["equal"])


def joining_over_candidates(members: Sequence[str], lists: FitRows, k: int) -> list[str]:
    """The members as they join an equal-weight average, by NDCG@k of `validation_lists`."""
    speaks = lists.mask & np.isfinite(lists.features)
    values = np.where(speaks, lists.features, np.float32(0))

    def goodness(chosen: tuple[str, ...]) -> float:
        heard = [members.index(name) for name in chosen]
        voices = speaks[:, heard].sum(axis=1)
        fused = np.where(voices > 0, values[:, heard].sum(axis=1) / np.maximum(voices, 1), -np.inf)
        return float(sampled_ndcg(fused, lists.labels, lists.weights, k).mean())

    return joining_order(members, goodness)


def growing(members: Sequence[str], order: Sequence[str]) -> dict[str, Hearing]:
    """The equal-weight averages of the first one, two, ... members in `order`, by names that no rule can have."""
    rule = Average(Average.Config(), members, "candidates")
    every = np.array(members)
    return {f"first {n}": Hearing(rule, np.isin(every, order[:n])) for n in range(1, len(order) + 1)}


def joining_classes(
    probabilities: Mapping[str, np.ndarray], heard: Mapping[str, np.ndarray], labels: np.ndarray, metric: Metric
) -> tuple[list[str], list[np.ndarray | float]]:
    """The members as they join an equal-weight mean of probabilities, and the metric of the first 1, 2, ... of them.

    Args:
        probabilities: by member `[N, C]`.
        heard: by member, bool `[N]`: who had something to read.
        labels: `[N]`.
        metric: the one that decides.
    """
    sign = 1.0 if metric.higher_is_better else -1.0

    def value(chosen: Sequence[str]) -> np.ndarray | float:
        return metric.of_classes(labels, mean_probabilities(probabilities, heard, chosen))

    order = joining_order(list(probabilities), lambda chosen: sign * float(np.mean(value(chosen))))
    return order, [value(order[:n]) for n in range(1, len(order) + 1)]


def mean_probabilities(
    probabilities: Mapping[str, np.ndarray], heard: Mapping[str, np.ndarray], chosen: Sequence[str]
) -> np.ndarray:
    """The mean `[N, C]` over those of the chosen members that had something to read, uniform where none had."""
    total = sum(np.where(heard[name][:, None], probabilities[name], 0.0) for name in chosen)
    voices = sum(heard[name].astype(int) for name in chosen)
    result = np.asarray(total) / np.maximum(voices, 1)[:, None]
    result[voices == 0] = 1.0 / result.shape[1]
    return result
