"""When something that is done every so often is done, for each unit of its length: evaluation, saving, logging."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from _support import (
    Batches,
    Probe,
    assert_same_weights,
    losses,
    make_dataset,
    make_trainer,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated._recording import cadence
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, StepBasedEvaluationCallback, TrackerCallback
from pytorch_accelerated.tracking import InMemoryRunHistory

DATA = make_dataset(30)  # eight batches, the last of two samples
NUM_BATCHES = 8


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `Saves` locks its folder


class Saves(SaveTrainingStateCallback):
    """Notes after how many batches it saves, in place of saving."""

    def __init__(self, save_every):
        super().__init__(save_every=save_every, save_at_end=False)
        self.at = []

    def _save(self, trainer, name, *, in_background=False):
        self.at.append(trainer.progress.num_batches)
        self._cadence.restart(trainer._loop_run)


MOMENTS = [
    # length, batches that make an update, batches after which it is due within epochs, and at their end too
    ("1 update", 1, [*range(1, 17)], None),
    ("3 updates", 1, [3, 6, 9, 12, 15], None),
    ("3 updates", 3, [8, 16], None),
    ("12 samples", 1, [3, 6, 10, 13, 16], None),
    ("12 samples", 2, [4, 6, 10, 14, 16], None),
    ("1e6 samples", 1, [], None),
    ("0.25 epochs", 1, [2, 4, 6, 10, 12, 14], [2, 4, 6, 8, 10, 12, 14, 16]),
    ("0.1 epochs", 1, [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15], [*range(1, 17)]),
    ("0.3 epochs", 1, [3, 5, 10, 12, 15], None),
    ("0.25 epochs", 3, [3, 6, 11, 14], [3, 6, 8, 11, 14, 16]),
    ("1.5 epochs", 1, [12], None),
]


def run_of_two_epochs(callback, accumulation=1, more=(), data=DATA, **kwargs):
    trainer = make_trainer(callbacks=[callback, *more], seed=3)
    return train(trainer, data, num_epochs=2, gradient_accumulation_steps=accumulation, eval_dataset=DATA, **kwargs)


@pytest.mark.parametrize(("length", "accumulation", "within", "with_ends"), MOMENTS)
def test_each_unit_is_due_after_the_update_that_reaches_it(length, accumulation, within, with_ends, monkeypatch):
    evaluated = []
    monkeypatch.setattr(Trainer, "evaluate_now", lambda self: evaluated.append(self.progress.num_batches))
    saves = Saves(length)
    run_of_two_epochs(StepBasedEvaluationCallback(eval_every=length), accumulation, [saves])
    assert evaluated == within
    assert saves.at == (within if with_ends is None else with_ends)


@pytest.mark.parametrize(("length", "due"), [("1 epoch", [8, 16]), ("2 epochs", [16]), ("3 epochs", [])])
@pytest.mark.parametrize("data", [DATA, Batches(DATA, 4)], ids=["sized", "unsized"])
def test_whole_epochs_are_due_at_their_end(length, due, data):
    run_of_two_epochs(saves := Saves(length), data=data)
    assert saves.at == due


@pytest.mark.parametrize("length", ["1 epoch", "2 epochs"])
def test_a_run_evaluates_after_epochs_anyway(length):
    with pytest.raises(ValueError, match="evaluates at the end of each epoch anyway"):
        StepBasedEvaluationCallback(eval_every=length)


def test_a_part_of_an_epoch_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match=r"every 0\.25 epochs, but .* does not know how many batches"):
        run_of_two_epochs(Saves("0.25 epochs"), data=Batches(DATA, 4))


@pytest.mark.parametrize(("length", "due"), [("3 updates", [3, 6, 9, 12]), ("10 samples", [3, 5, 8, 11])])
def test_other_lengths_need_no_length_of_the_epoch(length, due):
    run_of_two_epochs(saves := Saves(length), data=Batches(DATA, 4))
    assert saves.at[:4] == due


def test_an_epoch_that_ends_early_does_not_delay_what_is_due_in_the_next():
    ending = Probe(
        on_train_step_end=lambda trainer, **kwargs: trainer.progress.num_batches == 3 and trainer.end_epoch()
    )
    run_of_two_epochs(saves := Saves("0.5 epochs"), more=[ending])
    assert saves.at == [3, 3 + 4, 3 + 8]


def test_a_step_that_is_skipped_does_not_lose_an_evaluation_by_steps(monkeypatch):
    evaluated = []
    monkeypatch.setattr(Trainer, "evaluate_now", lambda self: evaluated.append(self.progress.num_batches))
    skipping = Probe(on_train_step_start=lambda trainer, step, **kwargs: step in (2, 3) and trainer.skip_batch())
    run_of_two_epochs(StepBasedEvaluationCallback(3), more=[skipping])
    assert evaluated == [5, 6, 9, 13, 15]


def test_a_time_counts_from_one_save_to_the_next(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cadence, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def go_on(trainer, **kwargs):
        clock.now += 25

    run_of_two_epochs(saves := Saves("1 min"), more=[Probe(on_train_step_start=go_on)])
    assert saves.at == [3, 6, 9, 12, 15]


@pytest.mark.parametrize("length", ["3 updates", "12 samples", "0.25 epochs", "0.3 epochs", "1.5 epochs"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_evaluates_and_saves_at_the_same_moments(length, accumulation, tmp_path):
    def run(folder, **kwargs):
        recorder, moments = recorder_of(lambda trainer: trainer.progress.num_batches, "on_eval_epoch_end")
        evaluating = StepBasedEvaluationCallback(eval_every=length)
        saving = SaveTrainingStateCallback(folder, save_every=length, save_at_end=False)
        return run_of_two_epochs(evaluating, accumulation, [recorder, saving], **kwargs), moments

    whole, moments = run(tmp_path / "whole")
    states = sorted(path.name for path in Path(tmp_path / "whole").iterdir())
    state = min((name for name in states if name.startswith("step")), key=_moment)
    resumed, resumed_moments = run(tmp_path / "resumed", resume_from=tmp_path / "whole" / state)
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
    num_done = _moment(state)
    assert resumed_moments == moments[len(moments) - len(resumed_moments) :]
    resumed_states = {path.name for path in Path(tmp_path / "resumed").iterdir()}
    assert {name for name in states if name not in resumed_states} <= {
        name for name in states if _moment(name) <= num_done
    }
    for name in ("intermediate_eval_loss_epoch", "eval_loss_epoch"):
        assert losses(resumed, name) == losses(whole, name)


def _moment(state):
    kind, _, number = state.partition("_")
    return int(number) * (NUM_BATCHES if kind == "epoch" else 1) if number else 0


# --- values of steps ---------------------------------------------------------------------------------------------


class NoTracker:
    """A tracker that keeps nothing."""

    name, tracker, requires_logging_directory = "none", None, False

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def moments_of_steps(*, record_every=None, log_every=None, accumulation=1, **kwargs):
    """Return after how many batches values of steps were taken, and the run history."""
    recorder, moments = recorder_of(lambda trainer: trainer.progress.num_batches, "on_step_values")
    tracking = [TrackerCallback(NoTracker(), every_n_updates=None, log_every=log_every)] if log_every else []
    trainer = make_trainer(
        callbacks=[*tracking, recorder], seed=3, run_history=InMemoryRunHistory(record_every=record_every)
    )
    train(trainer, DATA, num_epochs=2, gradient_accumulation_steps=accumulation, **kwargs)
    return moments, trainer.run_history


@pytest.mark.parametrize("name", ["record_every", "log_every"])
@pytest.mark.parametrize(("length", "accumulation", "within", "_"), MOMENTS)
def test_values_of_steps_are_taken_at_these_moments_too(name, length, accumulation, within, _):
    moments, history = moments_of_steps(**{name: length}, accumulation=accumulation)
    assert moments == within
    num_recorded = sum("train_loss_step" in row for row in history.to_rows())
    assert num_recorded == (len(within) if name == "record_every" else 0)


def test_values_of_steps_are_taken_for_all_that_want_them():
    assert moments_of_steps(record_every="0.5 epochs", log_every="5 updates")[0] == [4, 5, 10, 12, 15]


def test_values_of_steps_can_be_taken_by_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cadence, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    monkeypatch.setattr(Trainer, "optimizer_step", _taking(clock, Trainer.optimizer_step))
    assert moments_of_steps(record_every="1 min")[0] == [3, 6, 9, 12, 15]


def _taking(clock, step):
    def optimizer_step(trainer):
        clock.now += 25
        step(trainer)

    return optimizer_step


@pytest.mark.parametrize("arguments", [{"record_every": "1 epoch"}, {"log_every": "2 epochs"}])
def test_values_of_whole_epochs_are_recorded_anyway(arguments):
    with pytest.raises(ValueError, match="at the end of each epoch anyway"):
        moments_of_steps(**arguments)
