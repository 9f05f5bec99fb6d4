"""Gradient accumulation: the weights of the batches that make one update together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


class AccumulationWindow:
    r"""Makes the gradient of an update that of the mean over all items of its batches, however they are sized.

    With :math:`w_i` items in batch :math:`i` and the gradient :math:`g_i` of its mean loss, an update should use
    :math:`\sum_i w_i g_i / \sum_i w_i`. The sum of weights is known only at the end, so each loss is scaled by
    :math:`w_i / (n w_1)`, which is right when all :math:`n` batches weigh the same, as they usually do; otherwise the
    gradients are multiplied once by :math:`n w_1 / \sum_i w_i`.

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
        self._num_batches = 0
        self._num_expected = 0
        self._total: float | torch.Tensor = 0
        self._expected: float | torch.Tensor = 0

    def reset(self) -> None:
        """Forget the batches since the last update."""
        self._num_batches = self._num_expected = 0
        self._total = self._expected = 0

    def add(self, weight: float | torch.Tensor, num_batches: int) -> float | torch.Tensor | None:
        """Take in the next batch, and return what to multiply its loss by; ``None`` if nothing.

        Args:
            weight: How many items its mean loss was taken over; a tensor stays on its device.
            num_batches: How many batches the window is going to have, as far as is known when it begins.
        """
        if self._num_batches == 0:
            self._num_expected = num_batches
            self._expected = _at_least_one(weight) * num_batches
        self._num_batches += 1
        self._total = self._total + weight
        return None if self._is_single else weight / self._expected

    def close(self) -> float | torch.Tensor | None:
        """End the window, and return what to multiply the gradients by; ``None``, the usual case, if nothing."""
        is_right = self._is_single or _are_equal_numbers(self._total, self._expected)
        correction = None if is_right else self._expected / _at_least_one(self._total)
        self.reset()
        return correction

    @property
    def _is_single(self) -> bool:
        return self._num_batches == self._num_expected == 1


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
