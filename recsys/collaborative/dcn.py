"""DCN-v2: a cross network over features of a history and a candidate, for the best candidates of two towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from scipy import sparse

from fusion.compat import keras, tf, tfrs
from fusion.config import Settings
from fusion.errors import ConfigError
from fusion.training.precision import narrow, wide
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings
from fusion.types import Features, History, RunOptions, derive_seed
from recsys.collaborative.base import PADDING, Member, TrainingData, constant, padded_numbers, recency, with_padding_row
from recsys.collaborative.features import MOST_DEVIATIONS, ItemFeatures
from recsys.collaborative.pairs import HistoryPairs
from recsys.collaborative.two_tower import Mlp, TowerScorer, TwoTower, unit
from recsys.metrics import parse_metric

EXCLUDED = -1e9
"""First-stage score of what stands in the history: nobody is offered it again, so it must not fill the shortlist."""
GAP = 0.01
"""How far the last of the shortlist stands above all other items."""
SAMPLE = 2048
"""Pairs whose features decide about means and deviations."""


class DeepCross(Member):
    """DCN-v2 (Wang et al. 2021, "DCN V2: Improved Deep & Cross Network ...") over the shortlist of two towers.

    A forward pass over the whole catalogue would hold B × I × F numbers. So there are two stages in one member: two
    towers score all items by a product, the `shortlist` best items outside the history are scored by

        x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l        (eq. 2; `rank: null` takes one full matrix, eq. 1)

    and dense layers after it, and this is added to the product. All other items stay below them in the order of the
    first stage. x_0 holds the user's and the item's vector, their product, the item's columns and aggregates, their
    means over the history and its length, the cosine between item and history of each encoder, and the product itself.

    The towers are fitted first and then left as they are; the cross network is trained with negatives from the users'
    shortlists and from the whole catalogue. Its last layer starts at zero, so that training starts from the ranking of
    the first stage. On the pairs that the towers were fitted on, their score is better than it will be on anybody's
    next item; `held_out` keeps a share of the users from them, on whom alone the cross network is then trained. With a
    few hundred or thousand users the towers lose as much by it as the ranking gains.
    """

    class Config(Settings):
        """Settings of both stages."""

        towers: TwoTower.Config = TwoTower.Config(
            training=TrainingSettings(epochs=8, batch_size=1024, learning_rate=0.003, patience=3)
        )
        """The first stage. Where nothing may be validated it is trained for all its epochs."""
        shortlist: int = Field(200, ge=2, le=5000)
        """How many items of each user the cross network ranks."""
        cross_layers: int = Field(2, ge=1, le=8)
        """Cross layers; each raises the degree of the crossings by one."""
        rank: Annotated[int, Field(ge=1, le=1024)] | None = 32
        """Rank of the matrices U V; null for one full matrix."""
        hidden: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = (64,)
        """Widths of the dense layers after the cross layers."""
        dropout: float = Field(0.5, ge=0, lt=1)
        """Share of hidden units that training silences."""
        held_out: float = Field(0.0, ge=0, lt=1)
        """Share of the users on whom the cross network alone is trained; 0 trains both stages on everybody."""
        loss: Literal["softmax", "pointwise"] = "softmax"
        """Softmax over the item and its negatives, or each of them on its own as yes or no."""
        hard_negatives: int = Field(16, ge=0, le=1000)
        """Negatives a pair out of the user's shortlist."""
        uniform_negatives: int = Field(16, ge=0, le=1000)
        """Negatives a pair out of the whole catalogue."""
        training: TrainingSettings = TrainingSettings(epochs=8, batch_size=256, learning_rate=0.001, patience=3)
        """The training loop of the cross network."""

    reads_content = True
    accelerations = ("precision", "xla")

    def __init__(self, config: Any, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.towers = TwoTower(config.towers, derive_seed(seed, "towers"))

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ConfigError for what the towers refuse, and for a cross network without negatives."""
        TwoTower.check(config.towers)
        if not config.hard_negatives + config.uniform_negatives:
            raise ConfigError("a cross network must have negatives; received hard_negatives 0 and uniform_negatives 0.")

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        first, second = self._parts(data.matrix)
        within = RunOptions(
            derive_seed(options.seed, "towers"), options.directory / "towers", options.strategy, options.quiet
        )
        self.towers.fit(replace(data, matrix=first), within)
        self.features, self.speaks = self.towers.features, self.towers.speaks
        pairs = CandidatePairs(data.matrix, second, self.config, self.towers.scorer(), derive_seed(self.seed, "pairs"))
        self.inputs = self._inputs(self.features.table, self.features.widths)
        self.scale = self._fitted_scale(pairs)
        with scope(options, self.config.training.precision):
            self.model = self._build()
        history = self._train(pairs, data, options)
        self.learned = self._learned()
        return history

    def _parts(self, matrix: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """The rows that the towers are fitted on and those of the cross network, each with nothing in the others.

        Everybody teaches both where the users that are held out would leave one of the two without a pair.
        """
        random = np.random.default_rng(derive_seed(self.seed, "held out"))
        held = random.random(matrix.shape[0]) < self.config.held_out
        first, second = (only(matrix, users) for users in (~held, held))
        enough = all(np.diff(part.indptr).max(initial=0) >= 2 for part in (first, second))
        return (first, second) if enough else (matrix, matrix)

    def _fitted_scale(self, pairs: CandidatePairs) -> tuple[np.ndarray, np.ndarray]:
        """Mean and 1 / deviation `[F]` of the features of some pairs; what does not vary gets 0."""
        random = np.random.default_rng(derive_seed(self.seed, "scale"))
        batch = pairs.gather(random.permutation(len(pairs))[:SAMPLE])
        candidates = tf.constant(np.maximum(batch["candidates"], 0))
        values = self.inputs(tf.constant(batch["history"]), candidates)[0].numpy()
        values = values[batch["candidates"] >= 0]
        deviation = values.std(axis=0)
        usable = deviation > 1e-6
        return values.mean(axis=0), np.where(usable, 1.0 / np.where(usable, deviation, 1.0), 0.0).astype(np.float32)

    def _build(self) -> keras.Model:
        """Scaled features `[b, C, F]` -> what is added to the first stage's scores `[b, C]`."""
        width = len(self.scale[0])
        inputs = keras.Input((None, width), name="features")
        first = x = narrow(inputs)
        for number in range(self.config.cross_layers):
            start = keras.initializers.TruncatedNormal(
                stddev=1.0 / np.sqrt(width), seed=derive_seed(self.seed, "cross", number)
            )
            layer = tfrs().layers.dcn.Cross(self.config.rank, kernel_initializer=start, name=f"cross_{number}")
            x = layer(first, x)
        for number, units in enumerate(self.config.hidden):
            begin = keras.initializers.HeNormal(seed=derive_seed(self.seed, "deep", number))
            x = keras.layers.Dense(units, activation="relu", kernel_initializer=begin, name=f"deep_{number}")(x)
            x = keras.layers.Dropout(
                self.config.dropout,
                rng_type="stateful",
                force_generator=True,
                seed=derive_seed(self.seed, "dropout", number),
            )(x)
        added = keras.layers.Dense(1, kernel_initializer="zeros", name=f"deep_{len(self.config.hidden)}")(x)
        return keras.Model(inputs, added[..., 0])

    def _train(self, pairs: CandidatePairs, data: TrainingData, options: RunOptions) -> History:
        from fusion.training.trainer import fit  # the trainer is not needed where fitted members are only scored

        mean, factor = self.scale
        loss_of = softmax_loss if self.config.loss == "softmax" else pointwise_loss

        def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
            candidates = batch["candidates"]
            values, base = self.inputs(batch["history"], tf.maximum(candidates, 0))
            scores = base + wide(self.model(standardised(values, mean, factor), training=True))
            drawn = pairs.log_probability(base, batch["last"][:, None] / self.config.towers.temperature)
            return loss_of(scores - drawn, candidates >= 0)

        validate = data.validate
        return fit(
            self.model,
            loss,
            (len(pairs), pairs.gather),
            self.config.training,
            options,
            (lambda: validate(self._scorer_of(self._learned()))) if validate else None,
            data.monitor,
            parse_metric(data.monitor, "candidates").higher_is_better,
        )

    def _learned(self) -> dict[str, np.ndarray]:
        """What `state` returns but for the towers and `speaks`."""
        arrays = {"embeddings": self.features.table, "widths": np.array(self.features.widths, np.int32)}
        arrays |= {"scale/mean": self.scale[0], "scale/factor": self.scale[1]}
        for number in range(self.config.cross_layers):
            *kernels, bias = self.model.get_layer(f"cross_{number}").get_weights()
            arrays |= {f"cross/{number}/kernel{place}": kernel for place, kernel in enumerate(kernels)}
            arrays[f"cross/{number}/bias"] = bias
        for number in range(len(self.config.hidden) + 1):
            kernel, bias = self.model.get_layer(f"deep_{number}").get_weights()
            arrays |= {f"deep/{number}/kernel": kernel, f"deep/{number}/bias": bias}
        return arrays

    def _scorer_of(self, learned: dict[str, np.ndarray]) -> DeepCrossScorer:
        widths = tuple(int(width) for width in learned["widths"])
        inputs = self._inputs(learned["embeddings"], widths)
        return DeepCrossScorer(inputs, CrossNetwork(learned), self.config.shortlist)

    def _inputs(self, table: np.ndarray, widths: tuple[int, ...]) -> CandidateFeatures:
        return CandidateFeatures(self.towers.scorer(), table, widths, self.config.towers.temperature)

    def state(self) -> dict[str, np.ndarray]:
        return {**self.towers.state(), **self.learned}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        own = ("embeddings", "widths", "scale/", "cross/", "deep/")
        self.learned = {name: array for name, array in state.items() if name.startswith(own)}
        self.towers.load_state({name: array for name, array in state.items() if not name.startswith(own)})
        self.speaks = self.towers.speaks

    def scorer(self) -> DeepCrossScorer:
        return self._scorer_of(self.learned)


# ---- what it is trained on -----------------------------------------------------------------------------------


class CandidatePairs(HistoryPairs):
    """Pairs with negatives: `history` `[b, L]`, `candidates` `[b, 1 + negatives]`, the item to be found first, and
    `last` `[b]`, the first stage's score of the last item in the user's shortlist.

    Negatives are items of training alone, because nothing says that nobody wants a cold one; those that the user took
    are -1. They are drawn anew in every epoch, by the rows of a batch and the seed alone, so that an interrupted
    training continues with the same ones.

    Args:
        matrix: `[U, I]`, all that is known to have been taken.
        chosen: the rows of it that pairs are made of.
        config: of the member.
        first: the first stage, whose shortlists give the hard negatives.
        seed: of everything that is drawn.
    """

    def __init__(
        self, matrix: sparse.csr_matrix, chosen: sparse.csr_matrix, config: Any, first: TowerScorer, seed: int
    ) -> None:
        super().__init__(chosen, config.towers.max_history, seed)
        self.items, self.seed = matrix.shape[1], seed
        self.trained = matrix.getnnz(axis=0) > 0
        self.numbers = np.flatnonzero(self.trained).astype(np.int32)
        self.hard, self.uniform = config.hard_negatives, config.uniform_negatives
        self.last, self.shortlists = shortlists(first, chosen, self.numbers, config.shortlist)
        owner = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
        self.taken = np.sort(owner * self.items + matrix.indices)

    def gather(self, positions: np.ndarray) -> Features:
        batch, users = super().gather(positions), self.users[positions]
        random = np.random.default_rng([self.seed, *positions[:8].tolist()])
        places = random.integers(0, self.shortlists.shape[1], (len(users), self.hard))
        uniform = self.numbers[random.integers(0, len(self.numbers), (len(users), self.uniform))]
        negatives = np.concatenate([self.shortlists[users[:, None], places], uniform], axis=1)
        negatives[self._are_taken(users, negatives) | ~self.trained[negatives]] = PADDING
        candidates = np.concatenate([batch["target"][:, None], negatives], axis=1)
        return {"history": batch["history"], "candidates": candidates, "last": self.last[users]}

    def log_probability(self, scores: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        """How often items with these first scores are drawn, as a logarithm: those of the shortlist far more often.

        Without this correction (Yi et al. 2019) the network would learn to push whatever is on a shortlist down.
        """
        uniform = max(self.uniform, 1) / len(self.numbers)
        inside = self.hard / self.shortlists.shape[1] + uniform
        return tf.where(scores >= last, np.float32(np.log(inside)), np.float32(np.log(uniform)))

    def _are_taken(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """bool `[b, N]`: whether the user of the row took the item."""
        cells = users[:, None].astype(np.int64) * self.items + items
        places = np.minimum(np.searchsorted(self.taken, cells), len(self.taken) - 1)
        return self.taken[places] == cells


def only(matrix: sparse.csr_matrix, users: np.ndarray) -> sparse.csr_matrix:
    """The matrix with nothing in the rows outside `users` (bool `[U]`); the order of the others stays."""
    lengths = np.diff(matrix.indptr)
    kept = np.repeat(users, lengths)
    starts = np.concatenate([[0], np.cumsum(np.where(users, lengths, 0))]).astype(matrix.indptr.dtype)
    return sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], starts), shape=matrix.shape)


