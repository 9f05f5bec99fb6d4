"""Log points: a few times a second, a run looks at its means and reports its progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pytorch_accelerated._means import weighted_mean
from pytorch_accelerated._recording.host_copy import HostCopy

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
