"""What a program asks of a run under way: stop, end the epoch, leave out a batch, and limits of time and epochs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from _support import (
    IN_ORDER,
    Batches,
    EventRecorder,
    Probe,
    Stream,
    assert_same_weights,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated._requests import time_limit
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, StopTrainingError, TerminateOnNaNCallback

NUM_BATCHES = 8
DATA = make_dataset(4 * NUM_BATCHES)


def at(batches, request, event="on_train_step_end"):
    """Return a callback that asks for something at some batches, counted from 1 over the whole run."""

    def ask(trainer, **kwargs):
        progress = trainer.progress
        if progress.num_batches + (event != "on_train_step_end") in batches:
            request(trainer)

    return Probe(**{event: ask})


def trainer_that_asks(batches, request, event="on_train_step_end", more=(), **kwargs):
    model = nn.Sequential(make_model(), nn.Dropout(0.0))
    return make_trainer(model, callbacks=[at(batches, request, event), *more], seed=3, **kwargs)


# --- stop --------------------------------------------------------------------------------------------------------


STOPPING_EVENTS = {
    "on_training_run_start": 0,
    "on_train_epoch_start": 1,
    "on_train_step_start": 1,
    "on_backward_start": 1,
    "on_optimizer_step_start": 1,
    "on_train_step_end": 1,
    "on_train_epoch_end": NUM_BATCHES,
    "on_eval_epoch_end": NUM_BATCHES,
    "on_training_run_epoch_end": NUM_BATCHES,
}


@pytest.mark.parametrize("event", STOPPING_EVENTS)
def test_stop_ends_the_run_after_the_step_or_evaluation_under_way(event, capsys):
    recorder = EventRecorder()
    probe = Probe(**{event: lambda trainer, **kwargs: trainer.stop("enough is enough")})
    trainer = train(make_trainer(callbacks=[probe, recorder]), DATA, num_epochs=3, eval_dataset=DATA)
    num_batches = STOPPING_EVENTS[event]
    assert trainer.stop_reason == "enough is enough"
    assert "Stopping: enough is enough" in capsys.readouterr().out
    assert trainer.progress.num_updates == num_batches
    assert recorder.log.count("on_train_step_end") == num_batches
    assert recorder.log[-2:] == ["on_stop_training_error", "on_training_run_end"]


@pytest.mark.parametrize("hook", ["calculate_train_batch_loss", "optimizer_step", "train_epoch_end", "eval_epoch_end"])
def test_hooks_may_stop_too_and_finish_what_they_do(hook):
    class Stopping(Trainer):
        pass

    def stopping(self, *args):
        self.stop()
        return getattr(Trainer, hook)(self, *args)

    setattr(Stopping, hook, stopping)
    trainer = train(make_trainer(cls=Stopping), DATA, num_epochs=3, eval_dataset=DATA)
    assert trainer.stop_reason == "`stop` was called"
    assert trainer.progress.num_updates == (NUM_BATCHES if hook.endswith("end") else 1)
    assert len(losses(trainer)) == 1


def test_a_stopped_run_that_is_resumed_stops_at_once_even_if_saved_in_the_event_of_the_request(tmp_path):
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, save_at_end=False)
    trainer = train(trainer_that_asks([5], lambda trainer: trainer.stop("enough"), more=[saving]), DATA, num_epochs=2)
    resumed = trainer_that_asks([], None)
    train(resumed, DATA, num_epochs=2, resume_from=tmp_path / "step_5")
    assert resumed.stop_reason == trainer.stop_reason == "enough"
    assert_same_weights(weights_of(resumed.model), weights_of(trainer.model))


@pytest.mark.parametrize("hook", ["create_train_dataloader", "create_eval_dataloader", "create_scheduler"])
def test_a_stop_before_the_first_event_ends_the_run_there(hook):
    trainer = make_trainer()
    create = getattr(trainer, hook)

    def stop_and_create(*args, **kwargs):
        trainer.stop("too little data")
        return create(*args, **kwargs)

    setattr(trainer, hook, stop_and_create)
    train(trainer, DATA, num_epochs=2, eval_dataset=DATA)
    assert trainer.stop_reason == "too little data"
    assert trainer.progress.num_updates == 0


def test_the_next_run_knows_nothing_of_the_stop():
    trainer = train(trainer_that_asks([2], lambda trainer: trainer.stop()), DATA)
    trainer.callback_handler.clear_callbacks()
    train(trainer, DATA)
    assert trainer.stop_reason == "1 epoch is done"


# --- end the epoch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_train_step_start", "on_backward_start", "on_train_step_end"])
@pytest.mark.parametrize(("accumulation", "num_done"), [(1, 3), (2, 4), (4, 4), (3, 3)])
def test_an_epoch_ends_once_what_was_trained_has_entered_an_update(event, accumulation, num_done, capsys):
    trainer = trainer_that_asks([3], lambda trainer: trainer.end_epoch("seen enough"), event)
    train(trainer, DATA, num_epochs=2, gradient_accumulation_steps=accumulation, eval_dataset=DATA)
    progress = trainer.progress
    assert progress.num_epochs_completed == 2
    assert progress.num_batches == num_done + NUM_BATCHES
    assert progress.num_samples == 4 * progress.num_batches
    assert losses(trainer, "train_num_batches") == [num_done]
    assert len(losses(trainer)) == len(losses(trainer, "eval_loss_epoch")) == 2
    assert trainer.stop_reason == "2 epochs are done"
    assert f"Epoch 1 ends after {num_done} batches per process: seen enough\n" in capsys.readouterr().out


def test_an_epoch_that_ends_early_trains_as_one_on_fewer_batches():
    trainer = trainer_that_asks([6], Trainer.end_epoch)
    train(trainer, DATA, train_dataloader_kwargs=IN_ORDER)
    expected = train(trainer_that_asks([], None), _first(DATA, 24), train_dataloader_kwargs=IN_ORDER)
    assert_same_weights(weights_of(trainer.model), weights_of(expected.model))
    assert losses(trainer) == losses(expected)


def _first(dataset, num_samples):
    return torch.utils.data.TensorDataset(*dataset[:num_samples])


@pytest.mark.parametrize("make_data", [Stream, lambda data: Batches(data, 4)])
def test_epochs_of_unknown_length_end_early_too(make_data):
    trainer = trainer_that_asks([3, 4], Trainer.end_epoch)
    train(trainer, make_data(DATA), num_epochs=3)
    assert trainer.progress.num_batches == 3 + 1 + NUM_BATCHES


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_epoch_after_an_early_end_has_the_order_it_always_has(num_workers):
    seen = []

    class Seeing(Trainer):
        def calculate_train_batch_loss(self, batch):
            seen[-1].append(batch[0])
            return super().calculate_train_batch_loss(batch)

    for batches in ([2], []):
        seen.append([])
        trainer = trainer_that_asks(batches, Trainer.end_epoch, cls=Seeing)
        train(trainer, DATA, num_epochs=2, train_dataloader_kwargs={"num_workers": num_workers})
    assert all(map(torch.equal, seen[0][2:], seen[1][NUM_BATCHES:]))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_end_of_an_epoch_is_the_same_after_a_resume(accumulation, tmp_path):
    """Also if the state was saved between the request and its effect."""

    def run(*callbacks, **kwargs):
        trainer = trainer_that_asks([2], lambda trainer: trainer.end_epoch("soon"), more=callbacks)
        arguments = {"gradient_accumulation_steps": accumulation, "eval_dataset": DATA, "num_epochs": 2}
        return train(trainer, DATA, **arguments, **kwargs)

    whole = run(SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, save_at_end=False))
    for saved_at in range(1, 6):
        resumed = run(resume_from=tmp_path / f"step_{saved_at}")
        assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
        assert resumed.progress == whole.progress
        for name in ("train_loss_epoch", "train_num_batches", "eval_loss_epoch"):
            assert losses(resumed, name) == losses(whole, name)


def test_schedules_keep_their_length():
    trainer = trainer_that_asks([2], Trainer.end_epoch)
    train(trainer, DATA, num_epochs=2)
    assert trainer.run_config.max_num_train_steps == 2 * NUM_BATCHES


def test_a_stop_precedes_the_end_of_the_epoch():
    def both(trainer):
        trainer.end_epoch()
        trainer.stop("over")

    trainer = train(trainer_that_asks([2], both), DATA, num_epochs=2)
    assert trainer.stop_reason == "over"
    assert trainer.progress.num_epochs_completed == 1


# --- leave out a batch -------------------------------------------------------------------------------------------


def expected_weights(kept_windows):
    """Train by hand on the samples of each update."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for batches in kept_windows:
        if batches:
            inputs, targets = (
                torch.cat(parts) for parts in zip(*(DATA[4 * b : 4 * b + 4] for b in batches), strict=True)
            )
            mse(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def skipping(skipped, event="on_train_step_start", more=(), cls=Trainer):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    probe = at([index + 1 for index in skipped], lambda trainer: trainer.skip_batch(), event)
    return cls(model, mse, optimizer, callbacks=[probe, *more])


SKIPPED = [[0], [0, 1], [7], [4, 5, 6, 7], [0, 3, 5]]


@pytest.mark.parametrize("event", ["on_train_step_start", "on_backward_start"])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("skipped", SKIPPED, ids=str)
def test_a_skipped_batch_has_no_part_in_its_update(event, accumulation, skipped):
    counter, steps = recorder_of(lambda trainer: trainer.progress.num_batches, "on_train_step_end")
    trainer = skipping(skipped, event, more=[counter, TerminateOnNaNCallback()])
    rates = lambda optimizer: StepLR(optimizer, 1, gamma=1.0)  # noqa: E731 - counts its steps
    train(
        trainer,
        DATA,
        gradient_accumulation_steps=accumulation,
        train_dataloader_kwargs=IN_ORDER,
        create_scheduler_fn=rates,
    )
    windows = [range(start, min(start + accumulation, NUM_BATCHES)) for start in range(0, NUM_BATCHES, accumulation)]
    kept = [[batch for batch in window if batch not in skipped] for window in windows]
    torch.testing.assert_close(trainer.model.state_dict(), expected_weights(kept))
    progress, num_kept = trainer.progress, NUM_BATCHES - len(skipped)
    num_updates = sum(map(bool, kept))
    assert (progress.num_updates, progress.num_samples, progress.num_batches) == (
        num_updates,
        4 * num_kept,
        NUM_BATCHES,
    )
    assert trainer.scheduler.last_epoch == num_updates
    assert steps == [batch + 1 for window in kept for batch in window]
    assert losses(trainer, "train_num_skipped_batches") == [len(skipped)]


def test_a_batch_whose_loss_is_bad_can_be_skipped_in_the_hook():
    class Careful(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            if not torch.isfinite(output["loss"]):
                self.skip_batch()
            return output

    data = torch.utils.data.TensorDataset(*(tensor.clone() for tensor in DATA.tensors))
    data.tensors[0][9] = float("nan")
    trainer = skipping([], cls=Careful, more=[TerminateOnNaNCallback()])
    train(trainer, data, train_dataloader_kwargs=IN_ORDER)
    torch.testing.assert_close(trainer.model.state_dict(), expected_weights([[b] for b in range(8) if b != 2]))


def test_a_hook_that_skips_need_not_return_a_loss():
    class Skipping(Trainer):
        def calculate_train_batch_loss(self, batch):
            self.skip_batch()

    trainer = skipping([], cls=Skipping)
    before = weights_of(trainer.model)
    train(trainer, DATA)
    assert_same_weights(before, weights_of(trainer.model))
    assert trainer.progress.num_updates == 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_skipped_batches_are_the_same_after_a_resume(accumulation, tmp_path):
    def run(*callbacks, **kwargs):
        trainer = skipping([1, 3, 4, 7, 11], more=callbacks)
        return train(trainer, DATA, num_epochs=2, gradient_accumulation_steps=accumulation, **kwargs)

    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, save_at_end=False)
    torch.manual_seed(1)
    whole = run(saving)
    for saved_at in (1, 3, 5, 6):
        resumed = run(resume_from=tmp_path / f"step_{saved_at}")
        assert_same_weights(whole.model.state_dict(), resumed.model.state_dict())
        assert resumed.progress == whole.progress
        assert losses(resumed, "train_num_skipped_batches") == losses(whole, "train_num_skipped_batches") == [4, 1]


# --- misuse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["stop", "end_epoch", "skip_batch"])
def test_outside_a_run_a_request_is_an_error(method):
    trainer = make_trainer()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^`{method}` was called while no training run .*is under way"):
            getattr(trainer, method)()
        train(trainer)


def test_a_prediction_cannot_be_stopped():
    class Stopping(Trainer):
        def calculate_predictions(self, batch):
            self.stop()

    with pytest.raises(RuntimeError, match=r"^`stop` was called while no training run"):
        make_trainer(cls=Stopping).predict(DATA)


def test_an_evaluation_that_is_stopped_evaluates_no_further_dataset():
    trainer = make_trainer(callbacks=[Probe(on_eval_step_end=lambda trainer, **kwargs: trainer.stop("enough"))])
    trainer.evaluate({"a": DATA, "b": DATA})
    assert trainer.run_history.get_metric_names() == {"a_evaluation_loss"}
    assert trainer.stop_reason == "enough"


@pytest.mark.parametrize(
    ("method", "event"),
    [
        ("end_epoch", "on_training_run_start"),
        ("end_epoch", "on_train_epoch_end"),
        ("end_epoch", "on_eval_step_start"),
        ("end_epoch", "on_training_run_epoch_end"),
        ("end_epoch", "on_training_run_end"),
        ("skip_batch", "on_train_epoch_start"),
        ("skip_batch", "on_optimizer_step_start"),
        ("skip_batch", "on_train_step_end"),
        ("skip_batch", "on_train_epoch_end"),
        ("skip_batch", "on_eval_step_start"),
        ("skip_batch", "on_training_run_end"),
    ],
)
def test_a_request_at_the_wrong_moment_is_an_error(method, event):
    trainer = make_trainer(callbacks=[Probe(**{event: lambda trainer, **kwargs: getattr(trainer, method)()})])
    with pytest.raises(RuntimeError, match=rf"^`{method}` was called while no training run .*is under way"):
        train(trainer, num_epochs=2, eval_dataset=DATA)


# --- limits ------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still, except when it is told to go on."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("pytorch_accelerated._recording.loss_monitor.SECONDS_BETWEEN_LOG_POINTS", 0)

    def per(self, event, seconds):
        def go_on(trainer, **kwargs):
            self.now += seconds

        return Probe(**{event: go_on})


@pytest.mark.parametrize(("accumulation", "num_done"), [(1, 5), (2, 6)])
def test_a_run_ends_after_an_update_when_its_time_is_over(accumulation, num_done, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    trainer = make_trainer(callbacks=[clock.per("on_train_step_end", 60)])
    arguments = {"num_epochs": 9, "gradient_accumulation_steps": accumulation, "eval_dataset": DATA}
    train(trainer, DATA, max_time="5 min", **arguments)
    assert trainer.progress.num_batches == num_done
    assert trainer.stop_reason == "5 min are over (`max_time`)"
    assert "Training ends in epoch 1: 5 min are over" in capsys.readouterr().out
    assert len(losses(trainer, "eval_loss_epoch")) == 1
    train(trainer, DATA, max_time="100 min", **{**arguments, "num_epochs": 2})
    assert trainer.stop_reason == "2 epochs are done"


def test_an_evaluation_that_uses_up_the_time_is_the_last(monkeypatch):
    clock = Clock(monkeypatch)
    trainer = make_trainer(callbacks=[clock.per("on_eval_epoch_end", 3600)])
    train(trainer, DATA, num_epochs=9, eval_dataset=DATA, max_time="1.5 h")
    assert trainer.progress.num_epochs_completed == 2
    assert trainer.progress.num_batches == 2 * NUM_BATCHES


def test_neither_time_nor_requests_end_a_run_before_its_smallest_number_of_epochs(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    train(
        trainer := make_trainer(callbacks=[clock.per("on_train_step_end", 60)]),
        DATA,
        num_epochs=9,
        max_time="1 min",
        min_epochs=3,
    )
    assert (trainer.progress.num_epochs_completed, trainer.progress.num_batches) == (3, 3 * NUM_BATCHES)

    def raising(trainer, **kwargs):
        raise StopTrainingError("bored")

    for probe in (
        Probe(on_train_step_end=raising),
        Probe(on_training_run_epoch_end=raising),
        Probe(on_training_run_epoch_end=lambda trainer, **kwargs: trainer.stop("bored")),
    ):
        trainer = train(make_trainer(callbacks=[probe]), DATA, num_epochs=9, min_epochs=3)
        assert trainer.progress.num_epochs_completed == 3 + ("on_train_step_end" in vars(probe))
        assert trainer.stop_reason == "bored"
    assert (
        "Training continues until epoch 3 (`min_epochs`), although a stop was requested: bored"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (3, ValueError), (1.5, TypeError), ("2 epochs", TypeError)]
)
def test_an_impossible_smallest_number_of_epochs_is_an_error(value, error):
    with pytest.raises(error, match="`min_epochs` is"):
        train(make_trainer(), num_epochs=2, min_epochs=value)


@pytest.mark.parametrize(
    ("value", "error"), [("2 epochs", ValueError), ("0 s", ValueError), ("soon", ValueError), (5, TypeError)]
)
def test_an_impossible_time_is_an_error(value, error):
    trainer = make_trainer()
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(error, match="`max_time` is"):
        train(trainer, max_time=value)
    assert_same_weights(before, trainer.model.state_dict())
