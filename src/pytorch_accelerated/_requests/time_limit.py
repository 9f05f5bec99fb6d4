"""The time after which a run ends, and the epochs before which it does not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pytorch_accelerated._arguments.lengths import Length
from pytorch_accelerated._arguments.numbers import check_min_epochs
from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._distributed.reasons import EpochEndedError

if TYPE_CHECKING:
    from datetime import timedelta

    from pytorch_accelerated._run import Run


def read_limits(
    max_time: str | timedelta | None, min_epochs: int | None, num_epochs: int
) -> tuple[TimeLimit | None, int]:
    """Check `max_time` and `min_epochs`, and return the time limit and the smallest number of epochs.

    Raises:
        TypeError: One of them has the wrong type.
        ValueError: One of them is out of range.
    """
    check_min_epochs(min_epochs, num_epochs)
    limit = None if max_time is None else TimeLimit(Length.parse("max_time", max_time, ("seconds",)))
    return limit, min_epochs or 0


class TimeLimit:
    """Ends a run when its time is over, measured on the main process from the start of the call of `train`.

    Args:
        length: The time; in seconds.
    """

    def __init__(self, length: Length) -> None:
        self.reason = f"{length} are over (`max_time`)"
        self._end = time.monotonic() + float(length.amount)

    def check(self, run: Run) -> None:
        """Ask for the end of the epoch, on the main process, if the time is over; called at log points."""
        training = run.training
        is_training = run.is_taking_steps and training.current_pass is training.epoch
        is_enough = training.progress.num_epochs_completed >= run.first_end
        if run.process_index == 0 and is_training and is_enough and self._is_over():
            run.consensus.request_stop(EpochEndedError(self.reason, ends_run=True))

    def ends_before_epoch(self, run: Run) -> bool:
        """Return whether the time is over when an epoch is about to start. Must be called on every process."""
        if run.training.progress.num_epochs_completed < run.first_end:
            return False
        return run_on_main(self._is_over, run.process_index == 0, run.config.num_processes)

    def seconds_left(self) -> float:
        """Return how long it takes until the time is over, on this process."""
        return max(0.0, self._end - time.monotonic())

    def _is_over(self) -> bool:
        return time.monotonic() >= self._end
