"""What a metric is: a function with the facts that configs and reports need to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["ranking", "list", "class"]
"""`ranking`: one value per user. `list`: one value of all users' lists together. `class`: of labels and
probabilities, one value per example or one in all."""

Needs = Literal["items", "popularity", "vectors"]
"""The fact about the catalogue that a metric takes beside the lists (a field of `Catalogue`)."""


@dataclass(frozen=True)
class Definition:
    """A metric's function and what has to be known to call and compare it.

    Attributes:
        function: `(lists)`, `(lists, k)`, `(lists, k, fact)` or, for classes, `(labels, probabilities)`.
        kind: see `Kind`.
        higher_is_better: which direction an improvement has.
        at_k: whether the name carries a list length, as in `ndcg@10`.
        needs: the fact about the catalogue that is handed over as third argument, if any.
    """

    function: Callable[..., Any]
    kind: Kind
    higher_is_better: bool = True
    at_k: bool = False
    needs: Needs | None = None

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def metric(
    kind: Kind, *, higher_is_better: bool = True, at_k: bool = False, needs: Needs | None = None
) -> Callable[[Callable[..., Any]], Definition]:
    """Turns a function into a metric: `@metric("ranking", at_k=True)`."""

    def define(function: Callable[..., Any]) -> Definition:
        definition = Definition(function, kind, higher_is_better, at_k, needs)
        object.__setattr__(definition, "__doc__", function.__doc__)
        return definition

    return define
