"""Measure how a step scales with callbacks, metrics and parameter tensors, and how a start scales with the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _common import Job, make_dataset, make_deep_mlp, make_mlp
from measures import Figure, added_seconds, compare, do
from measures.events import Idle, seconds_per_step
from measures.steps import step_of_training
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback

NUM_CALLBACKS = NUM_METRICS = (1, 10, 100)
NUM_LAYERS = (2, 20, 200)
NUM_SAMPLES = (10**4, 10**5, 10**6, 10**7)
NUM_REPEATS = 8


class MetricsTrainer(Trainer):
    """Returns several metrics from each step."""

    num_metrics = 0

    def calculate_train_batch_loss(self, batch: Any) -> Mapping[str, Any]:
        """Add the metrics to the default output."""
        output = super().calculate_train_batch_loss(batch)
        value = output["loss"].detach()
        return {**output, "metrics": {f"metric_{number}": value for number in range(self.num_metrics)}}


class StopClock(TrainerCallback):
    """Records when the first step starts."""

    def __init__(self) -> None:
        self.time = 0.0

    def on_train_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the time."""
        self.time = time.perf_counter()


def step_with_callbacks(num_callbacks: int) -> float:
    return seconds_per_step([Idle() for _ in range(num_callbacks)])


def step_with_metrics(num_metrics: int) -> float:
    def train(job: Job) -> None:
        trainer = MetricsTrainer(job.model, job.loss_func, job.optimizer, callbacks=())
        trainer.num_metrics = num_metrics
        trainer.train(job.dataset, num_epochs=job.num_epochs, per_device_batch_size=job.batch_size)

    job = Job(make_mlp, make_dataset(32 * 100), num_epochs=3)
    return statistics.median(do(job, train).epochs) / job.num_steps_per_epoch


def start_over(num_samples: int) -> float:
    """Return the seconds from calling `train` to the first step."""
    model, clock = nn.Linear(1, 1), StopClock()
    trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters()), callbacks=[clock])
    dataset = TensorDataset(torch.zeros(num_samples, 1), torch.zeros(num_samples, 1))
    start = time.perf_counter()
    trainer.train(dataset, num_epochs=1, per_device_batch_size=32, max_num_train_steps=1)
    return clock.time - start


def start_by_hand(num_samples: int) -> float:
    """Return the seconds from creating a plain dataloader to its first batch."""
    dataset = TensorDataset(torch.zeros(num_samples, 1), torch.zeros(num_samples, 1))
    start = time.perf_counter()
    next(iter(DataLoader(dataset, 32, shuffle=True)))
    return time.perf_counter() - start


def growth(row: str, seconds_with: Callable[[int], float], numbers: tuple[int, ...]) -> list[Figure]:
    """Return the microseconds added to a step, for each number of callbacks or metrics."""
    added = {
        number: added_seconds(partial(seconds_with, number), partial(seconds_with, 0), NUM_REPEATS)
        for number in numbers
    }
    return [Figure(row, 1e6 * seconds, at=number) for number, seconds in added.items()]


def starts(row: str, seconds_with: Callable[[int], float]) -> list[Figure]:
    """Return the milliseconds until the first step or batch, for each number of samples."""
    medians = {number: statistics.median(seconds_with(number) for _ in range(3)) for number in NUM_SAMPLES}
    return [Figure(row, 1e3 * seconds, at=number) for number, seconds in medians.items()]


def tensors(framework: str) -> list[Figure]:
    """Return the ratios to the hand-written loop, by number of parameter tensors."""
    figures = []
    for num_layers in NUM_LAYERS:
        make_job = partial(Job, partial(make_deep_mlp, num_layers), make_dataset(32 * 25), num_epochs=3)
        measurement = step_of_training(make_job)
        figures.append(compare("parameter tensors", framework, measurement, NUM_REPEATS, at=2 * (num_layers + 1)))
    return figures


def measure(case: str, framework: str) -> list[Figure]:
    return [
        *growth("callbacks", step_with_callbacks, NUM_CALLBACKS),
        *growth("metrics", step_with_metrics, NUM_METRICS),
        *tensors(framework),
        *starts("samples", start_over),
        *starts("samples, by hand", start_by_hand),
    ]
