"""The loop from Accelerate's documentation, with a tqdm bar around its dataloader."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from _common import Job


def train(job: Job) -> None:
    precision = "bf16" if job.is_bf16 else "no"
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=precision,
        gradient_accumulation_steps=job.num_accumulated,
        step_scheduler_with_optimizer=False,
    )
    model, optimizer, loader = accelerator.prepare(job.model, job.optimizer, job.loader())
    model.train()
    for _ in range(job.num_epochs):
        total = torch.zeros(())
        for inputs, targets in tqdm(loader, disable=job.is_quiet or not accelerator.is_local_main_process):
            with accelerator.accumulate(model):
                loss = job.loss_func(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        accelerator.print(accelerator.reduce(total, "mean").item() / len(loader))


def evaluate(job: Job) -> None:
    accelerator = Accelerator(cpu=True)
    model, loader = accelerator.prepare(job.model, job.eval_loader())
    total = torch.zeros(())
    model.eval()
    with torch.no_grad():
        for inputs, targets in tqdm(loader, disable=job.is_quiet):
            total += job.loss_func(model(inputs), targets)
    accelerator.print(total.item() / len(loader))
