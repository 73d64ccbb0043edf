"""Mixed precision: products in 16 bits, while weights, softmax, losses and metrics stay in 32.

A model reckons in the precision of the scope in which it was built. Its weights are float32 in any case, so that a
model built anew outside such a scope takes them as they are: what is saved, fused and served is always float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from fusion.compat import keras, tf

Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]


@contextlib.contextmanager
def precision_scope(precision: Precision) -> Iterator[None]:
    """Layers that are built within reckon in `precision` (Micikevicius et al. 2018, arXiv:1710.03740)."""
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(precision)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def narrow(values: Any) -> Any:
    """Values in the type that layers reckon in where this is called: what they are multiplied with then comes in that
    type as well. Themselves where that is float32."""
    return _cast(values, keras.mixed_precision.global_policy().compute_dtype)


def wide(values: Any) -> Any:
    """Values in float32, as sums, norms, softmax and losses need them: a sum in float16 stands still at 2048, and the
    square of a small number is 0."""
    return _cast(values, "float32")


def _cast(values: Any, dtype: str) -> Any:
    return values if values.dtype == dtype else tf.cast(values, dtype)
