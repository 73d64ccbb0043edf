"""Numbers in, scores out: the members of a ranking and a rule as one module.

Evaluation, batch jobs, the exported SavedModel and the `.tflite` all score by this code. Names, ids and
top-k are not its concern: `recsys.recommender` is built around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fusion.compat import tf
from fusion.rules.base import Rule
from fusion.rules.normalisation import silence, speaking
from fusion.types import Context
from recsys.collaborative.base import Member, constant, padded_numbers

CONTEXT = ("history_length", "popularity")
"""What rules may read of a user and an item: logarithms of 1 + how many known items, 1 + how many training users."""

HISTORY_SPEC = tf.TensorSpec([None, None], tf.int32, name="history")


class MemberScores(tf.Module):
    """All members side by side: histories int32 `[B, L]` padded with -1 -> scores and mask `[B, S, I]`.

    The mask says who answered: a member is silent on items that it knows nothing about (cold ones for
    collaborative members, a film without a plot for the text member), and a personal member is silent for
    a user in whose history it knows no item.

    Args:
        members: by name, fitted.
        counts: `[I]`, how many users took each item in the rows that the members were fitted on; rules that read
            popularity need it.
    """

    def __init__(self, members: Mapping[str, Member], counts: np.ndarray | None = None) -> None:
        super().__init__()
        self.names = list(members)
        self.scorers = [member.scorer() for member in members.values()]
        speaks = np.stack([member.speaks for member in members.values()])
        self.speaks = constant(speaks.astype(np.float32), tf.float32, "speaks")
        self.personal = [member.personal for member in members.values()]
        self.counts = counts
        self.popularity = None if counts is None else constant(np.log1p(counts)[None], tf.float32, "popularity")

    @property
    def items(self) -> int:
        """Length of the catalogue."""
        return int(self.speaks.shape[1])

    def __call__(self, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scores = tf.stack([scorer(history) for scorer in self.scorers], axis=1)
        # Of two truth values, because this is as large as the scores: a product of numbers takes five times as long.
        return scores, self._answered(history)[:, :, None] & (self.speaks[None] > 0.0)

    def alone(self, name: str, history: tf.Tensor) -> tf.Tensor:
        """What one member says, `[B, I]`, NaN where it is silent; asks no other member."""
        place = self.names.index(name)
        scores = self.scorers[place](history)
        return silence(scores, self._answered(history)[:, place, None] & (self.speaks[place] > 0.0) & speaking(scores))

    def at(self, history: tf.Tensor, items: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The same for some items of each user, int32 `[B, N]` padded with -1: scores and mask `[B, S, N]`.

        Scorers that can leave the rest of the catalogue alone do.
        """
        numbers = tf.maximum(items, 0)
        scores = tf.stack([scores_at(scorer, history, numbers) for scorer in self.scorers], axis=1)
        speaks = tf.transpose(tf.gather(self.speaks, numbers, axis=1), [1, 0, 2]) > 0.0  # [B, S, N]
        return scores, self._answered(history)[:, :, None] & speaks & (items >= 0)[:, None]

    def context(self, history: tf.Tensor, items: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """What rules may read, as `CONTEXT` names it: `[B, 1]` of users, `[1, I]` of items or `[B, N]` of some."""
        known = tf.reduce_sum(tf.cast(history >= 0, tf.float32), axis=1, keepdims=True)
        found = {"history_length": tf.math.log1p(known)}
        if self.popularity is not None:
            every = self.popularity
            found["popularity"] = every if items is None else tf.gather(every[0], tf.maximum(items, 0))
        return found

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


class Said(NamedTuple):
    """What a rule hears of all members: its features `[B, F·S, I]`, the mask `[B, S, I]`, and the context."""

    features: Any
    mask: Any
    context: Context

    def at(self, items: tf.Tensor) -> Said:
        """The same of some items of each user, int32 `[B, N]`."""
        context = {
            name: values if values.shape[1] == 1 else tf.gather(values[0], items)
            for name, values in self.context.items()
        }
        features, mask = (tf.gather(part, items, axis=2, batch_dims=1) for part in self[:2])
        return Said(features, mask, context)


class RankingCore(tf.Module):
    """Members and one rule: histories int32 `[B, L]` -> fused scores `[B, I]`."""

    def __init__(self, members: MemberScores, rule: Rule) -> None:
        super().__init__()
        self.members = members
        self.rule = rule

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.fused(self.said(history))

    def fused(self, said: Said) -> tf.Tensor:
        """Fused scores `[B, I]` of what the rule hears."""
        return self.rule.fuse(*said)

    def said(self, history: tf.Tensor, *, personal: bool = False) -> Said:
        """What the rule hears; `personal` leaves out the members that say the same to everybody."""
        scores, mask = self.members(history)
        if personal:
            mask &= tf.constant(self.members.personal)[None, :, None]
        return self.heard(history, scores, mask)

    def heard(self, history: tf.Tensor, scores: tf.Tensor, mask: tf.Tensor) -> Said:
        """What the rule hears where members say `scores` `[B, S, I]` as far as `mask` lets them speak."""
        return Said(self.rule.normalise(scores, mask), mask, self.members.context(history))

    def explained(self, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Fused scores `[B, I]` and each member's contribution `[B, S, I]`, which sum to them with the rule's bias.

        Over the whole catalogue, so only for additive rules; of others explain the returned items, `Said.at`.
        """
        said = self.said(history)
        return self.rule.fuse(*said), self.rule.weigh(*said)[0]
