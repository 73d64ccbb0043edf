"""Small networks that learn from a large one: each reads the same named inputs and gives an answer of the same shape.

They are flat and made of stock layers where the large ones are, so that every other method can follow. What teaches
them is in `fusion.compression.distillation`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras
from fusion.compression.base import answer_of
from fusion.config import Settings, parse
from fusion.errors import ConfigError
from fusion.initializers import Initializer, initializer
from fusion.registry import Registry
from fusion.submodels.text_bert import (
    BertShape,
    Dropouts,
    FirstToken,
    MaskedMean,
    ScaledDotProductAttention,
    TextBert,
    pooled_tokens,
)
from fusion.types import Features, derive_seed

layers = keras.layers

STUDENTS = Registry(
    "student",
    {
        "bag_of_tokens": "fusion.compression.students:BagOfTokens",
        "bert": "fusion.compression.students:ShallowBert",
        "cnn": "fusion.compression.students:Cnn",
        "dense": "fusion.compression.students:Mlp",
        "inverted_residual": "fusion.compression.students:InvertedResidual",
    },
)

Width = Annotated[int, Field(ge=1, le=4096)]


class Student(abc.ABC):
    """A small network in the place of a large one; subclasses fill `body`.

    Attributes:
        config: an instance of `Config`.
        seed: of the initial weights.
    """

    Config: ClassVar[type[Settings]]

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed

    @abc.abstractmethod
    def body(self, inputs: Mapping[str, Any], teacher: keras.Model) -> Any:
        """Everything below the last layer: the model's inputs by name -> `[B, W]`."""

    def start(self, made: keras.Model, teacher: keras.Model, representative: Features) -> None:  # noqa: B027
        """Gives what was made the weights that training begins with; most students have those of their initialisers."""

    def build(self, teacher: keras.Model, representative: Features) -> keras.Model:
        """A flat functional model with the teacher's inputs and an output of the same shape, not trained yet.

        Its last layer has the name of the teacher's, and unit length where that one's answers have.

        Args:
            teacher: the model that it is to replace.
            representative: inputs of some training rows, as the teacher reads them.

        Raises:
            ConfigError: the student cannot read what the teacher reads, or cannot be made out of it.
        """
        inputs = {
            tensor.name.split(":")[0]: layers.Input(tensor.shape[1:], dtype=tensor.dtype, name=tensor.name)
            for tensor in teacher.inputs
        }
        output = self._answer(self.body(inputs, teacher), teacher)
        made = keras.Model(list(inputs.values()), output, name=f"{teacher.name}_student")
        self.start(made, teacher, representative)
        return made

    def _answer(self, x: Any, teacher: keras.Model) -> Any:
        last = teacher.output.node.layer
        width, unit = teacher.output.shape[-1], isinstance(last, layers.UnitNormalization)
        name = "projection" if unit else last.name
        # What a student took from its teacher should arrive as it is.
        same = x.shape[-1] == width and not isinstance(last, layers.Dense)
        start = keras.initializers.Identity() if same else self._initial("glorot_uniform", name)
        x = layers.Dense(width, kernel_initializer=start, dtype="float32", name=name)(x)
        return layers.UnitNormalization(name=last.name, dtype="float32")(x) if unit else x

    def _initial(self, kind: Initializer, name: str) -> keras.initializers.Initializer:
        return initializer(kind, derive_seed(self.seed, name))

    def _hidden(self, x: Any, widths: Sequence[int]) -> Any:
        for number, width in enumerate(widths):
            name = f"hidden{number}"
            x = layers.Dense(width, kernel_initializer=self._initial("he_normal", name), name=name)(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
        return x


class Mlp(Student):
    """Dense layers and ReLU over all inputs side by side: numbers `[B, ...]`, standardised by running moments, or uint8
    images."""

    class Config(Settings):
        """Settings of the dense student."""

        hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (64,)
        """Units of each hidden layer; none makes a linear model. Layers: hidden0_relu, hidden1_relu, ..."""

    def body(self, inputs: Mapping[str, Any], teacher: keras.Model) -> Any:
        parts = [self._numbers(tensor, name) for name, tensor in inputs.items()]
        x = layers.Concatenate(name="side_by_side")(parts) if len(parts) > 1 else parts[0]
        return self._hidden(x, self.config.hidden)

    def _numbers(self, tensor: Any, name: str) -> Any:
        kind = tensor.dtype.name
        if kind not in ("float32", "uint8") or None in tensor.shape[1:]:
            raise ConfigError(
                "the student dense reads float32 numbers or uint8 images of a fixed shape; the model's input "
                f"'{name}' is {kind} {list(tensor.shape)}. Take another student."
            )
        if kind == "uint8":
            scaled = layers.Rescaling(1 / 127.5, offset=-1.0, name=f"{name}_rescaling")(tensor)
        else:
            scaled = layers.BatchNormalization(center=False, scale=False, momentum=0.9, name=f"{name}_bn")(tensor)
        return scaled if len(scaled.shape) == 2 else layers.Flatten(name=f"{name}_flat")(scaled)


# ---- images --------------------------------------------------------------------------------------------------


class ImageStudent(Student):
    """A network over one image uint8 `[B, H, W, C]`, which the graph may make smaller first; subclasses fill `maps`."""

    class Config(Settings):
        """Settings of all students of images."""

        shrink: int = Field(1, ge=1, le=16)
        """The image is averaged over squares of this side first; work falls with its square."""

    @abc.abstractmethod
    def maps(self, x: Any) -> Any:
        """Pixels from -1 to 1 `[B, H, W, C]` -> maps of features, whose means over places are the body."""

    def body(self, inputs: Mapping[str, Any], teacher: keras.Model) -> Any:
        image = next(iter(inputs.values()))
        if len(inputs) > 1 or len(image.shape) != 4 or image.dtype.name != "uint8":
            raise ConfigError(
                f"the student {_kind_of(self)} reads one uint8 image [B, H, W, C]; the model reads "
                f"{', '.join(inputs)}. Take a student for such inputs: {', '.join(STUDENTS)}."
            )
        shrink = self.config.shrink
        if shrink > min(image.shape[1:3]):
            raise ConfigError(
                f"shrink must leave a pixel of the image; received {shrink} for {list(image.shape[1:3])} pixels."
            )
        x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling")(image)
        if shrink > 1:
            x = layers.AveragePooling2D(shrink, name="shrink")(x)
        return layers.GlobalAveragePooling2D(name="pooled", dtype="float32")(self.maps(x))

    def _convolution(self, x: Any, name: str, width: int, kernel: int, stride: int, activate: bool = True) -> Any:
        """Convolution, BatchNormalization, ReLU6: the order that TFMOT folds."""
        start = self._initial("he_normal", name)
        x = layers.Conv2D(
            width, kernel, strides=stride, padding="same", use_bias=False, kernel_initializer=start, name=f"{name}_conv"
        )(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
        return layers.ReLU(6.0, name=f"{name}_relu")(x) if activate else x


class Cnn(ImageStudent):
    """Blocks of 3 × 3 convolution, BatchNormalization and ReLU6; each but the first halves the sides."""

    class Config(ImageStudent.Config):
        """Settings of the convolutional student."""

        widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (16, 32, 64)
        """Filters of each block. Layers: block0_relu, block1_relu, ..."""

    def maps(self, x: Any) -> Any:
        for number, width in enumerate(self.config.widths):
            x = self._convolution(x, f"block{number}", width, kernel=3, stride=1 if number == 0 else 2)
        return x


class InvertedResidual(ImageStudent):
    """A narrow MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): a halving stem, blocks of expansion, depthwise
    convolution and projection, and at last a convolution of 1 × 1."""

    class Config(ImageStudent.Config):
        """Settings of the student of inverted residuals."""

        stem: Width = 8
        """Filters of the first convolution. Layer: stem_relu."""
        widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)] = (16, 24, 40, 64)
        """Filters of each stage; its first block halves the sides. Layers: block0_project_bn or, where there are
        several blocks of a stage, block1_add."""
        repeats: int = Field(1, ge=1, le=8)
        """Blocks of each stage; all but the first have a skip connection."""
        expansion: int = Field(4, ge=1, le=8)
        """How many times wider a block is inside."""
        features: Width = 256
        """Filters of the last convolution. Layer: head_relu."""

    def maps(self, x: Any) -> Any:
        x = self._convolution(x, "stem", self.config.stem, kernel=3, stride=2)
        blocks = [(width, number) for width in self.config.widths for number in range(self.config.repeats)]
        for place, (width, number) in enumerate(blocks):
            x = self._block(x, f"block{place}", width, stride=2 if number == 0 else 1)
        return self._convolution(x, "head", self.config.features, kernel=1, stride=1)

    def _block(self, inputs: Any, name: str, width: int, stride: int) -> Any:
        x = self._convolution(inputs, f"{name}_expand", inputs.shape[-1] * self.config.expansion, 1, 1)
        start = self._initial("he_normal", f"{name}_depthwise")
        x = layers.DepthwiseConv2D(
            3,
            strides=stride,
            padding="same",
            use_bias=False,
            depthwise_initializer=start,
            name=f"{name}_depthwise_conv",
        )(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_depthwise_bn")(x)
        x = layers.ReLU(6.0, name=f"{name}_depthwise_relu")(x)
        x = self._convolution(x, f"{name}_project", width, 1, 1, activate=False)
        return layers.Add(name=f"{name}_add")([inputs, x]) if stride == 1 else x


# ---- texts ---------------------------------------------------------------------------------------------------


class TextStudent(Student):
    """A network over tokens: `input_ids` and `attention_mask` int32 `[B, L]`."""

    def _tokens(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        if set(inputs) != {"input_ids", "attention_mask"}:
            raise ConfigError(
                f"the student {_kind_of(self)} reads input_ids and attention_mask; the model reads "
                f"{', '.join(inputs)}. Take a student for such inputs: {', '.join(STUDENTS)}."
            )
        return inputs["input_ids"], inputs["attention_mask"]


class BagOfTokens(TextStudent):
    """The mean of tokens' vectors, in any order, and hidden layers over it; the longer a vector, the more it counts."""

    class Config(Settings):
        """Settings of the bag of tokens."""

        width: Width = 64
        """Length of a token's vector."""
        hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = ()
        """Units of hidden layers over the mean. Layers: pooled, hidden0_relu, hidden1_relu, ..."""
        start: Literal["answers", "vectors", "random"] = "vectors"
        """Where tokens' vectors start. answers: the principal components of what the teacher says of each token as a
        text of its own (as in Model2Vec, Tulkens and van Dongen 2024), the best one for encoders; vectors: those of the
        teacher's table of tokens; or random ones."""

    def body(self, inputs: Mapping[str, Any], teacher: keras.Model) -> Any:
        ids, mask = self._tokens(inputs)
        tokens = layers.Embedding(
            len(_token_table(teacher)),
            self.config.width,
            embeddings_initializer=self._initial("normal", "tokens"),
            name="tokens",
        )(ids)
        return self._hidden(MaskedMean(name="pooled", dtype="float32")([tokens, mask]), self.config.hidden)

    def start(self, made: keras.Model, teacher: keras.Model, representative: Features) -> None:
        if self.config.start == "random":
            return
        answers = self.config.start == "answers"
        table = _answers_to_tokens(teacher, representative) if answers else _token_table(teacher)
        components, axes, mean = principal_components(table, self.config.width)
        made.get_layer("tokens").set_weights([components])
        if answers and not self.config.hidden:  # back from the components to what the teacher said
            next(layer for layer in made.layers if isinstance(layer, layers.Dense)).set_weights([axes, mean])


class ShallowBert(TextStudent):
    """A BERT of fewer layers: some of the teacher's own, or narrower new ones.

    Layers are called as the teacher's, counted anew: embeddings_norm, layer0_norm, layer1_norm, ...
    """

    class Config(Settings):
        """Settings of the shallow BERT."""

        layers: int = Field(2, ge=1, le=96)
        """Transformer layers."""
        width: int = Field(0, ge=0, le=4096)
        """Length of token vectors. 0: the teacher's, which then gives all weights; of its layers those that lie evenly
        from the first to the last (as Sanh et al. 2019, arXiv:1910.01108, take every other one). Narrower vectors start
        as the principal components of the teacher's, and layers of that width as random ones."""
        heads: int = Field(2, ge=1, le=64)
        """Heads of attention of new layers; those taken from the teacher keep theirs."""

        @pydantic.model_validator(mode="after")
        def _heads_divide_width(self) -> ShallowBert.Config:
            if self.width % self.heads:
                raise ValueError(f"width must be a multiple of the {self.heads} heads; received {self.width}")
            return self

    def body(self, inputs: Mapping[str, Any], teacher: keras.Model) -> Any:
        ids, mask = self._tokens(inputs)
        taught = {layer.name: layer for layer in teacher.layers}
        depth = sum(isinstance(layer, ScaledDotProductAttention) for layer in teacher.layers)
        if depth == 0 or "embeddings_position" not in taught:
            raise ConfigError(
                "the student bert is made out of a text_bert, whose layers it takes; the model has none. Take the "
                "student bag_of_tokens."
            )
        if self.config.layers > depth:
            raise ConfigError(f"layers must be at most the {depth} of the model; received {self.config.layers}.")
        cls = any(isinstance(layer, FirstToken) for layer in teacher.layers)
        read = {
            "max_tokens": taught["embeddings_position"].positions,
            "pooling": "cls" if cls else "mean",
            "causal": taught["layer0_attention"].causal,
        }
        shape, settings = self._shape(taught), parse(TextBert.Config, read)
        return pooled_tokens(ids, mask, shape, settings, Dropouts(0.0, 0), "pooled")

    def start(self, made: keras.Model, teacher: keras.Model, representative: Features) -> None:
        taught = {layer.name: layer for layer in teacher.layers}
        last = sum(isinstance(layer, ScaledDotProductAttention) for layer in teacher.layers) - 1
        chosen = np.linspace(0, last, self.config.layers).round().astype(int)
        for layer in made.layers:
            if layer.name == "embeddings_word" and self.config.width:
                layer.set_weights([principal_components(_token_table(teacher), self.config.width)[0]])
            elif layer.weights and layer.name.startswith(("embeddings", "layer")):
                layer.set_weights(self._anew(layer) if self.config.width else _taken(layer, taught, chosen))

    def _shape(self, taught: Mapping[str, keras.layers.Layer]) -> BertShape:
        words, width = taught["embeddings_word"], self.config.width
        return BertShape(
            model_type="bert",
            vocab_size=words.input_dim,
            hidden_size=width or words.output_dim,
            num_hidden_layers=self.config.layers,
            num_attention_heads=self.config.heads if width else taught["layer0_attention"].heads,
            intermediate_size=4 * width or taught["layer0_wide"].units,
            max_position_embeddings=taught["embeddings_position"].positions,
            type_vocab_size=1,
            layer_norm_eps=taught["embeddings_norm"].epsilon,
            hidden_act=keras.activations.serialize(taught["layer0_activation"].activation),
        )

    def _anew(self, layer: keras.layers.Layer) -> list[np.ndarray]:
        """Weights that follow from the seed, in the place of those that Keras drew."""
        if not isinstance(layer, layers.Dense):
            return list(layer.get_weights())
        kernel, bias = layer.get_weights()
        return [self._initial("glorot_uniform", layer.name)(kernel.shape).numpy(), bias]


def _taken(layer: keras.layers.Layer, taught: Mapping[str, keras.layers.Layer], chosen: np.ndarray) -> list[np.ndarray]:
    """The teacher's weights for a layer: of its transformer layers, `chosen[n]` gives those of layer n."""
    block, _, part = layer.name.partition("_")
    number = block.removeprefix("layer")
    return list(taught[f"layer{chosen[int(number)]}_{part}" if number.isdecimal() else layer.name].get_weights())


def _token_table(teacher: keras.Model) -> np.ndarray:
    """The teacher's vectors of tokens, float32 `[V, H]`."""
    tables = [layer for layer in teacher.layers if isinstance(layer, layers.Embedding)]
    if not tables:
        raise ConfigError(
            "a student of tokens learns how many there are from the model's Embedding layer; it has none. "
            "Distil before methods that replace it."
        )
    return np.asarray(tables[0].get_weights()[0])


def _answers_to_tokens(teacher: keras.Model, representative: Features) -> np.ndarray:
    """What the teacher says of each token as a text of its own, float32 `[V, D]`: between the tokens that every text
    begins and ends with, such as [CLS] and [SEP], without which its answers mean little."""
    ids, mask = representative["input_ids"], representative["attention_mask"]
    ends = [ids[:, 0], ids[np.arange(len(ids)), mask.sum(axis=1) - 1]]
    first, last = (found[:1] if (found == found[0]).all() else found[:0] for found in ends)
    tokens = np.arange(len(_token_table(teacher)), dtype=np.int32)
    texts = np.stack(np.broadcast_arrays(*first, tokens, *last), axis=1).astype(np.int32)
    return answer_of(teacher, 512)({"input_ids": texts, "attention_mask": np.ones_like(texts)})


def principal_components(table: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The directions in which rows `[V, H]` vary most, float32.

    Returns:
        The rows, less their mean, along these directions `[V, width]`; the directions `[width, H]`; the mean `[H]`.

    Raises ConfigError for more directions than there are.
    """
    if width > table.shape[1]:
        raise ConfigError(
            f"width must be at most {table.shape[1]}, the length of the vectors that the student starts from; received "
            f"{width}. Make it smaller, or start from others."
        )
    rows = table.astype(np.float64)
    mean = rows.mean(axis=0)
    _, axes = np.linalg.eigh((rows - mean).T @ (rows - mean))  # in ascending order
    axes = axes[:, ::-1][:, :width]
    return tuple(array.astype(np.float32) for array in ((rows - mean) @ axes, axes.T, mean))  # type: ignore[return-value]


def _kind_of(student: Student) -> str:
    return next(name for name in STUDENTS if isinstance(student, STUDENTS[name]))
