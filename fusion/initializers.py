"""Where the weights of networks that are trained from scratch start, by name; each layer has a seed of its own."""

from __future__ import annotations

from typing import Literal

from fusion.compat import keras

Initializer = Literal[
    "zeros",
    "ones",
    "uniform",
    "normal",
    "he_uniform",
    "he_normal",
    "glorot_uniform",
    "glorot_normal",
    "orthogonal",
]
"""How the weights of a group of layers start.

`zeros` and `ones` are constant: units of one hidden layer that start equal stay equal, so they are for last layers.
`uniform` is drawn from -0.05 to 0.05, and `normal` has the deviation 0.05, whatever the layer's size. With n inputs and
m outputs of a unit, the variance of `he_*` is 2 / n (He et al. 2015, arXiv:1502.01852, eq. 10) and that of `glorot_*`,
also called Xavier, is 2 / (n + m) (Glorot and Bengio 2010, eq. 12). `orthogonal` has rows or columns of length 1 at
right angles (Saxe et al. 2014, arXiv:1312.6120).
"""

_RANDOM = {
    "uniform": keras.initializers.RandomUniform,
    "normal": keras.initializers.RandomNormal,
    "he_uniform": keras.initializers.HeUniform,
    "he_normal": keras.initializers.HeNormal,
    "glorot_uniform": keras.initializers.GlorotUniform,
    "glorot_normal": keras.initializers.GlorotNormal,
    "orthogonal": keras.initializers.Orthogonal,
}


def initializer(name: Initializer, seed: int) -> keras.initializers.Initializer:
    """The initialiser of that name; equal seeds give equal weights."""
    if name == "zeros":
        return keras.initializers.Zeros()
    return keras.initializers.Ones() if name == "ones" else _RANDOM[name](seed=seed)
