"""When to stop: "is this value better?", "is the patience used up?", and Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.exceptions import StopTrainingError

if TYPE_CHECKING:
    from types import FrameType


def is_better(value: float, best: float | None, greater_is_better: bool, threshold: float = 0.0) -> bool:
    """Tell whether ``value`` improves on ``best`` by more than ``threshold``.

    A NaN is never better than anything; a number is better than having none yet (``best=None``).

    Args:
        value: The new value of the watched metric.
        best: The best value so far, ``None`` when there is none.
        greater_is_better: The direction of improvement.
        threshold: The smallest change, in the unit of the metric, that counts as an improvement.

    Example:
        >>> is_better(0.9, 1.0, greater_is_better=False)
        True
        >>> is_better(0.995, 1.0, greater_is_better=False, threshold=0.01)
        False
        >>> is_better(float("nan"), None, greater_is_better=False)
        False
    """
    if math.isnan(value):
        return False
    if best is None:
        return True
    improvement = value - best if greater_is_better else best - value
    return improvement > threshold


@dataclass
class PatienceCounter:
    """Counts how many evaluations in a row failed to improve on the best value.

    Args:
        patience: The number of evaluations in a row without improvement that is one too many; at least 1.
        greater_is_better: The direction of improvement.
        threshold: The smallest change that counts as an improvement.

    Example:
        >>> counter = PatienceCounter(patience=2, greater_is_better=False)
        >>> [counter.update(loss) for loss in (1.0, 0.5, 0.6, 0.7)]
        [False, False, False, True]
    """

    patience: int
    greater_is_better: bool
    threshold: float = 0.0
    best: float | None = None
    num_without_improvement: int = 0

    def update(self, value: float) -> bool:
        """Take in a new value and return whether the patience is used up."""
        if is_better(value, self.best, self.greater_is_better, self.threshold):
            self.best = value
            self.num_without_improvement = 0
        else:
            self.num_without_improvement += 1
        return self.num_without_improvement >= self.patience

    def reset(self) -> None:
        """Forget the best value and the count."""
        self.best = None
        self.num_without_improvement = 0


class RunInterruptedError(StopTrainingError):
    """Ctrl-C was pressed, on this process or another: the run ends in good order, then `KeyboardInterrupt` follows."""


class InterruptFlag:
    """Inside its ``with`` block the first Ctrl-C only raises a flag; the second interrupts at once.

    A run can so finish its step and end in good order. The handler is installed on the main thread only, calls a
    handler that the program had installed itself, and is replaced by the former one at the end.
    """

    def __init__(self) -> None:
        self.is_set = False
        """Whether Ctrl-C was pressed; only within the block."""

        self.was_set = False
        """Whether Ctrl-C was pressed in the last block."""

        self._previous: Any = None

    def __enter__(self) -> InterruptFlag:
        self.is_set = self.was_set = False
        self._previous = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            # A handler that was installed from C could not be put back; one who ignores Ctrl-C means it.
            if self._previous in (None, signal.SIG_IGN):
                self._previous = None
            else:
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_set, self.was_set = False, self.is_set
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        if callable(self._previous) and self._previous is not signal.default_int_handler:
            self._previous(signal_number, frame)
