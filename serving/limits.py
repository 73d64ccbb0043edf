"""How large a request may be. One value class, the same for every door; `serving.inputs` holds tensors
against it, `serving.recommending` ids."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

LISTS = frozenset({"history", "candidates", "exclude", "include"})
"""Inputs whose second axis has the bound of their name."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds of one request; each is at least 1.

    | limit         | input, axis                   | default | why                                              |
    |---------------|-------------------------------|---------|--------------------------------------------------|
    | `rows`        | every input, B                | 4,096   | rows x catalogue scores must fit the memory      |
    | `k`           | `k`, its values               | 1,000   | also bounded by the artifact's own `k_max`       |
    | `history`     | `history`, L                  | 4,096   | longer histories cost time and change little     |
    | `candidates`  | `candidates`, C               | 100,000 | a whole catalogue                                |
    | `exclude`     | `exclude`, E                  | 10,000  | what a page has shown already                    |
    | `include`     | `include`, E                  | 100,000 | a filtered part of the catalogue                 |
    | `filters`     | columns and values, together  | 1,000   | a person's choice, not a table                   |
    | `id_bytes`    | each string, bytes of UTF-8   | 1,024   | ids are keys, not documents                      |
    | `total_bytes` | all inputs together           | 64 MB   | a padded block takes B x L even when near empty  |
    """

    rows: int = 4096
    k: int = 1000
    history: int = 4096
    candidates: int = 100_000
    exclude: int = 10_000
    include: int = 100_000
    filters: int = 1000
    id_bytes: int = 1024
    total_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        check_bounds(self)

    def length(self, name: str) -> int | None:
        """The bound of the second axis of the input `name`, None when there is none."""
        return getattr(self, name) if name in LISTS else None


def check_bounds(settings: Any) -> None:
    """Raises ValueError, with the name of the first that is not, unless all numbers of a dataclass are above 0."""
    for field in fields(settings):
        bound = getattr(settings, field.name)
        if isinstance(bound, int | float) and not bound > 0:
            raise ValueError(f"the bound '{field.name}' must be above 0; received {bound}.")
