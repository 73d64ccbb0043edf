"""A convolutional text encoder trained from scratch: runs of words, wherever they stand (Kim 2014, arXiv:1408.5882)."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from fusion.compat import keras
from fusion.initializers import Initializer, initializer
from fusion.submodels.text_words import WithoutPadding, WordEncoder, WordSettings

layers = keras.layers


class TextConvolution(WordEncoder):
    """Convolutions over runs of several lengths, each pooled by its maximum over the text."""

    class Config(WordSettings):
        """Settings of the convolutional text encoder."""

        runs: tuple[Annotated[int, pydantic.Field(ge=1, le=15)], ...] = pydantic.Field((2, 3, 4), min_length=1)
        """Lengths of the runs of words that filters look at."""
        filters: int = pydantic.Field(100, ge=1, le=2048)
        """Filters of each length; the embedding has one number for each filter."""
        initializer: Initializer = "glorot_uniform"
        """How the weights of the filters start."""

    def embed_words(self, vectors: Any, words: Any) -> Any:
        """As `WordEncoder.embed_words`. A filter sees zeros beyond the text, and is silent there."""
        vectors = WithoutPadding(name="words_only")([vectors, words])
        pooled = []
        for run in self.config.runs:
            weights = initializer(self.config.initializer, self._seed(f"run{run}"))
            x = layers.Conv1D(
                self.config.filters, run, padding="same", kernel_initializer=weights, name=f"run{run}_conv"
            )(vectors)
            x = layers.ReLU(name=f"run{run}_relu")(x)
            # After ReLU nothing is below 0, so padding of 0 never is the maximum that counts.
            x = WithoutPadding(name=f"run{run}_words_only")([x, words])
            pooled.append(layers.GlobalMaxPooling1D(name=f"run{run}_pool")(x))
        return pooled[0] if len(pooled) == 1 else layers.Concatenate(name="runs")(pooled)
