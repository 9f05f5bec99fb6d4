"""Log points: a few times a second, a run looks at its means and reports its progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from pytorch_accelerated._host_copy import HostCopy
from pytorch_accelerated._means import weighted_mean

if TYPE_CHECKING:
    from pytorch_accelerated._types import WeightedSums

SECONDS_BETWEEN_LOG_POINTS = 0.1


class LossMonitor:
    """Knows the means of a pass over the data so far, without making host and device wait for each other.

    On a CUDA device, the copy of the means starts at one log point and is read at the next, when it has long arrived.
    Means in host memory are up to date.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        """The means as of the last log point, by plain name: ``loss``, ``accuracy``. Empty until they are known."""

        self._pending: tuple[list[str], HostCopy] | None = None
        self._next_log_point = time.monotonic() + SECONDS_BETWEEN_LOG_POINTS

    @property
    def mean(self) -> float | None:
        """The mean loss as of the last log point; ``None`` until it is known."""
        return self.values.get("loss")

    def is_due(self) -> bool:
        """Return whether it is time for a log point, and if so, schedule the next one."""
        now = time.monotonic()
        if now < self._next_log_point:
            return False
        self._next_log_point = now + SECONDS_BETWEEN_LOG_POINTS
        return True

    def look(self, sums: WeightedSums) -> None:
        """Read the means, or start copying them.

        Args:
            sums: The weighted sum and the total weight of each, by name.
        """
        if self._pending is None:
            self._pending = list(sums), HostCopy([number for pair in sums.values() for number in pair])
            self._take()
        elif self._take():
            self.look(sums)

    def _take(self) -> bool:
        assert self._pending is not None
        names, copy = self._pending
        if not copy.has_arrived():
            return False
        numbers = copy.numbers()
        pairs = zip(names, numbers[::2], numbers[1::2], strict=True)
        self.values = {name: weighted_mean(total, weight) for name, total, weight in pairs}
        self._pending = None
        return True


def describe_non_finite_gradient(model: nn.Module, place: str) -> str:
    """Say that a gradient is not finite, where, and what to do about it.

    Args:
        model: The model.
        place: Where it occurred, such as ``" in training, epoch 1, rank 0"``.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient.to_dense()).all()]
    name = f"`{bad[0]}`" if bad else "a parameter outside the model"
    others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    return (
        f"The gradient of {name}{others} is NaN or infinite{place}, although the loss is finite. Parameters and "
        "optimizer are unchanged. The derivative of some operation is infinite, such as that of a square root at 0; "
        "`torch.autograd.set_detect_anomaly(True)` finds it. To continue regardless, remove `TerminateOnNaNCallback`."
    )


def describe_non_finite_parameters(place: str) -> str:
    """Say that a parameter is not finite, where, and what to do about it."""
    return (
        f"A parameter of the model is NaN or infinite{place}, although the losses so far are finite: the gradient of "
        "the last update was not finite. Resume from the last training state with gradient clipping or a lower "
        "learning rate; `torch.autograd.set_detect_anomaly(True)` finds the operation. To continue regardless, remove "
        "`TerminateOnNaNCallback`."
    )


def describe_non_finite_loss(loss: float, place: str) -> str:
    """Say that a loss is not finite, where, and what to do about it.

    Args:
        loss: NaN or an infinity.
        place: Where it occurred, such as ``" in training, epoch 1, step 5, rank 0"``.
    """
    return (
        f"The loss is {loss}{place}. Try a lower learning rate, gradient clipping or a warm-up, and check the data for "
        "invalid values; `torch.autograd.set_detect_anomaly(True)` finds the operation. To continue regardless, remove "
        "`TerminateOnNaNCallback`."
    )
