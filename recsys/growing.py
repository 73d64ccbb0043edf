"""Room for new items in what is served: spare rows behind the catalogue that `add_items` fills, without training.

A spare row that no item has taken changes nothing: what a rule hears ends where the items end. New items are scored by
members that read content; to all others they are what cold items are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusion.compat import tf
from fusion.rules.base import Rule
from recsys.collaborative.base import PADDING, Member, SettledScorer, constant
from recsys.core import MemberScores, RankingCore, Said

ADD_ITEMS = "add_items"
"""The signature that adds items; the only one that changes the model."""
HASHES = 2**62
_UNUSED = 2**63 - 1
"""Above every hash."""


class GrowingScores(MemberScores):
    """Members side by side over I items and N spare rows: histories `[B, L]` -> scores and mask `[B, S, I + N]`.

    Args:
        members, counts: as `MemberScores` takes them.
        spare: N, 1 or more.
    """

    def __init__(self, members: Mapping[str, Member], counts: np.ndarray | None, spare: int) -> None:
        super().__init__(members, counts)
        items = self.items
        self.scorers = [
            member.growing(spare) or SettledScorer(scorer, items, spare)
            for member, scorer in zip(members.values(), self.scorers, strict=True)
        ]
        self.reads = [signature_names(name, member) for name, member in members.items()]
        self.speaks = constant(np.pad(self.speaks.numpy(), [(0, 0), (0, spare)]), tf.float32, "speaks")
        if counts is not None:
            self.popularity = constant(np.pad(np.log1p(counts), (0, spare))[None], tf.float32, "popularity")

    def add(self, numbers: tf.Tensor, embeddings: Mapping[str, tf.Tensor]) -> None:
        """Gives new items the rows of these numbers, int32 `[n]`.

        Args:
            numbers: all different.
            embeddings: by the name that signatures carry, float32 `[n, D]` of unit length, 0 where there is no content.
        """
        speaks = [
            scorer.add(numbers, {content: embeddings[name] for content, name in read.items()})
            for scorer, read in zip(self.scorers, self.reads, strict=True)
        ]
        write_columns(self.speaks, numbers, tf.cast(tf.stack(speaks, axis=1), tf.float32))


class GrowingCore(RankingCore):
    """Members and one rule over a catalogue that grows: fused scores `[B, I + N]`, -inf for rows without an item.

    Attributes:
        count: how many items there are.
    """

    members: GrowingScores

    def __init__(self, members: GrowingScores, rule: Rule, items: int) -> None:
        super().__init__(members, rule)
        self.count = tf.Variable(items, trainable=False, dtype=tf.int32, name="item_count")

    def heard(self, history: tf.Tensor, scores: tf.Tensor, mask: tf.Tensor) -> Said:
        """As in `RankingCore`, without the rows that no item has: scales of rules may depend on how many items there
        are. Read once, so that everything that the rule hears has the same length while items are added."""
        count = self.count.read_value()
        said = super().heard(history, scores[:, :, :count], mask[:, :, :count])
        context = {name: part if part.shape[1] == 1 else part[:, :count] for name, part in said.context.items()}
        return Said(said.features, said.mask, context)

    def fused(self, said: Said) -> tf.Tensor:
        fused = super().fused(said)
        unused = self.members.items - tf.shape(fused)[1]
        padded = tf.pad(fused, [[0, 0], [0, unused]], constant_values=-np.inf)
        return tf.ensure_shape(padded, [None, self.members.items])


class GrowingIds(tf.Module):
    """External id -> number, -1 for unknown ones; a fixed table, and beside it the ids of new items.

    These are searched by their hashes. A hash table that can grow would be found by a name that stands in the graph, so
    that two loaded versions of a model would share it.

    Args:
        table: ids of the catalogue.
        items: I, how many that are.
        spare: N, the most that can be new.
    """

    def __init__(self, table: tf.lookup.StaticHashTable, items: int, spare: int) -> None:
        super().__init__()
        self.table, self.items = table, items
        # One more than there can be, with the largest hash: every search ends before the end.
        self.hashes = tf.Variable(np.full([1, spare + 1], _UNUSED), trainable=False, name="new_item_hashes")
        self.ids = tf.Variable([""] * (spare + 1), trainable=False, name="new_item_ids")
        self.numbers = tf.Variable([PADDING] * (spare + 1), trainable=False, dtype=tf.int32, name="new_item_numbers")

    def lookup(self, ids: tf.Tensor) -> tf.Tensor:
        """Numbers int32 of ids, of the same shape; the empty string is nobody's id."""
        place = tf.raw_ops.LowerBound(sorted_inputs=self.hashes, values=tf.reshape(_hashes(ids), [1, -1]))
        place = tf.reshape(place, tf.shape(ids))
        return tf.where(tf.gather(self.ids, place) == ids, tf.gather(self.numbers, place), self.table.lookup(ids))

    def learn(self, item_ids: tf.Tensor) -> None:
        """Takes the ids of new items from all ids by number, `[I + N + 1]`, '' where no item is."""
        ids = item_ids[self.items :]
        hashes = tf.where(ids == "", tf.constant(_UNUSED, tf.int64), _hashes(ids))
        order = tf.argsort(hashes)
        numbers = tf.where(ids == "", PADDING, self.items + tf.range(tf.size(ids)))
        self.hashes.assign(tf.gather(hashes, order)[None])
        self.ids.assign(tf.gather(ids, order))
        self.numbers.assign(tf.gather(numbers, order))


def signature_names(member: str, fitted: Member) -> dict[str, str]:
    """By content that a member reads, the name that signatures carry: the member's, or `<member>_<content>` where it
    has several."""
    contents = fitted.contents()
    return {name: member if len(contents) == 1 else f"{member}_{name}" for name in contents}


def write_columns(variable: tf.Variable, numbers: tf.Tensor, columns: tf.Tensor) -> None:
    """Puts `columns` `[n, R]` in the place of the columns of these numbers, int32 `[n]`, of a variable `[R, C]`."""
    variable.assign(tf.transpose(tf.tensor_scatter_nd_update(tf.transpose(variable), numbers[:, None], columns)))


def rows_for(ids: tf.Tensor, wanted: tf.Tensor, first: tf.Tensor, end: int) -> tf.Tensor:
    """The numbers int32 `[B]` that new items take, from `first` on and below `end`; -1 for those that are not `wanted`
    (bool `[B]`), have no id, or stand before with the same id."""
    distinct, place = tf.unique(ids)
    position = tf.range(tf.size(ids))
    foremost = tf.gather(tf.math.unsorted_segment_min(position, place, tf.size(distinct)), place) == position
    wanted &= foremost & (ids != "")
    number = first + tf.cumsum(tf.cast(wanted, tf.int32)) - 1
    return tf.where(wanted & (number < end), number, PADDING)


def _hashes(ids: tf.Tensor) -> tf.Tensor:
    return tf.strings.to_hash_bucket_fast(ids, HASHES)
