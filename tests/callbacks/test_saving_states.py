"""`SaveTrainingStateCallback` across runs: resuming from the newest state, retention, timing, and failures."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import _support
from _saved import falsify_manifest, names_in, rewrite_manifest
from _support import Probe, assert_same_weights, make_dataset, make_model, make_trainer, raiser, run_python, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint import lock as lock_module
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.states import list_states

train = partial(_support.train, dataset=12, num_epochs=3)  # three steps per epoch


def make(folder, callbacks=(), **settings):
    """A trainer that saves its states to a folder."""
    save = SaveTrainingStateCallback(folder, **{"save_every_n_steps": 1, "save_at_end": False, **settings})
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=[save, *callbacks])


def stopping_at(num_updates):
    """A callback that ends the run like a crash."""

    def crash(trainer, **_):
        if trainer.progress.num_updates == num_updates:
            raise LookupError("crash")

    return Probe(on_train_step_start=crash)


def crash(folder, num_updates, **kwargs):
    with pytest.raises(LookupError):
        train(make(folder, [stopping_at(num_updates)], **kwargs))


def damage(path):
    content = (path / "model.pt").read_bytes()
    (path / "model.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture(scope="module")
def uninterrupted_run():
    """An uninterrupted run."""
    model = make_model()
    trainer = Trainer(model, torch.nn.functional.mse_loss, torch.optim.Adam(model.parameters(), lr=0.1), callbacks=())
    torch.manual_seed(0)
    train(trainer)
    return trainer


# --- resume from the newest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume_from", ["latest", True])
def test_latest_resumes_from_the_newest_state(tmp_path, capsys, uninterrupted_run, resume_from):
    crash(tmp_path, 5)
    capsys.readouterr()
    resumed = make(tmp_path)
    torch.manual_seed(99)
    train(resumed, resume_from=resume_from)
    assert resumed.is_resumed
    resuming, going_on, *saved = capsys.readouterr().out.splitlines()
    assert resuming == "Resuming from 'step_5' in epoch 2."
    assert saved == [f"Saved training state to {tmp_path / f'step_{number}'}" for number in range(6, 10)]
    assert going_on.endswith("The data continue exactly where they stopped.")
    assert_same_weights(weights_of(resumed.model), weights_of(uninterrupted_run.model))


@pytest.mark.parametrize("resume_from", [None, False])
def test_a_run_without_resume_from_starts_from_scratch(tmp_path, capsys, resume_from):
    crash(tmp_path, 5)
    trainer = make(tmp_path)
    capsys.readouterr()
    train(trainer, resume_from=resume_from)
    assert not trainer.is_resumed
    assert "Resuming" not in capsys.readouterr().out


def test_latest_without_any_state_starts_from_scratch(tmp_path, capsys, uninterrupted_run):
    trainer = make(tmp_path / "new")
    torch.manual_seed(0)
    train(trainer, resume_from="latest")
    assert not trainer.is_resumed
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        f"There is no training state to resume from in '{tmp_path / 'new'}': the run starts from scratch."
    )
    assert_same_weights(weights_of(trainer.model), weights_of(uninterrupted_run.model))


def test_latest_skips_damaged_states_and_prints_why(tmp_path, capsys, uninterrupted_run):
    crash(tmp_path, 5)
    damage(tmp_path / "step_5")
    (tmp_path / "step_3" / "manifest.json").write_text("")
    capsys.readouterr()
    resumed = make(tmp_path)
    train(resumed, resume_from="latest")
    lines = capsys.readouterr().out.splitlines()
    assert "step_3' is not a complete training state" in lines[0]
    assert "step_5' is damaged: model.pt is missing or altered" in lines[1]
    assert all(line.startswith("Skipped: ") for line in lines[:2])
    assert lines[2] == "Resuming from 'step_4' in epoch 2."
    assert_same_weights(weights_of(resumed.model), weights_of(uninterrupted_run.model))


def test_if_all_states_are_damaged_the_run_starts_from_scratch_and_prints_why(tmp_path, capsys):
    crash(tmp_path, 2)
    for path in tmp_path.iterdir():
        if path.is_dir():
            damage(path)
    trainer = make(tmp_path)
    capsys.readouterr()
    train(trainer, resume_from=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["Skipped"] * 2
    assert lines[2].endswith("the run starts from scratch.")
    assert not trainer.is_resumed


def test_the_newest_state_is_the_furthest_of_the_last_run_whatever_clocks_and_names_say(tmp_path):
    """Modification times and names do not matter."""
    crash(tmp_path, 8, save_every_n_steps=4)
    crash(tmp_path, 3)
    crash(tmp_path, 2, save_every_n_epochs=1)
    order = [(state.generation, state.path.name) for state in list_states(tmp_path)]
    assert order == [(0, "step_4"), (0, "step_8"), (1, "step_3"), (2, "step_1"), (2, "step_2")]
    for number, path in enumerate(tmp_path / name for _, name in reversed(order)):
        os.utime(path, (number, number))
    resumed = make(tmp_path)
    train(resumed, resume_from="latest")
    assert [state.generation for state in list_states(tmp_path)][-1] == 2
    assert resumed.progress.num_updates == 9


def test_the_final_state_is_newer_than_that_of_the_last_epoch(tmp_path, capsys):
    """Both have the same position."""
    train(make(tmp_path, save_every_n_epochs=1, save_at_end=True))
    capsys.readouterr()
    train(make(tmp_path), resume_from="latest")
    assert capsys.readouterr().out.splitlines() == ["Resuming from 'final' in epoch 4."]


def test_a_run_resumed_from_an_older_state_supersedes_the_later_states(tmp_path, capsys):
    """The states after it were given up: they must not be resumed from, nor count among those to keep."""
    crash(tmp_path, 8)
    with pytest.raises(LookupError):
        train(make(tmp_path, [stopping_at(5)], max_checkpoints=3), resume_from=tmp_path / "step_3")
    assert names_in(tmp_path) == ["step_4", "step_5", "step_8"]
    train(make(tmp_path), resume_from="latest")
    assert "step_5'" in capsys.readouterr().out


def test_an_interrupted_replacement_is_repaired_before_the_newest_state_is_chosen(tmp_path, capsys):
    crash(tmp_path, 3)
    (tmp_path / "step_3").rename(tmp_path / ".step_3.old")
    (tmp_path / ".step_4.tmp").mkdir()
    train(make(tmp_path), resume_from="latest")
    assert "step_3'" in capsys.readouterr().out
    assert all(not name.startswith(".") for name in names_in(tmp_path))


def test_a_path_object_named_latest_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make(tmp_path / "states")
    train(trainer, num_epochs=1)
    trainer.save_training_state("latest")
    resumed = make_trainer(make_model())
    resumed.optimizer = torch.optim.Adam(resumed.model.parameters(), lr=0.1)
    train(resumed, num_epochs=1, resume_from=Path("latest"))
    assert_same_weights(weights_of(resumed.model), weights_of(trainer.model))


@pytest.mark.parametrize("number", [0, 2])
def test_latest_requires_exactly_one_folder_to_look_in(tmp_path, number):
    callbacks = [SaveTrainingStateCallback(tmp_path / str(index)) for index in range(number)]
    with pytest.raises(ValueError, match=rf"there (is no|are {number}) folders? to look in.*pass the path of a state"):
        train(make_trainer(callbacks=callbacks), resume_from="latest")


def test_two_saving_callbacks_can_share_a_folder(tmp_path, capsys):
    callbacks = [SaveTrainingStateCallback(tmp_path, save_at_end=is_last) for is_last in (False, True)]
    train(make_trainer(callbacks=callbacks), num_epochs=1)
    train(make_trainer(callbacks=callbacks), num_epochs=1, resume_from="latest")
    assert "final" in capsys.readouterr().out


def test_a_state_of_a_newer_format_version_is_an_error_not_skipped(tmp_path):
    crash(tmp_path, 3)
    falsify_manifest(tmp_path / "step_2", lambda manifest: manifest.update(format_version=3))
    with pytest.raises(CheckpointError, match="newer version"):
        train(make(tmp_path), resume_from="latest")


def test_a_newest_state_of_another_number_of_processes_is_an_error_not_skipped(tmp_path):
    """Resuming from an older one would not help, and would hide the mistake."""
    crash(tmp_path, 3)
    state = tmp_path / "step_3"
    shutil.copy(state / "process_0.pt", state / "process_1.pt")
    rewrite_manifest(state, num_processes=2)
    with pytest.raises(CheckpointError, match="saved by a run with num_processes=2"):
        train(make(tmp_path), resume_from="latest")
    train(make(tmp_path), resume_from="latest", allow_other_num_processes=True)


def test_a_newest_state_of_another_model_is_an_error_not_skipped(tmp_path):
    """It is valid, and to resume from an older one would hide the mistake."""
    crash(tmp_path, 3)
    model = torch.nn.Linear(7, 1)
    other = Trainer(
        model,
        torch.nn.functional.mse_loss,
        torch.optim.Adam(model.parameters()),
        callbacks=[SaveTrainingStateCallback(tmp_path)],
    )
    with pytest.raises(CheckpointError, match="different model"):
        train(other, resume_from="latest")


# --- what is kept ------------------------------------------------------------------------------------------------


def test_rotation_counts_the_states_on_disk_across_restarts(tmp_path):
    for num_updates in (3, 5, 7):
        with pytest.raises(LookupError):
            train(make(tmp_path, [stopping_at(num_updates)], max_checkpoints=2), resume_from="latest")
        assert names_in(tmp_path) == [f"step_{num_updates - 1}", f"step_{num_updates}"]
    train(make(tmp_path, max_checkpoints=2), resume_from="latest")
    assert names_in(tmp_path) == ["step_8", "step_9"]


def test_a_run_from_scratch_rotates_out_the_states_of_the_previous_run_one_by_one(tmp_path):
    crash(tmp_path, 8)
    crash(tmp_path, 3, max_checkpoints=4)
    assert names_in(tmp_path) == ["step_1", "step_2", "step_3", "step_8"]


def test_a_failed_save_deletes_no_other_state(tmp_path, monkeypatch):
    crash(tmp_path, 3, max_checkpoints=2)
    monkeypatch.setattr(torch, "save", fail_to_write)
    with pytest.warns(UserWarning, match=r"Training continues without this state\."):
        train(make(tmp_path, max_checkpoints=2, on_save_error="warn"), resume_from="latest")
    assert names_in(tmp_path) == ["step_2", "step_3"]


def test_keep_best_keeps_the_best_states_in_addition_to_the_newest(tmp_path, scripted):
    """In a later run too, which compares its states with those of the earlier one."""
    settings = {"save_every_n_epochs": 1, "max_checkpoints": 1, "keep_best": 2, "save_at_end": False}
    scripted([3, 1, float("nan"), 2, 4], [SaveTrainingStateCallback(tmp_path, **settings)]).run()
    assert names_in(tmp_path) == ["epoch_2", "epoch_4", "epoch_5"]
    scripted([9], [SaveTrainingStateCallback(tmp_path, **settings)]).run()
    assert names_in(tmp_path) == ["epoch_1", "epoch_2", "epoch_4"]


def test_keep_best_keeps_the_greatest_if_greater_is_better(tmp_path, scripted):
    settings = {"save_every_n_epochs": 1, "max_checkpoints": 1, "keep_best": 1, "greater_is_better": True}
    scripted([1, 3, 2, 1], [SaveTrainingStateCallback(tmp_path, **settings)]).run()
    assert names_in(tmp_path) == ["epoch_2", "final"]


def test_keep_best_without_its_metric_is_an_error_at_the_start(tmp_path):
    save = SaveTrainingStateCallback(tmp_path, max_checkpoints=1, keep_best=1)
    with pytest.raises(ValueError, match="eval_loss_epoch"):
        train(make_trainer(callbacks=[save]))


def test_keep_best_without_max_checkpoints_is_rejected():
    with pytest.raises(ValueError, match=r"`keep_best` is 1, but `max_checkpoints` is None.*Pass both"):
        SaveTrainingStateCallback(keep_best=1)


# --- when states are saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "accumulation", "expected"),
    [(1, 1, [1, 2, 3, 4, 5, 6]), (2, 1, [2, 4, 6]), (1, 2, [2, 3, 5, 6]), (3, 2, [5]), (9, 1, [])],
)
def test_states_are_saved_every_n_updates(tmp_path, every, accumulation, expected):
    """With accumulation windows of two batches, updates come after steps 2, 3, 5 and 6."""
    trainer = make(tmp_path, save_every_n_steps=None, save_every_n_updates=every)
    train(trainer, num_epochs=2, gradient_accumulation_steps=accumulation)
    assert names_in(tmp_path) == [f"step_{number}" for number in expected]


def test_a_resumed_run_saves_after_the_same_updates(tmp_path):
    settings = {"save_every_n_steps": None, "save_every_n_updates": 2}
    crash(tmp_path, 5, **settings)
    for path in (tmp_path / "step_2", tmp_path / "step_4"):
        assert read_manifest(path).position.num_updates == int(path.name[-1])
    train(make(tmp_path, **settings), resume_from="latest")
    assert names_in(tmp_path) == ["step_2", "step_4", "step_6", "step_8"]


def test_a_step_that_is_due_for_two_reasons_saves_one_state(tmp_path):
    count = []

    class Counting(Trainer):
        def save_training_state(self, output_dir, checkpoint_kwargs=None):
            count.append(Path(output_dir).name)
            super().save_training_state(output_dir, checkpoint_kwargs)

    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, save_every_n_updates=3, save_at_end=False)
    train(make_trainer(cls=Counting, callbacks=[save]), num_epochs=2)
    assert count == ["step_2", "step_3", "step_4", "step_6"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only on request."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.seconds)
    return clock


class Clock:
    seconds = 1000.0

    def advancing(self, seconds_per_step):
        """A callback that advances the clock in each step."""

        def wait(trainer, **_):
            self.seconds += seconds_per_step

        return Probe(on_train_step_start=wait)


@pytest.mark.parametrize(
    ("seconds_per_step", "settings", "expected"),
    [
        (30, {}, [2, 4, 6, 8]),
        (25, {}, [3, 6, 9]),
        (60, {}, list(range(1, 10))),
        (6, {}, []),
        (40, {"save_every_n_epochs": 1}, [2, 5, 8]),
    ],
)
def test_states_are_saved_every_n_minutes_after_the_last_one(tmp_path, clock, seconds_per_step, settings, expected):
    trainer = make(
        tmp_path, [clock.advancing(seconds_per_step)], save_every_n_steps=None, save_every_n_minutes=1, **settings
    )
    train(trainer)
    assert [name for name in names_in(tmp_path) if name.startswith("step")] == [f"step_{number}" for number in expected]


def test_the_time_between_two_runs_does_not_count_towards_save_every_n_minutes(tmp_path, clock):
    trainer = make(tmp_path, save_every_n_steps=None, save_every_n_minutes=1)
    train(trainer)
    clock.seconds += 1000
    train(trainer)
    assert names_in(tmp_path) == []


def test_a_jump_of_the_wall_clock_saves_no_state(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e12)
    train(make(tmp_path, save_every_n_steps=None, save_every_n_minutes=10))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("minutes", [float("inf"), 1e308, 10**400])
def test_an_interval_longer_than_any_run_saves_only_the_end(tmp_path, minutes):
    """Numbers that floats cannot hold are no error."""
    trainer = train(make(tmp_path, save_every_n_steps=None, save_every_n_minutes=minutes, save_at_end=True))
    assert names_in(tmp_path) == ["final"]
    assert trainer.progress.num_updates == 9


@pytest.mark.parametrize("number", [0, -0.5, float("nan")])
def test_impossible_times_are_rejected(number):
    with pytest.raises(ValueError, match="`save_every_n_minutes` is"):
        SaveTrainingStateCallback(save_every_n_minutes=number)


# --- what goes wrong ---------------------------------------------------------------------------------------------


def fail_to_write(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_failed_save_ends_the_run_with_an_error_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", fail_to_write)
    with pytest.raises(CheckpointError, match=r"step_1' could not be written: .*No space left"):
        train(make(tmp_path))
    assert names_in(tmp_path) == []
    monkeypatch.undo()
    train(make(tmp_path), num_epochs=1)
    assert names_in(tmp_path) == ["step_1", "step_2", "step_3"]


def test_training_continues_after_a_failed_save_if_on_save_error_is_warn(tmp_path, monkeypatch, uninterrupted_run):
    """With a warning for each state that could not be saved, including the final one."""
    trainer = make(tmp_path, save_every_n_steps=4, save_at_end=True, on_save_error="warn")
    monkeypatch.setattr(torch, "save", fail_to_write)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="could not be written") as caught:
        train(trainer)
    assert len(caught) == 3
    for warning, name in zip(caught, ("step_4", "step_8", "final"), strict=True):
        assert f"'{tmp_path / name}' could not be written: [Errno 28] No space left" in str(warning.message)
    assert names_in(tmp_path) == []
    assert_same_weights(weights_of(trainer.model), weights_of(uninterrupted_run.model))


def test_an_unknown_on_save_error_is_rejected():
    with pytest.raises(ValueError, match=r"`on_save_error` is 'ignore'\. Expected 'raise' or 'warn'"):
        SaveTrainingStateCallback(on_save_error="ignore")


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    steps = []
    count = Probe(on_train_step_start=lambda trainer, **_: steps.append(1))
    with pytest.raises(CheckpointError, match=r"cannot be saved in '.*file/states'"):
        train(make(tmp_path / "file" / "states", [count]))
    assert steps == []


TRY_TO_TRAIN = """
import sys
from _support import Probe, make_dataset, make_trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError
folder, resume_from = sys.argv[1], sys.argv[2] == "latest"
steps = []
count = Probe(on_train_step_start=lambda trainer, **_: steps.append(1))
trainer = make_trainer(callbacks=[SaveTrainingStateCallback(folder), count])
try:
    trainer.train(make_dataset(12), 1, resume_from=resume_from)
