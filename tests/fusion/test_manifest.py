"""The manifest: what verification refuses, and publishing by several processes at once."""

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fusion.errors import GateError, MachineError
from fusion.export import manifest
from fusion.export.manifest import Manifest, Signature, TensorSpec, publish, verify_manifest, write_manifest

CONTENT = Manifest(
    kind="recommender",
    members=("ease", "text"),
    signatures={"serving_default": Signature({"history": TensorSpec("string", (None, None))}, {})},
    config_hash="c" * 64,
    data_hash="d" * 64,
    split_hash="e" * 64,
    rows_seen="all",
    metrics={"ndcg@10": {"value": 0.1, "low": 0.05, "high": 0.15, "n": 610}},
    libraries={"tensorflow": "2.21.0"},
    limits={"k_max": 100},
)


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "variables").mkdir(parents=True)
    (folder / "assets").mkdir()  # TensorFlow leaves this one empty
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "data").write_bytes(b"\0" * 3000)
    write_manifest(folder, CONTENT)
    return folder


def edit(folder: Path, change) -> None:
    path = folder / manifest.FILE_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_round_trip(artifact):
    """O1: what was written about an artifact is read again, and every file is in it."""
    read = verify_manifest(artifact)
    assert replace(read, files={}) == CONTENT
    assert {path: entry.size for path, entry in read.files.items()} == {"saved_model.pb": 5, "variables/data": 3000}
    write_manifest(artifact, CONTENT)  # a second time: the manifest does not list itself
    assert verify_manifest(artifact) == read


def remove(folder):
    (folder / "saved_model.pb").unlink()


def add(folder):
    (folder / "variables" / "evil.so").write_bytes(b"")


def resize(folder):
    (folder / "saved_model.pb").write_bytes(b"graphs")


def change_a_byte(folder):
    (folder / "variables" / "data").write_bytes(b"\0" * 2999 + b"\1")


def link_a_file(folder):
    shutil.copy(folder / "saved_model.pb", folder.parent / "outside")
    (folder / "saved_model.pb").unlink()
    (folder / "saved_model.pb").symlink_to(folder.parent / "outside")


def link_a_folder(folder):
    shutil.move(folder / "variables", folder.parent / "outside")
    (folder / "variables").symlink_to(folder.parent / "outside")


def link_the_manifest(folder):
    shutil.move(folder / "manifest.json", folder.parent / "outside")
    (folder / "manifest.json").symlink_to(folder.parent / "outside")


def put_a_pipe(folder):
    os.mkfifo(folder / "pipe")


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def huge_manifest(folder):
    (folder / "manifest.json").write_bytes(b" " * (manifest.MAX_MANIFEST_BYTES + 1))


def not_json(folder):
    (folder / "manifest.json").write_bytes(b"\xff{")


def deep_json(folder):
    (folder / "manifest.json").write_bytes(b"[" * 200_000)


def repeated_key(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"kind"', '"kind": "x", "kind"', 1))


def future_version(folder):
    edit(folder, lambda data: data.update(schema_version=2))


def lost_key(folder):
    edit(folder, lambda data: data.pop("rows_seen"))


def wrong_type(folder):
    edit(folder, lambda data: data.update(members="ease"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove, "'saved_model.pb' is missing"),
        (add, "'variables/evil.so' is not"),
        (resize, "must have 5 bytes as its manifest says; it has 6"),
        (change_a_byte, "'variables/data' must have the SHA-256"),
        (link_a_file, "must not hold links; 'saved_model.pb'"),
        (link_a_folder, "must not hold links; 'variables'"),
        (link_the_manifest, "'manifest.json' must be a readable file"),
        (put_a_pipe, "'pipe' is a pipe, socket or device"),
        (no_manifest, "'manifest.json' must be a readable file"),
        (huge_manifest, "must have at most 4194304 bytes"),
        (not_json, "must be valid"),
        (deep_json, "must be valid"),
        (repeated_key, "a key stands twice"),
        (future_version, "schema_version must be 1, received 2"),
        (lost_key, "must have the key 'rows_seen'"),
        (wrong_type, "expected list, received 'ease'"),
    ],
)
def test_damage_is_refused(artifact, damage, sentence):
    damage(artifact)
    with pytest.raises(GateError) as error:
        verify_manifest(artifact)
    assert sentence in str(error.value) and str(artifact) in str(error.value)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "variables/../../x", "a\\b", "./x", "a//b", "", "manifest.json", "a\0b"]
)
def test_paths_stay_inside(artifact, path):
    (artifact.parent / "outside").write_bytes(b"graph")
    edit(artifact, lambda data: data["files"].update({path: data["files"]["saved_model.pb"]}))
    with pytest.raises(GateError, match="must stay inside the folder"):
        verify_manifest(artifact)


def test_a_manifest_is_not_written_over_links(artifact):
    link_a_file(artifact)
    with pytest.raises(GateError, match="must not hold links"):
        write_manifest(artifact, CONTENT)


def test_publishers_at_once_get_versions_of_their_own(artifact, tmp_path):
    shelf = tmp_path / "models" / "films"
    (shelf / "7").mkdir(parents=True)
    (shelf / "7" / "x").write_text("")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(publish(artifact, tmp_path / "models", "films"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(path.name) for path in found) == list(range(8, 14))
    assert sorted(os.listdir(shelf), key=int) == [str(version) for version in range(7, 14)]
    for path in found:
        verify_manifest(path)


def test_what_is_damaged_is_not_published(artifact, tmp_path):
    change_a_byte(artifact)
    with pytest.raises(GateError, match="SHA-256"):
        publish(artifact, tmp_path / "models", "films")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["../films", "a/b", "", ".hidden", "x" * 200])
def test_a_models_name_cannot_leave_the_shelf(artifact, tmp_path, name):
    with pytest.raises(GateError, match="a model's name"):
        publish(artifact, tmp_path / "models", name)


def test_an_unwritable_shelf_is_one_sentence_and_leaves_nothing(artifact, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="must be writable"):
        publish(artifact, tmp_path / "file", "films")
