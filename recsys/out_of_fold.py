"""Scores for learned rules: each member is fitted without the rows of a fold, and then scores that fold.

The folds look like the test: the experiment's own split is applied again inside the training rows, so a
temporal split gives folds that lie later than what they are scored with, and a split by items gives folds of
cold items. Weights fitted on folds that do not look like the test do not transfer to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from fusion.compat import tf
from fusion.errors import DataError
from fusion.rules.base import Rule
from fusion.types import derive_seed
from recsys.collaborative.base import PADDING
from recsys.core import HISTORY_SPEC, MemberScores
from recsys.evaluation import Question, blocks, question
from recsys.fit_rows import FitRows
from recsys.schema import TEST, TRAIN, VALIDATION, Interactions
from recsys.settings import OutOfFoldSettings
from recsys.splits import SplitSettings, split

FORWARD = ("temporal_global", "temporal_per_user", "leave_last_out")
"""Strategies whose next fold lies before the last one; the others draw each fold anew."""


@dataclass(frozen=True)
class Fold:
    """One fold: the interactions it is cut from, and the part of each of them."""

    data: Interactions
    parts: np.ndarray

    @property
    def training_rows(self) -> np.ndarray:
        """bool `[N]`: what members are fitted on."""
        return (self.parts == TRAIN) & self.data.positive

    def question(self, *, held_out: bool) -> Question:
        """What the members are asked about this fold.

        Items that nobody took before the fold ended are no candidates: they were not there yet, and a rule that
        met them as sure negatives would learn to bury every new item.
        """
        asked = question(self.data, self.parts, TEST, held_out=held_out)
        appeared = np.bincount(self.data.items, minlength=self.data.shape[1]) > 0
        return replace(asked, candidates=asked.candidates & appeared)


def make_folds(data: Interactions, parts: np.ndarray, settings: SplitSettings, folds: int, seed: int) -> list[Fold]:
    """Folds inside the training rows; fewer than asked for where the rows do not suffice, never none."""
    result: list[Fold] = []
    rows = parts == TRAIN
    for number in range(folds):
        inside = rows_of(data, rows)
        strategy = "random" if settings.strategy == "given" else settings.strategy
        inner = settings.model_copy(update={"strategy": strategy, "seed": derive_seed(seed, "fold", number)})
        try:
            inner_parts = split(inside, inner)
            inner_parts[inner_parts == VALIDATION] = (
                TEST  # a fold needs one held-out part, and as many rows as there are
            )
        except DataError:
            if not result:
                raise
            break
        result.append(Fold(inside, inner_parts))
        if settings.strategy in FORWARD:
            rows = rows.copy()
            rows[np.flatnonzero(rows)[inner_parts != TRAIN]] = False
    return result


def rows_of(data: Interactions, rows: np.ndarray) -> Interactions:
    """The same data set with only some of its interactions; users, items and numbers stay."""
    cut = {
        name: getattr(data, name)[rows]
        for name in ("users", "items", "positive", "timestamps", "ratings")
        if getattr(data, name) is not None
    }
    return replace(data, **cut, given_split=None)


def sampled_scores(
    members: MemberScores,
    rules: Mapping[str, Rule],
    asked: Question,
    settings: OutOfFoldSettings,
    seed: int,
) -> dict[str, list[FitRows]]:
    """For each rule the features of every user's positives and of unseen candidates.

    Features are made over the whole catalogue (standardisation and ranks need it) and cut to the candidates
    afterwards. A list is decided at its top, so each member's best `shortlist` items are all there, and a
    positive that no member has among them is left out: no weights can lift it. `negatives` drawn from the rest
    stand for as many candidates as they were drawn from.
    """
    random = np.random.default_rng(derive_seed(seed, "negatives"))
    users = asked.users
    if len(users) > settings.max_users:
        keep = np.zeros(asked.relevant.shape[0], bool)
        keep[random.choice(users, settings.max_users, replace=False)] = True
        users = np.flatnonzero(keep)
    shortlist = min(settings.shortlist, members.items)

    @tf.function(input_signature=[HISTORY_SPEC, tf.TensorSpec([None, members.items], tf.bool)])
    def scored(history: tf.Tensor, unseen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        scores, mask = members(history)
        lists = tf.where(mask & unseen[:, None, :], scores, -np.inf)
        values, items = tf.math.top_k(lists, shortlist)
        return scores, mask, tf.where(tf.math.is_finite(values), items, PADDING)

    @tf.function(reduce_retracing=True)
    def features_at(
        history: tf.Tensor, scores: tf.Tensor, mask: tf.Tensor, sample: tf.Tensor
    ) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor], tf.Tensor, dict[str, tf.Tensor]]:
        def at(tensor: tf.Tensor) -> tf.Tensor:
            return tf.gather(tensor, sample, axis=2, batch_dims=1)

        features = {name: rule.normalise(scores, mask) for name, rule in rules.items()}
        distances = {n: rule.distances(features[n], scores, mask) for n, rule in rules.items() if rule.guards}
        features = {name: at(values) for name, values in features.items()}
        context = members.context(history, sample)
        context = {name: tf.broadcast_to(values, tf.shape(sample)) for name, values in context.items()}
        return features, distances, at(mask), context

    result: dict[str, list[FitRows]] = {name: [] for name in rules}
    per_user = members.items * len(members.names) * (1 + len(rules))
    for block, history in blocks(asked.history, users, per_user):
        unseen = asked.open_to(block)
        scores, mask, best = scored(history, unseen)
        sample, labels, weights = _samples(unseen, asked.relevant[block], best.numpy(), settings.negatives, random)
        features, distances, known, context = features_at(history, scores, mask, sample)
        read = {name: values.numpy() for name, values in context.items()}
        for name, values in features.items():
            heard = known.numpy() & (weights > 0)[:, None]
            apart = distances[name].numpy() if name in distances else None
            result[name].append(FitRows(values.numpy(), heard, labels, weights, read, apart))
    return result


def _samples(
    unseen: np.ndarray, relevant: sparse.csr_matrix, best: np.ndarray, negatives: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Item numbers int32 `[B, K]`, labels bool `[B, K]`, weights float32 `[B, K]` (0 fills up short rows)."""
    rows = []
    for row, lists in enumerate(best):
        listed = np.unique(lists[lists >= 0])
        own = relevant.indices[relevant.indptr[row] : relevant.indptr[row + 1]]
        rest = unseen[row].copy()
        rest[listed] = False
        rest[own] = False
        pool = np.flatnonzero(rest)
        drawn = pool if len(pool) <= negatives else random.choice(pool, negatives, replace=False)
        weights = np.ones(len(listed) + len(drawn), np.float32)
        weights[len(listed) :] = len(pool) / max(len(drawn), 1)
        items = np.concatenate([listed, drawn])
        rows.append((items, np.isin(items, own), weights))
    width = max(len(items) for items, _, _ in rows)
    sample = np.zeros((len(rows), width), np.int32)
    labels = np.zeros((len(rows), width), bool)
    importance = np.zeros((len(rows), width), np.float32)
    for row, (items, positive, weights) in enumerate(rows):
        sample[row, : len(items)] = items
        labels[row, : len(items)] = positive
        importance[row, : len(items)] = weights
    return sample, labels, importance
