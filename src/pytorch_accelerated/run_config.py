"""The configuration of one run, fixed when it starts, and the function that derives it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from pytorch_accelerated._types import DataLoaderKwargs


@dataclass(frozen=True)
class TrainerRunConfig:
    """The configuration of a run. Callbacks and schedules read it from ``trainer.run_config``.

    *Per device* means per process, *total* means over all processes. An *update* is one optimizer step, which all
    processes make together. Lengths are ``None`` if the dataset has no length.

    Args:
        num_epochs: Number of epochs of the run: as requested, or fewer if ``max_num_train_steps`` ends it before. The
            last one may be cut short.
        train_per_device_batch_size: Samples in a training batch of one process.
        train_dl_kwargs: Keyword arguments of the training loader.
        eval_per_device_batch_size: Samples in an evaluation batch of one process.
        eval_dl_kwargs: Keyword arguments of the evaluation loader.
        gradient_accumulation_steps: Batches per process that make one update.
        gradient_clip_value: Bound on the absolute value of each gradient entry; ``None`` for no clipping.
        train_total_batch_size: Samples per update, over all processes and accumulated batches.
        eval_total_batch_size: Samples per evaluation step, over all processes.
        num_update_steps_per_epoch: Updates in one epoch; 0 in a run that does not train.
        num_local_update_steps_per_epoch: Same as ``num_update_steps_per_epoch``, under its older name.
        max_num_train_steps: Maximum number of updates in the run; ``None`` in a run that does not train.
        is_local_process_zero: Whether this is the main process of its node.
        is_world_process_zero: Whether this is the main process of the whole run.
        is_distributed: Whether there is more than one process.
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``.
        num_processes: The number of processes (world size).
        seed: The seed of the data order and of all other randomness in the run.
        is_limited_by_steps: Whether ``max_num_train_steps`` was requested and ends the run. Otherwise it is the number
            of updates that the epochs are expected to make.
        gradient_clip_norm: Bound on the total norm of all gradients; ``None`` for no clipping.
    """

    num_epochs: int
    train_per_device_batch_size: int | None
    train_dl_kwargs: DataLoaderKwargs | None
    eval_per_device_batch_size: int | None
    eval_dl_kwargs: DataLoaderKwargs | None
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
    is_limited_by_steps: bool = True
    gradient_clip_norm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a new dictionary. Containers in it are copied, other values are not."""
        return {field.name: _copy_containers(getattr(self, field.name)) for field in fields(self)}


def count_updates(
    num_epochs: int,
    num_batches_per_epoch: int | None,
    gradient_accumulation_steps: int,
    max_num_train_steps: int | None,
) -> tuple[int | None, int | None]:
    """Return the number of updates in an epoch and in a run.

    A short accumulation window at the end of an epoch makes an update too. The run ends after ``num_epochs`` or
    ``max_num_train_steps``, whichever comes first.

    Args:
        num_epochs: Requested number of epochs.
        num_batches_per_epoch: Batches per process and epoch; ``None`` if unknown.
        gradient_accumulation_steps: Batches per process that make one update.
        max_num_train_steps: Maximum number of updates in the run; ``None`` for no limit.

    Returns:
        Updates per epoch, ``ceil(num_batches_per_epoch / gradient_accumulation_steps)``, and updates of the run. Each
        is ``None`` if unknown.

    Example:
        >>> count_updates(3, num_batches_per_epoch=10, gradient_accumulation_steps=4, max_num_train_steps=None)
        (3, 9)
        >>> count_updates(3, num_batches_per_epoch=None, gradient_accumulation_steps=4, max_num_train_steps=5)
        (None, 5)
    """
    if num_batches_per_epoch is None:
        return None, max_num_train_steps
    num_updates_per_epoch = math.ceil(num_batches_per_epoch / gradient_accumulation_steps)
    num_updates = num_epochs * num_updates_per_epoch
    if max_num_train_steps is not None:
        num_updates = min(num_updates, max_num_train_steps)
    return num_updates_per_epoch, num_updates


def _count_epochs(num_epochs: int, num_updates_per_epoch: int | None, max_num_train_steps: int | None) -> int:
    """Return the number of epochs that a run starts, so that a schedule over all of them ends with the run."""
    if max_num_train_steps is None or not num_updates_per_epoch:
        return num_epochs
    return min(num_epochs, math.ceil(max_num_train_steps / num_updates_per_epoch))


def derive_run_config(
    *,
    num_epochs: int,
    num_batches_per_epoch: int | None,
    gradient_accumulation_steps: int,
    max_num_train_steps: int | None,
    num_processes: int,
    train_per_device_batch_size: int | None,
    eval_per_device_batch_size: int | None,
    **given: Any,
) -> TrainerRunConfig:
    """Derive the configuration of a run from the settings of one process.

    Args:
        num_epochs: Requested number of epochs.
        num_batches_per_epoch: Training batches per process and epoch; ``None`` if unknown.
        gradient_accumulation_steps: See `TrainerRunConfig`.
        max_num_train_steps: Maximum number of updates in the run; ``None`` for no limit.
        num_processes: See `TrainerRunConfig`.
        train_per_device_batch_size: See `TrainerRunConfig`; ``None`` if it varies.
        eval_per_device_batch_size: See `TrainerRunConfig`; ``None`` if it varies.
        **given: The fields that are used as they are.
    """
    num_updates_per_epoch, num_updates = count_updates(
        num_epochs, num_batches_per_epoch, gradient_accumulation_steps, max_num_train_steps
    )
    return TrainerRunConfig(
        num_epochs=_count_epochs(num_epochs, num_updates_per_epoch, max_num_train_steps),
        train_per_device_batch_size=train_per_device_batch_size,
        eval_per_device_batch_size=eval_per_device_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        train_total_batch_size=_times(train_per_device_batch_size, num_processes * gradient_accumulation_steps),
        eval_total_batch_size=_times(eval_per_device_batch_size, num_processes),
        num_update_steps_per_epoch=num_updates_per_epoch,
        num_local_update_steps_per_epoch=num_updates_per_epoch,
        max_num_train_steps=num_updates,
        is_distributed=num_processes > 1,
        num_processes=num_processes,
        is_limited_by_steps=max_num_train_steps is not None,
        **given,
    )


def _copy_containers(value: Any) -> Any:
    if type(value) is dict:
        return {name: _copy_containers(item) for name, item in value.items()}
    return type(value)(map(_copy_containers, value)) if type(value) in (list, tuple, set) else value


def _times(size: int | None, factor: int) -> int | None:
    return None if size is None else size * factor
