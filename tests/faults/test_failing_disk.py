"""Whatever file operation of a save fails, the error names path and reason, and everything saved before still loads.

    NUM_DISK_FAULTS=all python -m pytest tests/faults/test_failing_disk.py -s

lets each operation fail with each error, once or from then on. By default, only some of them do.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from _saved import make_state_trainer, names_in, train
from _support import make_dataset
from pytorch_accelerated._checkpoint.files import load_file
from pytorch_accelerated._checkpoint.folder import claim_folder
from pytorch_accelerated._checkpoint.lock import unlock
from pytorch_accelerated._checkpoint.manifest import TRAINER_STATE
from pytorch_accelerated.callbacks import SaveBestModelCallback, SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError, add_note
from pytorch_accelerated.states import list_states, verify_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytorch_accelerated import Trainer

sys.path.insert(0, str(Path(__file__).parent))

from _failing import CODES, failing

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")

IS_COMPLETE = os.environ.get("NUM_DISK_FAULTS") == "all"
STRIDE, STRIDE_OF_RUNS = 23, 89
"""Of how many operations one fails by default."""

OLD, NEW = {"marker": "old"}, {"marker": "new"}


@dataclass(frozen=True)
class Save:
    """One way to save.

    Args:
        save: Saves, given a trainer and a folder.
        states: The states that there are afterwards.
        target: What has new contents afterwards; empty if nothing has that can be told from the old ones.
    """

    save: Callable[[Trainer, Path], object]
    states: tuple[str, ...] = ("epoch_1", "final")
    target: str = ""

    @property
    def is_rotating(self) -> bool:
        """Whether older states are removed."""
        return "epoch_1" not in self.states

    @property
    def is_run(self) -> bool:
        """Whether it is a run, which may fail after what it has saved."""
        return self.is_rotating or self is SAVES["a run with the best model"]


def save_state(trainer, path, **kwargs):
    trainer.save_training_state(path, NEW, **kwargs)
    trainer.wait_for_training_state()


def run_with(*callbacks):
    """Train from the beginning."""
    train(make_state_trainer(callbacks, seed=6), num_epochs=1, eval_dataset=make_dataset(4))


def run_with_states(folder, **kwargs):
    run_with(SaveTrainingStateCallback(folder / "states", save_every_n_steps=3, max_checkpoints=2, **kwargs))


def claim(folder):
    owner = Owner()
    claim_folder(folder / "states", owner)
    unlock(folder / "states", owner)


class Owner:
    """Who locks a folder."""


SAVES = {
    "a state": Save(
        lambda trainer, folder: save_state(trainer, folder / "states" / "step_9"),
        ("epoch_1", "final", "step_9"),
        "states/step_9",
    ),
    "a state in a new folder": Save(
        lambda trainer, folder: save_state(trainer, folder / "new" / "folder" / "final"), target="new/folder/final"
    ),
    "a state in place of an older one": Save(
        lambda trainer, folder: save_state(trainer, folder / "states" / "final"), target="states/final"
    ),
    "a state in the background": Save(
        lambda trainer, folder: save_state(trainer, folder / "states" / "final", in_background=True),
        target="states/final",
    ),
    "a run with states": Save(lambda _, folder: run_with_states(folder), ("final", "step_3")),
    "a run with states in the background": Save(
        lambda _, folder: run_with_states(folder, in_background=True), ("final", "step_3")
    ),
    "a run that only warns": Save(lambda _, folder: run_with_states(folder, on_save_error="warn"), ("final", "step_3")),
    "a checkpoint": Save(lambda trainer, folder: trainer.save_checkpoint(folder / "best.pt", NEW), target="best.pt"),
    "a checkpoint in a new folder": Save(
        lambda trainer, folder: trainer.save_checkpoint(folder / "new" / "folder" / "best.pt", NEW),
        target="new/folder/best.pt",
    ),
    "a checkpoint of safetensors": Save(
        lambda trainer, folder: trainer.save_checkpoint(folder / "best.safetensors", NEW, False),
        target="best.safetensors",
    ),
    "a run with the best model": Save(
        lambda _, folder: run_with(SaveBestModelCallback(folder / "best.pt")), target="best.pt"
    ),
    "the lock": Save(lambda _, folder: claim(folder)),
}


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Flush nothing: no power is lost here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def trainer():
    trainer = make_state_trainer()
    train(trainer, num_epochs=1)
    return trainer


@pytest.fixture(scope="module")
def before(trainer, tmp_path_factory):
    """A folder with what earlier runs have saved."""
    folder = tmp_path_factory.mktemp("before")
    for name in ("epoch_1", "final"):
        trainer.save_training_state(folder / "states" / name, OLD)
    trainer.save_checkpoint(folder / "best.pt", OLD)
    trainer.save_checkpoint(folder / "best.safetensors", OLD, save_optimizer=False)
    return folder


def marker_in(trainer, path):
    """Return what tells old contents from new ones, once they are verified; ``None`` if there is nothing."""
    if not path.exists():
        return None
    if path.is_dir():
        verify_state(path)
        return load_file(path / TRAINER_STATE)["marker"]
    return trainer.load_checkpoint(path, load_optimizer=False).get("marker", "new")


def assert_recovers(trainer, folder, save, raised, stays_broken):
    """Assert that what was saved before is valid, and that the next run can save and leaves nothing else."""
    claim(folder)  # as the next run does at its start
    states = list_states(folder / "states")
    assert [state.problem for state in states] == [None] * len(states)
    assert len(states) >= 2
    for state in states:
        verify_state(state.path)
    for name in ("best.pt", "best.safetensors", *(() if save.is_rotating else ("states/epoch_1", "states/final"))):
        marker = marker_in(trainer, folder / name)
        # A state that took the place of another cannot be put back if the disk stays broken. It is complete, too.
        is_put_back = not (stays_broken and name.startswith("states"))
        if name != save.target or (raised and "unchanged" in str(raised) and is_put_back and not save.is_run):
            assert marker == "old"
    if save.target and not raised:
        assert marker_in(trainer, folder / save.target) == "new"
    save.save(trainer, folder)
    assert not save.target or marker_in(trainer, folder / save.target) == "new"
    assert names_in(folder / "states") == sorted(save.states)
    assert {path.name for path in folder.rglob(".*")} <= {".lock"}


def assert_explained(disk, message, folder):
    """Assert that a message names a path and the reason. PyTorch does not always know the reason."""
    known = (
        os.strerror(disk.code),
        *(("file write failed", "cannot be opened", "is missing") * ("torch" in disk.failed)),
    )
    assert str(folder) in message
    assert any(reason in message for reason in known)


def fails_at(point, code, stays_broken, save, trainer, folder):
    """Save while an operation fails, check what happens then, and say in a word what did; ``None`` if none failed."""
    raised = None
    with warnings.catch_warnings(record=True) as caught, failing(folder, point, code, stays_broken) as disk:
        warnings.simplefilter("always")
        try:
            save.save(trainer, folder)
        except CheckpointError as error:
            raised = error
    told = [str(warning.message) for warning in caught]
    if not disk.failed:
        assert not raised
        assert not told
        return None
    try:
        for message in [*told, str(raised)][: None if raised else -1]:
            assert_explained(disk, message, folder)
        assert_recovers(trainer, folder, save, raised, stays_broken)
    except BaseException as error:
        add_note(error, f"{disk.failed}, operation {point}, {errno.errorcode[code]}, {stays_broken}; {told} {raised!r}")
        raise
    return "raised" if raised else "warned" if told else "no loss"


@pytest.mark.parametrize("stays_broken", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", SAVES)
def test_an_operation_that_fails_costs_nothing_that_was_saved(trainer, before, tmp_path, name, stays_broken):
    save, folder, outcomes = SAVES[name], tmp_path / "folder", Counter[str]()
    stride = 1 if IS_COMPLETE else STRIDE_OF_RUNS if save.is_run else STRIDE
    for number, code in enumerate(CODES):
        for point in count((len(name) + 7 * number) % stride, stride):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(before, folder)
            outcome = fails_at(point, code, stays_broken, save, trainer, folder)
            if outcome is None:
                break
            outcomes[outcome] += 1
    print(f"{name}: {dict(outcomes)}")
