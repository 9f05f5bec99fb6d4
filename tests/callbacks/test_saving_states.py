"""The folder of training states over runs: the newest, what is kept, when states are saved, and what goes wrong."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from _saved import names_in, rewrite_manifest
from _support import Probe, assert_same_weights, make_dataset, make_model, make_trainer, run_python, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint import folder as folder_module
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.states import list_states


def train(trainer, num_epochs=3, **kwargs):
    """Three steps per epoch."""
    trainer.train(make_dataset(12), num_epochs, **{"per_device_batch_size": 4, **kwargs})


def make(folder, callbacks=(), **settings):
    """A trainer that saves its states in a folder."""
    save = SaveTrainingStateCallback(folder, **{"save_every_n_steps": 1, "save_at_end": False, **settings})
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=[save, *callbacks])


def stopping_at(num_updates):
    """A callback that ends the run as a crash would."""

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
def whole_run():
    """A run that was never interrupted."""
    model = make_model()
    trainer = Trainer(model, torch.nn.functional.mse_loss, torch.optim.Adam(model.parameters(), lr=0.1), callbacks=())
    torch.manual_seed(0)
    train(trainer)
    return trainer


# --- resume from the newest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume_from", ["latest", True])
def test_the_newest_state_is_resumed_from(tmp_path, capsys, whole_run, resume_from):
    crash(tmp_path, 5)
    resumed = make(tmp_path)
    torch.manual_seed(99)
    train(resumed, resume_from=resume_from)
    assert resumed.is_resumed
    resuming, going_on = capsys.readouterr().out.splitlines()
    assert resuming == f"Resuming from '{tmp_path / 'step_5'}'."
    assert going_on.endswith("The data go on exactly where they were.")
    assert_same_weights(weights_of(resumed.model), weights_of(whole_run.model))


@pytest.mark.parametrize("resume_from", [None, False])
def test_a_run_that_is_not_to_be_resumed_is_not(tmp_path, capsys, resume_from):
    crash(tmp_path, 5)
    trainer = make(tmp_path)
    train(trainer, resume_from=resume_from)
    assert not trainer.is_resumed
    assert capsys.readouterr().out == ""


def test_without_a_state_the_run_starts_afresh(tmp_path, capsys, whole_run):
    trainer = make(tmp_path / "new")
    torch.manual_seed(0)
    train(trainer, resume_from="latest")
    assert not trainer.is_resumed
    printed = capsys.readouterr().out
    assert printed == f"There is no training state to resume from in '{tmp_path / 'new'}': the run starts afresh.\n"
    assert_same_weights(weights_of(trainer.model), weights_of(whole_run.model))


def test_damaged_states_are_passed_over_and_named(tmp_path, capsys, whole_run):
    crash(tmp_path, 5)
    damage(tmp_path / "step_5")
    (tmp_path / "step_3" / "manifest.json").write_text("")
    resumed = make(tmp_path)
    train(resumed, resume_from="latest")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "step_5' is damaged: model.pt is missing or altered" in lines[0]
    assert lines[0].startswith("Passed over: ")
    assert lines[1] == f"Resuming from '{tmp_path / 'step_4'}'."
    assert_same_weights(weights_of(resumed.model), weights_of(whole_run.model))


def test_if_all_states_are_damaged_the_run_starts_afresh_and_says_so(tmp_path, capsys):
    crash(tmp_path, 2)
    for path in tmp_path.iterdir():
        if path.is_dir():
            damage(path)
    trainer = make(tmp_path)
    train(trainer, resume_from=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["Passed over"] * 2
    assert lines[2].endswith("the run starts afresh.")
    assert not trainer.is_resumed


def test_the_newest_is_that_of_the_last_run_and_there_the_farthest(tmp_path):
    """Whatever clocks and names say."""
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


def test_the_end_of_a_run_is_newer_than_its_last_epoch(tmp_path, capsys):
    """Their positions are alike."""
    train(make(tmp_path, save_every_n_epochs=1, save_at_end=True))
    capsys.readouterr()
    train(make(tmp_path), resume_from="latest")
    assert capsys.readouterr().out == f"Resuming from '{tmp_path / 'final'}'.\n"


def test_a_run_that_goes_on_from_an_older_state_is_the_newest_from_then_on(tmp_path, capsys):
    """What came after that state was given up, and must not come back, nor take the places of what is kept."""
    crash(tmp_path, 8)
    with pytest.raises(LookupError):
        train(make(tmp_path, [stopping_at(5)], max_checkpoints=3), resume_from=tmp_path / "step_3")
    assert names_in(tmp_path) == ["step_4", "step_5", "step_8"]
    train(make(tmp_path), resume_from="latest")
    assert "step_5'" in capsys.readouterr().out


def test_a_replacement_that_was_cut_off_is_repaired_first(tmp_path, capsys):
    crash(tmp_path, 3)
    (tmp_path / "step_3").rename(tmp_path / ".step_3.old")
    (tmp_path / ".step_4.tmp").mkdir()
    train(make(tmp_path), resume_from="latest")
    assert "step_3'" in capsys.readouterr().out
    assert all(not name.startswith(".") for name in names_in(tmp_path))


def test_a_directory_of_that_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make(tmp_path / "states")
    train(trainer, num_epochs=1)
    trainer.save_training_state("latest")
    resumed = make_trainer(make_model())
    resumed.optimizer = torch.optim.Adam(resumed.model.parameters(), lr=0.1)
    train(resumed, num_epochs=1, resume_from=Path("latest"))
    assert_same_weights(weights_of(resumed.model), weights_of(trainer.model))


@pytest.mark.parametrize("number", [0, 2])
def test_the_newest_needs_one_folder_to_look_in(tmp_path, number):
    callbacks = [SaveTrainingStateCallback(tmp_path / str(index)) for index in range(number)]
    with pytest.raises(ValueError, match=rf"there are {number} folders where it could be.*pass the path of a state"):
        train(make_trainer(callbacks=callbacks), resume_from="latest")


def test_two_callbacks_may_share_the_folder(tmp_path, capsys):
    callbacks = [SaveTrainingStateCallback(tmp_path, save_at_end=is_last) for is_last in (False, True)]
    train(make_trainer(callbacks=callbacks), num_epochs=1)
    train(make_trainer(callbacks=callbacks), num_epochs=1, resume_from="latest")
    assert "final" in capsys.readouterr().out


def test_a_state_of_a_newer_version_is_not_passed_over(tmp_path):
    crash(tmp_path, 3)
    manifest = tmp_path / "step_2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(CheckpointError, match="newer version"):
        train(make(tmp_path), resume_from="latest")


def test_a_newest_state_that_does_not_fit_is_not_passed_over(tmp_path):
    """To go on from an older one would not help, and hide the mistake."""
    crash(tmp_path, 3)
    state = tmp_path / "step_3"
    shutil.copy(state / "process_0.pt", state / "process_1.pt")
    rewrite_manifest(state, num_processes=2)
    with pytest.raises(CheckpointError, match="saved by 2 processes"):
        train(make(tmp_path), resume_from="latest")
    train(make(tmp_path), resume_from="latest", allow_other_num_processes=True)


# --- what is kept ------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_is_on_the_disk_over_restarts(tmp_path):
    for num_updates in (3, 5, 7):
        with pytest.raises(LookupError):
            train(make(tmp_path, [stopping_at(num_updates)], max_checkpoints=2), resume_from="latest")
        assert names_in(tmp_path) == [f"step_{num_updates - 1}", f"step_{num_updates}"]
    train(make(tmp_path, max_checkpoints=2), resume_from="latest")
    assert names_in(tmp_path) == ["step_8", "step_9"]


def test_a_run_that_starts_afresh_deletes_the_states_of_the_run_before_one_by_one(tmp_path):
    crash(tmp_path, 8)
    crash(tmp_path, 3, max_checkpoints=4)
    assert names_in(tmp_path) == ["step_1", "step_2", "step_3", "step_8"]


def test_a_state_that_could_not_be_saved_costs_no_other(tmp_path, monkeypatch):
    crash(tmp_path, 3, max_checkpoints=2)
    monkeypatch.setattr(torch, "save", fail_to_write)
    with pytest.warns(UserWarning, match=r"The run goes on without it\."):
        train(make(tmp_path, max_checkpoints=2, on_save_error="warn"), resume_from="latest")
    assert names_in(tmp_path) == ["step_2", "step_3"]


def test_the_best_are_kept_beside_the_newest(tmp_path, scripted):
    """In a later run too, whose states are compared with those of the former."""
    settings = {"save_every_n_epochs": 1, "max_checkpoints": 1, "keep_best": 2, "save_at_end": False}
    scripted([3, 1, float("nan"), 2, 4], [SaveTrainingStateCallback(tmp_path, **settings)]).run()
    assert names_in(tmp_path) == ["epoch_2", "epoch_4", "epoch_5"]
    scripted([9], [SaveTrainingStateCallback(tmp_path, **settings)]).run()
    assert names_in(tmp_path) == ["epoch_1", "epoch_2", "epoch_4"]


def test_the_greatest_may_be_the_best(tmp_path, scripted):
    settings = {"save_every_n_epochs": 1, "max_checkpoints": 1, "keep_best": 1, "greater_is_better": True}
    scripted([1, 3, 2, 1], [SaveTrainingStateCallback(tmp_path, **settings)]).run()
    assert names_in(tmp_path) == ["epoch_2", "epoch_4", "final"]


def test_a_metric_that_is_never_recorded_is_noticed_at_the_start(tmp_path):
    save = SaveTrainingStateCallback(tmp_path, max_checkpoints=1, keep_best=1)
    with pytest.raises(ValueError, match="eval_loss_epoch"):
        train(make_trainer(callbacks=[save]))


def test_to_keep_the_best_without_a_limit_is_a_contradiction():
    with pytest.raises(ValueError, match=r"`keep_best` is given without `max_checkpoints`.*Give both"):
        SaveTrainingStateCallback(keep_best=1)


# --- when states are saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "accumulation", "expected"),
    [(1, 1, [1, 2, 3, 4, 5, 6]), (2, 1, [2, 4, 6]), (1, 2, [2, 3, 5, 6]), (3, 2, [5]), (9, 1, [])],
)
def test_states_are_saved_after_every_so_many_updates(tmp_path, every, accumulation, expected):
    """With windows of two batches, updates come after steps 2, 3, 5 and 6."""
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


def test_two_reasons_to_save_make_one_state(tmp_path):
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
    """A clock that only goes when told to."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.seconds)
    return clock


