"""Implicit ALS: matrix factorisation for interactions without ratings, solved side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from scipy import sparse
from threadpoolctl import ThreadpoolController

from fusion.compat import tf
from fusion.config import Settings
from fusion.progress import progress
from fusion.types import RunOptions
from recsys.collaborative.base import (
    PADDING,
    Member,
    TrainingData,
    constant,
    padded_numbers,
    products_at,
    with_padding_row,
)
from recsys.collaborative.tables import Table

BATCH_FLOATS = 2**19
"""Numbers in the vectors that are gathered for one batch of rows: 2 MB, so that they stay in a core's cache."""


class ImplicitALS(Member):
    """Minimises sum_S (1 - <w_u, h_i>)^2 + a0 sum_all <w_u, h_i>^2 + frequency-scaled L2 (Hu et al. 2008 in the
    form of Rendle et al. 2022, "Revisiting the performance of iALS", eq. 3 and 5).

    A history is folded in by the same least-squares problem as a user in training, solved by conjugate
    gradients with stock operations, so that SavedModel and TFLite run it.
    """

    class Config(Settings):
        """Settings of implicit ALS."""

        factors: int = Field(64, ge=1, le=1024)
        """Length D of the vectors."""
        epochs: int = Field(16, ge=1, le=1000)
        """Rounds over both sides."""
        unobserved_weight: float = Field(0.1, gt=0)
        """a0, the weight of every cell of the matrix."""
        l2: float = Field(4.0, ge=0)
        """Strength of the penalty."""
        frequency_scaling: float = Field(0.0, ge=0, le=1)
        """Exponent of the frequency in the penalty: 0 the same for all, 1 proportional, when `l2` should be about
        0.01. The frequency counts a0 times the whole other side, so that above 0 the best `l2` depends on the size of
        the data; the defaults are good from 500 to 40,000 items."""
        training_steps: int = Field(2, ge=1, le=256)
        """Steps of conjugate gradients on every vector in an epoch, from where it was left by the epoch before."""
        block_size: int | None = Field(None, ge=1, le=1024)
        """Entries of a vector that are solved for exactly and together, one block after the other, instead of
        improving all of them by conjugate gradients; `factors` solves every vector exactly."""
        conjugate_steps: int = Field(16, ge=1, le=256)
        """Steps of conjugate gradients when a history is folded in."""

        def penalty(self, lengths: np.ndarray | tf.Tensor, others: int) -> np.ndarray | tf.Tensor:
            """Strength of the penalty `[B]` on the vectors of rows that took `lengths` of `others` things."""
            frequency = lengths + self.unobserved_weight * float(others)
            return self.l2 * frequency**self.frequency_scaling

    @classmethod
    def fit_cost(cls, config: Any, users: int, items: int, positives: int) -> tuple[float, float]:
        """Two products with the gathered vectors a step and two more, on both sides of every epoch."""
        return config.epochs * 8.0 * positives * config.factors * (config.training_steps + 1), 0.0

    @classmethod
    def depends_on_seed(cls, config: Any) -> bool:
        """The vectors start at random, and where they end depends on it."""
        return True

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        config, solver = self.config, Solver(self.config)
        by_user, by_item = (batches(matrix, config.factors) for matrix in (data.matrix, data.matrix.T.tocsr()))
        random = np.random.default_rng(self.seed)
        shape = data.matrix.shape
        items = random.normal(0, config.factors**-0.5, (shape[1], config.factors)).astype(np.float32)
        users = np.zeros((shape[0], config.factors), np.float32)
        with progress("ials", total=config.epochs, unit="epochs", quiet=options.quiet) as bar:
            for _ in range(config.epochs):
                users = solver.improved(by_user, users, items)
                items = solver.improved(by_item, items, users)
                bar.advance(1)
        self.gram, axes = principal_axes(items, config.unobserved_weight)
        self.factors = items @ axes
        self.speaks = data.counts > 0

    def state(self) -> dict[str, np.ndarray]:
        return {"factors": self.factors, "gram": self.gram, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.factors, self.gram, self.speaks = state["factors"], state["gram"], state["speaks"]

    def scorer(self) -> tf.Module:
        return _FoldIn(self.factors, self.gram, self.config)

    def roomy_scorer(self, spare: int) -> tf.Module:
        """The scorer with `spare` rows of zeros behind both of its tables."""
        return _FoldIn(np.pad(self.factors, [(0, spare), (0, 0)]), self.gram, self.config, len(self.factors))


@dataclass(frozen=True)
class Batch:
    """Rows of similar length: their numbers `[B]`, how much they took `[B]`, and what, `[B, L]` padded with -1."""

    rows: np.ndarray
    lengths: np.ndarray
    taken: np.ndarray


def batches(matrix: sparse.csr_matrix, factors: int) -> list[Batch]:
    """All rows that took something, in batches for vectors of length `factors`; the long ones first."""
    return list(_batches(matrix, BATCH_FLOATS // factors))[::-1]


def _batches(matrix: sparse.csr_matrix, cells: int) -> Iterator[Batch]:
    lengths = np.diff(matrix.indptr)
    order = np.argsort(lengths, kind="stable")
    ascending = lengths[order]
    start = int(np.searchsorted(ascending, 1))
    while start < len(order):
        stop = start + 1
        # Rows are padded to the last and longest: as many as fill `cells` with its length.
        reach = ascending[start : start + cells // ascending[start]]
        stop = start + max(1, int((reach * np.arange(1, len(reach) + 1) <= cells).sum()))
        rows = order[start:stop]
        yield Batch(rows, lengths[rows], _padded(matrix, rows))
        start = stop


def _padded(matrix: sparse.csr_matrix, rows: np.ndarray) -> np.ndarray:
    part = matrix[rows]
    lengths = np.diff(part.indptr)
    result = np.full((len(rows), lengths.max()), PADDING, np.int32)
    result[np.arange(lengths.max()) < lengths[:, None]] = part.indices
    return result


class Solver:
    """Improves the vectors of one side while those of the other stay.

    Both sides are turned to the axes in which a0 sum_i h_i h_i' is diagonal, which changes no product <w, h>. What is
    left of a row's D × D system is a diagonal and the L vectors of what the row took; no D × D system is formed, and
    scaled by the diagonal it is the identity and L vectors more, on which conjugate gradients converge in few steps.
    """

    def __init__(self, config: ImplicitALS.Config) -> None:
        self._config = config
        self._threads = ThreadpoolController()

    def improved(self, side: list[Batch], own: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The vectors `[N, D]` of all rows of a side, given what they were and the vectors of the other side.

        Rows that are in no batch get zeros.
        """
        config = self._config
        # The products of a batch are too small to be shared: each processor has batches of its own, and BLAS's
        # threads, which would wait for work in a busy loop, are put aside.
        with self._threads.limit(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
            gram, axes = principal_axes(other, config.unobserved_weight)
            start, table = own @ axes, with_padding_row(other @ axes)
            result = np.zeros_like(own)

            def improve(batch: Batch) -> None:
                root = np.sqrt(gram + config.penalty(batch.lengths.astype(np.float32), len(other))[:, None])
                vectors = np.take(table, batch.taken, axis=0, mode="wrap")  # [B, L, D]
                vectors /= root[:, None]
                scaled = (start[batch.rows] * root)[..., None]
                result[batch.rows] = ridge(vectors, scaled, config)[..., 0] / root

            list(pool.map(improve, side))
            return result @ axes.T


def principal_axes(vectors: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """The diagonal `[D]` of weight × V'V in its principal axes, and these axes as the columns of `[D, D]`."""
    values, axes = np.linalg.eigh(weight * (vectors.T @ vectors).astype(np.float64))
    # Rounding must leave nothing negative, and without a penalty nothing may be divided by zero.
    return np.maximum(values, 1e-7 * values[-1] + 1e-30).astype(np.float32), axes.astype(np.float32)


def ridge(vectors: np.ndarray, solution: np.ndarray, config: ImplicitALS.Config) -> np.ndarray:
    """Improves solutions w of min |1 - V w|^2 + |w|^2, V float32 `[B, L, D]`, w `[B, D, 1]`, as the settings say."""
    targets = np.ones((*vectors.shape[:2], 1), np.float32)
    if config.block_size is None:
        return _by_conjugate_gradients(vectors, targets, solution, config.training_steps)
    return _by_blocks(vectors, targets, solution, config.block_size)


def _by_conjugate_gradients(vectors: np.ndarray, targets: np.ndarray, solution: np.ndarray, steps: int) -> np.ndarray:
    """Conjugate gradients on (V'V + I) w = V't (Hestenes & Stiefel 1952), each step two products with V."""
    transposed = vectors.transpose(0, 2, 1)
    residual = transposed @ (targets - vectors @ solution) - solution
    direction, energy = residual.copy(), _squares(residual)
    for _ in range(steps):
        image = vectors @ direction
        step = energy / (_squares(image) + _squares(direction) + 1e-20)
        solution = solution + step * direction
        residual -= step * (transposed @ image + direction)
        before, energy = energy, _squares(residual)
        direction *= energy / (before + 1e-20)
        direction += residual
    return solution


def _squares(vectors: np.ndarray) -> np.ndarray:
    """Squared lengths of `[B, N, 1]` -> `[B, 1, 1]`."""
    return vectors.transpose(0, 2, 1) @ vectors


def _by_blocks(vectors: np.ndarray, targets: np.ndarray, solution: np.ndarray, size: int) -> np.ndarray:
    """One round over blocks of entries of w, each solved for what the others leave unexplained (iALS++, Rendle et al.
    2021, algorithm 2; in these axes blocks have nothing in common but the residuals)."""
    solution = solution.copy()
    residual = targets - vectors @ solution
    for first in range(0, vectors.shape[2], size):
        block = slice(first, first + size)
        part = np.ascontiguousarray(vectors[:, :, block])
        residual += part @ solution[:, block]
        solution[:, block] = _exact(part, residual)
        residual -= part @ solution[:, block]
    return solution


def _exact(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """argmin |t - V w|^2 + |w|^2 from the smaller of two equal systems, L × L or D × D (Woodbury identity)."""
    transposed = vectors.transpose(0, 2, 1)
    if vectors.shape[1] <= vectors.shape[2]:
        return transposed @ np.linalg.solve(_plus_identity(vectors @ transposed), targets)
    return np.linalg.solve(_plus_identity(transposed @ vectors), transposed @ targets)


def _plus_identity(systems: np.ndarray) -> np.ndarray:
    numbers = np.arange(systems.shape[-1])
    systems[:, numbers, numbers] += 1.0
    return systems


class _FoldIn(tf.Module):
    def __init__(
        self, factors: np.ndarray, gram: np.ndarray, config: ImplicitALS.Config, items: int | None = None
    ) -> None:
        super().__init__()
        self.items = len(factors) if items is None else items  # that the penalty counts
        self.history_table = Table(with_padding_row(factors), "ials_history")
        self.item_table = Table(factors, "ials_items")
        self.gram = constant(gram, tf.float32, "ials_gram")
        self.config = config

    def user(self, history: tf.Tensor) -> tf.Tensor:
        """User vectors `[B, D]`."""
        rows = self.history_table.rows(padded_numbers(history, self.item_table.shape[0]))  # [B, L, D]
        length = tf.reduce_sum(tf.cast(history >= 0, tf.float32), axis=1)
        diagonal = self.gram + self.config.penalty(length, self.items)[:, None]
        return conjugate_gradients(rows, diagonal, self.config.conjugate_steps)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.item_table.dot(self.user(history))

    def at(self, history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Scores of some items alone, `[B, N]` for item numbers `[B, N]`."""
        return products_at(self.user(history), self.item_table, items)


def conjugate_gradients(rows: tf.Tensor, diagonal: tf.Tensor, steps: int) -> tf.Tensor:
    """Solves (diagonal + H'H) w = H'1 for H `[B, L, D]` and a positive diagonal `[B, D]` -> w `[B, D]`
    (Hestenes & Stiefel 1952, preconditioned by the diagonal; the D × D systems are never formed).

    The number of steps is fixed, so the graph has no loop that TFLite would have to run; a solved row keeps
    its solution, because the step lengths are guarded against division by zero.
    """
    solution = tf.zeros_like(diagonal)
    residual = tf.reduce_sum(rows, axis=1)
    direction = residual / diagonal
    energy = tf.reduce_sum(residual * direction, axis=-1, keepdims=True)
    for _ in range(steps):
        image = diagonal * direction
        image += tf.squeeze(tf.matmul(rows, tf.matmul(rows, direction[..., None]), transpose_a=True), -1)
        step = energy / (tf.reduce_sum(direction * image, axis=-1, keepdims=True) + 1e-20)
        solution += step * direction
        residual -= step * image
        preconditioned = residual / diagonal
        next_energy = tf.reduce_sum(residual * preconditioned, axis=-1, keepdims=True)
        direction = preconditioned + (next_energy / (energy + 1e-20)) * direction
        energy = next_energy
    return solution
