"""A ranking's student: one small factor model that learned the lists of the whole ensemble, and then answers alone.

Its user is a sum of vectors of the history's items, its score the product with an item's vector plus the item's bias:
one gather, one product and a top-k, whatever the ensemble is made of.

The ensemble answers the histories of the training rows and random parts of them, so that the student learns how an
answer follows from a history and not who its users are. It learns each answer as a list (ranking distillation: Tang and
Wang 2018, arXiv:1809.07428; here with ListNet's cross-entropy of softened scores, Cao et al. 2007, in the place of
labels): the first items, and others drawn from the whole catalogue, among them those that nobody has taken.

Starting from a truncated singular value decomposition of the ensemble's scores was measured beside random vectors: it
learns faster and generalises worse (MovieLens with posters: 66 % of the first ten of users who were held out, and 70 %
from random vectors), so that vectors start at random.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.errors import ConfigError, DataError
from fusion.files import load_arrays, save_arrays
from fusion.progress import progress
from fusion.training.batches import Rows
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import Context, Features, RunOptions, derive_seed
from recsys.collaborative.base import Decay, Member, constant
from recsys.collaborative.tables import Table
from recsys.core import HISTORY_SPEC, RankingCore
from recsys.evaluation import SingleScorer, blocks, history_rows
from recsys.retrieval import pad_items, top_k

START = 0.4
"""Length of the vectors that training begins with."""

VISITORS = 50
"""Among so many histories one is empty: that of somebody of whom nothing is known."""

FIRST = 10
"""Of how many first items the agreement is told."""

RIDGE = 1e-3
"""Penalty of the regression that gives history vectors to items of no history, as a share of the mean square."""

LESSONS = "lessons.npz"
"""What the ensemble answered, beside the checkpoints of an interrupted training."""


class StudentSettings(Settings):
    """The small model that learns the answers of a whole ranking ensemble."""

    factors: int = Field(64, ge=1, le=2048)
    """Length of an item's vector."""
    decays: Annotated[tuple[Decay, ...], Field(min_length=1, max_length=4)] = (1.0, 0.9)
    """A user is the sum of one view of the history for each: what an item counts, relative to the one taken after it.
    Each view has a vector of its own for each item."""
    parts: int = Field(10, ge=0, le=1000)
    """Random parts of each history that the ensemble answers beside the whole one."""
    histories: int = Field(20_000, ge=1)
    """The most that the ensemble answers; of more some at random."""
    shortlist: int = Field(200, ge=1, le=10_000)
    """First items of an answer that are learned."""
    others: int = Field(200, ge=0, le=10_000)
    """Items drawn from the rest of the catalogue for each answer."""
    temperature: float = Field(0.5, gt=0, le=100)
    """What the ensemble's scores are divided by before the softmax, as a share of their standard deviation over the
    catalogue; large ones tell more of the items that are not the first."""
    held_out: float = Field(0.1, ge=0, le=0.5)
    """Share of the users whose histories only say when to stop; 0 trains for all epochs."""
    training: TrainingSettings = TrainingSettings(epochs=30, batch_size=64, learning_rate=0.003, patience=3)
    """The training loop; a row is a history."""


# ---- the model ---------------------------------------------------------------------------------------------------


class Student(NamedTuple):
    """What was learned.

    Attributes:
        history: float32 `[I, V * D]`, for each item the vectors of the V views side by side.
        item: float32 `[I, D]`.
        bias: float32 `[I]`.
        decays: of the views, `[V]`.
    """

    history: np.ndarray
    item: np.ndarray
    bias: np.ndarray
    decays: np.ndarray

    def scorer(self) -> StudentScorer:
        """Histories int32 `[B, L]`, padded with -1 -> scores float32 `[B, I]`."""
        return StudentScorer(self)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return self.history.size + self.item.size + self.bias.size

    def save(self, path: Path) -> None:
        """Writes it as `.npz`."""
        save_arrays(path, self._asdict())

    @classmethod
    def load(cls, path: Path) -> Student:
        """The inverse of `save`."""
        return cls(**load_arrays(path))


