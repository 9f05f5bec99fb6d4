"""Files and folders that are whole or not there, and that are read without running code."""

from __future__ import annotations

import argparse
import errno
import hashlib
import multiprocessing
import os
import shutil
import stat
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from pytorch_accelerated._checkpoint import files as files_module
from pytorch_accelerated.exceptions import CheckpointError


@pytest.fixture
def _full_disk(monkeypatch):
    """Writing starts well and then fails."""
    save = torch.save

    def fail(contents, file, *args, **kwargs):
        save({"half": 1}, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- files -------------------------------------------------------------------------------------------------------


def test_a_file_returns_what_was_written_as_plain_values(tmp_path):
    path = tmp_path / "a" / "b" / "file.pt"
    contents = {
        "float": np.float64(0.5),
        "int": np.int32(3),
        "flag": np.bool_(True),
        "array": np.arange(3),
        "nested": [(np.float32(1.5), {"deep": np.float16(2)}), {np.int64(4)}],
        np.int64(5): "key",
        "tensor": torch.ones(2),
        "none": None,
        "ordered": OrderedDict(a=1),
        "counter": Counter("aab"),
    }
    files_module.save_file(contents, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["nested"] == [(1.5, {"deep": 2.0}), {4}]
    assert (loaded["float"], loaded["int"], loaded["flag"], loaded[5], loaded["none"]) == (0.5, 3, True, "key", None)
    assert torch.equal(loaded["array"], torch.arange(3))
    assert (loaded["ordered"], loaded["counter"]) == ({"a": 1}, {"a": 2, "b": 1})
    assert torch.equal(files_module.load_file(path)["tensor"], torch.ones(2))
    assert names_in(path.parent) == ["file.pt"]


def test_an_array_in_a_file_is_not_the_users_own():
    array = np.zeros(2)
    plain = files_module.as_plain({"array": array})
    array[0] = 1
    assert plain["array"].tolist() == [0, 0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file '.*nothing.pt'"):
        files_module.load_file(tmp_path / "nothing.pt")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "file.pt"
    files_module.save_file({"a": torch.ones(100)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"'.*file.pt' could not be read.*damaged"):
        files_module.load_file(path)


def test_a_file_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"a": Harmful()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="not loaded because that could run code"):
        files_module.load_file(tmp_path / "file.pt")
    assert not (tmp_path / "harm").exists()


def test_numpy_scalars_in_checkpoints_of_0_1_61_are_read(tmp_path):
    torch.save({"metric": np.float64(0.5), "epoch": np.int64(3)}, tmp_path / "file.pt")
    assert files_module.load_file(tmp_path / "file.pt") == {"metric": 0.5, "epoch": 3}


@pytest.mark.parametrize(
    "value",
    [argparse.Namespace(a=1), Path("folder"), object, lambda: None, np.array([{}])],
    ids=["namespace", "path", "class", "function", "array of objects"],
)
def test_what_could_not_be_read_back_is_refused_before_anything_is_lost(tmp_path, value):
    path = tmp_path / "file.pt"
    files_module.save_file({"a": 1}, path)
    with pytest.raises(CheckpointError):
        files_module.save_file({"settings": {"mine": value}}, path)
    assert names_in(tmp_path) == ["file.pt"]
    assert files_module.load_file(path) == {"a": 1}


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.pt"
    path.write_text("old")
    with pytest.raises(CheckpointError, match=r"'.*file.pt' could not be written.*No space.*untouched.*disk has room"):
        files_module.save_file({"a": 1}, path)
    assert names_in(tmp_path) == ["file.pt"]
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model.pt' could not be written"):
        files_module.save_file({"a": 1}, tmp_path / "file" / "model.pt")


def test_whether_a_file_can_be_written_is_known_before_there_is_anything_to_write(tmp_path):
    path = tmp_path / "folder" / "model.pt"
    files_module.check_can_write(path)
    assert list(tmp_path.rglob("*")) == [path.parent]
    path.write_text("old")
    files_module.check_can_write(path)
    assert path.read_text() == "old"
    with pytest.raises(CheckpointError, match=r"saved as '.*model.pt/model.pt'.*path of a file in a folder"):
        files_module.check_can_write(path / "model.pt")
    with pytest.raises(CheckpointError, match=r"saved as '.*folder': .*[Dd]irectory"):
        files_module.check_can_write(path.parent)


@pytest.fixture
def _group_may_read():
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@pytest.mark.usefixtures("_group_may_read")
def test_a_file_may_be_read_by_whom_the_umask_allows(tmp_path):
    files_module.save_file({"a": 1}, tmp_path / "file.pt")
    assert stat.S_IMODE((tmp_path / "file.pt").stat().st_mode) == 0o644


@pytest.fixture
def flushed(monkeypatch):
    """The paths that were flushed to the disk, in order."""
    paths = []
    fsync = os.fsync

    def record(descriptor):
        paths.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")


@needs_proc
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_afterwards(tmp_path, flushed):
    files_module.save_file({"a": 1}, tmp_path / "new" / "file.pt")
    assert [path.name for path in flushed[:2]] == [tmp_path.name, ".file.pt.tmp-0"]
    assert flushed[2:] == [tmp_path / "new"]


# --- folders -----------------------------------------------------------------------------------------------------


def make_folder(path, text):
    path.mkdir()
    (path / "file").write_text(text)


@needs_proc
def test_folders_are_made_with_those_above_them_and_their_names_are_on_the_disk(tmp_path, flushed):
    files_module.make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    files_module.make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2


def test_a_folder_on_a_file_system_that_cannot_flush_folders_is_taken_as_it_is(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files_module.flush_to_disk(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files_module.flush_to_disk(tmp_path / "file")


def test_a_folder_takes_the_place_of_another(tmp_path):
    target = tmp_path / "folder"
    make_folder(target, "old")
    make_folder(files_module.temporary_path(target), "new")
    files_module.replace_folder(target)
    assert names_in(tmp_path) == ["folder"]
    assert (target / "file").read_text() == "new"


def test_a_folder_that_cannot_take_the_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    make_folder(target, "old")
    make_folder(files_module.temporary_path(target), "new")
    rename = Path.rename

    def fail(self, new_name):
        if self == files_module.temporary_path(target):
            raise OSError(5, "Input/output error")
        return rename(self, new_name)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files_module.replace_folder(target)
    assert (target / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("present", "text"),
    [
        ({"folder": "kept", ".folder.tmp": "half"}, "kept"),
        ({".folder.old": "kept", ".folder.tmp": "whole"}, "kept"),
        ({"folder": "kept", ".folder.old": "former"}, "kept"),
        ({".folder.tmp": "half"}, None),
        ({}, None),
    ],
)
def test_what_was_cut_off_is_undone_or_finished(tmp_path, present, text):
    for name, content in present.items():
        make_folder(tmp_path / name, content)
    target = tmp_path / "folder"
    files_module.repair_folder(target)
    assert names_in(tmp_path) == ([] if text is None else ["folder"])
    if text is not None:
        assert (target / "file").read_text() == text


def test_a_folder_has_lost_its_name_before_it_is_deleted(tmp_path, monkeypatch):
    """So that what is left by a deletion that is cut off is known as such."""
    target = tmp_path / "folder"
    make_folder(target, "text")
    make_folder(files_module.temporary_path(target), "left from before")
    names = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (names.append(names_in(tmp_path)), rmtree(*a, **k)))
    files_module.delete_folder(target)
    assert names == [[".folder.tmp", "folder"], [".folder.tmp"]]
    assert names_in(tmp_path) == []


def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 1_000_000)
    assert files_module.sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_what_a_killed_process_left_of_a_file_is_overwritten(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_die_while_saving, args=(tmp_path / "file.pt",))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert len(list(tmp_path.iterdir())) == 1
    files_module.save_file({"number": 1}, tmp_path / "file.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def _die_while_saving(path):
    os.fsync = lambda descriptor: os._exit(9)
    files_module.save_file({"number": 0}, path)
