"""Implicit ALS: matrix factorisation for interactions without ratings, solved side by side."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import tf
from fusion.config import Settings
from fusion.progress import progress
from fusion.types import RunOptions
from recsys.collaborative.base import (
    Member,
    TrainingData,
    constant,
    padded_numbers,
    with_padding_row,
)

ROWS = 2048
"""Users or items solved together: `ROWS × D × D` floats are held at a time."""


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
        l2: float = Field(0.01, ge=0)
        """Strength of the penalty."""
        frequency_scaling: float = Field(1.0, ge=0, le=1)
        """Exponent of the frequency in the penalty: 0 the same for all, 1 proportional."""
        conjugate_steps: int = Field(16, ge=1, le=256)
        """Steps of conjugate gradients when a history is folded in."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        items = data.matrix.shape[1]
        by_user, by_item = data.matrix.tocsr(), data.matrix.T.tocsr()
        random = np.random.default_rng(self.seed)
        scale = 1.0 / np.sqrt(self.config.factors)
        self.factors = random.normal(0, scale, (items, self.config.factors)).astype(np.float32)
        with progress("ials", total=self.config.epochs, unit="epochs", quiet=options.quiet) as bar:
            for _ in range(self.config.epochs):
                user_factors = self._solve(by_user, self.factors)
                self.factors = self._solve(by_item, user_factors)
                bar.advance(1)
        self.gram = self.config.unobserved_weight * self.factors.T @ self.factors
        self.speaks = data.counts > 0

    def _solve(self, matrix: sparse.csr_matrix, other: np.ndarray) -> np.ndarray:
        """The exact least-squares vectors of all rows of `matrix`, given the other side."""
        gram = self.config.unobserved_weight * other.T @ other
        result = np.zeros((matrix.shape[0], other.shape[1]), np.float32)
        lengths = np.diff(matrix.indptr)
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        diagonal = np.arange(other.shape[1])
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            systems = np.repeat(gram[None], len(rows), axis=0)
            targets = np.empty((len(rows), other.shape[1]), np.float32)
            for position, row in enumerate(rows):
                vectors = other[matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]]
                systems[position] += vectors.T @ vectors
                targets[position] = vectors.sum(axis=0)
            systems[:, diagonal, diagonal] += self._penalty(lengths[rows], len(other))[:, None]
            result[rows] = np.linalg.solve(systems, targets[..., None])[..., 0]
        return result

    def _penalty(self, lengths: np.ndarray, others: int) -> np.ndarray:
        frequency = lengths + self.config.unobserved_weight * others
        return (self.config.l2 * frequency**self.config.frequency_scaling).astype(np.float32)

    def state(self) -> dict[str, np.ndarray]:
        return {"factors": self.factors, "gram": self.gram, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.factors, self.gram, self.speaks = state["factors"], state["gram"], state["speaks"]

    def scorer(self) -> tf.Module:
        return _FoldIn(self.factors, self.gram, self.config)


class _FoldIn(tf.Module):
    def __init__(self, factors: np.ndarray, gram: np.ndarray, config: ImplicitALS.Config) -> None:
        super().__init__()
        self.items = len(factors)
        self.history_table = constant(with_padding_row(factors), tf.float32, "ials_history")
        self.item_table = constant(factors, tf.float32, "ials_items")
        self.gram = constant(gram, tf.float32, "ials_gram")
        self.config = config

    def user(self, history: tf.Tensor) -> tf.Tensor:
        """User vectors `[B, D]`: conjugate gradients with a Jacobi preconditioner on (gram + H'H + l2 I) w = H'1."""
        rows = tf.gather(self.history_table, padded_numbers(history, self.items))  # [B, L, D]
        length = tf.reduce_sum(tf.cast(history >= 0, tf.float32), axis=1)
        frequency = length + self.config.unobserved_weight * float(self.items)
        penalty = self.config.l2 * tf.pow(frequency, self.config.frequency_scaling)
        system = tf.matmul(rows, rows, transpose_a=True) + self.gram  # [B, D, D]
        system += penalty[:, None, None] * tf.eye(self.item_table.shape[1])
        return conjugate_gradients(system, tf.reduce_sum(rows, axis=1), self.config.conjugate_steps)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return tf.matmul(self.user(history), self.item_table, transpose_b=True)


def conjugate_gradients(system: tf.Tensor, target: tf.Tensor, steps: int) -> tf.Tensor:
    """Solves `[B, D, D] x = [B, D]` for symmetric positive definite systems (Hestenes & Stiefel 1952).

    The number of steps is fixed, so the graph has no loop that TFLite would have to run; a solved row keeps
    its solution, because the step lengths are guarded against division by zero.
    """
    # TFLite has no operation that takes a diagonal.
    inverse_diagonal = 1.0 / tf.reduce_sum(system * tf.eye(system.shape[-1]), axis=-1)
    solution = tf.zeros_like(target)
    residual = target
    direction = inverse_diagonal * residual
    energy = tf.reduce_sum(residual * direction, axis=-1, keepdims=True)
    for _ in range(steps):
        image = tf.squeeze(tf.matmul(system, direction[..., None]), -1)
        step = energy / (tf.reduce_sum(direction * image, axis=-1, keepdims=True) + 1e-20)
        solution += step * direction
        residual -= step * image
        preconditioned = inverse_diagonal * residual
        next_energy = tf.reduce_sum(residual * preconditioned, axis=-1, keepdims=True)
        direction = preconditioned + (next_energy / (energy + 1e-20)) * direction
        energy = next_energy
    return solution
