"""Files and folders are complete or do not exist, and are read without running code from them."""

from __future__ import annotations

import argparse
import copy
import errno
import hashlib
import multiprocessing
import os
import pickle
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
    path.mkdir(parents=True)
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


# --- links -------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """A folder with a link to a folder elsewhere, in place of a state that has been moved."""
    make_folder_with_file(tmp_path / "elsewhere" / "moved", "moved")
    (tmp_path / "states").mkdir()
    target = tmp_path / "states" / "folder"
    target.symlink_to(Path("..", "elsewhere", "moved"))
    return target


def moved_file(linked):
    return linked.parents[1] / "elsewhere" / "moved" / "file"


def test_a_link_is_replaced_again_and_again_and_what_it_points_to_stays(linked):
    for text in ("first", "second", "third"):
        make_folder_with_file(files_module.temporary_path(linked), text)
        files_module.replace_folder(linked)
        assert (linked / "file").read_text() == text
        assert names_in(linked.parent) == ["folder"]
        assert not linked.is_symlink()
    assert moved_file(linked).read_text() == "moved"


def test_a_link_to_nothing_is_replaced(linked):
    shutil.rmtree(moved_file(linked).parent)
    make_folder_with_file(files_module.temporary_path(linked), "new")
    files_module.replace_folder(linked)
    assert (linked / "file").read_text() == "new"
    assert names_in(linked.parent) == ["folder"]


def test_a_failed_replacement_restores_the_link(linked, monkeypatch):
    make_folder_with_file(files_module.temporary_path(linked), "new")
    rename = Path.rename

    def fail(path, new_name):
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, new_name)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files_module.replace_folder(linked)
    assert linked.is_symlink()
    assert (linked / "file").read_text() == "moved"


def test_of_a_link_only_the_link_is_deleted(linked):
    files_module.delete_folder(linked)
    assert names_in(linked.parent) == []
    assert moved_file(linked).read_text() == "moved"


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_interrupted_replacement_of_a_link_is_undone_or_finished(linked, is_replaced):
    linked.rename(files_module.backup_path(linked))
    make_folder_with_file(linked if is_replaced else files_module.temporary_path(linked), "new")
    files_module.repair_folder(linked)
    assert names_in(linked.parent) == ["folder"]
    assert (linked / "file").read_text() == ("new" if is_replaced else "moved")
    assert moved_file(linked).read_text() == "moved"


def test_a_file_replaces_a_link_to_a_file_and_not_the_file(tmp_path):
    (tmp_path / "archive.pt").write_text("kept")
    (tmp_path / "model.pt").symlink_to(tmp_path / "archive.pt")
    files_module.save_file({"number": 1}, tmp_path / "model.pt")
    assert files_module.load_file(tmp_path / "model.pt") == {"number": 1}
    assert (tmp_path / "archive.pt").read_text() == "kept"


# --- paths -------------------------------------------------------------------------------------------------------


def test_a_local_path_is_absolute_and_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files_module.local_path("a/b.pt") == tmp_path / "a" / "b.pt"
    assert files_module.local_path(Path("~", "b.pt")) == tmp_path / "home" / "b.pt"
    assert files_module.local_path("a~b") == tmp_path / "a~b"
    assert files_module.local_path("/a/b") == Path("/a/b")
    assert files_module.local_path("a:b/c") == tmp_path / "a:b" / "c"
    assert files_module.local_path("C:/model.pt") == tmp_path / "C:" / "model.pt"  # on Windows, a drive


@pytest.mark.parametrize("address", ["s3://bucket/a.pt", "gs://a", "hdfs://host:8020/a", "file://a", "https://a/b"])
@pytest.mark.parametrize("make", [str, Path])
def test_the_address_of_a_remote_store_is_refused(tmp_path, monkeypatch, address, make):
    monkeypatch.chdir(tmp_path)
    for act in (
        files_module.local_path,
        files_module.check_can_write,
        files_module.load_file,
        lambda path: files_module.save_file({}, path),
    ):
        with pytest.raises(
            ValueError, match=r"'(s3|gs|hdfs|file|https)://\w*.*is not the path of a local file or folder"
        ):
            act(make(address))
    assert names_in(tmp_path) == []


def test_the_home_folder_of_nobody_is_refused():
    with pytest.raises(ValueError, match="names a home folder that does not exist"):
        files_module.local_path("~nobody-of-this-name/model.pt")


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("pathlib.Path.expanduser", files_module.local_path),
        ("pathlib.Path.absolute", files_module.local_path),
        ("os.fsync", lambda path: files_module.save_file({}, path)),
        ("torch.load", files_module.load_file),
    ],
)
def test_the_failure_of_a_worker_is_not_taken_for_one_of_the_file(monkeypatch, tmp_path, name, act):
    """PyTorch raises it from a signal handler, so anywhere in the program."""
    files_module.save_file({}, tmp_path / "model.pt")

    def fail(*args, **kwargs):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(name, fail)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        act(tmp_path / "model.pt")


