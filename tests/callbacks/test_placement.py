"""Callbacks that move modules to the device, or convert them for distributed training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from _support import make_dataset, make_model, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ConvertSyncBatchNormCallback, MoveModulesToDeviceCallback


class Movable(nn.Module):
    """Remembers where it was moved to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.moves = []

    def to(self, *args, **kwargs):
        self.moves.append(args)
        return super().to(*args, **kwargs)

    def forward(self, outputs, targets):
        return (self.weight * (outputs - targets) ** 2).mean()


class WithModules(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metric = Movable()
        self.note = "no module"


@pytest.fixture
def trainer():
    return make_trainer(cls=WithModules, loss_func=Movable(), callbacks=[MoveModulesToDeviceCallback])


def test_modules_of_the_trainer_are_moved_before_training(trainer):
    trainer.train(make_dataset(4), num_epochs=2)
    assert trainer.loss_func.moves == [(trainer.device,)]
    assert trainer.metric.moves == [(trainer.device,)]


def test_modules_of_the_trainer_are_moved_before_evaluation(trainer):
    trainer.evaluate(make_dataset(4))
    assert trainer.loss_func.moves == [(trainer.device,)]
    assert trainer.metric.moves == [(trainer.device,)]


def test_the_model_itself_is_not_moved_by_the_callback():
    model = Movable()
    fake_trainer = SimpleNamespace(model=model, loss_func=Movable(), device=torch.device("cpu"), optimizer=None)
    MoveModulesToDeviceCallback().on_training_run_start(fake_trainer)
    assert model.moves == []
    assert fake_trainer.loss_func.moves == [(torch.device("cpu"),)]


def make_model_with_batch_norms():
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.BatchNorm1d(4))


def test_batch_norms_are_converted_in_a_distributed_run():
    model = make_model_with_batch_norms()
    weight = model[2].weight
    fake_trainer = SimpleNamespace(model=model, run_config=SimpleNamespace(is_distributed=True))
    ConvertSyncBatchNormCallback().on_training_run_start(fake_trainer)
    norms = [module for module in fake_trainer.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [type(norm) for norm in norms] == [nn.SyncBatchNorm] * 2
    assert norms[1].weight is weight, "the optimizer holds this parameter"


def test_batch_norms_are_not_converted_with_a_single_process():
    model = make_model_with_batch_norms()
    model.append(nn.Linear(4, 1))
    make_trainer(model, callbacks=[ConvertSyncBatchNormCallback]).train(make_dataset(4), num_epochs=1)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def test_modules_of_the_trainer_are_not_moved_without_the_callback():
    trainer = make_trainer(make_model(), cls=WithModules, loss_func=Movable())
    trainer.train(make_dataset(4), num_epochs=1)
    assert trainer.loss_func.moves == trainer.metric.moves == []
