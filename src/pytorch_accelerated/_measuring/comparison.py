"""Values of metrics: is it a number, is it better than the best so far, has it failed to improve for too long?"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytorch_accelerated._types import StateDict, StateMapping

_WORD = re.compile(r"top(?=\d)|[a-z]+\d*")
_LOWER_IS_BETTER = frozenset(
    {"loss", "error", "perplexity", "mae", "mse", "rmse", "mape", "nll", "brier", "wer", "cer"}
    | {"bpc", "fid", "lpips", "divergence"}
)
_GREATER_IS_BETTER = frozenset(
    {"accuracy", "acc", "top", "precision", "recall", "f1", "fbeta", "auc", "auroc", "roc", "ap", "map", "iou", "miou"}
    | {"dice", "bleu", "rouge", "r2", "psnr", "ssim", "mcc", "kappa", "ndcg", "correct", "hits"}
)
"""Words in names of metrics that tell whether smaller or larger values are better."""


def one_number(value: object) -> float | torch.Tensor | None:
    """Return what is a single real number, of any type, as a number or a tensor with one element; otherwise ``None``.

    Example:
        >>> one_number(np.array([0.5])), one_number(True), one_number("0.5"), one_number([0.5, 1.0])
        (0.5, 1.0, None, None)
    """
    if isinstance(value, torch.Tensor):
        return value if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, (np.ndarray, np.generic)):
        return float(value.item()) if value.size == 1 and value.dtype.kind in "biuf" else None
    if isinstance(value, (str, bytes, bytearray)):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def is_better(value: float, best: float | None, greater_is_better: bool, threshold: float = 0.0) -> bool:
    """Return whether ``value`` improves on ``best`` by more than ``threshold``.

    NaN is never better than anything. A number is better than no value yet (``best=None``).

    Args:
        value: The new value of the watched metric.
        best: The best value so far; ``None`` if there is none.
        greater_is_better: Whether larger values are better.
        threshold: Smallest change that counts as an improvement, in the unit of the metric.

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


def rounded(value: float | None) -> float | None:
    """Return a value with four significant digits, for a sentence.

    Example:
        >>> rounded(0.11396957099437714), rounded(1.0)
        (0.114, 1.0)
    """
    return None if value is None else float(f"{value:.4g}")


def is_greater_better(metric_name: str) -> bool | None:
    """Return whether larger values of a metric are better, as far as its name tells; otherwise ``None``.

    Example:
        >>> [is_greater_better(name) for name in ("eval_accuracy", "eval_top5", "train_loss_epoch", "lr")]
        [True, True, False, None]
    """
    words = set(_WORD.findall(metric_name.lower()))
    if words & _LOWER_IS_BETTER:
        return False
    return True if words & _GREATER_IS_BETTER else None


@dataclass
class BestMetric:
    """The best value of a metric so far, and the epoch in which it was reached.

    Example:
        >>> best = BestMetric()
        >>> for epoch, loss in enumerate([1.0, 0.5, 0.75], start=1):
        ...     if best.is_improved_by(loss, greater_is_better=False):
        ...         best.record(loss, epoch)
        >>> best
        BestMetric(value=0.5, epoch=2)
    """

    value: float | None = None
    epoch: int | None = None

    def is_improved_by(self, value: float, greater_is_better: bool, threshold: float = 0.0) -> bool:
        """Return whether ``value`` is better than the best so far; see `is_better`."""
        return is_better(value, self.value, greater_is_better, threshold)

    def record(self, value: float, epoch: int | None = None) -> None:
        """Make ``value`` the best so far."""
        self.value, self.epoch = value, epoch

    def reset(self) -> None:
        """Forget the best value."""
        self.value = self.epoch = None

    def state_dict(self) -> StateDict:
        """Return the value and the epoch, under the names that callbacks give them."""
        return {"best_metric": self.value, "best_metric_epoch": self.epoch}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self.record(state_dict["best_metric"], state_dict["best_metric_epoch"])


@dataclass
class NewValues:
    """Tells whether a metric was measured since a callback last looked at it: an old value is no evidence.

    Example:
        >>> new_values = NewValues()
        >>> new_values.start_run(num_values=2)
        >>> [new_values.look(num_values) for num_values in (2, 3, 3)]
        [False, True, False]
    """

    num_seen: int | None = None

    def start_run(self, num_values: int, is_resumed: bool = False) -> None:
        """Take all values in the history for seen, unless the state of a resumed run says which were.

        The state may have been saved when a value was measured and not yet looked at.
        """
        if self.num_seen is None or not is_resumed:
            self.num_seen = num_values

    def look(self, num_values: int) -> bool:
        """Look at all values in the history, and return whether there are new ones."""
        num_seen, self.num_seen = self.num_seen, num_values
        return num_seen != num_values

    def state_dict(self) -> StateDict:
        """Return how many values were seen."""
        return {"num_values_seen": self.num_seen}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned, which states of earlier versions lack."""
        self.num_seen = state_dict.get("num_values_seen")


@dataclass
class PatienceCounter:
    """Counts how many evaluations in a row failed to improve on the best value.

    Args:
        patience: Evaluations in a row without improvement that use up the patience; at least 1.
        greater_is_better: Whether larger values are better.
        threshold: Smallest change that counts as an improvement, in the unit of the metric.
        is_relative: Whether the threshold is a fraction of the absolute value of the best instead.

    Example:
        >>> counter = PatienceCounter(patience=2, greater_is_better=False)
        >>> [counter.update(loss) for loss in (1.0, 0.5, 0.6, 0.7)]
        [False, False, False, True]
    """

    patience: int
    greater_is_better: bool
    threshold: float = 0.0
    best: BestMetric = field(default_factory=BestMetric)
    num_without_improvement: int = 0
    is_relative: bool = False

    @property
    def absolute_threshold(self) -> float:
        """The threshold in the unit of the metric."""
        best = self.best.value
        return self.threshold * abs(best) if self.is_relative and best is not None else self.threshold

    def update(self, value: float) -> bool:
        """Add a value, and return whether the patience is used up."""
        if self.best.is_improved_by(value, self.greater_is_better, self.absolute_threshold):
            self.best.record(value)
            self.num_without_improvement = 0
        else:
            self.num_without_improvement += 1
        return self.num_without_improvement >= self.patience

    def reset(self) -> None:
        """Forget the best value and the count."""
        self.best.reset()
        self.num_without_improvement = 0


class ComparisonOfMetric:
    """The attribute ``operator`` of callbacks that watch a metric: their ``greater_is_better`` as a function.

    Example:
        >>> class Watcher:
        ...     operator = ComparisonOfMetric()
        ...     greater_is_better = False
        >>> Watcher().operator(0.5, 1.0)
        True
    """

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[[float, float], bool]:
        return operator.gt if getattr(instance, "greater_is_better", False) else operator.lt

    def __set__(self, instance: Any, comparison: Callable[[float, float], bool]) -> None:
        instance.greater_is_better = bool(comparison(1.0, 0.0))
