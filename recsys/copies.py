"""`copies: 5`: one member of a config becomes five of equal settings, told apart by their seeds alone.

`bert: {copies: 5, ...}` stands for bert_1 to bert_5. A member's seed is derived from its name, so each copy has its
own, and its own place in the cache: raising 5 to 7 fits two more. Averaging such copies is the deep ensemble of
Lakshminarayanan et al. 2017, https://arxiv.org/abs/1612.01474.
"""

from __future__ import annotations

from typing import Any

from fusion.config import parse_part
from fusion.errors import ConfigError
from fusion.registry import Registry

KEY = "copies"
MOST = 50


def expand_copies(config: dict[str, Any], registry: Registry, default: str | None = None) -> dict[str, Any]:
    """The config with every member that has `copies` written out, in its place, and given weights shared by them.

    Args:
        registry: the table of the task's members; `default`: the kind of a member that names none.

    Raises ConfigError for a number of copies that is none, a name that is taken, and a member whose copies would be
    equal.
    """
    members = config.get("members")
    if not isinstance(members, dict):
        return config
    expanded: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for name, settings in members.items():
        if not isinstance(settings, dict) or KEY not in settings:
            expanded[name] = settings
            continue
        one = {key: value for key, value in settings.items() if key != KEY}
        names[name] = _names(name, settings[KEY])
        for copy in names[name]:
            if copy in members:
                raise ConfigError(
                    f"members.{name}.{KEY}: the copies are called {names[name][0]} to {names[name][-1]}, and the "
                    f"config has another member '{copy}'. Give one of them another name."
                )
            expanded[copy] = one
        _check_random(name, {"kind": default, **one} if default else one, registry)
    return {**config, "members": expanded, **_with_shared_weights(config, names)}


def _names(name: str, copies: Any) -> list[str]:
    if isinstance(copies, bool) or not isinstance(copies, int) or not 2 <= copies <= MOST:
        raise ConfigError(f"members.{name}.{KEY}: must be a whole number from 2 to {MOST}; received {copies!r}.")
    return [f"{name}_{number}" for number in range(1, copies + 1)]


def _check_random(name: str, settings: dict[str, Any], registry: Registry) -> None:
    part = parse_part(registry, settings, f"members.{name}")
    if not registry[part.kind].depends_on_seed(part.config):
        raise ConfigError(
            f"members.{name}.{KEY}: copies differ by their seed alone, and this {part.kind} does not depend on one: "
            f"every copy would give the same answers. Leave {KEY} out."
        )


def _with_shared_weights(config: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The rules of the config, with a weight that was given to a copied member spread evenly over its copies."""
    rules = config.get("rules")
    if not names or not isinstance(rules, dict):
        return {}
    return {"rules": {name: _shared(rule, names) for name, rule in rules.items()}}


def _shared(rule: Any, names: dict[str, list[str]]) -> Any:
    weights = rule.get("weights") if isinstance(rule, dict) else None
    if not isinstance(weights, dict):
        return rule
    spread: dict[str, Any] = {}
    for name, weight in weights.items():
        copies = names.get(name) if isinstance(weight, (int, float)) else None
        spread |= {copy: weight / len(copies) for copy in copies} if copies else {name: weight}
    return {**rule, "weights": spread}
