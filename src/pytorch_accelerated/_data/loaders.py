"""Facts about loaders, and iterating over their batches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from pytorch_accelerated._data.rng import preserve_rng_state
from pytorch_accelerated._proxy import Proxy, unwrap
from pytorch_accelerated._tensors.nested import move_to_device

_SECONDS_UNTIL_FAILURE_IS_KNOWN = 1.0

# --- facts about loaders -----------------------------------------------------------------------------------------


def is_dataset(data: Any) -> bool:
    """Tell whether data is a dataset of samples, which a `DataLoader` batches, and not an iterable of batches."""
    return isinstance(data, Dataset) or hasattr(data, "__getitem__") or not hasattr(data, "__iter__")


def is_stream(loader: Any) -> bool:
    """Tell whether a `DataLoader` reads from an iterable dataset, whose samples have no indices."""
    return isinstance(loader.dataset, IterableDataset)


def is_map_style(loader: Any) -> bool:
    """Tell whether a loader is a `DataLoader` over a map-style dataset, whose samples have indices."""
    return isinstance(loader, DataLoader) and not is_stream(loader)


def has_own_iteration(loader: Any) -> bool:
    """Tell whether a loader is of a subclass of `DataLoader` that decides itself what it yields, or how much."""
    is_prepared = type(loader).__module__.startswith(("accelerate.", __name__.partition(".")[0]))
    return (
        isinstance(loader, DataLoader)
        and not is_prepared
        and (type(loader).__iter__ is not DataLoader.__iter__ or type(loader).__len__ is not DataLoader.__len__)
    )


def is_shardable(loader: Any) -> bool:
    """Tell whether a loader takes its batches as lists of indices, which can be divided among ranks."""
    return is_map_style(loader) and loader.batch_sampler is not None


def _is_random_access(loader: Any) -> bool:
    """Tell whether each batch can be reached without reading those before it."""
    return is_map_style(loader) or isinstance(loader, (list, tuple))


def _has_certain_length(order: Any) -> bool:
    """Tell whether as many items come as a sampler or batch sampler reports. A user's may only estimate it."""
    if isinstance(order, Proxy):
        return _has_certain_length(unwrap(order))
    if type(order).__module__.startswith("accelerate."):
        return _has_certain_length(getattr(order, "batch_sampler", None))
    if type(order) is BatchSampler:
        return _has_certain_length(order.sampler)
    return isinstance(order, (list, tuple, range)) or type(order).__module__.startswith("torch.utils.data.")


def has_state(data: Any) -> bool:
    """Tell whether an iterable can store its position and return to it."""
    return all(callable(getattr(data, name, None)) for name in ("state_dict", "load_state_dict"))


def num_batches_of(loader: Any) -> int | None:
    """Return the number of batches per epoch that a loader reports; ``None`` if it reports none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def reliable_num_batches_of(loader: Any) -> int | None:
    """Return the number of batches per epoch if it is certain; ``None`` if it is unknown or may be an estimate."""
    if not getattr(loader, "has_certain_length", True):
        return None
    if is_map_style(loader):
        is_certain = _has_certain_length(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    else:
        is_certain = isinstance(loader, (list, tuple))
    return num_batches_of(loader) if is_certain else None


def num_samples_of(loader: DataLoader[Any]) -> int | None:
    """Return the number of samples per epoch of which PyTorch's `BatchSampler` makes batches; ``None`` without one."""
    order: Any = loader.batch_sampler
    while order is not None and type(order) is not BatchSampler:
        inner = getattr(order, "batch_sampler", None)
        order = unwrap(order) if isinstance(order, Proxy) else getattr(order, "sampler", inner)
    return None if order is None else num_batches_of(order.sampler)


def total_num_batches_of(loaders: Any) -> int | None:
    """Return the number of batches of a loader, or of all loaders in a dictionary; ``None`` if it is unknown."""
    numbers = [num_batches_of(loader) for loader in (loaders.values() if isinstance(loaders, dict) else [loaders])]
    return None if None in numbers else sum(number for number in numbers if number is not None)


def batch_size_of(loader: Any, dl_kwargs: Mapping[str, Any] | None, otherwise: int) -> int | None:
    """Return the batch size of a loader, or ``None`` if it varies.

    Args:
        loader: The loader.
        dl_kwargs: The keyword arguments of its `DataLoader`; ``None`` if the trainer did not create it.
        otherwise: The requested batch size, returned if the loader does not report one.
    """
    if dl_kwargs is None:
        reported = (getattr(source, "batch_size", None) for source in (loader, getattr(loader, "batch_sampler", None)))
        return next((size for size in reported if isinstance(size, int)), otherwise)
    if "batch_sampler" in dl_kwargs:
        return getattr(dl_kwargs["batch_sampler"], "batch_size", None)
    batch_size: int | None = dl_kwargs.get("batch_size", otherwise)
    return batch_size


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
    """Return the keyword arguments of a `DataLoader` that do not determine which samples it yields."""
    return {name: getattr(loader, name) for name in _LOADER_SETTINGS if hasattr(loader, name)}


_SHOWN = ("dataset", "collate_fn", "worker_init_fn", "batch_size", "drop_last")


def show_arguments_of(given: DataLoader[Any], prepared: Any) -> None:
    """Let a prepared loader show the dataset and the functions of the user's loader that it was built from.

    A loader of Accelerate reads from an inner one. These attributes of the outer one only show what the user gave.
    """
    if _has_inner_loader(prepared):
        for name in _SHOWN:
            setattr(prepared, name, getattr(given, name))


