"""Activations that integers resolve better, and activations that are cheaper to reckon."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    FineTuned,
    Method,
    MethodSettings,
    check_representative,
    clone,
    fine_tune,
    input_names,
)
from fusion.compression.codes import LIMITS
from fusion.errors import GateError
from fusion.training.trainer import TrainingSettings
from fusion.types import Features

layers = keras.layers

FUSED = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.DepthwiseConv2D)
"""Kinds of layers that may have an `activation` of their own."""

BEHIND = "_relu"
"""Ends the name of a ReLU that was an argument of the layer before it."""

ROWS_AT_ONCE = 16
SAMPLED = 20_000
"""Outputs of a layer that are kept of each batch, to take percentiles of."""


def activation_of(layer: keras.layers.Layer) -> str:
    """The name of the activation that a layer ends with, `linear` where it has none."""
    if isinstance(layer, layers.ReLU):
        return "relu" if layer.negative_slope == layer.threshold == 0 else "leaky_relu"
    if isinstance(layer, (layers.Activation, *FUSED)):
        return str(getattr(layer.activation, "__name__", type(layer.activation).__name__))
    return "linear"


# ---- bounded activations -------------------------------------------------------------------------------------


class ClipActivations(Method):
    """Bounds ReLU from above: ReLU(max_value). One outlier then does not take the steps of an int8 range from all else.

    Layers with `activation="relu"` become the layer and a ReLU of the name `<layer>_relu`.
    """

    class Config(FineTuned):
        """Settings of bounded activations."""

        bounds: Literal["percentile", "mse", "kl", "learned"] = "percentile"
        """Of each layer's outputs over the representative set: percentile; mse, where integers have the least expected
        squared error (OCTAV); kl, where their distribution changes least (TensorRT's entropy calibration). learned: by
        gradient over the training rows, with the weights (PACT)."""
        percentile: float = Field(99.9, gt=50, le=100)
        """Share of outputs, in percent, that is left as it is."""
        bits: int = Field(8, ge=2, le=8)
        """Bits of the activations that mse, kl and learned reckon with."""
        decay: float = Field(0.0005, ge=0, le=1)
        """What squares of learned bounds are multiplied by in the loss, which is what makes them small."""

        @pydantic.model_validator(mode="after")
        def _of_these_bounds(self) -> ClipActivations.Config:
            read = {"percentile": ("percentile",), "learned": ("bits", "decay", "training")}.get(self.bounds, ("bits",))
            idle = self.set_among(*({"percentile", "bits", "decay", "training"} - set(read)))
            if idle:
                raise ValueError(f"bounds: {self.bounds} reads no {', no '.join(sorted(idle))}; leave that out")
            return self

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Bounds every ReLU; facts hold the largest output, the bound, and the share of outputs beyond it."""
        check_representative(data.representative)
        model = separate_relus(subject.model)
        relus = [layer for layer in model.layers if activation_of(layer) == "relu"]
        alone = {layer.name: "is used more than once" for layer in relus if len(layer.inbound_nodes) > 1}
        names = [layer.name for layer in relus if layer.name not in alone]
        outputs = _outputs(model, names, data.representative, data.options.seed) if names else {}
        alive = {name: seen for name, seen in outputs.items() if seen.largest > 0}
        if not alive:
            raise GateError("a model must have a ReLU that is not always zero to be bounded; this one has none.")
        if self.config.bounds == "learned":
            model, bounds = self._learned(model, {name: seen.largest for name, seen in alive.items()}, data)
        else:
            # Of outputs that are nearly all zero, the percentile is zero too; what there is of them stays.
            bounds = {name: self._bound(seen) or seen.largest for name, seen in alive.items()}
        clipped = clone(
            model, lambda layer: _bounded(layer, bounds[layer.name]) if layer.name in bounds else _as(layer)
        )
        ranges = {
            name: {"largest": alive[name].largest, "bound": bound, "beyond": alive[name].beyond(bound)}
            for name, bound in bounds.items()
        }
        alone |= {name: "gives nothing but zeros" for name in names if name not in alive}
        known = {layer.name for layer in subject.model.layers}
        alone = {name if name in known else name.removesuffix(BEHIND): reason for name, reason in alone.items()}
        return replace(subject, model=clipped), Applied(alone, {"ranges": ranges})

    def _bound(self, seen: _Outputs) -> float:
        if self.config.bounds == "percentile":
            return float(np.percentile(seen.sample, self.config.percentile))
        return float(LIMITS[self.config.bounds](seen.sample, self.config.bits)[0])

    def _learned(
        self, model: keras.Model, starts: dict[str, float], data: CompressionData
    ) -> tuple[keras.Model, dict[str, float]]:
        """The fine-tuned model with plain ReLU, and its bounds."""

        def learning(layer: keras.layers.Layer) -> keras.layers.Layer:
            if layer.name not in starts:
                return _as(layer)
            return LearnedClip(starts[layer.name], self.config.decay, self.config.bits, name=layer.name)

        trained = keras.models.clone_model(model, clone_function=learning)
        copy_weights(model, trained)
        fine_tune(trained, data, self.config.training)
        bounds = {name: float(trained.get_layer(name).bound()) for name in starts}
        plain = clone(model)
        copy_weights(trained, plain)
        return plain, bounds


class LearnedClip(keras.layers.Layer):
    """min(ReLU(x), α) in 2^bits - 1 steps, with an α that is learned: any shape -> the same.

    PACT (Choi et al., https://arxiv.org/abs/1805.06085, equations 1 to 3): α gets the gradient of all outputs beyond
    it, rounding is passed straight through. α is start · exp(20 t), and t is learned: Adam moves a variable by about
    the learning rate a step, whatever its size, which would leave α where it began.
    """

    def __init__(self, start: float, decay: float, bits: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.start, self.decay, self.steps = start, decay, 2**bits - 1

    def build(self, input_shape: Any) -> None:
        self.exponent = self.add_weight(
            name="exponent",
            shape=(),
            initializer="zeros",
            regularizer=lambda exponent: self.decay * tf.square(self._alpha(exponent)),
        )
        super().build(input_shape)

    def bound(self) -> Any:
        """α as it is now."""
        return self._alpha(self.exponent)

    def _alpha(self, exponent: Any) -> Any:
        return self.start * tf.exp(20.0 * exponent)

    def call(self, inputs: Any) -> Any:
        bound = self.bound()
        clipped = tf.minimum(tf.nn.relu(inputs), bound)
        step = bound / self.steps
        return clipped + tf.stop_gradient(tf.round(clipped / step) * step - clipped)


def separate_relus(model: keras.Model) -> keras.Model:
    """A copy of a functional model in which each `activation="relu"` of a layer is a ReLU layer behind it."""
    fused = {layer.name for layer in model.layers if isinstance(layer, FUSED) and activation_of(layer) == "relu"}
    if not fused:
        return clone(model)
    config = model.get_config()
    relus = {name: name + BEHIND for name in fused}
    for layer in config["layers"]:
        layer["inbound_nodes"] = _renamed(layer["inbound_nodes"], relus)
    for layer in [layer for layer in config["layers"] if layer["name"] in fused]:
        layer["config"] = {**layer["config"], "activation": "linear"}
        relu = layers.ReLU(name=relus[layer["name"]], dtype=layer["config"]["dtype"])
        behind = [[[layer["name"], node, 0, {}]] for node in range(len(layer["inbound_nodes"]))]
        config["layers"].append(
            {"class_name": "ReLU", "config": relu.get_config(), "name": relu.name, "inbound_nodes": behind}
        )
    config["output_layers"] = _renamed(config["output_layers"], relus)
    apart = keras.Model.from_config(config)
    copy_weights(model, apart)
    return apart


def _renamed(nodes: Any, names: dict[str, str]) -> Any:
    """References to layers, as a functional config nests them, with other names where there are some."""
    if isinstance(nodes, dict):
        return {key: _renamed(value, names) for key, value in nodes.items()}
    if isinstance(nodes, (list, tuple)):
        return [_renamed(value, names) for value in nodes]
    return names.get(nodes, nodes) if isinstance(nodes, str) else nodes


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Gives each layer of `target` the weights of the layer of its name, where it has as many."""
    names = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        if layer.weights and len(names[layer.name].weights) == len(layer.weights):
            layer.set_weights(names[layer.name].get_weights())


def _as(layer: keras.layers.Layer) -> keras.layers.Layer:
    return type(layer).from_config(layer.get_config())


def _bounded(layer: keras.layers.Layer, bound: float) -> keras.layers.Layer:
    """A ReLU or `Activation("relu")` as a ReLU that goes no further than `bound`, nor than it did."""
    config = layer.get_config()
    config.pop("activation", None)
    highest = config.get("max_value")
    return layers.ReLU.from_config(config | {"max_value": bound if highest is None else min(bound, float(highest))})


@dataclass(frozen=True)
class _Outputs:
    """Outputs of a layer: the largest, and a sample of all, float32 `[n]`."""

    largest: float
    sample: np.ndarray

    def beyond(self, bound: float) -> float:
        """The share of outputs above a bound."""
        return float((self.sample > bound).mean())


def _outputs(model: keras.Model, names: list[str], features: Features, seed: int) -> dict[str, _Outputs]:
    """What layers give over all rows."""
    observer = keras.Model(model.inputs, [model.get_layer(name).output for name in names])
    call = tf.function(lambda inputs: observer(inputs, training=False), reduce_retracing=True)
    kept: list[list[np.ndarray]] = [[] for _ in names]
    largest = np.full(len(names), -np.inf)
    random = np.random.default_rng(seed)
    for start in range(0, len(next(iter(features.values()))), ROWS_AT_ONCE):
        rows = {name: tf.constant(features[name][start : start + ROWS_AT_ONCE]) for name in input_names(model)}
        for number, output in enumerate(tf.nest.flatten(call(rows))):
            values = output.numpy().reshape(-1)
            kept[number].append(values if len(values) <= SAMPLED else random.choice(values, SAMPLED))
            largest[number] = max(largest[number], values.max())
    return {
        name: _Outputs(float(most), np.concatenate(sample))
        for name, most, sample in zip(names, largest, kept, strict=True)
    }


# ---- simple activations --------------------------------------------------------------------------------------


@keras.utils.register_keras_serializable("fusion")
def hard_sigmoid(x: Any) -> Any:
    """ReLU6(x + 3) / 6 (Howard et al., https://arxiv.org/abs/1905.02244, section 5.2)."""
    return tf.nn.relu6(x + 3.0) * (1 / 6)


@keras.utils.register_keras_serializable("fusion")
def hard_swish(x: Any) -> Any:
    """x · ReLU6(x + 3) / 6 (the same), which TFLite has as one operation."""
    return x * hard_sigmoid(x)


@keras.utils.register_keras_serializable("fusion")
def hard_tanh(x: Any) -> Any:
    """x, cut at -1 and 1 (Collobert, Large Scale Machine Learning, 2004)."""
    return tf.clip_by_value(x, -1.0, 1.0)


@keras.utils.register_keras_serializable("fusion")
def quadratic_gelu(x: Any) -> Any:
    """GELU with the error function by a second-order polynomial: I-BERT (Kim et al.,
    https://arxiv.org/abs/2101.01321, equation 8).

    x/2 · (1 + sgn(x) · p(|x| / √2)) with p(u) = 1 - .2888 (min(u, 1.769) - 1.769)², where x · sgn(x) is |x|.
    """
    size = tf.abs(x)
    short = tf.minimum(size * math.sqrt(0.5), 1.769) - 1.769
    return 0.5 * (x + size * (1.0 - 0.2888 * short * short))


@dataclass(frozen=True)
class Simple:
    """A cheaper form of an activation.

    Attributes:
        function: the form.
        most: the largest difference between the two for any number.
    """

    function: Callable[[Any], Any]
    most: float


SIMPLE = {
    "gelu": Simple(quadratic_gelu, 0.0182),
    "sigmoid": Simple(hard_sigmoid, 0.0692),
    "swish": Simple(hard_swish, 0.1423),
    "tanh": Simple(hard_tanh, 0.2385),
}
"""By the name that Keras has for the activation."""


class SimpleActivations(Method):
    """Puts piecewise linear or quadratic forms in the place of activations with exponentials.

    For hardware that has to reckon these: LiteRT on a CPU has GELU, LOGISTIC and TANH as operations, in int8 as tables,
    and was measured to be no faster without them.
    """

    class Config(MethodSettings):
        """Settings of simple activations."""

        activations: tuple[Literal["gelu", "sigmoid", "swish", "tanh"], ...] = Field(
            ("gelu", "sigmoid", "swish", "tanh"), min_length=1
        )
        """Which activations get a simple form."""
        repair: TrainingSettings | None = None
        """The training loop by which the weights adapt to it; none: they stay as they are."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Replaces `Activation` layers and `activation` arguments, but for that of the output; facts hold the largest
        difference of each form."""
        outputs = set(subject.model.output_names)
        names = {layer.name: activation_of(layer) for layer in subject.model.layers}
        wanted = {layer: name for layer, name in names.items() if name in self.config.activations}
        alone = {layer: "has the activation of the model's answer" for layer in wanted if layer in outputs}
        forms = {layer: SIMPLE[name] for layer, name in wanted.items() if layer not in outputs}
        if not forms:
            others = ", ".join(sorted(set(names.values()) - {"linear"})) or "no activation"
            raise GateError(
                f"a model must have {' or '.join(self.config.activations)} within it to get a simple form; this one "
                f"has {others}. Leave the step out."
            )

        def simple(layer: keras.layers.Layer) -> keras.layers.Layer:
            form = {"activation": forms[layer.name].function} if layer.name in forms else {}
            return type(layer).from_config(layer.get_config() | form)

        model = clone(subject.model, simple)
        if self.config.repair is not None:
            fine_tune(model, data, self.config.repair)
        facts = {
            layer: {"was": wanted[layer], "is": form.function.__name__, "largest_difference": form.most}
            for layer, form in forms.items()
        }
        return replace(subject, model=model), Applied(alone, {"layers": facts})
