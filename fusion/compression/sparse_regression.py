"""Sparse regression: few weights an output, fitted so that a layer still says what it said on representative rows.

A layer's kernel W `[D, C]` turns rows X `[n, D]` into X W. Each column w is replaced by one with at most k weights: w'
with the lowest |X' w' - X w|² + ρ |w' - w|², where X' is what the layers below, already done, now give. The second term
is for what few rows say nothing of; alone it would prune by magnitude. Inputs chosen by the Lasso, and layers corrected
one after the other, are due to He, Zhang and Sun 2017, arXiv:1707.06168, there for channels in place of weights.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy.linalg import solve_triangular
from sklearn.linear_model import lars_path_gram
from threadpoolctl import threadpool_limits

from fusion.compat import keras
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    LayerPatterns,
    Method,
    MethodSettings,
    answer_of,
    clone,
)
from fusion.compression.masks import Sparsity, layers_to_prune, magnitude_mask, repaired, sparsity_facts
from fusion.progress import progress
from fusion.training.trainer import TrainingSettings
from fusion.types import Features, derive_seed

_ROWS = 4096
"""Rows of a layer's input (pixels, tokens) that it is fitted on, at most."""


class SparseRegression(Method):
    """Fits sparse kernels of Dense layers and 1×1 convolutions, from the lowest layer up. No gradient is taken.

    Each output of a layer costs some k² D / 2 products: a layer with 1,536 inputs and 384 outputs of a MiniLM takes a
    minute or two, one with 384 inputs a few seconds. The Lasso takes many times as long; `layers` leaves layers out.
    """

    class Config(MethodSettings):
        """Settings of the regression."""

        sparsity: Sparsity = 0.5
        """Share of the weights of each output that become zero."""
        solver: Literal["omp", "lasso"] = "omp"
        """How the inputs of an output are chosen: one after the other, the one that explains most of what is left
        (orthogonal matching pursuit), or those that enter first along the path of the Lasso."""
        ridge: float = Field(0.01, gt=0, le=100)
        """ρ in shares of the mean square of an input: how much the old weights count beside the rows."""
        layers: LayerPatterns = ()
        """Layers to fit, or patterns of them; none stands for all Dense layers and 1×1 convolutions."""
        repair: TrainingSettings | None = None
        """A training loop afterwards, with zeros kept; null does without."""

    config: Config

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Sparse kernels; facts compare the error of each layer's output with that of pruning by magnitude."""
        original, model = clone(subject.model), clone(subject.model)
        chosen, alone = layers_to_prune(original, self.config.layers, _unable)
        names = [layer.name for layer in chosen]
        errors = {}
        with progress("sparse regression", len(names), "layers", quiet=data.options.quiet) as bar:
            for name in names:
                errors[name] = self._fit(original.get_layer(name), model, original, data)
                bar.advance()
        facts = {**sparsity_facts(model, names), "relative_error": errors}
        return replace(subject, model=repaired(model, data, self.config.repair)), Applied(alone, facts)

    def _fit(
        self, layer: keras.layers.Layer, model: keras.Model, original: keras.Model, data: CompressionData
    ) -> dict[str, float]:
        """Fits a layer of `model`, and says how far its output is from that of the original."""
        seed = derive_seed(data.options.seed, "rows", layer.name)
        rows_before = _rows_into(original, layer.name, data.representative, seed)
        rows = _rows_into(model, layer.name, data.representative, seed)
        shape = layer.kernel.shape
        old = layer.kernel.numpy().reshape(rows.shape[1], -1).astype(np.float64)
        target = rows_before @ old
        kept = max(1, round(len(old) * (1 - self.config.sparsity)))
        new = self.reconstruct(rows, target, old, kept)
        model.get_layer(layer.name).kernel.assign(new.reshape(shape))
        size = float(np.linalg.norm(target)) or 1.0

        def error(kernel: np.ndarray) -> float:
            return float(np.linalg.norm(rows @ kernel - target)) / size

        return {"regression": error(new), "magnitude": error(old * magnitude_mask(old, self.config.sparsity))}

    def reconstruct(self, rows: np.ndarray, target: np.ndarray, old: np.ndarray, kept: int) -> np.ndarray:
        """The sparse kernel.

        Args:
            rows: what enters the layer, `[n, D]`.
            target: what is to leave it, `[n, C]`.
            old: the kernel as it was, `[D, C]`.
            kept: weights of each column that may be other than zero.

        Returns:
            float64 `[D, C]`.
        """
        gram, products = rows.T @ rows, rows.T @ target
        pull = self.config.ridge * max(float(np.mean(np.diag(gram))), 1e-12)
        gram = gram + pull * np.eye(len(gram))
        products = products + pull * old
        # Both solvers compare inputs, which is fair among inputs of one size only.
        scale = np.sqrt(np.diag(gram))
        gram, products = gram / np.outer(scale, scale), products / scale[:, None]
        if self.config.solver == "omp":
            solve = partial(matching_pursuit, gram, kept=kept)
        else:
            solve = partial(_lasso, gram, kept=kept, n=len(rows))
        # Many small products: BLAS's own threads would wait for each other in busy loops.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor() as pool:
            columns = list(pool.map(solve, products.T))
        return np.stack(columns, axis=1) / scale[:, None]


