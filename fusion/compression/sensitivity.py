"""How much each layer may be pruned: tried out layer by layer, from the lowest up, and chosen under a quality budget.

A scan is tuning and not fitting: it judges on the validation rows, as every choice among settings does. No weight is
fitted to them, and the test rows stay unseen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pydantic
from pydantic import Field

from fusion.compat import keras
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    LayerPatterns,
    Method,
    MethodSettings,
    answer_of,
    clone,
)
from fusion.compression.masks import (
    Sparsity,
    kernels_of,
    layers_to_prune,
    magnitude_mask,
    repaired,
    sparsity_facts,
)
from fusion.errors import GateError
from fusion.training.trainer import TrainingSettings

Ratios = Mapping[str, float]
"""By layer, the share of its weights that become zero."""


class PruneBySensitivity(Method):
    """Prunes each layer as much as it bears (Han et al. 2015, arXiv:1506.02626, section 3.2).

    Each layer is pruned alone, by magnitude and without training, at rising ratios. A layer then gets the largest ratio
    whose loss of quality is within a tolerance, and the tolerance is the largest with which all layers pruned together
    lose no more than `max_drop`.
    """

    class Config(MethodSettings):
        """Settings of the scan."""

        max_drop: float = Field(0.01, ge=0, allow_inf_nan=False)
        """Most that the quality may fall with all layers pruned, before any repair; in units of the metric."""
        ratios: tuple[Sparsity, ...] = Field((0.3, 0.5, 0.7, 0.8, 0.9), min_length=1, max_length=32)
        """Shares of zeros that are tried, rising."""
        stop: float = Field(0.1, ge=0, allow_inf_nan=False)
        """A layer is not tried with more zeros once it alone has cost this much quality."""
        layers: LayerPatterns = ()
        """Layers to prune, or patterns of them; none stands for all."""
        repair: TrainingSettings | None = None
        """The training loop that makes up for what was lost, with zeros kept; null does without."""

        @pydantic.field_validator("ratios")
        @classmethod
        def _rising(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
            if list(ratios) != sorted(set(ratios)):
                raise ValueError(f"ratios must rise; received {list(ratios)}")
            return ratios

    config: Config

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Ratios that the scan chose; facts hold the scan, `[[ratio, quality], ...]` by layer, ready to be plotted."""
        chosen, alone = layers_to_prune(subject.model, self.config.layers)
        trial = _Trial(subject.model, [layer.name for layer in chosen], data)
        scan = {name: self._scan(trial, name) for name in trial.originals}
        ratios, quality = self._choose(trial, scan)
        alone |= {name: "loses too much with the least ratio tried" for name in trial.originals if name not in ratios}
        model = repaired(trial.model(ratios), data, self.config.repair)
        facts = {
            "scan": scan,
            "ratios": ratios,
            "quality_before": trial.full,
            "quality_without_training": quality,
            **sparsity_facts(model, ratios),
        }
        return replace(subject, model=model), Applied(alone, facts)

    def _scan(self, trial: _Trial, name: str) -> list[tuple[float, float]]:
        """Quality with this layer alone pruned, at each ratio tried."""
        found = []
        for ratio in self.config.ratios:
            quality = trial.quality({name: ratio})
            found.append((ratio, quality))
            if trial.drop(quality) >= self.config.stop:
                break
        return found

    def _choose(self, trial: _Trial, scan: Mapping[str, list[tuple[float, float]]]) -> tuple[dict[str, float], float]:
        """The ratios of the largest tolerance within `max_drop`, and the quality with all of them.

        Found by bisection: a larger tolerance means more zeros, and what is returned has been measured itself.
        """
        drops = {name: [(ratio, trial.drop(quality)) for ratio, quality in found] for name, found in scan.items()}
        tolerances = sorted({drop for found in drops.values() for _, drop in found})
        best: tuple[dict[str, float], float] | None = None
        low, high = 0, len(tolerances)
        while low < high:
            middle = (low + high) // 2
            ratios = {
                name: max(ratio for ratio, drop in found if drop <= tolerances[middle])
                for name, found in drops.items()
                if any(drop <= tolerances[middle] for _, drop in found)
            }
            quality = trial.quality(ratios)
            if trial.drop(quality) <= self.config.max_drop:
                best, low = (ratios, quality), middle + 1
            else:
                high = middle
        if best is None:
            raise GateError(
                f"a layer must bear a share of zeros of {min(self.config.ratios):g} within max_drop "
                f"{self.config.max_drop:g}; none of {', '.join(scan)} does. Try smaller ratios, or allow a larger drop."
            )
        return best


class _Trial:
    """A copy of a model whose kernels are pruned and restored, to be judged.

    Attributes:
        originals: by layer, from the lowest up, the kernel as it was.
        full: quality without pruning.
    """

    def __init__(self, model: keras.Model, names: Collection[str], data: CompressionData) -> None:
        self._model, self._data = model, data
        self._copy = clone(model)
        self._answer = answer_of(self._copy)
        self.originals = {name: kernel.numpy() for name, kernel in kernels_of(model, names).items()}
        self.full = self.quality({})

    def quality(self, ratios: Ratios) -> float:
        """With the named layers pruned and the others whole."""
        self._prune(self._copy, ratios)
        return self._data.quality(self._answer)

    def drop(self, quality: float) -> float:
        """How much less that is than without pruning."""
        return self.full - quality if self._data.higher_is_better else quality - self.full

    def model(self, ratios: Ratios) -> keras.Model:
        """A model of its own, pruned so."""
        copy = clone(self._model)
        self._prune(copy, ratios)
        return copy

    def _prune(self, model: keras.Model, ratios: Ratios) -> None:
        for name, kernel in kernels_of(model, self.originals).items():
            values = self.originals[name]
            kernel.assign(values * magnitude_mask(values, ratios[name]) if name in ratios else values)
