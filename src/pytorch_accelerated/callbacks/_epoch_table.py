"""The table of epochs: one aligned line per epoch, on the screen, in a file, or as a table of a notebook."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from pytorch_accelerated._accumulation import groups_of
from pytorch_accelerated._console.layout import Cell, Column, table_lines
from pytorch_accelerated._console.pace import Pace
from pytorch_accelerated._console.screen import LiveHtml, html_escaped, is_notebook, line_width
from pytorch_accelerated._console.values import (
    NUMBER_WIDTH,
    duration_text,
    learning_rate_text,
    number_text,
    time_left_text,
    title_of,
)
from pytorch_accelerated._measuring.comparison import BestMetric, is_greater_better, one_number
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks._series import Seen, newest_of, series_of, was_reset
from pytorch_accelerated.tracking import EVALUATION_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytorch_accelerated._types import MetricValue
    from pytorch_accelerated.trainer import Trainer

_MANY_ROWS = 100  # a notebook gets the whole table with each row, so more than these are sent now and then
_TOLD_ELSEWHERE = ("intermediate_update", "train_num_batches")  # by the label, and by the end of a short epoch
_MAX_TEXT = 24  # characters of a value that is not a number


class EpochTable:
    """Collects what is recorded, and prints it, a line per epoch or evaluation.

    A value better than all before it is marked with ``*``, where the name of the metric tells whether larger values are
    better: those of the evaluation, or of the training if there is none.
    """

    def __init__(self) -> None:
        self._columns: tuple[Column, ...] = ()
        self._line_width = 0
        self._new: dict[str, MetricValue] = {}
        self._is_in_training_run = False
        self._open_epoch: int | None = None
        self._live: LiveHtml | None = None
        self._rows: list[Mapping[str, Cell]] = []
        self._best: dict[str, _BestSoFar] = {}
        self._epoch_started_at = 0.0
        self._pace = Pace()

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is shown: a copy has its own table."""
        return {**vars(self), "_live": None}

    def start_training_run(self, trainer: Trainer) -> None:
        """Start a table."""
        self._start()
        self._is_in_training_run = True
        self._pace = Pace(run_of(trainer).fraction_done(), window=None)
        self._epoch_started_at = time.perf_counter()

    def start_evaluation_run(self) -> None:
        """Start a table, unless the evaluation is called within a training run, whose table goes on."""
        if not self._is_in_training_run:
            self._start()

    def start_epoch(self, trainer: Trainer) -> None:
        """Look at the clock."""
        self._open_epoch = trainer.run_history.current_epoch
        self._epoch_started_at = time.perf_counter()

    def add(self, metrics: Mapping[str, MetricValue]) -> None:
        """Keep metrics for the next line."""
        self._new.update(metrics)

    def end_intermediate_evaluation(self, trainer: Trainer) -> None:
        """Print the line of an evaluation within an epoch, with the number of updates so far."""
        run, data_pass = run_of(trainer), run_of(trainer).training.epoch
        more_to_come = list(run.eval_dataloaders.values())[:-1]  # one line for all datasets
        if not any(run.current_dataloader is loader for loader in more_to_come):
            of_step, measured = data_pass.means.metrics, {name.rpartition("eval_")[2] for name in self._new}
            of_trainer = [name for name in measured if data_pass.metrics and data_pass.metrics.may_return(name)]
            of_epoch = [data_pass.loss_name, *(f"train_{name}" for name in (*of_step, *of_trainer))]
            widest = f"update {run.config.max_num_train_steps}"
            label = f"update {run.progress.num_updates}".rjust(len(widest))
            self._print_row(trainer, label, {"lr": _rate_text(learning_rate_of(trainer))}, of_epoch)

    def end_epoch(self, trainer: Trainer) -> None:
        """Print the line of the epoch."""
        self._open_epoch = None
        self._print_epoch(trainer, trainer.run_history.current_epoch, run_of(trainer).seconds_left(self._pace))

    def end_evaluation_run(self, trainer: Trainer) -> None:
        """Print the line of the evaluation; what the epoch has recorded waits for its own."""
        of_epoch = {name: value for name, value in self._new.items() if EVALUATION_PREFIX not in name}
        if self._is_in_training_run:
            self._new = {name: value for name, value in self._new.items() if name not in of_epoch}
        self._print_row(trainer, "evaluation")
        if self._is_in_training_run:
            self._new = of_epoch

    def end_training_run(self, trainer: Trainer) -> None:
        """Print what was recorded since the last line: that of an epoch that was stopped, or what came after it."""
        if self._new and self._open_epoch is not None:
            self._print_epoch(trainer, self._open_epoch, None)
        elif self._new:
            self._print_row(trainer, "end")
        self.abandon_run()

    def abandon_run(self) -> None:
        """Forget the run, which may have failed."""
        if self._live is not None:
            self._live.show(lambda: _html_of(self._rows), is_last=True)
        self._is_in_training_run, self._open_epoch = False, None

    def _start(self) -> None:
        self._columns, self._new, self._rows, self._live, self._best = (), {}, [], None, {}

    def _print_epoch(self, trainer: Trainer, epoch: int, seconds_left: float | None) -> None:
        total = str(run_of(trainer).total_num_epochs)
        first = {
            "time": duration_text(time.perf_counter() - self._epoch_started_at),
            "eta": time_left_text(seconds_left),
            "lr": _rate_text(learning_rate_of(trainer)),
        }
        self._print_row(trainer, f"{epoch:>{len(total)}}/{total}", first)

    def _print_row(
        self, trainer: Trainer, label: str, first: Mapping[str, str] | None = None, coming: Iterable[str] = ()
    ) -> None:
        """Print a line of what was recorded since the one before.

        Args:
            trainer: The trainer.
            label: What the line is about.
            first: How long it took, how long the rest takes, and the learning rate.
            coming: Metrics that a later line will have, so that it needs no other header.
        """
        metrics, self._new = self._new, {}
        first_column, unsaid = ("epoch", "") if self._is_in_training_run else (" ", "evaluation ")
        row = {first_column: Cell(label)}
        if self._is_in_training_run:
            row |= {name: Cell((first or {}).get(name, "")) for name in ("time", "eta", "lr")}
        names = {*(name for name in metrics if not name.endswith(_TOLD_ELSEWHERE)), *coming}
        for name in sorted(names, key=_Order(run_of(trainer).eval_dataloaders, run_of(trainer).metrics.names)):
            cell = self._cell(trainer, name, metrics[name]) if name in metrics else Cell("", width=NUMBER_WIDTH)
            title = title_of(name).replace(unsaid, "")
            if name == "lr" and name in row:  # what `LearningRateCallback` has recorded belongs into its column
                row[name] = Cell(_rate_text(metrics[name]))
                continue
            row[next(free for free in (title, name, f"metric {name}") if free not in row)] = cell
        if not (run_of(trainer).is_verbose and trainer.run_config.is_world_process_zero):
            return
        if is_notebook():
            self._live = self._live or LiveHtml()
            self._rows.append(row)
            self._live.show(lambda: _html_of(self._rows), is_last=len(self._rows) < _MANY_ROWS)
        else:
            width = line_width()
            if width != self._line_width:  # the screen has another width than when the header was printed
                self._columns, self._line_width = (), width
            self._columns, lines = table_lines(self._columns, row, width)
            trainer.print("\n".join(lines))

    def _cell(self, trainer: Trainer, name: str, value: MetricValue) -> Cell:
        number = one_number(value)
        if number is None:
            text = str(value)
            return Cell(text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}...")
        text = number_text(value if isinstance(value, int) else float(number))
        return Cell(text, self._is_best(trainer, name, float(number)), NUMBER_WIDTH)

    def _is_best(self, trainer: Trainer, name: str, value: float) -> bool:
        is_greater = is_greater_better(name)
        if is_greater is None or (name.startswith("train") and run_of(trainer).eval_dataloaders):
            return False
        if EVALUATION_PREFIX in name or math.isnan(value):
            return False
        name = _plain(name)
        series = {each: values for each, values in series_of(trainer.run_history).items() if _plain(each) == name}
        return self._best.setdefault(name, _BestSoFar(is_greater)).is_reached_by(value, series)


