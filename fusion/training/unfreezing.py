"""Gradual unfreezing: the layers of some groups stand still for the first epochs, and join one after the other.

After Howard and Ruder 2018 (ULMFiT, arXiv:1801.06146), section 3.3: what is new learns first, so that its first, random
gradients do not undo what the layers below have learned elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from fusion.compat import keras
from fusion.training.optimizers import Group


def joining_epochs(intervals: Sequence[int], count: int) -> list[int]:
    """After how many epochs each of `count` blocks joins, from the top down; the last interval repeats.

    >>> joining_epochs([1], 3), joining_epochs([1, 0, 2], 4)
    ([1, 2, 3], [1, 1, 3, 5])
    """
    epochs = [0]
    for number in range(count):
        epochs.append(epochs[-1] + intervals[min(number, len(intervals) - 1)])
    return epochs[1:]


class Unfreezing:
    """The layers of a model whose groups join after the first epoch; as a context manager it leaves all as it was.

    They are frozen as Keras freezes layers: BatchNormalization uses its moving statistics and leaves them, and no
    gradient is reckoned below the lowest layer that moves. A gate before the optimizers would do neither.

    Args:
        model: whose trainable variables the groups divide.
        groups: see `fusion.training.optimizers.Group`; none, or none with `joins`, freezes nothing.

    Raises:
        ValueError: a layer has variables of groups that join at different times.
    """

    def __init__(self, model: keras.Model, groups: Sequence[Group]) -> None:
        joins = {id(variable): group.joins for group in groups for variable in group.variables}
        self._joins: list[tuple[keras.layers.Layer, int]] = []
        for layer in [part for part in model.submodules if isinstance(part, keras.layers.Layer)] if joins else []:
            epochs = {joins.get(id(variable), 0) for variable in _own_variables(layer)}
            if len(epochs) > 1:
                raise ValueError(
                    f"the variables of a layer must join at one time; those of '{layer.name}' join after "
                    f"{', '.join(map(str, sorted(epochs)))} epochs."
                )
            if epochs and max(epochs) > 0:
                self._joins.append((layer, max(epochs)))

    def begin(self, epoch: int) -> bool:
        """Freezes what has not joined after `epoch` epochs; says whether that is other than it was."""
        changed = False
        for layer, joins in self._joins:
            changed |= layer.trainable != (epoch >= joins)
            layer.trainable = epoch >= joins
        return changed

    def __enter__(self) -> Unfreezing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, _ in self._joins:
            layer.trainable = True


def _own_variables(layer: keras.layers.Layer) -> list[object]:
    """Trainable variables of a layer that holds no other layer; of those that do the inner ones are asked."""
    inner = any(isinstance(part, keras.layers.Layer) for part in layer.submodules)
    return [] if inner else list(layer.trainable_variables)
