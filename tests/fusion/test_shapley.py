"""Contributions of rules that are no sum: exact Shapley values, against the mean over orders of members (A7)."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.rules.base import RuleSettings
from fusion.rules.shapley import MOST_MEMBERS, ShapleyRule, shapley_weights, subsets
from fusion.types import Over

MEMBERS = ("a", "b", "c", "d")


class Loudest(ShapleyRule):
    """The largest of the members' scores and of 1, times a number of the context, plus another."""

    @classmethod
    def reads(cls, config: RuleSettings) -> tuple[str, ...]:
        return ("factor", "shift")

    def normalise(self, scores: Any, mask: Any = None) -> Any:
        return tf.convert_to_tensor(scores)

    def score(self, features: Any, speaks: Any, context: Any) -> Any:
        heard = tf.where(speaks, features, 0.0)
        return context["factor"] * tf.maximum(tf.reduce_max(heard, axis=1), 1.0) + context["shift"]


def loudest(members: tuple[str, ...] = MEMBERS, over: Over = "candidates") -> Loudest:
    return Loudest(RuleSettings(), members, over)


def by_definition(scores: np.ndarray, factor: float) -> np.ndarray:
    """The mean over all orders `[S]` of what each member of `scores` `[S]` (NaN: silent) adds when it joins."""
    values = np.zeros(len(scores))
    orders = list(permutations(range(len(scores))))
    for order in orders:
        best = 1.0
        for member in order:
            joined = max(best, np.nan_to_num(scores[member], nan=0.0))
            values[member] += factor * (joined - best) / len(orders)
            best = joined
    return values


def test_weights_and_subsets_by_hand() -> None:
    """Shapley 1953 for three members: 1/3 alone, 1/6 with one of the others before, 1/3 as the last."""
    weights = dict(zip(map(tuple, subsets(3).tolist()), shapley_weights(3)[:, 0], strict=True))
    yes, no = True, False
    expected = {(yes, no, no): 1 / 3, (yes, yes, no): 1 / 6, (yes, no, yes): 1 / 6, (yes, yes, yes): 1 / 3}
    assert len(weights) == 8
    for (first, *others), weight in weights.items():
        sign = 1 if first else -1
        assert weight == pytest.approx(sign * expected[(yes, *others)])


def test_terms_by_hand() -> None:
    """Of the members with 4 and 2 (and the floor of 1): orders give 3 + 0 and 1 + 2, so 2.5 and .5; nobody has 1."""
    rule = loudest(("a", "b"))
    context = {"factor": np.ones((1, 1), np.float32), "shift": np.zeros((1, 1), np.float32)}
    terms, bias = rule.contributions(np.array([[[4.0], [2.0]]], np.float32), None, context)
    np.testing.assert_allclose(terms.numpy(), [[[2.5], [0.5]]])
    np.testing.assert_allclose(bias.numpy(), [[1.0]])


@pytest.mark.parametrize("members", [1, 3, 4, 6])
def test_terms_are_the_definition(members: int) -> None:
    """A7: with silences by number and by mask, and context of rows, of candidates and of both; one, or many blocks."""
    random = np.random.default_rng(members)
    scores = (3 * random.normal(size=(3, members, 5))).astype(np.float32)
    scores[0, 0, :2], scores[1, :, 3] = np.nan, np.inf
    mask = random.random((3, members)) > 0.2
    context = {
        "factor": random.normal(size=(3, 1)).astype(np.float32),
        "shift": random.normal(size=(1, 5)).astype(np.float32),
    }
    rule = loudest(tuple("abcdef"[:members]))
    compiled = tf.function(rule.contributions)
    terms, bias = (part.numpy() for part in compiled(tf.constant(scores), tf.constant(mask), context))
    silent = ~(mask[:, :, None] & np.isfinite(scores))
    expected = np.empty_like(scores)
    for row in range(3):
        for column in range(5):
            heard = np.where(silent[row, :, column], np.nan, scores[row, :, column])
            expected[row, :, column] = by_definition(heard, float(context["factor"][row, 0]))
    np.testing.assert_allclose(terms, expected, atol=2e-6)
    assert (terms[silent] == 0).all()

    voiced = ~silent.all(axis=1)
    nobody = np.broadcast_to(context["factor"] + context["shift"], voiced.shape)
    np.testing.assert_allclose(bias[voiced], nobody[voiced], atol=1e-6)
    assert (bias[~voiced] == -np.inf).all() and not voiced.all()
    fused = rule(scores, mask, context).numpy()
    np.testing.assert_allclose(terms.sum(axis=1) + bias, fused, rtol=1e-6, atol=1e-6)

    both = {"factor": np.broadcast_to(context["factor"], (3, 5)).copy(), "shift": context["shift"].repeat(3, axis=0)}
    again = rule.contributions(scores, mask, both)[0].numpy()
    np.testing.assert_allclose(again, terms, atol=1e-6)


def test_terms_of_most_members_sum_to_the_score() -> None:
    """A7: 1,024 subsets lose no more than rounding."""
    rule = loudest(tuple("abcdefghij"))
    scores = np.random.default_rng(0).normal(size=(2, MOST_MEMBERS, 4)).astype(np.float32)
    context = {"factor": np.full((2, 1), 3.0, np.float32), "shift": np.full((1, 4), 0.5, np.float32)}
    terms, bias = rule.contributions(scores, None, context)
    np.testing.assert_allclose(terms.numpy().sum(axis=1) + bias.numpy(), rule(scores, None, context).numpy(), atol=5e-6)


def test_more_members_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 10 members"):
        loudest(tuple("abcdefghijk"))
