"""Runs a `.tflite` file with LiteRT. TensorFlow is not imported, so a phone-like process stays small.

As a program (`python -m fusion.export.litert MODEL INPUTS.npz OUTPUTS.npz [SIGNATURE]`) it runs once, so that
a file that aborts the process can be found out from outside: see `fusion.export.tflite.check_runs`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusion.errors import GateError
from fusion.files import load_arrays, save_arrays


def run(path: str | Path, inputs: Mapping[str, np.ndarray], signature: str | None = None) -> dict[str, np.ndarray]:
    """Runs one signature on named inputs and returns its named outputs.

    Args:
        path: the `.tflite` file.
        inputs: by name, with the dtypes of the signature; any batch size.
        signature: its name; may be left out when the file has only one.

    Raises GateError when the file cannot be read, or its names or dtypes are others.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path))
    except (ValueError, RuntimeError) as error:
        raise GateError(f"{path} must be a .tflite file; it cannot be read: {error}.") from error
    signatures = interpreter.get_signature_list()
    runner = interpreter.get_signature_runner(_chosen(signature, signatures, path))
    _check(inputs, runner.get_input_details(), path)
    try:
        outputs = runner(**inputs)
    except (ValueError, RuntimeError) as error:
        raise GateError(f"{path} must run on its own inputs; {' '.join(str(error).split())}.") from error
    # The interpreter owns the memory of its outputs and dies with this call.
    return {name: np.array(value) for name, value in outputs.items()}


def _chosen(signature: str | None, signatures: Mapping[str, Any], path: str | Path) -> str:
    if signature is None and len(signatures) == 1:
        return next(iter(signatures))
    if signature is None or signature not in signatures:
        raise GateError(f"{path} has the signatures {sorted(signatures)}; received '{signature}'. Name one of them.")
    return signature


def _check(inputs: Mapping[str, np.ndarray], details: Mapping[str, Any], path: str | Path) -> None:
    if set(inputs) != set(details):
        raise GateError(f"{path} takes the inputs {sorted(details)}; received {sorted(inputs)}.")
    for name, value in inputs.items():
        wanted = np.dtype(details[name]["dtype"])
        if wanted.kind != value.dtype.kind or (wanted.kind not in "SO" and wanted != value.dtype):
            raise GateError(f"{path} takes '{name}' as {wanted}; received {value.dtype}.")


if __name__ == "__main__":
    model, source, target, *rest = sys.argv[1:]
    save_arrays(target, run(model, load_arrays(source), *rest))
