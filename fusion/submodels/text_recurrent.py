"""A recurrent text encoder trained from scratch: LSTM or GRU over words, in one direction or both."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic

from fusion.compat import keras
from fusion.initializers import Initializer, initializer
from fusion.submodels.text_words import WordEncoder, WordSettings

layers = keras.layers
CELLS = {"lstm": layers.LSTMCell, "gru": layers.GRUCell}


class TextRecurrent(WordEncoder):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) or gated recurrent units (Cho et al. 2014).

    The embedding is the state after the last word, of both directions side by side. Every text begins with an empty
    state, and padding leaves the state as it is.
    """

    masked: ClassVar[bool] = True

    class Config(WordSettings):
        """Settings of the recurrent text encoder."""

        cell: Literal["lstm", "gru"] = "lstm"
        """Which kind of cell."""
        units: int = pydantic.Field(128, ge=1, le=2048)
        """Length of the state in each direction."""
        bidirectional: bool = True
        """Whether a second network reads the text backwards."""
        initializer: Initializer = "glorot_uniform"
        """How the weights of the words start."""
        recurrent_initializer: Initializer = "orthogonal"
        """How the weights of the state start."""

    def embed_words(self, vectors: Any, words: Any) -> Any:
        """As `WordEncoder.embed_words`."""
        forward = self._recurrent("forward")
        if not self.config.bidirectional:
            return forward(vectors)
        both = layers.Bidirectional(forward, backward_layer=self._recurrent("backward", reverse=True), name="recurrent")
        return both(vectors)

    def _recurrent(self, name: str, *, reverse: bool = False) -> Any:
        cell = CELLS[self.config.cell](
            self.config.units,
            kernel_initializer=initializer(self.config.initializer, self._seed(f"{name}/kernel")),
            recurrent_initializer=initializer(self.config.recurrent_initializer, self._seed(f"{name}/recurrent")),
            rng_type="stateful",  # a cell could drop inputs: where it keeps its random state, a checkpoint finds it
            force_generator=True,
        )
        return layers.RNN(cell, go_backwards=reverse, name=name)
