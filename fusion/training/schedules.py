"""Learning-rate schedules: how the learning rate moves over the steps of a training run."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Settings

Kind = Literal["constant", "cosine", "exponential", "step"]

# The keys that only some kinds read; another kind that is given one is refused instead of ignoring it.
_KINDS_OF_KEY: dict[str, tuple[Kind, ...]] = {
    "decay_rate": ("exponential", "step"),
    "decay_epochs": ("exponential", "step"),
    "final_fraction": ("cosine",),
}


class ScheduleSettings(Settings):
    """How the learning rate moves; `Schedule` states the formulas."""

    kind: Kind = "constant"
    """The shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from nothing to its full value."""
    decay_rate: float = Field(default=0.5, gt=0, le=1)
    """Factor by which the rate falls every `decay_epochs` (exponential, step)."""
    decay_epochs: float = Field(default=1.0, gt=0)
    """Epochs over which the rate falls by one factor `decay_rate` (exponential, step)."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the full rate that is left at the last step (cosine)."""

    @pydantic.model_validator(mode="after")
    def _no_key_of_another_kind(self) -> ScheduleSettings:
        for key, kinds in _KINDS_OF_KEY.items():
            # Defaults pass, so that a resolved config, which spells out every key, can be read again.
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"the key {key} must go with a schedule of kind {' or '.join(kinds)}; received kind {self.kind}"
                )
        return self


@keras.utils.register_keras_serializable("fusion")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of step t = 0, 1, ..., out of the full rate r.

    With w warm-up steps, T steps in all, e steps an epoch and u = t - w:

        t < w         r (t + 1) / w
        constant      r
        cosine        r (f + (1 - f) (1 + cos(pi min(u / (T - w), 1))) / 2)      f = final_fraction
        exponential   r d^(u / (e n))                                  d = decay_rate, n = decay_epochs
        step          r d^floor(u / (e n))

    Cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983), one cycle without restarts. Linear warm-up: Goyal et
    al. 2017 (arXiv:1706.02677). Computed in float32. An optimizer that takes its first step later, at step `start` of
    the training, is given the rate that the others have by then.
    """

    def __init__(
        self, rate: float, settings: ScheduleSettings, steps: int, steps_per_epoch: int, start: int = 0
    ) -> None:
        self.rate, self.settings = rate, settings
        self.steps, self.steps_per_epoch, self.start = steps, steps_per_epoch, start

    def __call__(self, step: Any) -> tf.Tensor:
        settings = self.settings
        step = tf.cast(step, tf.float32) + float(self.start)
        after = tf.maximum(step - float(settings.warmup_steps), 0.0)
        rate = tf.constant(self.rate, tf.float32) * self._factor(after)
        if settings.warmup_steps:
            warm = self.rate * (step + 1.0) / float(settings.warmup_steps)
            rate = tf.where(step < float(settings.warmup_steps), warm, rate)
        return rate

    def _factor(self, after: tf.Tensor) -> tf.Tensor:
        settings = self.settings
        decays = after / float(self.steps_per_epoch * settings.decay_epochs)
        if settings.kind == "cosine":
            share = tf.minimum(after / float(max(1, self.steps - settings.warmup_steps)), 1.0)
            wave = 0.5 * (1.0 + tf.cos(tf.constant(3.14159265358979, tf.float32) * share))
            return settings.final_fraction + (1.0 - settings.final_fraction) * wave
        if settings.kind == "exponential":
            return tf.pow(settings.decay_rate, decays)
        if settings.kind == "step":
            return tf.pow(settings.decay_rate, tf.floor(decays))
        return tf.ones_like(after)

    def get_config(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "settings": self.settings.model_dump(),
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "start": self.start,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        return cls(**{**config, "settings": ScheduleSettings(**config["settings"])})
