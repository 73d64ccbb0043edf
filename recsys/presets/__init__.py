"""Presets: members, rules and tuning for somebody who names no member. `collaborative: best` in a config takes one.

A preset is a YAML file beside this one, laid below the config: what the config says wins, null removes.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fusion.config import merge, parse_yaml
from fusion.errors import ConfigError
from fusion.registry import nearest

KEY = "collaborative"


def preset_names() -> list[str]:
    """The presets there are."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files(__package__).iterdir() if file.name.endswith(".yaml")
    )


def with_preset(config: dict[str, Any]) -> dict[str, Any]:
    """The config laid on the preset that it names, or as it is; ConfigError names the nearest preset."""
    name = config.get(KEY)
    if name is None:
        return config
    if name not in preset_names():
        raise ConfigError(f"{KEY}: unknown preset '{name}': {nearest(str(name), preset_names())}")
    text = files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return merge(parse_yaml(text, f"the preset {name}"), config)
