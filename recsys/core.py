"""Numbers in, scores out: the members of a ranking and a rule as one module.

Evaluation, batch jobs, the exported SavedModel and the `.tflite` all score by this code. Names, ids and
top-k are not its concern: `recsys.recommender` is built around it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusion.compat import tf
from fusion.rules.base import Rule
from recsys.collaborative.base import Member, constant, padded_numbers

HISTORY_SPEC = tf.TensorSpec([None, None], tf.int32, name="history")


class MemberScores(tf.Module):
    """All members side by side: histories int32 `[B, L]` padded with -1 -> scores and mask `[B, S, I]`.

    The mask says who answered: a member is silent on items that it knows nothing about (cold ones for
    collaborative members, a film without a plot for the text member), and a personal member is silent for
    a user in whose history it knows no item.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        super().__init__()
        self.names = list(members)
        self.scorers = [member.scorer() for member in members.values()]
        speaks = np.stack([member.speaks for member in members.values()])
        self.speaks = constant(speaks.astype(np.float32), tf.float32, "speaks")
        self.personal = [member.personal for member in members.values()]

    @property
    def items(self) -> int:
        """Length of the catalogue."""
        return int(self.speaks.shape[1])

    def __call__(self, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scores = tf.stack([scorer(history) for scorer in self.scorers], axis=1)
        # Of two truth values, because this is as large as the scores: a product of numbers takes five times as long.
        return scores, self._answered(history)[:, :, None] & (self.speaks[None] > 0.0)

    def at(self, history: tf.Tensor, items: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The same for some items of each user, int32 `[B, N]` padded with -1: scores and mask `[B, S, N]`.

        Scorers that can leave the rest of the catalogue alone do.
        """
        numbers = tf.maximum(items, 0)
        scores = tf.stack([scores_at(scorer, history, numbers) for scorer in self.scorers], axis=1)
        speaks = tf.transpose(tf.gather(self.speaks, numbers, axis=1), [1, 0, 2]) > 0.0  # [B, S, N]
        return scores, self._answered(history)[:, :, None] & speaks & (items >= 0)[:, None]

    def _answered(self, history: tf.Tensor) -> tf.Tensor:
        """bool `[B, S]`: who says anything about these histories."""
        padded = tf.concat([self.speaks, tf.zeros([len(self.names), 1])], axis=1)
        known = tf.gather(padded, padded_numbers(history, self.items), axis=1)  # [S, B, L]
        everyone = tf.constant([0.0 if personal else 1.0 for personal in self.personal])
        return tf.maximum(tf.transpose(tf.reduce_max(known, axis=2)), everyone) > 0.0


def scores_at(scorer: tf.Module, history: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
    """Scores `[B, N]` of the items `[B, N]`, from the scorer's own `at` where it has one."""
    if hasattr(scorer, "at"):
        return scorer.at(history, items)
    return tf.gather(scorer(history), items, batch_dims=1)


class RankingCore(tf.Module):
    """Members and one rule: histories int32 `[B, L]` -> fused scores `[B, I]`."""

    def __init__(self, members: MemberScores, rule: Rule) -> None:
        super().__init__()
        self.members = members
        self.rule = rule

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.rule(*self.members(history))

    def explained(self, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Fused scores `[B, I]` and each member's contribution `[B, S, I]`, which sum to them with the rule's bias."""
        scores, mask = self.members(history)
        contributions, _ = self.rule.contributions(scores, mask)
        return self.rule(scores, mask), contributions
