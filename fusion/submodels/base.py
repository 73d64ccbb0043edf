"""What every content encoder offers: raw values in, named features, an embedding out, and what may be trained.

It builds models and prepares inputs; loops over data live in `fusion.embeddings` and `fusion.training`.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

import numpy as np
import pydantic

from fusion.compat import keras, tf
from fusion.config import Settings, content_hash
from fusion.errors import ConfigError, DataError
from fusion.submodels.warm_start import WarmStart
from fusion.types import Features

FineTune = Annotated[int, pydantic.Field(ge=0)] | Literal["all"]
"""How much of a pretrained encoder is trained: 0 nothing, n the last n blocks, 'all' everything."""

SIXTEEN_BITS = {"float16", "bfloat16"}
"""What layers of mixed precision reckon in: what they make is not what float32 makes, and never shares its cache."""

TRIM_MULTIPLE = 4
"""Batches are padded to a multiple of this many positions, so that few different shapes meet the kernels."""


class Submodel(abc.ABC):
    """A content encoder: `prepare` turns raw values into named inputs, `encoder` turns those into embeddings.

    Attributes:
        config: an instance of `Config`.
        seed: of the initial weights and of dropout; pretrained weights do not depend on it.
    """

    Config: ClassVar[type[Settings]]
    modality: ClassVar[Literal["text", "image", "tabular"]]
    not_in_fingerprint: ClassVar[frozenset[str]] = frozenset({"fine_tune", "dropout"})
    """Settings that the embedding of a value does not depend on, once the weights are given."""
    explained: ClassVar[bool] = True
    """Whether `fusion.explain` can say which words, or which regions, an answer hangs on."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._encoder: keras.Model | None = None
        self._inference: tuple[keras.Model, Any] | None = None
        self._start: WarmStart | None = None

    def start_from(self, start: WarmStart) -> None:
        """Takes what another member's encoder adapted in place of adapting, and, when it is built, its weights.

        Raises ConfigError where the one or the other cannot be (see `WarmStart`).
        """
        start.check(self)
        if start.adapted:
            self.load_state(start.adapted)
        self._start = start

    def adapt_to(self, values: Sequence[Any]) -> None:
        """`adapt`, unless it started from another member, whose vocabulary its weights belong to."""
        if self._start is None or not self._start.adapted:
            self.adapt(values)

    def adapt(self, values: Sequence[Any]) -> None:  # noqa: B027  (most encoders have nothing to fit)
        """Fits what has to be fitted before training, such as a vocabulary, on **training** values only."""

    @abc.abstractmethod
    def prepare(self, values: Sequence[Any], fixed_length: bool = False) -> Features:
        """Raw values as the named inputs of `encoder()`: texts, images as uint8 `[N, H, W, 3]`, or rows of a table as a
        structured array `[N]` of text.

        With `fixed_length` shapes do not depend on the values, as graphs of a fixed shape need it.
        """

    @abc.abstractmethod
    def _build(self) -> keras.Model:
        """A flat functional model with its weights loaded, inputs named as in `prepare`, output `[B, D]`."""

    def pieces(self, text: str) -> list[str]:
        """What stands at each position of the second axis of the inputs for one text; for explanations (text only)."""
        raise ValueError(f"{type(self).__name__} reads no text, so that there are no words to explain.")

    def parts(self, text: str) -> np.ndarray | None:
        """Where an embedding is a sum of parts, those of the `pieces` of one text, float32 `[N, D]`; else None."""
        return None

    def lengths(self, features: Features) -> np.ndarray | None:
        """How many positions of each prepared row are no padding, int64 `[N]`; None where rows have one length.

        Where it is given, the second axis of every input is that of positions, and padding is ignored by the encoder.
        """
        return None

    def trim(self, features: Features) -> Features:
        """A batch without the positions that are padding in all of its rows; its embeddings stay as they were."""
        lengths = self.lengths(features)
        if lengths is None:
            return features
        longest = padded_length(lengths)
        return {name: array[:, :longest] for name, array in features.items()}

    def encoder(self) -> keras.Model:
        """The encoder: named inputs -> `[B, D]` float32 from a layer called `embedding`. Built once and kept.

        What may be trained is set by `unfreeze()` when the model is built.
        """
        if self._encoder is None:
            self._encoder = self._build()
            self.unfreeze()
            if self._start is not None:
                self._start.give_encoder(self._encoder.layers)
        return self._encoder

    def encode(self, features: Features) -> np.ndarray:
        """Embeddings float32 `[N, D]` of prepared features, with the weights as they are now, in inference mode.

        The graph is traced once for all batch sizes and lengths; all N are computed at once
        (`fusion.embeddings.embed` cuts into batches).
        """
        if self._inference is None or self._inference[0] is not self.encoder():
            self._inference = self.encoder(), trace(self.encoder())
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
        return self._fingerprint(self.encoder())

    def _fingerprint(self, model: keras.Model) -> str:
        """What the outputs of `model`, the encoder or a part of it, depend on."""
        digest = hashlib.sha256(type(self).__name__.encode())
        digest.update(self._identity().encode())
        digest.update(" ".join(sorted({layer.compute_dtype for layer in model.layers} & SIXTEEN_BITS)).encode())
        for name, array in sorted(self.state().items()):
            _update(digest, name, array)
        for position, weight in enumerate(model.get_weights()):
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
    """A submodel that starts from pretrained weights; its `Config` has `fine_tune: FineTune`.

    Where only the last blocks are trained (`has_trunk`) the encoder is the *trunk*, which is frozen and needs to run
    once over the data (`fusion.activations`), and the *top*, which reads what leaves the trunk. Every layer of the
    encoder is called once, with nothing but tensors.
    """

    by_row: bool = True
    """Whether every tensor of the encoder has the leading axis B, so that what leaves a trunk can be kept by row."""

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._parts: tuple[keras.Model, keras.Model] | None = None

    @abc.abstractmethod
    def blocks(self) -> list[list[keras.layers.Layer]]:
        """The layers with weights of the built encoder, in blocks from the input to the output."""

    @property
    def frozen(self) -> bool:
        """True when no weight of the encoder is trained, so that embeddings can be made once and kept."""
        return bool(self.config.fine_tune == 0)

    def trunk(self) -> keras.Model:
        """The frozen part: named inputs -> by name, what enters the first trained block and all after it.

        It shares its layers with `encoder()`, and is there only where some blocks are frozen and some are not.
        """
        return self._split()[0]

    def top(self) -> keras.Model:
        """The trained part: the outputs of `trunk()`, by the same names -> embedding float32 `[B, D]`.

        It shares its layers with `encoder()`, so that training one trains the other.
        """
        return self._split()[1]

    def trunk_fingerprint(self) -> str:
        """SHA-256 (hex) of all that the trunk's outputs depend on; what is trained above it is not among that."""
        trunk = self.trunk()
        return hashlib.sha256(f"{trunk.output_names} {self._fingerprint(trunk)}".encode()).hexdigest()

    def _split(self) -> tuple[keras.Model, keras.Model]:
        if self._parts is None:
            if not has_trunk(self):
                raise ValueError(f"fine_tune must leave some blocks frozen; received {self.config.fine_tune}.")
            self._parts = split(self.encoder(), {id(layer) for layer in self.unfreeze()})
        return self._parts

    def unfreeze(self) -> list[keras.layers.Layer]:
        """Makes exactly the layers trainable that `fine_tune` names, freezes all others, and returns the former.

        A frozen BatchNormalization uses its moving statistics and leaves them as they are, in training too.
        Raises ConfigError when more blocks are asked for than the encoder has.
        """
        encoder, blocks = self.encoder(), self.blocks()
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


