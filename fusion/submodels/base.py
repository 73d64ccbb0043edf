"""What every content encoder offers: raw values in, named features, an embedding out, and what may be trained.

It builds models and prepares inputs; loops over data live in `fusion.embeddings` and `fusion.training`.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from fusion.compat import keras, tf
from fusion.config import Settings, content_hash
from fusion.errors import ConfigError, DataError
from fusion.types import Features

FineTune = Annotated[int, pydantic.Field(ge=0)] | Literal["all"]
"""How much of a pretrained encoder is trained: 0 nothing, n the last n blocks, 'all' everything."""


class Submodel(abc.ABC):
    """A content encoder: `prepare` turns raw values into named inputs, `encoder` turns those into embeddings.

    Attributes:
        config: an instance of `Config`.
        seed: of the initial weights and of dropout; pretrained weights do not depend on it.
    """

    Config: ClassVar[type[Settings]]
    modality: ClassVar[Literal["text", "image"]]
    not_in_fingerprint: ClassVar[frozenset[str]] = frozenset({"fine_tune", "dropout"})
    """Settings that the embedding of a value does not depend on, once the weights are given."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._encoder: keras.Model | None = None
        self._inference: tuple[keras.Model, Any] | None = None

    def adapt(self, values: Sequence[Any]) -> None:  # noqa: B027  (most encoders have nothing to fit)
        """Fits what has to be fitted before training, such as a vocabulary, on **training** values only."""

    @abc.abstractmethod
    def prepare(self, values: Sequence[Any], fixed_length: bool = False) -> Features:
        """Raw values (texts, or images as uint8 `[N, H, W, 3]`) as the named inputs of `encoder()`.

        With `fixed_length` shapes do not depend on the values, as graphs of a fixed shape need it.
        """

    @abc.abstractmethod
    def _build(self) -> keras.Model:
        """A flat functional model with its weights loaded, inputs named as in `prepare`, output `[B, D]`."""

    def encoder(self) -> keras.Model:
        """The encoder: named inputs -> `[B, D]` float32 from a layer called `embedding`. Built once and kept.

        What may be trained is set by `unfreeze()` when the model is built.
        """
        if self._encoder is None:
            self._encoder = self._build()
            self.unfreeze()
        return self._encoder

    def encode(self, features: Features) -> np.ndarray:
        """Embeddings float32 `[N, D]` of prepared features, with the weights as they are now, in inference mode.

        The graph is traced once for all batch sizes and lengths; all N are computed at once
        (`fusion.embeddings.embed` cuts into batches).
        """
        if self._inference is None or self._inference[0] is not self.encoder():
            self._inference = self.encoder(), _trace(self.encoder())
        embeddings: np.ndarray = self._inference[1](**features).numpy()
        return embeddings

    @property
    def dimensions(self) -> int:
        """D, the length of an embedding."""
        return int(self.encoder().output_shape[-1])

    @property
    @abc.abstractmethod
    def frozen(self) -> bool:
        """True when no weight of the encoder is trained, so that embeddings can be made once and kept."""

    @abc.abstractmethod
    def unfreeze(self) -> list[keras.layers.Layer]:
        """Makes exactly the layers trainable that the settings name, freezes all others, and returns the former."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that an embedding depends on: settings, weights as they are now, fitted state."""
        digest = hashlib.sha256(type(self).__name__.encode())
        digest.update(self._identity().encode())
        for name, array in sorted(self.state().items()):
            _update(digest, name, array)
        for position, weight in enumerate(self.encoder().get_weights()):
            _update(digest, str(position), weight)
        return digest.hexdigest()

    def _identity(self) -> str:
        """What the embedding depends on besides weights and fitted state; encoders with other files add theirs."""
        return content_hash(self.config.model_dump(mode="json", exclude=set(self.not_in_fingerprint)))

    def state(self) -> dict[str, np.ndarray]:
        """What `adapt` fitted, as arrays of numbers and strings; empty for encoders that fit nothing."""
        return {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes back what `state` gave. Raises DataError when it is not this encoder's."""
        if state:
            raise DataError(
                f"{type(self).__name__} has no fitted state; received {', '.join(sorted(state))}. "
                "The state belongs to another kind of submodel: train this member again."
            )


class Pretrained(Submodel):
    """A submodel that starts from pretrained weights; its `Config` has `fine_tune: FineTune`."""

    @abc.abstractmethod
    def _blocks(self) -> list[list[keras.layers.Layer]]:
        """The layers with weights of the built encoder, in blocks from the input to the output."""

    @property
    def frozen(self) -> bool:
        """True when no weight of the encoder is trained, so that embeddings can be made once and kept."""
        return bool(self.config.fine_tune == 0)

    def unfreeze(self) -> list[keras.layers.Layer]:
        """Makes exactly the layers trainable that `fine_tune` names, freezes all others, and returns the former.

        A frozen BatchNormalization uses its moving statistics and leaves them as they are, in training too.
        Raises ConfigError when more blocks are asked for than the encoder has.
        """
        encoder, blocks = self.encoder(), self._blocks()
        count = len(blocks) if self.config.fine_tune == "all" else int(self.config.fine_tune)
        if count > len(blocks):
            raise ConfigError(
                f"fine_tune must be 'all' or at most the number of blocks, {len(blocks)}; received {count}. "
                "Write fine_tune: all to train every block."
            )
        chosen = [layer for block in blocks[len(blocks) - count :] for layer in block]
        for layer in encoder.layers:
            layer.trainable = False
        for layer in chosen:
            layer.trainable = True
        return chosen


def _trace(encoder: keras.Model) -> Any:
    """The encoder in inference mode as a concrete function of named features of any batch size."""
    signature = {
        tensor.name: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name) for tensor in encoder.inputs
    }
    infer = tf.function(lambda **features: encoder(features, training=False))
    return infer.get_concrete_function(**signature)


def _update(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1) if array.size else b"")


def check_texts(values: Sequence[Any]) -> list[str]:
    """The values as a list of str that can be encoded as UTF-8; anything that is not a str is a DataError."""
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(
                f"a text must be a string ('' where there is none); received {value!r} at position {position}. "
                "Replace missing texts by '' and mask them."
            )
    return [value.encode("utf-8", "replace").decode("utf-8") for value in values]  # lone surrogates become '?'


def check_images(values: Any, size: int) -> np.ndarray:
    """The values as an array uint8 `[N, size, size, 3]`, not copied; any other dtype or shape is a DataError."""
    images = np.asanyarray(values)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise DataError(
            f"images must be a uint8 array [N, {size}, {size}, 3]; received {images.dtype} {list(images.shape)}. "
            f"Read them with fusion.images.load_images(values, {size})."
        )
    return images
