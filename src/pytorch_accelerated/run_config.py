"""The facts of one run, fixed when it starts, and the one function that derives them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrainerRunConfig:
    """What a run was started with, as callbacks and schedules read it from ``trainer.run_config``.

    *Per device* is what one process handles, *total* what all handle together. An *update* is one optimizer step, which
    all processes make together. Lengths are ``None`` for datasets that have none.

    Args:
        num_epochs: Epochs the run was asked for.
        train_per_device_batch_size: Samples in a training batch of one process.
        train_dl_kwargs: Keyword arguments of the training loader.
        eval_per_device_batch_size: Samples in an evaluation batch of one process.
        eval_dl_kwargs: Keyword arguments of the evaluation loader.
        gradient_accumulation_steps: Batches per process that make one update.
        gradient_clip_value: Bound for the absolute value of each gradient entry; ``None`` for no clipping.
        train_total_batch_size: Samples per update: all processes, all accumulated batches.
        eval_total_batch_size: Samples per evaluation step of all processes.
        num_update_steps_per_epoch: Updates in one epoch.
        num_local_update_steps_per_epoch: The same number, under its older name.
        max_num_train_steps: Updates after which the run ends at the latest.
        is_local_process_zero: Whether this is the main process of its node.
        is_world_process_zero: Whether this is the main process of all.
        is_distributed: Whether there are several processes.
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``.
        num_processes: How many processes train together.
        seed: Where data order and randomness of the run come from.
    """

    num_epochs: int
    train_per_device_batch_size: int | None
    train_dl_kwargs: dict[str, Any] | None
    eval_per_device_batch_size: int | None
    eval_dl_kwargs: dict[str, Any] | None
    gradient_accumulation_steps: int
    gradient_clip_value: float | None
    train_total_batch_size: int | None
    eval_total_batch_size: int | None
    num_update_steps_per_epoch: int | None
    num_local_update_steps_per_epoch: int | None
    max_num_train_steps: int | None
    is_local_process_zero: bool
    is_world_process_zero: bool
    is_distributed: bool
    mixed_precision: str
    num_processes: int
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a new dictionary; never raises and copies no value."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StepCounts:
    """How many updates an epoch and a run have; ``None`` where the loader has no length."""

    num_update_steps_per_epoch: int | None
    max_num_train_steps: int | None


def count_steps(
    num_epochs: int,
    num_batches_per_epoch: int | None,
    gradient_accumulation_steps: int,
    max_num_train_steps: int | None,
) -> StepCounts:
    """Derive the number of updates from the number of batches that one process gets per epoch.

    A short last accumulation window makes an update too, so an epoch has
    ``ceil(num_batches_per_epoch / gradient_accumulation_steps)`` updates. The smaller of ``max_num_train_steps`` and
    ``num_epochs`` ends the run.

    Example:
        >>> count_steps(num_epochs=3, num_batches_per_epoch=10, gradient_accumulation_steps=4, max_num_train_steps=None)
        StepCounts(num_update_steps_per_epoch=3, max_num_train_steps=9)
        >>> count_steps(num_epochs=3, num_batches_per_epoch=10, gradient_accumulation_steps=4, max_num_train_steps=5)
        StepCounts(num_update_steps_per_epoch=3, max_num_train_steps=5)
        >>> count_steps(num_epochs=3, num_batches_per_epoch=None, gradient_accumulation_steps=4, max_num_train_steps=5)
        StepCounts(num_update_steps_per_epoch=None, max_num_train_steps=5)
    """
    if num_batches_per_epoch is None:
        return StepCounts(None, max_num_train_steps)
    num_updates_per_epoch = math.ceil(num_batches_per_epoch / gradient_accumulation_steps)
    num_updates = num_epochs * num_updates_per_epoch
    if max_num_train_steps is not None:
        num_updates = min(num_updates, max_num_train_steps)
    return StepCounts(num_updates_per_epoch, num_updates)
