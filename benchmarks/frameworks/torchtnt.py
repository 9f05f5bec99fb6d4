"""torchtnt: an `AutoUnit` that sums its loss, with the progress bar callback."""

from __future__ import annotations

from typing import Any

import torch
from torchtnt.framework import AutoUnit
from torchtnt.framework import evaluate as run_evaluation
from torchtnt.framework import train as run_training
from torchtnt.framework.callbacks import TQDMProgressBar
from torchtnt.framework.state import State

from _common import Job


class Unit(AutoUnit[Any]):
    """Computes the loss of a batch, and the mean loss of an epoch."""

    def __init__(self, job: Job) -> None:
        super().__init__(module=job.model, device=torch.device("cpu"))
        self.job = job
        self.total = torch.zeros(())

    def compute_loss(self, state: State, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the outputs."""
        inputs, targets = data
        outputs = self.module(inputs)
        return self.job.loss_func(outputs, targets), outputs

    def configure_optimizers_and_lr_scheduler(self, module: torch.nn.Module) -> tuple[torch.optim.Optimizer, None]:
        """Return the optimizer, and no scheduler."""
        return self.job.optimizer, None

    def on_train_step_end(self, state: State, data: Any, step: int, results: Any) -> None:
        """Add the loss to the sum."""
        self.total += results.loss.detach()

    def on_eval_step_end(self, state: State, data: Any, step: int, loss: torch.Tensor, outputs: Any) -> None:
        """Add the loss to the sum."""
        self.total += loss

    def on_train_epoch_end(self, state: State) -> None:
        """Report the mean."""
        super().on_train_epoch_end(state)
        self.report_mean()

    def on_eval_epoch_end(self, state: State) -> None:
        """Report the mean."""
        super().on_eval_epoch_end(state)
        self.report_mean()

    def report_mean(self) -> None:
        """Print the mean loss, and reset the sum."""
        print(self.total.item() / self.job.num_steps_per_epoch)
        self.total = torch.zeros(())


def train(job: Job) -> None:
    run_training(Unit(job), job.loader(), max_epochs=job.num_epochs, callbacks=make_callbacks(job))


def evaluate(job: Job) -> None:
    run_evaluation(Unit(job), job.eval_loader(), callbacks=make_callbacks(job))


def make_callbacks(job: Job) -> list[Any]:
    return [] if job.is_quiet else [TQDMProgressBar()]
