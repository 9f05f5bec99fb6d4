"""This library. The same file runs version 0.1.61, in a separate environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from _common import Job
from pytorch_accelerated import Trainer


class SameLoaderTrainer(Trainer):
    """Uses the dataloaders of the hand-written loop."""

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Mapping[str, Any] | None = None) -> Any:
        """Return a plain dataloader, which fetches sample by sample."""
        return DataLoader(self.train_dataset, batch_size, shuffle=True)

    def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: Mapping[str, Any] | None = None) -> Any:
        """Return a plain dataloader, which fetches sample by sample."""
        return DataLoader(self.eval_dataset, batch_size, shuffle=False)


def make_trainer(job: Job) -> Trainer:
    if job.is_bf16:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    trainer_class = Trainer if job.has_own_loader else SameLoaderTrainer
    callbacks: dict[str, Any] = {"callbacks": ()} if job.is_quiet else {}
    return trainer_class(job.model, job.loss_func, job.optimizer, **callbacks)


def train(job: Job) -> None:
    make_trainer(job).train(
        job.dataset,
        num_epochs=job.num_epochs,
        per_device_batch_size=job.batch_size,
        gradient_accumulation_steps=job.num_accumulated,
    )


def evaluate(job: Job) -> None:
    make_trainer(job).evaluate(job.dataset, per_device_batch_size=job.batch_size)
