"""A folder of states: which it contains, which is the newest, which are deleted, and which run owns it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from _saved import falsify_manifest, make_up_state, names_in
from pytorch_accelerated._checkpoint import folder as folder_module
from pytorch_accelerated._checkpoint import manifest as manifest_module
from pytorch_accelerated._checkpoint.files import replace_folder
from pytorch_accelerated._checkpoint.folder import (
    Lineage,
    Retention,
    claim_folder,
    find_newest_state,
    list_states,
    rotate,
)
from pytorch_accelerated._checkpoint.lock import unlock
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated._checkpoint.writer import CollectedState, write_state
from pytorch_accelerated.exceptions import CheckpointError

OWNER = object()


def names_of(states):
    return [state.path.name for state in states]


@pytest.fixture
def folder(tmp_path):
    """A folder with states whose names and timestamps say nothing about their order."""
    make_up_state(tmp_path / "step_20", epochs=1, batches=2)
    make_up_state(tmp_path / "step_9", epochs=2, batches=1)
    make_up_state(tmp_path / "epoch_3", epochs=0, batches=5)
    make_up_state(tmp_path / "mine", epochs=1, batches=3)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (number * 1000, number * 1000))
    return tmp_path


IN_ORDER = ["epoch_3", "step_20", "mine", "step_9"]


# --- what is in it -----------------------------------------------------------------------------------------------


def test_states_are_sorted_by_how_far_their_run_had_come(folder):
    assert names_of(list_states(folder)) == IN_ORDER
    assert find_newest_state(folder).path == folder / "step_9"


def test_timestamps_do_not_affect_the_order(folder, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    for number, name in enumerate(reversed(IN_ORDER)):
        os.utime(folder / name, (number, number))
        for file in (folder / name).iterdir():
            os.utime(file, (number, number))
    assert names_of(list_states(folder)) == IN_ORDER


def test_states_of_later_runs_come_after_those_of_earlier_runs(folder):
    make_up_state(folder / "step_1", epochs=0, batches=1, generation=1)
    assert names_of(list_states(folder)) == [*IN_ORDER, "step_1"]


def test_files_and_folders_that_are_not_states_are_not_listed(folder):
    (folder / "notes").mkdir()
    (folder / "file").touch()
    shutil.copytree(folder / "mine", folder / ".mine.tmp")
    assert names_of(list_states(folder)) == IN_ORDER


def test_unusable_states_are_listed_with_their_problem(folder):
    (folder / "epoch_7").mkdir()
    (folder / "step_9" / "process_0.pt").unlink()
    (folder / "mine" / "manifest.json").write_text("{")
    states = {state.path.name: state for state in list_states(folder)}
    assert list(states) == ["epoch_7", "mine", "epoch_3", "step_20", "step_9"]
    assert "no readable manifest.json" in states["epoch_7"].problem
    assert "no readable manifest.json" in states["mine"].problem
    assert states["step_9"].problem == "process_0.pt is missing or altered"
    assert states["epoch_3"].problem is None


def test_an_unreadable_folder_is_listed_only_if_it_has_the_name_of_a_state(folder, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_module, "read_manifest", fail)
    states = list_states(folder)
    assert names_of(states) == ["epoch_3", "step_20", "step_9"]
    assert all("Permission denied" in state.problem for state in states)


def test_the_newest_valid_state_is_found_and_skipped_ones_are_reported(folder):
    (folder / "epoch_8").mkdir()
    for name in ("step_9", "mine"):
        (folder / name / "model.pt").write_bytes(b"x" * (folder / name / "model.pt").stat().st_size)
    skipped = []
    assert find_newest_state(folder, skipped.append).path == folder / "step_20"
    assert len(skipped) == 3
    assert "epoch_8" in skipped[0]  # told although an older one is found: nobody can say how far it had come
    assert skipped[1].startswith(f"The training state '{folder / 'step_9'}' is damaged: model.pt")
    for name in ("step_20", "epoch_3"):
        (folder / name / "model.pt").unlink()
    skipped.clear()
    assert find_newest_state(folder, skipped.append) is None
    assert len(skipped) == 5


def test_states_of_a_newer_version_are_not_skipped(folder):
    """Resuming from an older state would abandon, and finally delete, what the newer version has done."""
    falsify_manifest(folder / "epoch_3", lambda manifest: manifest.update(format_version=9))
    assert names_of(list_states(folder))[-1] == "epoch_3"
    with pytest.raises(CheckpointError, match="newer version"):
        find_newest_state(folder)


def test_a_folder_without_states_has_no_newest_state(tmp_path):
    assert list_states(tmp_path) == []
    assert find_newest_state(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        list_states(tmp_path / "nothing")


# --- generations -------------------------------------------------------------------------------------------------


def test_the_first_run_in_a_folder_has_generation_0(tmp_path):
    lineage = Lineage()
    assert [lineage.take_number(tmp_path) for _ in range(3)] == [(0, 0), (0, 1), (0, 2)]


def test_a_run_from_scratch_starts_a_new_generation_in_every_folder_with_states(folder, tmp_path_factory):
    make_up_state(folder / "step_1", generation=4)
    lineage, other = Lineage(), tmp_path_factory.mktemp("other")
    assert lineage.take_number(folder) == (5, 0)
    make_up_state(folder / "step_2", generation=5)
    assert lineage.take_number(folder) == (5, 1)
    assert lineage.take_number(other) == (0, 0)


def test_a_run_resumed_from_the_newest_state_keeps_its_generation(folder):
    newest = read_manifest(make_up_state(folder / "step_30", epochs=3, generation=2, number=6))
    lineage = Lineage(newest)
    assert [lineage.take_number(folder) for _ in range(2)] == [(2, 7), (2, 8)]


def test_a_run_resumed_from_an_older_state_starts_a_new_generation(folder):
    """Otherwise the states that it abandons would count as newer than those that it saves."""
    lineage = Lineage(read_manifest(folder / "step_20"))
    assert lineage.take_number(folder) == (1, 0)


def test_a_resumed_run_that_saves_to_another_folder_keeps_its_generation(folder, tmp_path_factory):
    origin = read_manifest(make_up_state(folder / "step_30", epochs=3, generation=2, number=6))
    other = tmp_path_factory.mktemp("other")
    assert Lineage(origin).take_number(other) == (2, 0)
    make_up_state(other / "step_1", epochs=9)
    assert Lineage(origin).take_number(other) == (2, 1)


def test_states_with_a_damaged_manifest_do_not_affect_the_generation(folder):
    (folder / "step_9" / "manifest.json").write_text("")
    assert Lineage(read_manifest(folder / "mine")).take_number(folder) == (0, 1)


# --- what is kept ------------------------------------------------------------------------------------------------


def make_states(folder, losses, generation=0):
    for number, loss in enumerate(losses, start=1):
        path = folder / f"epoch_{number}"
        make_up_state(path, epochs=number, metrics={"loss": loss}, generation=generation)


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(1), [6]),
        (Retention(2), [5, 6]),
        (Retention(9), [1, 2, 3, 4, 5, 6]),
        (Retention(1, 1, "loss"), [2, 6]),
        (Retention(1, 2, "loss"), [2, 5, 6]),
        (Retention(2, 2, "loss"), [2, 5, 6]),
        (Retention(1, 1, "loss", greater_is_better=True), [1, 6]),
        (Retention(1, 9, "loss"), [1, 2, 4, 5, 6]),
        (Retention(1, 2, "unknown"), [6]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best_states(tmp_path, retention, expected):
    """The third state is never the best, because its loss is not a number."""
    make_states(tmp_path, [5.0, 1.0, "nan", 4.0, 2.0, 3.0])
    rotate(tmp_path, retention)
    assert names_in(tmp_path) == [f"epoch_{number}" for number in expected]


def test_the_first_of_several_states_with_the_same_evaluation_counts_as_the_best(tmp_path):
    """The states of later steps only repeat its value."""
    make_states(tmp_path, [3.0, 1.0])
    make_up_state(tmp_path / "step_25", epochs=2, batches=5, metrics={"loss": 1.0})
    make_up_state(tmp_path / "step_26", epochs=2, batches=6, metrics={"loss": 1.0})
    make_up_state(tmp_path / "epoch_3", epochs=3, metrics={"loss": 1.0})
    rotate(tmp_path, Retention(1, 2, "loss"))
    assert names_in(tmp_path) == ["epoch_2", "epoch_3"]
    make_up_state(tmp_path / "step_33", epochs=3, batches=3, metrics={"loss": 1.0})
    rotate(tmp_path, Retention(1, 1, "loss"))
    assert names_in(tmp_path) == ["epoch_2", "step_33"]


def test_the_states_of_earlier_runs_are_deleted_first(tmp_path):
    make_states(tmp_path, [1.0, 2.0, 3.0])
    make_up_state(tmp_path / "step_1", batches=1, generation=1)
    rotate(tmp_path, Retention(2))
    assert names_in(tmp_path) == ["epoch_3", "step_1"]


def test_only_states_with_a_name_of_the_callback_are_deleted(tmp_path):
    make_states(tmp_path, [1.0, 2.0])
    for name in ("mine", "epoch_x", "epoch_2_copy"):
        make_up_state(tmp_path / name)
    for name in ("epoch_0", "step_0", "notes"):
        (tmp_path / name).mkdir()
    before = names_in(tmp_path)
    rotate(tmp_path, Retention(1))
    assert names_in(tmp_path) == [name for name in before if name != "epoch_1"]


def test_damaged_states_are_not_counted_among_those_to_keep(tmp_path):
    make_states(tmp_path, [1.0, 2.0, 3.0])
    (tmp_path / "epoch_2" / "model.pt").unlink()
    rotate(tmp_path, Retention(2))
    assert names_in(tmp_path) == ["epoch_1", "epoch_3"]


def test_a_state_that_cannot_be_read_at_the_moment_is_not_deleted(tmp_path, monkeypatch):
    """A network file system may fail once, while a state that was just written is looked at."""
    make_states(tmp_path, [1.0, 2.0, 3.0, 4.0])

    def fail(saved, name):
        if saved.path.name == "epoch_4":
            raise OSError(5, "Input/output error", name)
        return True

    monkeypatch.setattr(manifest_module, "_has_size", fail)
    rotate(tmp_path, Retention(1), [tmp_path / "epoch_3", tmp_path / "epoch_4"])
    assert names_in(tmp_path) == ["epoch_3", "epoch_4"]
    assert "cannot be read: [Errno 5] Input/output error" in list_states(tmp_path)[0].problem


def test_a_state_that_cannot_be_deleted_causes_a_warning(tmp_path, monkeypatch):
    make_states(tmp_path, [1.0, 2.0])

    def fail(path):
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(folder_module, "delete_folder", fail)
    with pytest.warns(UserWarning, match=r"could not be deleted in '.*': .*Directory not empty: '.*epoch_1'"):
        rotate(tmp_path, Retention(1))


# --- who owns it -------------------------------------------------------------------------------------------------


@pytest.fixture
def claimed(tmp_path):
    """The path of a folder that is unlocked after the test."""
    yield tmp_path / "a" / "states"
    unlock(tmp_path / "a" / "states", OWNER)


def test_claiming_creates_the_folder_and_can_be_repeated(claimed):
    claim_folder(claimed, OWNER)
    claim_folder(claimed, OWNER)
    assert names_in(claimed) == []
    assert (claimed / ".lock").is_file()


def test_claiming_repairs_what_an_interrupted_run_left_and_touches_nothing_else(claimed):
    for name in (".epoch_1.tmp", ".epoch_1.old", ".final.tmp", ".step_3.old", ".step_4.tmp"):
        make_up_state(claimed / name)
    for name in ("epoch_1", "step_5"):
        make_up_state(claimed / name)
    others = [".cache.tmp", ".mine.old", ".epoch_1.bak", "epoch_2.tmp", ".epoch_x.tmp", ".hidden", ".epoch_1.tmp2"]
    for name in others:
        (claimed / name).mkdir()
    claim_folder(claimed, OWNER)
    assert names_in(claimed) == sorted([*others, "epoch_1", "step_3", "step_5"])


@pytest.mark.parametrize("place", ["file/states", "file"])
def test_claiming_a_folder_that_cannot_be_created_raises(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"cannot be saved in '.*{place}'.*Pass a `save_dir`"):
        claim_folder(tmp_path / place, OWNER)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs /sys")
@pytest.mark.parametrize("place", ["/sys/kernel", "/sys/kernel/states"])
def test_claiming_a_folder_on_a_read_only_file_system_raises(place):
    with pytest.raises(CheckpointError, match=rf"cannot be saved in '{place}'"):
        claim_folder(Path(place), OWNER)


def test_claiming_a_folder_without_write_permission_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=r"cannot be saved in .*Permission denied"):
        claim_folder(tmp_path, OWNER)


@pytest.mark.parametrize("name", ["ünïcode", "with spaces", "[brackets]*?", "a\nb", "x" * 200])
def test_folders_may_have_unusual_names(tmp_path, name):
    folder = tmp_path / name
    claim_folder(folder, OWNER)
    make_up_state(folder / "epoch_1", epochs=1)
    make_up_state(folder / "epoch_2", epochs=2)
    rotate(folder, Retention(1))
    unlock(folder, OWNER)
    assert find_newest_state(folder).path == folder / "epoch_2"


def test_rotation_deletes_unreadable_states_only_if_this_run_wrote_them(tmp_path):
    """A subclass of the trainer may write states in a format of its own."""
    paths = [tmp_path / f"step_{number}" for number in (9, 10, 11)]
    other = tmp_path / "step_1"
    for path in (*paths, other):
        path.mkdir()
    rotate(tmp_path, Retention(2), paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_10", "step_11"]
    rotate(tmp_path, Retention(None), paths)
    assert len(list(tmp_path.iterdir())) == 3


PLACED = {
    "file": lambda path: path.write_text("of the user"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("name", [".step_2.tmp", ".final.tmp"])
def test_what_is_in_the_place_of_a_temporary_folder_is_removed_and_not_waited_for(tmp_path, kind, name):
    PLACED[kind](tmp_path / name)
    claim_folder(tmp_path, OWNER)
    unlock(tmp_path, OWNER)
    assert names_in(tmp_path) == []
    PLACED[kind](tmp_path / name)
    target = tmp_path / name.removeprefix(".").removesuffix(".tmp")
    write_state(target, CollectedState({}, {}, {}), lineage=Lineage(), is_main=True, num_processes=1)
    assert names_in(tmp_path) == [target.name]


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("name", ["step_2", "final", ".step_2.old"])
def test_what_is_no_folder_in_the_place_of_a_state_is_refused_before_the_run_and_stays(tmp_path, kind, name):
    PLACED[kind](tmp_path / name)
    with pytest.raises(CheckpointError, match="it is no folder, so it is not replaced"):
        claim_folder(tmp_path, OWNER)
    with pytest.raises(FileExistsError):
        replace_folder(tmp_path / names_in(tmp_path)[0])
    assert len(names_in(tmp_path)) == 1
    assert not (tmp_path / names_in(tmp_path)[0]).is_dir()
