"""Sharding: how several processes share the samples of an epoch, each sample once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pytorch_accelerated._nested import find_batch_size, first_rows, repeat_rows
from pytorch_accelerated._proxy import Proxy


class ShardedBatchSampler(Proxy, wraps="batch_sampler"):
    """The batches of one process, out of those that all processes take together.

    At each step the processes take the next ``num_processes`` batches, one each, in the order of their ranks. What is
    left at the end for less than a batch each is divided evenly, so that every sample is used once and all processes
    make the same number of steps. If even that leaves a process without a sample, it gets a *stand-in*, some batch that
    was used before, so that it can take part in what the processes do together; it has to count for nothing.

    Args:
        batch_sampler: Gives lists of indices, the same on every process.
        num_processes: How many processes share them.
        process_index: Rank of this process.

    Example:
        >>> [list(ShardedBatchSampler([[0, 1], [2, 3], [4, 5], [6]], 3, rank)) for rank in range(3)]
        [[[0, 1], [6]], [[2, 3], [2, 3]], [[4, 5], [4, 5]]]
    """

    def __init__(self, batch_sampler: Any, num_processes: int, process_index: int) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.batch_size = getattr(batch_sampler, "batch_size", None)
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        self.dummy_step: int | None = None
        """Index of the step whose batch is a stand-in; known when that batch has been given."""

    def __iter__(self) -> Iterator[list[int]]:
        self.dummy_step = None
        batches = iter(self.batch_sampler)
        own: list[int] = []
        for step in itertools.count():
            group = list(itertools.islice(batches, self.num_processes))
            if len(group) == self.num_processes:
                own = group[self.process_index]
                yield own
                continue
            if group and not self.drop_last:
                yield self._part_of_rest(group, step, own)
            return

    def _part_of_rest(self, group: list[list[int]], step: int, last_own: list[int]) -> list[int]:
        rest = [index for batch in group for index in batch]
        ranks = (self.process_index, self.process_index + 1)
        start, end = (math.ceil(len(rest) * rank / self.num_processes) for rank in ranks)
        if start == end:
            self.dummy_step = step
            return last_own or group[0]
        return rest[start:end]

    def __len__(self) -> int:
        num_groups = len(self.batch_sampler) / self.num_processes
        return math.floor(num_groups) if self.drop_last else math.ceil(num_groups)


class TrimmedDispatcher(Proxy, wraps="loader"):
    """A loader of Accelerate's whose main process reads the data for all, without what fills up its last step.

    Accelerate deals the rows of each step out evenly, the last with rows of the first step added. These are cut off
    again; a process that is left without a row keeps its batch as a stand-in, as in `ShardedBatchSampler`.

    Args:
        loader: An `accelerate.data_loader.DataLoaderDispatcher`.
        process_index: Rank of this process.
    """

    def __init__(self, loader: Any, process_index: int) -> None:
        self.loader = loader
        self.process_index = process_index
        self.dummy_step: int | None = None
        """Index of the step whose batch is a stand-in; known when that batch has been given."""

        self._slice = loader.slice_fn
        loader.slice_fn = self._slice_or_repeat

    @property
    def share(self) -> TrimmedDispatcher:
        """What knows about stand-ins: this object."""
        return self

    def __iter__(self) -> Iterator[Any]:
        self.dummy_step = None
        for step, batch in enumerate(self.loader):
            yield self._without_filling(batch, step) if self.loader.end_of_dataloader else batch

    def _without_filling(self, batch: Any, step: int) -> Any:
        num_rows = find_batch_size(batch)
        num_real = self.loader.remainder - self.process_index * num_rows
        if num_real >= num_rows:
            return batch
        if num_real <= 0:
            self.dummy_step = step
            return batch
        return first_rows(batch, num_rows, num_real)

    def _slice_or_repeat(self, batch: Any, rows: slice, **kwargs: Any) -> Any:
        num_rows = find_batch_size(batch)
        # Of a first step with less than a row each, Accelerate would take too little to fill up with.
        return repeat_rows(batch, num_rows, rows.stop) if rows.stop > num_rows else self._slice(batch, rows, **kwargs)

    def __len__(self) -> int:
        return len(self.loader)


def sharding_of(loader: Any) -> ShardedBatchSampler | TrimmedDispatcher | None:
    """Return what knows which step of a loader has a stand-in for its batch; ``None`` if none has."""
    share = getattr(loader, "share", None)
    return share if isinstance(share, (ShardedBatchSampler, TrimmedDispatcher)) else None


def without_samples(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a batch, and what its step returned, as callbacks should see them of a stand-in: without a sample."""
    batch_size = int(batch_output["batch_size"])
    emptied = dict(first_rows(batch_output, batch_size, 0))
    counts = {name: emptied[name] * 0 for name in ("batch_size", "num_items_in_batch") if name in emptied}
    return first_rows(batch, batch_size, 0), emptied | counts