class _BestSoFar:
    """The best value of a metric, among all that a history had when it was last asked.

    Args:
        greater_is_better: Whether larger values are better.
    """

    def __init__(self, greater_is_better: bool) -> None:
        self._greater_is_better = greater_is_better
        self._best = BestMetric()
        self._seen: dict[str, Seen] = {}

    def is_reached_by(self, value: float, series: Mapping[str, list[MetricValue]]) -> bool:
        """Return whether a value, which is among the newest, is better than all others.

        Args:
            value: The value.
            series: All values of the metric, by the names under which they were recorded.
        """
        if was_reset(series, self._seen):
            self._best.reset()
            self._seen = {}
        new = [each for name in series for each in series[name][self._num_seen(name) :]]
        self._seen = newest_of(series)
        others = [float(number) for number in map(one_number, new) if number is not None]
        if value in others:  # a history of another class may keep something else
            others.remove(value)
        for other in others:
            self._add(other)
        return self._add(value)

    def _num_seen(self, name: str) -> int:
        return self._seen[name].num_values if name in self._seen else 0

    def _add(self, value: float) -> bool:
        is_better = self._best.is_improved_by(value, self._greater_is_better)
        if is_better:
            self._best.record(value)
        return is_better


def _plain(metric_name: str) -> str:
    """Return the name of a metric of evaluations at the end of epochs, for those within epochs too."""
    return metric_name.replace("intermediate_", "")


def _rate_text(rate: MetricValue) -> str:
    number = one_number(rate)
    return "" if number is None else learning_rate_text(float(number))


def learning_rate_of(trainer: Trainer) -> float | None:
    """Return the learning rate of the first group of parameters; ``None`` if there is none."""
    groups = groups_of(trainer.optimizer)
    rate = one_number(groups[0].get("lr")) if groups else None
    return None if rate is None else float(rate)


class _Order:
    """The order of columns: training first, then each dataset, with its loss first, then the metrics of the trainer.

    Args:
        datasets: The names of the evaluation datasets, in their order.
        metrics: The names of the metrics of the trainer, in their order.
    """

    def __init__(self, datasets: Iterable[str], metrics: Iterable[str]) -> None:
        self._prefixes = [f"{name}_" for name in datasets if name]
        self._metrics = list(metrics)

    def __call__(self, metric_name: str) -> tuple[object, ...]:
        stage = next((f"{word}_" for word in ("train", "evaluation", "eval") if f"{word}_" in metric_name), "")
        prefix, _, rest = metric_name.partition(stage) if stage else ("", "", metric_name)
        number = next(
            (n for n, dataset in enumerate(self._prefixes) if prefix.startswith(dataset)), len(self._prefixes)
        )
        own = (n for n, name in enumerate(self._metrics) if rest == name or rest.startswith(f"{name}_"))
        place = next(own, len(self._metrics))
        is_loss = rest.startswith("loss")
        return not metric_name.startswith("train"), not stage, number, prefix, not is_loss, place, rest


def _html_of(rows: list[Mapping[str, Cell]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html_escaped(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(_td(row.get(name, Cell(""))) for name in names) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _td(cell: Cell) -> str:
    text = html_escaped(cell.text)
    return f"<td><b>{text}*</b></td>" if cell.is_best else f"<td>{text}</td>"
