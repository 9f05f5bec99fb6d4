"""Keyword arguments of the loaders that the trainer builds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import (
    IterableDataset,
)

from pytorch_accelerated._data.in_memory import WholeBatchDataset, sliceable_tensors, unchanged

_MAX_DEFAULT_WORKERS = 8


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
