"""What programs written for 0.1.61 observe of the callbacks that stop a run and save it: section 9."""

from __future__ import annotations

import math
import operator
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import _runs
from _processes import launch, read_results
from _saved import names_in
from _support import Probe, make_dataset, make_trainer, raiser, recorder_of, train
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
)
from pytorch_accelerated.exceptions import CheckpointError, NonFiniteLossError, StopTrainingError
from pytorch_accelerated.states import find_latest_state, list_states


def scripted(*values):
    """A callback that records these scores, one an epoch."""
    left = iter(values)
    return Probe(on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("score", next(left)))


# --- early stopping, the best model ------------------------------------------------------------------------------


def test_early_stopping_shows_its_best_value_and_its_counter():
    """Row 9.1."""
    stop = EarlyStoppingCallback(early_stopping_patience=3, watch_metric="score")
    assert (stop.best_metric, stop.early_stopping_patience_counter, stop.operator) == (None, 0, operator.lt)
    train(make_trainer(callbacks=[scripted(1.0, 0.5, 0.7, 0.6), stop]), num_epochs=4)
    assert (stop.best_metric, stop.early_stopping_patience_counter) == (0.5, 2)


def test_early_stopping_goes_on_from_what_a_program_sets():
    """Row 9.1: value, counter, patience, threshold and direction."""
    stop = EarlyStoppingCallback(early_stopping_patience=3, watch_metric="score", reset_on_train=False)
    stop.best_metric, stop.early_stopping_patience_counter = 0.1, 1
    trainer = train(make_trainer(callbacks=[scripted(1.0, 0.5, 0.7), stop]), num_epochs=3)
    assert (trainer.run_history.current_epoch, stop.early_stopping_patience_counter) == (3, 3)
    stop.early_stopping_patience_counter = 0
    stop.operator = operator.gt
    stop.early_stopping_patience = 2
    stop.early_stopping_threshold = 0.5
    assert stop.greater_is_better is True
    train(make_trainer(callbacks=[scripted(0.7, 1.0, 1.4, 1.5, 1.6), stop]), num_epochs=5)
    assert (stop.best_metric, stop.early_stopping_patience_counter) == (1.4, 2)


def test_a_patience_of_zero_is_refused():
    """Row 9.2: ours."""
    with pytest.raises(ValueError, match="`early_stopping_patience` is 0"):
        EarlyStoppingCallback(early_stopping_patience=0)


def test_the_extras_of_the_best_model_have_one_key_at_each_save(tmp_path):
    """Row 9.3: ours."""
    path = tmp_path / "best.pt"
    for values in ((1.0,), (1.0, 0.5)):
        save = SaveBestModelCallback(path, watch_metric="score")
        train(make_trainer(callbacks=[scripted(*values), save]), num_epochs=len(values))
        saved = torch.load(path)
        assert (saved["score"], saved["epoch"]) == (values[-1], len(values))
        assert "loss" not in saved


def test_the_best_model_shows_its_comparison(tmp_path):
    """Row 9.4: and follows it when it is set."""
    save = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    assert save.operator is operator.lt
    assert SaveBestModelCallback(greater_is_better=True).operator is operator.gt
    save.operator = operator.gt
    train(make_trainer(callbacks=[scripted(1.0, 0.5, 2.0), save]), num_epochs=3)
    assert (save.best_metric, save.best_metric_epoch) == (2.0, 3)


# --- the state of an epoch ---------------------------------------------------------------------------------------


def listing(folder):
    return lambda trainer: names_in(folder)


def test_the_state_of_an_epoch_is_there_before_its_evaluation(tmp_path):
    """Row 9.5."""
    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, save_at_end=False)
    probe, seen = recorder_of(listing(tmp_path), "on_eval_epoch_start")
    train(make_trainer(callbacks=[probe, save]), num_epochs=2, eval_dataset=make_dataset(4))
    assert seen == [["epoch_1"], ["epoch_1", "epoch_2"]]


