"""Ignite: supervised engines with the mean loss and the progress bar attached."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import ProgressBar
from ignite.metrics import Average, Loss

from _common import Job


def train(job: Job) -> None:
    trainer = create_supervised_trainer(
        job.model,
        job.optimizer,
        job.loss_func,
        gradient_accumulation_steps=job.num_accumulated,
        model_fn=call_with_autocast if job.is_bf16 else call,  # Ignite's `amp_mode` supports CUDA only
    )
    if not job.is_quiet:
        Average().attach(trainer, "loss")
        show_progress(trainer)
    trainer.run(job.loader(), max_epochs=job.num_epochs)


def evaluate(job: Job) -> None:
    evaluator = create_supervised_evaluator(job.model, metrics={"loss": Loss(job.loss_func)})
    if not job.is_quiet:
        show_progress(evaluator)
    evaluator.run(job.eval_loader())


def call(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return model(inputs)


def call_with_autocast(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(inputs)


def show_progress(engine: Engine) -> None:
    bar: Any = ProgressBar(persist=True)
    bar.attach(engine, metric_names="all")
