"""Shared by the tests of callbacks: a trainer with scripted evaluation losses."""

from __future__ import annotations

import pytest
import torch

from _support import make_dataset, make_model
from pytorch_accelerated import Trainer


class ScriptedTrainer(Trainer):
    """Really trains a linear model, but returns the given evaluation losses, one per epoch."""

    def __init__(self, eval_losses, callbacks=(), model=None, **kwargs):
        model = make_model() if model is None else model
        super().__init__(
            model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), callbacks, **kwargs
        )
        self.eval_losses = list(eval_losses)

    def calculate_eval_batch_loss(self, batch):
        loss = self.eval_losses[min(self.run_history.current_epoch, len(self.eval_losses)) - 1]
        return {**super().calculate_eval_batch_loss(batch), "loss": torch.tensor(loss, dtype=torch.float64)}

    def run(self, **kwargs):
        """Train for one epoch per loss, with two updates each."""
        kwargs = {"num_epochs": len(self.eval_losses), "eval_dataset": make_dataset(4), **kwargs}
        self.train(make_dataset(8), per_device_batch_size=4, **kwargs)


@pytest.fixture
def scripted():
    """A trainer class with known evaluation losses."""
    return ScriptedTrainer
