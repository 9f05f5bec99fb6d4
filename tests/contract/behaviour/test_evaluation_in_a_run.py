"""Evaluation and prediction leave no trace in a run, whichever of its events calls them."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from _support import EVENTS_OF_A_RUN, Probe, assert_same_weights, losses, make_dataset, make_trainer, raiser, train
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    LimitBatchesCallback,
    ModelEmaCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
)


def collate(samples):
    """Do what the default function does."""
    return [torch.stack(parts) for parts in zip(*samples, strict=True)]


class WithTeacher(Trainer):
    """Keeps a batch norm in evaluation mode, and a second model in training mode except in evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = nn.Sequential(nn.Dropout(0.5))

    def train_epoch_start(self):
        super().train_epoch_start()
        self.teacher.train()
        self.model[1].eval()

    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.teacher.eval()
        torch.rand(3), np.random.rand(), random.random()


def state_of(trainer):
    """Return what a callback can see of the run."""
    modules = [*trainer.model.modules(), *trainer.teacher.modules()]
    return {
        "modes": [module.training for module in modules],
        "generators": [torch.get_rng_state().tolist(), str(np.random.get_state()), str(random.getstate())],
        "stop_reason": trainer.stop_reason,
        "arguments": [trainer.collate_fn, trainer.train_dataset, trainer.eval_dataset],
        "loaders": [trainer.train_dataloader, trainer.eval_dataloaders, trainer.current_dataloader],
        "config": trainer.run_config,
        "prefix": trainer.run_history.metric_name_prefix,
        "progress": trainer.progress.state_dict(),
        "flags": [trainer.is_evaluating, trainer.is_intermediate_evaluation, trainer.num_batches_done],
        "epoch": trainer.run_history.current_epoch,
        "tracker": trainer._loss_tracker,
        "lr": [group["lr"] for group in trainer.optimizer.param_groups],
    }


def run(event=None, call=None, accumulation=2):
    """Train, and let each occurrence of an event of the run call something; return the trainer and differences."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    differences, is_busy = [], False

    def react(trainer, **_):
        nonlocal is_busy
        if is_busy or call is None:
            return
        is_busy, before = True, state_of(trainer)
        call(trainer)
        after, is_busy = state_of(trainer), False
        differences.extend(name for name in before if before[name] != after[name])

    probe = Probe(**({event: react} if event else {}))
    ema = ModelEmaCallback(decay=0.5)
    callbacks = [LimitBatchesCallback(5), StepBasedEvaluationCallback(3), probe, ema]
    trainer = make_trainer(model, cls=WithTeacher, callbacks=callbacks)
    settings = {"num_epochs": 2, "eval_dataset": make_dataset(8), "gradient_accumulation_steps": accumulation}
    scheduler = {"create_scheduler_fn": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)}
    settings |= {"train_dataloader_kwargs": {"num_workers": 0}, "eval_dataloader_kwargs": {"num_workers": 0}}
    train(trainer, dataset=40, collate_fn=collate, **settings, **scheduler)
    return trainer, ema, differences


CALLS = {
    "evaluate": lambda trainer: trainer.evaluate(make_dataset(5), per_device_batch_size=2),
    "evaluate again": lambda trainer: trainer.evaluate(),
    "predict": lambda trainer: trainer.predict(make_dataset(5), per_device_batch_size=2),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("expected"))
        return run()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("event", EVENTS_OF_A_RUN)
def test_evaluation_in_any_event_leaves_the_run_as_it_was(event, call, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, ema, differences = run(event, CALLS[call])
    assert differences == []
    expected_trainer, expected_ema, _ = expected
    assert_same_weights(trainer.model.state_dict(), expected_trainer.model.state_dict())
    assert_same_weights(ema.ema_model.state_dict(), expected_ema.ema_model.state_dict())
    for name in expected_trainer.run_history.get_metric_names():
        assert losses(trainer, name) == losses(expected_trainer, name), name
    assert trainer.stop_reason == expected_trainer.stop_reason
    assert trainer.collate_fn is collate


@pytest.mark.parametrize("error", [RuntimeError("broken"), StopTrainingError("enough")])
def test_a_failed_evaluation_in_a_run_leaves_the_run_as_it_was(error):
    differences = []

    def evaluate(trainer, **_):
        if trainer.is_evaluating:
            return
        before = state_of(trainer)
        fail = Probe(on_eval_step_end=raiser(error))
        trainer.callback_handler.add_callback(fail)
        with contextlib.suppress(RuntimeError):
            trainer.evaluate(make_dataset(4))
        trainer.callback_handler.callbacks.remove(fail)
        trainer.callback_handler.refresh()
        differences.extend(name for name, value in state_of(trainer).items() if before[name] != value)

    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    train(make_trainer(model, cls=WithTeacher, callbacks=[Probe(on_train_step_end=evaluate)]))
    assert differences == []


def test_evaluation_on_its_own_leaves_the_model_in_evaluation_mode():
    trainer = make_trainer()
    trainer.evaluate(make_dataset(4))
    assert not trainer.model.training