class StudentScorer(tf.Module):
    """Score = <user, item> + bias. Answers everybody: of an empty history the scores are the biases."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.decays = tuple(map(float, student.decays))
        self.history_table = Table(student.history, "history_table")
        self.item_table = Table(student.item, "item_table")
        self.bias = constant(student.bias, tf.float32, "bias")

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.scores(self.user(history))

    def user(self, history: tf.Tensor) -> tf.Tensor:
        """User vectors `[B, D]`."""
        return user_vectors(self.history_table.rows(tf.maximum(history, 0)), history, self.decays)

    def scores(self, user: tf.Tensor) -> tf.Tensor:
        """Scores `[B, I]` for user vectors `[B, D]`."""
        return tf.nn.bias_add(self.item_table.dot(user), self.bias)

    def columns(self, items: int) -> tuple[np.ndarray, np.ndarray]:
        """The item vectors `[D, W]` and biases `[W]` for a table of so many items or a few more, wherever products are
        fast: vectors as columns (`pad_items`), and -inf where there is no item that it was taught."""
        taught, dimensions = self.item_table.shape
        vectors = pad_items(np.concatenate([self.item_table.numpy(), np.zeros((items - taught, dimensions))]))
        beyond = vectors.shape[1] - taught
        return vectors, np.pad(self.bias.numpy(), (0, beyond), constant_values=-np.inf)

    def users(self, histories: sparse.csr_matrix) -> np.ndarray:
        """The vectors of stored histories `[U, I]`, and last that of an empty one: float32 `[U + 1, D]`."""
        result = np.zeros((histories.shape[0] + 1, self.item_table.shape[1]), np.float32)
        user = tf.function(self.user, input_signature=[HISTORY_SPEC])
        for rows, history in blocks(histories, np.arange(histories.shape[0])):
            result[rows] = user(history).numpy()
        return result


def user_vectors(rows: tf.Tensor, history: tf.Tensor, decays: tuple[float, ...]) -> tf.Tensor:
    """Vectors of histories' items `[B, L, V * D]` and the histories `[B, L]` -> users `[B, D]`: the sum over views of
    weighted sums, each over the root of its sum of squared weights (as `base.pool_history`, in one product)."""
    batch = tf.shape(history)[0]
    known = tf.cast(history >= 0, tf.float32)[..., None]  # [B, L, 1]
    later = tf.cumsum(known, axis=1, exclusive=True, reverse=True)
    weights = known * tf.pow(tf.constant(decays, tf.float32), later)  # of all views at once, [B, L, V]
    weights *= tf.math.rsqrt(tf.maximum(tf.reduce_sum(weights * weights, axis=1, keepdims=True), 1e-6))
    vectors = tf.reshape(rows, [batch, -1, rows.shape[-1] // len(decays)])
    pooled = tf.matmul(tf.reshape(weights, [batch, 1, -1]), vectors)
    return tf.squeeze(pooled, 1)


class StudentCore(tf.Module):
    """A student in the place of a `RankingCore`, for whoever measures and ranks: histories -> scores `[B, I]`."""

    def __init__(self, scorer: StudentScorer, items: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.members = SingleScorer(scorer, items)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.scorer(history)

    def rule(self, scores: tf.Tensor, mask: tf.Tensor, context: Context) -> tf.Tensor:
        """What its one member says, of everything and to everybody."""
        return scores[:, 0]


class _Factors(keras.layers.Layer):
    """The same while it is trained: histories int32 `[b, L]` and items int32 `[b, K]` -> scores `[b, K]`."""

    def __init__(self, items: int, settings: StudentSettings, seed: int, **names: Any) -> None:
        super().__init__(**names)
        self._items, self._settings, self._seed = items, settings, seed

    def build(self, input_shape: Any) -> None:
        factors, views = self._settings.factors, len(self._settings.decays)
        self.history = self._table("history", views * factors)
        self.item = self._table("item", factors)
        self.bias = self.add_weight("bias", (self._items,), initializer="zeros")
        super().build(input_shape)

    def _table(self, name: str, width: int) -> tf.Variable:
        spread = START * self._settings.factors**-0.5
        start = keras.initializers.RandomNormal(stddev=spread, seed=derive_seed(self._seed, name))
        return self.add_weight(name, (self._items, width), initializer=start)

    def call(self, inputs: Any) -> tf.Tensor:
        rows = tf.gather(self.history, tf.maximum(inputs["history"], 0))
        users = user_vectors(rows, inputs["history"], self._settings.decays)
        vectors, bias = tf.gather(self.item, inputs["items"]), tf.gather(self.bias, inputs["items"])
        return tf.squeeze(tf.matmul(vectors, users[..., None]), -1) + bias


# ---- what it learns from -----------------------------------------------------------------------------------------


class Lessons(NamedTuple):
    """Histories and what the ensemble answered.

    Attributes:
        history: `[n, I]`, the items of a row in the order in which they were taken.
        users: int64 `[n]`, whose history it is; -1 for nobody's.
        items: int32 `[n, K]`, the list that is learned.
        scores: float32 `[n, K]` in standard deviations over the catalogue, NaN for what does not count.
    """

    history: sparse.csr_matrix
    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray


def histories_of(
    matrix: sparse.csr_matrix, settings: StudentSettings, seed: int
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Histories `[n, I]` and whose they are, int64 `[n]`: of each user of `[U, I]` the whole one and `parts` of it, in
    turns the first items up to a random place and random ones of all; and empty ones of nobody, -1.

    Raises DataError where all are empty.
    """
    random = np.random.default_rng(seed)
    users = np.flatnonzero(np.diff(matrix.indptr))
    if not len(users):
        raise DataError("a student must have histories to learn from; the training rows hold no positive interaction.")
    drawn = np.repeat(users, 1 + settings.parts)
    if len(drawn) > settings.histories:
        drawn = np.sort(random.choice(drawn, settings.histories, replace=False))
    found = []
    for place, user in enumerate(drawn):
        whole = matrix.indices[matrix.indptr[user] : matrix.indptr[user + 1]]
        if place == 0 or drawn[place - 1] != user:
            found.append(whole)
        elif place % 2:
            found.append(whole[: random.integers(1, len(whole) + 1)])
        else:
            found.append(whole[random.random(len(whole)) < random.uniform(0.1, 1.0)])
    nobody = 1 + len(drawn) // VISITORS
    found += [np.zeros(0, np.int32)] * nobody
    starts = np.cumsum([0, *map(len, found)])
    ones = np.ones(starts[-1], np.float32)
    rows = sparse.csr_matrix((ones, np.concatenate(found), starts), shape=(len(found), matrix.shape[1]))
    return rows, np.append(drawn, np.full(nobody, -1))


