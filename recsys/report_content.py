"""What a report shows beside the figures of `report.json`: plain values, filled in by whoever evaluates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recsys.metrics.classes import Reliability
from recsys.schema import Dropped
from recsys.thumbnails import Picture


@dataclass(frozen=True)
class Pictured:
    """An item as it is shown: its title, and its picture where there is one."""

    title: str
    image: Picture = None


@dataclass(frozen=True)
class Recommended:
    """One recommended item.

    Attributes:
        title, image: see `Pictured`.
        score: the fused score.
        contributions: what each member adds to the score.
        relevant: whether the user really took it.
    """

    title: str
    score: float
    contributions: Mapping[str, float]
    image: Picture = None
    relevant: bool = False


@dataclass(frozen=True)
class Example:
    """What one user took before, and what is recommended, best first."""

    user: str
    history: Sequence[Pictured]
    recommended: Sequence[Recommended]


@dataclass(frozen=True)
class Mistake:
    """An example that the ensemble classified wrongly, with the probability it gave to its answer.

    Attributes:
        words: of the best text member, words and what each adds to the answer's logit beyond that of the true class.
        heat: the image, uint8 `[H, W, 3]`, aglow where the best image member found reasons for the answer.
    """

    title: str
    label: str
    predicted: str
    probability: float
    image: Picture = None
    words: Sequence[tuple[str, float]] = ()
    heat: np.ndarray | None = None


@dataclass(frozen=True)
class ReportExtras:
    """What a page shows beside the figures of `report.json`.

    Attributes:
        metric: the one that decides, such as `ndcg@10`.
        name: of the experiment.
        positive_rule: what counts as positive, in words.
        learning_curves: member -> one mapping of figures per epoch; members without epochs are left out.
        drop_one: member -> `value` of the best rule without it, `difference` (with it minus without it), `low`,
            `high`.
        rule_weights: rule -> member -> weight.
        examples: recommendations of a few users.
        mistakes: a few wrongly classified examples.
        reliability: member or rule -> how often its answers come true by confidence: `raw`, `calibrated` or `fused`.
        confusion: int `[C, C]`, rows the true class, columns the predicted one; `classes` has their names.
        cleaning: what was dropped and why.
        config: the resolved config as YAML.
        warnings: sentences that a reader must not miss.
        environment: versions and machine.
    """

    metric: str
    name: str = ""
    positive_rule: str = ""
    learning_curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    drop_one: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    rule_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    mistakes: Sequence[Mistake] = ()
    reliability: Mapping[str, Mapping[str, Reliability]] = field(default_factory=dict)
    confusion: np.ndarray | None = None
    classes: Sequence[str] = ()
    cleaning: Sequence[Dropped] = ()
    config: str = ""
    warnings: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
