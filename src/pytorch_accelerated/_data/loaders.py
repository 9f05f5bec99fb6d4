"""Facts about loaders, and walking through their batches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
)

from pytorch_accelerated._data.rng import preserve_rng_state
from pytorch_accelerated._nested import move_to_device

_SECONDS_UNTIL_DEATH_IS_KNOWN = 1.0


def is_dataset(data: Any) -> bool:
    """Tell a dataset of samples, which a `DataLoader` batches, from an iterable that gives batches already."""
    return isinstance(data, Dataset) or hasattr(data, "__getitem__") or not hasattr(data, "__iter__")


def is_stream(loader: Any) -> bool:
    """Tell whether a `DataLoader` reads from an iterable dataset, whose samples have no indices."""
    return isinstance(loader.dataset, IterableDataset)


def has_state(data: Any) -> bool:
    """Tell whether an iterable can store its position and return to it."""
    return all(callable(getattr(data, name, None)) for name in ("state_dict", "load_state_dict"))


def num_batches_of(loader: Any) -> int | None:
    """Return how many batches a loader gives per epoch, ``None`` if it cannot tell."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def enumerate_batches(loader: Any, first_step: int = 0) -> Iterator[tuple[int, Any, bool]]:
    """Yield the index of each batch in its epoch, the batch, and whether it is the last.

    Where the number of batches is not known, or may be an estimate, this looks one batch ahead.

    Args:
        loader: Gives the batches from ``first_step`` on.
        first_step: Index of its first batch.

    Raises:
        ValueError: The epoch has no batch at all, although the loader did not say so by its length.
        RuntimeError: A worker process has died.

    Example:
        >>> list(enumerate_batches(iter("ab")))
        [(0, 'a', False), (1, 'b', True)]
    """
    try:
        num_batches = reliable_num_batches_of(loader)
        if num_batches is None:
            yield from _with_look_ahead(loader, first_step)
            return
        last_step = first_step + num_batches - 1
        for step, batch in enumerate(loader, first_step):
            yield step, batch, step == last_step
    except (ConnectionError, EOFError) as error:
        # PyTorch raises an error that names the worker as soon as the system tells of its death: here, not later.
        time.sleep(_SECONDS_UNTIL_DEATH_IS_KNOWN)
        raise RuntimeError(
            f"The connection to a worker process of the loader was lost ({error!r}). The worker was killed, often "
            "because memory ran out: lower `num_workers`, the batch size, or what the dataset keeps in memory."
        ) from error


def _with_look_ahead(loader: Any, first_step: int) -> Iterator[tuple[int, Any, bool]]:
    step = first_step - 1
    for step, (batch, is_last) in enumerate(mark_last(loader), first_step):
        yield step, batch, is_last
    if step < first_step == 0 and num_batches_of(loader) != 0:
        raise ValueError(
            f"The {type(loader).__name__} gave no batch in this epoch. Is it empty, or an iterator that an earlier "
            "epoch has used up? Pass an object whose `__iter__` starts anew each time."
        )


def mark_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each batch and whether it is the last; the one after it has been fetched then.

    Example:
        >>> list(mark_last("ab"))
        [('a', False), ('b', True)]
    """
    remaining, nothing = iter(batches), object()
    batch = next(remaining, nothing)
    while batch is not nothing:
        following = next(remaining, nothing)
        yield batch, following is nothing
        batch = following


def reliable_num_batches_of(loader: Any) -> int | None:
    """Return how many batches a loader gives per epoch if that is certain; other lengths may be estimates."""
    is_loader_of_samples = isinstance(loader, DataLoader) and not is_stream(loader)
    return num_batches_of(loader) if is_loader_of_samples or isinstance(loader, (list, tuple)) else None


def loaders_in(loaders: Any) -> list[Any]:
    """Return the loaders of a dictionary, or the single one that is given in its place."""
    return list(loaders.values()) if isinstance(loaders, dict) else [loaders]


def total_num_batches_of(loaders: Any) -> int | None:
    """Return how many batches a loader, or a dictionary of loaders, gives; ``None`` if it cannot tell."""
    numbers = [num_batches_of(loader) for loader in loaders_in(loaders)]
    return None if None in numbers else sum(number for number in numbers if number is not None)


def batch_size_of(loader: Any, dl_kwargs: Mapping[str, Any] | None, otherwise: int) -> int | None:
    """Return the batch size of a loader, as far as it can be told; ``None`` if it varies.

    Args:
        loader: The loader.
        dl_kwargs: The keyword arguments that it was made with; ``None`` if it came from elsewhere.
        otherwise: The batch size that was asked for.
    """
    if dl_kwargs is None:
        own_sizes = (getattr(source, "batch_size", None) for source in (loader, getattr(loader, "batch_sampler", None)))
        return next((size for size in own_sizes if isinstance(size, int)), otherwise)
    if "batch_sampler" in dl_kwargs:
        return getattr(dl_kwargs["batch_sampler"], "batch_size", None)
    batch_size: int | None = dl_kwargs.get("batch_size", otherwise)
    return batch_size


EXACT = "The data go on exactly where they were."


_SAME_SAMPLES = "What was done is read again and passed over, so the data are the same if they come in the same order."


_POSITION_ONLY = "As many batches are passed over, whatever they are: an iterator does not start anew."


def guarantee_of_skipping(loader: Any) -> str:
    """Say how exactly the data go on behind batches that are skipped."""
    is_indexed = isinstance(loader, DataLoader) and not is_stream(loader)
    if is_indexed or isinstance(loader, (list, tuple)):
        return EXACT
    return _POSITION_ONLY if isinstance(loader, Iterator) else _SAME_SAMPLES


class RestOfEpoch:
    """The batches of an iterable after the first, which it has to make and throw away.

    It is begun to read without a trace in the global random generators.

    Args:
        batches: Any iterable of batches.
        num_skipped: How many to leave out.
    """

    def __init__(self, batches: Iterable[Any], num_skipped: int) -> None:
        self.batches = batches
        self.num_skipped = num_skipped

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        with preserve_rng_state():  # the run before had begun to read, and drawn what that takes
            first = list(itertools.islice(batches, self.num_skipped, self.num_skipped + 1))
        yield from first
        yield from batches

    def __len__(self) -> int:
        return max(0, len(self.batches) - self.num_skipped)  # type: ignore[arg-type]  # a TypeError is the answer


class PlacedBatches:
    """Moves the batches of an iterable that is no `DataLoader` to the training device.

    Args:
        batches: Any iterable of batches.
        device: Where the batches should go.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self.batches = batches
        self.device = device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield move_to_device(batch, self.device)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # a TypeError is the answer

    def set_epoch(self, epoch: int) -> None:
        """Tell the iterable which epoch comes, if it wants to know."""
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)


_LOADER_SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
)


def loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the keyword arguments of a `DataLoader` that have nothing to do with which samples it gives."""
    return {name: getattr(loader, name) for name in _LOADER_SETTINGS if hasattr(loader, name)}


def has_indices(loader: Any) -> bool:
    """Tell whether the samples of a loader are chosen by index, so that they can be shared exactly."""
    return isinstance(loader, DataLoader) and not is_stream(loader) and loader.batch_sampler is not None
