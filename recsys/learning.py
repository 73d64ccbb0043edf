"""What the epochs of members say of their training: over-fitted, stopped too early, or nothing learned.

The thresholds below are rough. A hint says where to look; what was kept is the best epoch in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fusion.types import History
from recsys.fitting import Fitted

LEAST_EPOCHS = 3
"""Shorter trainings are not judged."""
WORSE = 0.02
"""Over-fitting: after its best epoch the metric is on average worse by more than this share of its best value ..."""
LOSS_FELL = 0.05
"""... while the training loss has fallen on by more than this share."""
RECENT = 0.25
"""Still improving: all epochs were used, and in the last part of this size ..."""
GAIN = 0.01
"""... the best value of the metric has gained more than this share of itself."""
LEARNED = 0.01
"""Nothing learned: the training loss has never fallen by this share of that of the first epoch."""


def learning_of(fitted: Mapping[str, Fitted]) -> dict[str, dict[str, Any]]:
    """By member that was trained in epochs: `epochs`, `best_epoch` (from 1), `monitor`, `stopped`, the `hint`, which is
    empty where there is nothing to say, and the `start` of one that began with another member's weights."""
    return {
        name: {
            "epochs": len(one.history.epochs),
            "best_epoch": one.history.best_epoch + 1,
            "monitor": one.history.monitor,
            "stopped": one.history.stopped,
            "hint": hint(one.history),
            "start": one.start,
        }
        for name, one in fitted.items()
        if one.history and one.history.epochs
    }


def hint(history: History) -> str:
    """One sentence on what to change, or nothing."""
    if len(history.epochs) < LEAST_EPOCHS:
        return ""
    return _over_fits(history) or _still_improving(history) or _learns_nothing(history)


def _over_fits(history: History) -> str:
    values, best = _monitored(history), history.best_epoch
    later = values[best + 1 :]
    if len(later) < 2 or not values[best]:
        return ""
    worse = _sign(history) * (values[best] - sum(later) / len(later)) / abs(values[best])
    fell = _fall(history.epochs[best]["train_loss"], history.epochs[-1]["train_loss"])
    if worse <= WORSE or fell <= LOSS_FELL:
        return ""
    return (
        f"over-fits: after epoch {best + 1}, which was kept, the training loss fell by another {_percent(fell)} while "
        f"{history.monitor} was on average worse by {_percent(worse)}. Try more dropout, weight_decay or augmentation, "
        "or fewer trained blocks; patience saves the time."
    )


def _still_improving(history: History) -> str:
    values, count = _monitored(history), len(history.epochs)
    recent = max(1, math.ceil(RECENT * count))
    before = values[: count - recent]
    if not before or history.stopped != History.stopped:
        return ""
    sign = _sign(history)
    best = max(before, key=lambda value: sign * value)
    gain = sign * (values[history.best_epoch] - best) / abs(best) if best else 0.0
    if gain <= GAIN:
        return ""
    return (
        f"was still improving when it stopped: {history.monitor} gained {_percent(gain)} in the last {recent} of "
        f"{count} epochs. Raise epochs."
    )


def _learns_nothing(history: History) -> str:
    losses = [row["train_loss"] for row in history.epochs]
    fell = _fall(losses[0], min(losses))
    if fell >= LEARNED:
        return ""
    return (
        f"learns next to nothing: the training loss fell by {_percent(fell)} in {len(losses)} epochs. Raise "
        "learning_rate, or look at what it reads."
    )


def _monitored(history: History) -> list[float]:
    return [row[history.monitor] for row in history.epochs] if history.monitor else []


def _sign(history: History) -> float:
    return 1.0 if history.higher_is_better else -1.0


def _fall(before: float, after: float) -> float:
    """The share by which a loss fell; 0 where it was 0 or less, as a bound on a likelihood may be."""
    return (before - after) / before if before > 0 else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
