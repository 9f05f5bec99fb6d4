"""Lightning: a module that logs the mean loss of the epoch, and a Trainer that writes no files."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer

from _common import Job


class Module(LightningModule):
    """Computes and logs the loss."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.job = job.model, job

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of a training batch."""
        return self.compute_loss(batch, "train_loss")

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of an evaluation batch."""
        return self.compute_loss(batch, "eval_loss")

    def compute_loss(self, batch: Any, name: str) -> torch.Tensor:
        """Return the loss of a batch. Log it unless the job is quiet."""
        inputs, targets = batch
        loss: torch.Tensor = self.job.loss_func(self.model(inputs), targets)
        if not self.job.is_quiet:
            self.log(name, loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(inputs))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return self.job.optimizer


def make_trainer(job: Job) -> Trainer:
    return Trainer(
        max_epochs=job.num_epochs,
        accelerator="cpu",
        devices=torch.distributed.get_world_size() if job.is_distributed else 1,
        strategy="ddp" if job.is_distributed else "auto",
        precision="bf16-mixed" if job.is_bf16 else "32-true",
        accumulate_grad_batches=job.num_accumulated,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not job.is_quiet,
        enable_model_summary=not job.is_quiet,
    )


def train(job: Job) -> None:
    make_trainer(job).fit(Module(job), job.loader())


def evaluate(job: Job) -> None:
    make_trainer(job).validate(Module(job), job.eval_loader(), verbose=not job.is_quiet)
