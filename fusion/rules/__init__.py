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
        "learned": "fusion.rules.learned:Learned",
        "gate": "fusion.rules.gate:Gate",
        "stacker": "fusion.rules.stacker:Stacker",
        "stacker_mlp": "fusion.rules.stacker_mlp:StackerMLP",
        "stacker_gbdt": "fusion.rules.stacker_gbdt:StackerGBDT",
    },
)

__all__ = ["RULES"]
