"""SLIM: sparse linear weights between items, never negative, by elastic nets on each item's nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.config import Settings
from fusion.errors import MachineError
from fusion.progress import progress
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, NeighbourState, TrainingData
from recsys.collaborative.local_regression import (
    Neighbours,
    assembled,
    by_history_item,
    gram_matrix,
    groups_of,
    nearest_by_cosine,
    refuse_beyond_limit,
    solved,
    submatrix,
)

LIMIT_BYTES = 1_500_000_000
GROUP = 64
"""Items whose systems are cut out of one matrix: near to each other, so that they share most of their candidates."""
BATCH_BYTES = 64_000_000
"""Systems that are solved side by side; enough for the work of an update to outweigh its call."""
TOLERANCE = 1e-5
"""Largest step of a round over all weights at which an item is done; weights are of the order of 0.1."""


class Slim(NeighbourState, Member):
    """Minimises for each item i: 1/2 |x_i - X w|^2 + l2/2 |w|^2 + l1 |w|_1 with w >= 0 and w_i = 0 (Ning & Karypis
    2011, "SLIM: Sparse Linear Methods for Top-N Recommender Systems", eq. 3), w being zero but for the items
    nearest to i by cosine (their fsSLIM), of which there are `candidates`.

    An elastic net of scikit-learn over n users has the same solution for alpha = (l1 + l2) / n and
    l1_ratio = l1 / (l1 + l2). Items that nobody took together with i have weight 0 in any case.

    Raises MachineError where the kept neighbours would exceed 1.5 GB, or sparse matrices 6 GB.
    """

    class Config(Settings):
        """Settings of SLIM."""

        l1: float = Field(1.0, ge=0)
        """Strength of the lasso penalty, in users: an item that fewer people took together with another is left out."""
        l2: float = Field(50.0, gt=0)
        """Strength of the ridge penalty."""
        candidates: int = Field(128, ge=1, le=2000)
        """On how many items, the nearest by cosine, each item is regressed."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        neighbours: int = Field(500, ge=1, le=50_000)
        """How many weights of each item are kept, the largest; the rest is the truncation loss."""
        rounds: int = Field(200, ge=1, le=10_000)
        """Most rounds of coordinate descent over the weights of an item."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        items = data.matrix.shape[1]
        keep = min(self.config.neighbours, items)
        _refuse_beyond_limit(items, keep)
        refuse_beyond_limit(data.matrix, self.config.candidates, "SLIM")
        gram = gram_matrix(data.matrix)
        neighbours = nearest_by_cosine(gram, min(self.config.candidates, items))
        groups = groups_of(neighbours, gram.diagonal(), GROUP)
        batches = list(_batches(groups, 4 * neighbours[0].shape[1] ** 2))
        parts = []
        with progress("slim", total=items, unit="items", quiet=options.quiet) as bar:
            for part in solved(batches, lambda batch: _regression(batch, gram, neighbours, self.config)):
                parts.append(part)
                bar.advance(len(part[0]))
        self.index, self.weight, self.truncation = by_history_item(assembled(parts, items), keep)
        self.speaks = data.counts > 0


def _refuse_beyond_limit(items: int, keep: int) -> None:
    needed = items * keep * 8
    if needed > LIMIT_BYTES:
        raise MachineError(
            f"SLIM must fit into {LIMIT_BYTES / 1e9} GB; {items} items with {keep} neighbours need "
            f"{needed / 1e9:.1f} GB. Lower neighbours, or raise cleaning.k_core_items."
        )


def _batches(groups: Sequence[np.ndarray], system_bytes: int) -> Iterator[list[np.ndarray]]:
    """Groups put together until their systems fill `BATCH_BYTES`."""
    batch: list[np.ndarray] = []
    for group in groups:
        if batch and sum(map(len, [*batch, group])) * system_bytes > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(group)
    yield batch


def _regression(
    batch: Sequence[np.ndarray], gram: sparse.csr_matrix, neighbours: Neighbours, config: Slim.Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regressions of a batch of groups: items `[B]`, what each is regressed on `[B, n]` and the weights `[B, n]`."""
    items = np.concatenate(batch)
    index = neighbours[0][items]
    cut = [_systems(group, neighbours[0][group], gram) for group in batch]
    systems, targets = np.concatenate([s for s, _ in cut]), np.concatenate([t for _, t in cut])
    targets[index == items[:, None]] = 0.0  # what short lists are filled with; no item explains itself
    return items, index, coordinate_descent(systems, targets, config.l1, config.l2, config.rounds)


def _systems(group: np.ndarray, index: np.ndarray, gram: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """For each item of a group the products of its candidates with each other `[g, n, n]`, and with it `[g, n]`."""
    numbers, place = np.unique(np.concatenate([group, index.ravel()]), return_inverse=True)
    own, places = place[: len(group)], place[len(group) :].reshape(index.shape)
    block = submatrix(gram, numbers)
    return block[places[:, :, None], places[:, None, :]], block[places, own[:, None]]


def coordinate_descent(systems: np.ndarray, targets: np.ndarray, l1: float, l2: float, rounds: int) -> np.ndarray:
    """The w >= 0 that minimise 1/2 w'Gw - c'w + l2/2 w'w + l1 sum(w), float32 `[B, n]`, for systems G `[B, n, n]`,
    symmetric and positive semidefinite, and targets c `[B, n]`: cyclic coordinate descent (Friedman, Hastie &
    Tibshirani 2010), one coordinate of all systems at a time.

    A system is done when no weight moves by more than `TOLERANCE` in a round: by that much the optimality
    condition of each coordinate was violated. At most `rounds` are made.
    """
    result = np.zeros_like(targets)
    rows = np.arange(len(targets))  # those that are not done; the arrays below hold these only
    weights, residuals = result.copy(), targets.copy()
    for _ in range(rounds):
        moved = _round(systems, residuals, weights, l1, l2)
        done = moved <= TOLERANCE
        result[rows] = weights
        if done.all():
            break
        if done.mean() > 0.3:  # copying the rest pays when it leaves enough out
            left = ~done
            rows, systems, residuals, weights = rows[left], systems[left], residuals[left], weights[left]
    return result


def _round(systems: np.ndarray, residuals: np.ndarray, weights: np.ndarray, l1: float, l2: float) -> np.ndarray:
    """Minimises over each coordinate once, in place, with residuals c - Gw; returns each system's largest step."""
    moved = np.zeros(len(weights), np.float32)
    for j in range(weights.shape[1]):
        diagonal = systems[:, j, j]
        best = np.maximum(residuals[:, j] + diagonal * weights[:, j] - l1, 0.0) / (diagonal + l2)
        step = best - weights[:, j]
        rows = np.flatnonzero(step)  # most weights are 0 and stay so
        residuals[rows] -= step[rows, None] * systems[rows, j]
        weights[:, j] = best
        np.maximum(moved, np.abs(step), out=moved)
    return moved
