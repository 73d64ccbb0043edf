"""The linear stacker, corrected by a small network that sees all members at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.rules.corrected import CorrectedStacker, Lists
from fusion.rules.fitting import RowLoss, list_wise_loss, minimise
from fusion.types import derive_seed

PATIENCE = 10
"""Steps of the minimiser without a better loss on the rows held out, after which it stops."""


@keras.saving.register_keras_serializable("fusion")
class StackerMLP(CorrectedStacker):
    """Corrected by a network with one hidden layer of tanh units, which bound what members far out can do.

    Its output weights start at zero, so it starts as the linear stacker. L-BFGS moves all of them against a weight
    decay, and stops early on the rows held out.
    """

    class Config(CorrectedStacker.Config):
        """Settings of the network."""

        hidden: int = Field(16, ge=1, le=256)
        """Units of the hidden layer."""
        weight_decay: float = Field(3.0, gt=0, allow_inf_nan=False)
        """Strength of the pull of all weights to zero, on the loss summed over rows: it fades as rows grow."""

    config: Config

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        self._number("hidden", np.zeros((len(self._inputs_of), self.config.hidden), np.float32))
        self._number("hidden_bias", np.zeros(self.config.hidden, np.float32))
        self._number("output", np.zeros(self.config.hidden, np.float32))

    def _correction(self, inputs: Any) -> Any:
        numbers = self._numbers
        return network(inputs, numbers["hidden"], numbers["hidden_bias"], numbers["output"])

    def _start(self) -> None:
        self._numbers["output"].assign(np.zeros(self.config.hidden, np.float32))

    def _grow(self, train: Lists, held: Lists, seed: int) -> tuple[int, int]:
        scale = _spread(train.inputs)

        def of_rows(parameters: Any, inputs: Any, linear: Any, *rest: Any) -> Any:
            voiced, positives, weights, counts = rest
            fused = linear + network(inputs, *self._weights_of(parameters))
            return counts * list_wise_loss(fused, voiced, positives, weights)

        start, rows = self._draw(seed), [train.inputs / scale[:, None], *list(vars(train).values())[1:]]
        loss, strength = RowLoss(of_rows, rows), self.config.weight_decay / 2.0
        others = tf.constant(held.inputs / scale[:, None])
        losses, best = [held.mean(held.losses(0.0))], start

        def penalty(steps: np.ndarray) -> tuple[float, np.ndarray]:
            weights = start + steps
            return strength * float(weights @ weights), 2.0 * strength * weights

        def watch(parameters: np.ndarray) -> None:
            nonlocal best
            judged = network(others, *self._weights_of(parameters.astype(np.float32)))
            value = held.mean(held.losses(judged))
            best = parameters.copy() if value < min(losses) else best
            losses.append(value)
            if len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE:
                raise StopIteration

        minimise(loss, rows, start, np.eye(len(start)), penalty=penalty, watch=watch)
        hidden, bias, output = self._weights_of(best)
        for name, value in (("hidden", hidden / scale[:, None]), ("hidden_bias", bias), ("output", output)):
            self._numbers[name].assign(np.asarray(value, np.float32))
        return int(np.argmin(losses)), len(losses) - 1

    def _draw(self, seed: int) -> np.ndarray:
        """Where the search starts: random hidden weights, drawn by the inputs' names, so that the order of members does
        not matter; all others 0."""
        names, units = self._inputs_of, self.config.hidden
        drawn = [
            np.random.default_rng(derive_seed(seed, name, names[:position].count(name))).normal(size=units)
            for position, name in enumerate(names)
        ]
        return np.concatenate([np.ravel(drawn) / np.sqrt(len(names)), np.zeros(2 * units)])

    def _weights_of(self, parameters: Any) -> tuple[Any, Any, Any]:
        """One vector as hidden weights `[D, H]`, their biases `[H]` and output weights `[H]`."""
        units = self.config.hidden
        return tf.reshape(parameters[: -2 * units], [-1, units]), parameters[-2 * units : -units], parameters[-units:]


def network(inputs: Any, hidden: Any, bias: Any, output: Any) -> Any:
    """`output · tanh(hidden · x + bias)` for each entry x; the same code when fitting and when serving.

    Args:
        inputs: `[B, D, C]`; hidden: `[D, H]`; bias: `[H]`; output: `[H]`.

    Returns:
        `[B, C]`.
    """
    units = tf.tanh(tf.matmul(hidden, inputs, transpose_a=True) + bias[:, tf.newaxis])  # [B, H, C]
    return tf.matmul(output[tf.newaxis], units)[:, 0]


def _spread(inputs: np.ndarray) -> np.ndarray:
    """Root mean square of each input `[N, D, K]`, `[D]`; 1 where it is always 0."""
    spread = np.sqrt(np.square(inputs).mean(axis=(0, 2), dtype=np.float64))
    return np.where(spread > 0, spread, 1.0).astype(np.float32)
