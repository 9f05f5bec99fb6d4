"""What a run records: the history of its metrics, and means that are accumulated on the device."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated._counts import check_positive_integer
from pytorch_accelerated._hints.meaning import metric_meant
from pytorch_accelerated._history.log_file import LogFile, first_line, from_json_line, to_json_line
from pytorch_accelerated._history.records import Moment, Record, records_of, rows_of, with_steps
from pytorch_accelerated._history.tables import csv_lines, data_frame, html_table, text_table
from pytorch_accelerated._measuring.names import MetricNames
from pytorch_accelerated._messages import warn
from pytorch_accelerated._metrics import one_number
from pytorch_accelerated.exceptions import UnknownMetricError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pytorch_accelerated._types import BatchOutput, MetricValue, StateDict, StateMapping
    from pytorch_accelerated.progress import TrainingProgress


EVALUATION_PREFIX = "evaluation_"
"""In front of the name of a metric that is recorded during `Trainer.evaluate`."""


class RunHistory(ABC):
    """The metrics of a run and its current epoch. Subclass it to store them somewhere other than in memory.

    Printed, or shown in a notebook, it is a table with a row for each moment at which something was recorded.
    """

    record_every_n_updates: int | None = None
    """Updates from one record of the values of steps to the next; ``None`` if they are not recorded."""

    @abstractmethod
    def get_metric_names(self) -> Iterable[str]:
        """Return the names of all metrics recorded so far."""

    @abstractmethod
    def get_metric_values(self, metric_name: str) -> Iterable[MetricValue]:
        """Return all values of a metric, oldest first; none if nothing was recorded under this name."""

    @abstractmethod
    def get_latest_metric(self, metric_name: str) -> MetricValue:
        """Return the newest value of a metric.

        In the events of a pass over the data, from its start to its end, a plain name means the metric of that pass, if
        it has one: ``accuracy`` is ``train_accuracy`` in a training epoch, ``intermediate_eval_accuracy`` in an
        intermediate evaluation, and so on.

        Raises:
            ValueError: Nothing was recorded under this name.
        """

    @abstractmethod
    def update_metric(self, metric_name: str, metric_value: MetricValue) -> None:
        """Record another value under `metric_name_prefix` + ``metric_name``.

        Args:
            metric_name: Names that start with ``train`` are logged after training, all others after evaluation.
            metric_value: Usually a number. Any value is stored as it is.
        """

    @abstractmethod
    def delete_metric(self, metric_name: str) -> None:
        """Delete a metric and all its values.

        Raises:
            UnknownMetricError: Nothing was recorded under this name.
        """

    @property
    @abstractmethod
    def metric_name_prefix(self) -> str:
        """The prefix added to the name of each metric when it is recorded; empty by default."""

    @abstractmethod
    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Add ``prefix`` to the name of every metric recorded from now on."""

    @property
    @abstractmethod
    def current_epoch(self) -> int:
        """The number of the current epoch, from 1. After a run it is one more than the number of finished epochs."""

    @abstractmethod
    def _set_epoch(self, epoch: int) -> None:
        """Set the number of the current epoch."""

    @abstractmethod
    def _increment_epoch(self) -> None:
        """Move to the next epoch."""

    @abstractmethod
    def reset(self) -> None:
        """Delete all metrics, and return to the first epoch."""

    @contextmanager
    def during_pass(self, stage: str) -> Iterator[None]:
        """Let plain names mean the metrics of a pass over the data while the body runs: ``accuracy``, for example.

        By default they do not.

        Args:
            stage: What the names of these metrics begin with, after the prefix: ``train_``, ``eval_`` or
                ``evaluation_``.
        """
        yield

    @contextmanager
    def recording_evaluation(self) -> Iterator[None]:
        """Keep what is recorded while the body runs apart from what training records.

        `Trainer.evaluate` is such a body. By default nothing is kept apart.
        """
        yield

    def to_rows(self) -> list[dict[str, MetricValue]]:
        """Return a row for each moment at which something was recorded, oldest first.

        What was recorded after the same update is in one row, values of steps too. Its entries are ``epoch``, counted
        from 1, ``update`` and ``samples``, counted from the start of training over all processes, ``time``, in seconds
        since 1970, and the metrics recorded then. The four are ``None`` for what an earlier version, or a history that
        does not keep them, has recorded.
        """
        return rows_of(self._iter_records(of_steps=True))

    def to_pandas(self) -> Any:
        """Return the rows of `to_rows` as a `pandas.DataFrame`, with NaN where a metric was not recorded.

        Raises:
            ModuleNotFoundError: ``pandas`` is not installed; it comes with the extra ``pandas``.
        """
        return data_frame(self.to_rows())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of `to_rows` to a CSV file, which is replaced as a whole; missing folders are created.

        Args:
            path: The file. A cell is empty where a metric was not recorded.
        """
        LogFile(path, identity=len).replace(csv_lines(self.to_rows()))

    def __repr__(self) -> str:
        rows = rows_of(self._iter_records())
        return f"{self._title(rows)}:\n{text_table(rows)}" if rows else f"{type(self).__name__}: nothing recorded yet"

    def _repr_html_(self) -> str:
        rows = rows_of(self._iter_records())
        return html_table(rows, self._title(rows))

    def _title(self, rows: Sequence[object]) -> str:
        return f"{type(self).__name__}, {len(list(self.get_metric_names()))} metrics in {len(rows)} rows"

    def _iter_records(self, *, of_steps: bool = False) -> Iterator[Record]:
        """Yield all values, oldest first, with their moments if they are known.

        Args:
            of_steps: Whether to include those of steps.
        """
        return records_of({name: list(self.get_metric_values(name)) for name in self.get_metric_names()})

    def _follow_run(self, progress: TrainingProgress, is_main_process: bool) -> None:
        """Read the moment of each value from the position of a run, until the next run starts.

        Args:
            progress: The position.
            is_main_process: Whether this process writes what all processes record.
        """
        # Not abstract, because subclasses written for 0.1.61 do not have it.
        return

    def _record_step(self, values: Mapping[str, MetricValue], moment: Moment) -> None:
        """Record values of steps. By default, and without `record_every_n_updates`, they are for callbacks only."""
        return


class InMemoryRunHistory(RunHistory):
    """Keeps all metrics in memory, in lists.

    Each value is kept with the moment it was recorded at: epoch, update, samples and time.

    A metric ``accuracy`` that is recorded during `Trainer.evaluate` is a series of its own, ``evaluation_accuracy``.
    `get_latest_metric` returns the newest value of ``accuracy`` and ``evaluation_accuracy``, whichever it is.

    Args:
        record_every_n_updates: Records values of steps too, every so many updates: the means of loss and metrics since
            the last time (``train_loss_step``), the learning rate, and the gradient norm if the run clips by it. They
            are in `to_rows` and in `get_metric_values`, and no metrics of their own in `get_metric_names`. If a
            callback wants them more often, they are recorded as often. ``None`` for no such records.

    Raises:
        ValueError: ``record_every_n_updates`` is no positive number.

    Example:
        >>> history = InMemoryRunHistory()
        >>> history.update_metric("accuracy", 0.5)
        >>> history.update_metric("accuracy", 0.75)
        >>> history.get_metric_values("accuracy")
        [0.5, 0.75]
        >>> history.get_latest_metric("acuracy")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        pytorch_accelerated.exceptions.UnknownMetricError: Nothing was ... Did you mean 'accuracy'?
    """

    def __init__(self, *, record_every_n_updates: int | None = None) -> None:
        if record_every_n_updates is not None:
            check_positive_integer("record_every_n_updates", record_every_n_updates, "updates")
        self.record_every_n_updates = record_every_n_updates
        self._current_epoch = 1
        self._prefix = ""
        self._stage = ""
        self._is_recording_evaluation = False
        self._metrics: defaultdict[str, list[MetricValue]] = defaultdict(list)
        self._newest_series: dict[str, str] = {}
        """The series with the newest value, by the name of the metric, if it is not that of this name."""

        self._moments: list[tuple[str, Moment]] = []
        """Series and moment of each record, in order. Values of earlier versions have none."""

        self._step_records: list[Record] = []
        """The values of steps, oldest first."""

        self._progress: TrainingProgress | None = None

    def get_metric_names(self) -> set[str]:
        """Return the names of all metrics recorded so far."""
        return set(self._metrics)

    def get_metric_values(self, metric_name: str) -> list[MetricValue]:
        """Return all values of a metric, oldest first, as a new list; an empty one if there are none.

        If only `Trainer.evaluate` recorded the metric, these are the values. Values of steps have names of their own.
        """
        values = self._metrics.get(metric_name) or self._metrics.get(self._newest_series.get(metric_name, ""))
        return list(values or (record.value for record in self._step_records if record.name == metric_name))

    def get_latest_metric(self, metric_name: str) -> MetricValue:
        """Return the newest value of a metric.

        In the events of a pass over the data, from its start to its end, a plain name means the metric of that pass, if
        it has one: ``accuracy`` is ``train_accuracy`` in a training epoch, ``intermediate_eval_accuracy`` in an
        intermediate evaluation, and so on.

        Raises:
            ValueError: Nothing was recorded under this name.
        """
        names = [self._prefix + metric_name, self._prefix + self._stage + metric_name, metric_name]
        for name in [*names, self._stage + metric_name]:
            values = self._metrics.get(self._newest_series.get(name, name)) or self._metrics.get(name)
            if values:
                return values[-1]
        raise self._unknown(metric_name)

    def update_metric(self, metric_name: str, metric_value: MetricValue) -> None:
        """Record another value under `metric_name_prefix` + ``metric_name``."""
        name = self._prefix + metric_name
        if self._is_recording_evaluation and not metric_name.startswith(EVALUATION_PREFIX):
            series = self._newest_series[name] = f"{self._prefix}{EVALUATION_PREFIX}{metric_name}"
        else:
            series = name
            self._newest_series.pop(name, None)
        self._metrics[series].append(metric_value)
        self._moments.append((series, self._moment()))

    def delete_metric(self, metric_name: str) -> None:
        """Delete a metric and all its values.

        Raises:
            UnknownMetricError: Nothing was recorded under this name. It is a `ValueError` and a `KeyError`.
        """
        if metric_name not in self._metrics:
            raise self._unknown(metric_name)
        del self._metrics[metric_name]
        self._moments = [entry for entry in self._moments if entry[0] != metric_name]

    @property
    def metric_name_prefix(self) -> str:
        """The prefix added to the name of each metric when it is recorded; empty by default."""
        return self._prefix

    def set_metric_name_prefix(self, prefix: str = "") -> None:
        """Add ``prefix`` to the name of every metric recorded from now on."""
        self._prefix = prefix

    @contextmanager
    def during_pass(self, stage: str) -> Iterator[None]:
        """Let `get_latest_metric` find ``eval_accuracy`` by the name ``accuracy`` while the body runs."""
        outer, self._stage = self._stage, stage
        try:
            yield
        finally:
            self._stage = outer

    @contextmanager
    def recording_evaluation(self) -> Iterator[None]:
        """Record ``accuracy`` as ``evaluation_accuracy`` while the body runs, next to the series of training."""
        outer, self._is_recording_evaluation = self._is_recording_evaluation, True
        try:
            yield
        finally:
            self._is_recording_evaluation = outer

    @property
    def current_epoch(self) -> int:
        """The number of the current epoch, from 1. After a run it is one more than the number of finished epochs."""
        return self._current_epoch

    def _set_epoch(self, epoch: int) -> None:
        self._current_epoch = epoch

    def _increment_epoch(self) -> None:
        self._current_epoch += 1

    def reset(self) -> None:
        """Delete all metrics, and return to the first epoch."""
        self._current_epoch = 1
        self._metrics.clear()
        self._moments.clear()
        self._step_records.clear()
        self._newest_series.clear()

    def state_dict(self) -> StateDict:
        """Return all metrics and the current epoch."""
        return {
            "current_epoch": self._current_epoch,
            "metrics": {name: list(values) for name, values in self._metrics.items()},
            "newest_series": dict(self._newest_series),
            "moments": [[name, *moment] for name, moment in self._moments],
            "step_records": [[record.name, record.value, *record.moment] for record in self._step_records],
        }

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Replace the contents of this history with what `state_dict` returned."""
        self._current_epoch = state_dict["current_epoch"]
        self._metrics.clear()
        for name, values in state_dict["metrics"].items():
            self._metrics[name] = list(values)
        # Missing in states of earlier versions:
        self._newest_series = dict(state_dict.get("newest_series", {}))
        self._moments = [(name, Moment(*moment)) for name, *moment in state_dict.get("moments", ())]
        of_steps = state_dict.get("step_records", ())
        self._step_records = [Record(name, value, Moment(*moment), True) for name, value, *moment in of_steps]

    def _iter_records(self, *, of_steps: bool = False) -> Iterator[Record]:
        records = records_of(self._metrics, self._moments)
        return with_steps(records, self._step_records) if of_steps else records

    def _follow_run(self, progress: TrainingProgress, is_main_process: bool) -> None:
        self._progress = progress

    def _record_step(self, values: Mapping[str, MetricValue], moment: Moment) -> None:
        if self.record_every_n_updates is not None:
            self._step_records += [Record(name, value, moment, True) for name, value in values.items()]

    def _moment(self) -> Moment:
        progress = self._progress
        if progress is None:
            return Moment(self._current_epoch, time=time.time())
        is_between = self._is_recording_evaluation and progress.is_between_epochs()
        epoch = self._current_epoch - 1 if is_between else self._current_epoch
        return Moment(epoch, progress.num_updates, progress.num_samples, time.time())

    def _unknown(self, metric_name: str) -> UnknownMetricError:
        meant = metric_meant(metric_name, self._metrics)
        remedy = "" if meant is None else f" Did you mean {meant!r}?"
        return UnknownMetricError(
            f"Nothing was recorded under the metric name {metric_name!r}. Recorded so far: {sorted(self._metrics)}."
            + remedy
        )


