"""Collectives: values exchanged between processes, and functions that succeed or fail on all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

from pytorch_accelerated._nested import rebuild
from pytorch_accelerated.exceptions import CheckpointError


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


Result = TypeVar("Result")


def run_on_main(decide: Callable[[], Result], is_main: bool, num_processes: int) -> Result:
    """Call a function on the main process only, and return, or raise, the same everywhere.

    Must be called on every process.

    Args:
        decide: Returns something that can be pickled.
        is_main: Whether this is the main process.
        num_processes: How many there are.
    """
    result: Any = None
    error: Exception | None = None
    if is_main:
        try:
            result = decide()
        except Exception as caught:
            error = caught
    result, error = broadcast_from_main((result, error), num_processes)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def run_on_all(act: Callable[[], Result], num_processes: int, group: Any = None) -> Result:
    """Call a function on every process, and return what it returned there, unless it failed on any.

    Otherwise a process that fails would leave the others waiting for it. Must be called on every process.

    Args:
        act: What to do; it must not wait for other processes.
        num_processes: How many there are.
        group: How they tell each other; ``None`` for the default group.

    Raises:
        CheckpointError: It failed on another process.
        Exception: It failed on this one.
    """
    if num_processes == 1 or not distributed.is_initialized():
        own_result = act()
        broadcast_from_main(None, num_processes)  # processes of another kind (XLA) at least wait for each other
        return own_result
    result: Any = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    problems = values_of_all(None if error is None else str(error), num_processes, group)
    if error is not None and not isinstance(error, CheckpointError):
        raise error
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        raise CheckpointError(problem) from error
    return result  # type: ignore[no-any-return]


def num_local_processes(num_processes: int) -> int:
    """Return how many of the processes run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))


def broadcast_from_main(value: Any, num_processes: int) -> Any:
    """Return the main process's value on every process. Must be called on every process."""
    if num_processes == 1 or not torch.distributed.is_initialized():
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def values_of_all(value: Any, num_processes: int, group: Any = None) -> list[Any]:
    """Return, on every process, the values of all in the order of their ranks. Must be called on every process.

    Args:
        value: That of this process.
        num_processes: How many there are.
        group: How they tell each other; ``None`` for the default group.
    """
    values: list[Any] = [value] * num_processes
    if num_processes > 1:
        torch.distributed.all_gather_object(values, value, group=group)
    return values


def sum_over_processes(
    accelerator: Accelerator, sums: Mapping[str, tuple[float | torch.Tensor, float | torch.Tensor]]
) -> dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]:
    """Add up named pairs of numbers over the processes. Must be called on every process.

    Args:
        accelerator: The accelerator.
        sums: A pair for each name. What a process does not have, it adds nothing to.

    Returns:
        The pairs of all names that any process has, in alphabetical order.
    """
    names = sorted({name for own_names in gather_object([sorted(sums)]) for name in own_names})
    numbers = [number for name in names for number in sums.get(name, (0.0, 0.0))]
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    stacked = torch.stack([torch.as_tensor(number, dtype=dtype, device=accelerator.device) for number in numbers])
    totals = accelerator.reduce(stacked, reduction="sum").view(-1, 2)
    return {name: (total, weight) for name, (total, weight) in zip(names, totals.unbind(), strict=True)}


def gather_uneven(accelerator: Accelerator, value: Any, padding_value: float | None = None) -> Any:
    """Concatenate the rows that each process has, however many, in the order of the processes.

    Rows are exchanged with padding, and cut off again by their number, so real values that equal the padding stay.
    Must be called on every process.

    Args:
        accelerator: The accelerator.
        value: A tensor of shape ``(rows, ...)``, or tuples, lists and mappings of them, nested alike everywhere.
        padding_value: Fills up the dimensions after the first; ``None`` if they are alike.

    Returns:
        ``value``'s structure with tensors of shape ``(sum of rows, ...)``. Tensors without dimension become a vector.

    Raises:
        ValueError: The dimensions after the first differ, and there is no ``padding_value``.
    """
    if isinstance(value, (Mapping, tuple, list)) or is_dataclass(value):
        return rebuild(value, lambda item: gather_uneven(accelerator, item, padding_value))
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"Only tensors, and tuples, lists and mappings of them, can be gathered, not a {type(value).__name__}. "
            "Use `accelerate.utils.gather_object` for other objects."
        )
    if value.ndim == 0:
        return accelerator.gather(value)
    shapes = accelerator.gather(torch.tensor([value.shape], device=value.device))  # (num_processes, ndim)
    num_rows, *sizes = shapes.unbind(dim=1)
    if padding_value is None and any(size.unique().numel() > 1 for size in sizes):
        raise ValueError(
            f"The processes have tensors of the shapes {shapes.tolist()}, which differ in more than the number of "
            "rows. Give a `padding_value` to fill up the other dimensions."
        )
    padded = value.new_full(shapes.max(dim=0).values.tolist(), padding_value or 0)
    padded[tuple(slice(size) for size in value.shape)] = value
    blocks = accelerator.gather(padded).split(padded.shape[0]) if padded.numel() else [padded] * len(num_rows)
    return torch.cat([block[:rows] for block, rows in zip(blocks, num_rows.tolist(), strict=True)])


PROCESS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another, unless the user's accelerator says otherwise."""
