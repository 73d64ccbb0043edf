"""TF-IDF and a truncated singular value decomposition: the sanity bar that a BERT member has to beat.

Words are counted outside the graph by scikit-learn; the projection to `dimensions` is a frozen Dense layer inside
it. Both are fitted by `adapt` on training texts only, and never by gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pydantic
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from fusion.compat import keras
from fusion.config import Settings
from fusion.errors import DataError
from fusion.submodels.base import Submodel, check_texts
from fusion.types import Features, derive_seed

layers = keras.layers

STATE = ("components", "idf", "vocabulary")
WORD = r"(?u)\b\w{2,40}\b"
"""Longer words are not words, and would make every row of the vocabulary's array as long."""


class TextTfidf(Submodel):
    """Latent semantic analysis: TF-IDF vectors of unit length, projected and scaled to unit length again."""

    modality: ClassVar[Literal["text", "image"]] = "text"

    class Config(Settings):
        """Settings of the TF-IDF encoder."""

        max_features: int = pydantic.Field(2000, ge=2, le=50_000)
        """Words kept, the most frequent ones; a prepared text takes four bytes for each."""
        ngrams: int = pydantic.Field(1, ge=1, le=3)
        """The longest run of words that is counted as one feature."""
        dimensions: int = pydantic.Field(128, ge=1, le=1024)
        """Length of the embedding; fewer where there are fewer training texts or words."""

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._vectorizer: TfidfVectorizer | None = None
        self._components: np.ndarray | None = None

    @property
    def frozen(self) -> bool:
        """True: what `adapt` fitted is not trained further."""
        return True

    def adapt(self, values: Sequence[str]) -> None:
        """Fits words, their weights and the projection on training texts. Raises DataError when none has a word."""
        vectorizer = self._new_vectorizer()
        try:
            vectors = vectorizer.fit_transform(check_texts(values))
        except ValueError as error:
            raise DataError(
                f"the training texts of a TF-IDF member must hold at least one word of two letters; {error}. "
                "Check which text columns the member reads."
            ) from error
        svd = TruncatedSVD(
            min(self.config.dimensions, *vectors.shape), random_state=derive_seed(self.seed, "text_tfidf")
        )
        with np.errstate(divide="ignore", invalid="ignore"):  # of texts that are all equal no variance is explained
            components = svd.fit(vectors).components_.astype(np.float32)
        self._vectorizer, self._components = vectorizer, components
        self._encoder = None

    def prepare(self, values: Sequence[str], fixed_length: bool = False) -> Features:
        """Texts -> `{"tfidf": float32 [N, V]}`, dense; rows of texts without a known word are zero."""
        vectorizer, components = self._fitted()
        if len(values) == 0:  # which scikit-learn refuses
            return {"tfidf": np.zeros((0, components.shape[1]), np.float32)}
        return {"tfidf": vectorizer.transform(check_texts(values)).toarray().astype(np.float32)}

    def pieces(self, text: str) -> list[str]:
        """The known words of a text, in the order of the vocabulary."""
        return [str(self._fitted()[0].get_feature_names_out()[number]) for number in self._present(text)]

    def parts(self, text: str) -> np.ndarray:
        """What each known word brings into the embedding, at the length that this text has."""
        present, components = self._present(text), self._fitted()[1]
        vectors = self.prepare([text])["tfidf"][0, present, None] * components.T[present]
        return vectors / max(float(np.linalg.norm(vectors.sum(axis=0))), 1e-12)

    def _present(self, text: str) -> np.ndarray:
        return np.flatnonzero(self.prepare([text])["tfidf"][0])

    def unfreeze(self) -> list[keras.layers.Layer]:
        """Freezes the projection; nothing is trained."""
        for layer in self.encoder().layers:
            layer.trainable = False
        return []

    def state(self) -> dict[str, np.ndarray]:
        """`vocabulary` str `[V]`, `idf` float64 `[V]`, `components` float32 `[D, V]`; empty before `adapt`."""
        if self._vectorizer is None or self._components is None:
            return {}
        words = np.array(self._vectorizer.get_feature_names_out(), dtype=np.str_)
        return {"vocabulary": words, "idf": self._vectorizer.idf_, "components": self._components}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `state` gave. Raises DataError when arrays are missing or do not fit each other."""
        shapes = {name: np.shape(array) for name, array in state.items()}
        words = shapes.get("vocabulary", ())
        fits = shapes.get("idf") == words and len(words) == 1 and shapes.get("components", ())[1:] == words
        if not fits or len(state) != len(STATE):
            received = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
            raise DataError(
                f"the state of a TF-IDF encoder must be {', '.join(STATE)} over the same words; received {received}. "
                "Train the member again."
            )
        vectorizer = self._new_vectorizer({str(word): number for number, word in enumerate(state["vocabulary"])})
        vectorizer.idf_ = np.asarray(state["idf"], np.float64)
        self._vectorizer, self._components = vectorizer, np.asarray(state["components"], np.float32)
        self._encoder = None

    def _build(self) -> keras.Model:
        components = self._fitted()[1]
        tfidf = layers.Input((components.shape[1],), name="tfidf")
        projection = layers.Dense(components.shape[0], use_bias=False, name="projection")
        encoder = keras.Model(
            tfidf, layers.UnitNormalization(name="embedding", dtype="float32")(projection(tfidf)), name="text_tfidf"
        )
        projection.set_weights([components.T])
        return encoder

    def _new_vectorizer(self, vocabulary: dict[str, int] | None = None) -> TfidfVectorizer:
        return TfidfVectorizer(
            max_features=self.config.max_features,
            ngram_range=(1, self.config.ngrams),
            token_pattern=WORD,
            strip_accents="unicode",
            sublinear_tf=True,
            vocabulary=vocabulary,
        )

    def _fitted(self) -> tuple[TfidfVectorizer, np.ndarray]:
        if self._vectorizer is None or self._components is None:
            raise DataError(
                "a TF-IDF encoder must be fitted before use; this one has no vocabulary. "
                "Call adapt(training texts), or load_state with what a trained one left."
            )
        return self._vectorizer, self._components
