"""What a run records: losses averaged on the device, and the history of all metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class RunHistory(ABC):
    """The metrics of a run and its current epoch; subclass it to keep them somewhere else than in memory."""

    @abstractmethod
    def get_metric_names(self) -> Iterable[str]:
        """Return the names of all metrics recorded so far."""

    @abstractmethod
    def get_metric_values(self, metric_name: str) -> Iterable[Any]:
        """Return all values of a metric, oldest first.

        Raises:
            ValueError: Nothing was recorded under this name.
        """

    @abstractmethod
    def get_latest_metric(self, metric_name: str) -> Any:
        """Return the newest value of a metric.

        Raises:
            ValueError: Nothing was recorded under this name.
        """

    @abstractmethod
    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record another value under `metric_name_prefix` + ``metric_name``.

        Args:
            metric_name: Names that start with ``train`` are logged after training, all others after evaluation.
            metric_value: Usually a number; anything is kept as it is.
        """

    @abstractmethod
    def delete_metric(self, metric_name: str) -> None:
        """Forget a metric and all its values.

        Raises:
            ValueError: Nothing was recorded under this name.
        """

    @property
    @abstractmethod
    def metric_name_prefix(self) -> str:
        """What is put before the name of each recorded metric; empty by default."""

    @abstractmethod
    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Put ``prefix`` before the name of every metric recorded from now on."""

    @property
    @abstractmethod
    def current_epoch(self) -> int:
        """The number of the epoch under way, from 1; after a run, one more than the epochs that were run."""

    @abstractmethod
    def _set_epoch(self, epoch: int) -> None:
        """Set the number of the current epoch."""

    @abstractmethod
    def _increment_epoch(self) -> None:
        """Go on to the next epoch."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all metrics and stand before the first epoch."""


class InMemoryRunHistory(RunHistory):
    """Keeps all metrics in lists.

    Example:
        >>> history = InMemoryRunHistory()
        >>> history.update_metric("accuracy", 0.5)
        >>> history.update_metric("accuracy", 0.75)
        >>> history.get_metric_values("accuracy")
        [0.5, 0.75]
        >>> history.get_latest_metric("acuracy")
        Traceback (most recent call last):
        ValueError: Nothing was recorded under the metric name 'acuracy'. Recorded so far: ['accuracy'].
    """

    def __init__(self) -> None:
        self._current_epoch = 1
        self._metric_name_prefix = ""
        self._values: defaultdict[str, list[Any]] = defaultdict(list)

    def get_metric_names(self) -> set[str]:
        """Return the names of all metrics recorded so far."""
        return set(self._values)

    def get_metric_values(self, metric_name: str) -> list[Any]:
        """Return all values of a metric, oldest first, as a list that may be changed freely.

        Raises:
            ValueError: Nothing was recorded under this name.
        """
        return list(self._get_values(metric_name))

    def get_latest_metric(self, metric_name: str) -> Any:
        """Return the newest value of a metric.

        Raises:
            ValueError: Nothing was recorded under this name.
        """
        return self._get_values(metric_name)[-1]

    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Record another value under `metric_name_prefix` + ``metric_name``."""
        self._values[self._metric_name_prefix + metric_name].append(metric_value)

    def delete_metric(self, metric_name: str) -> None:
        """Forget a metric and all its values.

        Raises:
            ValueError: Nothing was recorded under this name.
        """
        self._get_values(metric_name)
        del self._values[metric_name]

    @property
    def metric_name_prefix(self) -> str:
        """What is put before the name of each recorded metric; empty by default."""
        return self._metric_name_prefix

    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Put ``prefix`` before the name of every metric recorded from now on."""
        self._metric_name_prefix = prefix

    @property
    def current_epoch(self) -> int:
        """The number of the epoch under way, from 1; after a run, one more than the epochs that were run."""
        return self._current_epoch

    def _set_epoch(self, epoch: int) -> None:
        self._current_epoch = epoch

    def _increment_epoch(self) -> None:
        self._current_epoch += 1

    def reset(self) -> None:
        """Forget all metrics and stand before the first epoch."""
        self._current_epoch = 1
        self._values.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return all metrics and the current epoch."""
        return {
            "current_epoch": self._current_epoch,
            "metrics": {name: list(values) for name, values in self._values.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, forgetting what was recorded before."""
        self._current_epoch = state_dict["current_epoch"]
        self._values.clear()
        for name, values in state_dict["metrics"].items():
            self._values[name] = list(values)

    def _get_values(self, metric_name: str) -> list[Any]:
        if metric_name not in self._values:
            raise ValueError(
                f"Nothing was recorded under the metric name {metric_name!r}. Recorded so far: {sorted(self._values)}."
            )
        return self._values[metric_name]


