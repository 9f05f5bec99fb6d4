"""The order of the data, and all randomness in loading it, as functions of seed and epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
    get_worker_info,
)

from pytorch_accelerated._data.draws import number_of
from pytorch_accelerated._data.in_memory import WholeBatchDataset, sliceable_tensors, unchanged
from pytorch_accelerated._data.loaders import keep_generator_of, show_arguments_of
from pytorch_accelerated._data.rng import RandomStream, derive_seed, seed_host_generators, seeded_host_generators
from pytorch_accelerated._data.samplers import OrderState, set_epoch_of
from pytorch_accelerated._data.streams import TrackedStream
from pytorch_accelerated._data.workers import WorkerSetup
from pytorch_accelerated._proxy import Proxy, unwrap


class Seeded(Protocol):
    """A source of randomness that is a function of seed and epoch."""

    def seed_epoch(self, epoch: int, seed: int, run_number: int = 0) -> None:
        """Prepare for the start of ``epoch``, counted from 0, in a run with this ``seed`` and number."""


class SeededLoader:
    """A loader whose order and random draws are functions of (seed, epoch). `rebuild_loader` creates it.

    Args:
        loader: The loader of the run.
        sources: All sources of randomness in it.
        worker_setup: What its workers run at their start; ``None`` if it is not a `DataLoader`.
        stream: What it reads from, if its position can be stored.
        yields_full_batches: Whether all batches, except the last, are known to have the loader's batch size.
        given: The user's loader that it was built from; ``None`` if the user's loader is used itself.
    """

    def __init__(
        self,
        loader: Any,
        sources: Sequence[Seeded] = (),
        worker_setup: WorkerSetup | None = None,
        stream: TrackedStream | None = None,
        yields_full_batches: bool = False,
        given: DataLoader[Any] | None = None,
    ) -> None:
        self.loader = loader
        self.stream = stream
        self.yields_full_batches = yields_full_batches
        self._sources = sources
        self._worker_setup = worker_setup
        self._given = given
        self.order_state = OrderState(loader if given is None else given)

    @property
    def draws_while_loading(self) -> bool:
        """Whether samples may be drawn at random while they are loaded, or changed."""
        return any(isinstance(source, _SeededLoading) for source in self._sources)

    @property
    def replaces_generators(self) -> bool:
        """Whether the global generators are replaced while it loads, in this process or for the user's samplers."""
        return any(not isinstance(source, SeededGenerator) for source in self._sources)

    def show_users_arguments(self, prepared: Any) -> None:
        """Let ``dataset`` and functions of the prepared loader be the user's, whatever it reads from inside.

        Args:
            prepared: What Accelerate made of the loader. One that a subclass has put in its place is left alone.
        """
        if self._given is not None and getattr(prepared, "worker_init_fn", None) is self._worker_setup:
            keep_generator_of(self.loader, prepared)
            show_arguments_of(self._given, prepared)

    def set_epoch(self, epoch: int, seed: int, run_number: int = 0) -> None:
        """Go to the start of ``epoch``, counted from 0, in a run with this ``seed`` and number."""
        for source in self._sources:
            source.seed_epoch(epoch, seed, run_number)
        set_epoch_of(self.loader if self._given is None else self._given, epoch)
        self.order_state.start_epoch()

    def end_run(self) -> None:
        """Allow the workers to exit when they are told to, and leave the user's samplers as they were."""
        for source in self._sources:
            if isinstance(source, SeededGenerator):
                source.give_back()
        if self._worker_setup is not None:
            self._worker_setup.end_run()


# --- what is drawn while samples are loaded ----------------------------------------------------------------------


