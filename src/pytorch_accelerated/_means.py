"""Weighted means that are accumulated on the device: of the loss, and of the metrics that steps return."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated._measuring.comparison import one_number
from pytorch_accelerated._measuring.names import MetricNames, stem_of
from pytorch_accelerated._messages import warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytorch_accelerated._types import BatchOutput, MetricValue, StateDict, StateMapping

_BUFFER_SIZE = 64  # values
_MAX_RETAINED_BUFFERS = 256


class LossTracker:
    """A weighted mean. Values on an accelerator stay there until it is read; those in host memory cost nothing to read.

    Example:
        >>> tracker = LossTracker()
        >>> tracker.update(1.0, batch_size=3)
        >>> tracker.update(torch.tensor(2.0), batch_size=1)
        >>> tracker.average
        1.25
    """

    def __init__(self) -> None:
        LossTracker.reset(self)  # not `self.reset()`, for which a subclass may not be ready yet

    def reset(self) -> None:
        """Forget all values."""
        self._total: float | torch.Tensor = 0.0
        self._count: float | torch.Tensor = 0
        # A sum takes several tensor operations, so values are buffered and summed a buffer at a time.
        self._buffer: _HostBuffer | _DeviceBuffer = _HostBuffer()
        self._summed_buffers: deque[_HostBuffer | _DeviceBuffer] = deque(maxlen=_MAX_RETAINED_BUFFERS)
        self._num_summed = 0
        self._assigned_value: tuple[int, float | torch.Tensor] = (0, 0)
        self.is_known_non_finite = False
        """Whether a value in host memory was NaN or infinite; says nothing of values on an accelerator."""

    @property
    def total_loss(self) -> float | torch.Tensor:
        """The weighted sum so far."""
        return self._buffer.total() + self._total if self._buffer.weights else self._total

    @total_loss.setter
    def total_loss(self, total: float | torch.Tensor) -> None:
        self._sum_buffer()
        self._total = total

    @property
    def running_count(self) -> float | torch.Tensor:
        """The sum of the weights so far."""
        return self._buffer.count(self._count)

    @running_count.setter
    def running_count(self, count: float | torch.Tensor) -> None:
        self._sum_buffer()
        self._count = count

    @property
    def loss_value(self) -> float | torch.Tensor:
        """The last value, or what it was set to since; 0 before the first. One on an accelerator is not read."""
        num_values, value = self._assigned_value
        if num_values == self._num_summed + len(self._buffer.weights):
            return value
        return (self._buffer if self._buffer.weights else self._summed_buffers[-1]).last()

    @loss_value.setter
    def loss_value(self, value: float | torch.Tensor) -> None:
        self._assigned_value = self._num_summed + len(self._buffer.weights), value

    def update(self, loss_batch_value: float | torch.Tensor, batch_size: float | torch.Tensor = 1) -> None:
        """Add the mean of one batch, without reading it from an accelerator.

        Args:
            loss_batch_value: The mean over the batch: a number, or a tensor with one element.
            batch_size: The weight of the batch: the number of samples, tokens or other items that the mean is over.
        """
        value, weight = loss_batch_value, batch_size
        if isinstance(value, torch.Tensor) and value.is_cpu:  # otherwise the host would wait for the device
            value = value.item()
        if isinstance(weight, torch.Tensor) and weight.is_cpu:
            weight = weight.item()
        if len(self._buffer.weights) == _BUFFER_SIZE:
            self._sum_buffer()
        if isinstance(value, torch.Tensor) or isinstance(weight, torch.Tensor):
            self._add_on_device(value, weight)
            return
        if isinstance(self._buffer, _DeviceBuffer):
            self._sum_buffer()
            self._buffer = _HostBuffer()
        if not math.isfinite(value):
            self.is_known_non_finite = True
        self._buffer.add(value, weight)

    def find_non_finite(self) -> tuple[int, float] | None:
        """Return the index of the first value that is NaN or infinite, and the value; ``None`` if there is none.

        Reads from the device. The retained values cover more than the steps between two log points.
        """
        if math.isfinite(float(self.total_loss)):  # finite only if all values are
            return None
        values = [value for buffer in (*self._summed_buffers, self._buffer) for value in buffer.numbers()]
        first_index = self._num_summed + len(self._buffer.weights) - len(values)
        of_first = ((i, value) for i, value in enumerate(values, first_index) if not math.isfinite(value))
        return next(of_first, None)

    def _add_on_device(self, value: float | torch.Tensor, weight: float | torch.Tensor) -> None:
        device = _device_of([value, weight])
        if isinstance(self._buffer, _DeviceBuffer) and self._buffer.device != device:
            self._sum_buffer()
            self._buffer = _HostBuffer()
        if not isinstance(self._buffer, _DeviceBuffer):
            self._buffer = _DeviceBuffer(device, self._buffer)
        self._buffer.add(value, weight)

    def _sum_buffer(self) -> None:
        if self._buffer.weights:
            self._total, self._count = self.total_loss, self.running_count
            self._summed_buffers.append(self._buffer)
            self._num_summed += len(self._buffer.weights)
            self._buffer = self._buffer.new()

    def state_dict(self) -> StateDict:
        """Return the sums as tensors in host memory, and the buffered values that they do not include yet."""
        sums = {"total_loss": self._total, "running_count": self._count}
        return {
            **{name: torch.as_tensor(value, dtype=torch.float64).cpu() for name, value in sums.items()},
            "values": torch.tensor(self._buffer.numbers(), dtype=torch.float64),
            "weights": [
                weight.cpu() if isinstance(weight, torch.Tensor) else weight for weight in self._buffer.weights
            ],
        }

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self.reset()
        self._total = float(state_dict["total_loss"])
        self._count = float(state_dict["running_count"])
        buffer = self._buffer = _HostBuffer()
        # States of the first versions have no buffered values.
        for value, weight in zip(state_dict.get("values", ()), state_dict.get("weights", ()), strict=True):
            buffer.add(float(value), weight if isinstance(weight, int) else float(weight))
        self._num_summed = -len(self._buffer.weights)  # so that the first value after a resume has index 0
        self._assigned_value = 0, buffer.last() if buffer.weights else 0

    @property
    def average(self) -> float:
        """The weighted mean so far; 0 before the first value. Reads from the device."""
        count = self.running_count
        return weighted_mean(self.total_loss, count) if count else 0.0


class _HostBuffer:
    """Values in host memory, and their weights."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self.weights: list[float] = []
        self._known_total: tuple[int, float] = (0, 0.0)  # of this number of values

    def new(self) -> _HostBuffer:
        """Return an empty buffer of this kind."""
        return _HostBuffer()

    def add(self, value: float, weight: float) -> None:
        self._values.append(value)
        self.weights.append(weight)

    def last(self) -> float:
        """Return the last value."""
        return self._values[-1]

    def numbers(self) -> list[float]:
        """Return the values."""
        return self._values

    def total(self) -> float:
        """Return the weighted sum."""
        if self._known_total[0] != len(self._values):
            products = _wide_tensor(self._values) * _wide_tensor(self.weights)
            self._known_total = len(self._values), products.sum().item()
        return self._known_total[1]

    def count(self, start: float | torch.Tensor) -> float | torch.Tensor:
        """Return the sum of the weights and ``start``."""
        return sum(self.weights, start)


