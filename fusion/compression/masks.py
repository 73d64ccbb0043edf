"""Which weights of a kernel become zero, and training that leaves zeros as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.compression.base import CompressionData, chosen_layers, clone, inputs_of, kernel_of, told, unfreeze
from fusion.errors import GateError
from fusion.training.trainer import TrainingSettings, fit

Sparsity = Annotated[float, Field(gt=0, lt=1)]
"""A share of zeros."""


def layers_to_prune(
    model: keras.Model,
    patterns: Sequence[str],
    able: Callable[[keras.layers.Layer], str | None] = lambda layer: None,
) -> tuple[list[keras.layers.Layer], dict[str, str]]:
    """`chosen_layers`, at least one. Raises GateError where there is none."""
    chosen, alone = chosen_layers(model, patterns, able)
    if not chosen:
        reasons = told(alone)
        raise GateError(
            f"a model to be pruned must have a layer that fits; none of {len(alone)} with weights does "
            f"({reasons or 'there are none'}). Choose other layers or settings."
        )
    return chosen, alone


def kernels_of(model: keras.Model, names: Collection[str]) -> dict[str, tf.Variable]:
    """The kernels of the named layers, in the order of the model."""
    return {layer.name: kernel_of(layer) for layer in model.layers if layer.name in names}


def magnitude_mask(kernel: np.ndarray, sparsity: float) -> np.ndarray:
    """Where the weights with the largest absolute values are, bool of the shape of `kernel`; the others are to go.

    As in TFMOT, `round(size * (1 - sparsity))` weights stay, and at least one. Of equal ones the first stay.
    """
    kept = max(1, round(kernel.size * (1 - sparsity)))
    mask = np.zeros(kernel.size, bool)
    mask[np.argsort(-np.abs(kernel), axis=None, kind="stable")[:kept]] = True
    return mask.reshape(kernel.shape)


def random_mask(shape: Sequence[int], zeros: int, random: np.random.Generator) -> np.ndarray:
    """A mask of `shape` in which `zeros` places, drawn evenly, are False."""
    mask = np.arange(int(np.prod(shape))) >= zeros
    return random.permutation(mask).reshape(shape)


def zeros_in(kernel: Any) -> int:
    """How many weights of a variable or an array are zero."""
    return int(np.sum(np.asarray(kernel) == 0))


def sparsity_facts(model: keras.Model, names: Collection[str]) -> dict[str, Any]:
    """`sparsity`, the share of zeros of all named kernels together, and `sparsity_by_layer`."""
    kernels = kernels_of(model, names)
    zeros = {name: zeros_in(kernel) for name, kernel in kernels.items()}
    sizes = {name: int(np.prod(kernel.shape)) for name, kernel in kernels.items()}
    return {
        "sparsity": sum(zeros.values()) / sum(sizes.values()),
        "sparsity_by_layer": {name: zeros[name] / sizes[name] for name in zeros},
    }


def fine_tune_sparse(
    model: keras.Model,
    data: CompressionData,
    training: TrainingSettings,
    penalty: Callable[[], tf.Tensor] | None = None,
) -> None:
    """Trains `model` in place as `fine_tune` does, but weights of kernels that are zero stay zero.

    Args:
        model: whose kernels hold the zeros.
        data: what it is trained with.
        training: how.
        penalty: a scalar that is added to the mean loss of each step.
    """
    unfreeze(model)
    kernels = [kernel for layer in model.layers if (kernel := kernel_of(layer)) is not None and zeros_in(kernel)]
    masks = [tf.constant(kernel.numpy() != 0, kernel.dtype) for kernel in kernels]

    def mask() -> None:
        for kernel, kept in zip(kernels, masks, strict=True):
            kernel.assign(kernel * kept)

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        mask()  # the step before has moved them
        losses = data.loss(model(inputs_of(model, batch), training=True), batch)
        return losses if penalty is None else losses + penalty()

    fit(model, loss, data.rows, training, data.options, None)
    mask()


def repaired(model: keras.Model, data: CompressionData, training: TrainingSettings | None) -> keras.Model:
    """A copy of a pruned model, trained with its zeros kept; the model itself where there is no training."""
    if training is None:
        return model
    copy = clone(model)
    # In a folder of its own: checkpoints that lie beside are of the training before.
    options = replace(data.options, directory=data.options.directory / "repair")
    fine_tune_sparse(copy, replace(data, options=options), training)
    return copy
