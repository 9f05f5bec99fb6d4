"""Data of its own for each process: all make equally many steps, however many batches each of them has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import distributed

from pytorch_accelerated._data.loaders import reliable_num_batches_of
from pytorch_accelerated._data.sharding import Sharding
from pytorch_accelerated._distributed.collectives import all_gather_objects, host_group
from pytorch_accelerated._distributed.fast_path import FastPathLoader, batches_of
from pytorch_accelerated._proxy import Proxy
from pytorch_accelerated._types import Batch


class LocalLoader(FastPathLoader):
    """A loader of the data of this process alone, which makes as many steps as those of the other processes.

    Args:
        dataset: The dataset.
        device: Where the batches are moved to; ``None`` to leave them where they are loaded.
        num_processes: Number of ranks.
        num_steps: Number of steps in an epoch; ``None`` if it is not known.
        sharding: Knows the dummy steps; ``None`` to create one.
        **kwargs: Further arguments of a `DataLoader`.
    """

    has_certain_length = False
    """Other processes may have more batches."""

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        *,
        num_processes: int,
        num_steps: int | None,
        sharding: Sharding | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, device, **kwargs)
        self._num_processes, self._num_steps = num_processes, num_steps
        self._sharding = Sharding() if sharding is None else sharding
        self._complete: LocalLoader = self

    @property
    def sharding(self) -> Sharding:
        """The object that knows the dummy steps."""
        return self._sharding

    def skip_first(self, num_batches: int) -> LocalLoader:
        """Return a loader for the rest of an epoch, which does not load the first batches."""
        rest: LocalLoader = super().skip_first(num_batches)
        rest._complete = self
        rest._sharding.first_step = num_batches
        return rest

    def _create(self, dataset: Any, **kwargs: Any) -> LocalLoader:
        return LocalLoader(
            dataset,
            self.device,
            num_processes=self._num_processes,
            num_steps=self._num_steps,
            sharding=self._sharding,
            **kwargs,
        )

    def _read(self) -> Iterator[Batch]:
        complete, base = self._complete.base_dataloader, self.base_dataloader
        num_batches = reliable_num_batches_of(complete)
        yield from in_lockstep(
            batches_of(base), num_batches, self._num_processes, self._sharding, lambda: batches_of(complete)
        )

    def __len__(self) -> int:
        return _known(self._num_steps)


class LocalBatches(Proxy, wraps="batches"):
    """The batches of this process alone, in as many steps as the other processes make.

    Args:
        batches: Any iterable of batches.
        num_processes: Number of ranks.
        num_steps: Number of steps in an epoch; ``None`` if it is not known.
    """

    def __init__(self, batches: Any, num_processes: int, num_steps: int | None) -> None:
        self.batches = batches
        self.num_processes = num_processes
        self.num_steps = num_steps
        self.sharding = Sharding()

    def __iter__(self) -> Iterator[Batch]:
        num_batches = reliable_num_batches_of(self.batches)
        return in_lockstep(self.batches, num_batches, self.num_processes, self.sharding, lambda: self.batches)

    def __len__(self) -> int:
        return _known(self.num_steps)


def _known(num_steps: int | None) -> int:
    if num_steps is None:
        raise TypeError("The number of steps is not known, because a process has data without a length.")
    return num_steps


def in_lockstep(
    batches: Iterable[Batch],
    num_batches: int | None,
    num_processes: int,
    sharding: Sharding,
    start_again: Callable[[], Iterable[Batch]],
) -> Iterator[Batch]:
    """Yield batches until no process has one left; a process without one repeats its last as a dummy batch.

    Must be called on every process. If all know their numbers of batches, they exchange them once, otherwise at each
    step whether they have another one.

    Args:
        batches: The batches of this process.
        num_batches: How many it has in a complete epoch, if that is certain.
        num_processes: Number of ranks.
        sharding: Is told from which step on the batches are dummies.
        start_again: Returns the batches of a complete epoch, of which the first may have to serve as a dummy.

    Raises:
        ValueError: A process has no batch at all; raised on every process.
    """
    first_step, remaining, nothing = sharding.start(), iter(batches), object()
    numbers = all_gather_objects(num_batches, num_processes)
    num_steps = None if None in numbers else max(number for number in numbers if number is not None)
    local: Any = nothing
    for step in itertools.count(first_step):
        batch = next(remaining, nothing)
        if num_steps is None or step == 0:
            num_ranks = _count_ranks(batch is not nothing)
            if step == 0 and 0 < num_ranks < num_processes:
                raise ValueError(
                    f"{num_processes - num_ranks} of the {num_processes} processes have no batch at all. Each process "
                    "needs at least one: give all processes the same data, or at least one batch to each."
                )
            if num_ranks == 0:
                return
        if num_steps is not None and step >= num_steps:
            return
        if batch is nothing:
            sharding.dummy_step = step if sharding.dummy_step is None else sharding.dummy_step
            batch = next(iter(start_again())) if local is nothing else local
        yield batch
        local = batch


def _count_ranks(is_counted: bool) -> int:
    count = torch.tensor([float(is_counted)])
    distributed.all_reduce(count, group=host_group())
    return int(count.item())
