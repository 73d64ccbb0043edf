"""The recommender that is served: ids in, ids out. Id tables, what has been seen, filters and top-k around the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import sparse

from fusion.compat import keras, tf
from fusion.errors import ConfigError
from recsys.collaborative.base import PADDING, Member, constant
from recsys.collaborative.content import Contents
from recsys.core import RankingCore, Said
from recsys.retrieval import top_k

UNSCORED = float(np.finfo(np.float32).min)
"""Score of a candidate about which no member says anything: finite, because JSON has no infinity."""


def _ids(name: str, rank: int) -> tf.TensorSpec:
    return tf.TensorSpec([None] * rank, tf.string, name=name)


class ServedRecommender(tf.Module):
    """Signatures over string ids, each input with the leading axis B, lists padded with ''.

    Args:
        core: members and rule.
        item_ids: `[I]` str, by number.
        user_ids: `[U]` str, by number.
        history: `[U, I]` positives that the members score from.
        seen: `[U, I]` everything that is never recommended again.
        k_max: longest list that is returned.
        contents: what content members read, by name (`contents_of`): exported as `embed_item_<name>`, which embeds
            a new item, and `search_<name>`, which finds items by an example.
    """

    def __init__(
        self,
        core: RankingCore,
        item_ids: np.ndarray,
        user_ids: np.ndarray,
        history: sparse.csr_matrix,
        seen: sparse.csr_matrix,
        k_max: int,
        contents: Mapping[str, Contents] | None = None,
    ) -> None:
        super().__init__()
        self.core = core
        self.items = len(item_ids)
        self.k_max = k_max
        self.item_ids = tf.Variable(np.append(item_ids.astype(object), ""), trainable=False, name="item_ids")
        self.item_table = _id_table(item_ids)
        self.user_table = _id_table(user_ids)
        self.history = _Rows(history, "history")
        self.seen = _Rows(seen, "seen")
        self.embed: dict[str, Any] = {}
        self.search: dict[str, Any] = {}
        # Not the models: of these Keras would write every layer's functions as well, ten times as slowly.
        self.encoder_variables: dict[str, Any] = {}
        shared: dict[Any, tuple[Any, list[tf.Variable]]] = {}
        for name, content in (contents or {}).items():
            key = content.encoder.fingerprint(), content.columns  # members that read alike are traced and written once
            if key not in shared:
                encoder, table = content.encoder.encoder(), constant(content.table.T, tf.float32, "search_table")
                shared[key] = embed_function(encoder), [*encoder.variables, table]
            self.embed[name], variables = shared[key]
            silent = constant(np.where(content.available, 0.0, -np.inf), tf.float32, "search_silent")
            self.search[name] = self._search_function(self.embed[name], variables[-1], silent)
            self.encoder_variables[name] = [*variables, silent]

    def signatures(self) -> dict[str, Any]:
        """Concrete functions by signature name."""
        functions = {
            "serving_default": self.score.get_concrete_function(),
            "recommend": self.recommend.get_concrete_function(),
            "similar_items": self.similar_items.get_concrete_function(),
        }
        for name in self.embed:
            functions[f"embed_item_{name}"] = self.embed[name]
            functions[f"search_{name}"] = self.search[name].get_concrete_function()
        return functions

    @tf.function(input_signature=[_ids("history", 2), _ids("candidates", 2)])
    def score(self, history: tf.Tensor, candidates: tf.Tensor) -> dict[str, tf.Tensor]:
        """Fused scores `[B, C]` of given candidates `[B, C]` for histories `[B, L]`."""
        fused = self.core(self._once(self.item_table.lookup(history)))
        numbers = self.item_table.lookup(candidates)
        scores = tf.gather(fused, tf.maximum(numbers, 0), batch_dims=1)
        silent = (numbers < 0) | ~tf.math.is_finite(scores)
        return {"scores": tf.where(silent, UNSCORED, scores)}

    @tf.function(
        input_signature=[
            _ids("user_id", 1),
            _ids("history", 2),
            tf.TensorSpec([None], tf.int32, name="k"),
            _ids("exclude", 2),
            _ids("include", 2),
        ]
    )
    def recommend(
        self, user_id: tf.Tensor, history: tf.Tensor, k: tf.Tensor, exclude: tf.Tensor, include: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """The k best unseen items `[B, k_max]`, their scores, and each member's contribution `[B, S, k_max]`.

        A known user's stored history is used, with `history` (newer items) added to it; an unknown or empty
        user is answered from `history` alone. `include` restricts the candidates where it holds any id.
        """
        user = self.user_table.lookup(user_id)
        given = self.item_table.lookup(history)
        numbers = self._once(tf.concat([self.history(user), given], axis=1))
        excluded = self.item_table.lookup(exclude)
        hidden = self._marked(tf.concat([self.seen(user), given, excluded], axis=1))
        restricted = tf.reduce_any(include != "", axis=1, keepdims=True)
        allowed = self._marked(self.item_table.lookup(include)) | ~restricted
        said = self.core.said(numbers)
        fused = self.core.rule.fuse(*said)
        answer = self._explained(tf.where(hidden | ~allowed, -np.inf, fused), said, k)
        return {**answer, "known_user": user >= 0}

    @tf.function(input_signature=[_ids("item_id", 1), tf.TensorSpec([None], tf.int32, name="k")])
    def similar_items(self, item_id: tf.Tensor, k: tf.Tensor) -> dict[str, tf.Tensor]:
        """Items like one item `[B, k_max]`, their scores, and each member's contribution `[B, S, k_max]`.

        Similarity is what the personal members, fused, would give to somebody who has taken just this item. A cold
        item is answered by the members that read content, an unknown one not at all, and no item is like itself.
        """
        number = self.item_table.lookup(item_id)[:, None]
        said = self.core.said(number, personal=True)
        fused = self.core.rule.fuse(*said)
        return self._explained(tf.where(self._marked(number), -np.inf, fused), said, k)

    def _search_function(self, embed: Any, table: tf.Variable, silent: tf.Variable) -> Any:
        """`search_<name>`: an example, given as the encoder's named inputs, -> the k items nearest to it by the cosine
        of their embeddings: `item_ids`, `scores` (the cosines) `[B, k_max]`. Exact; items without such content are
        never found. `table` `[D, I]` has unit columns; `silent` `[I]` is -inf where an item has no content, else 0."""
        specs = embed.structured_input_signature[1]

        @tf.function(input_signature=[*specs.values(), tf.TensorSpec([None], tf.int32, name="k")])
        def search(*values: tf.Tensor) -> dict[str, tf.Tensor]:
            example = embed(**dict(zip(specs, values[:-1], strict=True)))["embedding"]
            cosines = tf.matmul(tf.math.l2_normalize(example, axis=-1), table)
            answer = self._best(cosines + silent, values[-1])
            answer.pop("numbers")
            return answer

        return search

    def _once(self, numbers: tf.Tensor) -> tf.Tensor:
        """`[B, L]` with each number kept where it stands last and -1 elsewhere."""
        batch, length = tf.unstack(tf.shape(numbers))
        cells = self._cells(numbers)
        places = tf.broadcast_to(tf.range(length)[None], [batch, length])
        last = tf.tensor_scatter_nd_max(tf.fill([batch, self.items + 1], -1), cells, places)
        return tf.where(tf.gather_nd(last, cells) == places, numbers, PADDING)

    def _cells(self, numbers: tf.Tensor) -> tf.Tensor:
        """`[B, N, 2]`: row and column of each number in a matrix `[B, I + 1]`; -1 has the last column."""
        columns = tf.where(numbers < 0, self.items, numbers)
        rows = tf.broadcast_to(tf.range(tf.shape(columns)[0])[:, None], tf.shape(columns))
        return tf.stack([rows, columns], axis=-1)

    def _marked(self, numbers: tf.Tensor) -> tf.Tensor:
        """bool `[B, I]`: which items stand in `numbers` `[B, N]` (-1 is none)."""
        shape = tf.stack([tf.shape(numbers)[0], self.items + 1])
        counts = tf.scatter_nd(self._cells(numbers), tf.ones_like(numbers), shape)
        return counts[:, : self.items] > 0

    def _explained(self, scores: tf.Tensor, said: Said, k: tf.Tensor) -> dict[str, tf.Tensor]:
        """`_best` with each member's contribution to the returned items, 0 where there is none."""
        answer = self._best(scores, k)
        shares, _ = self.core.rule.weigh(*said.at(tf.maximum(answer.pop("numbers"), 0)))
        empty = (answer["item_ids"] == "")[:, None, :]
        return {**answer, "contributions": tf.where(empty, 0.0, shares)}

    def _best(self, scores: tf.Tensor, k: tf.Tensor) -> dict[str, tf.Tensor]:
        length = min(self.k_max, self.items)
        values, numbers = top_k(scores, length)
        wanted = tf.math.is_finite(values) & (tf.range(length)[None] < k[:, None])
        pad = [[0, 0], [0, self.k_max - length]]
        numbers = tf.pad(tf.where(wanted, numbers, PADDING), pad, constant_values=PADDING)
        return {
            "item_ids": tf.gather(self.item_ids, tf.where(numbers < 0, self.items, numbers)),
            "scores": tf.pad(tf.where(wanted, values, 0.0), pad),
            "numbers": numbers,
        }


