"""Gradient accumulation: the weights of the batches that make one update together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated.tracking import widened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class AccumulationWindow:
    r"""Makes the gradient of an update that of the mean over all items of its batches, however they are sized.

    With :math:`w_i` items in batch :math:`i` and the gradient :math:`g_i` of its mean loss, an update should use
    :math:`\sum_i w_i g_i / \sum_i w_i`, where the sums go over the :math:`n` batches of the window on all :math:`R`
    processes. The sum of weights is known only at the end, so each loss is scaled by :math:`w_i / (n w)` with some
    usual weight :math:`w`. As the processes' gradients are averaged, that is right when all batches weigh :math:`w`, as
    they usually do; otherwise the gradients are multiplied once by :math:`R n w / \sum_i w_i`.

    Example:
        >>> window = AccumulationWindow()
        >>> [window.add(weight, num_batches=2) for weight in (8, 4)]
        [0.5, 0.25]
        >>> round(window.close(), 4)
        1.3333
        >>> window.add(8, num_batches=1) is window.close() is None  # alone in its window: nothing to scale
        True
    """

    def __init__(self) -> None:
        self.total: float | torch.Tensor = 0
        """The weight of the window's batches so far, on this process; not counted if there is one on one process."""

        self.num_samples = 0
        """How many samples they hold; only counted."""

        self.expected: float | torch.Tensor | None = None
        """What it is going to be if all batches are as usual; nothing is expected where nothing is counted."""

    def reset(self) -> None:
        """Forget the batches since the last update."""
        self.total = self.num_samples = 0
        self.expected = None

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of a window that waits for more batches."""
        return {"total": self.total, "num_samples": self.num_samples, "expected": self.expected}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the window that `state_dict` described."""
        self.total = state_dict["total"]
        self.num_samples = state_dict["num_samples"]
        self.expected = state_dict["expected"] or None  # earlier versions wrote 0

    def add(
        self, weight: float | torch.Tensor, num_batches: int, nominal_weight: float | None = None
    ) -> float | torch.Tensor | None:
        """Take in the next batch, and return what to multiply its loss by; ``None`` if nothing.

        Args:
            weight: How many items its mean loss was taken over; a tensor stays on its device.
            num_batches: How many batches the window is going to have, as far as is known when it begins.
            nominal_weight: What a batch weighs as a rule, above 0 and the same on every process. ``None``, if there is
                one process, for the weight of the window's first batch.
        """
        if self.expected is None and num_batches == 1 and nominal_weight is None:
            return None
        if isinstance(weight, torch.Tensor):
            weight = widened(weight)
        if self.expected is None:
            self.expected = num_batches * (_at_least_one(weight) if nominal_weight is None else nominal_weight)
        self.total = self.total + weight
        return None if _are_equal_numbers(weight, self.expected) else weight / self.expected

    def close(self, total: float | torch.Tensor | None = None, num_processes: int = 1) -> float | torch.Tensor | None:
        """End the window, and return what to multiply the gradients by; ``None``, the usual case, if nothing.

        Args:
            total: The weight of the window on all processes; ``None`` if there is one.
            num_processes: How many processes' gradients are averaged.
        """
        if self.expected is None:
            self.num_samples = 0
            return None
        total = self.total if total is None else total
        expected = self.expected * num_processes
        self.reset()
        return None if _are_equal_numbers(total, expected) else expected / _at_least_one(total)


def _at_least_one(weight: float | torch.Tensor) -> float | torch.Tensor:
    # A batch may hold no item at all, such as a text of padding only.
    return weight.clamp(min=1) if isinstance(weight, torch.Tensor) else max(weight, 1)


def _are_equal_numbers(left: float | torch.Tensor, right: float | torch.Tensor) -> bool:
    # Tensors are not compared: that would read them from the device.
    return not isinstance(left, torch.Tensor) and not isinstance(right, torch.Tensor) and left == right


def scale_gradients(parameters: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply all gradients by ``factor``, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