def shortlists(
    first: TowerScorer, matrix: sparse.csr_matrix, among: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best items of each user outside the history and `among` the given ones: the last one's score float32 `[U]`,
    and the numbers int32 `[U, S]`; 0 for users without a history. Where those do not suffice, others fill the row."""
    from recsys.evaluation import blocks

    users, items = np.flatnonzero(np.diff(matrix.indptr)), matrix.shape[1]
    length = min(length, len(among))
    last, result = np.zeros(matrix.shape[0], np.float32), np.zeros((matrix.shape[0], length), np.int32)
    barred = np.full(items, EXCLUDED, np.float32)
    barred[among] = 0.0
    best = tf.function(
        lambda history: shortlist(first(history) + barred, history, length),
        input_signature=[tf.TensorSpec([None, None], tf.int32)],
    )
    for rows, history in blocks(matrix, users, items):
        values, numbers = best(tf.constant(history))
        last[rows], result[rows] = values[:, -1].numpy(), numbers.numpy()
    return last, result


def softmax_loss(scores: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """`[b]`: -log of the softmax over the valid ones of `[b, C]`, at the first."""
    masked = tf.where(valid, scores, EXCLUDED)
    return tf.reduce_logsumexp(masked, axis=1) - masked[:, 0]


def pointwise_loss(scores: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """`[b]`: logistic loss of the first of `[b, C]` as a yes and, as much in all, of the other valid ones as a no."""
    no = tf.where(valid, tf.math.softplus(scores), 0.0)[:, 1:]
    count = tf.reduce_sum(tf.cast(valid[:, 1:], tf.float32), axis=1)
    return tf.math.softplus(-scores[:, 0]) + tf.reduce_sum(no, axis=1) / tf.maximum(count, 1.0)


# ---- what it is scored with ----------------------------------------------------------------------------------


def shortlist(scores: tf.Tensor, history: tf.Tensor, length: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The largest of `[B, I]` outside the histories `[B, L]`: values `[B, S]`, descending, and item numbers."""
    shape = tf.shape(scores)
    columns = tf.where(history < 0, shape[1], history)
    rows = tf.zeros_like(columns) + tf.range(shape[0])[:, None]
    marks = tf.scatter_nd(tf.stack([rows, columns], axis=-1), tf.ones_like(columns), [shape[0], shape[1] + 1])
    return tf.math.top_k(tf.where(marks[:, :-1] > 0, EXCLUDED, scores), min(length, scores.shape[1]))


class CandidateFeatures(tf.Module):
    """The cross network's inputs: histories `[B, L]`, candidates `[B, C]` -> `[B, C, F]`, and first scores `[B, C]`.

    Args:
        towers: the first stage.
        table: the items' features `[I, F]`, as `ItemFeatures` has them, with their `widths`.
        temperature: divides the first stage's scores, as in its own softmax.
    """

    def __init__(self, towers: TowerScorer, table: np.ndarray, widths: tuple[int, ...], temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        features = ItemFeatures(table, widths, np.zeros(0, bool))
        self.towers, self.widths = towers, widths[:-2]
        self.content = constant(with_padding_row(table[:, : sum(self.widths)]), tf.float32, "content")
        self.statistics = constant(features.statistics, tf.float32, "statistics")

    def __call__(self, history: tf.Tensor, candidates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pooled, of_user = self.towers.describe(history)
        item = self.towers.item_table.rows(candidates)  # [B, C, D]
        user, product = nearest(self.towers.of(pooled, of_user), item)
        base = product / self.temperature
        repeated = tf.zeros_like(base)[..., None] + of_user[:, None]
        parts = [user, item, user * item, tf.gather(self.statistics, candidates), repeated, base[..., None]]
        return tf.concat([*parts, *self._similarities(history, candidates)], axis=-1), base

    def _similarities(self, history: tf.Tensor, candidates: tf.Tensor) -> list[tf.Tensor]:
        """`[B, C, 1]` of each encoder: the cosine between a candidate and the mean of the history."""
        if not self.widths:
            return []
        taken = tf.gather(self.content, padded_numbers(history, self.content.shape[0] - 1))
        sums = tf.reduce_sum(taken * recency(history, self.towers.decay)[..., None], axis=1)
        offered = tf.gather(self.content, candidates)
        return [
            tf.matmul(of_item, unit(of_user)[..., None])
            for of_user, of_item in zip(
                tf.split(sums, self.widths, axis=-1), tf.split(offered, self.widths, axis=-1), strict=True
            )
        ]


def nearest(users: tf.Tensor, items: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Of user vectors `[B, K, D]` the nearest to each item of `[B, C, D]`: `[B, C, D]`, and the products `[B, C]`."""
    products = tf.matmul(items, users, transpose_b=True)  # [B, C, K]
    if users.shape[1] == 1:
        return tf.zeros_like(items) + users, products[..., 0]
    chosen = tf.one_hot(tf.argmax(products, axis=-1, output_type=tf.int32), users.shape[1])
    return tf.matmul(chosen, users), tf.reduce_max(products, axis=-1)


class CrossNetwork(tf.Module):
    """Features `[.., F]` -> what is added to the first stage's score `[..]`: cross layers, then dense ones."""

    def __init__(self, learned: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.mean = constant(learned["scale/mean"], tf.float32)
        self.factor = constant(learned["scale/factor"], tf.float32)
        count = sum(name.startswith("cross/") and name.endswith("/bias") for name in learned)
        self.layers = [
            (
                [
                    constant(learned[name], tf.float32)
                    for name in (f"cross/{number}/kernel0", f"cross/{number}/kernel1")
                    if name in learned
                ],
                constant(learned[f"cross/{number}/bias"], tf.float32),
            )
            for number in range(count)
        ]
        self.deep = Mlp(learned, "deep")

    def __call__(self, features: tf.Tensor) -> tf.Tensor:
        scaled = standardised(features, self.mean, self.factor)
        x = scaled
        for kernels, bias in self.layers:
            x = cross(scaled, x, kernels, bias)
        return self.deep(x)[..., 0]


def standardised(features: tf.Tensor, mean: Any, factor: Any) -> tf.Tensor:
    """Features less their mean over their deviation, cut to 3: a product of outliers would drown all other scores."""
    return tf.clip_by_value((features - mean) * factor, -MOST_DEVIATIONS, MOST_DEVIATIONS)


def cross(first: tf.Tensor, x: tf.Tensor, kernels: list[tf.Tensor], bias: tf.Tensor) -> tf.Tensor:
    """One cross layer: `first` * (x W + bias) + x, W being the product of `kernels` (Wang et al. 2021, eq. 1 and 2)."""
    product = x
    for kernel in kernels:
        product = tf.matmul(product, kernel)
    return first * (product + bias) + x


class DeepCrossScorer(tf.Module):
    """Histories `[B, L]` -> scores `[B, I]`: above 0 for the shortlist, at most 0 for all others.

    Memory is bounded by B × shortlist × F. Items of the history stand with the first of the others.
    """

    def __init__(self, inputs: CandidateFeatures, network: CrossNetwork, length: int) -> None:
        super().__init__()
        self.inputs, self.network, self.length = inputs, network, length

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        first = self.inputs.towers(history)
        values, numbers = shortlist(first, history, self.length)
        features, base = self.inputs(history, numbers)
        ranked = base + self.network(features)
        lifted = ranked - tf.reduce_min(ranked, axis=1, keepdims=True) + GAP
        last = values[:, -1:]
        rows = tf.zeros_like(numbers) + tf.range(tf.shape(numbers)[0])[:, None]
        placed = tf.scatter_nd(tf.stack([rows, numbers], axis=-1), lifted, tf.shape(first))
        return tf.where(placed > 0, placed, tf.minimum(first, last) - last)