class _SeededLoading:
    """Loads batches whose random numbers are a function of (seed, epoch, place in the epoch).

    Whatever dataset and collation draw from the global generators is the same in any worker, and after a mid-epoch
    resume. In the main process, the state of the generators is restored afterwards.

    Args:
        dataset: The dataset. Its other attributes are passed through.
        collate_fn: Collates samples to a batch.
        has_workers: Whether other processes need to learn the seed of a new epoch.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], has_workers: bool) -> None:
        self.dataset = dataset
        self._collate = collate_fn
        self._seed = torch.zeros(1, dtype=torch.int64)
        if has_workers:
            self._seed.share_memory_()  # type: ignore[no-untyped-call]

    def seed_epoch(self, epoch: int, seed: int, run_number: int = 0) -> None:
        """Prepare for the start of an epoch, also in the workers."""
        self._seed.fill_(derive_seed(seed, "samples", epoch))

    def _load_seeded(self, place: int | str, load: Callable[[], Any]) -> Any:
        seed = derive_seed(int(self._seed), place)
        try:
            if get_worker_info() is not None:  # in a worker, nothing else draws
                seed_host_generators(seed)
                return load()
            with seeded_host_generators(seed):
                return load()
        except StopIteration as error:
            raise RuntimeError(
                f"The {type(unwrap(self.dataset)).__name__}, or its collate function, raised `StopIteration`. A loader "
                "takes it for the end of the data, and would leave out the rest of the epoch. It comes from a call of "
                "`next` on an exhausted iterator. Pass `next` a default, or start the iterator again."
            ) from error


class SeededDataset(_SeededLoading, Proxy, Dataset[Any], wraps="dataset"):
    """Gives a `DataLoader` whole batches of a map-style dataset, seeded by the number of the `Draw`.

    An index that is drawn again gets new random numbers.
    """

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        number, index = number_of(index)
        return self._load_seeded(number, lambda: self._collate(self.dataset[index]))

    def __getitems__(self, indices: Iterable[Any]) -> Any:
        """Return the batch of the samples at ``indices``."""
        number, indices = number_of(indices)
        return self._load_seeded(number, lambda: self._collate(self._samples_at(indices)))

    def _samples_at(self, indices: Iterable[Any]) -> Any:
        get_many = getattr(self.dataset, "__getitems__", None)
        return get_many(indices) if callable(get_many) else [self.dataset[index] for index in indices]


_NO_BATCH = object()


class SeededStream(_SeededLoading, Proxy, IterableDataset[Any], wraps="dataset"):
    """Gives a `DataLoader` whole batches of an iterable dataset, seeded by their number, and the worker.

    Args:
        dataset: The dataset. Its other attributes are passed through.
        collate_fn: Collates samples to a batch.
        has_workers: Whether other processes need to learn the seed of a new epoch.
        batch_size: Samples in a batch; ``None`` if the dataset yields batches.
        drop_last: Whether a last batch with fewer samples is left out.
        rank: The rank, if each rank reads its own stream.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any],
        has_workers: bool,
        batch_size: int | None,
        drop_last: bool,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, collate_fn, has_workers)
        self._rank = rank
        self._samples_per_batch = batch_size
        self._drop_last = drop_last

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        reader = f"rank {self._rank}/{'main' if worker is None else f'worker {worker.id}'}"
        num_done = self.dataset.num_items_done if isinstance(self.dataset, TrackedStream) else 0
        samples: Iterator[Any] = self._load_seeded(f"{reader}/start", lambda: iter(self.dataset))
        for number in itertools.count(num_done // (self._samples_per_batch or 1)):
            batch = self._load_seeded(f"{reader}/{number}", lambda: self._next_batch(samples))
            if batch is _NO_BATCH:
                return
            yield batch

    def _next_batch(self, samples: Iterator[Any]) -> Any:
        items: list[Any] = []
        for _ in range(self._samples_per_batch or 1):
            item = next(samples, _NO_BATCH)
            if item is _NO_BATCH:
                break
            items.append(item)
        if not items or (self._drop_last and len(items) < (self._samples_per_batch or 1)):
            return _NO_BATCH
        return self._collate(items[0] if self._samples_per_batch is None else items)

    def count_batches(self) -> int:
        """Return the number of batches, as far as the length of the dataset tells it.

        It is not the length of this object, which PyTorch would compare with what all workers yield together.
        """
        num_batches = len(self.dataset) / (self._samples_per_batch or 1)
        return math.floor(num_batches) if self._drop_last else math.ceil(num_batches)


def uses_no_randomness(loader: DataLoader[Any]) -> bool:
    """Tell whether loading is known to draw nothing: data in memory, with PyTorch's own collation."""
    dataset: Any = loader.dataset
    is_in_memory = type(dataset) in (WholeBatchDataset, list, tuple) or sliceable_tensors(dataset) is not None
    return is_in_memory and loader.collate_fn in (default_collate, default_convert, unchanged)


def keeps_every_sample(loader: DataLoader[Any]) -> bool:
    """Tell whether a batch is known to have as many rows as its list of indices has items."""
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    is_whole = isinstance(dataset, WholeBatchDataset) and loader.collate_fn is unchanged
    is_collated = loader.collate_fn is default_collate and not hasattr(dataset, "__getitems__")
    return is_whole or is_collated


# --- the order ---------------------------------------------------------------------------------------------------

_SHUFFLING_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_KNOWN_SAMPLERS = (SequentialSampler, *_SHUFFLING_SAMPLERS)


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler of single indices in a loader; ``None`` if its batch sampler does not have one."""
    return loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)


def has_known_order(loader: DataLoader[Any]) -> bool:
    """Tell whether the samplers of a loader are PyTorch's own, which draw from one known generator."""
    return type(sampler_of(loader)) in _KNOWN_SAMPLERS and type(loader.batch_sampler) in (BatchSampler, type(None))


def seed_order(loader: DataLoader[Any]) -> tuple[Any, list[Seeded]]:
    """Make the order of a loader a function of seed and epoch, identical on every rank.

    PyTorch's shuffling samplers get a generator of their own. The user's samplers draw from a separate stream of the
    global generators. The loader itself stays unchanged, except for the generator of such a shuffling sampler.

    Returns:
        What takes the place of the batch sampler, or of the sampler if there is no batch sampler, and the sources of
        its randomness.
    """
    sources: list[Seeded] = []
    sampler = sampler_of(loader)
    order: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(sampler, _SHUFFLING_SAMPLERS):
        sources.append(SeededGenerator.of(sampler))
    if not has_known_order(loader):
        order = SeededSampler(order)
        sources.append(order)
    return order, sources


class SeededGenerator(torch.Generator):
    """A generator whose seed is a function of (seed, purpose, epoch, key).

    Args:
        purpose: What it is for, such as ``"order"``.
        *keys: More values that the seed depends on.
        given: The user's generator, which this one replaces. Its seed is then used instead of the run's, and it is
            left unchanged.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> SeededGenerator:
        """Create a generator of the host; `torch.Generator` takes its arguments here, and knows only a device."""
        return super().__new__(cls)

    def __init__(self, purpose: str, *keys: int | str, given: torch.Generator | None = None) -> None:
        self._purpose = purpose
        self._keys = keys
        self._given = given
        self._sampler: Any = None

    @staticmethod
    def of(sampler: Any) -> SeededGenerator:
        """Return the seeded generator of one of PyTorch's samplers, which gets one if it has none yet."""
        if not isinstance(sampler.generator, SeededGenerator):  # otherwise an earlier run used the sampler
            sampler.generator = SeededGenerator("order", given=sampler.generator)
        generator: SeededGenerator = sampler.generator
        generator._sampler = sampler
        return generator

    def give_back(self) -> None:
        """Let the sampler have its own generator again."""
        if self._sampler is not None and self._sampler.generator is self:
            self._sampler.generator = self._given

    def seed_epoch(self, epoch: int, seed: int, run_number: int = 0) -> None:
        """Prepare for the start of an epoch."""
        if self._given is not None:
            seed = self._given.initial_seed()
            seed = derive_seed(seed, "run", run_number) if run_number else seed
        self.manual_seed(derive_seed(seed, self._purpose, epoch, *self._keys))


class SeededSampler(Proxy, wraps="sampler"):
    """A user's sampler, or batch sampler, that draws from a separate stream instead of the global generators.

    Args:
        sampler: The sampler. Its other attributes are passed through.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self._seed = 0

    def seed_epoch(self, epoch: int, seed: int, run_number: int = 0) -> None:
        """Prepare for the start of an epoch."""
        self._seed = derive_seed(seed, "order", epoch)

    def __iter__(self) -> Iterator[Any]:
        stream = RandomStream(self._seed)
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
