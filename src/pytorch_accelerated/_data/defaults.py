"""The arguments with which the trainer creates a `DataLoader`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from pytorch_accelerated._data.in_memory import sliceable_tensors
from pytorch_accelerated._data.workers import worker_init_fn
from pytorch_accelerated._types import CollateFunction, DataLoaderKwargs

_MAX_DEFAULT_WORKERS = 8
_ONLY_WITH_WORKERS = ("persistent_workers", "prefetch_factor", "multiprocessing_context")
"""Arguments that a `DataLoader` without workers refuses."""


def default_num_workers(dataset: Any, num_local_processes: int) -> int:
    """Return how many worker processes suit a dataset on this machine.

    The CPU cores that this process may use are divided among the training processes of the node. One core per process
    is left for the training itself. The result is at most 8. It is 0 for data in memory, where starting workers costs
    more than it saves, and for iterable datasets, where each worker would yield all samples again.

    Args:
        dataset: The dataset.
        num_local_processes: Number of training processes on this node.
    """
    if isinstance(dataset, (IterableDataset, Sequence)) or sliceable_tensors(dataset) is not None:
        return 0
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(0, min(num_cores // max(num_local_processes, 1) - 1, _MAX_DEFAULT_WORKERS))


class EvaluationSettings(NamedTuple):
    """What an evaluation is called with, next to its dataset. The defaults are those of `Trainer.evaluate`."""

    per_device_batch_size: int = 8
    dataloader_kwargs: DataLoaderKwargs | None = None
    collate_fn: CollateFunction | None = None

    def completed_by(self, last: EvaluationSettings) -> EvaluationSettings:
        """Return these settings, with those of the last evaluation in place of defaults."""
        default = EvaluationSettings()
        changed = {name: value for name, value in self._asdict().items() if value != getattr(default, name)}
        return last._replace(**changed)


def chosen_batch_size(given: Any, dl_kwargs: Mapping[str, Any] | None) -> Any:
    """Return the ``per_device_batch_size``; if that is ``None``, the batch size among the arguments of the loader."""
    return (dl_kwargs or {}).get("batch_size") if given is None else given


def default_dl_kwargs(dataset: Any, batch_size: int, num_local_processes: int, pin_memory: bool) -> dict[str, Any]:
    """Return the keyword arguments that suit the loader of a dataset on this machine, except for the order.

    Args:
        dataset: The dataset.
        batch_size: Samples in a batch of one process.
        num_local_processes: Number of training processes on this node.
        pin_memory: Whether batches are copied to a device that benefits from pinned memory.
    """
    tensors = sliceable_tensors(dataset) or ()
    is_on_host = all(tensor.device.type == "cpu" for tensor in tensors)  # other memory cannot be pinned
    # Workers are not persistent: they would not see what the program changes in the dataset between epochs.
    return {
        "batch_size": batch_size,
        "pin_memory": pin_memory and is_on_host,
        "num_workers": default_num_workers(dataset, num_local_processes),
        "worker_init_fn": worker_init_fn,
    }


def merge_dl_kwargs(defaults: Mapping[str, Any], given: Mapping[str, Any] | None, dataset: Any) -> dict[str, Any]:
    """Return the defaults, overridden by the user's arguments, without what contradicts them.

    Arguments for workers have no effect if the default is to use none.

    Args:
        defaults: The default keyword arguments of the loader.
        given: The user's keyword arguments. A ``sampler`` or ``batch_sampler`` of ``None`` counts as not given.
        dataset: The dataset.
    """
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
        contradicted |= set(_ONLY_WITH_WORKERS)
    elif "num_workers" not in given and defaults.get("num_workers") == 0:
        given = {name: value for name, value in given.items() if name not in _ONLY_WITH_WORKERS}
    return {name: value for name, value in defaults.items() if name not in contradicted} | given
