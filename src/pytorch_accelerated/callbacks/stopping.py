"""Callbacks that end a run early."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytorch_accelerated._stopping import PatienceCounter
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytorch_accelerated.trainer import Trainer

_STEPS_BETWEEN_DEVICE_READS = 50


class TerminateOnNaNCallback(TrainerCallback):
    """Ends the run with `NonFiniteLossError` when the loss becomes NaN or infinite, in training or evaluation.

    A loss in host memory is looked at before the backward pass, so the parameters are still good. Looking at a loss on
    a device would make the host wait for it, so those are looked at together every 50 steps and at the end of the
    epoch; the error names the first bad step all the same.
    """

    def __init__(self) -> None:
        self._unread: list[_Loss] = []

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Forget losses of a run that failed."""
        self._unread = []

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses kept for later, if the evaluation interrupts a run."""
        self._read_losses(trainer)

    def on_backward_start(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any], *, step: int = 0, **kwargs: Any
    ) -> None:
        """Look at the loss of the batch, or keep it for later."""
        self._watch(trainer, batch_output, step, "training")

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses kept for later."""
        self._read_losses(trainer)

    def on_eval_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any], *, step: int = 0, **kwargs: Any
    ) -> None:
        """Look at the loss of the batch, or keep it for later."""
        self._watch(trainer, batch_output, step, "evaluation")

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses kept for later."""
        self._read_losses(trainer)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the losses kept for later."""
        self._read_losses(trainer)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Forget the losses kept for later."""
        self._unread = []

    def check_for_nan_after_batch(self, batch_output: Mapping[str, Any], step: Any = None) -> None:
        """Look at the loss of one batch at once.

        Args:
            batch_output: What a step returned.
            step: How to call the step in the message.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite.
        """
        loss = _to_number(batch_output["loss"])
        if not math.isfinite(loss):
            raise NonFiniteLossError(_describe(loss, "" if step is None else f" at step {step}"))

    def _watch(self, trainer: Trainer, batch_output: Mapping[str, Any], step: int, stage: str) -> None:
        loss = batch_output["loss"]
        if isinstance(loss, torch.Tensor) and loss.device.type != "cpu":
            self._unread.append(_Loss(stage, step, loss.detach()))
            if len(self._unread) >= _STEPS_BETWEEN_DEVICE_READS:
                self._read_losses(trainer)
            return
        value = _to_number(loss)
        if not math.isfinite(value):
            _raise(trainer, value, step, stage)

    def _read_losses(self, trainer: Trainer) -> None:
        unread, self._unread = self._unread, []
        if not unread:
            return
        values = torch.stack([loss.value.reshape(()) for loss in unread]).tolist()
        for loss, value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                _raise(trainer, value, loss.step, loss.stage)


class _Loss(NamedTuple):
    stage: str
    step: int
    value: torch.Tensor


def _to_number(loss: Any) -> float:
    return loss.item() if isinstance(loss, torch.Tensor) else float(loss)


def _raise(trainer: Trainer, loss: float, step: int, stage: str) -> None:
    place = f" in {stage}, epoch {trainer.run_history.current_epoch}, step {step}, rank {trainer.process_index}"
    raise NonFiniteLossError(_describe(loss, place))


def _describe(loss: float, place: str) -> str:
    return (
        f"The loss is {loss}{place}. Try a lower learning rate, gradient clipping or a warm-up, and look for invalid "
        "values in the data; `torch.autograd.set_detect_anomaly(True)` finds the operation. To go on regardless, leave "
        "out `TerminateOnNaNCallback`."
    )


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
