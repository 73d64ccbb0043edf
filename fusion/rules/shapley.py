"""Rules whose members work together: what each one adds is its Shapley value, exact, over all subsets of members."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any, ClassVar

import numpy as np

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.rules.base import Rule, RuleSettings
from fusion.rules.normalisation import speaking
from fusion.types import Context

MOST_MEMBERS = 10
"""2^10 subsets are scored to explain an answer."""

SUBSETS_AT_ONCE = 32
"""A power of 2: operations on few candidates cost little more than being called."""


class ShapleyRule(Rule):
    """A rule whose fused score is no sum of the members' own terms.

    It defines `score`; the terms are the Shapley values of the game in which the members that play speak and the
    others are silent (Lundberg & Lee 2017, eq. 8, with silence, which the rule is defined for, in place of an
    expectation). They sum to the score less that of nobody, a silent member gets 0, and they cost 2^S times the score,
    so callers explain the returned candidates alone.
    """

    additive: ClassVar[bool] = False

    @classmethod
    def check(cls, config: RuleSettings, members: Sequence[str]) -> None:
        """As `Rule.check`; ConfigError for more members than answers can be explained for."""
        super().check(config, members)
        if len(members) > MOST_MEMBERS:
            raise ConfigError(
                f"a rule of this kind takes at most {MOST_MEMBERS} members, because each answer is explained by all "
                f"subsets of them; received {len(members)}. Drop members, or use stacker, which is additive."
            )

    def score(self, features: Any, speaks: Any, context: Context | None) -> Any:
        """The fused score float32 `[B, C]` of normalised features, finite also where nobody speaks; each candidate's
        depends on that candidate alone.

        Args:
            features: `[B, F·S, C]`, anything where silent.
            speaks: bool `[B, S, C]`.
            context: what `reads` names.
        """
        raise NotImplementedError

    def fuse(self, features: Any, mask: Any = None, context: Context | None = None) -> Any:
        """The fused score `[B, C]` of normalised features."""
        speaks = speaking(features[:, : len(self.members)], mask)
        voiced = tf.reduce_any(speaks, axis=1)
        silent = self._voiceless(voiced, tf.shape(features)[2])
        return tf.where(voiced, self.score(features, speaks, context), 0.0) + silent

    def weigh(self, features: Any, mask: Any = None, context: Context | None = None) -> tuple[Any, Any]:
        """Shapley values `[B, S, C]`, and as bias `[B, C]` the score of nobody."""
        members, together = len(self.members), min(SUBSETS_AT_ONCE, 2 ** len(self.members))
        speaks = speaking(features[:, :members], mask)
        shape = tf.shape(features)
        shares = tf.constant(shapley_weights(members).T)  # [S, 2^S]
        playing = tf.constant(subsets(members))  # [2^S, S]
        features = tf.where(tf.tile(speaks, [1, features.shape[1] // members, 1]), features, 0.0)
        many, many_speak = tf.tile(features, [together, 1, 1]), tf.tile(speaks, [together, 1, 1])
        many_context = {name: _repeated(values, together) for name, values in (context or {}).items()}

        # A loop over blocks of subsets bounds memory, and the graph holds its body once.
        def add(start: Any, terms: Any) -> tuple[Any, Any]:
            allowed = tf.repeat(playing[start : start + together], shape[0], axis=0)[:, :, tf.newaxis]
            values = self.score(many, tf.logical_and(many_speak, allowed), many_context)
            values = tf.reshape(values, [together, -1])  # [subsets, B·C]
            return start + together, terms + tf.matmul(shares[:, start : start + together], values)

        zero = tf.zeros(tf.stack([members, shape[0] * shape[2]]))
        _, terms = tf.while_loop(lambda start, _: start < 2**members, add, (tf.constant(0), zero))
        terms = tf.transpose(tf.reshape(terms, tf.stack([members, shape[0], shape[2]])), [1, 0, 2])
        voiced = tf.reduce_any(speaks, axis=1)
        nobody = self.score(features, tf.zeros_like(speaks), context)
        bias = tf.where(voiced, nobody, 0.0) + self._voiceless(voiced, shape[2])
        return tf.where(speaks, terms, 0.0), bias


def _repeated(values: Any, times: int) -> Any:
    """Context for a batch that is repeated as a whole; what is the same for all rows stays one row."""
    values = tf.convert_to_tensor(values)
    return values if values.shape[0] == 1 else tf.tile(values, [times, 1])


def subsets(members: int) -> np.ndarray:
    """Every subset of S members, bool `[2^S, S]`; the bits of the row's number."""
    return (np.arange(2**members)[:, None] >> np.arange(members) & 1).astype(bool)


def shapley_weights(members: int) -> np.ndarray:
    """What the score of each subset counts for in each member's value, float32 `[2^S, S]` (Shapley 1953).

    A subset of n with the member counts 1 / (S · C(S-1, n-1)); the same subset without it counts as much against.

    >>> shapley_weights(2).tolist()
    [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]
    """
    inside = subsets(members)
    size = inside.sum(axis=1)
    joined = np.array([1.0 / (members * comb(members - 1, max(n - 1, 0))) for n in range(members + 1)])
    left = np.array([1.0 / (members * comb(members - 1, min(n, members - 1))) for n in range(members + 1)])
    return np.where(inside, joined[size][:, None], -left[size][:, None]).astype(np.float32)
