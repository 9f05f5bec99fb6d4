"""The Trainer of Hugging Face transformers, with a model that returns its loss, as that Trainer requires."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer, TrainingArguments

from _common import Job


class LossModel(nn.Module):
    """Returns the loss and the outputs in a dictionary."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.loss_func = job.model, job.loss_func

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss."""
        logits = self.model(inputs)
        return {"loss": self.loss_func(logits, labels), "logits": logits}


class SameLoaderTrainer(Trainer):
    """Uses the dataloaders of the hand-written loop."""

    job: Job

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the common dataloader, with batches collated into dictionaries."""
        return self.job.loader(collate_fn=collate)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the common dataloader, with batches collated into dictionaries."""
        return self.job.eval_loader(collate_fn=collate)


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    inputs, labels = default_collate(samples)
    return {"inputs": inputs, "labels": labels}


def make_trainer(job: Job, folder: str) -> Trainer:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=job.num_epochs,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=job.batch_size,
        gradient_accumulation_steps=job.num_accumulated,
        bf16=job.is_bf16,
        disable_tqdm=job.is_quiet,
        logging_strategy="no" if job.is_quiet else "epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        max_grad_norm=0,  # no clipping, because the other frameworks do none
        prediction_loss_only=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda step: 1.0)
    trainer = (Trainer if job.has_own_loader else SameLoaderTrainer)(
        LossModel(job),
        arguments,
        data_collator=collate,
        train_dataset=job.dataset,
        eval_dataset=job.dataset,
        optimizers=(job.optimizer, scheduler),
    )
    trainer.job = job
    return trainer


def train(job: Job) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(job, folder).train()


def evaluate(job: Job) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(job, folder).evaluate()
