"""Callbacks that end a run early."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._loss_monitor import describe_non_finite_loss, find_non_finite_loss
from pytorch_accelerated._metrics import PatienceCounter
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytorch_accelerated.trainer import Trainer


class TerminateOnNaNCallback(TrainerCallback):
    """Ends the run with `NonFiniteLossError` when the loss becomes NaN or infinite, in training or evaluation.

    To look at each loss would make the host wait for the device at each step. So they are looked at together: ten times
    a second, at the end of an epoch, and before a training state is saved, which therefore never holds what a bad loss
    has spoilt. The error names the first bad step.
    """

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses so far if their mean is not finite."""
        if trainer.recent_loss is not None and not math.isfinite(trainer.recent_loss):
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses of the epoch."""
        self._look(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses of the evaluation."""
        self._look(trainer)

    def on_training_state_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses so far."""
        self._look(trainer)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses so far."""
        self._look(trainer)

    def check_for_nan_after_batch(self, batch_output: Mapping[str, Any], step: Any = None) -> None:
        """Look at the loss of one batch at once.

        Args:
            batch_output: What a step returned.
            step: How to call the step in the message.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite.
        """
        loss = float(batch_output["loss"])
        if not math.isfinite(loss):
            raise NonFiniteLossError(describe_non_finite_loss(loss, "" if step is None else f" at step {step}"))

    def _look(self, trainer: Trainer) -> None:
        error = find_non_finite_loss(trainer)
        if error is not None:
            raise error


class EarlyStoppingCallback(TrainerCallback):
    """Stops the run when a metric has not improved for a number of epochs.

    Args:
        early_stopping_patience: Epochs in a row without improvement after which the run stops; at least 1.
        early_stopping_threshold: The smallest change, in the unit of the metric, that counts as an improvement.
        watch_metric: Name of the metric in the run history.
        greater_is_better: Whether larger values are better.
        reset_on_train: Whether each run starts counting anew.

    Raises:
        ValueError: The patience is below 1.
    """

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float = 0.01,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
    ) -> None:
        if early_stopping_patience < 1:
            raise ValueError(f"`early_stopping_patience` is {early_stopping_patience!r}. Expected at least 1 epoch.")
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self.reset_on_train = reset_on_train
        self._counter = PatienceCounter(early_stopping_patience, greater_is_better, early_stopping_threshold)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the metric's name, and start counting."""
        check_watched_metric(trainer, self.watch_metric, type(self).__name__)
        if self.reset_on_train and not trainer.is_resumed:
            self._counter.reset()

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take in the metric of the epoch.

        Raises:
            StopTrainingError: The patience is used up.
        """
        value = trainer.get_agreed_metric(self.watch_metric)
        if self._counter.update(value):
            raise StopTrainingError(
                f"{self.watch_metric} has not improved on {self._counter.best} "
                f"for {self._counter.num_without_improvement} epochs"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the count."""
        return {
            "best": self._counter.best,
            "num_without_improvement": self._counter.num_without_improvement,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._counter.best = state_dict["best"]
        self._counter.num_without_improvement = state_dict["num_without_improvement"]


def check_watched_metric(trainer: Trainer, watch_metric: str, callback_name: str) -> None:
    """Raise at the start of a run if a callback waits for the evaluation loss and there is no evaluation.

    Raises:
        ValueError: `train` was called without ``eval_dataset``, or with several.
    """
    if watch_metric != "eval_loss_epoch":
        return
    if isinstance(trainer._eval_dataloader, dict):
        known = sorted(f"{name}_eval_loss_epoch" for name in trainer._eval_dataloader)
        raise ValueError(  # noqa: TRY004 - the value of `watch_metric` is what is wrong
            f"`{callback_name}` watches 'eval_loss_epoch', but there are several evaluation datasets, whose losses "
            f"carry their names. Watch one of {known}."
        )
    if trainer._eval_dataloader is None:
        raise ValueError(
            f"`{callback_name}` watches 'eval_loss_epoch', but `train` was called without `eval_dataset`, so there is "
            "no evaluation. Pass an `eval_dataset`, or watch another metric, such as 'train_loss_epoch'."
        )