def lessons(teacher: RankingCore, matrix: sparse.csr_matrix, settings: StudentSettings, options: RunOptions) -> Lessons:
    """What the ensemble answers to the histories of `matrix` `[U, I]`; what it answered is kept in the directory of
    `options`. Memory beside the result is bounded by a block of users."""
    history, users = histories_of(matrix, settings, derive_seed(options.seed, "histories"))
    kept = options.directory / LESSONS
    if kept.exists():
        return Lessons(history, users, **load_arrays(kept))
    random = np.random.default_rng(derive_seed(options.seed, "others"))
    items = matrix.shape[1]
    first, others = min(settings.shortlist, items), min(settings.others, items)
    ask = _asker(teacher, first)
    answers = {
        "items": np.empty((len(users), first + others), np.int32),
        "scores": np.empty((len(users), first + others), np.float32),
    }
    systems = len(teacher.members.names)
    with progress("teacher", len(users), "histories", quiet=options.quiet) as bar:
        for rows, block in blocks(history, np.arange(len(users)), systems * items):
            drawn = random.integers(0, items, (len(rows), others)).astype(np.int32)
            for name, array in zip(answers, ask(block, drawn), strict=True):
                answers[name][rows] = array.numpy()
            bar.advance(len(rows))
    options.directory.mkdir(parents=True, exist_ok=True)
    save_arrays(kept, answers)
    return Lessons(history, users, **answers)


