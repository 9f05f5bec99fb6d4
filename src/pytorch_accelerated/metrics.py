"""Metrics for ``Trainer(metrics=...)`` that need no other package, and marks for functions that are metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pytorch_accelerated._types import MetricValue, Nested

__all__ = ["Accuracy", "FromLoss", "MeanAbsoluteError", "Perplexity", "TopKAccuracy", "WholeSet"]


_MAX_LIGHT = 100_000  # elements


# --- marks for functions -----------------------------------------------------------------------------------------


class WholeSet:
    """Marks a function that is called once, with the outputs and targets of the whole pass, of all processes.

    Use it for a metric that is not a mean over samples, such as a rank correlation. Outputs and targets stay on the
    device until the end of the pass, and every process then gets those of all. The order is that in which they were
    processed, which in an evaluation is that of the dataset.

    Args:
        function: Called with tensors of shape ``(samples, ...)``; returns a number, or several in a tensor or mapping.
        padding_value: Fills the dimensions after the first where batches differ in them, at their end. With ``None``
            they must agree.

    Example:
        >>> def largest_error(outputs, targets):
        ...     return (outputs - targets).abs().max()
        >>> metrics = {"largest_error": WholeSet(largest_error)}
    """

    def __init__(self, function: Callable[..., MetricValue], padding_value: float | None = None) -> None:
        self.function = function
        self.padding_value = padding_value
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Nested, **kwargs: Nested) -> MetricValue:
        """Call the function."""
        return self.function(*args, **kwargs)


class FromLoss:
    """A metric that is a function of the mean loss of the pass, so it costs nothing in a step.

    Args:
        function: Called with the mean loss, a `float`; returns a number.

    Example:
        >>> metrics = {"rmse": FromLoss(math.sqrt)}  # with `nn.MSELoss()`
        >>> metrics["rmse"](0.25)
        0.5
    """

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function = function

    def __call__(self, mean_loss: float) -> float:
        """Return the metric for a mean loss."""
        return self.function(mean_loss)


# --- metrics -----------------------------------------------------------------------------------------------------


class Perplexity(FromLoss):
    """The exponential of the mean loss, which has to be a cross-entropy in nats, such as `nn.CrossEntropyLoss`.

    The mean is over tokens if the step returns their number as ``num_items_in_batch``.

    Example:
        >>> round(Perplexity()(math.log(8.0)))
        8
    """

    def __init__(self) -> None:
        super().__init__(_exp)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class Accuracy:
    """The share of predictions that are right, from 0 to 1.

    With classes, the prediction is the class with the largest output; with binary targets, whether the output is above
    ``threshold``.

    Args:
        threshold: For targets of the same shape as the outputs, which are 0 or 1: an output above it stands for 1. The
            default fits logits, as for `nn.BCEWithLogitsLoss`; probabilities need 0.5.
        ignore_index: Targets with this value do not count, as in `nn.CrossEntropyLoss`; ``None`` to count all.

    Example:
        >>> value, num_targets = Accuracy()(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        >>> float(value), int(num_targets)
        (0.5, 2)
    """

    def __init__(self, threshold: float = 0.0, ignore_index: int | None = -100) -> None:
        self.threshold = threshold
        self.ignore_index = ignore_index

    def __call__(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """Return the accuracy of a batch, and the number of targets that count.

        Args:
            outputs: One number for each class in dimension 1, as in PyTorch's losses, or in the last one; or of the
                shape of the targets, or of their number, if these are binary.
            targets: Indices of classes, or 0 and 1.

        Raises:
            TypeError: Something is no tensor.
            ValueError: The shapes do not fit together.
        """
        _check_tensors("Accuracy", outputs, targets)
        is_binary = outputs.numel() == targets.numel()
        dim = None if is_binary else _dim_of_classes("Accuracy", outputs, targets)
        scores, targets = _light(outputs, targets)
        if is_binary:
            is_right = (scores.reshape(targets.shape) > self.threshold) == (targets > 0.5)
        else:
            is_right = scores.argmax(dim) == targets
        return _share(is_right, targets, self.ignore_index)


class TopKAccuracy:
    """The share of targets that are among the classes with the ``k`` largest outputs, from 0 to 1.

    Args:
        k: How many classes count as predicted; at least 1. Classes with equal outputs count alike.
        ignore_index: Targets with this value do not count; ``None`` to count all.

    Raises:
        ValueError: ``k`` is below 1.

    Example:
        >>> value, _ = TopKAccuracy(2)(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([1, 2]))
        >>> float(value)
        0.5
    """

    def __init__(self, k: int = 5, ignore_index: int | None = -100) -> None:
        if k < 1:
            raise ValueError(f"`k` is {k!r}. Expected a number of classes, at least 1.")
        self.k = k
        self.ignore_index = ignore_index

    def __call__(
        self, outputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """Return the accuracy of a batch, and the number of targets that count; see `Accuracy.__call__`."""
        _check_tensors("TopKAccuracy", outputs, targets)
        dim = _dim_of_classes("TopKAccuracy", outputs, targets)
        of_targets = outputs.gather(dim, targets.clamp(min=0).unsqueeze(dim))  # what is ignored may be negative
        num_larger = (outputs > of_targets).sum(dim)  # faster than sorting
        is_right = (num_larger < self.k) & ~of_targets.squeeze(dim).isnan()
        return _share(is_right, targets, self.ignore_index)


class MeanAbsoluteError:
    """The mean of the absolute differences between outputs and targets.

    Example:
        >>> value, num_targets = MeanAbsoluteError()(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        >>> float(value), num_targets
        (1.0, 2)
    """

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float | torch.Tensor, int]:
        """Return the mean of a batch, and the number of values.

        Args:
            outputs: Numbers.
            targets: As many, of the same shape except for dimensions of length 1.

        Raises:
            TypeError: Something is no tensor.
            ValueError: The shapes do not fit together.
        """
        _check_tensors("MeanAbsoluteError", outputs, targets)
        if outputs.shape != targets.shape:
            if [n for n in outputs.shape if n != 1] != [n for n in targets.shape if n != 1]:
                raise ValueError(
                    f"`MeanAbsoluteError` got outputs of the shape {tuple(outputs.shape)} and targets of the shape "
                    f"{tuple(targets.shape)}. Expected the same shape. Reshape one of them in `get_metric_inputs`."
                )
            outputs = outputs.reshape(targets.shape)
        numbers, others = _light(outputs, targets)
        return abs(numbers - others).sum() / targets.numel(), targets.numel()


def _check_tensors(name: str, outputs: object, targets: object) -> None:
    for role, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"`{name}` got {role} of type {type(value).__name__}. Expected a tensor. Choose the part to measure in "
                "`get_metric_inputs`."
            )


def _dim_of_classes(name: str, outputs: torch.Tensor, targets: torch.Tensor) -> int:
    """Return the dimension of the outputs that the targets do not have: 1, as in PyTorch's losses, or the last one."""
    shape = outputs.shape
    for dim in (1, outputs.ndim - 1) if outputs.ndim > 1 else ():
        if shape[:dim] + shape[dim + 1 :] == targets.shape:
            return dim
    if outputs.ndim == 1 and targets.ndim == 0:
        return 0
    raise ValueError(
        f"`{name}` got outputs of the shape {tuple(shape)} and targets of the shape {tuple(targets.shape)}. Expected "
        "one output for each class, in dimension 1 or the last one, and the index of a class as the target. Choose "
        "other outputs or targets in `get_metric_inputs`, or compute the metric in a function of your own."
    )


def _share(is_right: Any, targets: Any, ignore_index: int | None) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """Return which share of predictions is right, and how many count."""
    if ignore_index is None:
        num_right, num_counted = _count(is_right), math.prod(targets.shape)
    else:
        counts = targets != ignore_index
        num_right, num_counted = _count(is_right & counts), _count(counts)
    if isinstance(num_counted, torch.Tensor):
        return num_right / num_counted.clamp(min=1), num_counted
    return num_right / max(num_counted, 1), num_counted


def _count(flags: Any) -> Any:
    """Return how many of some flags are set; of those on an accelerator, for which the host would wait, as a tensor."""
    if isinstance(flags, torch.Tensor):
        return int(flags.sum()) if flags.is_cpu else flags.sum()
    return np.count_nonzero(flags)


def _light(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """Return small tensors in host memory as arrays of NumPy, whose operations take a quarter of the time."""
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype is torch.bfloat16 or tensor.numel() > _MAX_LIGHT:
            return tensors
    return tuple([(tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in tensors])
