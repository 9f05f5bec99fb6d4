"""The lock of a folder of states: who holds it, what does not loosen it, and what must not be written to."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
from pathlib import Path

import pytest

from _saved import make_up_state, names_in
from _support import run_python
from pytorch_accelerated._checkpoint import lock as lock_module
from pytorch_accelerated._checkpoint.folder import Lineage, claim_folder
from pytorch_accelerated._checkpoint.lock import LOCK, keep_locked, lock, unlock
from pytorch_accelerated._checkpoint.resume import open_state
from pytorch_accelerated._checkpoint.writer import CollectedState, write_state
from pytorch_accelerated.exceptions import CheckpointError

needs_locks = pytest.mark.skipif(lock_module.fcntl is None, reason="this system cannot lock files")


class Owner:
    """Stands for a trainer."""


@pytest.fixture
def owner(tmp_path):
    owner = Owner()
    yield owner
    unlock(tmp_path, owner)


LOCK_FOLDER = """
import sys
from pathlib import Path
from pytorch_accelerated._checkpoint.folder import claim_folder
from pytorch_accelerated.exceptions import CheckpointError
owner = lambda: None
try:
    claim_folder(Path(sys.argv[1]), owner)
    print("claimed")
except CheckpointError as error:
    print(error)
"""


def another_process_on(folder: Path) -> str:
    """Return what another process says that tries to lock the folder."""
    return run_python(LOCK_FOLDER, str(folder))


def is_locked(folder: Path) -> bool:
    """Tell whether another run of this machine may not save states in the folder."""
    return "Another run is saving" in another_process_on(folder)


@needs_locks
def test_another_process_is_refused_with_the_name_of_the_one_that_holds_the_lock(tmp_path, owner):
    claim_folder(tmp_path, owner)
    make_up_state(tmp_path / ".epoch_1.tmp")
    answer = another_process_on(tmp_path)
    assert f"Another run is saving its training states in '{tmp_path}': process {os.getpid()} on " in answer
    assert "pass another `save_dir`" in answer
    assert ".epoch_1.tmp" in names_in(tmp_path), "what the other run is writing must not be removed"
    unlock(tmp_path, owner)
    assert another_process_on(tmp_path) == "claimed\n"


@needs_locks
@pytest.mark.parametrize("reads", ["read", "copy", "append"])
def test_the_lock_stays_when_anything_in_the_process_opens_its_file(tmp_path, owner, reads):
    lock(tmp_path, owner)
    if reads == "read":
        (tmp_path / LOCK).read_text()
    elif reads == "copy":
        (tmp_path / "copy").write_bytes((tmp_path / LOCK).read_bytes())
    else:
        (tmp_path / LOCK).open("a").close()
    assert is_locked(tmp_path)


def test_two_trainers_of_one_process_are_refused_and_do_not_unlock_each_other(tmp_path, owner):
    lock(tmp_path, owner)
    lock(tmp_path, owner)  # once more by the same one
    other, answers = Owner(), []

    def try_to_lock() -> None:
        try:
            lock(tmp_path / "." / "x" / "..", other)
        except CheckpointError as error:
            answers.append(str(error))
        unlock(tmp_path, other)

    (tmp_path / "x").mkdir()
    thread = threading.Thread(target=try_to_lock)
    thread.start()
    thread.join()
    assert "another trainer of this process" in answers[0]
    assert is_locked(tmp_path) is (lock_module.fcntl is not None)


def test_a_trainer_that_is_deleted_leaves_the_folder_to_others(tmp_path):
    """A notebook in which a cell was interrupted creates the trainer anew."""
    lock(tmp_path, Owner())
    gc.collect()
    other = Owner()
    lock(tmp_path, other)
    unlock(tmp_path, other)
    assert lock_module._held == {}


@needs_locks
def test_a_forked_process_does_not_hold_the_lock(tmp_path, owner):
    """Such as a dataloader worker that outlives its run, which was killed."""
    waiting, go_on = os.pipe()
    started, has_started = os.pipe()
    holder = os.fork()
    if holder == 0:
        lock(tmp_path, owner)
        child = os.fork()
        if child == 0:
            os.write(has_started, b"1")
            os.close(go_on)
            os.read(waiting, 1)  # until the test is done
            os._exit(0)
        os.read(started, 1)
        os._exit(0)
    os.waitpid(holder, 0)
    lock(tmp_path, owner)
    for descriptor in (waiting, go_on, started, has_started):
        os.close(descriptor)


@needs_locks
def test_a_forked_process_neither_loosens_nor_inherits_the_lock(tmp_path, owner):
    lock(tmp_path, owner)
    child = os.fork()
    if child == 0:
        try:
            unlock(tmp_path, owner)
            lock(tmp_path, owner)
            os._exit(1)
        except CheckpointError:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert is_locked(tmp_path)


@needs_locks
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize(("module", "name"), [(os, "fstat"), (lock_module, "_is_still_there")])
def test_a_disk_that_fails_while_a_folder_is_locked_leaves_it_to_the_next_try(
    tmp_path, owner, monkeypatch, module, name
):
    def fail(*_):
        raise OSError(errno.EIO, "the disk fails")

    num_open = len([*Path("/proc/self/fd").iterdir()])
    with monkeypatch.context() as failing:
        failing.setattr(module, name, fail)
        with pytest.raises(OSError, match="the disk fails"):
            lock(tmp_path, owner)
    assert len([*Path("/proc/self/fd").iterdir()]) == num_open
    lock(tmp_path, owner)
    assert is_locked(tmp_path)
    unlock(tmp_path, owner)


@needs_locks
def test_a_lock_file_that_is_deleted_meanwhile_is_locked_anew(tmp_path, owner, monkeypatch):
    """Otherwise two runs would each hold the lock of another file."""
    tries, really_lock = [], lock_module._try_to_lock

    def delete_and_lock(descriptor):
        tries.append(descriptor)
        if len(tries) == 1:
            (tmp_path / LOCK).unlink()
        return really_lock(descriptor)

    monkeypatch.setattr(lock_module, "_try_to_lock", delete_and_lock)
    lock(tmp_path, owner)
    assert len(tries) == 2
    assert is_locked(tmp_path)


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_file_system_without_locks_causes_a_warning(tmp_path, owner, monkeypatch, has_locks):
    if has_locks and lock_module.fcntl is not None:
        monkeypatch.setattr(lock_module.fcntl, "flock", _fail_without_locks)
    else:
        monkeypatch.setattr(lock_module, "fcntl", None)
    with pytest.warns(UserWarning, match=r"cannot be locked .*Make sure that only one run saves its training states"):
        lock(tmp_path, owner)
    assert lock_module._held == {}
    unlock(tmp_path, owner)


def _fail_without_locks(file, operation):
    raise OSError(37, "No locks available")


@needs_locks
@pytest.mark.parametrize(
    "contents", [b"\xff\xfe\x00 \x1b[31m red", b"", b"x" * 100_000], ids=["binary", "empty", "long"]
)
def test_a_lock_file_that_is_no_text_is_told_in_plain_characters(tmp_path, owner, contents):
    lock(tmp_path, owner)
    (tmp_path / LOCK).write_bytes(contents)
    answer = another_process_on(tmp_path)
    assert "Another run is saving" in answer
    assert answer.rstrip("\n").isprintable()
    assert len(answer) < 1000


OUTSIDE = b"not ours"


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_what_is_in_the_place_of_the_lock_file_is_refused_and_not_written_to(tmp_path, owner, kind):
    outside = tmp_path / "outside"
    states = tmp_path / "states"
    states.mkdir()
    if kind != "dangling link":
        outside.write_bytes(OUTSIDE)
    if kind.endswith("link"):
        (os.link if kind == "hard link" else os.symlink)(outside, states / LOCK)
    elif kind == "pipe":
        os.mkfifo(states / LOCK)
    else:
        (states / LOCK).mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be saved in .*\.lock"):
        claim_folder(states, owner)
    assert outside.exists() == (kind != "dangling link")
    assert not outside.exists() or outside.read_bytes() == OUTSIDE


@needs_locks
@pytest.mark.parametrize("deletes", ["file", "folder"])
def test_a_lock_that_somebody_has_deleted_is_taken_again_at_the_next_save(tmp_path, owner, deletes):
    claim_folder(tmp_path, owner)
    if deletes == "folder":
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    else:
        (tmp_path / LOCK).unlink()
    assert not is_locked(tmp_path)
    keep_locked(tmp_path)
    assert is_locked(tmp_path)
    unlock(tmp_path, owner)
    assert not is_locked(tmp_path)


@needs_locks
def test_a_run_whose_lock_was_deleted_and_taken_by_another_saves_nothing_there(tmp_path, owner):
    claim_folder(tmp_path, owner)
    (tmp_path / LOCK).unlink()
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    lock_module.fcntl.flock(descriptor, lock_module.fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="Another run is saving"):
        write_state(tmp_path / "final", CollectedState({}, {}, {}), lineage=Lineage(), is_main=True, num_processes=1)
    assert names_in(tmp_path) == []
    os.close(descriptor)


@needs_locks
def test_a_state_that_another_run_replaces_at_this_moment_is_not_touched_by_a_reader(tmp_path, owner):
    make_up_state(tmp_path / ".final.old", epochs=1)
    claim_folder(tmp_path / "elsewhere", owner)
    lock(tmp_path, owner)
    with pytest.raises(CheckpointError, match="Another run is saving"):
        open_state(tmp_path / "final", is_main=True, num_processes=1, allow_other_num_processes=False)
    assert ".final.old" in names_in(tmp_path)
    unlock(tmp_path, owner)
    open_state(tmp_path / "final", is_main=True, num_processes=1, allow_other_num_processes=False)
    assert "final" in names_in(tmp_path)
