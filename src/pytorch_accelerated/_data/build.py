"""The one place where the loaders of a run are built: seeded, sharded over the ranks, with workers prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterDataPipe, default_collate

from pytorch_accelerated._data.determinism import (
    Seeded,
    SeededDataset,
    SeededGenerator,
    SeededLoader,
    SeededSampler,
    SeededStream,
    has_known_order,
    keeps_every_sample,
    seed_order,
    uses_no_randomness,
)
from pytorch_accelerated._data.division import describe_difference, facts_of
from pytorch_accelerated._data.draws import NumberedOrder
from pytorch_accelerated._data.in_memory import WholeBatchDataset, has_row_numbers, sliceable_tensors, unchanged
from pytorch_accelerated._data.loaders import (
    has_own_iteration,
    has_state,
    is_shardable,
    is_stream,
    loader_settings,
    num_batches_of,
)
from pytorch_accelerated._data.sharding import ShardedBatches, ShardedBatchSampler
from pytorch_accelerated._data.streams import TrackedStream
from pytorch_accelerated._data.workers import WorkerSetup
from pytorch_accelerated._messages import warn


@dataclass(frozen=True)
class Placement:
    """Where the loaders of a run are used, as values that `_distributed` derives from the accelerator.

    Attributes:
        process_index: Rank of this process.
        num_processes: Number of ranks.
        num_batches_per_step: Number of batches of a stream that one step of all ranks takes.
        create_loader: Creates a loader that takes part in a run once it is prepared, with the arguments of a
            `DataLoader`. ``None`` if Accelerate shards the data and moves the batches itself.
        create_dispatched_loader: Same for data that the main process reads for all ranks.
        create_local_loader: Same for data of this process alone. ``num_steps`` is an additional argument.
        keep_in_step: Wraps batches of this process alone, and their number of steps, for any iterable.
        gather: Returns the values of all ranks.
    """

    process_index: int = 0
    num_processes: int = 1
    num_batches_per_step: int = 1
    create_loader: Callable[..., Any] | None = None
    create_dispatched_loader: Callable[..., Any] | None = None
    create_local_loader: Callable[..., Any] | None = None
    keep_in_step: Callable[[Any, int | None], Any] = lambda batches, num_steps: batches
    gather: Callable[[Any], list[Any]] = lambda value: [value]


def rebuild_loader(loader: Any, placement: Placement) -> SeededLoader:
    """Return the loader of a run, built from one that the trainer or the user created.

    All that is drawn while loading is a function of seed, epoch and batch, whichever worker loads it. Nothing is drawn
    from the current state of the global generators, which belong to the model. The given loader stays unchanged,
    except for the generator of its shuffling sampler.

    The ranks share its batches, and they go to the device, once the result is prepared with the other objects of the
    run. Until then it yields all batches, because a subclass of the trainer may prepare nothing.

    Args:
        loader: A `DataLoader`, or any iterable of batches, of which only the position is tracked.
        placement: Where it is used.
    """
    if not isinstance(loader, DataLoader):
        stream = TrackedStream(loader, num_items_per_step=1) if has_state(loader) else None
        batches = loader if stream is None else stream
        return SeededLoader(_keep_in_step(batches, _num_steps(loader, placement), placement), stream=stream)
    division = _find_division(loader, placement)
    if has_own_iteration(loader):
        return _keep_iteration(loader, division, placement)
    worker_seeds = SeededGenerator("workers", placement.process_index)
    worker_setup = WorkerSetup(loader.worker_init_fn, loader.num_workers > 0)
    settings = loader_settings(loader) | {"generator": worker_seeds, "worker_init_fn": worker_setup}
    if is_stream(loader):
        built, sources, stream = _build_stream(loader, settings, division, placement)
        return SeededLoader(built, [worker_seeds, *sources], worker_setup, stream, given=loader)
    built, sources = _build_seeded(loader, settings, division, placement)
    yields_full_batches = not division.is_divided and has_known_order(loader) and keeps_every_sample(loader)
    return SeededLoader(
        built, [worker_seeds, *sources], worker_setup, yields_full_batches=yields_full_batches, given=loader
    )


def shard_loader(loader: Any, placement: Placement) -> Any:
    """Return a loader that shards like one from `rebuild_loader`, but keeps its own order and randomness.

    For a `DataLoader` that a subclass puts in the place of the rebuilt one. Anything else is returned unchanged.
    """
    if placement.create_loader is None or not is_shardable(loader):
        return loader
    settings = loader_settings(loader) | {"_drop_last": loader.drop_last}
    return _build(loader.dataset, loader.batch_sampler, settings, placement)


@dataclass(frozen=True)
class _Division:
    """Whether the program has divided the data among the ranks itself, and the largest number of batches of a rank."""

    is_divided: bool = False
    num_steps: int | None = None


def _find_division(loader: DataLoader[Any], placement: Placement) -> _Division:
    if placement.num_processes == 1:
        return _Division()
    facts = placement.gather(facts_of(loader))
    is_marked = any(fact.is_marked for fact in facts)
    difference = describe_difference(facts)
    if difference is not None and not is_marked:
        warn(
            f"The processes have different data: {difference}. Each process therefore trains or evaluates on all of "
            "its own, and they are not divided. If that is not meant, create the same dataset on every process, for "
            "example by splitting or shuffling it with the same seed.",
        )
    return _Division(is_marked or difference is not None, _largest([fact.num_batches for fact in facts]))


def _num_steps(batches: Any, placement: Placement) -> int | None:
    return _largest(placement.gather(num_batches_of(batches))) if placement.num_processes > 1 else None


def _largest(numbers: list[int | None]) -> int | None:
    return None if None in numbers else max(number for number in numbers if number is not None)


def _keep_in_step(batches: Any, num_steps: int | None, placement: Placement) -> Any:
    return placement.keep_in_step(batches, num_steps) if placement.num_processes > 1 else batches


def _keep_iteration(loader: DataLoader[Any], division: _Division, placement: Placement) -> SeededLoader:
    """Return the loader of a run for one of a subclass, which decides itself what it yields."""
    is_local = placement.num_processes == 1 or division.is_divided
    stream = TrackedStream(loader, 1 if is_local else placement.num_processes) if has_state(loader) else None
    batches: Any = SeededSampler(loader) if stream is None else stream
    sources = [batches] if stream is None else []
    if is_local:
        built = _keep_in_step(batches, division.num_steps, placement)
    else:
        built = ShardedBatches(batches, placement.num_processes, placement.process_index)
    return SeededLoader(built, sources, stream=stream)


def _build_stream(
    loader: DataLoader[Any], settings: dict[str, Any], division: _Division, placement: Placement
) -> tuple[Any, list[Seeded], TrackedStream | None]:
    dataset: Any = loader.dataset
    stream = None
    num_batches_per_step = 1 if division.is_divided else placement.num_batches_per_step
    if has_state(dataset) and loader.num_workers == 0:
        stream = TrackedStream(dataset, (loader.batch_size or 1) * num_batches_per_step)
        dataset = stream
    if placement.create_loader is None or isinstance(loader.dataset, IterDataPipe):  # which PyTorch seeds itself
        return DataLoader(dataset, loader.batch_size, drop_last=loader.drop_last, **settings), [], stream
    rank = placement.process_index if division.is_divided else 0
    seeded = SeededStream(dataset, loader.collate_fn, loader.num_workers > 0, loader.batch_size, loader.drop_last, rank)
    settings |= {"batch_size": None, "collate_fn": unchanged}
    if placement.num_processes == 1:
        return placement.create_loader(seeded, **settings), [seeded], stream
    if division.is_divided and placement.create_local_loader is not None:
        return placement.create_local_loader(seeded, num_steps=division.num_steps, **settings), [seeded], stream
    if placement.create_dispatched_loader is not None:
        return placement.create_dispatched_loader(seeded, drop_last=loader.drop_last, **settings), [seeded], stream
    return placement.create_loader(seeded, **settings), [seeded], stream


def _build_seeded(
    loader: DataLoader[Any], settings: dict[str, Any], division: _Division, placement: Placement
) -> tuple[Any, list[Seeded]]:
    dataset: Any = loader.dataset
    order, sources = seed_order(loader)
    if _can_slice(loader):
        dataset = WholeBatchDataset(dataset)
        settings |= {"collate_fn": unchanged}
    elif not uses_no_randomness(loader):
        dataset = SeededDataset(dataset, loader.collate_fn, loader.num_workers > 0)
        settings |= {"collate_fn": unchanged}
        sources.append(dataset)
        numbers = (placement.process_index, placement.num_processes) if division.is_divided else ()
        order = NumberedOrder(order, *numbers)
    has_batches = is_shardable(loader)
    as_order = {"batch_sampler": order} if has_batches else {"batch_size": None, "sampler": order}
    if division.is_divided and placement.create_local_loader is not None:
        return placement.create_local_loader(dataset, num_steps=division.num_steps, **as_order, **settings), sources
    if has_batches:
        return _build(dataset, order, settings, placement), sources
    if placement.create_loader is not None:  # Accelerate would drop the sampler
        if placement.num_processes > 1:
            order = ShardedBatches(order, placement.num_processes, placement.process_index, is_active=False)
        return placement.create_loader(dataset, batch_size=None, sampler=order, **settings), sources
    return DataLoader(dataset, batch_size=None, sampler=order, **settings), sources


def _can_slice(loader: DataLoader[Any]) -> bool:
    """Tell whether indexing the data in memory by whole batches gives the batches that the loader would collate."""
    is_default = loader.collate_fn is default_collate and loader.batch_sampler is not None and has_known_order(loader)
    return is_default and sliceable_tensors(loader.dataset) is not None and has_row_numbers(loader.dataset)


def _build(dataset: Any, batch_sampler: Any, settings: dict[str, Any], placement: Placement) -> Any:
    if placement.create_loader is None:
        return DataLoader(dataset, batch_sampler=batch_sampler, **settings)
    ranks = placement.num_processes, placement.process_index
    # If `drop_last` would leave no step at all, every rank takes every batch.
    if placement.num_processes > 1 and num_batches_of(ShardedBatchSampler(batch_sampler, *ranks)) != 0:
        batch_sampler = ShardedBatchSampler(batch_sampler, *ranks, is_active=False, gather=placement.gather)
    return placement.create_loader(dataset, batch_sampler=batch_sampler, **settings)
