"""LightGCN: vectors of users and items are averaged over the graph of who took what, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.training.trainer import TrainingSettings
from recsys.collaborative.matrix_factorization import MatrixFactorization, Tables


class LightGCN(MatrixFactorization):
    """LightGCN (He et al. 2020, eq. 3, 4 and 7) over a factorisation whose users are pooled from their histories.

    Layer 0 is the factorisation: the user is the sum of the history's rows P over the root of its length, the item a
    row of Q. Each layer hands the vectors on along the edges,

        e_u^(k) = sum_i e_i^(k-1) / sqrt(|N_u| d_i),        e_i^(k) = sum_u e_u^(k-1) / sqrt(|N_u| d_i),

    and the vectors that are compared are the means over layers 0 to K. All of this is linear and the root of the
    history's length stands in every layer of the user, so that the mean is again a history pooled over one table,
    T = (P + sum_k E_item^(k-1) / sqrt(d)) / (K + 1): a user who was never seen is folded in exactly as the graph would
    have it, and with K = 0 the member is `matrix_factorization`.
    """

    class Config(MatrixFactorization.Config):
        """Settings of LightGCN: those of the factorisation, and the layers."""

        layers: int = Field(2, ge=0, le=8)
        """K, how often vectors are handed on; 0 is plain factorisation."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Share of the user vector's entries that training silences."""
        training: TrainingSettings = TrainingSettings(epochs=20, batch_size=2048, learning_rate=0.005)
        """The training loop. Every step propagates over the whole graph, so that large graphs want large batches."""

    accelerations = ()
    """Products with sparse matrices are neither in XLA nor in 16 bits."""

    @classmethod
    def check(cls, config: Any) -> None:
        """As in the factorisation; ConfigError for `init_from`, because what is kept has been handed on already."""
        super().check(config)
        if config.init_from:
            raise ConfigError(
                "init_from is not for light_gcn: the vectors it keeps are not those it learns. Leave it out."
            )

    def _propagation(self, matrix: sparse.csr_matrix) -> Callable[[tf.Tensor, tf.Tensor], Tables]:
        return Propagation(matrix, self.config.layers)


class Propagation:
    """The tables of the factorisation -> the tables of LightGCN after K layers over the graph of a matrix `[U, I]`."""

    def __init__(self, matrix: sparse.csr_matrix, layers: int) -> None:
        self.layers = layers
        users, items = (np.maximum(matrix.getnnz(axis), 1).astype(np.float64) ** -0.5 for axis in (1, 0))
        graph = sparse.diags(users) @ matrix @ sparse.diags(items)
        self.to_users, self.to_items = product(graph), product(graph.T)
        self.roots = items[:, None].astype(np.float32)

    def __call__(self, history: tf.Tensor, item: tf.Tensor) -> Tables:
        if not self.layers:
            return history, item
        users = self.to_users(history / self.roots)  # layer 0 of the users has no d_i
        items = [tf.convert_to_tensor(item)]
        for _ in range(self.layers):
            users, of_items = self.to_users(items[-1]), self.to_items(users)
            items.append(of_items)
        # Sums over one stack: TensorFlow adds three tensors or more, gradients too, in an order that is up to memory.
        layers = tf.stack(items)
        return (
            (history + self.roots * tf.reduce_sum(layers[:-1], axis=0)) / (self.layers + 1),
            tf.reduce_sum(layers, axis=0) / (self.layers + 1),
        )


def product(matrix: sparse.spmatrix) -> Callable[[tf.Tensor], tf.Tensor]:
    """`[J, D]` -> matrix `[N, J]` times it, and the gradient of that.

    By TensorFlow's products of compressed rows, which took an eighth of the processor time of `sparse_dense_matmul`,
    and whose sums are made in one order. The gradient is a product with the transposed matrix, kept as rows as well.
    """
    forward, backward = _compressed(matrix), _compressed(matrix.T)

    @tf.custom_gradient
    def multiply(vectors: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return forward(vectors), backward

    return multiply


def _compressed(matrix: sparse.spmatrix) -> Callable[[tf.Tensor], tf.Tensor]:
    entries = matrix.tocsr().sorted_indices().tocoo()
    indices = tf.constant(np.stack([entries.row, entries.col], axis=1), tf.int64)
    values, shape = tf.constant(entries.data, tf.float32), tf.constant(matrix.shape, tf.int64)

    def multiply(vectors: tf.Tensor) -> tf.Tensor:
        # Made in the graph: a matrix that a function captures has lost its type.
        rows = tf.raw_ops.SparseTensorToCSRSparseMatrix(indices=indices, values=values, dense_shape=shape)
        return tf.ensure_shape(tf.raw_ops.SparseMatrixMatMul(a=rows, b=vectors), [matrix.shape[0], vectors.shape[1]])

    return multiply
