"""Item-based nearest neighbours: items taken by the same people are alike."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, NeighbourState, TrainingData
from recsys.collaborative.neighbours import strongest_of_product

Weighting = Literal["cosine", "tfidf", "bm25"]


class ItemKNN(NeighbourState, Member):
    """Cosine similarity with shrinkage over weighted user vectors (Sarwar et al. 2001; Deshpande & Karypis 2004).

    similarity(i, j) = <w_i, w_j> / (|w_i| |w_j| + shrinkage), where w weighs the users of an item by 1 (cosine),
    by the inverse document frequency of users (tfidf), or by BM25 over the lengths of users' histories.
    """

    class Config(Settings):
        """Settings of item-kNN."""

        neighbours: int = Field(100, ge=1, le=10_000)
        """How many neighbours of each item are kept."""
        shrinkage: float = Field(10.0, ge=0)
        """Added to the denominator: pulls similarities that rest on few users toward zero."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        weighting: Weighting = "tfidf"
        """How much each user counts."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        matrix = data.matrix.astype(np.float32)
        weights = rarity(np.diff(matrix.indptr), matrix.shape[1], self.config.weighting)
        vectors = (sparse.diags(weights) @ matrix).tocsr()
        by_item = vectors.T.tocsr()  # [I, U]
        norms = np.sqrt(np.asarray(by_item.multiply(by_item).sum(axis=1)).ravel())

        def similarity(rows: np.ndarray, columns: np.ndarray, products: np.ndarray) -> np.ndarray:
            return products / (norms[rows] * norms[columns] + self.config.shrinkage + 1e-12)

        self.index, self.weight, self.truncation = strongest_of_product(
            by_item, vectors, self.config.neighbours, similarity
        )
        self.speaks = data.counts > 0


def rarity(degrees: np.ndarray, others: int, weighting: str) -> np.ndarray:
    """What each user counts, float32, of whom `degrees` says how many of `others` items each took; or the reverse."""
    if weighting == "cosine":
        return np.ones(len(degrees), np.float32)
    degrees = degrees.astype(np.float32)
    rare = np.log1p(others / np.maximum(degrees, 1.0))
    if weighting == "bm25":  # Robertson & Zaragoza 2009, k1 = 1.2, b = 0.75; term frequency is 1
        rare *= 2.2 / (1.0 + 1.2 * (0.25 + 0.75 * degrees / max(degrees.mean(), 1e-9)))
    return rare.astype(np.float32)
