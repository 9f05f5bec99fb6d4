"""Checkpoints and training states: what they hold, what loading restores, and resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from _support import (
    Batches,
    EventRecorder,
    Probe,
    Samples,
    assert_same_weights,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    raiser,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.exceptions import CheckpointError, StopTrainingError
from pytorch_accelerated.schedulers import CosineLrScheduler


def momentum_trainer(seed=2):
    """Create a trainer whose optimizer has a state."""
    model = make_model(seed=seed)
    return Trainer(model, mse, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), callbacks=())


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_model_optimizer_scheduler_and_the_users_entries(tmp_path):
    path = tmp_path / "new" / "folder" / "model.pt"
    trainer = momentum_trainer()
    train(trainer, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    trainer.save_checkpoint(path, checkpoint_kwargs={"accuracy": np.float64(0.5), "epoch": 3, "names": ["a"]})
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "accuracy",
        "epoch",
        "names",
    }
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]

    other = momentum_trainer(seed=5)
    loaded = other.load_checkpoint(path)
    assert set(loaded) == set(checkpoint)
    assert (loaded["accuracy"], loaded["epoch"], loaded["names"]) == (0.5, 3, ["a"])
    assert_same_weights(weights_of(trainer.model), weights_of(other.model))
    assert other.optimizer.state_dict()["state"].keys() == {0, 1}
    rates = []
    other.callback_handler.add_callback(
        Probe(on_training_run_start=lambda trainer, **k: rates.append(trainer.scheduler.last_epoch))
    )
    train(other, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert rates == [4]  # the loaded state was kept until the scheduler was created
    train(other, create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert rates == [4, 0]


def test_optimizer_and_scheduler_can_be_left_out_of_saving_and_loading(tmp_path):
    trainer = momentum_trainer()
    trainer.save_checkpoint(tmp_path / "before.pt", save_optimizer=False, save_scheduler=False, save_per_node=False)
    assert set(torch.load(tmp_path / "before.pt", weights_only=True)) == {"model_state_dict"}
    train(trainer)
    trainer.save_checkpoint(tmp_path / "after.pt")
    other = momentum_trainer(seed=5)
    other.load_checkpoint(str(tmp_path / "after.pt"), load_optimizer=False, load_scheduler=False)
    assert other.optimizer.state_dict()["state"] == {}
    assert_same_weights(weights_of(trainer.model), weights_of(other.model))


def test_a_checkpoint_can_be_saved_and_loaded_during_a_run(tmp_path):
    path = tmp_path / "model.pt"
    model = make_model()
    initial = weights_of(model)

    def load(trainer, **kwargs):
        trainer.load_checkpoint(path, load_optimizer=False)

    probe = Probe(
        on_training_run_start=lambda trainer, **kwargs: trainer.save_checkpoint(path),
        on_train_epoch_end=load,
    )
    trainer = make_trainer(model, callbacks=[probe])
    train(trainer, create_scheduler_fn=CosineLrScheduler.create_scheduler_fn())
    assert_same_weights(initial, weights_of(model))
    assert trainer.scheduler.num_updates == 0


def test_the_checkpoint_of_a_compiled_model_has_the_parameter_names_of_the_plain_model(tmp_path):
    path = tmp_path / "model.pt"
    compiled = torch.compile(make_model(), backend="eager")
    make_trainer(compiled).save_checkpoint(path)
    assert set(torch.load(path, weights_only=True)["model_state_dict"]) == {"weight", "bias"}
    plain = make_trainer(make_model(seed=8))
    plain.load_checkpoint(path)
    assert_same_weights(weights_of(make_model()), weights_of(plain.model))
    other = torch.compile(make_model(seed=8), backend="eager")
    make_trainer(other).load_checkpoint(path)
    assert torch.equal(other.weight, plain.model.weight)


def test_the_path_of_a_missing_checkpoint_is_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file '.*nowhere.pt'.*`save_checkpoint`"):
        make_trainer().load_checkpoint(tmp_path / "nowhere.pt")


def test_the_checkpoint_of_another_model_is_refused_and_nothing_is_changed(tmp_path):
    path = tmp_path / "model.pt"
    make_trainer(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))).save_checkpoint(path)
    model = nn.ModuleDict({"0": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
    before = weights_of(model)
    with pytest.raises(CheckpointError) as caught:
        make_trainer(model).load_checkpoint(path)
    message = str(caught.value)
    assert "belongs to a different model" in message
    assert "missing from it: head.bias, head.weight" in message
    assert "unexpected in it: 1.bias, 1.weight" in message
    assert "0.weight (1, 3) instead of (2, 3)" in message
    assert_same_weights(before, weights_of(model))


# --- training states ---------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_weights_and_the_history_of_an_uninterrupted_run(tmp_path):
    """Resumed mid-epoch and between epochs."""
    dataset = Samples(make_dataset(18))
    kwargs = {"num_epochs": 3, "gradient_accumulation_steps": 2, "eval_dataset": make_dataset(8)}
    kwargs["create_scheduler_fn"] = CosineLrScheduler.create_scheduler_fn()
    kwargs["train_dataloader_kwargs"] = {"num_workers": 0}

    def dropout_trainer(callbacks=()):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        return Trainer(model, mse, torch.optim.Adam(model.parameters(), lr=0.01), callbacks=callbacks)

    def save(trainer, **_):
        path = tmp_path / f"update_{trainer.progress.num_updates}"
        if trainer.progress.num_updates in (3, 5, 7) and not path.exists():
            trainer.save_training_state(path, {"note": "mine"})

    uninterrupted = dropout_trainer([Probe(on_train_step_end=save)])
    train(uninterrupted, dataset, **kwargs)
    for number, epoch in ((3, 1), (5, 2), (7, 3)):
        resumed = dropout_trainer()
        torch.manual_seed(99)
        train(resumed, dataset, resume_from=tmp_path / f"update_{number}", **kwargs)
        assert_same_weights(weights_of(uninterrupted.model), weights_of(resumed.model))
        assert losses(resumed) == losses(uninterrupted)
        assert losses(resumed, "eval_loss_epoch") == losses(uninterrupted, "eval_loss_epoch")
        assert resumed.is_resumed
        assert resumed.progress.num_updates == uninterrupted.progress.num_updates
        again = dropout_trainer()
        again.run_history._set_epoch(7)
        assert again.load_training_state(tmp_path / f"update_{number}") == {"current_epoch": epoch, "note": "mine"}


@pytest.mark.parametrize("event", ["on_train_epoch_end", "on_eval_epoch_end", "on_training_run_epoch_end"])
def test_a_run_resumed_between_epochs_neither_repeats_nor_skips_an_epoch(tmp_path, event):
    def save(trainer, **_):
        if trainer.run_history.current_epoch == 2:
            trainer.save_training_state(tmp_path / "state")

    evaluated = make_dataset(8)
    uninterrupted = make_trainer(callbacks=[Probe(**{event: save})])
    train(uninterrupted, num_epochs=3, eval_dataset=evaluated)
    recorder = EventRecorder()
    resumed = make_trainer(callbacks=[recorder])
    train(resumed, num_epochs=3, eval_dataset=evaluated, resume_from=tmp_path / "state")
    assert_same_weights(weights_of(uninterrupted.model), weights_of(resumed.model))
    assert losses(resumed) == losses(uninterrupted)
    assert losses(resumed, "eval_loss_epoch")[-1] == losses(uninterrupted, "eval_loss_epoch")[-1]
    assert recorder.log.count("on_train_epoch_end") == 1
    assert recorder.log.count("on_training_run_epoch_end") == (1 if event == "on_training_run_epoch_end" else 2)


def test_a_finished_run_that_is_resumed_trains_no_further_epoch(tmp_path):
    trainer = momentum_trainer()
    train(trainer, num_epochs=2)
    trainer.save_training_state(tmp_path / "state")
    recorder = EventRecorder()
    resumed = momentum_trainer()
    resumed.callback_handler.add_callback(recorder)
    train(resumed, num_epochs=2, resume_from=tmp_path / "state")
    assert recorder.log == ["on_training_run_start", "on_training_run_end"]
    assert_same_weights(weights_of(trainer.model), weights_of(resumed.model))


def test_an_iterable_of_batches_resumes_mid_epoch(tmp_path):
    def save(trainer, step, **_):
        if step == 1:
            trainer.save_training_state(tmp_path / "state")

    seen = []
    for kwargs in ({}, {"resume_from": tmp_path / "state"}):
        steps = []
        probe = Probe(
            on_train_step_end=save,
            on_train_step_start=lambda trainer, step, batch, **_: steps.append((step, batch[0].sum().item())),  # noqa: B023
        )
        train(make_trainer(callbacks=[probe]), Batches(make_dataset(16), 4), **kwargs)
        seen.append(steps)
    assert seen[1] == seen[0][2:]


def test_the_state_of_each_callback_is_saved_and_restored(tmp_path):
    class Counting(TrainerCallback):
        num_steps = 0

        def on_train_step_end(self, trainer, **kwargs):
            self.num_steps += 1

        def state_dict(self):
            return {"num_steps": self.num_steps}

        def load_state_dict(self, state_dict):
            self.num_steps = state_dict["num_steps"]

    trainer = make_trainer(callbacks=[Counting, Counting()])
    train(trainer)
    trainer.save_training_state(tmp_path / "state")
    other = make_trainer(callbacks=[Counting, Counting])
    other.load_training_state(tmp_path / "state")
    assert [callback.num_steps for callback in other.callback_handler.callbacks] == [4, 4]


def test_a_state_saved_after_a_stopped_evaluation_in_a_callback_resumes_training(tmp_path):
    def evaluate(trainer, **_):
        trainer.evaluate(make_dataset(4))
        trainer.save_training_state(tmp_path / "state")

    stop = Probe(on_evaluation_run_start=raiser(StopTrainingError("enough")))
    trainer = make_trainer(callbacks=[stop, Probe(on_train_epoch_end=evaluate)])
    trainer.train(make_dataset(8), num_epochs=1)
    resumed = make_trainer()
    resumed.train(make_dataset(8), num_epochs=3, resume_from=tmp_path / "state")
    assert resumed.progress.num_epochs_completed == 3


def test_a_state_saved_after_a_stopped_evaluation_resumes_training(tmp_path):
    stop = Probe(on_evaluation_run_start=raiser(StopTrainingError("enough")))
    trainer = make_trainer(callbacks=[stop])
    trainer.train(make_dataset(8), num_epochs=1)
    trainer.evaluate(make_dataset(4))
    trainer.save_training_state(tmp_path / "state")
    resumed = make_trainer()
    resumed.train(make_dataset(8), num_epochs=3, resume_from=tmp_path / "state")
    assert resumed.progress.num_epochs_completed == 3
