"""GRU4Rec: a recurrent network over the latest items of a history."""

from __future__ import annotations

from pydantic import Field

from fusion.compat import keras, tf
from fusion.types import derive_seed
from recsys.collaborative.sequences import SequenceMember, SequenceSettings


class GRU4Rec(SequenceMember):
    """Gated recurrent units (Hidasi et al. 2016, "Session-based recommendations with recurrent neural networks").

    Items have one vector, as part of a history and as a candidate (the constrained embedding of Hidasi & Karatzoglou
    2018). The steps are unrolled, so that TFLite's own operations run them; padding leaves the state as it is,
    and every history begins with an empty one. Without times the order is that of the item numbers, and the member
    is of no use.
    """

    class Config(SequenceSettings):
        """Settings of the recurrent network."""

        layers: int = Field(1, ge=1, le=4)
        """Recurrent layers, one upon the other."""

    def _states(self, vectors: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
        x, width = vectors, self.config.dimensions
        for number in range(self.config.layers):
            cell = keras.layers.GRUCell(
                width,
                kernel_initializer=keras.initializers.GlorotUniform(derive_seed(self.seed, "gru", number, "kernel")),
                recurrent_initializer=keras.initializers.Orthogonal(seed=derive_seed(self.seed, "gru", number)),
                rng_type="stateful",  # a cell could drop inputs: where it keeps its random state, a checkpoint finds it
                force_generator=True,
            )
            recurrent = keras.layers.RNN(cell, return_sequences=True, unroll=True, name=f"gru{number}")
            x = self._dropout(recurrent(x, mask=known), f"gru{number}")
        return self._dense(x, width, "projection")