def _asker(teacher: RankingCore, first: int) -> Any:
    """Histories `[b, L]` and items drawn `[b, M]` -> the list: items and scores `[b, first + M]`."""

    @tf.function(input_signature=[HISTORY_SPEC, tf.TensorSpec([None, None], tf.int32)])
    def ask(history: tf.Tensor, drawn: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        fused = teacher(history)
        heard = tf.math.is_finite(fused)
        count = tf.maximum(tf.reduce_sum(tf.cast(heard, tf.float32), axis=1, keepdims=True), 1.0)
        mean = tf.reduce_sum(tf.where(heard, fused, 0.0), axis=1, keepdims=True) / count
        gaps = tf.where(heard, fused - mean, 0.0)
        spread = tf.sqrt(tf.reduce_sum(gaps * gaps, axis=1, keepdims=True) / count)
        scores = tf.where(heard, gaps / tf.maximum(spread, 1e-12), -np.inf)
        # Nobody is recommended what they have: such items are of no list.
        rows = tf.broadcast_to(tf.range(tf.shape(history)[0])[:, None], tf.shape(history))
        taken = tf.boolean_mask(tf.stack([rows, history], axis=2), history >= 0)
        scores = tf.tensor_scatter_nd_update(scores, taken, tf.fill(tf.shape(taken)[:1], -np.inf))
        values, items = top_k(scores, first)
        said = tf.gather(scores, drawn, batch_dims=1)
        said = tf.where(said >= values[:, -1:], -np.inf, said)  # stands among the first already
        said = tf.concat([values, said], axis=1)
        said = tf.where(tf.math.is_finite(said), said, np.nan)
        return tf.concat([items, drawn], axis=1), said

    return ask


# ---- learning ----------------------------------------------------------------------------------------------------


def check_smaller(settings: StudentSettings, items: int, members: Iterable[Member]) -> None:
    """Raises ConfigError where a student for so many items holds as many numbers as the members, or more."""
    size, teacher = items * (settings.factors * (1 + len(settings.decays)) + 1), sum(m.parameters for m in members)
    if size >= teacher:
        raise ConfigError(
            f"a student must have fewer numbers than the ensemble that it replaces; it has {size:,}, the ensemble "
            f"{teacher:,}. Make factors smaller."
        )


def distil(
    teacher: RankingCore, matrix: sparse.csr_matrix, settings: StudentSettings, options: RunOptions
) -> tuple[Student, dict[str, Any]]:
    """Teaches a student what an ensemble answers to the histories of `matrix` `[U, I]`.

    Returns:
        The student, and facts for the report: `histories`, `parameters`, `epochs`, `best_epoch`; and where users are
        held out, of their histories `cross_entropy` and `agreement`, the share of the ensemble's first ten that is
        among the student's first ten, both of the lists that are learned.

    Raises DataError where there are no histories.
    """
    from fusion.compression.distillation import listwise  # brings all students; here is only this function needed

    taught = lessons(teacher, matrix, settings, options)
    held = _held_out(taught.users, settings, derive_seed(options.seed, "held out"))
    learned, judged = np.flatnonzero(~held), np.flatnonzero(held)
    model = _model(matrix.shape[1], settings, options.seed)

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        answer = model({name: batch[name] for name in ("history", "items")}, training=True)
        return listwise(answer, batch["teacher"], settings.temperature)

    rows = Rows(len(learned), lambda numbers: _batch(taught, learned[numbers]), taught.history.getnnz(axis=1)[learned])
    judge = Judge(model, taught, judged, settings.temperature) if len(judged) else None
    history = fit(model, loss, rows, settings.training, options, judge, "cross_entropy", higher_is_better=False)
    student = _learned(model, settings, taught.history[learned])
    best = history.epochs[history.best_epoch]
    return student, {
        "parameters": student.parameters,
        "histories": len(learned),
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch + 1,
        **{name: float(best[name]) for name in Judge.NAMES if name in best},
    }


def _held_out(users: np.ndarray, settings: StudentSettings, seed: int) -> np.ndarray:
    """bool `[n]`: the histories of users who only say when to stop; at least one user learns."""
    distinct = np.unique(users[users >= 0])
    count = min(round(settings.held_out * len(distinct)), len(distinct) - 1)
    return np.isin(users, np.random.default_rng(seed).permutation(distinct)[:count])


def _model(items: int, settings: StudentSettings, seed: int) -> keras.Model:
    inputs = {name: keras.Input((None,), dtype=tf.int32, name=name) for name in ("history", "items")}
    return keras.Model(inputs, _Factors(items, settings, seed, name="factors")(inputs))


def _batch(taught: Lessons, rows: np.ndarray) -> Features:
    return {
        "history": history_rows(taught.history, rows),
        "items": taught.items[rows],
        "teacher": taught.scores[rows],
    }


class Judge:
    """What the model says, after an epoch, of histories that it does not learn from.

    Called without arguments it returns the means of `cross_entropy` and `agreement` (see `distil`).
    """

    NAMES = ("cross_entropy", "agreement")

    def __init__(self, model: keras.Model, taught: Lessons, rows: np.ndarray, temperature: float) -> None:
        from fusion.compression.distillation import listwise

        self._taught, self._rows = taught, rows

        @tf.function(reduce_retracing=True)
        def judge(history: tf.Tensor, items: tf.Tensor, teacher: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            said = model({"history": history, "items": items})
            heard = tf.math.is_finite(teacher)
            first = min(FIRST, items.shape[1])
            theirs, ours = (
                tf.reduce_sum(tf.one_hot(tf.math.top_k(tf.where(heard, by, -np.inf), first)[1], items.shape[1]), axis=1)
                for by in (teacher, said)
            )
            return listwise(said, teacher, temperature), tf.reduce_sum(theirs * ours, axis=1) / first

        self._judge = judge

    def __call__(self) -> dict[str, float]:
        taught, found = self._taught, []
        for rows, history in blocks(taught.history, self._rows):
            said = self._judge(history, taught.items[rows], taught.scores[rows])
            found.append(np.stack([part.numpy() for part in said]))
        means = np.concatenate(found, axis=1).mean(axis=1)
        return dict(zip(self.NAMES, map(float, means), strict=True))


def _learned(model: keras.Model, settings: StudentSettings, histories: sparse.csr_matrix) -> Student:
    """The tables of the model that was trained on `histories` `[n, I]`. Of an item that stood in none of them the
    vectors that it has in histories follow from its own, as those of the others do by ridge regression: what the
    ensemble said of it shaped its own vector."""
    history, item, bias = (weight.numpy() for weight in model.get_layer("factors").weights)
    known = histories.getnnz(axis=0) > 0
    gram = item[known].T @ item[known]
    penalty = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram), dtype=np.float32)
    follows = np.linalg.solve(gram + penalty, item[known].T @ history[known])
    history[~known] = item[~known] @ follows
    return Student(history, item, bias, np.asarray(settings.decays, np.float32))
