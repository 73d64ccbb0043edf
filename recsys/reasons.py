"""Why an item is recommended to a user: each member's share, the liked items behind it, words, regions of its picture.

One definition of "because you liked" serves every member, and the fused score: what the score loses where the user had
not taken the liked item. It is a difference of two answers and asks nothing of how they are made; of a sum over the
history (EASE, kNN) it is the item's own term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from fusion.compat import tf
from fusion.explain import Output, region_shares, word_shares
from recsys.collaborative.base import PADDING, Member
from recsys.collaborative.content import Content, read_items
from recsys.core import RankingCore
from recsys.evaluation import blocks
from recsys.report_content import Liked, Reasons, Region, Words, speakers
from recsys.schema import TITLE, Interactions

LEFT_OUT = 100
"""Items of a history that are left out in turn, the latest: each costs as much as another user does."""
NAMED = 3
"""Liked items that are named as reasons."""
STEPS = 12
"""Points on the path of integrated gradients. Through MiniLM, plots of 96 tokens, 8 points sum to 2.7 % and 16 to 0.2 %
off what 64 sum to, and the words stand in the same order; 12 take about 2 seconds of a processor."""


def losses(core: RankingCore, history: np.ndarray, items: np.ndarray) -> np.ndarray:
    """What scores lose where one liked item had not been taken, float32 `[1 + S, N, T]`: the fused score's first.

    The history without the item is answered anew by all members and the rule; with a recency weight, older items move
    up in its place. NaN where no member speaks, with the item or without it.

    Args:
        core: members and rule.
        history: int32 `[L]`, in the order of time, without padding; its T <= 100 latest items are left out in turn.
        items: int32 `[N]`, the items whose scores are asked for.
    """
    first = max(0, len(history) - LEFT_OUT)
    variants = [history, *(np.delete(history, place) for place in range(first, len(history)))]
    lengths = np.array([len(variant) for variant in variants])
    cells = np.ones(lengths.sum(), np.float32), np.concatenate(variants), np.append(0, np.cumsum(lengths))
    matrix = sparse.csr_matrix(cells, shape=(len(variants), core.members.items))
    systems = 1 + len(core.members.names)
    scores = np.empty((len(variants), systems, len(items)), np.float32)
    for rows, padded in blocks(matrix, np.arange(len(variants)), systems * core.members.items):
        scores[rows] = _answers(core, tf.constant(padded), items)
    scores[~np.isfinite(scores)] = np.nan  # silence, of which differences are not to be taken
    return np.moveaxis(scores[0] - scores[1:], 0, -1)


def _answers(core: RankingCore, history: tf.Tensor, items: np.ndarray) -> np.ndarray:
    """Fused scores, and after them the members' own, of some items: `[B, 1 + S, N]`."""
    scores, mask = core.members(history)
    fused = core.rule.fuse(core.rule.normalise(scores, mask), mask, core.members.context(history))
    every: np.ndarray = tf.gather(tf.concat([fused[:, None], scores], axis=1), items, axis=2).numpy()
    return every


class Explainer:
    """Explains what a core recommends.

    Args:
        core: members and rule.
        members: the core's members by name, fitted.
        data: ids, titles and content of the items.
    """

    def __init__(self, core: RankingCore, members: Mapping[str, Member], data: Interactions) -> None:
        self.core = core
        self.members = members
        self.data = data

    def __call__(self, history: np.ndarray, items: np.ndarray) -> list[Reasons]:
        """Why each of some items, int32 `[N]`, is recommended to who has taken `history`, int32 `[L]` in the order of
        time."""
        names = self.core.members.names
        known = history if len(history) else np.array([PADDING])
        said = self.core.said(tf.constant(known[None], tf.int32)).at(tf.constant(items[None], tf.int32))
        terms, biases = self.core.rule.weigh(*said)
        lost = losses(self.core, history, items) if len(history) else np.zeros((1 + len(names), len(items), 0))
        reasons = []
        for place, item in enumerate(items):
            shares = dict(zip(names, terms.numpy()[0, :, place].tolist(), strict=True))
            bias, speaking = float(biases.numpy()[0, place]), speakers(shares)
            reasons.append(
                Reasons(
                    item_id=str(self.data.item_ids[item]),
                    score=bias + sum(shares.values()),
                    bias=bias,
                    shares=shares,
                    liked=self._liked(history, lost[0, place]),
                    liked_by_member={
                        name: self._liked(history, lost[1 + number, place])
                        for number, name in enumerate(names)
                        if name in speaking and self.members[name].personal
                    },
                    words=self._told("text", history, int(item), speaking, _words),
                    regions=self._told("image", history, int(item), speaking, _region),
                )
            )
        return reasons

    def _liked(self, history: np.ndarray, lost: np.ndarray) -> list[Liked]:
        """The liked items that a score loses most without, of the T latest ones whose losses are `[T]`."""
        latest = history[len(history) - len(lost) :]
        lost = np.where(np.isfinite(lost), lost, 0.0)
        order = np.argsort(-lost, kind="stable")[:NAMED]
        return [self._named(int(latest[place]), float(lost[place])) for place in order if lost[place] > 0]

    def _named(self, item: int, lost: float) -> Liked:
        item_id = str(self.data.item_ids[item])
        return Liked(item_id, str(self.data.catalogue.iloc[item].get(TITLE) or item_id), lost)

    def _told(
        self, modality: str, history: np.ndarray, item: int, speaking: Sequence[str], tell: Callable[..., Any]
    ) -> dict[str, Any]:
        """What `tell` makes of the item's text or picture, by the name of the first of these members that reads it."""
        for name in speaking:
            member = self.members[name]
            if isinstance(member, Content) and _reads(member, modality, item):
                read = self._read(member, history, item)
                told = read and tell(member.encoder, *read)
                return {name: told} if told else {}
        return {}

    def _read(self, member: Content, history: np.ndarray, item: int) -> tuple[Any, float, Output] | None:
        """What a member reads of an item, its score, and the score as a function of embeddings; None where a member of
        older code cannot say that."""
        row = self.data.catalogue.iloc[[item]]
        value = read_items(member.encoder, member.config.columns, row)[0][0]
        embedding = member.encoder.encode(member.encoder.prepare([value]))[0]
        direction = member.direction(history, embedding)
        if direction is None:
            return None
        towards = tf.constant(direction)
        return value, float(embedding @ direction), lambda vectors: tf.linalg.matvec(vectors, towards)


def _reads(member: Content, modality: str, item: int) -> bool:
    encoder = member.encoder
    return bool(encoder.modality == modality and encoder.explained and member.speaks[item])


def _words(encoder: Any, text: str, score: float, output: Output) -> Words:
    return Words(score, word_shares(encoder, text, output, STEPS))


def _region(encoder: Any, image: np.ndarray, score: float, output: Output) -> Region | None:
    """None where nothing of the picture speaks for the item."""
    heat = region_shares(encoder, image, output)
    # Of small images the last layer has one cell, which is everywhere alike and tells nothing.
    return Region(image, heat) if heat.max() > heat.min() else None
