"""Quality and latency against the number of members: which one joins next, and when another no longer pays (H9).

Members join an equal-weight average in greedy order; who joins and what that is worth is decided on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recsys.metrics import Metric
from recsys.significance import interval

Goodness = Callable[[tuple[str, ...]], float]
"""Of the equal-weight average of some members; higher is better."""


def joining_order(members: Sequence[str], goodness: Goodness) -> list[str]:
    """The members in the order in which they join: the best one, then each time whoever helps the average most.

    Ties go to the member that stands first.
    """
    order: list[str] = []
    while len(order) < len(members):
        left = [member for member in members if member not in order]
        order.append(max(left, key=lambda member: goodness((*order, member))))
    return order


def curve(
    order: Sequence[str],
    values: Sequence[np.ndarray | float],
    metric: Metric,
    cost: Mapping[str, Mapping[str, Any]],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """What `report.json` says under `curve`.

    Args:
        order: the members as they join.
        values: the metric of the average of the first 1, 2, ... members, one value a user or example, or one number.
        metric: its name is told.
        cost: by member `p50_ms`. Their sum is an estimate: a graph of several members may run them side by side.
        samples, seed: of the bootstrap.
    """
    steps, milliseconds = [], 0.0
    for number, (member, value) in enumerate(zip(order, values, strict=True), 1):
        milliseconds += cost.get(member, {}).get("p50_ms", 0.0)
        figure = interval(np.atleast_1d(value), samples, seed)
        if not isinstance(value, np.ndarray):
            figure = {**figure, "low": None, "high": None}
        steps.append({"members": number, "joins": member, **figure, "p50_ms": round(milliseconds, 3) if cost else None})
    return {"part": "validation", "metric": metric.name, "steps": steps}
