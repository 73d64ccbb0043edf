"""What is asked and what is answered, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    """Which model is asked.

    Attributes:
        name: empty for the only one, where the server is ours and the call is `recommend` or `similar`.
        version: its number, from 1, of TensorFlow Serving's own calls also 0; None takes the newest one, or that of the
            label.
        label: such as `stable` or `canary`; at most one of version and label.
    """

    name: str = ""
    version: int | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.version is not None and self.label:
            raise ValueError(
                f"a model is pinned by its version or by a label; received {self.version} and {self.label}."
            )


@dataclass(frozen=True)
class RecommendRequest:
    """One list for one user; `Client.recommend` says what the fields mean."""

    model: Model
    user_id: str = ""
    history: tuple[str, ...] = ()
    k: int = 10
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    diversity: float = 0.0
    profile: str = "best"
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SimilarRequest:
    """Items like one item."""

    model: Model
    item_id: str
    k: int = 10


@dataclass(frozen=True)
class Item:
    """One place of a list: id, score, and what each member that spoke added to the score."""

    item_id: str
    score: float
    contributions: Mapping[str, float]


@dataclass(frozen=True)
class ItemList:
    """A list of items, best first; iterates over them.

    Attributes:
        items: at most k.
        model: name and version of what answered.
        profile: `best`, or `fast` for the ensemble's student.
        members_used: members of the ensemble that answered.
        fallback: why not all of them did, one sentence; empty when all did.
        unknown_user: whether neither the user nor any item of the history is known.
    """

    items: tuple[Item, ...]
    model: Model
    profile: str = "best"
    members_used: tuple[str, ...] = ()
    fallback: str = ""
    unknown_user: bool = False

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class VersionStatus:
    """A version of a model: number, state in TF Serving's words (`AVAILABLE`, ...), and its error if it has one."""

    version: int
    state: str
    error: str = ""