def keep_generator_of(built: DataLoader[Any], prepared: Any) -> None:
    """Let the workers of a prepared loader be seeded as those of the loader that it was made of.

    Accelerate leaves the generator out where the main process reads a stream for all ranks.
    """
    inner = getattr(prepared, "base_dataloader", None)
    if inner is not None and inner.generator is None:
        inner.generator = built.generator


@contextmanager
def showing_inner_arguments(prepared: Any) -> Iterator[None]:
    """Undo `show_arguments_of` for the body, in which another loader is built from a prepared one."""
    names = [name for name in _SHOWN if name in vars(prepared)] if _has_inner_loader(prepared) else []
    shown = {name: vars(prepared).pop(name) for name in names}
    try:
        yield
    finally:
        vars(prepared).update(shown)


def _has_inner_loader(loader: Any) -> bool:
    return hasattr(loader, "base_dataloader")


EXACT = "The data continue exactly where they stopped."
_SAME_IF_ORDER_IS = "Completed batches are read again and skipped, so the data are the same if their order is."
_POSITION_ONLY = (
    "The same number of batches is skipped, whatever they contain, because an iterator cannot be restarted."
)


def guarantee_of_skipping(loader: Any) -> str:
    """Return a sentence for the user: how exactly the data continue after batches are skipped."""
    loader = unwrap(loader)
    if _is_random_access(loader):
        return EXACT
    return _POSITION_ONLY if isinstance(loader, Iterator) else _SAME_IF_ORDER_IS


def order_may_differ(attributes: Sequence[str]) -> str:
    """Return a sentence for the user: what the samplers keep that is not saved.

    Args:
        attributes: Such as ``"MySampler.buckets"``.
    """
    return (
        f"The order may differ: {', '.join(f'`{name}`' for name in attributes)} is not saved. Give the sampler "
        "`state_dict` and `load_state_dict` if it changes from epoch to epoch."
    )


# --- iterating over batches --------------------------------------------------------------------------------------


def enumerate_batches(loader: Any, first_step: int = 0) -> Iterator[tuple[int, Any, bool]]:
    """Yield the index of each batch in its epoch, the batch, and whether it is the last.

    If the number of batches is unknown or may be an estimate, this reads one batch ahead.

    Args:
        loader: Yields the batches from ``first_step`` on.
        first_step: Index of its first batch.

    Raises:
        ValueError: The epoch has no batch, although the loader did not report a length of 0.
        RuntimeError: A worker process died.

    Example:
        >>> list(enumerate_batches(iter("ab")))
        [(0, 'a', False), (1, 'b', True)]
    """
    try:
        num_batches = reliable_num_batches_of(loader)
        if num_batches is None:
            yield from _enumerate_with_look_ahead(loader, first_step)
            return
        last_step, step = first_step + num_batches - 1, first_step - 1
        for step, batch in enumerate(loader, first_step):
            yield step, batch, step == last_step
        if step < last_step:
            raise RuntimeError(
                f"The epoch ended after {step + 1} of {last_step + 1} batches. Something that loads a sample raised "
                "`StopIteration`, which ends the loop of whoever called it. Look for `next(...)` in the dataset and in "
                "the collate function, and give it a default or catch the exception."
            )
    except (ConnectionError, EOFError) as error:
        if getattr(loader, "num_workers", 0) > 0 and not str(error).startswith("Caught "):  # in a worker: the user's
            # PyTorch raises an error that names a killed worker once the system reports its exit: here, not later.
            time.sleep(_SECONDS_UNTIL_FAILURE_IS_KNOWN)
        raise


def _enumerate_with_look_ahead(loader: Any, first_step: int) -> Iterator[tuple[int, Any, bool]]:
    step = first_step - 1
    for step, (batch, is_last) in enumerate(mark_last(loader), first_step):
        yield step, batch, is_last
    if step < first_step == 0 and num_batches_of(loader) != 0:
        raise ValueError(
            f"The {type(loader).__name__} yielded no batch in this epoch, but an epoch needs at least one. It is "
            "empty, or an iterator that an earlier epoch exhausted. Pass an object that starts from its first batch "
            "whenever it is iterated over."
        )


def mark_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each batch and whether it is the last. The next batch is fetched before a batch is yielded.

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


class RestOfEpoch:
    """The batches of an iterable after the first ones, which it has to produce and discard.

    Producing them does not change the global RNG state.

    Args:
        batches: Any iterable of batches.
        num_skipped: How many to skip.
    """

    def __init__(self, batches: Iterable[Any], num_skipped: int) -> None:
        self.batches = batches
        self.num_skipped = num_skipped

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        with preserve_rng_state():  # the interrupted run read these batches, too, before its RNG state was saved
            first = list(itertools.islice(batches, self.num_skipped, self.num_skipped + 1))
        yield from first
        yield from batches

    def __len__(self) -> int:
        return max(0, len(self.batches) - self.num_skipped)  # type: ignore[arg-type]  # without a length: a TypeError


class PlacedBatches:
    """Moves the batches of an iterable that is not a `DataLoader` to the training device.

    Args:
        batches: Any iterable of batches.
        device: The target device.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self.batches = batches
        self.device = device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield move_to_device(batch, self.device)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # without a length: a TypeError

    @property
    def sharding(self) -> object:
        """The object that knows the dummy step, if the batches are divided among the ranks."""
        return getattr(self.batches, "sharding", None)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, if the iterable has a ``set_epoch`` method."""
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)
