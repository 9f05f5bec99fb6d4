"""How a run goes on whose samples are grouped otherwise than before: by another number of processes or batch size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pytorch_accelerated.progress import TrainingProgress
from pytorch_accelerated.tracking import EpochMeans, LossTracker


@dataclass(frozen=True)
class BatchLayout:
    """How many samples the processes take together.

    Args:
        num_processes: How many there are.
        per_device_batch_size: Samples in a batch of one process; ``None`` if it varies.
        gradient_accumulation_steps: Batches per process that make one update.
    """

    num_processes: int
    per_device_batch_size: int | None = None
    gradient_accumulation_steps: int = 1

    @property
    def step(self) -> tuple[int, int | None]:
        """What makes a step: which samples of an epoch it has depends on nothing else."""
        return self.num_processes, self.per_device_batch_size

    @classmethod
    def of(cls, settings: Mapping[str, Any], num_processes: int) -> BatchLayout:
        """Take it out of the settings of a run."""
        names = ("per_device_batch_size", "gradient_accumulation_steps")
        return cls(num_processes, **{name: settings[name] for name in names if name in settings})


def translate_position(
    position: TrainingProgress, then: BatchLayout, now: BatchLayout, dataset_length: int | None
) -> TrainingProgress:
    """Return where in its epoch a run goes on.

    That is before the first update with a sample that was in no update yet. Samples of an accumulation window that was
    open, and of an update that is now a larger one, come again.

    Args:
        position: Where the run was.
        then: How the samples were grouped.
        now: How they are grouped.
        dataset_length: How many there are in an epoch; ``None`` if that is not known.

    Example:
        >>> at = TrainingProgress(num_batches_in_epoch=5)
        >>> translate_position(
        ...     at, BatchLayout(2, 8), BatchLayout(4, 8), None
        ... ).num_batches_in_epoch  # 80 samples, not 64
        2
    """
    if position.phase != "training":
        return position
    size_then, size_now = then.per_device_batch_size, now.per_device_batch_size
    if size_then is None or size_now is None:
        size_then = size_now = 1
    step_then, step_now = then.num_processes * size_then, now.num_processes * size_now
    num_seen = position.num_batches_in_epoch * step_then
    if dataset_length is not None and num_seen >= dataset_length:  # the last update of an epoch may be a short one
        return replace(position, num_batches_in_epoch=math.ceil(dataset_length / step_now))
    num_updated = num_seen - position.num_batches_in_epoch % then.gradient_accumulation_steps * step_then
    num_updates = num_updated // (step_now * now.gradient_accumulation_steps)
    return replace(position, num_batches_in_epoch=num_updates * now.gradient_accumulation_steps)


def sum_epoch_means(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the sums that several processes had over an epoch into one, as `EpochMeans.state_dict` has them."""
    total = EpochMeans().state_dict()
    for state in states:
        total["loss"] = _sum(total["loss"], state["loss"])
        for name, sums in state["metrics"].items():
            total["metrics"][name] = _sum(total["metrics"].get(name), sums)
    return total


def _sum(*states: Mapping[str, Any] | None) -> dict[str, Any]:
    total = LossTracker().state_dict()
    for state in filter(None, states):
        part = LossTracker()
        part.load_state_dict(state)
        total["total_loss"] += part.total_loss
        total["running_count"] += part.running_count
    return total
