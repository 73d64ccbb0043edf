"""What a graph may do is read off its file before it is loaded."""

import shutil

import pytest

from fusion.compat import tf
from fusion.export.manifest import Manifest, write_manifest
from serving.errors import ArtifactRefused
from serving.graph import check_operations, read_graph
from serving.predictor import Predictor


class Reader(tf.Module):
    """Its signature answers with the content of whatever file it is asked for."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "path")])
    def read(self, path):
        return {"content": tf.map_fn(tf.io.read_file, path)}


def test_a_graph_that_reads_files_is_not_loaded(tmp_path):
    """R8: the attack of FIELD.md's list: `ReadFile` in a function of the default signature."""
    module = Reader()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": module.read})
    write_manifest(tmp_path / "1", Manifest(kind="recommender"))
    with pytest.raises(ArtifactRefused, match=r"may only compute; 'ReadFile' .* in the function map_while_body"):
        Predictor.load(tmp_path / "1")


def test_the_savers_operations_are_the_savers_alone(artifact, tmp_path):
    graph = read_graph(artifact)
    check_operations(graph)
    saver = {graph.saver_def.save_tensor_name.split(":")[0], graph.saver_def.restore_op_name}
    restore = next(node for node in graph.graph_def.node if node.name == graph.saver_def.restore_op_name)
    borrowed = graph.graph_def.node.add()
    borrowed.CopyFrom(restore)
    borrowed.name = "mine"
    with pytest.raises(ArtifactRefused, match="node 'mine' in the main graph"):
        check_operations(graph)
    del graph.graph_def.node[-1]
    restore.op = "ReadFile"
    assert restore.name in saver
    with pytest.raises(ArtifactRefused, match=r"'ReadFile' .* in the saver"):
        check_operations(graph)


def test_nobody_calls_the_saver(artifact):
    """R8: in a session a signature could name any node; the saver writes files, so none may name it."""
    saver = read_graph(artifact).saver_def.save_tensor_name
    graph = read_graph(artifact)
    next(iter(graph.signature_def["recommend"].outputs.values())).name = saver
    with pytest.raises(ArtifactRefused, match="signature 'recommend' calls the saver"):
        check_operations(graph)
    graph = read_graph(artifact)
    graph.graph_def.node.add(name="mine", op="Identity", input=[saver])
    with pytest.raises(ArtifactRefused, match="node 'mine' calls the saver"):
        check_operations(graph)
    graph = read_graph(artifact)
    graph.collection_def["saved_model_main_op"].node_list.value.append(saver.split(":")[0])
    with pytest.raises(ArtifactRefused, match="when it is loaded"):
        check_operations(graph)


def test_a_second_graph_is_refused(artifact, tmp_path):
    """R8: the one that is looked at is the one that is run."""
    folder = tmp_path / "1"
    shutil.copytree(artifact, folder)
    content = (folder / "saved_model.pb").read_bytes()
    (folder / "saved_model.pb").write_bytes(content + content)  # repeated fields of a message add up
    with pytest.raises(ArtifactRefused, match="of one graph; it holds 2"):
        read_graph(folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"<html>"])
def test_a_file_that_is_no_graph_is_refused(artifact, tmp_path, content):
    folder = tmp_path / "1"
    shutil.copytree(artifact, folder)
    (folder / "saved_model.pb").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"saved_model\.pb must be a SavedModel"):
        read_graph(folder)
