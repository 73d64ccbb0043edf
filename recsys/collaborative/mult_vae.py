"""Mult-VAE: an autoencoder that completes histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings
from fusion.types import History, RunOptions, derive_seed
from recsys.collaborative.base import (
    Decay,
    Member,
    TrainingData,
    constant,
    padded_numbers,
    pool_history,
    recency,
    with_padding_row,
)
from recsys.collaborative.tables import Table
from recsys.evaluation import history_rows
from recsys.metrics import parse_metric

NETWORK = ("encoder", "latent", "decoder", "logits")
"""The layers, in order; each has a kernel and a bias."""


class MultVAE(Member):
    """The multinomial variational autoencoder (Liang et al. 2018, "Variational autoencoders for collaborative
    filtering"), or without the noise in its middle their denoising autoencoder, Mult-DAE.

    A history x, scaled to unit length and with some of its items dropped, is encoded by a tanh layer into the mean
    and the variance of a latent normal; a tanh layer and a softmax over the catalogue decode a draw of it. Minimised is
    -sum_i x_i log softmax_i + beta KL(normal || standard normal), beta rising linearly from 0 (section 2.2).
    Answers use the mean. The first layer is a sum of rows over the history, so no users × items matrix is made.
    """

    class Config(Settings):
        """Settings of the autoencoder."""

        hidden: int = Field(256, ge=1, le=4096)
        """Units of the layers between catalogue and latent normal."""
        latent: int = Field(64, ge=1, le=4096)
        """Dimensions of the latent normal."""
        variational: bool = True
        """False leaves out noise and KL term: the denoising autoencoder, whose middle layer is a tanh layer too."""
        dropout: float = Field(0.5, ge=0, lt=1)
        """Share of a history's items that training hides from the encoder."""
        beta: float = Field(0.2, ge=0, le=10)
        """Weight of the KL term once it has risen."""
        anneal_epochs: float = Field(20.0, ge=0)
        """Epochs over which that weight rises; 0 has it in full from the first step."""
        decay: Decay = 1.0
        """What an item of a history counts in an answer, relative to the one taken after it."""
        training: TrainingSettings = TrainingSettings(epochs=100, batch_size=64, learning_rate=0.003, patience=10)
        """The training loop; a row is a user's history."""

    accelerations = ("xla", "accumulate")
    averageable = True

    def fit(self, data: TrainingData, options: RunOptions) -> History:
        """Trains the network on all histories; DataError where there are none."""
        from fusion.training.trainer import fit  # the trainer is not needed where fitted members are only scored

        validate = data.validate
        self.speaks = data.counts > 0
        users = np.flatnonzero(np.diff(data.matrix.indptr))
        steps = -(-len(users) // self.config.training.batch_size)
        with scope(options):
            self.model = self._build(len(self.speaks), round(self.config.anneal_epochs * steps))
        # Where the biases would go first: what little data there are then serve to learn taste.
        kernel, _ = self.model.get_layer("logits").get_weights()
        self.model.get_layer("logits").set_weights([kernel, np.log1p(data.counts, dtype=np.float32)])
        history = fit(
            self.model,
            evidence_bound(self.model),
            (len(users), lambda positions: {"history": history_rows(data.matrix, users[positions])}),
            self.config.training,
            options,
            (lambda: validate(self._scorer(self._weights_now()))) if validate else None,
            data.monitor,
            parse_metric(data.monitor, "candidates").higher_is_better,
        )
        self.weights = self._weights_now()
        return history

    def _build(self, items: int, anneal_steps: int) -> keras.Model:
        """history int32 `[B, L]` -> `logits` `[B, I]` and `penalty` `[B]`, the weighted KL term."""
        hidden = self.config.hidden
        history = keras.Input((None,), dtype=tf.int32, name="history")
        known = tf.cast(history >= 0, tf.float32)
        share = known * tf.math.rsqrt(tf.maximum(tf.reduce_sum(known, axis=1, keepdims=True), 1.0))
        share = keras.layers.Dropout(self.config.dropout, **self._random("dropout"))(share)
        x = HistorySum(items, hidden, self._start("encoder"), name="encoder")([history, share])
        latent, penalty = self._latent(keras.layers.Activation("tanh")(x), anneal_steps)
        x = keras.layers.Activation("tanh")(self._dense(latent, hidden, "decoder"))
        return keras.Model({"history": history}, {"logits": self._dense(x, items, "logits"), "penalty": penalty})

    def _latent(self, x: tf.Tensor, anneal_steps: int) -> tuple[tf.Tensor, tf.Tensor]:
        """A draw of the latent normal `[B, latent]` and its penalty `[B]`; of the denoising autoencoder, tanh and 0."""
        size = self.config.latent
        if not self.config.variational:
            x = keras.layers.Activation("tanh")(self._dense(x, size, "latent"))
            return x, tf.zeros_like(x[:, 0])
        x = self._dense(x, 2 * size, "latent")
        mean, log_variance = x[:, :size], x[:, size:]
        # A layer's noise and not tf.random's, because a checkpoint holds its state.
        noise = keras.layers.GaussianNoise(1.0, **self._random("noise"))(tf.zeros_like(mean))
        penalty = AnnealedWeight(self.config.beta, anneal_steps)(kl_to_standard_normal(mean, log_variance))
        return mean + noise * tf.exp(0.5 * log_variance), penalty

    def _random(self, name: str) -> dict[str, Any]:
        return {"seed": derive_seed(self.seed, name), "rng_type": "stateful", "force_generator": True, "name": name}

    def _start(self, name: str) -> keras.initializers.Initializer:
        return keras.initializers.GlorotUniform(seed=derive_seed(self.seed, name))

    def _dense(self, x: tf.Tensor, units: int, name: str) -> tf.Tensor:
        return keras.layers.Dense(units, kernel_initializer=self._start(name), name=name)(x)

    def _weights_now(self) -> dict[str, np.ndarray]:
        """Kernels and biases by name; of the latent layer, only the half that gives the mean."""
        weights: dict[str, np.ndarray] = {}
        for name in NETWORK:
            kernel, bias = self.model.get_layer(name).get_weights()
            if name == "encoder":
                kernel = kernel * self.speaks[:, None]  # what training never saw says nothing
            if name == "latent":
                kernel, bias = kernel[:, : self.config.latent], bias[: self.config.latent]
            weights |= {f"{name}_kernel": kernel, f"{name}_bias": bias}
        return weights

    def _scorer(self, weights: dict[str, np.ndarray]) -> tf.Module:
        return Completion(weights, middle=not self.config.variational, decay=self.config.decay)

    def state(self) -> dict[str, np.ndarray]:
        return {**self.weights, "speaks": self.speaks}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.speaks = state["speaks"]
        self.weights = {name: array for name, array in state.items() if name != "speaks"}

    def scorer(self) -> tf.Module:
        return self._scorer(self.weights)


class Completion(tf.Module):
    """The trained network without noise: histories int32 `[B, L]` -> logits `[B, I]`."""

    def __init__(self, weights: dict[str, np.ndarray], *, middle: bool, decay: float) -> None:
        super().__init__()
        self.table = Table(with_padding_row(weights["encoder_kernel"]), "encoder_kernel")
        self.kernels = {n: Table(w.T, n) for n, w in weights.items() if n.endswith("_kernel") and n != "encoder_kernel"}
        self.biases = {n: constant(w, tf.float32, n) for n, w in weights.items() if n.endswith("_bias")}
        self.middle, self.decay = middle, decay

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        rows = self.table.rows(padded_numbers(history, self.table.shape[0] - 1))  # [B, L, hidden]
        pooled = pool_history(rows, recency(history, self.decay), unit=False)
        latent = self._layer("latent", tf.tanh(pooled + self.biases["encoder_bias"]))
        hidden = tf.tanh(self._layer("decoder", tf.tanh(latent) if self.middle else latent))
        return self._layer("logits", hidden)

    def _layer(self, name: str, x: tf.Tensor) -> tf.Tensor:
        return self.kernels[f"{name}_kernel"].dot(x) + self.biases[f"{name}_bias"]


class HistorySum(keras.layers.Layer):
    """The first Dense layer of the encoder on x `[B, I]`, given as the items of its non-zero entries and their values.

    Inputs are items int32 `[B, L]`, padded with -1, and values float32 `[B, L]`; output `[B, units]`.
    """

    def __init__(self, items: int, units: int, start: keras.initializers.Initializer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items, self.units, self.start = items, units, start

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight("kernel", (self.items, self.units), initializer=self.start)
        self.bias = self.add_weight("bias", (self.units,), initializer="zeros")
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        history, values = inputs
        cells = tf.where(history >= 0)  # reads the rows of items alone: most of a batch may be padding
        rows = tf.gather(self.kernel, tf.gather_nd(history, cells)) * tf.gather_nd(values, cells)[:, None]
        return tf.math.unsorted_segment_sum(rows, cells[:, 0], tf.shape(history, tf.int64)[0]) + self.bias


class AnnealedWeight(keras.layers.Layer):
    """Multiplies by `annealed(step, ...)`; counts the steps of training in a variable, which a checkpoint holds."""

    def __init__(self, highest: float, steps: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.highest, self.steps = highest, steps

    def build(self, input_shape: Any) -> None:
        self.step = self.add_weight(
            "step",
            (),
            initializer="zeros",
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,  # all replicas take the step together
        )
        super().build(input_shape)

    def call(self, inputs: Any, training: bool = False) -> Any:
        weight = annealed(self.step, self.highest, self.steps)
        if training:
            self.step.assign_add(1.0)
        return weight * inputs


def annealed(step: tf.Tensor, highest: float, steps: int) -> tf.Tensor:
    """highest min(step / steps, 1): the weight of the KL term in training step 0, 1, ... (Liang et al. 2018, 2.2.2).

    With no steps to rise over it is the highest from the first one."""
    return highest * tf.minimum(step / steps, 1.0) if steps else tf.constant(highest, tf.float32)


def kl_to_standard_normal(mean: tf.Tensor, log_variance: tf.Tensor) -> tf.Tensor:
    """KL(N(mean, variance) || N(0, 1)) summed over dimensions: `[B, D]` twice -> `[B]` (Kingma & Welling 2014, B)."""
    return 0.5 * tf.reduce_sum(tf.exp(log_variance) + tf.square(mean) - 1.0 - log_variance, axis=1)


def evidence_bound(model: keras.Model) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """The loss `[b]` of histories `[b, L]`: the negative multinomial log-likelihood and the weighted KL term."""

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        answer = model(batch, training=True)
        taken = tf.gather(answer["logits"], tf.maximum(batch["history"], 0), batch_dims=1)
        surprise = tf.reduce_logsumexp(answer["logits"], axis=1, keepdims=True) - taken
        return tf.reduce_sum(tf.where(batch["history"] >= 0, surprise, 0.0), axis=1) + answer["penalty"]

    return loss
