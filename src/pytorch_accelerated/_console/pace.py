"""How far a run is, and how long the rest takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW = 100
"""Marks that a pace is measured over. Those that come at log points, ten a second, span ten seconds."""


class Pace:
    """Measures how fast something goes at present, and from this the time that is left.

    Args:
        num_done: How much is done at the start: epochs, batches or a fraction.
        clock: Returns the time in seconds.
        window: The number of marks that the pace is measured over; ``None`` for all since the start.
    """

    def __init__(
        self, num_done: float = 0.0, clock: Callable[[], float] = time.perf_counter, window: int | None = _WINDOW
    ) -> None:
        self._clock = clock
        self._marks = deque([(clock(), num_done)], maxlen=2 if window is None else window)
        self._keeps_start = window is None

    def mark(self, num_done: float) -> None:
        """Note how much is done by now."""
        if self._keeps_start and len(self._marks) > 1:
            self._marks.pop()
        self._marks.append((self._clock(), num_done))

    def per_second(self) -> float:
        """Return how much is done in a second; 0 before the first mark."""
        (started_at, at_start), (now, num_done) = self._marks[0], self._marks[-1]
        return (num_done - at_start) / (now - started_at) if now > started_at else 0.0

    def seconds_left(self, num_total: float | None) -> float | None:
        """Return how long it takes until this much is done, at the same pace; ``None`` if that is not known."""
        speed, num_done = self.per_second(), self._marks[-1][1]
        return None if num_total is None or speed <= 0 else max(0.0, num_total - num_done) / speed


def fraction_done(num_epochs: float, total_num_epochs: int, num_updates: int, update_limit: int | None) -> float:
    """Return how much of a run is done, from 0 to 1; it ends with its epochs or at the limit of updates.

    Example:
        >>> fraction_done(1.5, 3, 150, None), fraction_done(1.5, 3, 150, 200)
        (0.5, 0.75)
    """
    of_epochs = num_epochs / total_num_epochs if total_num_epochs else 0.0
    of_updates = num_updates / update_limit if update_limit else 0.0
    return min(1.0, max(of_epochs, of_updates))
