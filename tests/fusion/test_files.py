"""Atomic writes, arrays without pickles, and the lock of a folder."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusion import files
from fusion.errors import GateError, MachineError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_file_limit():
    """A real write that the system refuses half-way: no file may grow above 64 KB."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_the_old_content_and_no_rest(tmp_path, small_file_limit):
    path = tmp_path / "report.json"
    files.write_atomically(path, "old")
    with pytest.raises(MachineError, match=r"report\.json must be writable, but the file is larger"):
        files.write_atomically(path, b"x" * 200_000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.json"]


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(MachineError, match="the disk is full"):
        files.write_atomically(tmp_path / "a", "b")
    with pytest.raises(MachineError, match="the disk is full"), files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("b")
    assert os.listdir(tmp_path) == []


def test_a_path_through_a_file_is_a_machine_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="must be writable"):
        files.write_atomically(tmp_path / "file" / "below" / "a", "b")


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "stage"
    with files.atomic_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert (target / "one").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(target) as folder:
        (folder / "two").write_text("2")
        raise KeyboardInterrupt
    assert os.listdir(target) == ["one"] and os.listdir(target.parent) == ["stage"]
    with files.atomic_folder(target) as folder:
        (folder / "three").write_text("3")
    assert os.listdir(target) == ["three"] and os.listdir(target.parent) == ["stage"]


def test_the_bodys_own_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_folder(tmp_path / "stage"):
        open(tmp_path / "missing")


def test_arrays_round_trip_and_equal_arrays_give_equal_bytes(tmp_path):
    arrays = {
        "file": np.arange(6, dtype=np.int32).reshape(2, 3),
        "rule/weights": np.array([np.inf, -0.0, np.nan], np.float32),
        "ids": np.array(["ä b", "c"]),
        "empty": np.zeros((0, 3)),
    }
    files.save_arrays(tmp_path / "a.npz", arrays)
    files.save_arrays(tmp_path / "b.npz", arrays)
    loaded = files.load_arrays(tmp_path / "a.npz")
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    assert files.sha256_of(tmp_path / "a.npz") == files.sha256_of(tmp_path / "b.npz")


def test_objects_are_refused_both_ways(tmp_path):
    with pytest.raises(ValueError, match="'ids' holds Python objects"):
        files.save_arrays(tmp_path / "a.npz", {"ids": np.array(["a", None], object)})
    assert os.listdir(tmp_path) == []
    np.savez(tmp_path / "b.npz", ids=np.array(["a", None], object))
    with pytest.raises(GateError, match=r"must be an \.npz of plain arrays"):
        files.load_arrays(tmp_path / "b.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x80\x04N.", b"PK\x03\x04 truncated"])
def test_damaged_arrays_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(GateError, match=r"a\.npz must be an \.npz"):
        files.load_arrays(tmp_path / "a.npz")


def test_missing_arrays_and_single_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    for name in ("a.npy", "missing.npz"):
        with pytest.raises(GateError):
            files.load_arrays(tmp_path / name)


def test_lock_names_the_process_that_holds_it_and_dies_with_it(tmp_path):
    code = (
        "import sys, time; from fusion.files import lock_folder\n"
        f"with lock_folder({str(tmp_path)!r}):\n    print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(MachineError, match=rf"process {child.pid} holds its lock"), files.lock_folder(tmp_path):
            pass
    finally:
        child.kill()
        child.communicate()
    with files.lock_folder(tmp_path):  # kill -9 freed it
        pass
    with files.lock_folder(tmp_path):
        pass
