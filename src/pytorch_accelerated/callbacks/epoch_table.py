"""One aligned line per epoch."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._metrics import is_better
from pytorch_accelerated._run import run_of
from pytorch_accelerated.callbacks._console.layout import Cell, Column, table_lines
from pytorch_accelerated.callbacks._console.values import (
    duration_text,
    learning_rate_text,
    number_text,
    seconds_left,
)
from pytorch_accelerated.callbacks.reporting import LogMetricsCallback
from pytorch_accelerated.tracking import EVALUATION_PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytorch_accelerated._types import MetricValue, StateDict, StateMapping
    from pytorch_accelerated.trainer import Trainer

_UNLIMITED = sys.maxsize  # characters; a line of a file is not wrapped


class EpochTableCallback(LogMetricsCallback):
    """Prints one line per epoch, aligned under a header: time, time left, learning rate, and the metrics recorded.

    Evaluations within an epoch have a line of their own, with the update. The lowest loss so far is marked with ``*``.
    It prints on the main process only, and takes the place of `PrintProgressCallback` and `LogMetricsCallback`.
    """

    _columns: tuple[Column, ...] = ()
    _first_names: tuple[str, ...] = ()
    _is_in_training_run = False
    _epoch = 0
    _num_epochs = 0
    _run_started_at = _epoch_started_at = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._best: dict[str, float] = {}
        self._new: dict[str, MetricValue] = {}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start a table."""
        super().on_training_run_start(trainer)
        self._is_in_training_run = True
        self._start_table("time", "eta", "lr")

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start a table, unless the evaluation is called within a training run, whose table goes on."""
        super().on_evaluation_run_start(trainer)
        if not self._is_in_training_run:
            self._start_table()

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the clock."""
        self._epoch = trainer.run_history.current_epoch
        self._epoch_started_at = time.perf_counter()

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Print the line of an evaluation within the epoch."""
        super().on_eval_epoch_end(trainer)
        update = self._new.get("intermediate_update")
        if is_intermediate and update is not None:
            self._print_row(trainer, f"update {update}", {})

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print the line of the epoch."""
        super().on_training_run_epoch_end(trainer)
        self._num_epochs += 1
        now, total = time.perf_counter(), run_of(trainer).total_num_epochs
        num_epochs = self._num_epochs + max(0, total - self._epoch)
        left = seconds_left(self._num_epochs, num_epochs, now - self._run_started_at)
        groups = getattr(trainer.optimizer, "param_groups", None)
        first = {
            "time": duration_text(now - self._epoch_started_at),
            "eta": "" if left is None else duration_text(left),
            **({"lr": learning_rate_text(float(groups[0]["lr"]))} if groups else {}),
        }
        self._print_row(trainer, f"{self._epoch}/{total}", first)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print the line of the evaluation."""
        super().on_evaluation_run_end(trainer)
        of_epoch = {name: value for name, value in self._new.items() if EVALUATION_PREFIX not in name}
        if self._is_in_training_run:
            self._new = {name: value for name, value in self._new.items() if name not in of_epoch}
        self._print_row(trainer, "evaluation", {})
        if self._is_in_training_run:
            self._new = of_epoch

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print what was recorded since the last epoch."""
        super().on_training_run_end(trainer)
        self._is_in_training_run = False
        if self._new:
            self._print_row(trainer, "end", {})

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Forget the run."""
        self._is_in_training_run = False

    def log_metrics(self, trainer: Trainer, metrics: Mapping[str, MetricValue]) -> None:
        """Keep the metrics for the next line."""
        self._new.update(metrics)

    def state_dict(self) -> StateDict:
        """Return the best values so far."""
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore the best values."""
        self._best = dict(state_dict["best"])

    def _start_table(self, *first_names: str) -> None:
        self._first_names = first_names
        self._columns, self._new, self._num_epochs = (), {}, 0
        self._run_started_at = time.perf_counter()

    def _print_row(self, trainer: Trainer, label: str, first: Mapping[str, str]) -> None:
        metrics, self._new = self._new, {}
        row = {"epoch": Cell(label), **{name: Cell(first.get(name, "")) for name in self._first_names}}
        row |= {_title(name): self._cell(name, value) for name, value in metrics.items() if not name.endswith("update")}
        self._columns, lines = table_lines(self._columns, row, _line_width())
        if trainer.run_config.is_world_process_zero:
            trainer.print("\n".join(lines))

    def _cell(self, name: str, value: MetricValue) -> Cell:
        if not isinstance(value, (int, float)):
            return Cell(str(value))
        best, is_loss = self._best.get(name), "loss" in name
        is_best = is_loss and is_better(value, best, greater_is_better=False)
        if is_best:
            self._best[name] = value
        return Cell(number_text(value), is_best)


def _title(metric_name: str) -> str:
    """Return the title of the column of a metric: ``train_loss_epoch`` is ``train loss``."""
    return metric_name.removeprefix("intermediate_").removesuffix("_epoch").replace("_", " ")


def _line_width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
