"""Measure the cost of a no-op callback, as the difference that many of them make to a step."""

from __future__ import annotations

import statistics
from typing import Any

from _common import Job, make_dataset, make_mlp
from measures import Figure, added_seconds, do
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback

NUM_CALLBACKS = 1000
NUM_PAIRS = 8


class Idle(TrainerCallback):
    """Implements one event, which fires once per step, as a no-op."""

    def on_train_step_end(self, trainer: Any, **kwargs: Any) -> None:
        """Do nothing."""


def seconds_per_step(callbacks: list[TrainerCallback]) -> float:
    job = Job(make_mlp, make_dataset(32 * 100), num_epochs=3, is_quiet=True)

    def train(job: Job) -> None:
        trainer = Trainer(job.model, job.loss_func, job.optimizer, callbacks=callbacks)
        trainer.train(job.dataset, num_epochs=job.num_epochs, per_device_batch_size=job.batch_size)

    return statistics.median(do(job, train).epochs) / job.num_steps_per_epoch


def cost_of(callback_class: type[TrainerCallback]) -> float:
    """Return the microseconds that one callback adds to a step."""
    many = [callback_class() for _ in range(NUM_CALLBACKS)]
    added = added_seconds(lambda: seconds_per_step(many), lambda: seconds_per_step([]), NUM_PAIRS)
    return 1e6 * added / NUM_CALLBACKS


def measure(case: str, framework: str) -> list[Figure]:
    return [Figure("Z", cost_of(Idle)), Figure("Z-none", cost_of(TrainerCallback))]