class _DeviceBuffer:
    """Values on an accelerator, and their weights.

    Args:
        device: Where the values are.
        first: What is buffered already.
    """

    def __init__(self, device: torch.device, first: _HostBuffer | None = None) -> None:
        self.device = device
        self.weights: list[float | torch.Tensor] = []
        self._values = torch.empty(_BUFFER_SIZE, dtype=wide_dtype(device), device=device)
        self._slots = self._values.unbind()  # views, which take less time than indexing
        if first is not None:
            self.weights = [*first.weights]
            self._values[: len(self.weights)] = _wide_tensor(first.numbers())

    def new(self) -> _DeviceBuffer:
        """Return an empty buffer on this device."""
        return _DeviceBuffer(self.device)

    def add(self, value: float | torch.Tensor, weight: float | torch.Tensor) -> None:
        slot = self._slots[len(self.weights)]
        if isinstance(value, torch.Tensor):
            slot.copy_(value.detach().reshape(()))
        else:
            slot.fill_(value)
        self.weights.append(weight.detach().clone() if isinstance(weight, torch.Tensor) else weight)

    def last(self) -> torch.Tensor:
        """Return the last value, which stays on the device."""
        return self._slots[len(self.weights) - 1].clone()

    def numbers(self) -> list[float]:
        """Read the values from the device."""
        numbers: list[float] = self._values[: len(self.weights)].tolist()
        return numbers

    def total(self) -> torch.Tensor:
        """Return the weighted sum."""
        return (self._values[: len(self.weights)] * self._weights_on(self.device)).sum()

    def count(self, start: float | torch.Tensor) -> float | torch.Tensor:
        """Return the sum of the weights and ``start``."""
        has_tensors = any(isinstance(weight, torch.Tensor) for weight in self.weights)
        return self._weights_on(_device_of(self.weights)).sum() + start if has_tensors else sum(self.weights, start)

    def _weights_on(self, device: torch.device) -> torch.Tensor:
        numbers = [weight for weight in self.weights if not isinstance(weight, torch.Tensor)]
        if len(numbers) == len(self.weights):
            weights = _wide_tensor(numbers)
        else:
            weights = torch.stack([torch.as_tensor(weight, device=device).reshape(()) for weight in self.weights])
        return weights.to(device, wide_dtype(device), non_blocking=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_slots"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _slots=state["_values"].unbind())  # copies would not be views


class EpochMeans:
    """The weighted means over one pass through the data, of the loss and of the metrics that steps return.

    Example:
        >>> means = EpochMeans()
        >>> means.loss.update(2.0, batch_size=4)
        >>> means.update_metrics({"metrics": {"accuracy": 0.5}}, weight=4)
        >>> means.sums("train_loss_epoch")
        {'train_loss_epoch': (8.0, 4), 'train_accuracy': (2.0, 4)}
    """

    def __init__(self) -> None:
        self.loss = LossTracker()
        self.metrics: dict[str, LossTracker] = {}
        self.names = MetricNames()
        """The names that metrics of steps may have."""

        self.first_step = 0
        """Index of the first step in these means; above 0 if the run was resumed mid-epoch."""

    def update_metrics(self, batch_output: BatchOutput, weight: float | torch.Tensor) -> None:
        """Add the metrics of a batch, if its step returned any: a dictionary, anything else is for callbacks only.

        Raises:
            TypeError, ValueError: A value is not a single number, or a name is one that the library records itself.
        """
        metrics = batch_output.get("metrics")
        if not isinstance(metrics, Mapping):
            if metrics is not None:
                _warn_about_other_metrics(metrics)
            return
        for name, value in metrics.items():
            if name not in self.metrics:
                self.names.check(name)
                self.metrics[name] = LossTracker()
            self.metrics[name].update(_as_metric(name, value), weight)

    def sums(self, loss_name: str) -> dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]:
        """Return the weighted sum and the total weight of each mean, by the name it is recorded under.

        Args:
            loss_name: Name of the loss, such as ``train_loss_epoch``. The part before its first underscore becomes the
                prefix of the metrics.
        """
        stem, plain = stem_of(loss_name), self.plain_sums()
        return {loss_name: plain.pop("loss")} | {stem + name: pair for name, pair in plain.items()}

    def plain_sums(self) -> dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]:
        """Return the same by plain name: ``loss``, and those of the metrics in alphabetical order."""
        trackers = {"loss": self.loss, **dict(sorted(self.metrics.items()))}
        return {name: (tracker.total_loss, tracker.running_count) for name, tracker in trackers.items()}

    def find_non_finite(self) -> tuple[int, float] | None:
        """Return the step of the first loss that is NaN or infinite, and the loss. Reads from the device."""
        tracker: Any = self.loss  # may be a replacement of the user's
        found = tracker.find_non_finite() if isinstance(tracker, LossTracker) else None
        return None if found is None else (self.first_step + found[0], found[1])

    def state_dict(self) -> StateDict:
        """Return all sums."""
        metrics = {name: tracker.state_dict() for name, tracker in self.metrics.items()}
        return {"loss": self.loss.state_dict(), "metrics": metrics}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        self.loss.load_state_dict(state_dict["loss"])
        self.metrics = {name: LossTracker() for name in state_dict["metrics"]}
        for name, tracker in self.metrics.items():
            tracker.load_state_dict(state_dict["metrics"][name])


