"""SavedModels with named signatures, held to TensorFlow's own safe operations; loading verifies the manifest first.

The lint reads the graph that was written, so it sees what a server will run, whatever Python made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow.python.framework import op_def_registry

from fusion.compat import tf
from fusion.errors import GateError, MachineError
from fusion.export.manifest import Signature, TensorSpec, verify_manifest
from fusion.export.ops import SERVED_OPERATIONS
from fusion.files import atomic_folder

GRAPH_FILE = "saved_model.pb"


def save(module: Any, folder: str | Path, signatures: Mapping[str, Callable[..., Any]]) -> None:
    """Writes `module` as a SavedModel into the new folder `folder`, whole or not at all.

    Args:
        module: a `tf.Module` (or Keras model) that owns the variables and tables that the signatures use.
        folder: where it goes; one that stands there already is replaced.
        signatures: by name, `tf.function`s with an input signature, or concrete functions, that return dicts.

    Raises:
        GateError: an operation is not on the list of `fusion.export.ops`; names it and its node.
        MachineError: the disk refuses.
    """
    with atomic_folder(folder) as partial:
        try:
            tf.saved_model.save(module, str(partial), signatures=dict(signatures))
        except tf.errors.ResourceExhaustedError as error:  # TensorFlow's word for a full disk
            raise MachineError(f"{folder} must be writable; {error.message}. Free some space.") from error
        lint(partial)


def load(folder: str | Path) -> Any:
    """Loads an artifact's SavedModel after its manifest has been verified and its graph linted.

    Raises GateError when either refuses. The signatures are in `.signatures` of the result.
    """
    verify_manifest(folder)
    lint(folder)
    return tf.saved_model.load(str(folder))


def signatures_of(folder: str | Path) -> dict[str, Signature]:
    """Names, dtypes and shapes of a SavedModel's signatures, for the manifest, read from the file without loading."""
    return {
        name: Signature(_tensors(signature.inputs), _tensors(signature.outputs))
        for name, signature in sorted(_graph(folder).signature_def.items())
        if signature.method_name == tf.saved_model.PREDICT_METHOD_NAME
    }


def _tensors(infos: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {name: _tensor(infos[name]) for name in sorted(infos)}


def _tensor(info: Any) -> TensorSpec:
    shape = tf.TensorShape(info.tensor_shape)
    if shape.rank is None:
        raise GateError(f"inputs and outputs of a signature must have a known rank; '{info.name}' has none.")
    return TensorSpec(tf.as_dtype(info.dtype).name, tuple(shape.as_list()))


def lint(folder: str | Path) -> None:
    """Refuses a SavedModel whose signatures reach an operation outside `SERVED_OPERATIONS`; names it and its node.

    Looked at is what a server runs: the main graph and the functions that it calls. Left out are the
    saver, with which TensorFlow writes and reads the checkpoint, and functions that only Python can reach (gradients).
    """
    meta = _graph(folder)
    library = {function.signature.name: function.node_def for function in meta.graph_def.library.function}
    saver = {meta.saver_def.save_tensor_name.split(":")[0], meta.saver_def.restore_op_name}
    served = [node for node in meta.graph_def.node if node.name not in saver]
    for node in served:
        _check(node, "the main graph")
    for name in sorted(_reachable(served, library)):
        for node in library[name]:
            _check(node, f"function {name}")


def _check(node: NodeDef, where: str) -> None:
    if node.op in SERVED_OPERATIONS:
        return
    known = op_def_registry.get(node.op) is not None
    reason = "reads files, Python or hardware, or is unreviewed" if known else "is not one of TensorFlow's own"
    raise GateError(
        f"a served graph must hold only operations of fusion/export/ops.py; '{node.op}' (node '{node.name}' in "
        f"{where}) {reason}. Write that step with listed operations, or move it out of the graph."
    )


def _calls(node: NodeDef) -> Iterator[str]:
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        yield from (function.name for function in value.list.func)


def _reachable(roots: Iterable[NodeDef], library: Mapping[str, Iterable[NodeDef]]) -> frozenset[str]:
    found: set[str] = set()
    pending = [name for node in roots for name in _calls(node)]
    while pending:
        name = pending.pop()
        if name in library and name not in found:
            found.add(name)
            pending.extend(called for node in library[name] for called in _calls(node))
    return frozenset(found)


def _graph(folder: str | Path) -> Any:
    path = Path(folder) / GRAPH_FILE
    try:
        model = SavedModel.FromString(path.read_bytes())
        return model.meta_graphs[0]
    except (OSError, DecodeError, IndexError) as error:
        raise GateError(f"{path} must be a SavedModel; it cannot be read: {error}. Export it again.") from error
