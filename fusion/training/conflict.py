"""How far members that are trained together want the same: cosines of gradients on one batch, after each epoch.

A cosine below 0 says that one loss is lowered at the cost of the other (Yu et al. 2020, "Gradient surgery for
multi-task learning", arXiv:2001.06782, definition 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from fusion.compat import keras, tf
from fusion.training.batches import Rows
from fusion.training.checkpoints import changing_variables, random_generators
from fusion.types import RunOptions, derive_seed

Losses = Callable[[dict[str, tf.Tensor]], tuple[tf.Tensor, Sequence[tf.Tensor]]]
"""Of a batch: the loss of the fused output, and each member's own, as numbers; made as in a step of the training."""


class Conflict:
    """Called without arguments, measures on one batch

    - `conflict/<member>`: the cosine of the gradients of fused and own loss on the member's weights;
    - `conflict/<a>+<b>`: that of the own losses of two members on the weights that they share, if any.

    The model is left as it was.

    Args:
        model: all that the losses run through.
        losses: of a batch.
        parts: the trained part of each member, in the order of the losses.
        rows: of the training part, from which the batch is drawn.
        size: rows of it, at most.
        options: seed and strategy.
    """

    def __init__(
        self,
        model: keras.Model,
        losses: Losses,
        parts: Mapping[str, keras.Model],
        rows: Rows,
        size: int,
        options: RunOptions,
    ) -> None:
        self._model, self._losses, self._parts = model, losses, parts
        numbers = np.random.default_rng(derive_seed(options.seed, "conflict")).permutation(rows.n)
        self._batch = rows.gather(numbers[:size])
        self._strategy = options.strategy or tf.distribute.get_strategy()
        self._measure = tf.function(self._cosines)

    def __call__(self) -> dict[str, float]:
        inputs = {name: tf.convert_to_tensor(array) for name, array in self._batch.items()}
        # Gradients are those of training, whose BatchNormalization looks at the batch; what that moves is put back.
        moved = [variable for variable in changing_variables(self._model) if not variable.trainable]
        moved += [generator.state for generator in random_generators(self._model)]
        before = [variable.numpy() for variable in moved]
        # In a replica, because that is where gradients of mirrored variables are defined; all see the same batch.
        found = self._strategy.run(self._measure, args=(inputs,))
        for variable, value in zip(moved, before, strict=True):
            variable.assign(value)
        return {name: float(self._strategy.experimental_local_results(value)[0]) for name, value in found.items()}

    def _cosines(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        with tf.GradientTape(persistent=True) as tape:
            fused, losses = self._losses(batch)
        own = dict(zip(self._parts, losses, strict=True))
        variables = {name: part.trainable_variables for name, part in self._parts.items()}
        found = {f"conflict/{name}": _cosine(tape, fused, own[name], variables[name]) for name in own}
        for one, two in combinations(own, 2):
            known = {id(variable) for variable in variables[two]}
            shared = [variable for variable in variables[one] if id(variable) in known]
            if shared:
                found[f"conflict/{one}+{two}"] = _cosine(tape, own[one], own[two], shared)
        return found


def _cosine(tape: tf.GradientTape, one: tf.Tensor, two: tf.Tensor, variables: Sequence[tf.Variable]) -> tf.Tensor:
    """Cosine of the gradients of two losses, in [-1, 1]; 0 where one of them is 0."""
    zero = tf.UnconnectedGradients.ZERO
    pairs = [
        (tf.convert_to_tensor(a), tf.convert_to_tensor(b))
        for a, b in zip(
            tape.gradient(one, variables, unconnected_gradients=zero),
            tape.gradient(two, variables, unconnected_gradients=zero),
            strict=True,
        )
    ]

    def total(products: list[tf.Tensor]) -> tf.Tensor:
        return tf.reduce_sum(tf.stack([tf.reduce_sum(product) for product in products]))

    lengths = tf.sqrt(total([a * a for a, _ in pairs])) * tf.sqrt(total([b * b for _, b in pairs]))
    return tf.math.divide_no_nan(total([a * b for a, b in pairs]), lengths)
