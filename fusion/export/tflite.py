"""Conversion of a graph's core (numbers in, scores out) to `.tflite` with TFLite's built-in operations only.

Neither Select-TF ("Flex") nor custom operations are allowed: a stock LiteRT has to run the file.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusion.compat import tf
from fusion.errors import GateError
from fusion.export.litert import run
from fusion.files import load_arrays, save_arrays

__all__ = ["check_runs", "convert", "run"]

_UNSUPPORTED = re.compile(r"(?:TF Select|Flex|Custom) ops: ([^\n]+)")


def convert(signatures: Mapping[str, Callable[..., Any]], module: Any) -> bytes:
    """The bytes of a `.tflite` file in float32 with the given signatures; names of inputs and outputs survive.

    Args:
        signatures: by name, `tf.function`s with an input signature, or concrete functions, that return dicts.
        module: the `tf.Module` that owns what the signatures use.

    Raises GateError that names the operations which TFLite does not have.
    """
    with tempfile.TemporaryDirectory() as folder:
        # By way of a SavedModel, because conversion of bare functions loses the names (DESIGN.md).
        tf.saved_model.save(module, folder, signatures=dict(signatures))
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=list(signatures))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            return bytes(converter.convert())
        except Exception as error:  # the converter raises a plain Exception subclass of a private module
            raise GateError(
                f"a .tflite file must hold built-in operations only; {_operations(str(error))}. Keep that step "
                "outside the core that is converted."
            ) from error


def _operations(message: str) -> str:
    found = sorted({name.strip() for names in _UNSUPPORTED.findall(message) for name in names.split(",")})
    if found:
        return f"the graph needs {', '.join(found)}"
    return f"the converter answered: {' '.join(message.split())[-300:]}"


def check_runs(
    path: str | Path, inputs: Mapping[str, np.ndarray], signature: str | None = None, seconds: float = 60.0
) -> dict[str, np.ndarray]:
    """Runs the file once in a process of its own and returns the outputs.

    A file that converts may still abort the whole process at its first run (16x8 quantisation with a layer
    normalisation does in TF 2.21), which no `try` can catch.

    Raises GateError when the process dies, fails or takes longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        save_arrays(source, inputs)
        command = [sys.executable, "-m", "fusion.export.litert", str(path), str(source), str(target)]
        try:
            done = subprocess.run(
                [*command, *([signature] if signature else [])],
                capture_output=True,
                text=True,
                timeout=seconds,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except subprocess.TimeoutExpired as error:
            raise GateError(f"{path} must run once within {seconds:g} s; it did not end.") from error
        if done.returncode != 0:
            raise GateError(f"{path} must run once; {_cause(done)}. Convert it in another way.")
        return load_arrays(target)


def _cause(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it killed its process by {signal.Signals(-done.returncode).name}"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return last.removeprefix("fusion.errors.GateError: ").rstrip(".")
