"""Log points: moments, some times a second, at which a run looks at its loss and shows how it goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated.exceptions import NonFiniteLossError
from pytorch_accelerated.tracking import weighted_mean

if TYPE_CHECKING:
    from pytorch_accelerated.tracking import LossTracker
    from pytorch_accelerated.trainer import Trainer


SECONDS_BETWEEN_LOG_POINTS = 0.1


class LossMonitor:
    """Knows the mean loss of a pass through the data so far, without that host or device wait for each other.

    A mean on a CUDA device is asked for at one log point and taken at the next, when it has long arrived. One in host
    memory is that of the moment.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        """The mean as of the last log point; ``None`` before it is known."""

        self._pending: _AsyncScalar | None = None
        self._next_log_point = time.monotonic() + SECONDS_BETWEEN_LOG_POINTS

    def is_due(self) -> bool:
        """Tell whether it is time for a log point, which is then regarded as being there."""
        now = time.monotonic()
        if now < self._next_log_point:
            return False
        self._next_log_point = now + SECONDS_BETWEEN_LOG_POINTS
        return True

    def look(self, tracker: LossTracker) -> None:
        """Take the mean, or ask for it."""
        if self._pending is not None:
            if self._pending.is_there():
                self.mean, self._pending = self._pending.take(), None
            else:
                return
        total, weight = tracker.total_loss, tracker.running_count
        if isinstance(total, torch.Tensor) and total.is_cuda:
            self._pending = _AsyncScalar(total / weight)
        else:
            self.mean = weighted_mean(total, weight)


class _AsyncScalar:
    """A number on its way from a CUDA device to the host."""

    def __init__(self, number: torch.Tensor) -> None:
        self._copy = torch.empty_like(number, device="cpu", pin_memory=True)
        self._copy.copy_(number, non_blocking=True)
        self._copied = torch.cuda.current_stream(number.device).record_event()

    def is_there(self) -> bool:
        is_there: bool = self._copied.query()
        return is_there

    def take(self) -> float:
        return float(self._copy)


def find_non_finite_loss(trainer: Trainer) -> NonFiniteLossError | None:
    """Return an error that names the first loss of the epoch that is NaN or infinite; ``None`` if there is none.

    Reads from the device.
    """
    for means in (*trainer._suspended_means, trainer._means):
        found = means.find_non_finite()
        if found is not None:
            step, loss = found
            stage = "evaluation" if trainer.is_evaluating and means is trainer._means else "training"
            place = f" in {stage}, epoch {trainer.run_history.current_epoch}, step {step}, rank {trainer.process_index}"
            return NonFiniteLossError(describe_non_finite_loss(loss, place), step)
    return None


def describe_non_finite_loss(loss: float, place: str) -> str:
    """Say that a loss is not finite, where, and what to do."""
    return (
        f"The loss is {loss}{place}. Try a lower learning rate, gradient clipping or a warm-up, and look for invalid "
        "values in the data; `torch.autograd.set_detect_anomaly(True)` finds the operation. To go on regardless, leave "
        "out `TerminateOnNaNCallback`."
    )
