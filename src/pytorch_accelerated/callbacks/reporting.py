"""Callbacks that print the progress and the metrics of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._types import MetricValue
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks._epoch_table import EpochTable
from pytorch_accelerated.callbacks._series import newest_of, series_of, was_reset
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytorch_accelerated._types import MetricValue
    from pytorch_accelerated.callbacks._series import Seen
    from pytorch_accelerated.trainer import Trainer


class PrintProgressCallback(TrainerCallback):
    """Prints a line when a run starts or ends, and when the training or the evaluation of an epoch starts.

    The latter is left out if the metrics are printed by `LogMetricsCallback`, whose lines tell it.
    """

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the training run starts."""
        trainer.print("\nStarting training run")

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print the number of the epoch."""
        if not has_table(trainer.callback_handler):
            trainer.print(f"\nStarting epoch {trainer.run_history.current_epoch}")

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Print that an evaluation at the end of an epoch starts, and on which of several datasets.

        The start of an evaluation run is printed already, and the trainer tells about evaluations within an epoch.
        """
        run = run_of(trainer)
        if run.is_training_run and not is_intermediate and not has_table(trainer.callback_handler):
            name = run.name_of_current_dataset
            trainer.print(f"Starting evaluation{f' on {name!r}' if name else ''}")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the training run ends."""
        trainer.print("Finishing training run")

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the evaluation run starts."""
        trainer.print("\nStarting evaluation run")

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the evaluation run ends, unless a line with its metrics tells it."""
        if not has_table(trainer.callback_handler):
            trainer.print("Finishing evaluation run")


class LogMetricsCallback(TrainerCallback):
    """Prints the metrics: one aligned line per epoch. Override `log_metrics` to send them elsewhere.

    A line has the time that the epoch took, the time left of the run, the learning rate, and what was recorded since
    the line before. Evaluations within an epoch have lines of their own. The best value so far of each metric is marked
    with ``*``. In a notebook, the lines are a table.

    If `log_metrics` is overridden, nothing is printed. It gets metrics whose names start with ``train`` at the end of
    the training epoch, all others after evaluation.

    This callback is called after those that record metrics, wherever it is in the list.
    """

    is_called_last = True

    # Here, because a subclass may not call `super().__init__()`.
    _logged: dict[str, Seen] | None = None
    _run_number: int | None = None
    _kept_table: EpochTable | None = None

    def __init__(self) -> None:  # 0.1.61 has this signature
        super().__init__()

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Mark what earlier runs recorded as logged, and start a table."""
        self._mark_earlier_runs(trainer)
        self._table.start_training_run(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Mark what earlier runs recorded as logged, and start a table."""
        self._mark_earlier_runs(trainer)
        self._table.start_evaluation_run()

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the clock."""
        self._table.start_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the new training metrics."""
        self._log_new_metrics(trainer, lambda name: name.startswith("train"))

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Log all new metrics: also those of an evaluation dataset whose name starts with ``train``."""
        self._log_new_metrics(trainer)
        if is_intermediate and self.prints_table:
            self._table.end_intermediate_evaluation(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log what callbacks have recorded at the end of the epoch, and print its line."""
        self._log_new_metrics(trainer)
        if self.prints_table:
            self._table.end_epoch(trainer)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log what was recorded since."""
        self._log_new_metrics(trainer)
        if self.prints_table:
            self._table.end_training_run(trainer)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log what callbacks have recorded at the end of the evaluation, and print its line."""
        self._log_new_metrics(trainer)
        if self.prints_table:
            self._table.end_evaluation_run(trainer)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Forget the run."""
        self._table.abandon_run()

    def log_metrics(self, trainer: Trainer, metrics: Mapping[str, MetricValue]) -> None:
        """Print one line per metric. The callback itself prints a table instead, unless this method is overridden.

        Args:
            trainer: The trainer.
            metrics: The newest value of each metric, by name.
        """
        for name, value in metrics.items():
            trainer.print(f"{name}: {value}")

    @property
    def prints_table(self) -> bool:
        """Whether the callback prints a table; not if `log_metrics` is overridden."""
        return getattr(self.log_metrics, "__func__", None) is LogMetricsCallback.log_metrics

    @property
    def _table(self) -> EpochTable:
        if self._kept_table is None:
            self._kept_table = EpochTable()
        return self._kept_table

    def _mark_earlier_runs(self, trainer: Trainer) -> None:
        """Mark what earlier runs recorded as logged, but not what callbacks have recorded since this run has begun."""
        run = run_of(trainer)
        self._run_number = run.training.run_number
        if run.has_reset_history and not run.is_resumed:
            self._logged = {}
        elif self._logged is None or run.is_resumed:
            self._logged = newest_of(series_of(trainer.run_history))

    def _log_new_metrics(self, trainer: Trainer, is_wanted: Callable[[str], bool] = lambda name: True) -> None:
        series = series_of(trainer.run_history)
        logged, run_number = self._logged or {}, run_of(trainer).training.run_number
        # A subclass may not call the events at the start of a run.
        is_new_run = self._run_number not in (None, run_number)
        self._run_number = run_number
        if (is_new_run and run_of(trainer).has_reset_history) or was_reset(series, logged):
            logged = {}
        wanted = {name: series[name] for name in sorted(series) if is_wanted(name)}
        metrics = {
            name: values[-1]
            for name, values in wanted.items()
            if name not in logged or len(values) != logged[name].num_values
        }
        self._logged = {**logged, **newest_of(wanted)}
        if metrics and self.prints_table:
            self._table.add(metrics)
        elif metrics:
            self.log_metrics(trainer, metrics)


def has_table(callback_handler: object) -> bool:
    """Return whether one of the callbacks prints a table, whose lines tell when an epoch or evaluation has ended."""
    callbacks = getattr(callback_handler, "callbacks", ())  # a test double may have none
    return any(isinstance(callback, LogMetricsCallback) and callback.prints_table for callback in callbacks)
