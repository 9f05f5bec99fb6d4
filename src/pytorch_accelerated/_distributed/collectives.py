"""Collectives: exchange values between processes, and call functions that succeed or fail on all of them.

They take the number of processes and do nothing in a single process. Unless a docstring says otherwise, they must be
called on every process.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import distributed

from pytorch_accelerated._distributed.reasons import first_of, is_reason, packed, unpacked
from pytorch_accelerated._distributed.waiting import new_host_group
from pytorch_accelerated._tensors.nested import rebuild
from pytorch_accelerated._types import Batch, MaybeNone, Nested
from pytorch_accelerated.exceptions import CheckpointError

_host_group_of_world: list[distributed.ProcessGroup | None] = []
"""The default process group and the gloo group next to it. All runs share that one, because each holds sockets."""


def host_group() -> distributed.ProcessGroup | None:
    """Return the process group that connects hosts, so that no device waits; ``None`` if it is the default group."""
    if distributed.get_backend() == "gloo":
        return None  # the default group connects hosts
    world = distributed.group.WORLD
    if not _host_group_of_world or _host_group_of_world[0] is not world:
        _host_group_of_world[:] = world, new_host_group()
    return _host_group_of_world[1]


T = TypeVar("T")


def num_local_processes(num_processes: int) -> int:
    """Return how many of the processes run on this node. Not a collective.

    Args:
        num_processes: The world size, which is also the result where the launcher does not set ``LOCAL_WORLD_SIZE``.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))


def run_on_main(func: Callable[[], T], is_main: bool, num_processes: int) -> T:
    """Call a function on the main process only, and return its result, or raise its error, on every process.

    Args:
        func: Returns something that can be pickled.
        is_main: Whether this is the main process.
        num_processes: The world size.
    """
    result: T | MaybeNone = None
    error: Exception | None = None
    if is_main:
        try:
            result = func()
        except Exception as caught:
            error = _as_picklable(caught) if num_processes > 1 else caught
    result, error = broadcast_from_main((result, error), num_processes)
    if error is not None:
        raise error
    return result


