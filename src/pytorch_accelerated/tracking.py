"""What a run records: the history of its metrics."""

from __future__ import annotations

import copy
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_accelerated._arguments.lengths import Length, interval_within_epochs
from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._console.text import counted
from pytorch_accelerated._hints.meaning import metric_meant
from pytorch_accelerated._history.comparison import FirstDifference, HistoryDiff, RunTable, compare_named, diff
from pytorch_accelerated._history.curves import curves_of_records
from pytorch_accelerated._history.log_file import (
    LogFile,
    first_record,
    from_json_line,
    run_info_line,
    run_info_of,
    to_json_line,
)
from pytorch_accelerated._history.records import Moment, Record, records_of, rows_of, with_steps
from pytorch_accelerated._history.tables import csv_lines, data_frame, html_table, text_table
from pytorch_accelerated._means import LossTracker
from pytorch_accelerated._plots.curves import plot_series
from pytorch_accelerated.exceptions import UnknownMetricError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.figure import Figure

    from pytorch_accelerated._types import MetricValue, StateDict, StateMapping
    from pytorch_accelerated.progress import TrainingProgress

__all__ = [
    "FirstDifference",
    "HistoryDiff",
    "InMemoryRunHistory",
    "JsonlRunHistory",
    "LossTracker",
    "Moment",
    "RunHistory",
    "RunTable",
    "compare",
]

EVALUATION_PREFIX = "evaluation_"
"""In front of the name of a metric that is recorded during `Trainer.evaluate`."""


