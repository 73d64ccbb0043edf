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


class Runner:
    """Keeps one interpreter for one signature of a file, ready to answer again and again.

    Inputs and outputs are numbers as the signature has them; nothing is scaled to integers here, because a file of
    ours does that inside.

    Attributes:
        inputs, outputs: dtypes by name.
    """

    def __init__(self, model: str | Path | bytes, signature: str | None = None, threads: int = 1) -> None:
        """Reads the file.

        Args:
            model: the `.tflite` file, or its bytes.
            signature: its name; may be left out when the file has only one.
            threads: how many the operations may share.

        Raises GateError when it is not a whole `.tflite` file, or has no such signature.
        """
        from ai_edge_litert.interpreter import Interpreter

        self._where = "the model" if isinstance(model, bytes) else str(model)
        source = {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
        try:
            interpreter = Interpreter(**source, num_threads=threads)
        except (ValueError, RuntimeError) as error:
            raise GateError(
                f"{self._where} must be a .tflite file that is whole; it cannot be read: {_line(error)}."
            ) from error
        signatures = interpreter.get_signature_list()
        name = _chosen(signature, signatures, self._where)
        runner = interpreter.get_signature_runner(name)
        takes, gives = runner.get_input_details(), runner.get_output_details()
        # Only one of them is kept, because an interpreter refuses to work while another object holds its memory.
        alone = len(signatures) == 1
        self._runner: Any = None if alone else runner
        self._interpreter: Any = interpreter if alone else None
        self._places = [{name: detail["index"] for name, detail in details.items()} for details in (takes, gives)]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.inputs = {name: np.dtype(detail["dtype"]) for name, detail in takes.items()}
        self.outputs = {name: np.dtype(detail["dtype"]) for name, detail in gives.items()}

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named inputs of any batch size that the graph can take -> named outputs, copies of their own.

        Raises GateError for other names or dtypes than those of the signature, and where the file does not run.
        """
        _check(inputs, self.inputs, self._where)
        try:
            return self._runner(**inputs) if self._runner else self._invoke(self._interpreter, inputs)
        except (ValueError, RuntimeError) as error:
            raise GateError(f"{self._where} must run on its own inputs; {_line(error)}.") from error

    def _invoke(self, interpreter: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the signature's own runner does for a file with one signature, but that it prepares the graph anew at
        each call, which for a small network takes several times as long as running it."""
        takes, gives = self._places
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            self._shapes = {}
            for name, shape in shapes.items():
                interpreter.resize_tensor_input(takes[name], shape)
            interpreter.allocate_tensors()
            self._shapes = shapes
        for name, array in inputs.items():
            interpreter.set_tensor(takes[name], array)
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in gives.items()}

    def row_by_row(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same for n rows `[n, ...]`, asked one after the other, as graphs of batch 1 need it -> `[n, ...]`."""
        n = len(next(iter(inputs.values())))
        rows = [self({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(n)]
        return {name: np.concatenate([row[name] for row in rows]) for name in self.outputs}


def run(path: str | Path, inputs: Mapping[str, np.ndarray], signature: str | None = None) -> dict[str, np.ndarray]:
    """Runs one signature once on named inputs and returns its named outputs.

    Args:
        path: the `.tflite` file.
        inputs: by name, with the dtypes of the signature; any batch size.
        signature: its name; may be left out when the file has only one.

    Raises GateError when the file cannot be read, or its names or dtypes are others.
    """
    return Runner(path, signature)(inputs)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _chosen(signature: str | None, signatures: Mapping[str, Any], path: str) -> str:
    if signature is None and len(signatures) == 1:
        return next(iter(signatures))
    if signature is None or signature not in signatures:
        raise GateError(f"{path} has the signatures {sorted(signatures)}; received '{signature}'. Name one of them.")
    return signature


def _check(inputs: Mapping[str, np.ndarray], dtypes: Mapping[str, np.dtype], path: str) -> None:
    if set(inputs) != set(dtypes):
        raise GateError(f"{path} takes the inputs {sorted(dtypes)}; received {sorted(inputs)}.")
    for name, value in inputs.items():
        wanted = dtypes[name]
        if wanted.kind != value.dtype.kind or (wanted.kind not in "SO" and wanted != value.dtype):
            raise GateError(f"{path} takes '{name}' as {wanted}; received {value.dtype}.")


if __name__ == "__main__":
    model, source, target, *rest = sys.argv[1:]
    save_arrays(target, run(model, load_arrays(source), *rest))
