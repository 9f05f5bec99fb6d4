"""Writing in the background: a copy of what is to be written, and the one thread that writes it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

from pytorch_accelerated._data import rebuild


class BackgroundWriter:
    """Writes in a thread, one thing at a time; what goes wrong there is raised where somebody waits for it."""

    def __init__(self) -> None:
        self._is_under_way = False
        self._is_done = threading.Event()
        self._error: Exception | None = None

    def start(self, write: Callable[[], Any]) -> None:
        """Call a function in the background; nothing else may be under way."""
        self._is_done.clear()
        self._is_under_way = True
        threading.Thread(target=self._run, args=(write,), name="training state writer").start()

    @property
    def is_under_way(self) -> bool:
        """Whether something was started that nobody has waited for."""
        return self._is_under_way

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            Exception: What went wrong since the last time.
        """
        if self._is_under_way:
            self._is_done.wait()  # `Thread.join` takes a thread for ended when a handler of signals interrupts it
        self._is_under_way = False
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error
        finally:
            self._is_done.set()


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
        numbers = itertools.count()

        def copy(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                return self._block(next(numbers), item).copy_(item.detach())
            return rebuild(item, copy)

        return copy(value)

    def _block(self, number: int, like: torch.Tensor) -> torch.Tensor:
        if number == len(self._blocks):
            self._blocks.append(torch.empty(0))
        block = self._blocks[number]
        if block.shape != like.shape or block.dtype != like.dtype or block.layout != like.layout:
            block = self._blocks[number] = torch.empty_like(like, device="cpu", requires_grad=False)
        return block
