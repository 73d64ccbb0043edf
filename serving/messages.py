"""What a recommendation is asked with and answered with, whatever door it comes through.

The REST door reads and writes it as JSON, the gRPC door as the messages of `serving.client.wire`, batch jobs and Python
use it as it is. Names are those of the exported signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

BEST, FAST = "best", "fast"
PROFILES = (BEST, FAST)
"""`best` asks the whole ensemble; `fast` its distilled student, where the artifact has one."""


@dataclass(frozen=True)
class RecommendRequest:
    """One list for one user.

    Attributes:
        user_id: of the training data, or empty.
        history: item ids that the user took, oldest first; added to what is stored of a known user.
        k: how many items.
        exclude: items that must not be returned.
        include: the only items that may be returned; empty allows all.
        filters: by column of the artifact's items, the values that an item must have one of.
        diversity: 0 sorts by score alone; up to 1 the list is spread out by maximal marginal relevance.
        profile: one of PROFILES.
        weights: by member, a factor of its contribution; members that are not named keep 1.
        timeout_ms: the answer must be there in this time, in milliseconds; None takes the server's own.
        model: name of the model, empty for the only one.
        version: number of a version, or None.
        label: label of a version, or empty; at most one of version and label.
    """

    user_id: str = ""
    history: tuple[str, ...] = ()
    k: int = 10
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    diversity: float = 0.0
    profile: str = BEST
    weights: Mapping[str, float] = field(default_factory=dict)
    timeout_ms: float | None = None
    model: str = ""
    version: int | None = None
    label: str = ""


@dataclass(frozen=True)
class SimilarRequest:
    """Items like one item; the fields are those of RecommendRequest."""

    item_id: str
    k: int = 10
    model: str = ""
    version: int | None = None
    label: str = ""


class Item(NamedTuple):
    """One place of a list: id, score, and what each member that spoke added to the score."""

    item_id: str
    score: float
    contributions: Mapping[str, float]


@dataclass(frozen=True)
class ItemList:
    """The answer.

    Attributes:
        items: best first, at most k.
        model, version: what answered.
        profile: the one that answered.
        members_used: who was asked and answered.
        fallback: why not everybody was, one sentence; empty when all members answered.
        unknown_user: whether neither the user nor any item of the history is known.
    """

    items: tuple[Item, ...]
    model: str
    version: int
    profile: str = BEST
    members_used: tuple[str, ...] = ()
    fallback: str = ""
    unknown_user: bool = False
