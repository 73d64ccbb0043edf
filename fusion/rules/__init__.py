"""Fusion rules: Keras layers that turn the members' scores `[B, S, C]` into one score `[B, C]`.

The table names them; what every rule promises stands in `fusion.rules.base`.
"""

from __future__ import annotations

from fusion.registry import Registry

RULES = Registry(
    "rule",
    {
        "average": "fusion.rules.average:Average",
        "vote": "fusion.rules.vote:Vote",
        "probability": "fusion.rules.probability:Probability",
        "greedy": "fusion.rules.greedy:Greedy",
        "stacker": "fusion.rules.stacker:Stacker",
    },
)

__all__ = ["RULES"]
