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
from fusion.types import Features


class FittedMember(Protocol):
    """What an ensemble asks of a member: named inputs, a model, and logits of raw values."""

    submodel: Submodel

    @property
    def model(self) -> keras.Model:
        """Named inputs -> `logits` `[B, C]` and `embedding` `[B, D]`."""

    def logits(self, values: Sequence[Any]) -> np.ndarray:
        """Logits float32 `[N, C]` of raw values."""


class Ensemble:
    """Fitted members and a rule.

    >>> ensemble = Ensemble({"cnn": cnn, "bert": bert}, rule)          # doctest: +SKIP
    >>> ensemble.predict({"cnn": images, "bert": texts})               # doctest: +SKIP
    """

    def __init__(self, members: Mapping[str, FittedMember], rule: Rule) -> None:
        self.members = dict(members)
        self.rule = rule

    def predict(self, values: Mapping[str, Sequence[Any]], mask: np.ndarray | None = None) -> np.ndarray:
        """Probabilities `[N, C]` of raw values by member; `mask` bool `[N, S]` says what is there."""
        logits = np.stack([member.logits(values[name]) for name, member in self.members.items()], axis=1)
        return self.fuse(logits, mask)

    def fuse(self, logits: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Probabilities `[N, C]` of the members' logits `[N, S, C]`."""
        fused = self.rule(tf.constant(logits), None if mask is None else tf.constant(mask))
        return self.rule.probabilities(fused).numpy()

    def prepare(self, values: Mapping[str, Sequence[Any]]) -> Features:
        """Raw values by member as the inputs of `functional()`, in shapes that do not depend on the values."""
        inputs: Features = {}
        for name, member in self.members.items():
            features = member.submodel.prepare(values[name], fixed_length=True)
            inputs |= {f"{name}_{feature}": array for feature, array in features.items()}
        return inputs

    def functional(self) -> keras.Model:
        """One functional model: inputs `<member>_<feature>` and `mask` bool `[B, S]` (which members have something to
        read) -> `probabilities` `[B, C]`, `scores` `[B, C]` and `contributions` `[B, S, C]`, which sum to the
        scores less the rule's bias."""
        inputs: dict[str, Any] = {}
        logits = []
        for name, member in self.members.items():
            own = {}
            for tensor in member.model.inputs:
                feature = tensor.name.split(":")[0]
                own[feature] = keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=f"{name}_{feature}")
            inputs |= {f"{name}_{feature}": tensor for feature, tensor in own.items()}
            # Under the member's name: two members with encoders of one kind have models of one name.
            renamed = keras.Model(member.model.inputs, member.model.output["logits"], name=name)
            logits.append(renamed(own))
        mask = keras.Input((len(self.members),), dtype=tf.bool, name="mask")
        stacked = tf.stack(logits, axis=1)
        contributions, bias = self.rule.contributions(stacked, mask)
        scores = tf.reduce_sum(contributions, axis=1) + bias
        outputs = {
            "probabilities": self.rule.probabilities(scores),
            "scores": scores,
            "contributions": contributions,
        }
        return keras.Model({**inputs, "mask": mask}, outputs)
