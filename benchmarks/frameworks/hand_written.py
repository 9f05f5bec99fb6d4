"""The hand-written loop, the baseline: the minimum that trains the model and reports the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from _common import Job


def train(job: Job) -> None:
    if job.is_distributed:
        train_distributed(job)
        return
    loader = job.loader()
    run_epoch = run_accumulating_epoch if job.num_accumulated > 1 else run_train_epoch
    job.model.train()
    for _ in range(job.num_epochs):
        loss = run_epoch(job, job.model, loader).item() / len(loader)
        print(loss)


def run_train_epoch(job: Job, model: torch.nn.Module, loader: Iterable[Any]) -> torch.Tensor:
    loss_func, optimizer = job.loss_func, job.optimizer
    total = torch.zeros(())
    for inputs, targets in loader:
        loss = loss_func(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    return total


def run_accumulating_epoch(job: Job, model: torch.nn.Module, loader: Iterable[Any]) -> torch.Tensor:
    loss_func, optimizer = job.loss_func, job.optimizer
    total = torch.zeros(())
    for step, (inputs, targets) in enumerate(loader, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=job.is_bf16):
            loss = loss_func(model(inputs), targets)
        (loss / job.num_accumulated).backward()
        if step % job.num_accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
    return total


def train_distributed(job: Job) -> None:
    model = DistributedDataParallel(job.model)
    sampler: DistributedSampler[Any] = DistributedSampler(job.dataset)
    loader = job.loader(shuffle=False, sampler=sampler)
    model.train()
    for epoch in range(job.num_epochs):
        sampler.set_epoch(epoch)
        total = run_train_epoch(job, model, loader)
        torch.distributed.all_reduce(total)
        print(total.item() / len(loader) / torch.distributed.get_world_size())


def evaluate(job: Job) -> None:
    loader = job.eval_loader()
    total = torch.zeros(())
    job.model.eval()
    with torch.no_grad():
        for inputs, targets in loader:
            total += job.loss_func(job.model(inputs), targets)
    print(total.item() / len(loader))
