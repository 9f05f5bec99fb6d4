"""What the output of a model for one batch has for each sample: rows of tensors, entries of lists, parts by name."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from pytorch_accelerated._tensors.nested import named_items
from pytorch_accelerated._types import ModelOutput, Nested

Path: TypeAlias = tuple[Hashable, ...]
"""Where something is in the output of a batch: ``("outputs", "logits")``."""

Part: TypeAlias = Any
"""What `as_parts` makes of an output. Open: it may contain objects of the user's, one for each sample."""

_ARRAYS = (torch.Tensor, np.ndarray)


@dataclass(frozen=True)
class LeftOut:
    """Stands for something in an output that has no part for each sample.

    Args:
        description: What it is, for a message; ``None`` if nobody asked for it.
    """

    description: str | None = None


@dataclass(frozen=True)
class FixedParts:
    """The parts of a sequence that has the same ones in each batch, such as logits and features.

    Args:
        items: What `as_parts` made of each of them.
    """

    items: tuple[Part, ...]


def as_parts(output: ModelOutput, size: int, path: Path, left_out: Collection[Path] = ()) -> Part:
    """Take the output of a batch apart into what has a part for each sample, and what has none.

    Args:
        output: What the model returned for one batch, or something in it.
        size: The number of samples in the batch.
        path: Where it is in the whole.
        left_out: What is to be left out, wherever it is.

    Returns:
        A tensor of ``size`` rows; a single number; ``None`` or a text; a list or tuple that may have an entry for each
        sample; a `LeftOut` for anything else. Mappings, dataclasses and named tuples become a dictionary of these,
        other sequences `FixedParts`.
    """
    if path in left_out:
        return LeftOut()
    output = _unpacked(output)
    if isinstance(output, torch.Tensor) and output.ndim > 0:
        output = output if output.layout is torch.strided else output.to_dense()
        has_rows = len(output) == size
        return output.detach() if has_rows else LeftOut(f"a tensor of the shape {tuple(output.shape)}")
    named = named_items(output)
    if named is not None:
        return {name: as_parts(item, size, (*path, name), left_out) for name, item in named.items()}
    if isinstance(output, (tuple, list)):
        return output if _may_be_samples(output, size) else fixed_parts(output, size, path, left_out)
    is_kept = output is None or isinstance(output, (str, bytes)) or is_number(output)
    return output if is_kept else LeftOut(None if _is_cache(output) else f"an object of type {type(output).__name__}")


def _unpacked(output: ModelOutput) -> ModelOutput:
    """Return an array of numbers as a tensor; other arrays, packed and nested tensors as a list of their entries."""
    if isinstance(output, PackedSequence):
        return _Samples(unpack_sequence(output))
    if isinstance(output, torch.Tensor) and output.is_nested:
        return _Samples(output.unbind())
    if isinstance(output, np.ndarray) and output.ndim > 0:
        has_numbers = output.dtype.kind in "biufc"
        return torch.from_numpy(np.array(output, order="C")) if has_numbers else _Samples(output)
    return output


def _is_cache(output: object) -> bool:
    """Tell whether an output only serves the next call of a model; transformers calls such classes ``...Cache``."""
    return any("Cache" in base.__name__ for base in type(output).__mro__)


class _Samples(list[Any]):
    """A list that certainly has an entry for each sample."""


def fixed_parts(output: Sequence[Any], size: int, path: Path, left_out: Collection[Path]) -> FixedParts:
    """Return what `as_parts` makes of each entry of a sequence that has the same ones in each batch."""
    return FixedParts(tuple(as_parts(item, size, (*path, i), left_out) for i, item in enumerate(output)))


def _may_be_samples(entries: Sequence[Any], size: int) -> bool:
    """Tell whether a sequence may have an entry for each sample."""
    are_alike = len({_kind_of_entry(entry) for entry in entries}) == 1
    return len(entries) == size and (are_alike or not may_be_parts(entries, size))


def may_be_parts(entries: Sequence[Any], size: int) -> bool:
    """Tell whether a sequence may have the same parts in each batch, with a row for each sample."""
    return not isinstance(entries, _Samples) and any(length == size for length in _lengths_in(entries))


def are_probably_parts(entries: Sequence[Any], size: int) -> bool:
    """Tell whether a sequence that may be parts or samples is more likely to be parts."""
    are_all_rows = all(length == size for length in _lengths_in(entries))
    return (are_all_rows or isinstance(entries, tuple)) and named_items(entries[0]) is None


def _kind_of_entry(entry: Any) -> tuple[object, ...]:
    return (type(entry), entry.ndim, entry.dtype) if isinstance(entry, _ARRAYS) else (type(entry),)


def _lengths_in(value: Nested) -> Iterator[int]:
    """Yield the length of the first dimension of every tensor and array, at any depth."""
    if isinstance(value, _ARRAYS):
        if value.ndim > 0:
            yield len(value)
        return
    named = named_items(value)
    for item in named.values() if named is not None else value if isinstance(value, (tuple, list)) else ():
        yield from _lengths_in(item)


def is_number(value: object) -> bool:
    """Tell whether a value is a single number, as such or in a tensor or array without dimensions."""
    return isinstance(value, (numbers.Number, np.generic)) or (isinstance(value, _ARRAYS) and value.ndim == 0)
