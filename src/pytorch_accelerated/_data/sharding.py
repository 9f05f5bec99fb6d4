"""Sharding: the ranks divide the samples of an epoch among them, and use each sample once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import BatchSampler

from pytorch_accelerated._data.division import check_same_order
from pytorch_accelerated._data.draws import Draw, as_collection
from pytorch_accelerated._proxy import Proxy, unwrap
from pytorch_accelerated._tensors.nested import count_rows, first_rows, repeat_rows


class Sharding:
    """Knows which steps of an epoch have a dummy batch on this rank; known once such a batch was yielded."""

    dummy_step: int | None = None
    """Index of the first step whose batch is a dummy; all that follow are dummies too. ``None`` if there is none."""

    first_step: int = 0
    """Index of the first step of the next iteration, which is not 0 if it continues within an epoch."""

    def start(self) -> int:
        """Start an iteration, and return the index of its first step."""
        first_step, self.first_step = self.first_step, 0
        self.dummy_step = None
        return first_step

    def is_dummy(self, step: int) -> bool:
        """Tell whether the batch of a step is a dummy batch."""
        return self.dummy_step is not None and step >= self.dummy_step


class ShardedBatchSampler(Sharding, Proxy, wraps="batch_sampler"):
    """The batches of one rank, out of the batches of all ranks.

    At each step the ranks take the next ``num_processes`` batches, one each, in the order of their ranks. If fewer
    batches remain at the end, or the last one is smaller than the others, their samples are divided evenly, over as
    many ranks as can get at least two: a batch norm cannot train on a single sample. Where the user's batch sampler
    decides how many samples a batch has, and each rank gets a batch, they are left as they are. Every sample is used
    once, and all ranks make the same number of steps. A rank without a sample yields a *dummy batch*: a batch that was
    used before, so that the rank can take part in collective operations. It must count for nothing.

    Args:
        batch_sampler: Yields lists of indices, identical on every rank.
        num_processes: Number of ranks.
        process_index: Rank of this process.
        is_active: Whether the batches are sharded already. Otherwise each rank yields all batches until `activate` is
            called.
        gather: Returns the values of all processes, to make sure that they draw the same samples; ``None`` to trust it.

    Example:
        >>> [list(ShardedBatchSampler([[0, 1], [2, 3], [4, 5], [6]], 3, rank)) for rank in range(3)]
        [[[0, 1], [6]], [[2, 3], [2, 3]], [[4, 5], [4, 5]]]
        >>> batches = BatchSampler(range(5), 4, drop_last=False)
        >>> [list(ShardedBatchSampler(batches, 2, rank)) for rank in range(2)]
        [[[0, 1, 2]], [[3, 4]]]
    """

    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int,
        process_index: int,
        is_active: bool = True,
        gather: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.batch_size = getattr(batch_sampler, "batch_size", None)
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        self._is_active = is_active
        self._gather = gather

    def activate(self) -> None:
        """Shard the batches from the next epoch on."""
        self._is_active = True

    @property
    def fixed_size(self) -> int | None:
        """The size of all batches but the last; ``None`` unless PyTorch's own `BatchSampler` makes them."""
        order = self.batch_sampler
        while isinstance(order, Proxy):
            order = unwrap(order)
        return order.batch_size if type(order) is BatchSampler else None

    def __iter__(self) -> Iterator[Sequence[int]]:
        self.start()
        return self._shard() if self._is_active else iter(self.batch_sampler)

    def _shard(self) -> Iterator[Sequence[int]]:
        batches = iter(self.batch_sampler)
        local: Sequence[int] = []
        full_size = self.fixed_size or 0
        for step in itertools.count():
            group = [as_collection(batch) for batch in itertools.islice(batches, self.num_processes)]
            if self._gather is not None:
                check_same_order(group, self._gather)
                self._gather = None
            if len(group) == self.num_processes and len(group[-1]) >= full_size:
                local = group[self.process_index]
                yield local
                continue
            if group and not self.drop_last:
                yield self._part_of_rest(group, step, local)
            return

    def _part_of_rest(self, group: list[Sequence[int]], step: int, last_local: Sequence[int]) -> Sequence[int]:
        rest = [index for batch in group for index in batch]
        number = getattr(group[0], "number", None)
        part = rest[part_of_rest(len(rest), max(map(len, group)), self.num_processes, self.process_index)]
        if not part:
            self.dummy_step = step
            return last_local if len(last_local) else group[0]
        return part if number is None else Draw(number + self.process_index, part)

    def __len__(self) -> int:
        if not self._is_active:
            return len(self.batch_sampler)
        num_groups = len(self.batch_sampler) / self.num_processes
        return math.floor(num_groups) if self.drop_last else math.ceil(num_groups)