class Clock:
    seconds = 1000.0

    def goes(self, seconds_per_step):
        """A callback that lets so many seconds go by in each step."""

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
def test_states_are_saved_when_so_many_minutes_have_gone_by_since_the_last(
    tmp_path, clock, seconds_per_step, settings, expected
):
    trainer = make(
        tmp_path, [clock.goes(seconds_per_step)], save_every_n_steps=None, save_every_n_minutes=1, **settings
    )
    train(trainer)
    assert [name for name in names_in(tmp_path) if name.startswith("step")] == [f"step_{number}" for number in expected]


def test_the_time_between_two_runs_does_not_count(tmp_path, clock):
    trainer = make(tmp_path, save_every_n_steps=None, save_every_n_minutes=1)
    train(trainer)
    clock.seconds += 1000
    train(trainer)
    assert names_in(tmp_path) == []


def test_the_clock_of_the_wall_may_jump(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e12)
    train(make(tmp_path, save_every_n_steps=None, save_every_n_minutes=10))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("number", [0, -0.5])
def test_impossible_times_are_refused(number):
    with pytest.raises(ValueError, match="`save_every_n_minutes` is"):
        SaveTrainingStateCallback(save_every_n_minutes=number)


# --- what goes wrong ---------------------------------------------------------------------------------------------