class RunHistory(ABC):
    """The metrics of a run and its current epoch. Subclass it to store them somewhere other than in memory.

    Printed, or shown in a notebook, it is a table with a row for each moment at which something was recorded.
    """

    record_every_n_updates: int | None = None
    """Updates from one record of the values of steps to the next; ``None`` if they are not recorded."""

    record_every: Length | None = None
    """The same as a length, in place of a number of updates."""

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
        intermediate evaluation, and so on. ``loss`` is its mean loss.

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

    def plot(
        self, metrics: Sequence[str] | None = None, *, x: Literal["update", "epoch", "samples", "time"] = "update"
    ) -> Figure:
        """Draw the metrics as curves: one diagram for the loss of all passes, one for each other quantity.

        Args:
            metrics: The names of those to draw; ``None`` for all, and the values of steps.
            x: The horizontal axis; ``"time"`` is in seconds since the first value.

        Returns:
            The figure. ``history.plot().savefig("curves.png")`` saves it.

        Raises:
            ModuleNotFoundError: ``matplotlib`` is not installed; it comes with the extra ``plots``.
            ValueError: Nothing was recorded that can be drawn.
        """
        curves = curves_of_records(self._iter_records(of_steps=True), metrics, x)
        if not curves:
            wanted = "any metric" if metrics is None else f"{list(metrics)}"
            raise ValueError(f"Nothing was recorded of {wanted} that can be drawn over `{x}`. Expected numbers.")
        return plot_series(curves, x)

    def diff(self, other: RunHistory | str | os.PathLike[str]) -> HistoryDiff:
        """Return what differs between the runs of two histories: settings, versions, and values.

        Args:
            other: The other history, or the file of a `JsonlRunHistory`.

        Example:
            >>> runs = InMemoryRunHistory(), InMemoryRunHistory()
            >>> for accuracy, history in zip((0.5, 0.75), runs, strict=True):
            ...     history.update_metric("accuracy", accuracy)
            >>> runs[0].diff(runs[1])
            the first value that differs is `accuracy` after update None of epoch 1: 0.5 and 0.75
        """
        return diff(self, _opened(other))

    @property
    def run_info(self) -> dict[str, Any]:
        """What the run was made of: ``settings``, ``versions`` and ``code``, the Git commit of the program, if any.

        Empty if it is not known. The settings are those of the run configuration and the optimizer.
        """
        return {}

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
        num_metrics = len(list(self.get_metric_names()))
        return f"{type(self).__name__}, {counted(num_metrics, 'metric')} in {counted(len(rows), 'row')}"

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
        # None of these is abstract, because subclasses written for 0.1.61 do not have it.
        return

    def _start_run(self, run_info: Mapping[str, Any]) -> None:
        """Keep what a training run is made of."""
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
        record_every: How often, instead of this number, as a text: ``"0.1 epochs"``, ``"30 s"``; see
            :class:`~pytorch_accelerated.utils.Length`.

    Raises:
        ValueError: ``record_every_n_updates`` is no positive number, or ``record_every`` is not understood.

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

    def __init__(self, *, record_every_n_updates: int | None = None, record_every: str | Length | None = None) -> None:
        if record_every_n_updates is not None:
            check_positive_integer("record_every_n_updates", record_every_n_updates, "updates")
        self.record_every_n_updates = record_every_n_updates
        self.record_every = interval_within_epochs("record_every", record_every, "values are recorded")
        self._current_epoch = 1
        self._prefix = ""
        self._stage = ""
        self._is_recording_evaluation = False
        self._metrics: defaultdict[str, list[MetricValue]] = defaultdict(list)
        self._newest_series: dict[str, str] = {}
        """The series with the newest value, by the name of the metric, if it is not that of this name."""

        self._moments: list[tuple[str, Moment]] = []
        """Series and moment of each record, in order. Values of earlier versions have none."""

        self._run_info: dict[str, Any] = {}
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
        intermediate evaluation, and so on. ``loss`` is its mean loss.

        Raises:
            ValueError: Nothing was recorded under this name.
        """
        names = [self._prefix + metric_name, self._prefix + self._stage + metric_name, metric_name]
        names.append(self._stage + metric_name)
        if metric_name == "loss" and self._stage:
            names += [f"{self._prefix}{self._stage}loss_epoch", f"{self._stage}loss_epoch"]
        for name in names:
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
        self._run_info = {}
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

    @property
    def run_info(self) -> dict[str, Any]:
        """What the newest run was made of: ``settings``, ``versions`` and ``code``, the Git commit, if any.

        The settings are those of the run configuration and the optimizer.
        """
        return copy.deepcopy(self._run_info)

    def _start_run(self, run_info: Mapping[str, Any]) -> None:
        self._run_info = copy.deepcopy(dict(run_info))

    def _record_step(self, values: Mapping[str, MetricValue], moment: Moment) -> None:
        if self.record_every_n_updates is not None or self.record_every is not None:
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
        record_every: How often, instead of this number, as a text.

    Raises:
        ValueError: A line of the file, other than a torn last one, has another format.

    Example::

        trainer = Trainer(..., run_history=JsonlRunHistory("runs/history.jsonl"))
        trainer.train(dataset, num_epochs=3)
        print(JsonlRunHistory("runs/history.jsonl"))  # in another process, while it trains
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        record_every_n_updates: int | None = None,
        record_every: str | Length | None = None,
    ) -> None:
        super().__init__(record_every_n_updates=record_every_n_updates, record_every=record_every)
        self._file = LogFile(path, identity=first_record)
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
        if self.record_every_n_updates is not None or self.record_every is not None:
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

    def _start_run(self, run_info: Mapping[str, Any]) -> None:
        super()._start_run(run_info)
        self._is_file_current = False  # it begins with what the run is made of

    def _lines(self) -> list[str]:
        head = [run_info_line(self._run_info)] if self._run_info else []
        return head + [to_json_line(record) for record in self._iter_records(of_steps=True)]

    def _add_line(self, number: int, line: str) -> None:
        try:
            run_info = run_info_of(line)
            if run_info is not None:
                self._run_info = run_info
                return
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
            self._note_newest_series(record.name)
        self._current_epoch = max(self._current_epoch, (record.moment.epoch or 0) + 1)

    def _note_newest_series(self, series: str) -> None:
        """Note which of a metric and its series of `Trainer.evaluate` has the newest value."""
        front, is_of_evaluation, rest = series.partition(EVALUATION_PREFIX)
        if is_of_evaluation and rest != "loss":
            self._newest_series[front + rest] = series
        else:
            self._newest_series.pop(series, None)


def compare(
    histories: Mapping[str, RunHistory | str | os.PathLike[str]] | Sequence[RunHistory | str | os.PathLike[str]],
) -> RunTable:
    """Return a table of several runs: the settings in which they differ, and the newest value of each metric.

    Args:
        histories: Run histories, or files of `JsonlRunHistory`, by name or in a list. A file in a list is called by its
            path, a history by its number.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Something else is in the place of a history, or of several.

    Example:
        >>> history = InMemoryRunHistory()
        >>> history.update_metric("accuracy", 0.5)
        >>> compare({"first": history}).to_rows()[0]["accuracy"]
        0.5
    """
    if isinstance(histories, (str, os.PathLike, RunHistory)) or not isinstance(histories, Iterable):
        raise TypeError(
            f"`histories` is {histories!r}. Expected a list of run histories, or a mapping of them by name."
        )
    if not isinstance(histories, Mapping):
        names = (str(number) if isinstance(each, RunHistory) else str(each) for number, each in enumerate(histories, 1))
        histories = dict(zip(names, histories, strict=True))
    return compare_named({name: _opened(history) for name, history in histories.items()})


def _opened(history: RunHistory | str | os.PathLike[str]) -> RunHistory:
    if isinstance(history, RunHistory):
        return history
    if not isinstance(history, (str, os.PathLike)):
        raise TypeError(
            f"{history!r}, of type {type(history).__name__}, is no run history. Expected one, or the file of a "
            "`JsonlRunHistory`."
        )
    if not Path(history).expanduser().exists():
        raise FileNotFoundError(f"There is no file {str(history)!r}. Expected that of a `JsonlRunHistory`.")
    return JsonlRunHistory(history)


def latest_value(history: RunHistory, metric_name: str) -> MetricValue:
    """Return the newest value of one series, whatever other metrics its name may stand for at the moment.

    Raises:
        ValueError: Nothing was recorded under this name.
    """
    values = list(history.get_metric_values(metric_name))
    return values[-1] if values else history.get_latest_metric(metric_name)
