"""Why a member answered so: the words of a text by integrated gradients, the regions of an image by Grad-CAM.

Both look at one member, one value and one number that the member made of it (a class's logit, or a score). They say
what the answer hangs on, not that it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusion.compat import keras, tf
from fusion.submodels.base import Submodel, split

STEPS = 64
"""Points on the path of integrated gradients."""
AT_ONCE = 8
"""Points whose gradients are taken together: what a language model keeps for them grows with their number."""

_BEFORE_VECTORS = (keras.layers.InputLayer, keras.layers.Embedding)
_NO_WORDS = ("[CLS]", "[SEP]", "<s>", "</s>")

Output = Callable[[Any], Any]
"""Embeddings `[B, D]` -> the number to be explained, `[B]`: a head's logit, or a score."""


def word_shares(submodel: Submodel, text: str, output: Output, steps: int = STEPS) -> list[tuple[str, float]]:
    """What each word adds to `output`, by integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, eq. 1).

    The path runs from words without any vector to the words of the text; the integral is a midpoint sum. Shares add up
    to the difference of the outputs at both ends ("completeness"), but for the error of the sum and for what pieces
    that are no words, such as [CLS], take. Of a bag of words the path is that of the embedding, whose parts are the
    words': its length is scaled to 1, so that a path of the words would never leave the answer.

    Args:
        submodel: a text encoder, with its weights as they are.
        text: one text.
        output: what is made of the embedding.
        steps: points on the path.

    Returns:
        Words, in the order of the text where the submodel reads it in order, and their shares.

    Raises:
        ValueError: a submodel that reads no text.
    """
    pieces = submodel.pieces(text)
    if not pieces:
        return []
    parts = submodel.parts(text)
    if parts is None:
        vectors, rest = _after_vectors(submodel, text, len(pieces))
        shares = vectors * _mean_slope(vectors, lambda points: output(rest(points)), steps)
    else:
        shares = parts * _mean_slope(parts.sum(axis=0), output, steps)
    return _joined(pieces, shares.astype(np.float64).sum(axis=1))


def _after_vectors(submodel: Submodel, text: str, length: int) -> tuple[np.ndarray, Output]:
    """The vectors `[L, W]` of the words of one text, and what makes embeddings of such vectors `[B, L, W]`."""
    encoder = submodel.encoder()
    trunk, top = split(encoder, {id(layer) for layer in encoder.layers if not isinstance(layer, _BEFORE_VECTORS)})
    features = {name: array[:, :length] for name, array in submodel.prepare([text]).items()}  # without padding
    read = trunk(features, training=False)
    (name,) = (name for name, values in read.items() if values.dtype.is_floating)

    def rest(points: Any) -> Any:
        others = {n: tf.repeat(values, len(points), axis=0) for n, values in read.items() if n != name}
        return top({**others, name: points}, training=False)

    return read[name][0].numpy(), rest


def _mean_slope(end: np.ndarray, function: Output, steps: int) -> np.ndarray:
    """The mean gradient of `function` on the straight way from 0 to `end`, in the shape of `end`."""
    along = (np.arange(steps, dtype=np.float32) + 0.5) / steps
    total = np.zeros_like(end)
    for start in range(0, steps, AT_ONCE):
        points = tf.constant(np.multiply.outer(along[start : start + AT_ONCE], end))
        with tf.GradientTape() as tape:
            tape.watch(points)
            value = tf.reduce_sum(function(points))
        total += tape.gradient(value, points).numpy().sum(axis=0)
    return total / steps


def _joined(pieces: Sequence[str], shares: np.ndarray) -> list[tuple[str, float]]:
    """Pieces of WordPiece as words, those that are no words left out."""
    words: list[tuple[str, float]] = []
    for piece, share in zip(pieces, shares.tolist(), strict=True):
        if piece.startswith("##") and words:
            words[-1] = words[-1][0] + piece[2:], words[-1][1] + share
        elif piece not in _NO_WORDS:
            words.append((piece, share))
    return words


def region_shares(submodel: Submodel, image: np.ndarray, output: Output) -> np.ndarray:
    """Where an image speaks for `output`, float32 `[H, W]` from 0 to 1 (Grad-CAM, Selvaraju et al. 2017, eq. 1 and 2).

    The last layer with a map of features is read; each of its features counts by its mean gradient, what speaks against
    is left out, and the map is enlarged to the size of the image. All 0 where nothing speaks for it.

    Args:
        submodel: an image encoder, with its weights as they are.
        image: uint8 `[H, W, 3]`.
        output: what is made of the embedding.
    """
    layers = submodel.encoder().layers
    position = max(number for number, layer in enumerate(layers) if len(layer.output.shape) == 4)
    trunk, top = split(submodel.encoder(), {id(layer) for layer in layers[position + 1 :]})
    features = trunk(submodel.prepare([image]), training=False)
    name = layers[position].name  # an embedding of several layers reads what was averaged before, too
    with tf.GradientTape() as tape:
        tape.watch(features)
        value = tf.reduce_sum(output(top(features, training=False)))
    weights = tf.reduce_mean(tape.gradient(value, features)[name], axis=[1, 2], keepdims=True)
    heat = tf.nn.relu(tf.reduce_sum(weights * features[name], axis=-1, keepdims=True))
    heat = tf.image.resize(heat, image.shape[:2])[0, :, :, 0].numpy()
    return np.asarray(heat / max(float(heat.max()), 1e-12), np.float32)