def part_of_rest(num_samples: int, batch_size: int, num_processes: int, process_index: int) -> slice:
    """Return which of the samples that do not fill a step a rank gets. For a rank that gets none, the slice is empty.

    Example:
        >>> [part_of_rest(5, 4, 3, rank) for rank in range(3)]
        [slice(0, 3, None), slice(3, 5, None), slice(5, 5, None)]
    """
    num_ranks = max(math.ceil(num_samples / batch_size), min(num_processes, num_samples // 2))
    ranks = (min(rank, num_ranks) for rank in (process_index, process_index + 1))
    return slice(*(math.ceil(num_samples * rank / num_ranks) for rank in ranks))


class TrimmedDispatcher(Sharding, Proxy, wraps="loader"):
    """A loader of Accelerate whose main process reads the data for all ranks, without the rows that fill its last step.

    Accelerate divides the rows of each step evenly, and adds rows of the first step to the last one. They are removed
    here. A rank left without a row keeps its batch as a dummy batch, as with `ShardedBatchSampler`.

    Args:
        loader: An `accelerate.data_loader.DataLoaderDispatcher`.
        process_index: Rank of this process.
    """

    def __init__(self, loader: Any, process_index: int) -> None:
        self.loader = loader
        self.process_index = process_index
        self._slice = loader.slice_fn
        loader.slice_fn = self._slice_or_repeat

    @property
    def sharding(self) -> TrimmedDispatcher:
        """The object that knows the dummy step: this one."""
        return self

    def __iter__(self) -> Iterator[Any]:
        for step, batch in enumerate(self.loader, self.start()):
            yield self._without_added_rows(batch, step) if self.loader.end_of_dataloader else batch

    def _without_added_rows(self, batch: Any, step: int) -> Any:
        num_rows = count_rows(batch)
        num_real = self.loader.remainder - self.process_index * num_rows
        if num_real >= num_rows:
            return batch
        if num_real <= 0:
            self.dummy_step = step
            return batch
        return first_rows(batch, num_rows, num_real)

    def _slice_or_repeat(self, batch: Any, rows: slice, **kwargs: Any) -> Any:
        num_rows = count_rows(batch)
        # Accelerate adds too few rows if the first step has fewer rows than there are ranks.
        return repeat_rows(batch, num_rows, rows.stop) if rows.stop > num_rows else self._slice(batch, rows, **kwargs)

    def __len__(self) -> int:
        return len(self.loader)


class ShardedBatches(Sharding, Proxy, wraps="batches"):
    """The batches of one rank, out of an iterable that yields the same batches on every rank.

    At each step the ranks take the next ``num_processes`` batches, one each. At the end, a rank for which none is left
    repeats its last one as a dummy batch.

    Args:
        batches: Any iterable of batches.
        num_processes: Number of ranks.
        process_index: Rank of this process.
        is_active: Whether the batches are sharded already. Otherwise each rank yields all batches until `activate` is
            called.
    """

    def __init__(self, batches: Any, num_processes: int, process_index: int, is_active: bool = True) -> None:
        self.batches = batches
        self.num_processes = num_processes
        self.process_index = process_index
        self._is_active = is_active

    def activate(self) -> None:
        """Shard the batches from the next epoch on."""
        self._is_active = True

    @property
    def sharding(self) -> ShardedBatches:
        """The object that knows the dummy step: this one."""
        return self

    def __iter__(self) -> Iterator[Any]:
        first_step = self.start()
        return self._shard(first_step) if self._is_active else iter(self.batches)

    def _shard(self, first_step: int) -> Iterator[Any]:
        batches = iter(self.batches)
        local: Any = None
        for step in itertools.count(first_step):
            group = list(itertools.islice(batches, self.num_processes))
            if not group:
                return
            if self.process_index < len(group):
                local = group[self.process_index]
            else:
                self.dummy_step = step
                local = group[0] if local is None else local
            yield local

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.num_processes) if self._is_active else len(self.batches)


def sharding_of(loader: Any) -> Sharding | None:
    """Return the object that knows which steps of a loader have a dummy batch; ``None`` if no step can have one."""
    sharding = getattr(loader, "sharding", None)
    return sharding if isinstance(sharding, Sharding) else None


def start_at(loader: Any, step: int) -> None:
    """Let the next iteration over a loader start with a step of this index, because its source continues there."""
    sharding = sharding_of(loader)
    if sharding is not None:
        sharding.first_step = step


def without_samples(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a dummy batch, and the result of its step, as callbacks should see them: with 0 samples."""
    batch_size = int(batch_output["batch_size"])
    emptied = dict(first_rows(batch_output, batch_size, 0))
    counts = {name: emptied[name] * 0 for name in ("batch_size", "num_items_in_batch") if name in emptied}
    return first_rows(batch, batch_size, 0), emptied | counts