def _warn_about_other_metrics(metrics: object) -> None:
    warn(
        f"A step returned `metrics` of type {type(metrics).__name__}. Only callbacks will see it; of a dictionary of "
        "numbers, the means over the epoch would be recorded. Return one, or use another name.",
    )


def _as_metric(name: str, value: MetricValue) -> float | torch.Tensor:
    """Return a metric of a step as a number, or as a tensor with one element."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(
            f"The metric {name!r} of a step has the shape {tuple(value.shape)}. Expected a single number, the mean "
            "over the batch. Reduce it, or collect larger values in a callback."
        )
    number = one_number(value)
    if number is None:
        raise TypeError(
            f"The metric {name!r} of a step is {value!r}, of type {type(value).__name__}. Expected a number: the mean "
            "over the batch. Leave out the entry where there is none."
        )
    return number


def weighted_mean(total: float | torch.Tensor, weight: float | torch.Tensor) -> float:
    """Divide a weighted sum by its total weight; NaN if the weight is 0."""
    total, weight = float(total), float(weight)
    return total / weight if weight else float("nan")


def as_number(value: MetricValue) -> float:
    """Return a recorded metric as a number.

    Raises:
        ValueError: ``value`` is not a single number.
    """
    try:
        return float(value if isinstance(value, str) else one_number(value))  # type: ignore[arg-type]  # None is refused
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The metric is {value!r}. Expected a single number, or a tensor or array with one element. Record a "
            "number, or watch another metric."
        ) from error


def widened(value: torch.Tensor) -> torch.Tensor:
    """Return a one-element tensor as a scalar in float64 (float32 on MPS), to keep sums and quotients precise."""
    return value.reshape(()).to(wide_dtype(value.device))


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the type of floating-point numbers in which a device sums: float64, where it has that."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _device_of(numbers: Iterable[float | torch.Tensor]) -> torch.device:
    return next(number.device for number in numbers if isinstance(number, torch.Tensor))


def _wide_tensor(numbers: Sequence[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
