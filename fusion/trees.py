"""Decision trees as arrays: taken from fitted scikit-learn ensembles, evaluated by gathers in a TensorFlow graph.

A row walks down all trees at once. The nodes are renumbered so that the right child follows the left one: a step is
`child + (x > threshold)`, and a leaf is its own child, so that rows that arrive early wait. After as many steps as
the deepest tree is deep, every row stands on its leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier

from fusion.compat import tf
from fusion.errors import DataError

ALWAYS_LEFT = np.float32(np.finfo(np.float32).max)
"""The threshold of a leaf: no finite number is above it. Finite, because LiteRT has no constant infinity."""


@dataclass(frozen=True)
class Trees:
    """T trees with N nodes in all, which add up to K outputs.

    Attributes:
        feature: int32 `[N]`, the column that a node looks at.
        threshold: float32 `[N]`; a row goes right when its number is greater.
        child: int32 `[N]`, the left child; the right one is the next node. A leaf names itself.
        value: float32 `[N, V]`, what a leaf adds. V is K, or 1 where tree t adds to output t mod K alone.
        roots: int32 `[T]`, the first node of each tree.
        bias: float32 `[K]`, added once.
        depth: int32 `[]`, steps from a root to the deepest leaf.
    """

    feature: np.ndarray
    threshold: np.ndarray
    child: np.ndarray
    value: np.ndarray
    roots: np.ndarray
    bias: np.ndarray
    depth: np.ndarray

    def state(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return dict(vars(self))

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray]) -> Trees:
        """The inverse of `state`. Raises DataError when the arrays are not those of trees."""
        names = set(cls.__dataclass_fields__)
        shapes = {name: np.shape(array) for name, array in state.items()}
        nodes = shapes.get("feature", ())
        fits = set(state) == names and len(nodes) == 1 and shapes["threshold"] == shapes["child"] == nodes
        if not fits or shapes["value"][:1] != nodes or shapes["depth"] != ():
            raise DataError(
                f"the state of trees must be {', '.join(sorted(names))} over the same nodes; received "
                f"{', '.join(f'{name} {list(shape)}' for name, shape in sorted(shapes.items())) or 'nothing'}. "
                "Train the member again."
            )
        return cls(**{name: np.asarray(state[name]) for name in names})


def evaluate(features: Any, trees: Trees, arrays: Mapping[str, Any] | None = None) -> Any:
    """The sum of what the leaves add: finite features float32 `[B, F]` -> float32 `[B, K]`.

    Args:
        arrays: tensors in the place of the arrays of `trees`, such as the variables of a layer; the depth and the
            shapes are always those of `trees`.
    """
    numbers = {**trees.state(), **(arrays or {})}
    node = tf.tile(tf.constant(trees.roots)[tf.newaxis], [tf.shape(features)[0], 1])  # [B, T]
    for _ in range(int(trees.depth)):
        number = tf.gather(features, tf.gather(numbers["feature"], node), axis=1, batch_dims=1)
        right = number > tf.gather(numbers["threshold"], node)
        node = tf.gather(numbers["child"], node) + tf.cast(right, tf.int32)
    leaves = tf.gather(numbers["value"], node)  # [B, T, V]
    outputs = len(trees.bias)
    turns = trees.roots.size * trees.value.shape[1] // outputs
    return tf.reduce_sum(tf.reshape(leaves, (-1, turns, outputs)), axis=1) + numbers["bias"]


def placed(trees: Trees, columns: Sequence[int], outputs: int, elsewhere: float = 0.0) -> Trees:
    """The trees with output k in column `columns[k]` of `outputs`; the other columns are always `elsewhere`."""
    count = len(trees.bias)
    bias = np.full(outputs, elsewhere, np.float32)
    value = np.zeros((len(trees.value), outputs), np.float32)
    bias[columns] = trees.bias
    if trees.value.shape[1] == count:
        value[:, columns] = trees.value
    else:
        tree = np.searchsorted(trees.roots, np.arange(len(value)), side="right") - 1
        value[np.arange(len(value)), np.asarray(columns)[tree % count]] = trees.value[:, 0]
    return replace(trees, value=value, bias=bias)


def trees_of_forest(forest: RandomForestClassifier) -> Trees:
    """A fitted forest; `evaluate` gives its `predict_proba`, the mean of the trees' class shares.

    scikit-learn reads float32, as the graph does, so that both take the same branches.
    """
    count = len(forest.estimators_)
    parts = [
        _Tree(tree.children_left, tree.children_right, tree.feature, tree.threshold, tree.value[:, 0] / count)
        for tree in (estimator.tree_ for estimator in forest.estimators_)
    ]
    return _joined(parts, np.zeros(forest.n_classes_, np.float32))


def trees_of_boosting(boosting: HistGradientBoostingClassifier | HistGradientBoostingRegressor) -> Trees:
    """A fitted gradient boosting; `evaluate` gives its raw predictions, before link or softmax.

    K is the number of classes; 1 for two classes (the logit of the second) and for a regression. The trees stand in
    private attributes, for which scikit-learn has no public name; the tests compare with its own answers.

    Raises DataError for splits on categories: give such columns one column a category.
    """
    predictors = [predictor.nodes for turn in boosting._predictors for predictor in turn]
    if any(nodes["is_categorical"].any() for nodes in predictors):
        raise DataError(
            "trees must split on numbers to be written as arrays; received splits on categories. "
            "Give each category a column of its own."
        )
    parts = []
    for nodes in predictors:
        left, right = (np.where(nodes["is_leaf"], -1, nodes[side].astype(np.int64)) for side in ("left", "right"))
        parts.append(_Tree(left, right, nodes["feature_idx"], nodes["num_threshold"], nodes["value"][:, None]))
    return _joined(parts, np.ravel(boosting._baseline_prediction).astype(np.float32))


@dataclass(frozen=True)
class _Tree:
    """One tree in scikit-learn's numbering: children (-1 at a leaf), column, threshold `[N]`, value `[N, V]`."""

    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray


def _joined(parts: Sequence[_Tree], bias: np.ndarray) -> Trees:
    """The trees one after the other, children side by side."""
    columns: dict[str, list[np.ndarray]] = {"feature": [], "threshold": [], "child": [], "value": []}
    roots, first, deepest = [], 0, 0
    for tree in parts:
        order, level = _breadth_first(tree)
        leaf = tree.left[order] < 0
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(first, first + len(order))
        columns["feature"].append(np.where(leaf, 0, tree.feature[order]))
        columns["threshold"].append(np.where(leaf, ALWAYS_LEFT, _rounded_down(tree.threshold[order])))
        columns["child"].append(np.where(leaf, place[order], place[tree.left[order]]))
        columns["value"].append(np.where(leaf[:, None], tree.value[order], 0.0))
        roots.append(first)
        first, deepest = first + len(order), max(deepest, level)
    whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    return Trees(
        feature=whole["feature"].astype(np.int32),
        threshold=whole["threshold"].astype(np.float32),
        child=whole["child"].astype(np.int32),
        value=whole["value"].astype(np.float32),
        roots=np.array(roots, np.int32),
        bias=bias,
        depth=np.array(deepest, np.int32),
    )


def _breadth_first(tree: _Tree) -> tuple[np.ndarray, int]:
    """The nodes level by level, the children of a node side by side, and the number of steps to the last level."""
    levels = [np.array([0])]
    while True:
        inner = levels[-1][tree.left[levels[-1]] >= 0]
        if not len(inner):
            return np.concatenate(levels), len(levels) - 1
        levels.append(np.stack([tree.left[inner], tree.right[inner]], axis=1).ravel())


def _rounded_down(thresholds: np.ndarray) -> np.ndarray:
    """The greatest float32 not above each float64: for float32 numbers x, `x > t` stays what it was."""
    near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)
