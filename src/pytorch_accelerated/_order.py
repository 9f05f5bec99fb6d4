"""The order of the data, and the seeds of loader workers, as functions of the run's seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pytorch_accelerated._data import num_batches_of
from pytorch_accelerated._rng import derive_seed, preserved_rng_state, seed_generators

_SHUFFLING_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class EpochRandomness:
    """Makes the order of a loader, and the seeds of its workers, functions of (seed, epoch).

    The samplers of PyTorch that shuffle get a generator of their own, alike on all processes, so that all agree on the
    order. The workers' seeds come from another one which differs between processes. Nothing is drawn from the global
    generators, which belong to the model.

    With several processes a sampler of the user's gives the same order on all of them, even if it draws from the global
    generators, so that together they see each sample once.

    Args:
        loader: The loader before it is prepared; anything that is no `DataLoader` is left alone. A generator which the
            user gave to a sampler keeps its own seed.
        process_index: Rank of this process.
        num_processes: How many there are.
    """

    def __init__(self, loader: Any, process_index: int, num_processes: int) -> None:
        self._process_index = process_index
        self._orders: list[_OwnGenerator] = []
        self._common_orders: list[CommonOrder] = []
        self._workers: _OwnGenerator | None = None
        if not isinstance(loader, DataLoader):
            return
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if isinstance(sampler, _SHUFFLING_SAMPLERS):
                self._own_order(sampler)
        if num_processes > 1:
            self._agree_on_order(loader)
        self._workers = loader.generator = _OwnGenerator()

    def _own_order(self, sampler: Any) -> None:
        if not isinstance(sampler.generator, _OwnGenerator):  # otherwise the loader serves another run
            sampler.generator = _OwnGenerator(sampler.generator)
        self._orders.append(sampler.generator)

    def _agree_on_order(self, loader: Any) -> None:
        batch_sampler = loader.batch_sampler
        if type(batch_sampler) is BatchSampler:
            if type(batch_sampler.sampler) not in (SequentialSampler, *_SHUFFLING_SAMPLERS):
                batch_sampler.sampler = self._common_order(batch_sampler.sampler)
        elif batch_sampler is not None:
            # `DataLoader` forbids this once it is made, lest its other arguments contradict it; here they do not.
            object.__setattr__(loader, "batch_sampler", self._common_order(batch_sampler))

    def _common_order(self, sampler: Any) -> Any:
        if num_batches_of(sampler) is None:
            return sampler  # it may be endless
        self._common_orders.append(CommonOrder(sampler))
        return self._common_orders[-1]

    def set_epoch(self, epoch: int, seed: int) -> None:
        """Stand before the first batch of ``epoch``, counted from 0, in a run with this ``seed``."""
        for generator in self._orders:
            given_seed = generator.given_seed
            generator.manual_seed(derive_seed(seed if given_seed is None else given_seed, "order", epoch))
        for order in self._common_orders:
            order.seed = derive_seed(seed, "order", epoch)
        if self._workers is not None:
            self._workers.manual_seed(derive_seed(seed, "workers", epoch, self._process_index))


class _OwnGenerator(torch.Generator):
    """A generator in the place of the user's, which it leaves as it is but for remembering its seed."""

    given_seed: int | None

    def __new__(cls, given: torch.Generator | None = None) -> _OwnGenerator:
        generator = super().__new__(cls)
        generator.given_seed = None if given is None else given.initial_seed()
        return generator


class CommonOrder:
    """A sampler, or batch sampler, of the user's that gives the same on every process.

    Args:
        sampler: The sampler; what else it offers is passed through.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.seed = 0

    def __iter__(self) -> Iterator[Any]:
        with preserved_rng_state():
            seed_generators(self.seed)
            indices = list(self.sampler)
        return iter(indices)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # asked for by copy and pickle before it is set
            raise AttributeError(name)
        return getattr(self.sampler, name)
