"""The linear stacker, corrected by gradient-boosted trees that see all members at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field
from scipy.special import softmax
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from fusion.compat import keras, tf
from fusion.rules.corrected import CorrectedStacker, Lists
from fusion.rules.normalisation import LARGEST
from fusion.trees import Trees, trees_of_boosting
from fusion.types import derive_seed

TREES_A_ROUND = 4
"""Trees that are fitted to one gradient, because scikit-learn sorts all inputs anew in each fit."""

PATIENCE = 4
"""Rounds without a better loss on the rows held out, after which boosting stops."""

BINS = 255
"""The most that scikit-learn's trees tell apart of one input."""

CELLS = 1_000_000
"""Entries times trees that are evaluated at once; where there are more, the trees are taken in several turns."""


@keras.saving.register_keras_serializable("fusion")
class StackerGBDT(CorrectedStacker):
    """Corrected by few and shallow trees, in Newton steps on the list-wise cross-entropy (Friedman 2001; the weighted
    least squares of LogitBoost, Friedman, Hastie & Tibshirani 2000, eq. 19, with the softmax over a list).

    Each round, scikit-learn's histogram trees are fitted to `(y - p) / p(1 - p)` with weights `p(1 - p)`, p being the
    share of an entry in its list under the score so far. The trees are kept as arrays of perfect trees, and evaluated
    with comparisons and selections alone.
    """

    differentiable = False

    class Config(CorrectedStacker.Config):
        """Settings of the trees."""

        trees: int = Field(64, ge=TREES_A_ROUND, le=256)
        """The most trees; fewer are kept where more do not help on the rows held out."""
        depth: int = Field(3, ge=1, le=5)
        """Questions from the root of a tree to each of its leaves."""
        learning_rate: float = Field(0.1, gt=0, le=1)
        """What each tree is multiplied by."""
        l2: float = Field(5.0, ge=0, allow_inf_nan=False)
        """How many rows each leaf imagines beside its own that ask for no correction."""
        min_samples_leaf: int = Field(50, ge=1)
        """Entries that a leaf has at least."""

    config: Config

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        trees, nodes = self.config.trees, 2**self.config.depth - 1
        self._number("count", np.zeros((), np.float32))
        self._number("inputs", np.zeros((trees, nodes), np.float32))
        self._number("thresholds", np.zeros((trees, nodes), np.float32))
        self._number("leaves", np.zeros((trees, nodes + 1), np.float32))

    def _correction(self, inputs: Any) -> Any:
        numbers = self._numbers
        return sum_of_leaves(inputs, *(numbers[name] for name in ("count", "inputs", "thresholds", "leaves")))

    def _start(self) -> None:
        for name in ("count", "inputs", "thresholds", "leaves"):
            self._numbers[name].assign(tf.zeros_like(self._numbers[name]))

    def _grow(self, train: Lists, held: Lists, seed: int) -> tuple[int, int]:
        rows, others = _entries(train), _entries(held)
        edges = [quantiles(column) for column in rows.T]
        codes, other_codes = in_bins(rows, edges), in_bins(others, edges)
        fused, judged = np.zeros(train.linear.shape), np.zeros(held.linear.shape)
        losses, grown = [held.mean(held.losses(judged))], []
        while TREES_A_ROUND * len(losses) <= self.config.trees and len(losses) - np.argmin(losses) <= PATIENCE:
            boosted = self._boost(codes, *newton(train, fused), derive_seed(seed, "round", len(losses)))
            with threadpool_limits(1, "openmp"):
                fused[train.weights > 0] += boosted.predict(codes)
                judged[held.weights > 0] += boosted.predict(other_codes)
            grown.append(perfect(trees_of_boosting(boosted), edges, self.config.depth))
            losses.append(held.mean(held.losses(judged)))
        kept = TREES_A_ROUND * int(np.argmin(losses))
        for name, parts in zip(("inputs", "thresholds", "leaves"), zip(*grown, strict=True), strict=True):
            padded = np.zeros(self._numbers[name].shape, np.float32)
            padded[:kept] = np.concatenate(parts)[:kept]
            self._numbers[name].assign(padded)
        self._numbers["count"].assign(kept)
        return kept, TREES_A_ROUND * len(grown)

    def _boost(self, codes: np.ndarray, targets: np.ndarray, weights: np.ndarray, seed: int) -> Any:
        config = self.config
        boosted = HistGradientBoostingRegressor(
            max_iter=TREES_A_ROUND,
            max_depth=config.depth,
            max_leaf_nodes=None,
            learning_rate=config.learning_rate,
            l2_regularization=config.l2,
            min_samples_leaf=config.min_samples_leaf,
            max_bins=BINS,
            early_stopping=False,
            random_state=seed,
        )
        with threadpool_limits(1, "openmp"):  # its threads wait for each other in busy loops
            return boosted.fit(codes, targets, weights)


def _entries(lists: Lists) -> np.ndarray:
    """The inputs of all entries that count, `[n, D]`."""
    return lists.inputs.transpose(0, 2, 1)[lists.weights > 0]