def fail_to_write(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_state_that_cannot_be_saved_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", fail_to_write)
    with pytest.raises(CheckpointError, match=r"step_1' could not be written: .*No space left"):
        train(make(tmp_path))
    assert names_in(tmp_path) == []
    monkeypatch.undo()
    train(make(tmp_path), num_epochs=1)
    assert names_in(tmp_path) == ["step_1", "step_2", "step_3"]


def test_training_goes_on_if_that_is_wanted(tmp_path, monkeypatch, whole_run):
    """With a warning for each state that could not be saved, that of the end included."""
    trainer = make(tmp_path, save_every_n_steps=4, save_at_end=True, on_save_error="warn")
    monkeypatch.setattr(torch, "save", fail_to_write)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="could not be written") as caught:
        train(trainer)
    assert len(caught) == 3
    for warning, name in zip(caught, ("step_4", "step_8", "final"), strict=True):
        assert f"'{tmp_path / name}' could not be written: [Errno 28] No space left" in str(warning.message)
    assert names_in(tmp_path) == []
    assert_same_weights(weights_of(trainer.model), weights_of(whole_run.model))


def test_there_are_two_ways_to_take_a_failure():
    with pytest.raises(ValueError, match=r"`on_save_error` is 'ignore'\. Expected 'raise' or 'warn'"):
        SaveTrainingStateCallback(on_save_error="ignore")