_MOST_WAITING = 64  # values
_MOST_REMEMBERED = 256  # blocks of so many


class LossTracker:
    """A weighted mean that stays on the device until somebody asks for it.

    Example:
        >>> tracker = LossTracker()
        >>> tracker.update(1.0, batch_size=3)
        >>> tracker.update(torch.tensor(2.0), batch_size=1)
        >>> tracker.average
        1.25
    """

    def __init__(self) -> None:
        self._total: float | torch.Tensor = 0.0
        self._count: float | torch.Tensor = 0
        # Adding takes several operations on tensors, so values wait in a block and are added up some at a time.
        self._block = torch.empty(0)
        self._places: Sequence[torch.Tensor] = ()  # views of the block, one for each value
        self._weights: list[float | torch.Tensor] = []
        self._added: deque[torch.Tensor] = deque(maxlen=_MOST_REMEMBERED)
        self._num_added = 0

    @property
    def total_loss(self) -> float | torch.Tensor:
        """The weighted sum so far."""
        if not self._weights:
            return self._total
        return (self._values * self._weights_on(self._block.device)).sum() + self._total

    @property
    def running_count(self) -> float | torch.Tensor:
        """The sum of the weights so far."""
        if any(isinstance(weight, torch.Tensor) for weight in self._weights):
            return self._weights_on(_device_of(self._weights)).sum() + self._count
        return sum(self._weights, start=self._count)

    def reset(self) -> None:
        """Start anew."""
        self.__init__()  # type: ignore[misc]

    def update(self, loss_batch_value: float | torch.Tensor, batch_size: float | torch.Tensor = 1) -> None:
        """Take in the mean of one batch, without reading it from the device.

        Args:
            loss_batch_value: The mean over the batch: a number, or a tensor of one element.
            batch_size: The weight of the batch: its number of samples, tokens or whatever the mean was taken over.
        """
        if not isinstance(loss_batch_value, torch.Tensor):
            self._add_number(loss_batch_value, batch_size)
            return
        if len(self._weights) == _MOST_WAITING:
            self._add_up()
        if not self._places:
            self._make_block(loss_batch_value.device)
        value = loss_batch_value.detach() if loss_batch_value.requires_grad else loss_batch_value
        self._places[len(self._weights)].copy_(value.reshape(()) if value.ndim else value)
        self._weights.append(batch_size.detach().clone() if isinstance(batch_size, torch.Tensor) else batch_size)

    def find_non_finite(self) -> tuple[int, float] | None:
        """Return the index of the first value that is NaN or infinite, and the value; ``None`` if there is none.

        Reads from the device. As many are remembered as come between two log points.
        """
        if math.isfinite(float(self.total_loss)):  # one number tells of all
            return None
        values = [value for block in (*self._added, self._values) for value in block.tolist()]
        first_index = self._num_added + len(self._weights) - len(values)
        of_first = ((i, value) for i, value in enumerate(values, first_index) if not math.isfinite(value))
        return next(of_first, None)

    def _add_number(self, value: float, weight: float | torch.Tensor) -> None:
        self._add_up()
        self._total, self._count = self._total + value * weight, self._count + weight
        self._added.append(torch.tensor([value], dtype=torch.float64))
        self._num_added += 1

    @property
    def _values(self) -> torch.Tensor:
        return self._block[: len(self._weights)]

    def _make_block(self, device: torch.device) -> None:
        """Make a block on a device, with the values that wait: those of a training state come to it from the host."""
        block = torch.empty(_MOST_WAITING, dtype=_wide_dtype(device), device=device)
        block[: len(self._weights)] = self._values
        self._block, self._places = block, block.unbind()

    def _add_up(self) -> None:
        if self._weights:
            self._total, self._count = self.total_loss, self.running_count
            self._added.append(self._values.clone())
            self._num_added += len(self._weights)
            self._weights = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_places": ()}  # in a copy they would be no views

    def _weights_on(self, device: torch.device) -> torch.Tensor:
        if any(isinstance(weight, torch.Tensor) for weight in self._weights):
            weights = torch.stack([torch.as_tensor(weight, device=device).reshape(()) for weight in self._weights])
        else:
            weights = torch.tensor(self._weights, dtype=torch.float64)
        return weights.to(device, _wide_dtype(device), non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as tensors in host memory, and the values that are not in them yet."""
        sums = {"total_loss": self._total, "running_count": self._count}
        return {
            **{name: torch.as_tensor(value, dtype=torch.float64).cpu() for name, value in sums.items()},
            "values": self._values.cpu().clone(),
            "weights": [weight.cpu() if isinstance(weight, torch.Tensor) else weight for weight in self._weights],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.reset()
        self._total = float(state_dict["total_loss"])
        self._count = float(state_dict["running_count"])
        self._weights = list(state_dict.get("weights", ()))  # the first versions added each up at once
        self._block = torch.tensor([float(value) for value in state_dict.get("values", ())], dtype=torch.float64)
        self._num_added = -len(self._weights)

    @property
    def average(self) -> float:
        """The weighted mean so far, read from the device; NaN before the first batch."""
        return weighted_mean(self.total_loss, self.running_count)


class EpochMeans:
    """The weighted means over one pass through the data: of the loss, and of the metrics that steps return.

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
        self.first_step = 0
        """Index of the step whose loss came first; above 0 if the run was resumed within the epoch."""

    def update_metrics(self, batch_output: Mapping[str, Any], weight: float | torch.Tensor) -> None:
        """Take in the metrics of a batch, if its step returned any."""
        metrics = batch_output.get("metrics")
        if not metrics:
            return
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor) and value.numel() != 1:
                raise ValueError(
                    f"The metric {name!r} of a step has the shape {tuple(value.shape)}. Expected one number, the mean "
                    "over the batch; collect what has more in a callback."
                )
            self.metrics.setdefault(name, LossTracker()).update(value, weight)

    def sums(self, loss_name: str) -> dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]:
        """Return the sum and the weight of each mean, under the name it is recorded by.

        Args:
            loss_name: The name of the loss, such as ``train_loss_epoch``. A metric gets the word before its first
                underscore in front.
        """
        stage = loss_name.partition("_")[0]
        trackers = {loss_name: self.loss}
        trackers |= {f"{stage}_{name}": tracker for name, tracker in sorted(self.metrics.items())}
        return {name: (tracker.total_loss, tracker.running_count) for name, tracker in trackers.items()}

    def find_non_finite(self) -> tuple[int, float] | None:
        """Return the step of the first loss that is NaN or infinite, and the loss; reads from the device."""
        tracker: Any = self.loss  # or the user's own
        found = tracker.find_non_finite() if isinstance(tracker, LossTracker) else None
        return None if found is None else (self.first_step + found[0], found[1])

    def state_dict(self) -> dict[str, Any]:
        """Return all sums."""
        metrics = {name: tracker.state_dict() for name, tracker in self.metrics.items()}
        return {"loss": self.loss.state_dict(), "metrics": metrics}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.loss.load_state_dict(state_dict["loss"])
        self.metrics = {name: LossTracker() for name in state_dict["metrics"]}
        for name, tracker in self.metrics.items():
            tracker.load_state_dict(state_dict["metrics"][name])


def weighted_mean(total: float | torch.Tensor, weight: float | torch.Tensor) -> float:
    """Divide a weighted sum by the sum of its weights; NaN when nothing was summed."""
    total, weight = float(total), float(weight)
    return total / weight if weight else float("nan")


def as_number(value: Any) -> float:
    """Return a recorded metric as a number.

    Raises:
        ValueError: It is not a single number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected a metric that is one number, or a tensor or array of one element, but got {value!r}."
        ) from error


def widened(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of one element as a number in float64, so that sums and quotients lose no digits."""
    return value.reshape(()).to(_wide_dtype(value.device))


def _wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _device_of(numbers: Iterable[float | torch.Tensor]) -> torch.device:
    return next(number.device for number in numbers if isinstance(number, torch.Tensor))
