"""What the tests of callbacks share."""

from __future__ import annotations

import pytest
import torch

from _support import make_dataset, make_model
from pytorch_accelerated import Trainer


class ScriptedTrainer(Trainer):
    """Trains a linear model in earnest, but reports the evaluation losses it was given, one for each epoch."""

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
        """Train for an epoch per loss, with two updates each."""
        kwargs = {"num_epochs": len(self.eval_losses), "eval_dataset": make_dataset(4), **kwargs}
        self.train(make_dataset(8), per_device_batch_size=4, **kwargs)


@pytest.fixture
def scripted():
    """Make a trainer with known evaluation losses."""
    return ScriptedTrainer