class JsonlRunHistory(InMemoryRunHistory):
    """Keeps all metrics in memory, and writes each to a file at once: a line of JSON with its moment.

    The file outlives the process, however that ends; a torn last line is skipped when it is read. A run that is resumed
    from a training state continues it without doubles or gaps: what was written after the state goes, because the run
    records it again. The file of another run is never overwritten, but set aside: ``history.jsonl`` becomes
    ``history.1.jsonl``. Only the main process writes.

    A history of a file that exists has what is in it, so one can be read without a trainer. A value that is not a
    single number is written as a short text.

    Args:
        path: The file. It is created, with missing folders, when the first value is recorded.
        record_every_n_updates: Records values of steps too; see `InMemoryRunHistory`.

    Raises:
        ValueError: A line of the file, other than a torn last one, has another format.

    Example::

        trainer = Trainer(..., run_history=JsonlRunHistory("runs/history.jsonl"))
        trainer.train(dataset, num_epochs=3)
        print(JsonlRunHistory("runs/history.jsonl"))  # in another process, while it trains
    """

    def __init__(self, path: str | os.PathLike[str], *, record_every_n_updates: int | None = None) -> None:
        super().__init__(record_every_n_updates=record_every_n_updates)
        self._file = LogFile(path, identity=first_line)
        self._is_main_process = True
        self._is_new_run = False
        self._is_file_current = False
        """Whether the file has the records before the newest one, so that its line only has to be appended."""

        for number, line in enumerate(self._file.read(), start=1):
            self._add_line(number, line)

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def update_metric(self, metric_name: str, metric_value: MetricValue) -> None:
        """Record another value under `metric_name_prefix` + ``metric_name``, and write it to the file."""
        self._make_file_current()
        super().update_metric(metric_name, metric_value)
        series, moment = self._moments[-1]
        self._append([Record(series, metric_value, moment)])

    def delete_metric(self, metric_name: str) -> None:
        """Delete a metric and all its values, also from the file.

        Raises:
            UnknownMetricError: Nothing was recorded under this name. It is a `ValueError` and a `KeyError`.
        """
        super().delete_metric(metric_name)
        if self._is_main_process and self._is_file_current:
            self._file.replace(self._lines())

    def reset(self) -> None:
        """Delete all metrics, and return to the first epoch. The file is set aside when the next value is recorded."""
        super().reset()
        self._is_file_current, self._is_new_run = False, True

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Replace the contents of this history with what `state_dict` returned; the file follows later."""
        super().load_state_dict(state_dict)
        self._is_file_current = self._is_new_run = False

    def _follow_run(self, progress: TrainingProgress, is_main_process: bool) -> None:
        super()._follow_run(progress, is_main_process)
        self._is_main_process = is_main_process

    def _record_step(self, values: Mapping[str, MetricValue], moment: Moment) -> None:
        num_before = len(self._step_records)
        if self.record_every_n_updates is not None:
            self._make_file_current()
            super()._record_step(values, moment)
        self._append(self._step_records[num_before:])

    def _make_file_current(self) -> None:
        if self._is_main_process and not self._is_file_current:
            self._file.start(self._lines(), is_new=self._is_new_run)
            self._is_file_current, self._is_new_run = True, False

    def _append(self, records: Sequence[Record]) -> None:
        if self._is_main_process:
            self._file.append([to_json_line(record) for record in records])

    def _lines(self) -> list[str]:
        return [to_json_line(record) for record in self._iter_records(of_steps=True)]

    def _add_line(self, number: int, line: str) -> None:
        try:
            record = from_json_line(line)
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {str(self.path)!r} is no record of a run history: {error}. Expected an object of "
                "JSON with `metric` and `value`. Pass another path, or move the file away."
            ) from error
        if record.is_of_step:
            self._step_records.append(record)
        else:
            self._metrics[record.name].append(record.value)
            self._moments.append((record.name, record.moment))
        self._current_epoch = max(self._current_epoch, (record.moment.epoch or 0) + 1)


def latest_value(history: RunHistory, metric_name: str) -> MetricValue:
    """Return the newest value of one series, whatever other metrics its name may stand for at the moment.

    Raises:
        ValueError: Nothing was recorded under this name.
    """
    values = list(history.get_metric_values(metric_name))
    return values[-1] if values else history.get_latest_metric(metric_name)


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
        stage = loss_name.partition("_")[0]
        plain = self.plain_sums()
        return {loss_name: plain.pop("loss")} | {f"{stage}_{name}": pair for name, pair in plain.items()}

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
