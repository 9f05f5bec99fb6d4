"""A run may die at any file operation: the newest state is valid, and a resumed run ends with the same bits."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

from _saved import assert_equal, everything_in, make_state_trainer, names_in, train
from _support import Probe
from pytorch_accelerated._checkpoint import files as files_module
from pytorch_accelerated._checkpoint.folder import claim_folder
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.states import list_states, verify_state

sys.path.insert(0, str(Path(__file__).parent))

from _crashing import dies_at

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def run(folder, stop_after=None, resume_from=None):
    """Train for two epochs of three steps, or until an error after ``stop_after`` updates; return the trainer."""

    def stop(trainer, **_):
        if trainer.progress.num_updates == stop_after:
            raise InterruptedError

    save = SaveTrainingStateCallback(folder, save_every_n_steps=1, max_checkpoints=2)
    trainer = make_state_trainer([save, Probe(on_train_step_start=stop)])
    torch.manual_seed(0)
    with suppress(InterruptedError):
        kwargs = {"num_epochs": 2, "per_device_batch_size": 6, "gradient_accumulation_steps": 1}
        train(trainer, resume_from=resume_from, **kwargs)
    return trainer


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"))


def assert_recovers(folder, uninterrupted_run):
    """Assert that every visible state is valid, and that a run resumed from the newest ends with the same bits."""
    for state in list_states(folder):
        verify_state(state.path)
    resumed = run(folder, resume_from="latest")
    assert resumed.is_resumed
    assert_equal(everything_in(resumed), everything_in(uninterrupted_run))
    assert names_in(folder) == ["final", "step_6"], "no leftovers, and no state too few or too many"


def crash_everywhere(before, folder, act):
    """Die at each file operation of a function in turn, and yield with the folder as it is then."""
    for point in count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        if not dies_at(point, act, folder):
            print(f"died at each of {point} operations")
            assert point >= 8, "the operations must have been seen"
            return
        yield


@pytest.fixture
def before(tmp_path):
    """The states of a run that was interrupted after three steps."""
    run(tmp_path / "before", stop_after=3)
    assert names_in(tmp_path / "before") == ["step_2", "step_3"]
    return tmp_path / "before"


@pytest.fixture
def only_one(before):
    """Only the newest of these states, under a name that is used again."""
    shutil.rmtree(before / "step_2")
    (before / "step_3").rename(before / "final")
    return before


def test_dying_at_any_point_while_a_state_is_saved_and_old_ones_are_deleted(tmp_path, before, uninterrupted_run):
    folder = tmp_path / "states"
    for _ in crash_everywhere(before, folder, lambda: run(folder, stop_after=4, resume_from="latest")):
        assert len([state for state in list_states(folder) if state.problem is None]) >= 2
        assert_recovers(folder, uninterrupted_run)


def test_dying_at_any_point_while_the_only_state_is_replaced(tmp_path, only_one, uninterrupted_run):
    folder = tmp_path / "states"

    def save_again():
        trainer = make_state_trainer([SaveTrainingStateCallback(folder)])
        trainer.load_training_state(only_one / "final")
        trainer.save_training_state(folder / "final")

    for _ in crash_everywhere(only_one, folder, save_again):
        assert_recovers(folder, uninterrupted_run)


@pytest.mark.parametrize("stage", ["old renamed", "new in place"])
def test_dying_again_at_any_point_of_the_repair(tmp_path, only_one, uninterrupted_run, stage):
    folder = tmp_path / "states"
    shutil.copytree(only_one / "final", only_one / ".final.old")
    if stage == "old renamed":
        (only_one / "final").rename(only_one / ".final.tmp")
    for _ in crash_everywhere(only_one, folder, lambda: claim_folder(folder, object())):
        assert_recovers(folder, uninterrupted_run)


def test_dying_at_any_point_while_a_checkpoint_is_saved(tmp_path):
    """The file has either its old or its new contents."""
    path = tmp_path / "best.pt"
    seen = set()
    for point in count():
        files_module.save_file({"number": 1}, path)
        if not dies_at(point, lambda: files_module.save_file({"number": 2}, path), tmp_path):
            break
        seen.add(files_module.load_file(path)["number"])
    assert seen == {1, 2}
    assert files_module.load_file(path) == {"number": 2}