def has_trunk(submodel: Submodel) -> TypeGuard[Pretrained]:
    """Whether some blocks of the encoder are trained and those before them are not."""
    if not isinstance(submodel, Pretrained) or not submodel.by_row or submodel.config.fine_tune in (0, "all"):
        return False
    return bool(submodel.config.fine_tune < len(submodel.blocks()))


def split(encoder: keras.Model, trained: set[int]) -> tuple[keras.Model, keras.Model]:
    """Cuts a functional model where the layers of which `trained` holds the `id` begin.

    Returns:
        What does not depend on them: the model's inputs -> by name, all tensors that the rest reads; and the rest:
        these tensors -> the model's output. Both share their layers with the model.
    """
    above: list[keras.layers.Layer] = []
    known: set[int] = set(trained)
    crossing: dict[int, Any] = {}
    for layer in encoder.layers:  # in the order of their depth, so that a layer comes after those that it reads
        read = tf.nest.flatten(layer.get_input_at(0))
        if id(layer) in known or any(id(tensor.node.layer) in known for tensor in read):
            known.add(id(layer))
            above.append(layer)
            crossing |= {id(tensor): tensor for tensor in read if id(tensor.node.layer) not in known}
    named = {tensor.node.layer.name: tensor for tensor in crossing.values()}
    inputs = {name: keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=name) for name, tensor in named.items()}
    values = {id(tensor): inputs[name] for name, tensor in named.items()}
    for layer in above:
        read = tf.nest.map_structure(lambda tensor: values[id(tensor)], layer.get_input_at(0))
        values[id(layer.get_output_at(0))] = layer(read)
    trunk = keras.Model(encoder.inputs, named, name=f"{encoder.name}_trunk")
    return trunk, keras.Model(list(inputs.values()), values[id(encoder.output)], name=f"{encoder.name}_top")


def padded_length(lengths: np.ndarray) -> int:
    """The length that rows of these lengths are padded to: the longest, rounded up to a multiple of 4, at least 4."""
    return TRIM_MULTIPLE * max(1, -(-int(np.max(lengths, initial=0)) // TRIM_MULTIPLE))


def trace(model: keras.Model) -> Any:
    """The model in inference mode as a concrete function of named features of any batch size."""
    signature = {
        tensor.name: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name) for tensor in model.inputs
    }
    infer = tf.function(lambda **features: model(features, training=False))
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
