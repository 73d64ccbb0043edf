"""What is served: models by name, folder and versions, out of a folder or of TensorFlow Serving's configuration.

Imports no TensorFlow, so that a supervisor of workers stays small.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from fusion.export.manifest import FILE_NAME
from serving.errors import InvalidRequest


@dataclass(frozen=True)
class ModelConfig:
    """One model that is to be served.

    Attributes:
        name: what requests call it.
        folder: holds numbered versions, or is itself one artifact, which is then version 1.
        latest: how many of the newest versions to serve, where `versions` is None.
        versions: serve exactly these, as far as they are there; an empty tuple serves all.
        labels: version by label.
        canary: share from 0 to 1 of the requests without version and label that go to the version labelled `canary`;
            without that label to the newest one, until the label `stable` names it.
    """

    name: str
    folder: Path
    latest: int = 1
    versions: tuple[int, ...] | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    canary: float = 0.0


def check_configs(models: Sequence[ModelConfig]) -> None:
    """Raises InvalidRequest for a list that names a model twice, or contradicts itself."""
    names = [config.name for config in models]
    for config in models:
        if not config.name or names.count(config.name) > 1:
            raise InvalidRequest(
                f"every model must have a name of its own; received '{config.name[:100]}' twice or empty."
            )
        if "\0" in str(config.folder):
            raise InvalidRequest(f"the folder of '{config.name[:100]}' must be a path; it has a NUL character.")
        if config.latest < 1 or not 0 <= config.canary <= 1:
            raise InvalidRequest(
                f"a model must serve at least 1 version and a canary share from 0 to 1; '{config.name}' has "
                f"{config.latest} and {config.canary}."
            )


def version_folders(folder: Path) -> dict[int, Path]:
    """The numbered folders of a model, or the folder itself as version 1 where it is an artifact. Empty when it cannot
    be read."""
    if (folder / FILE_NAME).is_file():
        return {1: folder}
    try:
        entries = [e for e in os.scandir(folder) if e.name.isdecimal() and e.is_dir(follow_symlinks=False)]
    except OSError:
        return {}
    return {int(entry.name): Path(entry.path) for entry in entries if len(entry.name) <= 18}  # an int64


def model_configs(config: ModelServerConfig) -> list[ModelConfig]:
    """The models of TensorFlow Serving's configuration. Raises InvalidRequest for what is not served here."""
    if config.WhichOneof("config") != "model_config_list":
        raise InvalidRequest("the configuration must have a model_config_list.")
    made = []
    for model in config.model_config_list.config:
        if model.model_platform not in ("", "tensorflow") or not model.base_path:
            raise InvalidRequest(f"'{model.name[:100]}' must have a base_path and the platform 'tensorflow'.")
        policy = model.model_version_policy
        kind = policy.WhichOneof("policy_choice")
        made.append(
            ModelConfig(
                name=model.name,
                folder=Path(model.base_path),
                latest=policy.latest.num_versions or 1,
                versions=tuple(policy.specific.versions) if kind == "specific" else () if kind == "all" else None,
                labels=dict(model.version_labels),
            )
        )
    return made


def read_model_config(path: Path) -> list[ModelConfig]:
    """The models of a file in TensorFlow Serving's text form (`models.config`). Raises InvalidRequest, OSError."""
    try:
        return model_configs(text_format.Parse(path.read_text(encoding="utf-8"), ModelServerConfig()))
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} must be a ModelServerConfig in text form: {error}.") from error


def named_models(folder: Path, name: str = "", canary: float = 0.0, latest: int | None = None) -> list[ModelConfig]:
    """What a folder holds: one artifact, the versions of a model, a run's `export` folder, or a folder of models.

    Args:
        folder: any of these.
        name: of the model; '' takes the folder's. A folder of several models keeps their own.
        canary: share of the newest version (`ModelConfig`).
        latest: versions of each model that are kept loaded; None is 2 where there is a canary, else 1.

    Returns [] where there is nothing to serve.
    """
    folder, latest = folder.absolute(), latest or (2 if canary else 1)
    if version_folders(folder).get(1) == folder and folder.name.isdecimal():
        return [ModelConfig(name or folder.parent.name, folder.parent, versions=(int(folder.name),), canary=canary)]
    if version_folders(folder):
        return [ModelConfig(name or folder.name, folder, latest, canary=canary)]
    for shelf in (folder / "export", folder):
        models = _shelved(shelf)
        if models:
            return [
                ModelConfig(name if name and len(models) == 1 else model.name, model, latest, canary=canary)
                for model in models
            ]
    return []


def _shelved(shelf: Path) -> Sequence[Path]:
    if not shelf.is_dir():
        return []
    return sorted(path for path in shelf.iterdir() if path.is_dir() and version_folders(path))
