"""Nested structures of tensors: sequences, mappings and dataclasses."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import PackedSequence

from pytorch_accelerated._types import Batch, Nested

_MAX_OUTLINE_LENGTH = 400  # characters

Key = TypeVar("Key")
Item = TypeVar("Item")


def count_rows(value: Nested) -> int:
    """Return the length of the first dimension of the first tensor in a nested structure, at any depth.

    Args:
        value: A tensor, or tuples, lists, mappings and dataclasses of tensors.

    Raises:
        ValueError: There is no tensor with at least one dimension.

    Example:
        >>> count_rows({"id": ["a", "b"], "image": (torch.zeros(2, 3), torch.zeros(2))})
        2
    """
    for tensor in tensors_in(value):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise ValueError(
        f"There are no rows to count: a {type(value).__name__} contains no tensor with at least one dimension. Return "
        "tensors with one row per sample."
    )


def tensors_in(batch: Nested) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested sequences, mappings and dataclasses, in order."""
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


def like_mapping(original: Mapping[Key, Item], items: dict[Key, Item]) -> Mapping[Key, Item]:
    """Return ``items`` as a mapping of the type of ``original``; a plain dictionary for a `defaultdict`."""
    create: Callable[..., Mapping[Key, Item]] = type(original)  # a mapping whose class takes a dictionary
    if type(original) is OrderedDict:
        rebuilt = OrderedDict(items)
        vars(rebuilt).update(vars(original))  # the state of a model has its metadata there
        return rebuilt
    return items if isinstance(original, defaultdict) else create(items)


def named_items(value: Nested) -> Mapping[Any, Nested] | None:
    """Return what is in a mapping, a dataclass or a named tuple, by name; ``None`` for anything else.

    A dataclass that is a mapping too, such as an output of transformers, shows its fields.

    Example:
        >>> named_items({"logits": 1})
        {'logits': 1}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return value
    is_named_tuple = hasattr(value, "_asdict") and not isinstance(value, PackedSequence)
    return value._asdict() if is_named_tuple else None


def rebuild(value: Nested, change: Callable[[Nested], Nested]) -> Nested:
    """Return a mapping, sequence or dataclass of the same type, with ``change`` applied to each item.

    Any other value is returned unchanged.

    Example:
        >>> rebuild({"a": 1, "b": 2}, str)
        {'a': '1', 'b': '2'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return _rebuild_dataclass(value, {field.name: change(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return like_mapping(value, {name: change(item) for name, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(change, value))
    return value


def _rebuild_dataclass(value: Nested, items: Mapping[str, Nested]) -> Nested:
    if isinstance(value, Mapping):  # its fields are its items too
        return type(value)(**items)
    changed = copy.copy(value)  # its `__init__` may not take all fields as arguments
    for name, item in items.items():
        object.__setattr__(changed, name, item)
    return changed


def move_to_device(batch: Batch, device: torch.device, non_blocking: bool = False) -> Batch:
    """Return a batch with everything that has a ``.to`` method on ``device``, at any depth.

    Args:
        batch: The batch.
        device: The target device.
        non_blocking: Whether the host continues before the copy is complete. Operations on the device still wait
            for it.
    """
    if not hasattr(batch, "to"):
        return rebuild(batch, lambda item: move_to_device(item, device, non_blocking))
    if non_blocking:
        with suppress(TypeError):  # a user's `.to` may not accept the argument
            return batch.to(device, non_blocking=True)
    return batch.to(device)


def first_rows(value: Nested, num_rows: int, num_kept: int) -> Nested:
    """Return a nested structure in which every tensor of ``num_rows`` rows is cut to its first ``num_kept``.

    Example:
        >>> first_rows({"x": torch.arange(3), "loss": torch.tensor(0.5)}, num_rows=3, num_kept=1)
        {'x': tensor([0]), 'loss': tensor(0.5000)}
    """
    if isinstance(value, torch.Tensor):
        return value[:num_kept] if value.ndim > 0 and value.shape[0] == num_rows else value
    return rebuild(value, lambda item: first_rows(item, num_rows, num_kept))


def repeat_rows(value: Nested, num_rows: int, num_wanted: int) -> Nested:
    """Return a nested structure in which every tensor of ``num_rows`` rows is repeated until it has ``num_wanted``."""
    if isinstance(value, torch.Tensor):
        is_rows = value.ndim > 0 and value.shape[0] == num_rows
        return value[torch.arange(num_wanted, device=value.device) % num_rows] if is_rows else value
    return rebuild(value, lambda item: repeat_rows(item, num_rows, num_wanted))


def outline_of_arguments(args: Sequence[Nested], kwargs: Mapping[str, Nested]) -> str:
    """Return the types and shapes of what was passed to a function, for a message.

    Example:
        >>> outline_of_arguments((torch.zeros(8, 4), [torch.arange(3), "cat"]), {"mask": None})
        "float32 (8, 4), ['int64 (3,)', 'str'], mask=NoneType"
    """
    with suppress(Exception):  # the user's types may not be copied or printed
        given = [*map(str, map(_outline, args)), *(f"{key}={_outline(kwargs[key])}" for key in kwargs)]
        return ", ".join(given)[:_MAX_OUTLINE_LENGTH]
    return ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))[:_MAX_OUTLINE_LENGTH]


def _outline(value: Nested) -> Nested:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    outline = rebuild(value, _outline)
    return type(value).__name__ if outline is value else outline


def on_host(outputs: Nested) -> Nested:
    """Return outputs copied to host memory, which frees the memory of the device."""
    return move_to_device(outputs, torch.device("cpu"))