except CheckpointError as error:
    print(error)
print(len(steps), "steps")
"""


@pytest.mark.skipif(lock_module.fcntl is None, reason="this system cannot lock files")
@pytest.mark.parametrize("resume_from", ["latest", "nothing"])
def test_two_runs_cannot_save_to_one_folder_at_the_same_time(tmp_path, resume_from):
    answers = []

    def ask(trainer, **_):
        answers.append(run_python(TRY_TO_TRAIN, str(tmp_path), resume_from))

    train(make(tmp_path, [Probe(on_train_epoch_start=ask)]), num_epochs=1)
    ask(None)
    assert f"Another run is saving its training states in '{tmp_path}': process {os.getpid()}" in answers[0]
    assert answers[0].endswith("\n0 steps\n")
    assert "Another run" not in answers[1]


@pytest.mark.parametrize("event", ["on_training_run_start", "on_train_step_end", "on_training_run_end"])
def test_the_folder_is_unlocked_however_the_run_ends(tmp_path, event):
    def fail(trainer, **_):
        raise LookupError("mine")

    with pytest.raises(LookupError):
        train(make(tmp_path, [Probe(**{event: fail})]))
    assert lock_module._held == {}


def test_the_folder_is_unlocked_if_the_state_to_resume_is_rejected(tmp_path):
    crash(tmp_path, 2)
    other = make(tmp_path)
    other.model = torch.nn.Sequential(other.model)
    other.optimizer = torch.optim.Adam(other.model.parameters())
    with pytest.raises(CheckpointError, match="a different model"):
        train(other, resume_from="latest")
    assert lock_module._held == {}


def test_the_folder_stays_locked_through_a_nested_evaluation(tmp_path):
    held = []

    def evaluate(trainer, **_):
        trainer.evaluate(make_dataset(4))
        held.append(len(lock_module._held))

    train(make(tmp_path, [Probe(on_train_epoch_end=evaluate)]), num_epochs=1)
    assert held == [1]


def test_the_folder_stays_locked_when_a_nested_evaluation_fails(tmp_path):
    held = []

    def fail(trainer, **_):
        with pytest.raises(LookupError):
            trainer.evaluate(make_dataset(4))
        held.append(len(lock_module._held))

    failing = Probe(on_train_epoch_end=fail, on_evaluation_run_start=raiser(LookupError("of the evaluation")))
    train(make(tmp_path, [failing]), num_epochs=1)
    assert held == [1]
    assert lock_module._held == {}


def test_the_folder_stays_locked_when_another_trainer_of_the_process_fails_to_lock_it(tmp_path):
    held = []

    def train_another(trainer, **_):
        with pytest.raises(CheckpointError, match="another trainer of this process"):
            train(make(tmp_path))
        held.append(len(lock_module._held))

    train(make(tmp_path, [Probe(on_train_epoch_end=train_another)]), num_epochs=1)
    assert held == [1]
    assert lock_module._held == {}


def test_a_run_writes_through_no_link_in_the_folder_of_its_states(tmp_path):
    """Whatever somebody has put there under the names that the library uses."""
    outside, folder = tmp_path / "outside", tmp_path / "states"
    names = ["step_2", ".step_1.tmp", ".epoch_1.tmp", ".step_3.old", ".final.tmp", ".final.old"]
    for name in names:
        (outside / name).mkdir(parents=True)
        (outside / name / "model.pt").write_text("not ours")
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(outside / name)
    before = {path: path.read_text() for path in outside.rglob("*") if path.is_file()}
    train(make(folder, max_checkpoints=2), num_epochs=1)
    assert {path: path.read_text() for path in outside.rglob("*") if path.is_file()} == before
    assert [state.problem for state in list_states(folder)[-2:]] == [None, None]


def test_a_callback_state_of_the_first_format_can_be_loaded(tmp_path):
    """The first format also stored the names of the states."""
    save = SaveTrainingStateCallback(tmp_path)
    save.load_state_dict({"num_steps": 7, "saved": ["step_7"]})
    assert save.state_dict() == {"num_steps": 7}


# --- finished runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"save_every_n_steps": None, "save_every_n_epochs": 1, "save_at_end": False}])
@pytest.mark.parametrize(
    ("num_epochs", "limit", "reason"),
    [
        (2, None, "2 epochs are done"),
        (2, 4, "4 updates are done (`max_num_train_steps`)"),
        (2, 6, "2 epochs are done"),
        (3, 4, "4 updates are done (`max_num_train_steps`)"),
        (1, 1, "1 update is done (`max_num_train_steps`)"),
    ],
)
def test_a_finished_run_that_is_resumed_has_ended_for_the_same_reason(tmp_path, num_epochs, limit, reason, settings):
    """Also where the limit of updates ended it in its last epoch."""
    for resume_from in (None, "latest", "latest"):
        trainer = make(tmp_path, **{"save_at_end": True, **settings})
        train(trainer, num_epochs=num_epochs, max_num_train_steps=limit, resume_from=resume_from)
        assert trainer.stop_reason == reason
        assert trainer.progress.num_updates == (limit or 6)
