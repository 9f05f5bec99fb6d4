"""How a run resumes if its samples are now batched differently: other numbers of processes, or another batch size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pytorch_accelerated._means import EpochMeans, LossTracker
from pytorch_accelerated._types import RunSettings, StateDict, StateMapping
from pytorch_accelerated.progress import TrainingProgress


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of an epoch are divided into batches, steps and updates.

    Args:
        num_processes: The world size.
        per_device_batch_size: Samples in a batch of one process; ``None`` if it varies.
        gradient_accumulation_steps: Batches per process in one update.
    """

    num_processes: int
    per_device_batch_size: int | None = None
    gradient_accumulation_steps: int = 1

    @property
    def step(self) -> tuple[int, int | None]:
        """What decides which samples of an epoch a step contains: number of processes and batch size."""
        return self.num_processes, self.per_device_batch_size

    @classmethod
    def from_settings(cls, settings: RunSettings, num_processes: int) -> BatchLayout:
        """Build the layout from the settings of a run; see `run_settings`."""
        names = ("per_device_batch_size", "gradient_accumulation_steps")
        return cls(num_processes, **{name: settings[name] for name in names if name in settings})


def translate_position(
    position: TrainingProgress, then: BatchLayout, now: BatchLayout, dataset_length: int | None
) -> TrainingProgress:
    """Return where in its epoch a run resumes under a different layout.

    That is before the first update that contains a sample which no update has used yet. Samples of an open accumulation
    window are repeated. So are those of an update that is part of a larger update now.

    Args:
        position: Where the run was.
        then: The layout of the run that saved the state.
        now: The layout of the resumed run.
        dataset_length: Samples in an epoch; ``None`` if unknown.

    Example:
        >>> at = TrainingProgress(num_batches_in_epoch=5)  # 80 samples
        >>> translate_position(at, BatchLayout(2, 8), BatchLayout(4, 8), None).num_batches_in_epoch  # 64 samples
        2
    """
    size_then, size_now = then.per_device_batch_size, now.per_device_batch_size
    if size_then is None or size_now is None:
        size_then = size_now = 1
    step_then, step_now = then.num_processes * size_then, now.num_processes * size_now
    num_earlier = position.num_batches_in_earlier_epochs * step_then // step_now
    position = replace(position, num_batches_in_earlier_epochs=num_earlier)
    if position.phase != "training":
        return position
    num_seen = position.num_batches_in_epoch * step_then
    if dataset_length is not None and num_seen >= dataset_length:  # the last update of an epoch may be a short one
        return replace(position, num_batches_in_epoch=math.ceil(dataset_length / step_now))
    num_updated = num_seen - position.num_batches_in_epoch % then.gradient_accumulation_steps * step_then
    num_updates = num_updated // (step_now * now.gradient_accumulation_steps)
    return replace(position, num_batches_in_epoch=num_updates * now.gradient_accumulation_steps)


def sum_epoch_means(states: Iterable[StateMapping]) -> StateDict:
    """Sum the epoch means of several processes.

    Args:
        states: One ``EpochMeans.state_dict()`` per process.

    Returns:
        The sums in the same form.
    """
    total = EpochMeans().state_dict()
    for state in states:
        total["loss"] = _sum(total["loss"], state["loss"])
        for name, sums in state["metrics"].items():
            total["metrics"][name] = _sum(total["metrics"].get(name), sums)
    return total


def _sum(*states: StateMapping | None) -> StateDict:
    total = LossTracker().state_dict()
    for state in filter(None, states):
        part = LossTracker()
        part.load_state_dict(state)
        total["total_loss"] += part.total_loss
        total["running_count"] += part.running_count
    return total
