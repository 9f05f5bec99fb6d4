"""Datasets and loaders: sensible defaults, whole-batch fetching, limits, batch sizes."""

from __future__ import annotations

import copy
import itertools
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from pytorch_accelerated._rng import preserved_rng_state

LIMIT_BATCHES_ENV_VAR = "PT_ACC_LIMIT_BATCHES"
"""Environment variable: when set to a number, every epoch uses at most so many batches."""

_BATCHES_IN_PART = 1024
_MAX_DEFAULT_WORKERS = 8
_SECONDS_UNTIL_DEATH_IS_KNOWN = 1.0


# --- what a loader is made of ------------------------------------------------------------------------------------


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
    for step, (batch, is_last) in enumerate(marking_last(loader), first_step):
        yield step, batch, is_last
    if step < first_step == 0 and num_batches_of(loader) != 0:
        raise ValueError(
            f"The {type(loader).__name__} gave no batch in this epoch. Is it empty, or an iterator that an earlier "
            "epoch has used up? Pass an object whose `__iter__` starts anew each time."
        )


def marking_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each batch and whether it is the last; the one after it has been fetched then.

    Example:
        >>> list(marking_last("ab"))
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


def default_num_workers(dataset: Any, num_local_processes: int) -> int:
    """Return how many worker processes suit a dataset on this machine.

    None for data that is in memory already, where starting workers costs more than they save, and for iterable
    datasets, of which every worker would give all samples again. Otherwise the processors this process may use, shared
    among the training processes of the node, less one for the training itself, and at most 8.
    """
    if isinstance(dataset, (IterableDataset, Sequence)) or sliceable_tensors(dataset) is not None:
        return 0
    can_ask = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    num_processors = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    return max(0, min(num_processors // max(num_local_processes, 1) - 1, _MAX_DEFAULT_WORKERS))


def default_dl_kwargs(dataset: Any, batch_size: int, num_local_processes: int, pin_memory: bool) -> dict[str, Any]:
    """Return the keyword arguments that suit the loader of a dataset on this machine, but for the order."""
    num_workers = default_num_workers(dataset, num_local_processes)
    workers = {"num_workers": num_workers, **({"persistent_workers": True} if num_workers else {})}
    tensors = sliceable_tensors(dataset) or ()
    is_on_host = all(tensor.device.type == "cpu" for tensor in tensors)  # only that memory can be pinned
    return {"batch_size": batch_size, "pin_memory": pin_memory and is_on_host, **workers}


def merge_dl_kwargs(defaults: Mapping[str, Any], given: Mapping[str, Any] | None, dataset: Any) -> dict[str, Any]:
    """Let the user's keyword arguments for the loader win, and drop the defaults that contradict them."""
    given = {
        name: value
        for name, value in (given or {}).items()
        if not (name in ("sampler", "batch_sampler") and value is None)
    }
    contradicted: set[str] = set()
    if isinstance(dataset, IterableDataset) or "sampler" in given:
        contradicted |= {"shuffle"}
    if "batch_sampler" in given:
        contradicted |= {"batch_size", "shuffle", "sampler", "drop_last"}
    if given.get("num_workers") == 0:
        contradicted |= {"persistent_workers", "prefetch_factor"}
    return {name: value for name, value in defaults.items() if name not in contradicted} | given


def loader_arguments(
    dataset: Any, collate_fn: Callable[..., Any] | None, dl_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments to make a `DataLoader` with; whole batches are fetched where that changes nothing else."""
    arguments = {"dataset": dataset, "collate_fn": collate_fn, **dl_kwargs}
    has_own_batches = any(arguments.get(name) is not None for name in ("collate_fn", "sampler", "batch_sampler"))
    has_own_batches |= arguments.get("batch_size", 1) is None
    if not has_own_batches and sliceable_tensors(dataset) is not None:
        arguments |= {"dataset": WholeBatchDataset(dataset), "collate_fn": unchanged}
    return arguments


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


def find_batch_size(batch: Any) -> int:
    """Return the length of the first dimension of the first tensor in a batch, however deeply it is nested.

    Args:
        batch: A tensor, or tuples, lists, mappings and dataclasses of them.

    Raises:
        ValueError: There is no tensor with a dimension in it.

    Example:
        >>> find_batch_size({"id": ["a", "b"], "image": (torch.zeros(2, 3), torch.zeros(2))})
        2
    """
    if isinstance(batch, torch.Tensor) and batch.ndim > 0:
        return batch.shape[0]
    for tensor in tensors_in(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise ValueError(
        f"No batch size was found: the batch, a {type(batch).__name__}, holds no tensor with at least one dimension. "
        "Override `calculate_train_batch_loss` and `calculate_eval_batch_loss` and return the `batch_size` yourself."
    )


def tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, however deeply they are nested in sequences, mappings and dataclasses."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_in(value)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from tensors_in(getattr(batch, field.name))


# --- whole batches out of memory ---------------------------------------------------------------------------------


def sliceable_tensors(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors of a plain in-memory `TensorDataset`, or of a `Subset` of one; ``None`` for anything else.

    Only where a batch taken by one indexing operation is the very same as one collated from single samples.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    is_plain = all(
        type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.requires_grad
        for tensor in dataset.tensors
    )
    return dataset.tensors if is_plain else None


class WholeBatchDataset(Dataset[list[torch.Tensor]]):
    """A view of an in-memory dataset which gives a `DataLoader` whole batches instead of single samples.

    Use it with `unchanged` as ``collate_fn``. The batches and their order are those of the plain dataset.

    Args:
        dataset: A dataset for which `sliceable_tensors` finds the tensors.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.tensors = sliceable_tensors(dataset) or ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Return the batch of the samples at ``indices``, as the default collation would."""
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            indices = [dataset.indices[index] for index in indices]
            dataset = dataset.dataset
        rows = torch.as_tensor(indices)
        return [tensor[rows] for tensor in self.tensors]

    def batches(self, order: torch.Tensor, batch_size: int) -> Iterator[list[torch.Tensor]]:
        """Yield samples in batches, the last with what is left.

        Args:
            order: The indices of the samples, shape ``(samples,)``.
            batch_size: Samples in a batch.
        """
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            order = torch.as_tensor(dataset.indices)[order]
            dataset = dataset.dataset
        order = order.to(self.tensors[0].device)
        # In parts: an epoch with millions of batches does not wait for the last of them to be laid out.
        for part in torch.split(order, _BATCHES_IN_PART * batch_size) if len(order) else ():
            part_rows = part.where(part >= 0, part + len(dataset))
            for rows in torch.split(part_rows, batch_size):
                yield [tensor.index_select(0, rows) for tensor in self.tensors]


def unchanged(batch: Any) -> Any:
    """Return a batch as it is: the ``collate_fn`` for batches that are whole already."""
    return batch


def whole_batches_of(loader: Any) -> Iterator[list[torch.Tensor]] | None:
    """Return the batches of an epoch without what a `DataLoader` does beside fetching them; ``None`` if it cannot be.

    They are the loader's own, in the order that the generator of its sampler gives.

    Args:
        loader: Any loader.
    """
    dataset, batch_sampler = loader.dataset, loader.batch_sampler
    is_plain = type(dataset) is WholeBatchDataset and loader.num_workers == 0 and not loader.pin_memory
    is_plain = is_plain and type(batch_sampler) is BatchSampler
    # The sampler of the loader itself is another one if it was made with a batch sampler.
    order = _order_of(batch_sampler.sampler, len(dataset)) if is_plain else None
    if order is None:
        return None
    num_left_out = len(order) % batch_sampler.batch_size if batch_sampler.drop_last else 0
    batches: Iterator[list[torch.Tensor]] = dataset.batches(
        order[: len(order) - num_left_out], batch_sampler.batch_size
    )
    return batches


def _order_of(sampler: Any, num_samples: int) -> torch.Tensor | None:
    """Return the indices that a sampler of PyTorch gives in an epoch, all at once; ``None`` for other samplers."""
    if type(sampler) is SequentialSampler:
        return torch.arange(num_samples)
    is_permutation = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == num_samples
        and sampler.generator is not None
    )
    return torch.randperm(num_samples, generator=sampler.generator) if is_permutation else None


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
        with preserved_rng_state():  # the run before had begun to read, and drawn what that takes
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


def like_mapping(original: Mapping[str, Any], items: dict[str, Any]) -> Any:
    """Return ``items`` as a mapping of the type of ``original``."""
    return items if isinstance(original, defaultdict) else type(original)(items)  # type: ignore[call-arg]


def rebuild(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a mapping, sequence or dataclass like ``value`` with ``change`` made to each item; others as they are.

    Example:
        >>> rebuild({"a": 1, "b": 2}, str)
        {'a': '1', 'b': '2'}
    """
    if isinstance(value, Mapping):
        return like_mapping(value, {name: change(item) for name, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(change, value))
    if is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)  # it need not take its fields as arguments
        for field in fields(value):
            object.__setattr__(changed, field.name, change(getattr(value, field.name)))
        return changed
    return value


def move_to_device(batch: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """Return a batch with all its tensors on ``device``: in mappings, sequences, dataclasses, whatever has ``.to``.

    Args:
        batch: The batch.
        device: Where it should go.
        non_blocking: Whether the host goes on before it is there; what uses it on the device waits all the same.
    """
    if not hasattr(batch, "to"):
        return rebuild(batch, lambda item: move_to_device(item, device, non_blocking))
    if non_blocking:
        with suppress(TypeError):  # not all that have `.to` know of it
            return batch.to(device, non_blocking=True)
    return batch.to(device)


# --- helpers of the public `utils` -------------------------------------------------------------------------------


def worker_init_fn(worker_id: int) -> None:
    """Seed NumPy and `random` in a worker process of a loader from the seed PyTorch gave it.

    PyTorch does this by itself now; the function remains for loaders that name it.
    """
    del worker_id  # PyTorch has put it into the worker's seed
    seed = torch.initial_seed()
    np.random.seed(seed % 2**32)
    random.seed(seed)


class DataLoaderSlice:
    """The first batches of a loader; everything else is the loader's.

    Args:
        dl: Any loader.
        slice_size: How many batches an epoch has at the most.

    Example:
        >>> list(DataLoaderSlice([10, 20, 30], 2))
        [10, 20]
    """

    def __init__(self, dl: Any, slice_size: int) -> None:
        self.dl = dl
        self.slice_size = slice_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.dl, self.slice_size)

    def __len__(self) -> int:
        num_batches = num_batches_of(self.dl)
        return self.slice_size if num_batches is None else min(num_batches, self.slice_size)

    def __getattr__(self, name: str) -> Any:
        if name == "dl":  # asked for by copy and pickle before it is set
            raise AttributeError(name)
        return getattr(self.dl, name)


def limit_from_environment() -> int | None:
    """Return the number of batches that the environment limits epochs to; ``None`` if it does not.

    Raises:
        ValueError: The variable holds something else than a whole number of at least 1.
    """
    text = os.environ.get(LIMIT_BATCHES_ENV_VAR)
    if not text:
        return None
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(
            f"The environment variable {LIMIT_BATCHES_ENV_VAR} is {text!r}. Expected a whole number of batches, at "
            "least 1, or no such variable."
        )
    return int(text)


class LimitBatches:
    """Limits every epoch to a number of batches: of one loader, or of all trainers made in a ``with`` block.

    Args:
        num_batches: How many batches an epoch has at the most.

    Example:
        >>> len(list(LimitBatches(2)(range(10))))
        2
        >>> with LimitBatches(2):
        ...     pass  # a Trainer made here uses two batches per epoch
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self._outer_limit: str | None = None

    def __call__(self, dl: Any) -> DataLoaderSlice:
        """Return the first batches of a loader."""
        return DataLoaderSlice(dl, self.num_batches)

    def __enter__(self) -> LimitBatches:
        self._outer_limit = os.environ.get(LIMIT_BATCHES_ENV_VAR)
        os.environ[LIMIT_BATCHES_ENV_VAR] = str(self.num_batches)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outer_limit is None:
            os.environ.pop(LIMIT_BATCHES_ENV_VAR, None)
        else:
            os.environ[LIMIT_BATCHES_ENV_VAR] = self._outer_limit


def remove_padding(padded_tensor: torch.Tensor, pad_value: float) -> torch.Tensor:
    """Return the rows of a tensor that are not all ``pad_value``; for one dimension, the entries that differ from it.

    Args:
        padded_tensor: Shape ``(rows, ...)``.
        pad_value: What the padding consists of.

    Example:
        >>> remove_padding(torch.tensor([[1, -1], [-1, -1]]), -1)
        tensor([[ 1, -1]])
    """
    is_real = padded_tensor != pad_value
    if is_real.ndim > 1:
        is_real = is_real.flatten(1).any(dim=1)
    return padded_tensor[is_real]
