"""Ensembles of Keras models: submodels, fusion rules, training, export. Speaks of features and classes only."""

from __future__ import annotations

from typing import Any

__all__ = ["Ensemble"]


def __getattr__(name: str) -> Any:
    """`fusion.Ensemble`, loaded on first use: configs and manifests work without TensorFlow."""
    if name == "Ensemble":
        from fusion.ensemble import Ensemble

        return Ensemble
    raise AttributeError(f"module 'fusion' has no attribute '{name}'")
