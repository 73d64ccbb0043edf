"""`encoders:`: an encoder that is described once in a config, and that several members name."""

from __future__ import annotations

from typing import Any

from fusion.errors import ConfigError
from fusion.registry import Registry, nearest

KEY = "encoders"


def expand_encoders(config: dict[str, Any], registry: Registry, default: str | None = None) -> dict[str, Any]:
    """The config with its encoders written out in the members that name them.

    `encoders: {bert: {...}}`, and `encoder: bert` in two members, stand for that encoder in each of them with
    `share: bert`, so that it is one object in joint training. Members of a kind that does not train its encoder get
    the settings alone.

    Args:
        config: as it was read.
        registry: of the members.
        default: the kind of a member that does not name its own.

    Raises ConfigError for an encoder that is not there, and for one that nobody names.
    """
    members = config.get("members")
    if not isinstance(members, dict):
        return config
    encoders = config.get(KEY) or {}
    if not isinstance(encoders, dict):
        raise ConfigError(f"{KEY} must be a mapping from names to encoders; received {encoders!r}.")
    expanded, idle = {}, set(encoders)
    for name, settings in members.items():
        word = settings.get("encoder") if isinstance(settings, dict) else None
        if isinstance(word, str):
            if word not in encoders:
                raise ConfigError(f"members.{name}.encoder: no encoder '{word}' under {KEY}: {nearest(word, encoders)}")
            settings = {**settings, "encoder": encoders[word]}
            if "share" in registry[str(settings.get("kind", default))].Config.model_fields:
                settings["share"] = word
            idle.discard(word)
        expanded[name] = settings
    if idle:
        one = min(idle)
        raise ConfigError(f"{KEY}.{one}: a member must name it, as in 'encoder: {one}'; none does. Leave it out.")
    return {**{key: value for key, value in config.items() if key != KEY}, "members": expanded}
