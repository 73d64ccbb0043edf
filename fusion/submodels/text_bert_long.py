"""BERT over long documents: windows of tokens that overlap, each read by the same network, pooled into one embedding.

A text that is cut off after 512 tokens loses what stands behind them. Here it is cut into windows instead, as for
question answering (Devlin et al. 2019, section 4.2 of the released code, `doc_stride`) and for documents (Pappagari et
al. 2019, arXiv:1910.10781).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from fusion.compat import keras, tf
from fusion.submodels.base import check_texts
from fusion.submodels.text_bert import (
    CHARACTERS_PER_TOKEN,
    MASKED,
    BertShape,
    Dropouts,
    TextBert,
    padded_to,
    pooled_tokens,
)
from fusion.types import Features, derive_seed

layers = keras.layers


class TextBertLong(TextBert):
    """`text_bert` over several windows of a text."""

    by_row = False  # windows are folded into the axis B

    class Config(TextBert.Config):
        """Settings of BERT over windows; `max_tokens` is the length of a window."""

        max_tokens: int = pydantic.Field(512, ge=8, le=512)
        """Tokens of a window, [CLS] and [SEP] among them."""
        windows: int = pydantic.Field(8, ge=1, le=256)
        """Windows read of each text; the rest is cut off."""
        overlap: int = pydantic.Field(64, ge=0, le=256)
        """Tokens that a window shares with the one before, so that no sentence is cut in every window."""
        window_pooling: Literal["mean", "max", "attention"] = "mean"
        """How vectors of windows become one: their mean, of each entry the largest, or a weighted mean with learned
        weights."""

        @pydantic.model_validator(mode="after")
        def _fits(self) -> TextBertLong.Config:
            if self.overlap > self.max_tokens - 4:
                raise ValueError(f"overlap must leave new tokens: at most max_tokens - 4, {self.max_tokens - 4}")
            if self.window_pooling == "attention" and self.fine_tune == 0:
                raise ValueError("window_pooling attention is learned: set fine_tune, or take mean or max")
            return self

    def prepare(self, values: Sequence[str], fixed_length: bool = False) -> Features:
        """Texts -> `input_ids` and `attention_mask`, int32 `[N, K, L]`: K windows of L tokens, both as long as the
        longest of the call, or with `fixed_length` as long as the settings allow."""
        config = self.config
        texts = [text[: CHARACTERS_PER_TOKEN * config.max_tokens * config.windows] for text in check_texts(values)]
        tokenizer = self._tokenizer()
        tokenizer.enable_truncation(config.max_tokens, stride=config.overlap)
        rows = [[e.ids, *(w.ids for w in e.overflowing)][: config.windows] for e in tokenizer.encode_batch(texts)]
        longest = max((len(window) for row in rows for window in row), default=0)
        count = config.windows if fixed_length else max(map(len, rows), default=1)
        length = config.max_tokens if fixed_length else min(config.max_tokens, padded_to(longest))
        ids, mask = (np.zeros((len(rows), count, length), np.int32) for _ in range(2))
        for number, row in enumerate(rows):
            for place, window in enumerate(row):
                ids[number, place, : len(window)] = window
                mask[number, place, : len(window)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def lengths(self, features: Features) -> np.ndarray:
        """Windows of each row, int64 `[N]`."""
        return np.asarray(features["attention_mask"].any(axis=2).sum(axis=1, dtype=np.int64))

    explained = False

    def pieces(self, text: str) -> list[str]:
        """Long documents are not explained word by word. Raises ValueError."""
        raise ValueError("words are explained for texts of one window; take text_bert for that.")

    def _network(self, shape: BertShape, dropout: float, seed: int) -> keras.Model:
        config = self.config
        ids, mask = (layers.Input((None, None), dtype="int32", name=n) for n in ("input_ids", "attention_mask"))
        tokens, known = FoldWindows(name="fold_tokens")(ids), FoldWindows(name="fold_mask")(mask)
        x = pooled_tokens(tokens, known, shape, config, Dropouts(dropout, seed), "windows")
        x = UnfoldWindows(name="unfold")([x, mask])
        inputs = [x, mask]
        if config.window_pooling == "attention":
            start = keras.initializers.GlorotUniform(seed=derive_seed(seed, "window_weights"))
            inputs.append(layers.Dense(1, kernel_initializer=start, dtype="float32", name="windows_weights")(x))
        last = "pooled" if config.normalise else "embedding"
        x = PoolWindows(config.window_pooling, dtype="float32", name=last)(inputs)
        if config.normalise:
            x = layers.UnitNormalization(name="embedding", dtype="float32")(x)
        return keras.Model([ids, mask], x, name="text_bert_long")


@keras.utils.register_keras_serializable("fusion")
class FoldWindows(keras.layers.Layer):
    """`[B, K, L]` -> `[B * K, L]`."""

    def call(self, inputs: Any) -> Any:
        return tf.reshape(inputs, [-1, tf.shape(inputs)[2]])


@keras.utils.register_keras_serializable("fusion")
class UnfoldWindows(keras.layers.Layer):
    """`[B * K, H]`, and the mask `[B, K, L]`, for its shape -> `[B, K, H]`."""

    def call(self, inputs: Any) -> Any:
        vectors, mask = inputs
        return tf.reshape(vectors, [-1, tf.shape(mask)[1], vectors.shape[-1]])


@keras.utils.register_keras_serializable("fusion")
class PoolWindows(keras.layers.Layer):
    """Vectors `[B, K, H]`, the mask `[B, K, L]`, and for attention scores `[B, K, 1]` -> `[B, H]`; windows without a
    token do not count."""

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind

    def call(self, inputs: Any) -> Any:
        vectors, mask, *scores = inputs
        known = tf.cast(tf.reduce_max(mask, axis=2), vectors.dtype)[:, :, None]
        if self.kind == "max":
            return tf.reduce_max(vectors + (1.0 - known) * (10.0 * MASKED), axis=1)
        if self.kind == "attention":
            weights = tf.nn.softmax(scores[0] + (1.0 - known) * MASKED, axis=1)
        else:
            weights = known / tf.maximum(tf.reduce_sum(known, axis=1, keepdims=True), 1.0)
        return tf.reduce_sum(vectors * weights, axis=1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kind": self.kind}
