"""Log points: a few times a second, a run looks at its loss and reports its progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from pytorch_accelerated.tracking import weighted_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytorch_accelerated.tracking import EpochMeans

SECONDS_BETWEEN_LOG_POINTS = 0.1


class LossMonitor:
    """Knows the means of a pass over the data so far, without making host and device wait for each other.

    On a CUDA device, the copy of the means starts at one log point and is read at the next, when it has long arrived.
    Means in host memory are up to date.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        """The means of loss and metrics as of the last log point; empty until they are known."""

        self._pending: tuple[list[str], _AsyncNumbers] | None = None
        self._next_log_point = time.monotonic() + SECONDS_BETWEEN_LOG_POINTS

    def is_due(self) -> bool:
        """Return whether it is time for a log point, and if so, schedule the next one."""
        now = time.monotonic()
        if now < self._next_log_point:
            return False
        self._next_log_point = now + SECONDS_BETWEEN_LOG_POINTS
        return True

    @property
    def mean(self) -> float | None:
        """The mean loss as of the last log point; ``None`` until it is known."""
        return self.values.get("loss")

    def look(self, means: EpochMeans) -> None:
        """Read the means, or start copying them."""
        if self._pending is not None:
            names, numbers = self._pending
            if not numbers.are_ready():
                return
            self.values, self._pending = dict(zip(names, numbers.read(), strict=True)), None
        sums = _sums_of(means)
        totals = [total for total, _ in sums.values()]
        devices = [total.device for total in totals if isinstance(total, torch.Tensor) and total.is_cuda]
        if not devices:
            self.read(means)
        else:
            self._pending = list(sums), _AsyncNumbers(_quotients_on(devices[0], sums.values()))

    def read(self, means: EpochMeans) -> None:
        """Read the means at once, from the device too."""
        self.values = {name: weighted_mean(total, weight) for name, (total, weight) in _sums_of(means).items()}


def _sums_of(means: EpochMeans) -> dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]:
    trackers = {"loss": means.loss, **means.metrics}
    return {name: (tracker.total_loss, tracker.running_count) for name, tracker in trackers.items()}


def _quotients_on(
    device: torch.device, pairs: Iterable[tuple[float | torch.Tensor, float | torch.Tensor]]
) -> torch.Tensor:
    wide = [(torch.as_tensor(total, dtype=torch.float64, device=device), weight) for total, weight in pairs]
    return torch.stack([(total / weight).reshape(()) for total, weight in wide])


class _AsyncNumbers:
    """Numbers that are being copied from a CUDA device to the host."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._copy = torch.empty_like(numbers, device="cpu", pin_memory=True)
        self._copy.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.current_stream(numbers.device).record_event()

    def are_ready(self) -> bool:
        is_ready: bool = self._copied.query()
        return is_ready

    def read(self) -> list[float]:
        numbers: list[float] = self._copy.tolist()
        return numbers


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
