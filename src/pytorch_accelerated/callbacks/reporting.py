"""Callbacks that print the progress and the metrics of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._run import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.tracking import latest_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytorch_accelerated._types import MetricValue
    from pytorch_accelerated.tracking import RunHistory
    from pytorch_accelerated.trainer import Trainer


class PrintProgressCallback(TrainerCallback):
    """Prints a line when a run starts or ends, when a training epoch starts, and why a run was stopped."""

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the training run starts."""
        trainer.print("\nStarting training run")

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print the number of the epoch."""
        trainer.print(f"\nStarting epoch {trainer.run_history.current_epoch}")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the training run ends."""
        trainer.print("Finishing training run")

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the evaluation run starts."""
        trainer.print("\nStarting evaluation run")

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that the evaluation run ends."""
        trainer.print("Finishing evaluation run")

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print why the run stops early."""
        trainer.print(f"\nStopping: {run_of(trainer).stop_reason}")


class LogMetricsCallback(TrainerCallback):
    """Prints the metrics recorded since it last did. Override `log_metrics` to send them elsewhere.

    Metrics whose names start with ``train`` are logged at the end of the training epoch, all others after evaluation.
    Put this callback after those that record metrics.
    """

    def __init__(self) -> None:
        self._num_logged: dict[str, int] = {}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Mark what earlier runs recorded as logged."""
        self._num_logged = _num_values(trainer.run_history)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Mark what earlier runs recorded as logged."""
        self._num_logged = _num_values(trainer.run_history)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log the new training metrics."""
        self._log_new_metrics(trainer, lambda name: name.startswith("train"))

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Log all other new metrics."""
        self._log_new_metrics(trainer, lambda name: not name.startswith("train"))

    def log_metrics(self, trainer: Trainer, metrics: Mapping[str, MetricValue]) -> None:
        """Print one line per metric.

        Args:
            trainer: The trainer.
            metrics: The newest value of each metric, by name.
        """
        for name, value in metrics.items():
            trainer.print(f"{name}: {value}")

    def _log_new_metrics(self, trainer: Trainer, is_wanted: Callable[[str], bool]) -> None:
        history = trainer.run_history
        # A subclass may not call `super().__init__()`.
        num_logged: Mapping[str, int] = getattr(self, "_num_logged", {})
        num_values = {name: num for name, num in _num_values(history).items() if is_wanted(name)}
        metrics = {
            name: latest_value(history, name)
            for name in sorted(num_values)
            if num_values[name] != num_logged.get(name, 0)
        }
        self._num_logged = {**num_logged, **num_values}
        if metrics:
            self.log_metrics(trainer, metrics)


def _num_values(history: RunHistory) -> dict[str, int]:
    return {name: len(list(history.get_metric_values(name))) for name in history.get_metric_names()}
