"""Optimizers with a training and an evaluation mode follow the loop, whatever happens in a run."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from _optimizing import Averaging
from _support import IN_ORDER, EventRecorder, Probe, assert_same_weights, losses, make_dataset, mse, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, StopTrainingError
from pytorch_accelerated.exceptions import CheckpointError

DATASET = make_dataset(16)
TRAINING_EVENTS = {
    "on_train_epoch_start",
    "on_train_step_start",
    "on_backward_start",
    "on_optimizer_step_start",
    "on_optimizer_step_end",
    "on_train_step_end",
}


@pytest.fixture(params=[True, False], ids=["mode in its state", "mode not in its state"])
def make(request):
    """Creates a trainer of an optimizer with modes."""

    def create(callbacks=(), cls=Trainer, **kwargs):
        torch.manual_seed(3)
        model = nn.Linear(3, 1)
        optimizer = Averaging(model.parameters(), lr=0.1, is_mode_saved=request.param)
        return cls(model, mse, optimizer, callbacks=callbacks, **kwargs)

    return create


def inner(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def is_training(trainer):
    return inner(trainer).is_training


run = lambda trainer, **kwargs: train(trainer, DATASET, train_dataloader_kwargs=IN_ORDER, **kwargs)  # noqa: E731


def test_the_optimizer_is_in_training_mode_from_the_start_of_an_epoch_to_its_last_step(make):
    recorder = EventRecorder()
    modes = []
    for event in TRAINING_EVENTS | {
        "on_train_epoch_end",
        "on_eval_epoch_start",
        "on_eval_step_end",
        "on_eval_epoch_end",
    }:
        recorder.reactions[event] = lambda trainer, event=event, **_: modes.append((event, is_training(trainer)))
    recorder.reactions["on_training_run_end"] = lambda trainer, **_: modes.append(("end", is_training(trainer)))
    run(make([recorder]), num_epochs=2, eval_dataset=DATASET)
    assert {event for event, _ in modes} >= TRAINING_EVENTS
    assert [(event, mode) for event, mode in modes if mode != (event in TRAINING_EVENTS)] == []


@pytest.mark.parametrize(
    "interrupt",
    [
        lambda trainer, **_: trainer.evaluate_now(),
        lambda trainer, **_: trainer.evaluate(DATASET),
        lambda trainer, **_: trainer.predict(DATASET),
    ],
    ids=["intermediate evaluation", "nested evaluation", "predictions"],
)
def test_what_is_evaluated_in_the_middle_of_an_epoch_has_the_weights_to_use_and_training_goes_on(make, interrupt):
    modes = []

    class Noting(Trainer):
        def calculate_eval_batch_loss(self, batch):
            modes.append(is_training(self))
            return super().calculate_eval_batch_loss(batch)

        def calculate_predictions(self, batch):
            modes.append(is_training(self))
            return super().calculate_predictions(batch)

    undisturbed = run(make(), eval_dataset=DATASET)
    trainer = run(make([Probe(on_train_step_end=interrupt)], cls=Noting), eval_dataset=DATASET)
    assert set(modes) == {False}
    assert_same_weights(weights_of(undisturbed.model), weights_of(trainer.model))


def evaluate_at_3(trainer, step, **_):
    """Evaluate after the third step of an epoch."""
    if step == 2:
        trainer.evaluate_now()


def test_an_evaluation_in_an_epoch_sees_what_a_run_that_ends_there_evaluates(make):
    trainer = run(make([Probe(on_train_step_end=evaluate_at_3)]), eval_dataset=DATASET)
    short = run(make(), eval_dataset=DATASET, max_num_train_steps=3)
    assert losses(trainer, "intermediate_eval_loss_epoch") == losses(short, "eval_loss_epoch")


def test_a_checkpoint_has_the_weights_to_use_and_training_goes_on(make, tmp_path):
    def save(trainer, step, **_):
        trainer.save_checkpoint(tmp_path / f"{step}.pt")

    undisturbed = run(make())
    trainer = run(make([Probe(on_train_step_end=save)]))
    assert_same_weights(weights_of(undisturbed.model), weights_of(trainer.model))
    for step in range(4):
        saved = torch.load(tmp_path / f"{step}.pt")["model_state_dict"]
        short = run(make(), max_num_train_steps=step + 1)
        assert_same_weights(weights_of(short.model), saved)


@pytest.mark.parametrize("is_in_run", [False, True])
def test_a_checkpoint_is_loaded_between_runs_and_within_them(make, tmp_path, is_in_run):
    """After it, the next step starts where the saved run would have gone on, as far as rounding goes."""
    first = run(make())
    first.save_checkpoint(tmp_path / "a.pt")
    run(first)

    def load(trainer, **_):
        trainer.load_checkpoint(tmp_path / "a.pt")

    if is_in_run:
        second = make([Probe(on_train_epoch_start=load)])
    else:
        second = make()
        load(second)
        assert_same_weights(torch.load(tmp_path / "a.pt")["model_state_dict"], weights_of(second.model))
    run(second)
    for name, value in weights_of(first.model).items():
        torch.testing.assert_close(weights_of(second.model)[name], value, rtol=1e-5, atol=1e-6)
    assert not is_training(second)


def test_weights_that_are_loaded_in_an_evaluation_within_an_epoch_are_kept(make, tmp_path):
    first = run(make())
    first.save_checkpoint(tmp_path / "a.pt")

    def evaluate_at_the_end(trainer, step, **_):
        if step == 3:
            trainer.evaluate_now()

    def load(trainer, is_intermediate, **_):
        if is_intermediate:
            trainer.load_checkpoint(tmp_path / "a.pt")

    second = make([Probe(on_train_step_end=evaluate_at_the_end), Probe(on_eval_epoch_end=load)])
    run(second, num_epochs=1, eval_dataset=DATASET, max_num_train_steps=4)
    for name, value in weights_of(first.model).items():
        torch.testing.assert_close(weights_of(second.model)[name], value, rtol=1e-5, atol=1e-6)


def raises(error):
    def fail(trainer, step, **_):
        if step == 2:
            raise error

    return Probe(on_train_step_end=fail)


@pytest.mark.parametrize("error", [StopTrainingError("enough"), LookupError("broken"), KeyboardInterrupt()])
def test_however_a_run_ends_the_model_has_the_weights_to_use(make, error):
    trainer = make([raises(error)])
    with contextlib.suppress(LookupError, KeyboardInterrupt):
        run(trainer)
    assert not is_training(trainer)
    assert_same_weights(weights_of(run(make(), max_num_train_steps=3).model), weights_of(trainer.model))


@pytest.mark.parametrize("event", ["on_train_step_end", "on_eval_step_end", "on_eval_epoch_end", "on_train_epoch_end"])
def test_a_state_saved_anywhere_resumes_exactly(make, tmp_path, event):
    """In an evaluation in the middle of an epoch, the state has the weights to train with, too."""

    saved = []

    def save(trainer, **_):
        if trainer.progress.num_updates in (3, 7) and trainer.progress.num_updates not in saved:
            saved.append(trainer.progress.num_updates)
            trainer.save_training_state(tmp_path / f"{trainer.progress.num_updates}")

    whole = run(make([Probe(on_train_step_end=evaluate_at_3)]), num_epochs=2, eval_dataset=DATASET)
    probes = [Probe(on_train_step_end=evaluate_at_3), Probe(**{event: save})]
    if event == "on_train_step_end":
        probes.reverse()
    saving = run(make(probes), num_epochs=2, eval_dataset=DATASET)
    assert_same_weights(weights_of(whole.model), weights_of(saving.model))
    for state in saved:
        resumed = make([Probe(on_train_step_end=evaluate_at_3)])
        run(resumed, num_epochs=2, eval_dataset=DATASET, resume_from=tmp_path / f"{state}")
        assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
        assert losses(whole, "eval_loss_epoch") == losses(resumed, "eval_loss_epoch")


def test_a_state_that_is_loaded_between_runs_leaves_the_weights_to_use(make, tmp_path):
    run(make([SaveTrainingStateCallback(tmp_path, save_every_n_steps=3, save_at_end=False)]))
    trainer = make()
    trainer.load_training_state(tmp_path / "step_3")
    assert not is_training(trainer)
    assert_same_weights(weights_of(run(make(), max_num_train_steps=3).model), weights_of(trainer.model))


def test_a_state_that_is_refused_changes_neither_mode_nor_weights(make, tmp_path):
    run(make([SaveTrainingStateCallback(tmp_path, save_every_n_steps=3, save_at_end=False)]))
    trainer = make()
    trainer.model.register_buffer("more", torch.zeros(1))
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match="more"):
        trainer.load_training_state(tmp_path / "step_3")
    assert not is_training(trainer)
    assert_same_weights(before, weights_of(trainer.model))


def test_a_subclass_that_switches_by_itself_does_no_harm(make):
    class Switching(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            inner(self).train()

        def eval_epoch_start(self):
            super().eval_epoch_start()
            inner(self).eval()

    runs = [run(make(cls=kind), num_epochs=2, eval_dataset=DATASET) for kind in (Trainer, Switching)]
    assert_same_weights(*(weights_of(each.model) for each in runs))
    assert losses(runs[0], "eval_loss_epoch") == losses(runs[1], "eval_loss_epoch")


def test_an_epoch_of_a_subclass_is_in_training_mode_too(make):
    class Own(Trainer):
        def _run_train_epoch(self, train_dl):
            for step, batch in enumerate(train_dl):
                self._perform_forward_and_backward_passes(batch, step)
                self.optimizer_step()
                self.optimizer_zero_grad()

    trainer = run(make(cls=Own), num_epochs=2, eval_dataset=DATASET)
    assert_same_weights(weights_of(run(make(), num_epochs=2).model), weights_of(trainer.model))


def test_the_modes_of_several_optimizers_follow_the_loop():
    model = nn.Linear(3, 1)
    optimizers = [Averaging([model.weight]), torch.optim.SGD([model.bias], lr=0.1)]
    trainer = Trainer(model, mse, optimizers, callbacks=[Probe(on_train_step_end=lambda it, **_: it.evaluate_now())])
    run(trainer, eval_dataset=DATASET)
    assert not optimizers[0].is_training
