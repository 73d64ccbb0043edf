"""Room for new items in what is served: spare rows behind the catalogue that `add_items` fills, without training.

A spare row that no item has taken changes nothing: what a rule hears ends where the items end. New items are scored by
members that read content; to all others they are what cold items are.

`withdraw_items` takes items out of all lists, new ones and those of the catalogue alike, and puts them back. They stay
known to histories, and the scores of all other items stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusion.compat import tf
from fusion.rules.base import Rule
from recsys.collaborative.base import PADDING, Member, SettledScorer, constant
from recsys.collaborative.tables import write_rows
from recsys.core import MemberScores, RankingCore, Said

ADD_ITEMS, WITHDRAW_ITEMS = "add_items", "withdraw_items"
"""The signatures that add items, and that take them out of all lists or put them back."""
CHANGING = (ADD_ITEMS, WITHDRAW_ITEMS)
"""The only signatures that change the model."""
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

    def silence(self, numbers: tf.Tensor) -> None:
        """From now on nobody says anything about these rows, int32 `[n]`, which no item has any more."""
        write_columns(self.speaks, numbers, tf.zeros([tf.size(numbers), len(self.scorers)]))


class GrowingCore(RankingCore):
    """Members and one rule over a catalogue that grows: fused scores `[B, I + N]`, -inf for rows without an item and
    for items that are withdrawn.

    Attributes:
        count: how many items there are.
        withdrawn: float32 `[I + N]`, -inf of items that are withdrawn, else 0.
    """

    members: GrowingScores

    def __init__(self, members: GrowingScores, rule: Rule, items: int) -> None:
        super().__init__(members, rule)
        self.count = tf.Variable(items, trainable=False, dtype=tf.int32, name="item_count")
        self.withdrawn = tf.Variable(tf.zeros([members.items]), trainable=False, name="withdrawn_items")

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
        return self.offered(tf.ensure_shape(padded, [None, self.members.items]))

    def offered(self, scores: tf.Tensor) -> tf.Tensor:
        """Scores `[..., I + N]`, or more columns, with -inf for items that are withdrawn."""
        more = scores.shape[-1] - self.withdrawn.shape[0]
        return scores + (tf.pad(self.withdrawn, [[0, more]]) if more else self.withdrawn)

    def is_withdrawn(self, numbers: tf.Tensor) -> tf.Tensor:
        """Of items by number (-1 is none): bool, of the same shape."""
        return (numbers >= 0) & (tf.gather(self.withdrawn, tf.maximum(numbers, 0)) < 0.0)

    def withdraw(self, numbers: tf.Tensor, withdrawn: tf.Tensor) -> None:
        """Takes items out of all lists where `withdrawn` (bool `[n]`), and puts them back where not.

        Args:
            numbers: int32 `[n]`, all different.
        """
        write_rows(self.withdrawn, numbers, tf.where(withdrawn, -np.inf, 0.0))


class GrowingIds(tf.Module):
    """External id -> number, -1 for unknown ones; a fixed table, and beside it the ids of new items.

    These are searched by their hashes. A hash table that can grow would be found by a name that stands in the graph, so
    that two loaded versions of a model would share it.

    A lookup may run while ids are learned. The index is therefore one variable, of which a lookup sees the old state or
    the new one; and what it points to counts only where the item has the id that was asked for. A new id may be missed
    at that moment, also one that comes again, but none is ever taken for another one, and all others are found.

    Args:
        table: ids of the catalogue.
        item_ids: all ids by number, string `[I + N + 1]`, '' where no item is.
        items: I, how many the catalogue has.
    """

    def __init__(self, table: tf.lookup.StaticHashTable, item_ids: tf.Variable, items: int) -> None:
        super().__init__()
        self.table, self.item_ids, self.items = table, item_ids, items
        # The last number is never taken, so the largest hash stays in the index: every search ends before the end.
        numbers = np.arange(items, item_ids.shape[0])
        index = np.stack([np.full(len(numbers), _UNUSED), numbers])
        self.index = tf.Variable(index, trainable=False, name="new_item_index")

    def lookup(self, ids: tf.Tensor) -> tf.Tensor:
        """Numbers int32 of ids, of the same shape; the empty string is nobody's id."""
        index = self.index.read_value()
        place = tf.raw_ops.LowerBound(sorted_inputs=index[:1], values=tf.reshape(_hashes(ids), [1, -1]))
        number = tf.gather(index[1], tf.reshape(place, tf.shape(ids)))
        there = (tf.gather(self.item_ids, number) == ids) & (ids != "")
        return tf.where(there, tf.cast(number, tf.int32), self.table.lookup(ids))

    def learn(self) -> Any:
        """Takes the ids of new items from `item_ids`; returns the operation that does."""
        ids = self.item_ids[self.items :]
        hashes = tf.where(ids == "", tf.constant(_UNUSED, tf.int64), _hashes(ids))
        numbers = self.items + tf.range(tf.size(ids, tf.int64))
        index = tf.gather(tf.stack([hashes, numbers]), tf.argsort(hashes), axis=1)
        return self.index.assign(index, read_value=False)


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