def newton(lists: Lists, correction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights `[n]` of the entries that count: the Newton step of the list-wise cross-entropy, taken for
    each score alone, at the linear score plus the correction `[N, K]`."""
    counted = lists.voiced & (lists.weights > 0)
    logits = np.where(counted, lists.linear + correction + np.log(np.where(counted, lists.weights, 1.0)), -LARGEST)
    shares = softmax(logits, axis=1)
    wanted = (lists.positives & counted) / np.maximum((lists.positives & counted).sum(axis=1, keepdims=True), 1)
    shares *= wanted.sum(axis=1, keepdims=True)  # a list whose positives are all silenced teaches nothing
    curvature = np.maximum(shares * (1.0 - shares), 1e-12)
    inside = lists.weights > 0
    return ((wanted - shares) / curvature)[inside], (lists.counts[:, None] * curvature)[inside]


def quantiles(values: np.ndarray) -> np.ndarray:
    """At most `BINS` - 1 of the values `[n]`, ascending, that cut them into parts of about equal size."""
    places = np.linspace(0, 1, BINS + 1)[1:-1]
    return np.unique(np.quantile(values, places, method="lower"))


def in_bins(rows: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    """For each value of `[n, D]` how many edges of its input lie below it, float64.

    Trees are fitted to these numbers, so that each question is about an edge, a float32 that was seen: `x <= edge` has
    one answer in every runtime, which a threshold of scikit-learn's in float64 has not.
    """
    return np.stack([np.searchsorted(edge, x) for edge, x in zip(edges, rows.T, strict=True)], axis=1).astype(float)


def perfect(grown: Trees, edges: Sequence[np.ndarray], depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trees over numbers of bins as perfect ones over inputs, in the layout of `sum_of_leaves`.

    A leaf further up than the last level is repeated below it. The baseline of the boosting is left out: it is the same
    for all entries of a list.
    """
    nodes = np.asarray(grown.roots)[:, None]  # [T, nodes of this level]
    asked, thresholds = [], []
    for _ in range(depth):
        leaf = grown.child[nodes] == nodes
        asked.append(np.where(leaf, 0, grown.feature[nodes]))
        edge = [0.0 if at_end else edges[f][int(t)] for at_end, f, t in
                zip(leaf.flat, grown.feature[nodes].flat, grown.threshold[nodes].flat, strict=True)]  # fmt: skip
        thresholds.append(np.reshape(edge, nodes.shape))
        sides = np.stack([grown.child[nodes], np.where(leaf, nodes, grown.child[nodes] + 1)], axis=2)
        nodes = sides.reshape(len(nodes), -1)
    return np.concatenate(asked, axis=1), np.concatenate(thresholds, axis=1), grown.value[nodes, 0]


def sum_of_leaves(inputs: Any, count: Any, asked: Any, thresholds: Any, leaves: Any) -> Any:
    """What perfect trees add up to for each entry, `[B, C]`.

    Node i of a tree asks whether its input is above its threshold, and has the children 2i + 1 (no) and 2i + 2 (yes).
    All nodes are asked and the answers on each entry's way selected, because whole rows of truth values are cheap: this
    takes a quarter of the time of `fusion.trees.evaluate`, which gathers a number for each entry and node on its way.

    Args:
        inputs: `[B, D, C]`.
        count: how many trees there are; the others have leaves of 0.
        asked: `[T, 2^d - 1]`, numbers of the inputs that the nodes ask about.
        thresholds: `[T, 2^d - 1]`; leaves: `[T, 2^d]`.
    """
    shape, (total, nodes) = tf.shape(inputs), thresholds.shape
    together = tf.clip_by_value(CELLS // (shape[0] * shape[2] + 1), 1, total)
    count = tf.cast(count, tf.int32)

    def add(start: Any, scores: Any) -> tuple[Any, Any]:
        block = slice(start, start + together)
        columns, limits = tf.cast(asked[block], tf.int32), thresholds[block][:, :, tf.newaxis]
        above = [tf.gather(inputs, columns[:, node], axis=1) > limits[:, node] for node in range(nodes)]
        turns: list[Any] = []  # the answers on the way from the root, bool [B, t, C]
        place = (nodes + 1) * tf.range(tf.shape(columns)[0])[:, tf.newaxis]
        while 2 ** len(turns) <= nodes:
            first = 2 ** len(turns) - 1
            answers = above[first : 2 * first + 1]
            for turn in reversed(turns):
                answers = [tf.where(turn, yes, no) for no, yes in zip(answers[::2], answers[1::2], strict=True)]
            turns += answers
            place += (nodes + 1) // 2 ** len(turns) * tf.cast(turns[-1], tf.int32)
        added = tf.reduce_sum(tf.gather(tf.reshape(leaves[block], [-1]), place), axis=1)
        return start + together, scores + tf.reshape(added, tf.shape(scores))

    zero = tf.zeros_like(inputs[:, 0])
    return tf.while_loop(lambda start, _: start < count, add, (tf.constant(0), zero))[1]
