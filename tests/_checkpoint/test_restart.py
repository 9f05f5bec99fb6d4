"""What a resumed run restores a second time: the events at the start of its epoch fire again, and change nothing."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from _saved import assert_equal
from _support import Probe, Samples, history_of, make_dataset, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import EarlyStoppingCallback, SaveTrainingStateCallback, TrainerCallback

DATASET = Samples(make_dataset(22))  # six batches, the last of which is short


class Base(Trainer):
    lr = 0.01

    def __init__(self, **kwargs):
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        super().__init__(model, nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=self.lr), seed=0, **kwargs)

    def remembered(self):
        return weights_of(self.model), history_of(self), self.optimizer.state_dict()


class Draws(Base):
    def train_epoch_start(self):
        super().train_epoch_start()
        torch.rand(3), np.random.normal(), random.random()

    def calculate_train_batch_loss(self, batch):
        noise = torch.rand(()) + np.random.normal() + random.random()
        return super().calculate_train_batch_loss((batch[0] + noise.float(), batch[1]))


class ResetsAMetric(Base):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metric = MeanMetric()

    def train_epoch_start(self):
        super().train_epoch_start()
        self.metric.reset()

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        self.metric.update(output["loss"].detach())
        return output

    def train_epoch_end(self):
        self.run_history.update_metric("mean", self.metric.compute().item())


class LowersItsRate(Base):
    def train_epoch_start(self):
        super().train_epoch_start()
        self.optimizer.param_groups[0]["lr"] *= 0.5


class LowersARateInATensor(LowersItsRate):
    lr = torch.tensor(0.01)


class CopiesItsModel(Base):
    """Trains towards the outputs of its model at the start of the epoch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.target = copy.deepcopy(self.model)

    def train_epoch_start(self):
        super().train_epoch_start()
        self.target.load_state_dict(self.get_model().state_dict())

    def calculate_train_batch_loss(self, batch):
        with torch.no_grad():
            targets = self.target(batch[0]) + 0.1 * batch[1]
        return super().calculate_train_batch_loss((batch[0], targets))


class Counting(TrainerCallback):
    def __init__(self):
        self.num_epochs = 0

    def on_train_epoch_start(self, trainer, **kwargs):
        self.num_epochs += 1
        trainer.run_history.update_metric("num_epochs", self.num_epochs)

    def state_dict(self):
        return {"num_epochs": self.num_epochs}

    def load_state_dict(self, state_dict):
        self.num_epochs = state_dict.pop("num_epochs")


class Counts(Base):
    def __init__(self, callbacks=(), **kwargs):
        super().__init__(
            callbacks=[*callbacks, Counting(), EarlyStoppingCallback(5, watch_metric="num_epochs")], **kwargs
        )


@pytest.mark.filterwarnings("ignore:.*greater_is_better")
@pytest.mark.parametrize("step", [4, 6, 7])
@pytest.mark.parametrize("kind", [Draws, ResetsAMetric, LowersItsRate, LowersARateInATensor, CopiesItsModel, Counts])
def test_the_events_at_the_start_of_a_resumed_epoch_change_nothing(kind, step, tmp_path):
    def run(folder, **kwargs):
        saving = SaveTrainingStateCallback(tmp_path / folder, save_every_n_steps=1)
        settings = {"num_epochs": 2, "gradient_accumulation_steps": 3, "train_dataloader_kwargs": {"num_workers": 0}}
        return train(kind(callbacks=[saving]), DATASET, **settings, **kwargs)

    complete = run("complete")
    resumed = run("resumed", resume_from=tmp_path / "complete" / f"step_{step}")
    assert_equal(resumed.remembered(), complete.remembered())


def test_what_a_restart_needs_is_released_when_the_epoch_has_started(tmp_path):
    """It would keep a copy of what was restored for as long as the run lasts."""
    train(Base(callbacks=[SaveTrainingStateCallback(tmp_path)]), DATASET)
    kept = []
    probe = Probe(on_train_step_start=lambda trainer, **_: kept.append(trainer._loop_run.restart))
    train(Base(callbacks=[probe]), DATASET, num_epochs=2, resume_from=tmp_path / "final")
    assert kept == [None] * 6
