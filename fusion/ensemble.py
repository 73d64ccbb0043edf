"""Classification: fitted members that each read text or image, and a rule, as one functional model.

Members come fitted (`fusion.training.member`); what is read from where is decided by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fusion.compat import keras, tf
from fusion.rules.base import Rule
from fusion.submodels.base import Submodel
from fusion.submodels.standardized import folded
from fusion.types import Context, Features


class FittedMember(Protocol):
    """What an ensemble asks of a member: named inputs, a model, and logits of raw values."""

    submodel: Submodel

    @property
    def model(self) -> keras.Model:
        """Named inputs -> `logits` `[B, C]` and `embedding` `[B, D]`."""

    def logits(self, values: Sequence[Any]) -> np.ndarray:
        """Logits float32 `[N, C]` of raw values."""


class _Contributions(keras.layers.Layer):
    """`Rule.contributions` as one layer: a rule may loop, which operations between layers cannot."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(name="contributions", dtype="float32")
        self.rule = rule

    def call(self, scores: Any, mask: Any, context: Context) -> Any:
        """Terms `[B, S, C]` and bias `[B, C]`."""
        return self.rule.contributions(scores, mask, context)


class Ensemble:
    """Fitted members and a rule.

    >>> ensemble = Ensemble({"cnn": cnn, "bert": bert}, rule)          # doctest: +SKIP
    >>> ensemble.predict({"cnn": images, "bert": texts})               # doctest: +SKIP
    """

    def __init__(self, members: Mapping[str, FittedMember], rule: Rule) -> None:
        self.members = dict(members)
        self.rule = rule

    def predict(
        self, values: Mapping[str, Sequence[Any]], mask: np.ndarray | None = None, context: Context | None = None
    ) -> np.ndarray:
        """Probabilities `[N, C]` of raw values by member; `mask` bool `[N, S]` says what is there, `context` `[N, 1]`
        by name what the rule reads beside."""
        logits = np.stack([member.logits(values[name]) for name, member in self.members.items()], axis=1)
        return self.fuse(logits, mask, context)

    def fuse(self, logits: np.ndarray, mask: np.ndarray | None = None, context: Context | None = None) -> np.ndarray:
        """Probabilities `[N, C]` of the members' logits `[N, S, C]`."""
        fused = self.rule(tf.constant(logits), None if mask is None else tf.constant(mask), context)
        return self.rule.probabilities(fused).numpy()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the context that the rule reads."""
        return self.rule.reads(self.rule.config)

    def prepare(self, values: Mapping[str, Sequence[Any]], context: Context | None = None) -> Features:
        """Raw values by member, and the context, as the inputs of `functional()`, in shapes that do not depend on the
        values."""
        inputs: Features = {f"context_{name}": np.asarray((context or {})[name], np.float32) for name in self.reads}
        for name, member in self.members.items():
            features = member.submodel.prepare(values[name], fixed_length=True)
            inputs |= {f"{name}_{feature}": array for feature, array in features.items()}
        return inputs

    def functional(self) -> keras.Model:
        """One functional model.

        Inputs: `<member>_<feature>`, `mask` bool `[B, S]` (which members have something to read), and `context_<name>`
        `[B, 1]` for each number that the rule reads. Outputs: `probabilities` `[B, C]`, `scores` `[B, C]` and
        `contributions` `[B, S, C]`, which sum to the scores less the rule's bias.
        """
        inputs: dict[str, Any] = {}
        logits = []
        for name, member in self.members.items():
            own, model = {}, folded(member.model)
            for tensor in model.inputs:
                feature = tensor.name.split(":")[0]
                own[feature] = keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=f"{name}_{feature}")
            inputs |= {f"{name}_{feature}": tensor for feature, tensor in own.items()}
            # Under the member's name: two members with encoders of one kind have models of one name.
            renamed = keras.Model(model.inputs, model.output["logits"], name=name)
            logits.append(renamed(own))
        mask = keras.Input((len(self.members),), dtype=tf.bool, name="mask")
        stacked = tf.stack(logits, axis=1)
        context = {name: keras.Input((1,), dtype=tf.float32, name=f"context_{name}") for name in self.reads}
        inputs |= {f"context_{name}": tensor for name, tensor in context.items()}
        contributions, bias = _Contributions(self.rule)(stacked, mask, context)
        scores = tf.reduce_sum(contributions, axis=1) + bias
        outputs = {
            "probabilities": self.rule.probabilities(scores),
            "scores": scores,
            "contributions": contributions,
        }
        return keras.Model({**inputs, "mask": mask}, outputs)
