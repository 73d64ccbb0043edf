"""The graph file of an artifact, read without loading it: what it may do, and its signatures.

Running a graph is running a program: it could read files or call Python. So every operation must be one of the list
that exporting holds to as well (`fusion.export.ops`), wherever in the file it stands. The functions with which
TensorFlow writes and reads the checkpoint need a few more, and nothing but TensorFlow's own saver may call those.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef, SignatureDef
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from fusion.export.ops import SERVED_OPERATIONS
from serving.errors import ArtifactRefused

GRAPH_FILE = "saved_model.pb"
SAVER_OPERATIONS = SERVED_OPERATIONS | {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
RUN_ON_LOADING = ("saved_model_main_op", "legacy_init_op")
"""Collections of operations that a session runs once the variables are there."""


def read_graph(folder: Path) -> MetaGraphDef:
    """The graph with its functions and signatures. Raises ArtifactRefused when it cannot be read, or is not the only
    one, of which another could be run than the one that was looked at."""
    try:
        graphs = SavedModel.FromString((folder / GRAPH_FILE).read_bytes()).meta_graphs
    except (OSError, DecodeError) as error:
        raise ArtifactRefused(f"{GRAPH_FILE} must be a SavedModel; it cannot be read.") from error
    if len(graphs) != 1:
        raise ArtifactRefused(f"{GRAPH_FILE} must be a SavedModel of one graph; it holds {len(graphs)}.")
    return graphs[0]


def check_operations(graph: MetaGraphDef) -> None:
    """Raises ArtifactRefused, with the operation and where it stands, for a graph that could do more than compute."""
    saver = graph.saver_def
    saver_nodes = {saver.save_tensor_name.split(":")[0], saver.restore_op_name}
    saver_functions = {name for node in graph.graph_def.node if node.name in saver_nodes for name in _calls(node)}
    _check_nobody_saves(graph, saver_nodes)
    for node in graph.graph_def.node:
        if node.name not in saver_nodes:
            _check(node, "the main graph", saver_functions)
        elif node.op not in SAVER_OPERATIONS:
            raise _refusal(node, "the saver")
    for function in graph.graph_def.library.function:
        name = function.signature.name
        for node in function.node_def:
            if name not in saver_functions:
                _check(node, f"the function {name}", saver_functions)
            elif node.op not in SAVER_OPERATIONS:
                raise _refusal(node, "the saver")


def _check_nobody_saves(graph: MetaGraphDef, saver_nodes: set[str]) -> None:
    """Raises ArtifactRefused where the saver, which writes files, would run with a signature or when a graph loads."""
    for name, definition in graph.signature_def.items():
        if any(_node_of(tensor.name) in saver_nodes for tensor in definition.outputs.values()):
            raise ArtifactRefused(f"a graph that is served may only compute; its signature '{name}' calls the saver.")
    for node in graph.graph_def.node:
        if node.name not in saver_nodes and any(_node_of(tensor) in saver_nodes for tensor in node.input):
            raise ArtifactRefused(f"a graph that is served may only compute; its node '{node.name}' calls the saver.")
    for key in RUN_ON_LOADING:
        if key in graph.collection_def:
            nodes = graph.collection_def[key].node_list.value
            if any(_node_of(tensor) in saver_nodes for tensor in nodes):
                raise ArtifactRefused("a graph that is served may only compute; it calls its saver when it is loaded.")


def _node_of(tensor: str) -> str:
    return tensor.removeprefix("^").split(":")[0]


def signature_defs(graph: MetaGraphDef) -> dict[str, Any]:
    """Copies of the `SignatureDef`s by name, that keep nothing else of the graph in memory."""
    found: dict[str, Any] = {}
    for name, definition in graph.signature_def.items():
        found[name] = SignatureDef()
        found[name].CopyFrom(definition)
    return found


def _check(node: NodeDef, where: str, saver_functions: set[str]) -> None:
    if node.op not in SERVED_OPERATIONS or not saver_functions.isdisjoint(_calls(node)):
        raise _refusal(node, where)


def _refusal(node: NodeDef, where: str) -> ArtifactRefused:
    return ArtifactRefused(
        f"a graph that is served may only compute; '{node.op}' (node '{node.name}' in {where}) is not one of the "
        "operations that are known to do no more. Export the model again."
    )


def _calls(node: NodeDef) -> Iterator[str]:
    """Names of the functions that a node calls."""
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        yield from (function.name for function in value.list.func)