class Owner:
    path = files_module.PathAttribute()

    def __init__(self, path):
        self.path = path


@pytest.mark.parametrize("make", [str, Path])
def test_a_relative_path_means_the_folder_that_was_current_when_it_was_set(tmp_path, monkeypatch, make):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    owner = Owner(make("a/b"))
    others = [copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))]
    assert owner.path == make("a/b")
    monkeypatch.chdir(tmp_path / "other")
    for one in (owner, *others):
        assert one.path == make(str(tmp_path / "a" / "b"))
        assert type(one.path) is type(make(""))
    owner.path = make("c")
    assert owner.path == make("c")
    monkeypatch.chdir(tmp_path)
    assert owner.path == make(str(tmp_path / "other" / "c"))


def test_other_paths_stay_as_they_are_given(tmp_path, monkeypatch):
    paths = ["~/a", "/a/b", "s3://bucket/a", Path("~/a")]
    owners = [Owner(path) for path in paths]
    monkeypatch.chdir(tmp_path)
    assert [owner.path for owner in owners] == paths


def test_an_attribute_that_was_not_set_is_missing():
    assert not hasattr(object.__new__(Owner), "path")
    assert isinstance(Owner.path, files_module.PathAttribute)


def test_a_path_works_although_the_current_folder_was_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    relative = Owner("a")
    (tmp_path / "gone").rmdir()
    assert Owner(str(tmp_path / "a")).path == str(tmp_path / "a")
    assert relative.path == str(tmp_path / "gone" / "a")


@pytest.mark.parametrize("length", [1, 138, 139, 143, 144, 255])
@pytest.mark.parametrize("letter", ["m", "\u00fc"])
def test_names_of_any_length_that_the_system_takes_can_be_written(tmp_path, length, letter):
    name = letter * (length // len(letter.encode()) - 3) + ".pt" if length > 10 else letter
    path = tmp_path / name
    for number in range(2):
        files_module.check_can_write(path)
        files_module.save_file({"number": number}, path)
        assert files_module.load_file(path) == {"number": number}
        assert names_in(tmp_path) == [name]
    path.unlink()
    for text in ("first", "second"):
        make_folder_with_file(files_module.temporary_path(path), text)
        files_module.replace_folder(path)
        assert (path / "file").read_text() == text
    assert names_in(tmp_path) == [name]


def test_long_names_have_different_hidden_names(tmp_path):
    names = {files_module.temporary_path(tmp_path / ("m" * 200 + end)) for end in "ab"}
    assert len(names) == 2


@pytest.mark.parametrize("name", ["m" * 256, "\u00fc" * 128, "m/" * 3000 + "m"])
def test_a_name_that_is_too_long_cannot_be_written(tmp_path, name):
    with pytest.raises(CheckpointError, match="File name too long"):
        files_module.check_can_write(tmp_path / name)


# --- metadata ----------------------------------------------------------------------------------------------------


def test_the_metadata_of_a_state_are_stored(tmp_path):
    state = OrderedDict(weight=torch.ones(1))
    vars(state).update(_metadata={"": {"version": np.int64(2)}}, not_storable=object())
    files_module.save_file({"state": state}, tmp_path / "file.pt")
    loaded = files_module.load_file(tmp_path / "file.pt")["state"]
    assert vars(loaded) == {"_metadata": {"": {"version": 2}}}


@pytest.mark.parametrize("name", [".best.pt.tmp-0", "best.pt"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_is_never_written_through_a_link(tmp_path, name, is_there):
    outside, link = tmp_path / "outside", tmp_path / "models" / name
    link.parent.mkdir()
    if is_there:
        outside.write_text("not ours")
    link.symlink_to(outside)
    for value in (1, 2):
        files_module.save_file({"value": value}, tmp_path / "models" / "best.pt")
        assert files_module.load_file(tmp_path / "models" / "best.pt") == {"value": value}
    assert names_in(link.parent) == ["best.pt"]
    assert not (tmp_path / "models" / "best.pt").is_symlink()
    assert outside.exists() == is_there
    assert not is_there or outside.read_text() == "not ours"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_files_causes_one_warning(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(files_module, "_cannot_flush", set())
    with pytest.warns(UserWarning, match="cannot be flushed to the disk"):
        files_module.save_file({"number": 1}, tmp_path / "a.pt")
    files_module.save_file({"number": 2}, tmp_path / "b.pt")
    assert files_module.load_file(tmp_path / "b.pt")["number"] == 2
