"""Whether the program has divided the data among the processes itself: by a sampler, or by giving each its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pytorch_accelerated._data.loaders import is_stream, num_batches_of
from pytorch_accelerated._data.samplers import parts_of

_MARKS = (("num_replicas", "rank"), ("world_size", "rank"), ("num_processes", "process_index"))
"""Attributes by which a sampler tells that it divides the samples, as `DistributedSampler` does."""

_NUM_COMPARED = 16
_MAX_DEPTH = 4


@dataclass(frozen=True)
class DataFacts:
    """What the processes compare to find out whether they have the same data.

    Args:
        is_marked: Whether something in the loader tells that it divides the data.
        num_samples: The length of the dataset; ``None`` if it has none.
        num_batches: The number of batches that the loader reports.
        content: A digest of some samples; empty where they cannot be read without loading them.
    """

    is_marked: bool
    num_samples: int | None
    num_batches: int | None
    content: str


def facts_of(loader: DataLoader[Any]) -> DataFacts:
    """Return the facts about the loader of this process."""
    dataset: Any = loader.dataset
    num_samples = num_batches_of(dataset)
    return DataFacts(marks_division(loader), num_samples, num_batches_of(loader), _digest(dataset, num_samples))


def describe_difference(facts: Sequence[DataFacts]) -> str | None:
    """Return how the data of the processes differ, as part of a sentence; ``None`` if they seem to be the same."""
    for name, description in (("num_samples", "samples"), ("num_batches", "batches")):
        numbers = [getattr(fact, name) for fact in facts]
        if len(set(numbers)) > 1:
            return f"by rank, they have {numbers} {description}"
    return (
        "they have the same number of samples, but not the same ones" if len({f.content for f in facts}) > 1 else None
    )


def marks_division(loader: DataLoader[Any]) -> bool:
    """Tell whether a sampler of a loader, or a stream that it reads, has the attributes of one that divides the data.

    A map-style dataset does not count: it may know its rank for other reasons, and a division shows in its samples.
    """
    reads_stream = is_stream(loader)
    for path, part in parts_of(loader):
        is_sampler = path.rpartition(".")[2].startswith(("sampler", "batch_sampler"))
        values = [part, *vars(part).values()] if reads_stream and hasattr(part, "__dict__") else [part]
        if (is_sampler or reads_stream) and any(map(_is_marked, values)):
            return True
    return False


def _is_marked(part: Any) -> bool:
    for names in _MARKS:
        count, rank = (getattr(part, name, None) for name in names)
        if isinstance(count, int) and isinstance(rank, int) and count > 1:
            return True
    return False


# --- what the samples are ----------------------------------------------------------------------------------------


def _digest(dataset: Any, num_samples: int | None) -> str:
    """Return a digest of a few samples, from the attributes that hold one entry for each of them.

    Without a number of samples, as for streams, these are all collections, and texts, which may name a file.
    """
    found = "".join(_descriptions(dataset, num_samples, 0))
    return hashlib.blake2b(found.encode(), digest_size=16).hexdigest() if found else ""


def _descriptions(holder: Any, num_samples: int | None, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        return
    if _has_entries(holder, num_samples):
        yield _describe_entries(holder)
        return
    if isinstance(holder, Dataset) and depth > 0:
        num_samples = num_batches_of(holder)
    if isinstance(holder, Mapping):
        values = list(holder.values())
    elif isinstance(holder, (list, tuple)):
        values = list(holder[:_NUM_COMPARED])
    else:
        values = list(vars(holder).values()) if isinstance(holder, Dataset) else []
    for value in values:
        yield from _descriptions(value, num_samples, depth + 1)


def _has_entries(value: Any, num_samples: int | None) -> bool:
    if isinstance(value, torch.Tensor) and (value.layout is not torch.strided or value.is_meta):
        return False
    if isinstance(value, (torch.Tensor, np.ndarray)):
        is_collection = value.ndim > 0
    else:
        is_collection = isinstance(value, (list, tuple, range))
    if num_samples is None:
        return is_collection or (isinstance(value, (str, PurePath)) and not _names_device(value))
    return is_collection and len(value) == num_samples


def _names_device(value: Any) -> bool:
    try:
        return bool(torch.device(str(value)))
    except RuntimeError:
        return False


def _describe_entries(entries: Any) -> str:
    if isinstance(entries, (str, PurePath)):
        return repr(entries)
    places = {round(place) for place in np.linspace(0, len(entries) - 1, _NUM_COMPARED)} if len(entries) else ()
    return "".join(_describe(entries[place], 0) for place in sorted(places))


def _describe(value: Any, depth: int) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)) and getattr(value, "layout", torch.strided) is torch.strided:
        return f"{tuple(value.shape)}{value.reshape(-1)[:_NUM_COMPARED].tolist()}"
    if isinstance(value, (bool, int, float, str, bytes, PurePath, np.generic)) or value is None:
        return repr(value)
    if depth > _MAX_DEPTH:
        return ""
    if isinstance(value, Mapping):
        return "".join(f"{key!r}{_describe(item, depth + 1)}" for key, item in list(value.items())[:_NUM_COMPARED])
    if isinstance(value, (list, tuple)):
        return "".join(_describe(item, depth + 1) for item in value[:_NUM_COMPARED])
    return type(value).__name__


def check_same_order(first_batches: Any, gather: Callable[[str], list[str]]) -> None:
    """Raise if the samplers of the processes do not draw the same samples. Must be called on every process.

    Args:
        first_batches: The indices of the first step, of all ranks.
        gather: Returns the values of all processes.

    Raises:
        RuntimeError: They differ.
    """
    drawn = gather(repr([list(batch) for batch in first_batches]))
    if len(set(drawn)) > 1:
        raise RuntimeError(
            "The samplers of the processes draw different samples from the same data, so dividing their batches among "
            "the processes would leave samples out. If the sampler divides the samples itself, give it the attributes "
            "`num_replicas` and `rank`, as `torch.utils.data.DistributedSampler` has them. Otherwise let it draw the "
            "same samples on each process: from the global generators of PyTorch, NumPy and `random`, or from one with "
            "the same seed on each."
        )
