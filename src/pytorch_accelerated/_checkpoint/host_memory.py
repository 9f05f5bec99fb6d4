"""Host memory for a copy of nested tensors."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from pytorch_accelerated._nested import rebuild

_ALIGNMENT = 64  # bytes, as PyTorch aligns its own


class HostMemory:
    """Memory of the host for a copy of nested tensors, which serves again for the next copy."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    def copy_of(self, value: Any) -> Any:
        """Return a copy of a nested structure; it is good until the next one is made.

        Example:
            >>> weights = torch.ones(2)
            >>> copied = HostMemory().copy_of({"weights": [weights]})
            >>> weights.zero_()
            tensor([0., 0.])
            >>> copied
            {'weights': [tensor([1., 1.])]}
        """
        tensors: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        _replace_tensors(value, note)
        if not _are_alike(self._blocks, tensors):
            self._blocks = []  # what there was is free before there is more
            self._blocks = _make_blocks(tensors)
        if tensors:
            with torch.no_grad():
                torch._foreach_copy_(self._blocks, tensors)
        blocks = iter(self._blocks)
        return _replace_tensors(value, lambda _: next(blocks))


def _replace_tensors(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a nested structure with something else in the place of each tensor."""
    if isinstance(value, torch.Tensor):
        return replace(value)
    if value is None or isinstance(value, (str, float, int)):  # most of what there is
        return value
    return rebuild(value, lambda item: _replace_tensors(item, replace))


def _are_alike(blocks: list[torch.Tensor], tensors: list[torch.Tensor]) -> bool:
    return len(blocks) == len(tensors) and all(
        block.shape == tensor.shape and block.dtype == tensor.dtype and block.layout == tensor.layout
        for block, tensor in zip(blocks, tensors, strict=True)
    )


def _make_blocks(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of the host like others, the large ones in memory that is fast to use for the first time."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT if _is_large(tensor) else 0 for tensor in tensors]
    memory = _map_memory(sum(sizes))
    starts = itertools.accumulate([0, *sizes[:-1]])
    return [
        _block_in(memory, start, tensor) if size else torch.empty_like(tensor, device="cpu")
        for tensor, size, start in zip(tensors, sizes, starts, strict=True)
    ]


def _is_large(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is worth a place in such memory, and has its numbers side by side."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not is_plain or tensor.is_quantized or tensor.nbytes < mmap.PAGESIZE:
        return False
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _map_memory(num_bytes: int) -> memoryview:
    # The system makes a page when it is first written to, and for pages of the usual size that takes six times as long
    # as the copy itself.
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(num_bytes, dtype=torch.uint8).numpy().data  # aligned, as all of PyTorch's
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _block_in(memory: memoryview, start: int, like: torch.Tensor) -> torch.Tensor:
    block = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start)
    return block.as_strided(like.shape, like.stride())