def matching_pursuit(gram: np.ndarray, products: np.ndarray, kept: int) -> np.ndarray:
    """Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993) from the products of the inputs alone.

    Chooses the input that explains most of what is left, `kept` times, each time with least squares over all that are
    chosen. The same as scikit-learn's `orthogonal_mp_gram`, which moves the whole matrix about in each step: for 1,536
    inputs ten times as slow.

    Args:
        gram: products of the inputs with each other `[D, D]`; all have the same size.
        products: of the inputs with the target, `[D]`.
        kept: inputs that are chosen; fewer, where the rest depends on these.

    Returns the weights `[D]`, 0 for what is not chosen.
    """
    left = products.copy()  # of the inputs with what is not explained yet
    basis = np.empty((kept, len(gram)))  # of the inputs with the chosen ones, made orthonormal
    shares, chosen = np.empty(kept), list[int]()
    for step in range(kept):
        best = int(np.argmax(np.abs(left)))
        new = gram[best] - basis[:step, best] @ basis[:step]
        square = new[best]
        if best in chosen or square <= 1e-10 * gram[best, best]:
            break
        basis[step] = new / np.sqrt(square)
        shares[step] = left[best] / np.sqrt(square)
        left -= shares[step] * basis[step]
        chosen.append(best)
    found = np.zeros(len(gram))
    found[chosen] = solve_triangular(basis[: len(chosen), chosen], shares[: len(chosen)])
    return found


def _lasso(gram: np.ndarray, products: np.ndarray, kept: int, n: int) -> np.ndarray:
    """The inputs of the last point of the Lasso's path with at most `kept` of them, fitted anew by least squares."""
    path = lars_path_gram(products, gram, n_samples=n, method="lasso", max_iter=8 * kept)[2]
    counts = np.count_nonzero(path, axis=0)
    support = np.flatnonzero(path[:, np.flatnonzero(counts <= kept)[-1]])
    found = np.zeros(len(products))
    found[support] = np.linalg.solve(gram[np.ix_(support, support)], products[support])
    return found


def _unable(layer: keras.layers.Layer) -> str | None:
    if len(layer.inbound_nodes) > 1:
        return "is called in several places"
    if type(layer) is keras.layers.Dense:
        return None
    if type(layer) is keras.layers.Conv2D and layer.kernel_size == (1, 1) and layer.groups == 1:
        return None
    return "is neither a Dense layer nor a 1×1 convolution, whose outputs are products of one row"


def _rows_into(model: keras.Model, name: str, features: Features, seed: int) -> np.ndarray:
    """What enters a layer on the representative rows: pixels or tokens as rows, float64 `[n, D]`."""
    layer = model.get_layer(name)
    entering: Any = answer_of(keras.Model(model.inputs, layer.input))(features)
    if isinstance(layer, keras.layers.Conv2D):
        entering = entering[:, :: layer.strides[0], :: layer.strides[1]]
    elif entering.ndim == 3 and "attention_mask" in features:
        entering = entering[features["attention_mask"] > 0]  # padding says nothing
    rows = entering.reshape(-1, entering.shape[-1]).astype(np.float64)
    return np.asarray(np.random.default_rng(seed).permutation(rows)[:_ROWS])