def test_an_evaluation_that_fails_costs_no_training(tmp_path):
    """Row 9.5: the resumed run starts with the evaluation, and trains no batch of that epoch again."""
    save = partial(SaveTrainingStateCallback, tmp_path, save_every_n_epochs=1, save_at_end=False)
    fail = Probe(on_eval_step_end=raiser(LookupError("crash")))
    with pytest.raises(LookupError):
        train(make_trainer(callbacks=[fail, save()]), num_epochs=2, eval_dataset=make_dataset(4))
    events = []

    def note(name):
        return lambda trainer, **_: events.append((name, trainer.run_history.current_epoch))

    names = ("on_train_epoch_start", "on_train_epoch_end", "on_eval_epoch_start", "on_training_run_epoch_end")
    probe = Probe(**{name: note(name) for name in names})
    trainer = make_trainer(callbacks=[probe, save()])
    train(trainer, num_epochs=2, eval_dataset=make_dataset(4), resume_from="latest")
    assert events == [
        ("on_eval_epoch_start", 1),
        ("on_training_run_epoch_end", 1),
        *((name, 2) for name in names),
    ]
    assert len(trainer.run_history.get_metric_values("train_loss_epoch")) == 2
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2


def test_with_keep_best_the_state_has_the_metrics_of_its_epoch(tmp_path):
    """Row 9.5: it is saved after the evaluation, which decides whether it is kept."""
    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, max_checkpoints=1, keep_best=1, save_at_end=False)
    probe, seen = recorder_of(listing(tmp_path), "on_eval_epoch_start")
    trainer = train(make_trainer(callbacks=[probe, save]), num_epochs=2, eval_dataset=make_dataset(4))
    assert seen == [[], ["epoch_1"]]
    (newest,) = [state for state in list_states(tmp_path) if state.path.name == "epoch_2"]
    assert newest.metrics["eval_loss_epoch"] == trainer.run_history.get_metric_values("eval_loss_epoch")[1]


def test_the_state_of_an_epoch_says_where_training_goes_on(tmp_path):
    """Row 9.5: in the epoch whose evaluation is left; after the evaluation, in the next one."""
    for settings, epoch in (({}, 1), ({"max_checkpoints": 1, "keep_best": 1}, 2)):
        folder = tmp_path / str(epoch)
        save = SaveTrainingStateCallback(folder, save_every_n_epochs=1, save_at_end=False, **settings)
        train(make_trainer(callbacks=[save]), eval_dataset=make_dataset(4))
        assert make_trainer().load_training_state(folder / "epoch_1") == {"current_epoch": epoch, "global_step": 4}


def test_a_signal_in_the_evaluation_saves_no_second_state_of_that_position(tmp_path, capsys):
    """Row 9.5: the state of the epoch is the one to resume from."""
    import signal

    interrupt = Probe(on_eval_epoch_start=lambda trainer, **_: os.kill(os.getpid(), signal.SIGINT))
    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        train(make_trainer(callbacks=[save, interrupt]), eval_dataset=make_dataset(4))
    assert names_in(tmp_path) == ["epoch_1"]
    assert f"To resume: train(..., resume_from='{tmp_path / 'epoch_1'}')" in capsys.readouterr().out


KINDS = {
    "plain": {},
    "background": {"in_background": True},
    "keep_best": {"max_checkpoints": 9, "keep_best": 1},
}
STATES = {"save_every_n_steps": None, "save_every_n_epochs": 1}


def run(folder, settings, **kwargs):
    """A run with an average, early stopping, the best model, and intermediate evaluations."""
    best = SaveBestModelCallback(folder / "best.pt", load_saved_checkpoint=False)
    trainer = _runs.make_trainer(folder, callbacks=[StepBasedEvaluationCallback(4), best], **STATES, **settings)
    return _runs.train(trainer, **kwargs)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "kwargs", [{}, {"gradient_accumulation_steps": 4}, {"max_num_train_steps": 9}, {"num_workers": 1}]
)
def test_a_run_resumed_from_the_state_of_an_epoch_ends_with_the_same_bits(tmp_path, settings, kwargs):
    """Row 9.5: history, weights, average and generators, with intermediate evaluations."""
    expected = run(tmp_path / "whole", settings, **kwargs)
    states = [state.path for state in list_states(tmp_path / "whole")]
    assert len(states) >= 1
    for state in states:
        resumed = run(tmp_path / f"from_{state.name}", settings, **kwargs, resume_from=state)
        assert _runs.differences(expected, resumed) == [], state.name


