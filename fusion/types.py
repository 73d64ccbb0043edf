"""The few values that travel between the parts of `fusion`.

Axes: B batch, S submodel, C class or candidate, D embedding, L tokens, H W image, K list length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Features = dict[str, np.ndarray]
"""Named model inputs, each with the leading axis B."""

Over = Literal["classes", "candidates"]
"""What the axis C runs over: the classes of a classifier, or the items of a catalogue."""

Context = Mapping[str, Any]
"""What is known of an example beside the members' scores, by name: float32 `[B, 1]`, or a number a candidate, `[B, C]`
or `[1, C]`. NaN is unknown."""


@dataclass(frozen=True)
class RunOptions:
    """Facts of one training run that are not settings: they never enter a config or its hash.

    Attributes:
        seed: every part derives its own from it with `derive_seed`.
        directory: where checkpoints and TensorBoard files of this member go; made when missing.
        strategy: a `tf.distribute.Strategy`; None means the default one.
        quiet: no progress on stderr.
    """

    seed: int
    directory: Path
    strategy: Any = None
    quiet: bool = False


@dataclass
class History:
    """What training did: one row of metrics per epoch, the best epoch, and why it stopped."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    stopped: str = "all epochs done"
    seconds: float = 0.0


Validate = Callable[[], Mapping[str, float]]


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of its own for each part, the same in every process (Python's `hash` is not).

    >>> derive_seed(1, "member", "text") == derive_seed(1, "member", "text")
    True
    """
    mixed = np.random.SeedSequence([seed, *("/".join(map(str, names)).encode())])
    return int(mixed.generate_state(1)[0] % (2**31 - 1))