def _as_picklable(error: Exception) -> Exception:
    if is_reason(error):
        return unpacked(packed(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def run_on_all(func: Callable[[], T], num_processes: int, group: distributed.ProcessGroup | None = None) -> T:
    """Call a function on every process, and return its local result. If it fails on one process, raise on all of them.

    Without this, the other processes would wait forever for the one that failed.

    Args:
        func: Must not wait for other processes.
        num_processes: The world size.
        group: The process group; ``None`` for the default group.

    Raises:
        NonFiniteLossError, StopTrainingError: The function raised it on any process.
        CheckpointError: The function failed on another process.
        Exception: The function failed on this process.
    """
    if num_processes == 1 or not distributed.is_initialized():
        return func()

    result: T | MaybeNone = None
    error: Exception | None = None
    try:
        result = func()
    except Exception as caught:
        error = caught
    is_of_program = error is not None and not isinstance(error, CheckpointError)
    failure = None if error is None else (str(error), packed(error) if is_reason(error) else None, is_of_program)
    failures = [failure for failure in all_gather_objects(failure, num_processes, group) if failure is not None]
    reasons = [unpacked(reason) for _, reason, _ in failures if reason is not None]
    if reasons:
        raise first_of(reasons) from error
    if error is not None and is_of_program:
        raise error
    if failures:
        message, _, is_of_program = max(failures, key=lambda failure: failure[-1])
        failed = CheckpointError(message)
        failed.is_of_program = is_of_program
        raise failed from error
    return result


def broadcast_from_main(value: T, num_processes: int) -> T:
    """Return the main process's value on every process; it must be possible to pickle it."""
    if num_processes == 1 or not distributed.is_initialized():
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


_SENT_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
"""What every backend can send. Tensors of other types are pickled."""


@dataclass(frozen=True)
class _SentTensor:
    """Stands for a tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype


def broadcast_batches(
    read: Callable[[], list[Batch]], is_main: bool, num_processes: int, device: torch.device
) -> list[Batch]:
    """Read batches on the main process, and return them, or raise what reading raised, on every process.

    Batches may contain anything that can be pickled. Tensors are sent by themselves, from device to device unless the
    process group connects hosts.

    Args:
        read: Returns the batches; called on the main process.
        is_main: Whether this is the main process.
        num_processes: The world size.
        device: The device of this process.
    """
    tensors: list[torch.Tensor] = []
    pickled = run_on_main(
        lambda: pickle.dumps([_without_tensors(batch, tensors) for batch in read()]), is_main, num_processes
    )
    device = _device_of_group(device)
    sent = iter(tensors)

    def receive(item: _SentTensor) -> torch.Tensor:
        tensor = (
            next(sent).to(device).contiguous() if is_main else torch.empty(item.shape, dtype=item.dtype, device=device)
        )
        distributed.broadcast(tensor, src=0)
        return tensor

    return [_with_tensors(batch, receive) for batch in pickle.loads(pickled)]


def all_gather_nested(value: T, num_processes: int, device: torch.device) -> list[T]:
    """Return the values of all processes in rank order, on every process. They may have nothing in common.

    They may contain anything that can be pickled. Tensors are sent by themselves, as bytes, from device to device
    unless the process group connects hosts.

    Args:
        value: The local value.
        num_processes: The world size.
        device: The device of this process.
    """
    if num_processes == 1:
        return [value]
    tensors: list[torch.Tensor] = []
    without_tensors = _without_tensors(value, tensors)
    values = all_gather_objects((without_tensors, sum(tensor.nbytes for tensor in tensors)), num_processes)
    capacity = max(num_bytes for _, num_bytes in values)
    if capacity == 0:
        return [each for each, _ in values]
    device = _device_of_group(device)
    local = torch.zeros(capacity, dtype=torch.uint8, device=device)
    start = 0
    for tensor in tensors:
        local[start : start + tensor.nbytes] = tensor.to(device).contiguous().flatten().view(torch.uint8)
        start += tensor.nbytes
    blocks = gather(local).split(capacity)
    return [_with_tensors(each, _reader(block)) for (each, _), block in zip(values, blocks, strict=True)]


def _reader(block: torch.Tensor) -> Callable[[_SentTensor], torch.Tensor]:
    """Return a function that reads one tensor after the other from their bytes."""
    start = 0

    def read(item: _SentTensor) -> torch.Tensor:
        nonlocal start
        first, start = start, start + item.shape.numel() * torch.empty(0, dtype=item.dtype).element_size()
        return block[first:start].clone().view(item.dtype).view(item.shape)

    return read


def _device_of_group(device: torch.device) -> torch.device:
    """Return where tensors have to be to be sent: on the host if the process group connects hosts."""
    return torch.device("cpu") if "gloo" in str(distributed.get_backend()) else device


def _without_tensors(value: Nested, tensors: list[torch.Tensor]) -> Nested:
    """Return a nested structure with a `_SentTensor` in the place of each tensor, which is added to a list."""
    if type(value) is torch.Tensor and value.layout is torch.strided and value.dtype in _SENT_DTYPES:
        tensors.append(value.detach())
        return _SentTensor(value.shape, value.dtype)
    return value if hasattr(value, "to") else rebuild(value, lambda item: _without_tensors(item, tensors))


def _with_tensors(value: Nested, receive: Callable[[_SentTensor], torch.Tensor]) -> Nested:
    """Return a nested structure with the tensor in the place of each `_SentTensor`, in order."""
    if isinstance(value, _SentTensor):
        return receive(value)
    return value if hasattr(value, "to") else rebuild(value, lambda item: _with_tensors(item, receive))


def all_gather_objects(value: T, num_processes: int, group: distributed.ProcessGroup | None = None) -> list[T]:
    """Return the values of all processes in rank order, on every process.

    Args:
        value: The local value; it must be possible to pickle it.
        num_processes: The world size.
        group: The process group; ``None`` for the default group.
    """
    values = [value] * num_processes
    if num_processes > 1:
        distributed.all_gather_object(values, value, group=group)
    return values


def sum_over_processes(
    pairs: Mapping[str, tuple[float | torch.Tensor, float | torch.Tensor]], device: torch.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Sum named pairs of numbers over all processes, in float64 where the device supports it.

    Args:
        pairs: The local pairs by name. A pair that is missing on a process counts as zero there.
        device: Where the process group exchanges tensors.

    Returns:
        The sums under every name that exists on any process, in alphabetical order.
    """
    names = sorted({name for local_names in gather_object([sorted(pairs)]) for name in local_names})
    numbers = [number for name in names for number in pairs.get(name, (0.0, 0.0))]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    stacked = torch.stack([torch.as_tensor(number, dtype=dtype, device=device) for number in numbers])
    totals = reduce(stacked, reduction="sum").view(-1, 2)
    return {name: (total, weight) for name, (total, weight) in zip(names, totals.unbind(), strict=True)}


def mean_over_processes(value: torch.Tensor, num_processes: int) -> torch.Tensor:
    """Return the mean of a tensor over the processes, bit-identical on all of them. Must be called on every process."""
    if num_processes == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / num_processes


def share_of_processes(weight: float, num_processes: int, device: torch.device) -> float | torch.Tensor | None:
    """Return what to multiply the loss of this process by, so that the average over processes is the weighted mean.

    Must be called on every process.

    Args:
        weight: How much the loss of this process weighs.
        num_processes: The world size.
        device: Where the process group exchanges tensors.

    Returns:
        The factor; ``None`` for none, with a single process.
    """
    if num_processes == 1:
        return None
    mean = mean_over_processes(torch.tensor(float(weight), device=device), num_processes)
    return weight / mean.where(mean != 0, 1)


def broadcast_values(parameters: Iterable[torch.Tensor]) -> None:
    """Give parameters the values of the main process, as DDP does with those of its model."""
    for parameter in parameters:
        distributed.broadcast(parameter.data, src=0)


def average_gradients(parameters: Iterable[torch.Tensor], num_processes: int) -> None:
    """Average gradients over the processes, as DDP does with those of its model.

    A gradient that is missing on some processes counts as zeros there. If it is missing on all, it stays missing.

    Args:
        parameters: The same parameters on every process.
        num_processes: The world size.
    """
    for (device, dtype), group in _by_device_and_dtype(parameters).items():
        has_gradient = torch.tensor([parameter.grad is not None for parameter in group], dtype=dtype, device=device)
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in group]
        parts = [has_gradient, *(gradient.to_dense().flatten() for gradient in gradients)]
        total = torch.cat(parts)
        distributed.all_reduce(total)
        counts, *sums = torch.split(total, [len(part) for part in parts])
        for parameter, count, gradient_sum in zip(group, counts.tolist(), sums, strict=True):
            if count > 0:
                parameter.grad = (gradient_sum / num_processes).view_as(parameter)


def _by_device_and_dtype(
    tensors: Iterable[torch.Tensor],
) -> dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return groups


def gather_uneven(value: Nested, padding_value: float | None = None) -> Nested:
    """Concatenate the rows of all processes in rank order; the number of rows may differ between processes.

    Rows are padded for the exchange. The padding is removed by row count, so real values may equal it.

    Args:
        value: A tensor of shape ``(rows, ...)``, or tuples, lists, mappings and dataclasses of them with the same
            structure on every process.
        padding_value: Fills the dimensions after the first where processes differ in them; ``None`` if they agree. A
            process without rows then takes the dimensions and the type of the others.

    Returns:
        The structure of ``value`` with tensors of shape ``(sum of rows, ...)``. Scalar tensors become a vector with one
        entry per process.

    Raises:
        ValueError: The dimensions after the first differ, and ``padding_value`` is ``None``. Raised on every process.
        TypeError: ``value`` contains something that is not a tensor.
    """
    if isinstance(value, (Mapping, tuple, list)) or is_dataclass(value):
        return rebuild(value, lambda item: gather_uneven(item, padding_value))
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"A {type(value).__name__} cannot be gathered. Expected a tensor, or tuples, lists and mappings of "
            "tensors. Use `accelerate.utils.gather_object` for other objects."
        )
    if value.ndim == 0 and padding_value is None:
        return gather(value)
    if padding_value is not None:
        value = _fit_others(value)
    shapes = gather(torch.tensor([value.shape], device=value.device))  # (num_processes, ndim)
    num_rows, *sizes = shapes.unbind(dim=1)
    if padding_value is None and any(size.unique().numel() > 1 for size in sizes):
        raise ValueError(
            f"The tensors to gather have the shapes {shapes.tolist()} on the processes, in rank order. Only the "
            "first dimension may differ. Pass a `padding_value` to fill the other dimensions."
        )
    padded = value.new_full(shapes.max(dim=0).values.tolist(), padding_value or 0)
    padded[tuple(slice(size) for size in value.shape)] = value
    blocks = gather(padded).split(padded.shape[0]) if padded.numel() else [padded] * len(num_rows)
    return torch.cat([block[:rows] for block, rows in zip(blocks, num_rows.tolist(), strict=True)])


