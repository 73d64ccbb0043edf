"""Content members: an encoder reads an item's text or image, a scorer turns the history over it into a score.

Three things make one: the encoder (exported as `embed_item`), a table of item embeddings made once (searched by
`search`), and a scorer trained with an in-batch softmax. A new item needs a row in the table and no training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import sparse

from fusion.activations import activations, embed_activations
from fusion.compat import keras, tf
from fusion.config import Settings, part_of
from fusion.embeddings import concatenate, embed, take
from fusion.errors import ConfigError, DataError
from fusion.progress import progress, reached
from fusion.registry import nearest
from fusion.submodels import SUBMODELS
from fusion.submodels.base import has_trunk
from fusion.submodels.warm_start import WarmStart
from fusion.training.optimizers import Group
from fusion.training.precision import Precision, narrow, wide
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings
from fusion.types import Features, History, RunOptions, derive_seed
from recsys.cells import read_cells
from recsys.collaborative.base import Decay, EmbeddingScorer, GrowingScorer, TrainingData, constant
from recsys.collaborative.pairs import Pairs, TowerMember, Towers, in_batch_softmax, train_towers
from recsys.schema import IMAGE

CONTENT = "item"
"""Name of the one content of a content member."""


@dataclass(frozen=True)
class Contents:
    """What an encoder made of the catalogue: what a new item is embedded by, and an example is compared with.

    Attributes:
        encoder: the submodel.
        columns: the text columns that it read, joined in this order.
        table: float32 `[I, D]`, embeddings scaled to unit length; rows of items without content are 0.
        available: bool `[I]`: the items that have such content.
    """

    encoder: Any
    columns: tuple[str, ...]
    table: np.ndarray
    available: np.ndarray


class FineTuning(Settings):
    """How the encoder itself is trained, when its `fine_tune` asks for it."""

    training: TrainingSettings = TrainingSettings(epochs=1, batch_size=32, learning_rate=3e-5)
    """The training loop over pairs of items that the same user took."""
    pairs: int = Field(8192, ge=32)
    """How many pairs are drawn."""
    temperature: float = Field(0.05, gt=0)
    """Divides cosines in the softmax."""


class Content(TowerMember):
    """Scores from what items show or say; speaks about cold items, and is silent where text or image is missing."""

    class Config(Settings):
        """Settings of a content member."""

        encoder: part_of(SUBMODELS)  # type: ignore[valid-type]
        """The submodel that embeds an item: text_bert, image_efficientnet, ..."""
        share: str = ""
        """Members that give the same word here have one encoder between them; joint training only."""
        columns: tuple[str, ...] = ()
        """Text columns, joined in this order; columns of a table, or patterns of names; unused for images."""
        init_from: str = ""
        """Folder of a fitted member, RUN/submodels/NAME, from whose encoder this one's starts, of a classification too:
        arrays of layers of the same name and shape, and the vocabulary."""
        dimensions: int = Field(128, ge=1, le=4096)
        """Length of the vectors in which histories and items are compared."""
        temperature: float = Field(0.1, gt=0)
        """Divides cosines in the softmax."""
        dropout: float = Field(0.2, ge=0, lt=1)
        """Share of an embedding's entries that training silences."""
        scorer: Literal["trained", "cosine"] = "trained"
        """Projections trained on who took what, or the plain cosine to the history's mean."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        training: TrainingSettings = TrainingSettings(epochs=20, batch_size=1024, learning_rate=0.001)
        """The training loop of the scorer."""
        fine_tuning: FineTuning = FineTuning()
        """The training loop of the encoder."""

    reads_content = True

    def __init__(self, config: Any, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.encoder = config.encoder.make(derive_seed(seed, "encoder"))
        self.adapted = False
        """Whether the encoder knows training values already, because it is shared."""
        self.copies: dict[Precision, Any] = {}
        """Of the encoder, those that are trained in mixed precision; shared as the encoder is."""
        self.start: WarmStart | None = None
        self.projection: np.ndarray | None = None
        """`[D, d]`, from embeddings to the vectors of candidates; None for plain cosines, and for members that were
        fitted by older code."""
        self.history_projection: np.ndarray | None = None
        """`[D, d]`, from embeddings to the vectors of items in histories; None as well where histories were projected
        out of other embeddings than the table's."""

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ConfigError for a text member without columns."""
        modality = config.encoder.registry[config.encoder.kind].modality
        if modality != "image" and not config.columns:
            raise ConfigError(f"a {modality} member must name its columns, as in 'columns: [title]'; received none.")

    @classmethod
    def depends_on_seed(cls, config: Any) -> bool:
        """Not where embeddings are used as they are and compared as they are."""
        return config.scorer == "trained" or not config.encoder.make(0).frozen

    @classmethod
    def joins(cls, config: Any) -> bool:
        """Plain cosines have nothing to train."""
        return bool(config.scorer == "trained")

    def start_from(self, start: WarmStart) -> None:
        """Lets the encoder start from another member's; called before fitting."""
        self.encoder.start_from(start)
        self.start = start

    def warm_start(self, origin: str) -> WarmStart:
        """What this member, fitted or loaded, gives to a new one: its encoder. Tables belong to their catalogue."""
        return WarmStart(origin, self.encoder, self.encoder.encoder())

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        values = self._read(data)
        if self.encoder.frozen:
            self.table = embedding_table(self.encoder, values, self.speaks, data, options, options.directory.name)
        else:
            self.table = self._fine_tune(values, self.speaks, data, options)
        if self.config.scorer == "cosine":
            self.tables = self.table, self.table
            return History(stopped="nothing to train")
        matrix = self._embeddable(data)
        with scope(options, self.config.training.precision):
            self.model = self._build(matrix)
        history = train_towers(self.model, self._scorer_now, data, Pairs(matrix), self.config, options)
        self._keep(self.table)
        return history

    def towers(self, data: TrainingData, options: RunOptions, precision: Precision = "float32") -> Towers:
        """An encoder that is trained embeds the targets; histories keep the embeddings that it started with."""
        values, name = self._read(data), options.directory.name
        if self.encoder.frozen:
            self.table = embedding_table(self.encoder, values, self.speaks, data, options, name)
            part = None
        else:
            part = TrainedPart(self.encoder, values, self.speaks, data, options, precision, self.copies)
            self.table = part.table()
        first, matrix = self.table, self._embeddable(data)
        with scope(options, precision):
            self.model = self._build(matrix, part)
        tuned = part.model.trainable_variables if part else []
        known = {id(variable) for variable in tuned}
        projections = [variable for variable in self.model.trainable_variables if id(variable) not in known]
        groups = [Group("projections", projections, self.config.training)]
        if part:
            groups.append(Group("encoder", tuned, self.config.fine_tuning.training))

        def finish() -> None:
            self.table = part.table() if part else first
            self._keep(first)

        more = {"gather": part.gather} if part else {}
        return Towers(self.model, self.config.temperature, groups, finish, **more)

    def _read(self, data: TrainingData) -> Any:
        """The raw values of all items; the encoder adapts to those of training items."""
        values, self.speaks = read_content(self.encoder, self.config.columns, data)
        if not self.adapted:
            self.encoder.adapt_to(_of_training(values, self.speaks, data))
        return values

    def _embeddable(self, data: TrainingData) -> sparse.csr_matrix:
        """Who took what, of the items that can be embedded."""
        matrix = (data.matrix @ sparse.diags(self.speaks.astype(np.float32))).tocsr()
        matrix.eliminate_zeros()
        return matrix

    def _build(self, matrix: sparse.csr_matrix, part: TrainedPart | None = None) -> keras.Model:
        """Two projections over the table; they start equal, so that the first scores are cosines.

        A history is the sum of all items of the user less the target, projected once: the same numbers as
        projecting each item, without reading L rows for every pair. With `part` the targets come out of it.
        """
        items, width = self.table.shape
        dimensions = min(self.config.dimensions, width)
        user = keras.Input((), dtype=tf.int32, name="user")
        target = keras.Input((), dtype=tf.int32, name="target")
        fixed = {"trainable": False, "dtype": "float32"}
        rows = keras.layers.Embedding(items, width, name="embeddings", **fixed)
        sums = keras.layers.Embedding(matrix.shape[0], width, name="history_sums", **fixed)
        own = rows(target)
        history = tf.math.l2_normalize(sums(user) - own, axis=-1)
        inputs = {"user": user, "target": target}
        if part:
            contents = {t.name: keras.Input(t.shape[1:], dtype=t.dtype, name=t.name) for t in part.model.inputs}
            own, inputs = _embed_once(part.model, contents, target), inputs | contents
        model = keras.Model(
            inputs,
            {
                "user": self._project(history, dimensions, "history_projection"),
                "item": self._project(own, dimensions, "item_projection"),
            },
        )
        rows.set_weights([self.table])
        sums.set_weights([matrix @ self.table])
        start = principal_axes(self.table[matrix.getnnz(axis=0) > 0], dimensions)  # items of training alone
        for name in ("history_projection", "item_projection"):
            model.get_layer(name).set_weights([start])
        return model

    def _project(self, vectors: tf.Tensor, dimensions: int, name: str) -> tf.Tensor:
        seed = derive_seed(self.seed, "dropout", name)
        kept = keras.layers.Dropout(self.config.dropout, rng_type="stateful", force_generator=True, seed=seed)(vectors)
        projected = wide(keras.layers.Dense(dimensions, use_bias=False, name=name)(kept))
        return narrow(tf.math.l2_normalize(projected, axis=-1))

    def _tables(self, of_histories: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The projected rows of items in histories, out of these embeddings, and of candidates, out of `table`."""
        history = of_histories @ self.model.get_layer("history_projection").get_weights()[0]
        item = self.table @ self.model.get_layer("item_projection").get_weights()[0]
        return history, item / np.maximum(np.linalg.norm(item, axis=1, keepdims=True), 1e-12)

    def _keep(self, of_histories: np.ndarray) -> None:
        self.projection = self.model.get_layer("item_projection").get_weights()[0]
        if of_histories is self.table:
            self.history_projection = self.model.get_layer("history_projection").get_weights()[0]
        self.tables = self._tables(of_histories)

    def _scorer_now(self) -> tf.Module:
        history, item = self._tables(self.table)
        return EmbeddingScorer(history, item, unit=True, decay=self.config.decay)

    def _fine_tune(self, values: Any, available: np.ndarray, data: TrainingData, options: RunOptions) -> np.ndarray:
        """Trains the encoder so that items taken by the same user lie close to each other; returns their table."""
        from fusion.training.trainer import fit

        precision = self.config.fine_tuning.training.precision
        part = TrainedPart(self.encoder, values, available, data, options, precision, self.copies)
        first, second = _pairs_of_items(data.matrix, available, self.config.fine_tuning.pairs, self.seed)
        weight = data.counts / max(data.counts.sum(), 1)

        def gather(positions: np.ndarray) -> Features:
            batch: Features = {"target": second[positions].astype(np.int32)}
            batch["probability"] = weight[second[positions]].astype(np.float32)
            for side, numbers in (("history", first[positions]), ("target", second[positions])):
                batch |= {f"{side}/{name}": array for name, array in part.gather(numbers).items()}
            return batch

        towers = _Towers(part.model)
        fit(
            part.model,
            in_batch_softmax(towers, self.config.fine_tuning.temperature),
            (len(first), gather),
            self.config.fine_tuning.training,
            RunOptions(options.seed, options.directory / "encoder", options.strategy, options.quiet),
            None,
            drop_remainder=True,
        )
        return part.table()

    def state(self) -> dict[str, np.ndarray]:
        adapted = {f"encoder/{name}": value for name, value in self.encoder.state().items()}
        if not self.encoder.frozen or self.config.init_from:  # frozen ones else come from where they came from
            weights = self.encoder.encoder().get_weights()
            adapted |= {f"weights/{number:04d}": weight for number, weight in enumerate(weights)}
        if self.projection is not None:
            adapted["item_projection"] = self.projection
        if self.history_projection is not None:
            adapted["history_projection"] = self.history_projection
        return {
            "embeddings": self.table,
            "history_table": self.tables[0],
            "item_table": self.tables[1],
            "speaks": self.speaks,
            **adapted,
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.table, self.speaks = state["embeddings"], state["speaks"]
        self.tables = state["history_table"], state["item_table"]
        self.projection, self.history_projection = state.get("item_projection"), state.get("history_projection")
        prefix = "encoder/"
        self.encoder.load_state({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        weights = [state[name] for name in sorted(state) if name.startswith("weights/")]
        if weights:
            self.encoder.encoder().set_weights(weights)

    def scorer(self) -> EmbeddingScorer:
        return EmbeddingScorer(*self.tables, unit=True, decay=self.config.decay)

    def direction(self, history: np.ndarray, embedding: np.ndarray) -> np.ndarray | None:
        """Where the score of an item lies in the space of embeddings: `[D]`, its product with `embedding` is the score.

        The cosine's denominator is held as it is for this embedding, so that the score is linear in the embedding and
        falls into parts (Stylianou et al. 2019, "Visualizing Deep Similarity Networks", decompose it so).

        Args:
            history: int32 `[L]`.
            embedding: float32 `[D]`, as the encoder makes it of the item.

        Returns:
            None where the member was fitted by code that did not keep what is needed.
        """
        user = self.scorer().user(tf.constant(history[None], tf.int32)).numpy()[0]
        if self.config.scorer == "cosine":
            towards, vector = user, embedding
        elif self.projection is None:
            return None
        else:
            towards, vector = self.projection @ user, embedding @ self.projection
        return np.asarray(towards / max(float(np.linalg.norm(vector)), 1e-12), np.float32)

    def with_table(self, table: np.ndarray) -> Content:
        """The same member over other embeddings of the catalogue, `[I, D]` of unit length, such as those of an encoder
        that was made smaller. What was trained stays: the projection of histories is read off the tables."""
        other = copy.copy(self)
        other.table = table
        if self.config.scorer == "cosine":
            other.tables = table, table
            return other
        if self.projection is None:
            raise DataError("a member must keep its projection to be given other embeddings; train it again.")
        item = table @ self.projection
        item /= np.maximum(np.linalg.norm(item, axis=1, keepdims=True), 1e-12)
        other.tables = (table @ self._projection_read_off()).astype(np.float32), item
        other.history_projection = None  # the new tables were read off
        return other

    def _projection_read_off(self) -> np.ndarray:
        """`[D, d]`: what comes nearest, over the catalogue, to projecting embeddings to the vectors of histories."""
        matrix: np.ndarray = np.linalg.lstsq(self.table[self.speaks], self.tables[0][self.speaks], rcond=None)[0]
        return matrix.astype(np.float32)

    def growing(self, spare: int) -> GrowingScorer | None:
        if self.config.scorer == "cosine":
            return GrowingContent(self.tables, spare, None, self.config.decay)
        if self.projection is None:  # fitted by older code
            return None
        of_histories = self._projection_read_off() if self.history_projection is None else self.history_projection
        return GrowingContent(self.tables, spare, (of_histories, self.projection), self.config.decay)

    def contents(self) -> dict[str, Contents]:
        return {CONTENT: Contents(self.encoder, self.config.columns, self.table, self.speaks)}


class GrowingContent(GrowingScorer):
    """The scorer of a content member, for whose new items an embedding is all that it takes.

    Args:
        tables: float32 `[I, d]` of items in histories, and of candidates.
        spare: rows behind them.
        projections: `[D, d]` from embeddings to either; None where the tables hold the embeddings.
        decay: of histories.
    """

    def __init__(
        self,
        tables: tuple[np.ndarray, np.ndarray],
        spare: int,
        projections: tuple[np.ndarray, np.ndarray] | None,
        decay: float,
    ) -> None:
        super().__init__()
        self.scorer = EmbeddingScorer(*(np.pad(t, [(0, spare), (0, 0)]) for t in tables), unit=True, decay=decay)
        names = ("new_item_history_projection", "new_item_projection")
        self.projections = [constant(m, tf.float32, n) for m, n in zip(projections or (), names, strict=False)]

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return self.scorer(history)

    def add(self, numbers: tf.Tensor, embeddings: Mapping[str, tf.Tensor]) -> tf.Tensor:
        embedding = embeddings[CONTENT]
        of_history, of_candidate = [embedding @ matrix for matrix in self.projections] or (embedding, embedding)
        length = tf.norm(of_candidate, axis=1, keepdims=True)
        self.scorer.history_table.write(numbers, of_history)
        self.scorer.item_table.write(numbers, of_candidate / tf.maximum(length, 1e-12))
        return tf.reduce_any(embedding != 0.0, axis=1)


def share_encoders(members: Mapping[str, Any], data: TrainingData) -> None:
    """Gives members of one `share` the encoder of the first of them: one object, one set of weights, which has adapted
    to what all of them read of training items."""
    shares: dict[str, list[Content]] = {}
    for member in members.values():
        if word := getattr(member.config, "share", ""):
            shares.setdefault(word, []).append(member)
    for group in shares.values():
        encoder = group[0].encoder
        read = [read_content(encoder, member.config.columns, data) for member in group]
        encoder.adapt_to(concatenate([_of_training(values, speaks, data) for values, speaks in read]))
        for member in group:
            member.encoder, member.adapted, member.copies = encoder, True, group[0].copies


def _of_training(values: Any, available: np.ndarray, data: TrainingData) -> Any:
    """Those of the items' values that are there and of training items."""
    return take(values, np.flatnonzero(available & (data.counts > 0)))


def read_content(encoder: Any, columns: Sequence[str], data: TrainingData) -> tuple[Any, np.ndarray]:
    """The raw values of all items (texts, uint8 `[I, H, W, 3]`, or cells), and which items have any, bool `[I]`."""
    return read_items(encoder, columns, data.catalogue, data.cache / "images")


def read_items(
    encoder: Any, columns: Sequence[str], catalogue: pd.DataFrame, cache: Path | None = None
) -> tuple[Any, np.ndarray]:
    """The same of the items of a table; decoded images are kept in `cache`."""
    if encoder.modality == "image":
        from fusion.images import load_images

        pixels, available, _ = load_images(list(catalogue[IMAGE]), encoder.config.image_size, cache)
        return pixels, available
    if encoder.modality == "tabular":
        return read_cells(catalogue, columns)
    texts = join_columns(catalogue, columns)
    return texts, np.array([bool(text) for text in texts])


def embedding_table(
    encoder: Any, values: Any, available: np.ndarray, data: TrainingData, options: RunOptions, name: str
) -> np.ndarray:
    """Embeddings of the available values, of unit length, float32 `[I, D]`, 0 for the others; kept in the cache."""
    rows = np.flatnonzero(available)
    with progress(f"embed {name}", len(rows), "items", quiet=options.quiet) as bar:
        vectors = embed(encoder, take(values, rows), data.cache / "embeddings", progress=reached(bar, len(rows)))
    return unit_table(vectors, available)


def unit_table(vectors: np.ndarray, available: np.ndarray) -> np.ndarray:
    """The table float32 `[I, D]` that holds, scaled to length 1, the vectors of the available items, and else 0."""
    table = np.zeros((len(available), vectors.shape[1]), np.float32)
    table[available] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return table


class TrainedPart:
    """What is trained of an encoder: a model, what it reads of an item, and the table of all items.

    Where some blocks are frozen they run once over the catalogue, and the model begins after them. In mixed precision
    a copy of the encoder is trained, whose weights the encoder takes over for the table: trunk and table are float32.

    Attributes:
        model: inputs by name -> embedding `[B, D]`.
    """

    def __init__(
        self,
        encoder: Any,
        values: Any,
        available: np.ndarray,
        data: TrainingData,
        options: RunOptions,
        precision: Precision,
        copies: dict[Precision, Any],
    ) -> None:
        self._encoder = self._trained = encoder
        self._available = available
        self._values = take(values, np.flatnonzero(available))
        self._row = np.cumsum(available) - 1  # of an available item among them
        with scope(options):
            encoder.unfreeze()
        with scope(options, precision):
            if precision != "float32":
                self._trained = copies[precision] = copies.get(precision) or _copy_of(encoder)
            self.model = self._trained.top() if has_trunk(encoder) else self._trained.encoder()
        self._kept = None
        if has_trunk(encoder):
            cache, name = data.cache / "embeddings", options.directory.name
            self._kept = activations(encoder, self._values, cache, name, quiet=options.quiet)

    def gather(self, items: np.ndarray) -> Features:
        """The model's inputs for some of the available items."""
        rows = self._row[items]
        if self._kept is not None:
            return self._kept.gather(rows)
        features: Features = self._encoder.trim(self._encoder.prepare(take(self._values, rows)))
        return features

    def table(self) -> np.ndarray:
        """Embeddings of the available items as the encoder is now, scaled to length 1, float32 `[I, D]`; else 0."""
        kept, encoder = self._kept, self._encoder
        if self._trained is not encoder:
            encoder.encoder().set_weights(self._trained.encoder().get_weights())
        vectors = embed(encoder, self._values) if kept is None else embed_activations(encoder, kept)
        return unit_table(vectors, self._available)


def _copy_of(encoder: Any) -> Any:
    """An encoder with weights of its own that are the same, in the precision of the scope."""
    copied = type(encoder)(encoder.config, encoder.seed)
    copied.load_state(encoder.state())
    copied.encoder().set_weights(encoder.encoder().get_weights())
    return copied


def _embed_once(encoder: keras.Model, contents: dict[str, tf.Tensor], target: tf.Tensor) -> tf.Tensor:
    """Unit embeddings `[b, D]` of the targets' contents; a target that stands in the batch twice is embedded once."""
    distinct, place = tf.unique(target)
    first = tf.math.unsorted_segment_min(tf.range(tf.size(target)), place, tf.size(distinct))
    vectors = encoder({name: tf.gather(tensor, first) for name, tensor in contents.items()})
    return tf.math.l2_normalize(tf.gather(vectors, place), axis=-1)


def join_columns(table: Any, columns: Sequence[str]) -> list[str]:
    """The text of each row: its non-empty columns joined by '. '; DataError names a column that is not there."""
    for column in columns:
        if column not in table:
            raise DataError(f"the table has no column '{column}': {nearest(column, table.columns)}")
    if not columns:
        return [""] * len(table)
    parts = [table[column].fillna("").astype(str).str.strip() for column in columns]
    return [". ".join(filter(None, row)) for row in zip(*parts, strict=True)]


def principal_axes(table: np.ndarray, dimensions: int) -> np.ndarray:
    """The leading eigenvectors `[D, dimensions]` of the table's Gram matrix: a projection that keeps cosines."""
    _, vectors = np.linalg.eigh(table.T @ table)
    return np.ascontiguousarray(vectors[:, ::-1][:, :dimensions]).astype(np.float32)


def _pairs_of_items(
    matrix: sparse.csr_matrix, available: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` pairs of different items that one user took, users drawn by the length of their history."""
    random = np.random.default_rng(derive_seed(seed, "item pairs"))
    users = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    drawn = random.integers(0, matrix.nnz, count)
    lengths = np.diff(matrix.indptr)[users[drawn]]
    other = matrix.indptr[users[drawn]] + (random.random(count) * lengths).astype(np.int64)
    first, second = matrix.indices[drawn], matrix.indices[other]
    keep = (first != second) & available[first] & available[second]
    return first[keep], second[keep]


class _Towers:
    """The encoder seen as the two towers that the loss expects, with the same weights on both sides."""

    def __init__(self, encoder: keras.Model) -> None:
        self.encoder = encoder

    def __call__(self, batch: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        sides = {}
        for side, output in (("history", "user"), ("target", "item")):
            inputs = {name.removeprefix(side + "/"): t for name, t in batch.items() if name.startswith(side + "/")}
            sides[output] = tf.math.l2_normalize(self.encoder(inputs, training=training), axis=-1)
        return sides
