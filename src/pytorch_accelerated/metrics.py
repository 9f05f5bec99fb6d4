"""Metrics for ``Trainer(metrics=...)`` that need no other package, and marks for functions that are metrics."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pytorch_accelerated._types import MetricValue, Nested

__all__ = ["Accuracy", "FromLoss", "MeanAbsoluteError", "Perplexity", "TopKAccuracy", "WholeSet"]


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

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Return the accuracy of a batch, and the number of targets that count.

        Args:
            outputs: One number for each class in dimension 1, as in PyTorch's losses, or in the last one; or of the
                shape of the targets, or of their number, if these are binary.
            targets: Indices of classes, or 0 and 1.

        Raises:
            ValueError: The shapes do not fit together.
        """
        if outputs.shape == targets.shape or outputs.numel() == targets.numel():
            is_right = (outputs.reshape(targets.shape) > self.threshold) == (targets > 0.5)
        else:
            is_right = outputs.argmax(_dim_of_classes("Accuracy", outputs, targets)) == targets
        return _share(is_right, targets, self.ignore_index)


class TopKAccuracy:
    """The share of targets that are among the classes with the ``k`` largest outputs, from 0 to 1.

    Args:
        k: How many classes count as predicted; at least 1. If there are fewer classes, all count.
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

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Return the accuracy of a batch, and the number of targets that count; see `Accuracy.__call__`."""
        dim = _dim_of_classes("TopKAccuracy", outputs, targets)
        predicted = outputs.topk(min(self.k, outputs.shape[dim]), dim).indices
        return _share((predicted == targets.unsqueeze(dim)).any(dim), targets, self.ignore_index)


class MeanAbsoluteError:
    """The mean of the absolute differences between outputs and targets.

    Example:
        >>> value, num_targets = MeanAbsoluteError()(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        >>> float(value), num_targets
        (1.0, 2)
    """

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the mean of a batch, and the number of values.

        Args:
            outputs: Numbers.
            targets: As many, of the same shape except for dimensions of length 1.

        Raises:
            ValueError: The shapes do not fit together.
        """
        if outputs.shape != targets.shape:
            if [n for n in outputs.shape if n != 1] != [n for n in targets.shape if n != 1]:
                raise ValueError(
                    f"`MeanAbsoluteError` got outputs of the shape {tuple(outputs.shape)} and targets of the shape "
                    f"{tuple(targets.shape)}. Expected the same shape. Reshape one of them in `get_metric_inputs`."
                )
            outputs = outputs.reshape(targets.shape)
        return (outputs - targets).abs().mean(), targets.numel()


def _dim_of_classes(name: str, outputs: torch.Tensor, targets: torch.Tensor) -> int:
    """Return the dimension of the outputs that the targets do not have: 1, as in PyTorch's losses, or the last one."""
    shape = tuple(outputs.shape)
    for dim in (1, outputs.ndim - 1) if outputs.ndim > 1 else ():
        if shape[:dim] + shape[dim + 1 :] == tuple(targets.shape):
            return dim
    if outputs.ndim == 1 and targets.ndim == 0:
        return 0
    raise ValueError(
        f"`{name}` got outputs of the shape {shape} and targets of the shape {tuple(targets.shape)}. Expected one "
        "output for each class, in dimension 1 or the last one, and the index of a class as the target. Choose other "
        "outputs or targets in `get_metric_inputs`, or compute the metric in a function of your own."
    )


def _share(
    is_right: torch.Tensor, targets: torch.Tensor, ignore_index: int | None
) -> tuple[torch.Tensor, float | torch.Tensor]:
    if ignore_index is None or targets.is_floating_point():
        return is_right.float().mean(), targets.numel()
    counts = targets != ignore_index
    num_counted = counts.sum()
    return (is_right & counts).sum() / num_counted.clamp(min=1), num_counted
