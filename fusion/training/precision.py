"""Mixed precision: products in 16 bits, while weights, softmax, losses and metrics stay in 32.

A model reckons in the precision of the scope in which it was built. Its weights are float32 in any case, so that a
model built anew outside such a scope takes them as they are: what is saved, fused and served is always float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from fusion.compat import keras

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