def early_stopped(folder, settings, order, **kwargs):
    """A run that early stopping ends after three epochs of five, with a callback that tells when."""
    stop = EarlyStoppingCallback(early_stopping_patience=2, watch_metric="score")
    scores = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.1, 5: 0.05}

    def record(trainer, **_):
        trainer.run_history.update_metric("score", scores[trainer.run_history.current_epoch])

    save = SaveTrainingStateCallback(folder, save_every_n_epochs=1, save_at_end=False, **settings)
    callbacks = [Probe(on_eval_epoch_end=record), *((stop, save) if order == "stop first" else (save, stop))]
    trainer = make_trainer(callbacks=callbacks)
    torch.manual_seed(0)
    train(trainer, num_epochs=5, eval_dataset=make_dataset(4), **kwargs)
    history = trainer.run_history
    values = {name: history.get_metric_values(name) for name in sorted(history.get_metric_names())}
    return {"model": trainer.model.state_dict(), "history": values, "epoch": history.current_epoch}


@pytest.mark.parametrize("order", ["stop first", "save first"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_early_stopping_ends_the_resumed_run_where_it_ended_the_whole_one(tmp_path, settings, order):
    """Row 9.5: also from the state of the epoch in which it decided to stop."""
    expected = early_stopped(tmp_path / "whole", settings, order)
    assert expected["epoch"] == 4
    for name in ("epoch_1", "epoch_2", "epoch_3"):
        resumed = early_stopped(tmp_path / name, settings, order, resume_from=tmp_path / "whole" / name)
        assert _runs.differences(expected, resumed) == [], name


def stopped_by(folder, watch_metric, saving, **kwargs):
    """A run that early stopping ends on a metric that is in the history before the decision; its number of epochs."""
    scores = [0.5, 0.4, 0.6, 0.7, 0.8, 0.9]

    def record(trainer, step, **_):
        if step == 0:
            trainer.run_history.update_metric("score", scores[trainer.run_history.current_epoch - 1])

    stop = EarlyStoppingCallback(2, 1e9 if watch_metric == "train_loss_epoch" else 0.0, watch_metric)
    best = SaveBestModelCallback(folder.parent / f"{folder.name}.pt", watch_metric, load_saved_checkpoint=False)
    save = SaveTrainingStateCallback(folder, save_at_end=False, **saving)
    trainer = make_trainer(callbacks=[Probe(on_train_step_end=record), stop, best, save])
    torch.manual_seed(0)
    train(trainer, num_epochs=6, **kwargs)
    return trainer.progress.num_epochs_completed, stop.best_metric, best.best_metric, best.best_metric_epoch


@pytest.mark.parametrize("saving", [{"save_every_n_epochs": 1}, {"save_every_n_steps": 1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("watch_metric", "num_epochs"), [("train_loss_epoch", 3), ("score", 4)])
def test_a_value_that_was_saved_before_the_decision_on_it_still_counts(tmp_path, watch_metric, num_epochs, saving):
    """Row 9.5: a metric of the training epoch is in the state of the epoch, which is saved before the decision."""
    expected = stopped_by(tmp_path / "whole", watch_metric, saving)
    assert expected[0] == num_epochs
    states = [state.path for state in list_states(tmp_path / "whole")]
    assert len(states) >= num_epochs
    for state in states:
        assert stopped_by(tmp_path / state.name, watch_metric, saving, resume_from=state) == expected, state.name


def test_the_best_model_is_not_chosen_by_a_value_of_an_earlier_run(tmp_path):
    """The history is kept, and the metric is measured in the second epoch of the second run only."""
    scores = {1: 0.1, 2: 0.2, 4: 0.3}

    def record(trainer, **_):
        epoch = trainer.run_history.current_epoch
        if epoch in scores:
            trainer.run_history.update_metric("score", scores[epoch])

    best = SaveBestModelCallback(tmp_path / "best.pt", "score", load_saved_checkpoint=False)
    trainer = make_trainer(callbacks=[Probe(on_train_epoch_end=record), best])
    train(trainer, num_epochs=2)
    assert (best.best_metric, best.best_metric_epoch) == (0.1, 1)
    train(trainer, num_epochs=2, reset_run_history=False)
    assert (best.best_metric, best.best_metric_epoch) == (0.3, 4)


@pytest.mark.parametrize("kind", ["early stopping", "best model", "average", "best states"])
def test_a_metric_that_ought_to_grow_is_warned_about_when_the_smallest_is_sought(tmp_path, kind):
    """The default direction is that of a loss."""
    name = "eval_accuracy"
    callback = {
        "early stopping": lambda: EarlyStoppingCallback(watch_metric=name),
        "best model": lambda: SaveBestModelCallback(tmp_path / "best.pt", name),
        "average": lambda: ModelEmaCallback(save_path=tmp_path / "ema.pt", watch_metric=f"ema_model_{name}"),
        "best states": lambda: SaveTrainingStateCallback(
            tmp_path / "states", max_checkpoints=1, keep_best=1, watch_metric=name
        ),
    }[kind]()
    record = Probe(on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric(name, 0.5))
    if kind == "average":
        callback.callback_handler.add_callback(record)
    trainer = make_trainer(callbacks=[record, callback])
    with pytest.warns(UserWarning, match="greater_is_better=True"):
        train(trainer, num_epochs=1, eval_dataset=make_dataset(4))


@pytest.mark.parametrize("event", ["on_train_step_end", "on_train_epoch_end"])
def test_a_state_saved_in_the_event_of_a_stop_does_not_train_on(tmp_path, event):
    """Row 9.5: the state has the request of the callback before it."""

    def stop(trainer, **_):
        if trainer.progress.num_updates == 4:
            raise StopTrainingError("enough")

    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, save_every_n_steps=2, save_at_end=False)
    whole = make_trainer(callbacks=[Probe(**{event: stop}), save])
    train(whole, num_epochs=2, eval_dataset=make_dataset(4))
    resumed = make_trainer()
    name = "step_4" if event == "on_train_step_end" else "epoch_1"
    train(resumed, num_epochs=2, eval_dataset=make_dataset(4), resume_from=tmp_path / name)
    assert resumed.stop_reason == whole.stop_reason == "enough"
    assert resumed.progress.num_updates == 4
    train(resumed, num_epochs=1)
    assert resumed.stop_reason == "1 epoch is done", "the request is gone with its run"


@pytest.fixture(scope="module")
def results_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(Path(__file__).with_name("_epoch_state_cases.py"), folder, num_processes=2)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["plain", "background", "keep_best"])
def test_two_processes_resume_from_the_state_of_an_epoch_with_the_same_bits(results_of_two, kind):
    """Row 9.5: on both ranks; and the folder has the state before the evaluation."""
    for result in read_results(results_of_two, kind, num_processes=2):
        assert result["differences"] == {"epoch_1": [], "epoch_2": [], "epoch_3": []}
        if kind != "background":
            first = 0 if kind == "keep_best" else 1
            assert [len(names) for names in result["seen"]] == [first, first + 1, first + 2]


@pytest.mark.distributed
def test_two_processes_tell_once_that_a_state_was_saved(results_of_two):
    """Row 8.7: on the main process."""
    read_results(results_of_two, "plain", num_processes=2)
    outputs = [(results_of_two / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    assert outputs[0].count("Saved training state to plain_whole/epoch_1\n") == 1
    assert "Saved" not in outputs[1]


# --- which states are kept, what is in the folder ----------------------------------------------------------------


@pytest.mark.parametrize(("max_checkpoints", "kept"), [(1, ["final"]), (2, ["epoch_4", "final"]), (None, None)])
def test_max_checkpoints_counts_the_final_state(tmp_path, max_checkpoints, kept):
    """Row 9.6."""
    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, max_checkpoints=max_checkpoints)
    train(make_trainer(callbacks=[save]), num_epochs=4)
    assert names_in(tmp_path) == (kept or ["epoch_1", "epoch_2", "epoch_3", "epoch_4", "final"])
    assert find_latest_state(tmp_path).name == "final"


def test_the_final_state_of_an_earlier_run_is_superseded_like_the_others(tmp_path):
    """Row 9.6: the newest states stay, in the order in which they were saved."""
    save = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, max_checkpoints=2)
    trainer = train(make_trainer(callbacks=[save]), num_epochs=4)
    probe, seen = recorder_of(listing(tmp_path), "on_eval_epoch_start", "on_training_run_epoch_end")
    trainer.callback_handler.add_callback(probe)
    train(trainer, num_epochs=3)
    assert seen == [["epoch_1", "final"], ["epoch_1", "epoch_2"], ["epoch_2", "epoch_3"]]
    assert names_in(tmp_path) == ["epoch_3", "final"]


def test_the_folder_shows_states_only(tmp_path):
    """Row 9.7: ours; the lock is hidden, and no state."""
    train(make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path)]))
    assert [name for name in names_in(tmp_path) if not name.startswith(".")] == ["final"]
    assert [state.path.name for state in list_states(tmp_path)] == ["final"]


