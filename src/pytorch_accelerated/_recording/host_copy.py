"""Numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pytorch_accelerated._means import widened


class HostCopy:
    """A copy of some numbers in host memory. From a CUDA device it arrives while the host continues.

    Args:
        numbers: Numbers, and tensors with one element.

    Example:
        >>> copy = HostCopy([1.0, torch.tensor(2.0)])
        >>> copy.numbers()
        [1.0, 2.0]
    """

    def __init__(self, numbers: Sequence[float | torch.Tensor]) -> None:
        self._numbers: list[Any] = list(numbers)
        self._places = [place for place, number in enumerate(numbers) if isinstance(number, torch.Tensor)]
        self._copies: torch.Tensor | None = None
        self._arrival: torch.cuda.Event | None = None
        tensors = [widened(self._numbers[place].detach()) for place in self._places]
        if not tensors:
            return
        device = next((tensor.device for tensor in tensors if not tensor.is_cpu), tensors[0].device)
        self._copies = torch.stack([tensor.to(device, non_blocking=True) for tensor in tensors])
        if device.type == "cuda":
            on_device, self._copies = self._copies, torch.empty_like(self._copies, device="cpu", pin_memory=True)
            self._copies.copy_(on_device, non_blocking=True)
            self._arrival = torch.cuda.current_stream(device).record_event()

    @property
    def is_on_host(self) -> bool:
        """Whether nothing had to be copied from a CUDA device."""
        return self._arrival is None

    def has_arrived(self) -> bool:
        """Return whether `numbers` returns at once."""
        if self._arrival is None:
            return True
        has_arrived: bool = self._arrival.query()  # type: ignore[no-untyped-call]  # PyTorch does not type it
        return has_arrived

    def numbers(self) -> list[float]:
        """Return the numbers; wait for them if they have not arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        if self._copies is not None:
            for place, number in zip(self._places, self._copies.tolist(), strict=True):
                self._numbers[place] = number
            self._copies = None
        return [float(number) for number in self._numbers]
