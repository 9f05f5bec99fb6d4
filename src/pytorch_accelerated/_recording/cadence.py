"""When something that is done again and again during training is due: after the same update on all processes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated.progress import TrainingProgress

if TYPE_CHECKING:
    from fractions import Fraction

    from pytorch_accelerated._arguments.lengths import Length
    from pytorch_accelerated._run import Run


@dataclass
class Cadence:
    """Tells after which updates something is due that is done once every so often.

    Updates, samples and parts of epochs are counted from the start of the training, so a run that is resumed does it at
    the same moments. Times are counted from one time to the next.

    Args:
        length: How often. ``None`` for never.
    """

    length: Length | None
    _timer: Timer = field(init=False)
    _last: TrainingProgress = field(default_factory=TrainingProgress, init=False)

    def __post_init__(self) -> None:
        length = self.length
        self._timer = Timer(float(length.amount) / 60 if length is not None and length.unit == "seconds" else None)

    def start(self, run: Run) -> None:
        """Start counting, or continue where a resumed run was."""
        self._last = replace(run.progress)
        self._timer.restart(run.progress.num_updates)

    def restart(self, run: Run) -> None:
        """Count the time from now on."""
        self._timer.restart(run.progress.num_updates)

    def is_due(self, run: Run) -> bool:
        """Return whether the step that has just ended made the update after which it is due.

        It is not due at the end of an epoch, of which `is_due_after_epoch` tells. Must be called after each step, on
        every process.

        Raises:
            ValueError: It is due after a part of an epoch, whose length is not known.
        """
        last, now, length = self._last, run.progress, self.length
        if length is None or now.num_updates == last.num_updates:
            return False
        self._last = replace(now)
        if length.unit == "seconds":
            return self._timer.has_expired(run, now.num_updates)
        if length.unit == "updates":
            return _is_passed(last.num_updates, now.num_updates, length.amount)
        if length.unit == "samples":
            return _is_passed(last.num_samples, now.num_samples, length.amount)
        num_batches = run.num_batches_per_epoch
        if num_batches is None:
            _check_is_whole(length)
            return False
        start = now.num_epochs_completed * num_batches
        # The epoch before may have ended early.
        num_before = last.num_batches_in_epoch if last.num_epochs_completed == now.num_epochs_completed else 0
        is_at_end = now.num_batches_in_epoch >= num_batches
        position = start + now.num_batches_in_epoch
        return not is_at_end and _is_passed(start + num_before, position, length.amount * num_batches)

    def is_due_after_epoch(self, run: Run) -> bool:
        """Return whether it is due at the end of the epoch under way: a number of epochs has passed."""
        length, num_epochs = self.length, run.progress.num_epochs_completed
        return length is not None and length.unit == "epochs" and _is_at(num_epochs + 1, length.amount)


def _is_at(number: int, interval: Fraction) -> bool:
    return number * interval.denominator % interval.numerator == 0


def _is_passed(before: int, now: int, interval: Fraction) -> bool:
    """Return whether a multiple of the interval is above the number before, and at most the one now."""
    numerator, denominator = interval.numerator, interval.denominator
    return now * denominator // numerator > before * denominator // numerator


def _check_is_whole(length: Length) -> None:
    if not length.is_whole:
        raise ValueError(
            f"Something is due every {length}, but the training loader does not know how many batches an epoch has. "
            "Give the interval in updates, samples or minutes."
        )


_MANY_UPDATES = 2**31
"""As good as never; the number of updates left is infinite if the number of minutes is."""


_MANY_MINUTES = 1e15
"""As good as never; an integer may be too large for arithmetic with floats."""


@dataclass
class Timer:
    """Tells when a number of minutes has passed, after the same update on all processes.

    The main process measures the time, and the others ask it. That takes a collective, so they do not ask after every
    update, but once half of the updates that should fit into the remaining time have been made.

    Args:
        num_minutes: Minutes until the timer expires; ``None`` for never.
    """

    num_minutes: float | None
    _start: float = 0.0
    _start_update: int = 0
    _next_check: int = 0

    def restart(self, num_updates: int) -> None:
        """Start again, after ``num_updates`` updates of the run."""
        if self.num_minutes is None:
            return
        self._start = time.monotonic()
        self._start_update = num_updates
        self._next_check = num_updates + 1

    def has_expired(self, run: Run, num_updates: int) -> bool:
        """Return whether the time has passed. Must be called on every process after each update."""
        if self.num_minutes is None or num_updates < self._next_check:
            return False
        num_made = num_updates - self._start_update
        num_processes = int(getattr(run.config, "num_processes", 1))
        num_left = run_on_main(lambda: num_made * self._ratio_left(), run.process_index == 0, num_processes)
        self._next_check = num_updates + (max(1, int(min(num_left / 2, _MANY_UPDATES))) if num_processes > 1 else 1)
        return num_left <= 0

    def _ratio_left(self) -> float:
        """Return the remaining time as a multiple of the elapsed time."""
        elapsed = time.monotonic() - self._start
        return (60 * min(self.num_minutes or 0, _MANY_MINUTES) - elapsed) / max(elapsed, 1e-9)