def test_the_number_of_steps_can_be_read(tmp_path):
    """Row 9.8: and goes into each state."""
    save = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3)
    train(make_trainer(callbacks=[save]), num_epochs=2)
    assert save._global_step == 8
    assert make_trainer().load_training_state(tmp_path / "step_6")["global_step"] == 6


# --- a loss that is not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "eval"])
def test_the_end_by_a_bad_loss_can_be_read_from_its_callback(stage):
    """Row 9.9: ours raises `NonFiniteLossError`; `triggered` is readable."""

    class Diverging(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "loss": output["loss"] * math.nan} if stage == "train" else output

        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "loss": torch.tensor(math.nan)}

    callback = TerminateOnNaNCallback()
    assert callback.triggered is False
    with pytest.raises(NonFiniteLossError):
        train(make_trainer(cls=Diverging, callbacks=[callback]), eval_dataset=make_dataset(4))
    assert callback.triggered is True
    assert TerminateOnNaNCallback().triggered is False


def test_a_bad_loss_of_one_batch_triggers_too():
    """Row 9.9."""
    callback = TerminateOnNaNCallback()
    callback.check_for_nan_after_batch({"loss": torch.tensor(1.0)})
    assert callback.triggered is False
    with pytest.raises(NonFiniteLossError):
        callback.check_for_nan_after_batch({"loss": torch.tensor(math.inf)}, step=3)
    assert callback.triggered is True


