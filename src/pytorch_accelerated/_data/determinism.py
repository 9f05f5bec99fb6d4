"""The order of the data, and all randomness in loading it, as functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
    get_worker_info,
)

from pytorch_accelerated._data.in_memory import WholeBatchDataset, sliceable_tensors, unchanged
from pytorch_accelerated._data.loaders import has_state, is_stream, loader_settings
from pytorch_accelerated._data.rng import RandomStream, derive_seed, seed_host_generators, seeded_host_generators
from pytorch_accelerated._data.streams import TrackedStream
from pytorch_accelerated._data.workers import WorkerSetup
from pytorch_accelerated._proxy import Proxy

if TYPE_CHECKING:
    pass


class SeededDataset(Proxy, Dataset[Any], wraps="dataset"):
    """Gives a `DataLoader` whole batches, whose randomness is a function of (seed, epoch, first index).

    Whatever dataset and collation draw from the global generators, it is the same in any worker, and after a resume in
    the midst of the epoch. In the main process the generators are put back afterwards.

    Args:
        dataset: The dataset; what else it offers is passed through.
        collate_fn: Makes a batch of samples.
        has_workers: Whether other processes need to learn the seed of a new epoch.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], has_workers: bool) -> None:
        self.dataset = dataset
        self._collate = collate_fn
        self._seed = torch.zeros(1, dtype=torch.int64)
        if has_workers:
            self._seed.share_memory_()  # type: ignore[no-untyped-call]

    def set_seed(self, seed: int) -> None:
        """Begin an epoch, also in the workers."""
        self._seed.fill_(seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._with_own_randomness(index, lambda: self._collate(self.dataset[index]))

    def __getitems__(self, indices: Iterable[Any]) -> Any:
        """Return the batch of the samples at ``indices``."""
        first = next(iter(indices), None)
        return self._with_own_randomness(first, lambda: self._collate(self._samples_at(indices)))

    def _samples_at(self, indices: Iterable[Any]) -> Any:
        get_many = getattr(self.dataset, "__getitems__", None)
        return get_many(indices) if callable(get_many) else [self.dataset[index] for index in indices]

    def _with_own_randomness(self, index: Any, load: Callable[[], Any]) -> Any:
        seed = derive_seed(int(self._seed), index)
        if get_worker_info() is not None:  # nothing else draws there
            seed_host_generators(seed)
            return load()
        with seeded_host_generators(seed):
            return load()


def uses_no_randomness(loader: DataLoader[Any]) -> bool:
    """Tell whether loading is known to draw nothing at random: data in memory, collated as PyTorch does it."""
    dataset: Any = loader.dataset
    is_in_memory = isinstance(dataset, (WholeBatchDataset, list, tuple)) or sliceable_tensors(dataset) is not None
    return is_in_memory and loader.collate_fn in (default_collate, default_convert, unchanged)


def keeps_every_sample(loader: DataLoader[Any]) -> bool:
    """Tell whether a batch is known to have as many rows as there are indices in it."""
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    is_whole = isinstance(dataset, WholeBatchDataset) and loader.collate_fn is unchanged
    is_collated = loader.collate_fn is default_collate and not hasattr(dataset, "__getitems__")
    return is_whole or is_collated


_SHUFFLING_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


_KNOWN_SAMPLERS = (SequentialSampler, *_SHUFFLING_SAMPLERS)


class SeededLoader:
    """Makes the order of a loader, and what is drawn at random while loading, functions of (seed, epoch).

    The samplers of PyTorch that shuffle get a generator of their own, and the user's samplers a stream of the global
    generators of their own, alike on all processes, so that all agree on the order. What dataset and collation draw
    from the global generators is a function of the batch, too, whichever worker loads it. Nothing is drawn from the
    global generators as they are outside, which belong to the model.

    Args:
        loader: The loader before it is prepared; it stays as it is but for the generators of its samplers. A generator
            which the user gave to a sampler keeps its own seed.
        process_index: Rank of this process.
        num_batches_per_step: How many of its batches a step takes, if it is a stream that all processes share.
    """

    def __init__(self, loader: Any, process_index: int, num_batches_per_step: int = 1) -> None:
        self.loader = loader
        """The loader to use in the place of the given one."""

        self.stream: TrackedStream | None = None
        """What the loader reads from, if its position can be stored."""

        self.gives_full_batches = False
        """Whether all batches are known to be of the loader's batch size, but for the last."""

        self._process_index = process_index
        self._orders: list[SeededGenerator] = []
        self._own_streams: list[SeededSampler] = []
        self._samples: SeededDataset | None = None
        self._workers: SeededGenerator | None = None
        self._worker_setup: WorkerSetup | None = None
        if isinstance(loader, DataLoader):
            self._take_over(loader, num_batches_per_step)
        elif has_state(loader):
            self.loader = self.stream = TrackedStream(loader, 1)

    def _take_over(self, loader: DataLoader[Any], num_batches_per_step: int) -> None:
        self._workers = SeededGenerator()
        self._worker_setup = WorkerSetup(loader.worker_init_fn, loader.num_workers > 0)
        settings = loader_settings(loader) | {"generator": self._workers, "worker_init_fn": self._worker_setup}
        if is_stream(loader):
            settings |= self._take_over_stream(loader, num_batches_per_step)
        else:
            settings |= self._take_over_samples(loader) | self._take_over_order(loader)
        self.loader = DataLoader(**settings)

    def _take_over_stream(self, loader: DataLoader[Any], num_batches_per_step: int) -> dict[str, Any]:
        dataset: Any = loader.dataset
        if has_state(dataset) and loader.num_workers == 0:
            dataset = self.stream = TrackedStream(dataset, (loader.batch_size or 1) * num_batches_per_step)
        return {"dataset": dataset, "batch_size": loader.batch_size, "drop_last": loader.drop_last}

    def _take_over_samples(self, loader: DataLoader[Any]) -> dict[str, Any]:
        if uses_no_randomness(loader):
            return {"dataset": loader.dataset}
        self._samples = SeededDataset(loader.dataset, loader.collate_fn, loader.num_workers > 0)
        return {"dataset": self._samples, "collate_fn": unchanged}

    def _take_over_order(self, loader: DataLoader[Any]) -> dict[str, Any]:
        batch_sampler: Any = loader.batch_sampler
        sampler: Any = loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None)
        if isinstance(sampler, _SHUFFLING_SAMPLERS):
            self._orders.append(SeededGenerator.of(sampler))
        is_known = type(sampler) in _KNOWN_SAMPLERS and type(batch_sampler) in (BatchSampler, type(None))
        self.gives_full_batches = is_known and keeps_every_sample(loader)
        order = sampler if batch_sampler is None else batch_sampler
        if not is_known:
            order = SeededSampler(order)
            self._own_streams.append(order)
        return {"batch_size": None, "sampler": order} if batch_sampler is None else {"batch_sampler": order}

    def set_epoch(self, epoch: int, seed: int) -> None:
        """Stand before the first batch of ``epoch``, counted from 0, in a run with this ``seed``."""
        for generator in self._orders:
            given_seed = generator.given_seed
            generator.manual_seed(derive_seed(seed if given_seed is None else given_seed, "order", epoch))
        for order in self._own_streams:
            order.seed = derive_seed(seed, "order", epoch)
        if self._samples is not None:
            self._samples.set_seed(derive_seed(seed, "samples", epoch))
        if self._workers is not None:
            self._workers.manual_seed(derive_seed(seed, "workers", epoch, self._process_index))

    def end_run(self) -> None:
        """Let the workers go when they are told to."""
        if self._worker_setup is not None:
            self._worker_setup.end_run()


class SeededGenerator(torch.Generator):
    """A generator in the place of the user's, which it leaves as it is but for remembering its seed."""

    given_seed: int | None

    def __new__(cls, given: torch.Generator | None = None) -> SeededGenerator:
        generator = super().__new__(cls)
        generator.given_seed = None if given is None else given.initial_seed()
        return generator

    @staticmethod
    def of(sampler: Any) -> SeededGenerator:
        """Return the one that a sampler has, or gets now."""
        if not isinstance(sampler.generator, SeededGenerator):  # otherwise the sampler has served another run
            sampler.generator = SeededGenerator(sampler.generator)
        return sampler.generator


class SeededSampler(Proxy, wraps="sampler"):
    """A sampler, or batch sampler, of the user's that draws from a stream of its own in place of the global generators.

    Args:
        sampler: The sampler; what else it offers is passed through.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.seed = 0

    def __iter__(self) -> Iterator[Any]:
        stream = RandomStream(self.seed)
        nothing = object()
        with stream:
            items = iter(self.sampler)
        while True:
            with stream:
                item = next(items, nothing)
            if item is nothing:
                return
            yield item

    def __len__(self) -> int:
        return len(self.sampler)
