"""Files and folders are complete or do not exist, and are read without running code from them."""

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


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- files -------------------------------------------------------------------------------------------------------


def test_contents_are_stored_as_plain_values_and_read_back(tmp_path):
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


def test_arrays_are_copied():
    array = np.zeros(2)
    plain = files_module.as_plain({"array": array})
    array[0] = 1
    assert plain["array"].tolist() == [0, 0]


def test_loading_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file '.*nothing.pt'"):
        files_module.load_file(tmp_path / "nothing.pt")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"])
def test_loading_a_damaged_file_raises(tmp_path, damage):
    path = tmp_path / "file.pt"
    files_module.save_file({"a": torch.ones(100)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"'.*file.pt' could not be read.*damaged"):
        files_module.load_file(path)


def test_loading_a_file_runs_no_code_from_it(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"a": Harmful()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="not loaded, because that could run code") as caught:
        files_module.load_file(tmp_path / "file.pt")
    assert "weights_only" not in str(caught.value), "PyTorch's advice to load the file unsafely must not be repeated"
    assert not (tmp_path / "harm").exists()


def test_numpy_scalars_in_checkpoints_of_0_1_61_can_be_loaded(tmp_path):
    torch.save({"metric": np.float64(0.5), "epoch": np.int64(3)}, tmp_path / "file.pt")
    assert files_module.load_file(tmp_path / "file.pt") == {"metric": 0.5, "epoch": 3}


NOT_PLAIN = {
    "namespace": argparse.Namespace(a=1),
    "path": Path("folder"),
    "class": object,
    "array of objects": np.array([{}]),
}


@pytest.mark.parametrize("value", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_could_not_be_read_back_safely_is_written_and_named(tmp_path, value):
    path = tmp_path / "file.pt"
    (reason,) = files_module.save_file({"settings": {"mine": value}, "accuracy": np.float64(0.5)}, path)
    assert f"A value of type `{type(value).__name__}` cannot be saved safely (at ['settings']['mine'])" in reason
    written = torch.load(path, weights_only=False)
    assert type(written["settings"]["mine"]) is type(value)
    assert type(written["accuracy"]) is float
    with pytest.raises(CheckpointError):
        files_module.load_file(path)
    with pytest.raises(CheckpointError):
        files_module.as_plain({"mine": value})


def test_what_can_be_read_back_safely_is_not_named(tmp_path):
    assert files_module.save_file({"a": 1}, tmp_path / "file.pt") == []


def test_saving_what_cannot_be_pickled_raises_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.pt"
    files_module.save_file({"a": 1}, path)
    with pytest.raises(CheckpointError, match="Leave out what cannot be pickled"):
        files_module.save_file({"settings": {"mine": lambda: None}}, path)
    assert names_in(tmp_path) == ["file.pt"]
    assert files_module.load_file(path) == {"a": 1}


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_raises_an_error_that_names_the_path_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.pt"
    path.write_text("old")
    with pytest.raises(CheckpointError, match=r"'.*file.pt' could not be written.*No space.*unchanged.*free space"):
        files_module.save_file({"a": 1}, path)
    assert names_in(tmp_path) == ["file.pt"]
    assert path.read_text() == "old"


def test_saving_where_no_folder_can_be_created_names_the_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model.pt' could not be written"):
        files_module.save_file({"a": 1}, tmp_path / "file" / "model.pt")


def test_check_can_write_creates_the_folder_and_leaves_an_old_file_alone(tmp_path):
    path = tmp_path / "folder" / "model.pt"
    files_module.check_can_write(path)
    assert list(tmp_path.rglob("*")) == [path.parent]
    path.write_text("old")
    files_module.check_can_write(path)
    assert path.read_text() == "old"
    with pytest.raises(CheckpointError, match=r"saved as '.*model.pt/model.pt'.*path of a file in a writable folder"):
        files_module.check_can_write(path / "model.pt")
    with pytest.raises(CheckpointError, match=r"saved as '.*folder': .*[Dd]irectory"):
        files_module.check_can_write(path.parent)


@pytest.fixture
def _group_may_read():
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@pytest.mark.usefixtures("_group_may_read")
def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    files_module.save_file({"a": 1}, tmp_path / "file.pt")
    assert stat.S_IMODE((tmp_path / "file.pt").stat().st_mode) == 0o644


@pytest.fixture
def flushed(monkeypatch):
    """The paths that were fsynced, in order."""
    paths = []
    fsync = os.fsync

    def record(descriptor):
        paths.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")


@needs_proc
def test_a_file_is_fsynced_before_it_is_renamed_and_its_folder_afterwards(tmp_path, flushed):
    files_module.save_file({"a": 1}, tmp_path / "new" / "file.pt")
    assert [path.name for path in flushed[:2]] == [tmp_path.name, ".file.pt.tmp-0"]
    assert flushed[2:] == [tmp_path / "new"]


# --- folders -----------------------------------------------------------------------------------------------------


def make_folder_with_file(path, text):
    path.mkdir()
    (path / "file").write_text(text)


@needs_proc
def test_creating_a_folder_fsyncs_each_parent(tmp_path, flushed):
    files_module.create_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    files_module.create_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2


def test_a_file_system_that_cannot_fsync_folders_is_tolerated(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files_module.flush_to_disk(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files_module.flush_to_disk(tmp_path / "file")


def test_a_folder_replaces_another(tmp_path):
    target = tmp_path / "folder"
    make_folder_with_file(target, "old")
    make_folder_with_file(files_module.temporary_path(target), "new")
    files_module.replace_folder(target)
    assert names_in(tmp_path) == ["folder"]
    assert (target / "file").read_text() == "new"


def test_a_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    make_folder_with_file(target, "old")
    make_folder_with_file(files_module.temporary_path(target), "new")
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
        ({".folder.old": "kept", ".folder.tmp": "complete"}, "kept"),
        ({"folder": "kept", ".folder.old": "previous"}, "kept"),
        ({".folder.tmp": "half"}, None),
        ({}, None),
    ],
)
def test_an_interrupted_write_or_replacement_is_undone_or_finished(tmp_path, present, text):
    for name, content in present.items():
        make_folder_with_file(tmp_path / name, content)
    target = tmp_path / "folder"
    files_module.repair_folder(target)
    assert names_in(tmp_path) == ([] if text is None else ["folder"])
    if text is not None:
        assert (target / "file").read_text() == text


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    """The rest of an interrupted deletion is then recognized as such."""
    target = tmp_path / "folder"
    make_folder_with_file(target, "text")
    make_folder_with_file(files_module.temporary_path(target), "leftover")
    names = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (names.append(names_in(tmp_path)), rmtree(*a, **k)))
    files_module.delete_folder(target)
    assert names == [[".folder.tmp", "folder"], [".folder.tmp"]]
    assert names_in(tmp_path) == []


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 1_000_000)
    assert files_module.sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_the_temporary_file_of_a_killed_process_is_overwritten(tmp_path):
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
