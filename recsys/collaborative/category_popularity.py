"""Popularity of an item's categories: what is known about a film from its genres alone. Speaks about cold items."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from fusion.config import Settings
from fusion.errors import DataError
from fusion.registry import nearest
from fusion.types import RunOptions
from recsys.collaborative.base import ConstantState, Member, TrainingData


class CategoryPopularity(ConstantState, Member):
    """Score = the mean, over the item's categories, of log(1 + mean positives of the category's items).

    The same for every user. The baseline that a content member has to beat on items without a rating; it is
    silent on items without a category, and on those whose categories no training item has.
    """

    class Config(Settings):
        """Settings of category popularity."""

        column: str = "genres"
        """The column that holds an item's categories."""
        separator: str = Field("|", min_length=1)
        """What stands between two categories."""
        prefix: int | None = Field(None, ge=1)
        """How many characters of a category's name count: 2 makes B1 of the chess opening code B13; none takes all."""

    reads_content = True

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        if self.config.column not in data.catalogue:
            hint = nearest(self.config.column, data.catalogue.columns)
            raise DataError(f"category_popularity reads the column '{self.config.column}', which is not there: {hint}")
        texts = data.catalogue[self.config.column].fillna("").astype(str)
        named = [[part.strip() for part in text.split(self.config.separator) if part.strip()] for text in texts]
        categories = [[name[: self.config.prefix] for name in names] for names in named]
        means = _mean_counts(categories, data.counts)
        known = [[means[name] for name in names if name in means] for names in categories]
        self.scores = np.array([np.mean(np.log1p(values)) if values else 0.0 for values in known], np.float32)
        self.speaks = np.array([bool(values) for values in known])


def _mean_counts(categories: list[list[str]], counts: np.ndarray) -> dict[str, Any]:
    """Mean training count of the items of each category; only items that stand in training count."""
    totals: dict[str, list[int]] = {}
    for names, count in zip(categories, counts, strict=True):
        if count > 0:
            for name in names:
                totals.setdefault(name, []).append(int(count))
    return {name: float(np.mean(values)) for name, values in totals.items()}
