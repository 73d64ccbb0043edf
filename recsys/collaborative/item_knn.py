"""Item-based nearest neighbours: items taken by the same people are alike."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.config import Settings
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, NeighbourState, TrainingData, join_blocks, largest_by_row

BLOCK = 1024
"""Rows of the item × item matrix that are dense at a time."""


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
        weighting: Literal["cosine", "tfidf", "bm25"] = "tfidf"
        """How much each user counts."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        vectors = _weigh(data.matrix, self.config.weighting).T.tocsr()  # [I, U]
        norms = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())
        transposed = vectors.T.tocsr()
        keep = min(self.config.neighbours, vectors.shape[0])
        blocks = []
        for start in range(0, vectors.shape[0], BLOCK):
            rows = slice(start, min(start + BLOCK, vectors.shape[0]))
            product = (vectors[rows] @ transposed).toarray()
            product /= norms[rows, None] * norms[None, :] + self.config.shrinkage + 1e-12
            product[np.arange(len(product)), np.arange(rows.start, rows.stop)] = (
                0.0  # an item is no neighbour of itself
            )
            blocks.append(largest_by_row(product, keep))
        self.index, self.weight, self.truncation = join_blocks(blocks)
        self.speaks = data.counts > 0


def _weigh(matrix: sparse.csr_matrix, weighting: str) -> sparse.csr_matrix:
    """Users × items with each user's weight in place of 1."""
    matrix = matrix.astype(np.float32)
    if weighting == "cosine":
        return matrix
    items = matrix.shape[1]
    lengths = np.asarray(matrix.sum(axis=1)).ravel()
    rarity = np.log1p(items / np.maximum(lengths, 1.0))
    if weighting == "bm25":  # Robertson & Zaragoza 2009, k1 = 1.2, b = 0.75; term frequency is 1
        rarity *= 2.2 / (1.0 + 1.2 * (0.25 + 0.75 * lengths / max(lengths.mean(), 1e-9)))
    return sparse.diags(rarity.astype(np.float32)) @ matrix