def _fit_others(value: torch.Tensor) -> torch.Tensor:
    """Return the tensor of this process with the number of dimensions, and the type, that the other processes have.

    Only a tensor without rows is changed, and a scalar, which becomes a row.

    Raises:
        ValueError: Processes with rows differ in them. Raised on every process.
    """
    value = value.reshape(1) if value.ndim == 0 else value
    all_kinds = gather_object([(len(value) > 0, value.ndim, value.dtype)])
    kinds = {(ndim, dtype) for has_rows, ndim, dtype in all_kinds if has_rows} or {all_kinds[0][1:]}
    if len(kinds) > 1:
        raise ValueError(
            f"The tensors to gather differ in their number of dimensions or their type: {sorted(map(str, kinds))}. "
            "Expected the same on every process that has rows."
        )
    ndim, dtype = kinds.pop()
    return value.to(dtype) if value.ndim == ndim else value.new_empty((0,) * ndim, dtype=dtype)


def drop_placeholders(value: Nested, padding_value: float) -> Nested:
    """Return a nested structure in which each tensor that consists of the padding value only has no rows.

    Programs gather such a tensor where a process has nothing to contribute.

    Args:
        value: A tensor, or tuples, lists, mappings and dataclasses of tensors. Scalars have no rows, and are kept.
        padding_value: The value, which other tensors may contain too.

    Example:
        >>> drop_placeholders((torch.tensor([[-1, -1]]), torch.tensor([1, -1])), -1)
        (tensor([], size=(0, 2), dtype=torch.int64), tensor([ 1, -1]))
    """
    if not isinstance(value, torch.Tensor):
        return rebuild(value, lambda item: drop_placeholders(item, padding_value))
    is_padding = torch.isnan(value) if math.isnan(padding_value) else value == padding_value
    is_placeholder = value.ndim > 0 and value.numel() > 0 and bool(is_padding.all())
    return value[:0] if is_placeholder else value


def remove_padding(padded_tensor: torch.Tensor, pad_value: float) -> torch.Tensor:
    """Remove the rows that consist of ``pad_value`` only, or in one dimension, the entries that equal it.

    Args:
        padded_tensor: Shape ``(rows, ...)``.
        pad_value: The value of the padding.

    Example:
        >>> remove_padding(torch.tensor([[1, -1], [-1, -1]]), -1)
        tensor([[ 1, -1]])
    """
    is_real = padded_tensor != pad_value
    if is_real.ndim > 1:
        is_real = is_real.flatten(1).any(dim=1)
    return padded_tensor[is_real]