# --- a stand-in for the trainer ----------------------------------------------------------------------------------


def minimal(calls, **more):
    history = SimpleNamespace(current_epoch=1)
    save = lambda *args, **kwargs: calls.append((args, kwargs))  # noqa: E731
    return SimpleNamespace(run_history=history, save_training_state=save, print=lambda *args: None, **more)


STAND_INS = {
    "minimal": minimal,
    "arbitrary objects": lambda calls: minimal(calls, progress=object(), is_resumed=object(), run_config=object()),
    "mock": lambda calls: MagicMock(
        run_history=SimpleNamespace(current_epoch=1),
        save_training_state=lambda *args, **kwargs: calls.append((args, kwargs)),
    ),
}


def drive(save, stand_in, num_steps=7):
    save.on_training_run_start(stand_in)
    for step in range(num_steps):
        save.on_train_step_end(stand_in, step=step)
    save.on_train_epoch_end(stand_in)
    save.on_training_run_epoch_end(stand_in)
    save.on_stop_training_error(stand_in)
    save.on_training_run_end(stand_in)


@pytest.mark.parametrize("folder_is_made", [True, False])
@pytest.mark.parametrize("max_checkpoints", [None, 1])
@pytest.mark.parametrize("kind", STAND_INS)
def test_a_stand_in_can_drive_the_callback(tmp_path, monkeypatch, kind, max_checkpoints, folder_is_made):
    """Row 9.10: it needs the epoch, `save_training_state` and `print`; the folder is made by `os.makedirs`."""
    if not folder_is_made:
        monkeypatch.setattr("os.makedirs", lambda *args, **kwargs: None)
    calls = []
    folder = tmp_path / "states"
    save = SaveTrainingStateCallback(
        folder, save_every_n_steps=3, save_every_n_epochs=1, max_checkpoints=max_checkpoints
    )
    drive(save, STAND_INS[kind](calls))
    assert calls == [
        ((str(folder / name),), {"checkpoint_kwargs": {"global_step": step}})
        for name, step in (("step_3", 3), ("step_6", 6), ("epoch_1", 7), ("final", 7))
    ]
    assert folder.exists() == folder_is_made


def test_a_stand_in_that_is_gone_does_not_keep_the_folder_locked(tmp_path):
    """Row 9.10: tests of programs drive the callback one after another, without the end of a run. Mocks are cyclic."""
    for _ in range(3):
        stand_in = STAND_INS["mock"]([])
        SaveTrainingStateCallback(tmp_path).on_training_run_start(stand_in)
        del stand_in
    save, stand_in = SaveTrainingStateCallback(tmp_path, save_at_end=False), STAND_INS["mock"]([])
    save.on_training_run_start(stand_in)
    with pytest.raises(CheckpointError, match="another trainer of this process"):
        SaveTrainingStateCallback(tmp_path).on_training_run_start(STAND_INS["mock"]([]))
    save.on_training_run_end(stand_in)


def test_a_stand_in_that_makes_folders_sees_them_rotated(tmp_path):
    """Row 9.10."""
    stand_in = minimal([])
    stand_in.save_training_state = lambda path, checkpoint_kwargs: Path(path).mkdir()
    drive(SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, max_checkpoints=2, save_at_end=False), stand_in)
    assert names_in(tmp_path) == ["step_6", "step_7"]
