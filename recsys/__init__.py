"""Recommendation: data, members that rank items for users, evaluation, and the recommender that is exported."""

from __future__ import annotations

from typing import Any

__all__ = ["Recommender"]


def __getattr__(name: str) -> Any:
    """`recsys.Recommender`, loaded on first use: metrics and readers work without TensorFlow."""
    if name == "Recommender":
        from recsys.api import Recommender

        return Recommender
    raise AttributeError(f"module 'recsys' has no attribute '{name}'")
