"""Is a metric better, and is the patience used up?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


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
