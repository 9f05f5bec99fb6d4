"""Values of steps, which a run records every few updates without waiting for the device."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytorch_accelerated._distributed.collectives import sum_over_processes
from pytorch_accelerated._history.records import Moment
from pytorch_accelerated._recording.cadence import Cadence
from pytorch_accelerated._recording.host_copy import HostCopy

if TYPE_CHECKING:
    import torch

    from pytorch_accelerated._arguments.lengths import Length
    from pytorch_accelerated._run import Run
    from pytorch_accelerated._types import StateDict, StateMapping, WeightedSums


class StepValues(NamedTuple):
    """What a run records of its steps after some update."""

    moment: Moment
    values: dict[str, float]


class _Taken(NamedTuple):
    """Values of steps that the device may not have sent yet: the sums behind each mean, then the single numbers."""

    moment: Moment
    names_of_means: list[str]
    names_of_numbers: list[str]
    copy: HostCopy


class StepRecorder:
    """Takes the values of steps every so often, without making the host wait for the device.

    These are the means since the last time in the epoch, and single numbers such as the learning rate. With a CUDA
    device they are known when the next ones are taken, or when anything else is recorded.
    """

    def __init__(self) -> None:
        self.next_update = math.inf
        """The number of updates after which values are due."""

        self._every_n_updates: int | None = None
        self._next_of_updates = math.inf
        self._cadences: list[Cadence] = []
        """Those that are not counted in updates, so that each update may be one after which values are due."""

        self._pending: deque[_Taken] = deque()
        self._sums: dict[str, tuple[float, float]] = {}
        """The sums of the epoch as of the last time, and their weights."""

    def start(self, run: Run, every: Length | int | None) -> None:
        """Start a run.

        Args:
            run: The run.
            every: How often values are taken: a length, or a number of updates; ``None`` if nothing is taken.
        """
        self._every_n_updates, self._cadences = None, []
        self.next_update = self._next_of_updates = math.inf
        self.take_every(run, every)

    def take_every(self, run: Run, every: Length | int | None) -> None:
        """Take values that often too. Of several numbers of updates, the smallest counts."""
        if every is None:
            return
        if not isinstance(every, int) and every.unit != "updates":
            self._cadences.append(cadence := Cadence(every))
            cadence.start(run)
        else:
            number = every if isinstance(every, int) else int(every.amount)
            self._every_n_updates = number if self._every_n_updates is None else min(number, self._every_n_updates)
        self._schedule(run.training.progress.num_updates)

    def _schedule(self, num_updates: int) -> None:
        if self._every_n_updates is not None:
            self._next_of_updates = (num_updates // self._every_n_updates + 1) * self._every_n_updates
        self.next_update = num_updates + 1 if self._cadences else self._next_of_updates

    def is_due(self, run: Run) -> bool:
        """Return whether values are due after the update that was just made. Must be called on every process."""
        num_updates = run.training.progress.num_updates
        if num_updates < self.next_update:
            return False
        due = [cadence for cadence in self._cadences if cadence.is_due(run)]
        for cadence in due:
            cadence.restart(run)
        is_due = bool(due) or num_updates >= self._next_of_updates
        self._schedule(num_updates)
        return is_due

    def start_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self._sums = {}

    def take(self, moment: Moment, sums: WeightedSums, numbers: Mapping[str, float | torch.Tensor]) -> None:
        """Take the values that are due.

        Args:
            moment: When that is.
            sums: The weighted sum and total weight of each mean in the epoch so far, over all processes.
            numbers: Single numbers, by name.
        """
        copy = HostCopy([*(number for pair in sums.values() for number in pair), *numbers.values()])
        self._pending.append(_Taken(moment, list(sums), list(numbers), copy))

    def known(self, *, wait: bool) -> Iterator[StepValues]:
        """Yield what was taken, oldest first, each once.

        Args:
            wait: Whether to wait for the newest, if the device has not sent it yet.
        """
        while self._pending and (wait or len(self._pending) > 1 or self._pending[0].copy.is_on_host):
            taken = self._pending.popleft()
            numbers = iter(taken.copy.numbers())
            sums = {name: (next(numbers), next(numbers)) for name in taken.names_of_means}
            means = self._means_since(sums)
            yield StepValues(taken.moment, means | dict(zip(taken.names_of_numbers, numbers, strict=True)))

    def _means_since(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        before, self._sums = self._sums, sums
        means = {}
        for name, (total, weight) in sums.items():
            total_before, weight_before = before.get(name, (0.0, 0.0))
            if weight > weight_before:
                means[f"train_{name}_step"] = (total - total_before) / (weight - weight_before)
        return means

    def state_dict(self) -> StateDict:
        """Return the sums as of the last time. Nothing may be on its way from the device."""
        return {"sums": {name: list(pair) for name, pair in self._sums.items()}}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self._sums = {name: (total, weight) for name, (total, weight) in state_dict["sums"].items()}


def take_step_values(run: Run, epoch: int, optimizer: Any, device: torch.device) -> None:
    """Take the values of steps that are due in a run. Must be called on every process.

    Args:
        run: The run.
        epoch: The number of the epoch, from 1.
        optimizer: Has the learning rates.
        device: Where processes exchange tensors.
    """
    progress = run.training.progress
    sums: WeightedSums = run.training.epoch.sums()
    if run.config.is_distributed:
        sums = sum_over_processes(sums, device)
    numbers = learning_rates_of(optimizer)
    if run.gradient_norm is not None:
        numbers["gradient_norm"] = run.gradient_norm
    moment = Moment(epoch, progress.num_updates, progress.num_samples, time.time())
    run.training.recorder.take(moment, sums, numbers)


def learning_rates_of(optimizer: Any) -> dict[str, float | torch.Tensor]:
    """Return the learning rate of an optimizer, or that of each of its groups.

    Example:
        >>> import torch
        >>> learning_rates_of(torch.optim.SGD([torch.zeros(1)], lr=0.5))
        {'learning_rate': 0.5}
    """
    rates = [group["lr"] for group in getattr(optimizer, "param_groups", ()) if "lr" in group]
    return {f"learning_rate_{i}" if len(rates) > 1 else "learning_rate": rate for i, rate in enumerate(rates)}
