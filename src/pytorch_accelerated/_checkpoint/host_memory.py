"""Reusable host memory for a copy of nested tensors."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable
from contextlib import suppress

import torch

from pytorch_accelerated._tensors.nested import rebuild
from pytorch_accelerated._types import Nested

_ALIGNMENT = 64  # bytes, the same as PyTorch's own allocator


class HostMemory:
    """Host memory for a copy of nested tensors, reused for the next copy if the tensors still match."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    def copy(self, value: Nested) -> Nested:
        """Return a copy of a nested structure; it is valid until the next call.

        Example:
            >>> weights = torch.ones(2)
            >>> copied = HostMemory().copy({"weights": [weights]})
            >>> weights.zero_()
            tensor([0., 0.])
            >>> copied
            {'weights': [tensor([1., 1.])]}
        """
        tensors: list[torch.Tensor] = []

        def collect(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        _map_tensors(value, collect)
        if not _match(self._blocks, tensors):
            self._blocks = []  # free the old memory before allocating more
            self._blocks = _allocate_like(tensors)
        with torch.no_grad():
            for block, tensor in zip(self._blocks, tensors, strict=True):
                block.copy_(tensor)
        blocks = iter(self._blocks)
        return _map_tensors(value, lambda _: next(blocks))


def _map_tensors(value: Nested, function: Callable[[torch.Tensor], torch.Tensor]) -> Nested:
    """Return a nested structure with each tensor replaced by the result of a function."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if value is None or isinstance(value, (str, float, int)):  # the most common leaves first
        return value
    return rebuild(value, lambda item: _map_tensors(item, function))


def _match(blocks: list[torch.Tensor], tensors: list[torch.Tensor]) -> bool:
    return len(blocks) == len(tensors) and all(
        block.shape == tensor.shape and block.dtype == tensor.dtype and block.layout == tensor.layout
        for block, tensor in zip(blocks, tensors, strict=True)
    )


def _allocate_like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Allocate a host tensor for each tensor; the large ones share memory that is fast to touch for the first time."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT if _is_large(tensor) else 0 for tensor in tensors]
    memory = _map_memory(sum(sizes))
    starts = itertools.accumulate([0, *sizes[:-1]])
    return [
        _view_at(memory, start, tensor) if size else torch.empty_like(tensor, device="cpu")
        for tensor, size, start in zip(tensors, sizes, starts, strict=True)
    ]


def _is_large(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is large enough for the shared memory, and dense and contiguous, so that it fits in."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not is_plain or tensor.is_quantized or tensor.nbytes < mmap.PAGESIZE:
        return False
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _map_memory(num_bytes: int) -> memoryview:
    # The system allocates a page when it is first written to. With pages of the default size, that takes six times as
    # long as the copy itself.
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(num_bytes, dtype=torch.uint8).numpy().data  # aligned by PyTorch
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _view_at(memory: memoryview, start: int, like: torch.Tensor) -> torch.Tensor:
    block = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start)
    return block.as_strided(like.shape, like.stride())
