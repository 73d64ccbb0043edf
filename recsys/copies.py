"""`copies: 5`: one member of a config becomes five of equal settings, told apart by their seeds alone.

`bert: {copies: 5, ...}` stands for bert_1 to bert_5. A member's seed is derived from its name, so each copy has its
own, and its own place in the cache: raising 5 to 7 fits two more. Averaging such copies is the deep ensemble of
Lakshminarayanan et al. 2017, https://arxiv.org/abs/1612.01474.

With `aggregate` they stay one member: `bert: {copies: 5, aggregate: greedy, ...}` is one bert, whose weights are a mean
of those of five (`recsys.soups`). What a run keeps of it stands under `soups`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fusion.config import Part, Settings, parse, parse_part
from fusion.errors import ConfigError
from fusion.registry import Registry, nearest
from recsys.tuning import with_setting

KEY = "copies"
MOST = 50


class SoupSettings(Settings):
    """How the weights of several copies become one member."""

    copies: int = Field(5, ge=2, le=MOST)
    """Copies that start from the same weights and are trained with another order of rows each."""
    aggregate: Literal["mean", "by_validation", "greedy"] = "greedy"
    """mean: all count alike; by_validation: as much as their metric on validation; greedy: the best first, each further
    one only where the mean gets no worse on validation."""
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of the member's keys, given to the copies in turn, as in `{training.learning_rate: [1e-5, 3e-5]}`."""


def varied(part: Part, soup: SoupSettings, number: int, where: str) -> Part:
    """The settings of copy `number`, from 0; ConfigError for a key or a value that does not fit."""
    for key, values in soup.vary.items():
        if not values:
            raise ConfigError(f"{where}.{key} must list at least one value; received none.")
        part = with_setting(part, key, values[number % len(values)], where)
    return part


def check_soups(soups: Mapping[str, SoupSettings], members: Mapping[str, Part], mode: str) -> None:
    """Raises ConfigError for members whose copies cannot be averaged; `mode` is `training.mode`."""
    for name, soup in soups.items():
        if name not in members:
            raise ConfigError(f"soups names the unknown member '{name}': {nearest(name, members)}")
        part = members[name]
        if not part.registry[part.kind].averageable:
            able = [kind for kind in part.registry if part.registry[kind].averageable]
            raise ConfigError(
                f"members.{name}.aggregate: weights can be averaged of members that keep what gradients trained "
                f"({', '.join(able)}); received {part.kind}. Leave it out, and fuse the answers of copies by a rule."
            )
        if mode != "separate":
            raise ConfigError(
                f"members.{name}.aggregate must go with training.mode separate, where each copy is trained by itself; "
                f"received {mode}."
            )
        for number in range(soup.copies):
            varied(part, soup, number, f"members.{name}.vary")


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
    config, members = _with_soups(config, members)
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


def _with_soups(config: dict[str, Any], members: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config with what members say of averaging their copies under `soups`, and the members without it."""
    soups, left = {}, {}
    for name, settings in members.items():
        if not isinstance(settings, dict) or "aggregate" not in settings:
            left[name] = settings
            continue
        if KEY not in settings:
            raise ConfigError(f"members.{name}.aggregate must go with {KEY}, as in '{KEY}: 5'; received none.")
        soups[name] = {key: settings[key] for key in SoupSettings.model_fields if key in settings}
        parse(SoupSettings, soups[name], f"members.{name}")
        left[name] = {key: value for key, value in settings.items() if key not in SoupSettings.model_fields}
    if soups:
        config = {**config, "soups": {**config.get("soups", {}), **soups}}
    return config, left


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
