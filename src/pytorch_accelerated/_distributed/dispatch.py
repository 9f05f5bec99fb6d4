"""Data that one process reads for all: streams, whose samples have no indices that could be divided."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from pytorch_accelerated._data.sharding import Sharding
from pytorch_accelerated._distributed.collectives import broadcast_batches
from pytorch_accelerated._distributed.fast_path import FastPathLoader, batches_of
from pytorch_accelerated._tensors.nested import move_to_device
from pytorch_accelerated._types import Batch


class DispatchedLoader(FastPathLoader):
    """A loader whose batches the main process reads for all ranks: at each step the next ``num_processes``, one each.

    The batches may contain anything, and differ in size. If fewer batches than ranks are left for the last step, a rank
    without one repeats its last batch as a dummy batch, which must count for nothing.

    Args:
        dataset: Yields batches.
        device: Where the batches are moved to; ``None`` to leave them where they arrive.
        process_index: Rank of this process.
        num_processes: Number of ranks.
        rank_device: The device of this process, which takes part in the exchange.
        drop_last: Whether the last step is left out if it has fewer batches than ranks.
        **kwargs: Further arguments of a `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        *,
        process_index: int,
        num_processes: int,
        rank_device: torch.device,
        drop_last: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, device, **kwargs)
        self._rank, self._num_processes = process_index, num_processes
        self._rank_device = rank_device
        self._drops_last_step = drop_last
        self._sharding = Sharding()

    @property
    def sharding(self) -> Sharding:
        """The object that knows the dummy step."""
        return self._sharding

    def _read(self) -> Iterator[Batch]:
        first_step = self._sharding.start()
        batches = iter(batches_of(self.base_dataloader) if self._rank == 0 else ())
        local: Batch = None
        for step in itertools.count(first_step):
            group = broadcast_batches(
                lambda: list(itertools.islice(batches, self._num_processes)),
                self._rank == 0,
                self._num_processes,
                self._rank_device,
            )
            if not group or (self._drops_last_step and len(group) < self._num_processes):
                return
            if self._rank < len(group):
                local = group[self._rank]
            else:
                self._sharding.dummy_step = step
                local = group[0] if local is None else local
            yield local if self.device is None else move_to_device(local, self.device)

    def __len__(self) -> int:
        num_steps = super().__len__() / self._num_processes
        return math.floor(num_steps) if self._drops_last_step else math.ceil(num_steps)
