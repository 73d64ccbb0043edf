"""Texts as numbers of words, for encoders that are trained from scratch; the vocabulary is that of training texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pydantic

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.errors import DataError
from fusion.initializers import Initializer, initializer
from fusion.submodels.base import Submodel, check_texts, padded_length
from fusion.types import Features, derive_seed

layers = keras.layers

WORD = re.compile(r"[^\W_]{1,40}|[^\w\s]")
"""Runs of letters and digits, and every punctuation mark by itself."""
PADDING, UNKNOWN, FIRST = 0, 1, 2
"""Numbers of no word, of a word that training did not have, and of the most frequent word."""


class WordSettings(Settings):
    """Settings of all encoders over words."""

    max_words: int = pydantic.Field(64, ge=1, le=2048)
    """Words read of each text; the rest is cut off."""
    vocabulary: int = pydantic.Field(20_000, ge=1, le=500_000)
    """Words kept, the most frequent ones of the training texts; all others are one unknown word."""
    min_count: int = pydantic.Field(2, ge=1, le=1000)
    """How often a word must stand in the training texts to be kept."""
    word_dimensions: int = pydantic.Field(128, ge=1, le=1024)
    """Length of a word's vector."""
    vectors_initializer: Initializer = "uniform"
    """How words' vectors start."""
    dropout: float = pydantic.Field(0.2, ge=0, lt=1)
    """Share of the entries of words' vectors, and of the embedding, that training silences."""


class WordEncoder(Submodel):
    """A text encoder from scratch: subclasses turn words' vectors `[B, L, W]` into one embedding.

    Words are lower-cased; punctuation marks are words. Padding never changes an embedding.
    """

    modality: ClassVar[Literal["text", "image", "tabular"]] = "text"
    masked: ClassVar[bool] = False
    """Whether the layers over words take Keras's mask of what is padding."""

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._numbers: dict[str, int] | None = None

    def embed_words(self, vectors: Any, words: Any) -> Any:
        """Vectors float32 `[B, L, W]` of the words int32 `[B, L]` (0 is padding) -> `[B, D]`."""
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        """False: there are no pretrained weights, so all are trained."""
        return False

    def adapt(self, values: Sequence[str]) -> None:
        """Counts the words of training texts and keeps the most frequent ones; ties go to the alphabet."""
        counts = Counter(word for text in check_texts(values) for word in words_of(text))
        kept = [word for word, count in counts.items() if count >= self.config.min_count]
        kept.sort(key=lambda word: (-counts[word], word))
        self._take(kept[: self.config.vocabulary])

    def prepare(self, values: Sequence[str], fixed_length: bool = False) -> Features:
        """Texts -> `{"words": int32 [N, L]}`, padded with 0.

        L is the longest text of the call, rounded up, at most `max_words`; with `fixed_length` it is `max_words`.
        """
        known, limit = self._vocabulary(), self.config.max_words
        rows = [[known.get(word, UNKNOWN) for word in words_of(text)[:limit]] for text in check_texts(values)]
        length = limit if fixed_length else min(limit, padded_length(np.array([len(row) for row in rows] or [1])))
        words = np.full((len(rows), length), PADDING, np.int32)
        for number, row in enumerate(rows):
            words[number, : len(row)] = row
        return {"words": words}

    def pieces(self, text: str) -> list[str]:
        """The words that are read of a text."""
        return words_of(text)[: self.config.max_words]

    def lengths(self, features: Features) -> np.ndarray:
        """Words of each row, int64 `[N]`."""
        return np.asarray((features["words"] != PADDING).sum(axis=1, dtype=np.int64))

    def unfreeze(self) -> list[keras.layers.Layer]:
        """All layers with weights: there is nothing to keep."""
        return [layer for layer in self.encoder().layers if layer.weights]

    def state(self) -> dict[str, np.ndarray]:
        """`vocabulary` str `[V]`, the most frequent word first; empty before `adapt`."""
        return {} if self._numbers is None else {"vocabulary": np.array(list(self._numbers), dtype=np.str_)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `state` gave. Raises DataError when it is not a vocabulary."""
        words = state.get("vocabulary")
        if words is None or len(state) != 1 or words.ndim != 1 or words.dtype.kind != "U":
            raise DataError(
                f"the state of a word encoder is its vocabulary; received {', '.join(sorted(state)) or 'nothing'}. "
                "Train the member again."
            )
        self._take([str(word) for word in words])

    def _take(self, words: list[str]) -> None:
        self._numbers = {word: FIRST + number for number, word in enumerate(words)}
        self._encoder = None

    def _vocabulary(self) -> dict[str, int]:
        if self._numbers is None:
            raise DataError(
                "an encoder over words must be fitted before use; this one has no vocabulary. "
                "Call adapt(training texts), or load_state with what a trained one left."
            )
        return self._numbers

    def _build(self) -> keras.Model:
        words = layers.Input((None,), dtype="int32", name="words")
        vectors = layers.Embedding(
            FIRST + len(self._vocabulary()),
            self.config.word_dimensions,
            embeddings_initializer=initializer(self.config.vectors_initializer, self._seed("vectors")),
            mask_zero=self.masked,
            name="vectors",
        )(words)
        embedding = self.embed_words(self._drop(vectors, "vectors_dropout"), words)
        last = self._drop(embedding, "pooled_dropout")
        return keras.Model(
            words,
            layers.Activation("linear", name="embedding", dtype="float32")(last),
            name=type(self).__name__.lower(),
        )

    def _drop(self, x: Any, name: str) -> Any:
        if self.config.dropout == 0:
            return x
        # A stateful generator is a variable, which a checkpoint can hold.
        return layers.Dropout(
            self.config.dropout, seed=self._seed(name), rng_type="stateful", force_generator=True, name=name
        )(x)

    def _seed(self, name: str) -> int:
        return derive_seed(self.seed, type(self).__name__, name)


def words_of(text: str) -> list[str]:
    """The words of a text, lower-cased.

    >>> words_of("The Sea, the sea!")
    ['the', 'sea', ',', 'the', 'sea', '!']
    """
    return WORD.findall(text.lower())


@keras.utils.register_keras_serializable("fusion")
class WithoutPadding(keras.layers.Layer):
    """Vectors `[B, L, W]` with zeros where the words int32 `[B, L]` are padding."""

    def call(self, inputs: Any) -> Any:
        vectors, words = inputs
        return vectors * tf.cast(words != PADDING, vectors.dtype)[:, :, tf.newaxis]