class _Rows(tf.Module):
    """Rows of a sparse matrix of ones, by number: int32 `[B]` -> `[B, L]`, padded with -1."""

    def __init__(self, matrix: sparse.csr_matrix, name: str) -> None:
        super().__init__()
        self.starts = constant(matrix.indptr.astype(np.int32), tf.int32, f"{name}_starts")
        indices = matrix.indices.astype(np.int32) if matrix.nnz else np.array([PADDING], np.int32)
        self.indices = constant(indices, tf.int32, f"{name}_items")

    def __call__(self, rows: tf.Tensor) -> tf.Tensor:
        known = rows >= 0
        safe = tf.maximum(rows, 0)
        start = tf.gather(self.starts, safe)
        length = tf.where(known, tf.gather(self.starts, safe + 1) - start, 0)
        within = tf.range(tf.reduce_max(length))[None]
        cells = tf.minimum(start[:, None] + within, tf.shape(self.indices)[0] - 1)
        return tf.where(within < length[:, None], tf.gather(self.indices, cells), PADDING)


def _id_table(ids: np.ndarray) -> tf.lookup.StaticHashTable:
    """External id -> number, -1 for unknown ones; the empty string is nobody's id."""
    keys = tf.constant(ids.astype(object), tf.string)
    numbers = tf.range(len(ids), dtype=tf.int32)
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, numbers), default_value=PADDING)


def contents_of(members: Mapping[str, Member]) -> dict[str, Contents]:
    """What members read, by the name that signatures carry: the member's, or `<member>_<content>` where it has several.

    Raises ConfigError when two of these names are the same.
    """
    found: dict[str, Contents] = {}
    for member, fitted in members.items():
        contents = fitted.contents()
        for name, content in contents.items():
            full = member if len(contents) == 1 else f"{member}_{name}"
            if full in found:
                raise ConfigError(
                    f"names of signatures must differ; two contents are called '{full}'. Rename a member."
                )
            found[full] = content
    return found


def embed_function(encoder: keras.Model) -> Any:
    """The encoder as a concrete function of its named inputs, for the signature `embed_item_<name>`."""
    names = [tensor.name.split(":")[0] for tensor in encoder.inputs]
    specs = {
        n: tf.TensorSpec([None, *t.shape[1:]], t.dtype, name=n) for n, t in zip(names, encoder.inputs, strict=True)
    }
    embed = tf.function(lambda **values: {"embedding": encoder(values, training=False)})
    return embed.get_concrete_function(**specs)
