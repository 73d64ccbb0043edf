"""Scores for learned rules: each member is fitted without the rows of a fold, and then scores that fold.

The folds look like the test: the experiment's own split is applied again inside the training rows, so a
temporal split gives folds that lie later than what they are scored with, and a split by items gives folds of
cold items. Weights fitted on folds that do not look like the test do not transfer to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fusion.compat import tf
from fusion.errors import DataError
from fusion.rules.base import Rule
from fusion.types import derive_seed
from recsys.core import HISTORY_SPEC, MemberScores
from recsys.evaluation import Question, blocks, question
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
            inner_parts[inner_parts == VALIDATION] = TEST  # a fold needs one held-out part, and as many rows as there are
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


@dataclass
class FoldScores:
    """What a learned rule is fitted on: features `[N, S, K]`, mask `[N, S, K]`, labels `[N, K]`, weights `[N, K]`."""

    features: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    @classmethod
    def join(cls, parts: list[FoldScores]) -> FoldScores:
        """All blocks of users, padded to the longest list of candidates with weight 0."""
        width = max(part.labels.shape[1] for part in parts)

        def widen(array: np.ndarray) -> np.ndarray:
            pad = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
            return np.pad(array, pad)

        return cls(*(np.concatenate([widen(getattr(p, f)) for p in parts]) for f in cls.__annotations__))


def sampled_scores(
    members: MemberScores,
    rules: Mapping[str, Rule],
    asked: Question,
    settings: OutOfFoldSettings,
    seed: int,
) -> dict[str, list[FoldScores]]:
    """For each rule the features of every user's positives and of `negatives` sampled unseen candidates.

    Features are made over the whole catalogue (standardisation and ranks need it) and cut to the sample
    afterwards. A sampled negative weighs as many candidates as it stands for.
    """
    random = np.random.default_rng(derive_seed(seed, "negatives"))
    users = asked.users
    if len(users) > settings.max_users:
        keep = np.zeros(asked.relevant.shape[0], bool)
        keep[random.choice(users, settings.max_users, replace=False)] = True
        users = np.flatnonzero(keep)

    @tf.function(input_signature=[HISTORY_SPEC, tf.TensorSpec([None, None], tf.int32)])
    def features_at(history: tf.Tensor, sample: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        scores, mask = members(history)
        at = lambda tensor: tf.gather(tensor, sample, axis=2, batch_dims=1)  # noqa: E731
        return {name: at(rule.normalise(scores, mask)) for name, rule in rules.items()}, at(mask)

    result: dict[str, list[FoldScores]] = {name: [] for name in rules}
    for block, history in blocks(asked.history, users):
        for rows, sample, labels, weights in _samples(asked, block, settings.negatives, random):
            features, mask = features_at(history[rows], sample)
            for name, values in features.items():
                result[name].append(FoldScores(values.numpy(), mask.numpy() & (weights > 0)[:, None], labels, weights))
    return result


Sample = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _samples(asked: Question, users: np.ndarray, negatives: int, random: np.random.Generator) -> Iterator[Sample]:
    """Rows of the block, item numbers int32 `[b, K]`, labels bool `[b, K]`, weights float32 `[b, K]`.

    Users are grouped by how many positives they have, so that short lists are not padded to the longest one.
    """
    unseen = asked.candidates & (asked.seen[users].toarray() == 0)
    positives = asked.relevant[users]
    counts = np.diff(positives.indptr)
    order = np.argsort(counts, kind="stable")
    for rows in np.array_split(order, max(1, len(order) // 64)):
        width = int(counts[rows].max()) + negatives
        sample = np.zeros((len(rows), width), np.int32)
        labels = np.zeros((len(rows), width), bool)
        weights = np.zeros((len(rows), width), np.float32)
        for place, row in enumerate(rows):
            own = positives.indices[positives.indptr[row] : positives.indptr[row + 1]]
            pool = np.flatnonzero(unseen[row])
            pool = pool[~np.isin(pool, own)]
            drawn = pool if len(pool) <= negatives else random.choice(pool, negatives, replace=False)
            stop = len(own) + len(drawn)
            sample[place, :stop] = np.concatenate([own, drawn])
            labels[place, : len(own)] = True
            weights[place, : len(own)] = 1.0
            weights[place, len(own) : stop] = len(pool) / max(len(drawn), 1)
        yield rows, sample, labels, weights