def test_a_folder_that_cannot_be_used_is_refused_before_the_first_step(tmp_path):
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


@pytest.mark.skipif(folder_module.fcntl is None, reason="this system has no record locks")
@pytest.mark.parametrize("resume_from", ["latest", "nothing"])
def test_two_runs_cannot_save_in_one_folder(tmp_path, resume_from):
    answers = []

    def ask(trainer, **_):
        answers.append(run_python(TRY_TO_TRAIN, str(tmp_path), resume_from))

    train(make(tmp_path, [Probe(on_train_epoch_start=ask)]), num_epochs=1)
    ask(None)
    assert f"Another run saves its training states in '{tmp_path}': process {os.getpid()}" in answers[0]
    assert answers[0].endswith("\n0 steps\n")
    assert "Another run" not in answers[1]


@pytest.mark.parametrize("event", ["on_training_run_start", "on_train_step_end", "on_training_run_end"])
def test_the_folder_is_given_back_however_the_run_ends(tmp_path, event):
    def fail(trainer, **_):
        raise LookupError("mine")

    with pytest.raises(LookupError):
        train(make(tmp_path, [Probe(**{event: fail})]))
    assert folder_module._held_locks == {}


def test_the_folder_is_given_back_if_the_state_is_refused(tmp_path):
    crash(tmp_path, 2)
    other = make(tmp_path)
    other.model = torch.nn.Sequential(other.model)
    other.optimizer = torch.optim.Adam(other.model.parameters())
    with pytest.raises(CheckpointError, match="another model"):
        train(other, resume_from="latest")
    assert folder_module._held_locks == {}


def test_the_folder_is_kept_through_an_evaluation_within_the_run(tmp_path):
    held = []

    def evaluate(trainer, **_):
        trainer.evaluate(make_dataset(4))
        held.append(len(folder_module._held_locks))

    train(make(tmp_path, [Probe(on_train_epoch_end=evaluate)]), num_epochs=1)
    assert held == [1]


def test_a_state_of_a_callback_of_today_without_what_it_remembered_before(tmp_path):
    """The first format kept the names of the states."""
    save = SaveTrainingStateCallback(tmp_path)
    save.load_state_dict({"num_steps": 7, "saved": ["step_7"]})
    assert save.state_dict() == {"num_steps": 7}
