"""Callbacks that end a run early."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._checkpoint.companions import TRAINED
from pytorch_accelerated._checkpoint.schema import OF_EARLY_STOPPING, check_entries
from pytorch_accelerated._console.text import counted
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._measuring.comparison import (
    ComparisonOfMetric,
    NewValues,
    PatienceCounter,
    is_greater_better,
    rounded,
)
from pytorch_accelerated._measuring.states import on_device
from pytorch_accelerated._messages import warn
from pytorch_accelerated._proxy import WritableForwarded
from pytorch_accelerated._recording.non_finite import describe_non_finite_loss
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks._watching import check_is_recorded, num_values_of, watched_value
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.reporting import has_table
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError

if TYPE_CHECKING:
    from pytorch_accelerated._checkpoint.companions import Companions
    from pytorch_accelerated._types import BatchOutput, StateDict, StateMapping
    from pytorch_accelerated.trainer import Trainer


class TerminateOnNaNCallback(TrainerCallback):
    """Ends the run with `NonFiniteLossError` when the loss or a gradient becomes NaN or infinite.

    On a CPU, gradients are checked before each update, so a bad one never changes a parameter. On other devices, such a
    check would make the host wait for the device in every step. There, losses are checked in bulk: at log points (ten
    times a second), at the end of an epoch, and before a training state is saved, when parameters are checked as well.
    A training state therefore never contains parameters that a non-finite number has corrupted. The error names the
    first bad step.
    """

    triggered = False
    """Whether it has ended a run."""

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Remember that a bad number ended the run, if it was found before an update."""
        self.triggered = self.triggered or isinstance(exception, NonFiniteLossError)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Have the gradients checked before each update, where the device's values are free to read."""
        run = run_of(trainer)
        run.guards_updates = run.can_guard_updates

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the losses so far if their mean is not finite."""
        recent_loss = run_of(trainer).recent_loss
        if recent_loss is not None and not math.isfinite(recent_loss):
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the losses of the epoch, and the parameters."""
        self._check(trainer)
        self._check_values(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the losses of the evaluation."""
        self._check(trainer)

    def on_training_state_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the losses so far, the parameters, and the gradients that wait for an update."""
        self._check(trainer)
        self._check_values(trainer)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the losses so far."""
        self._check(trainer)

    def check_for_nan_after_batch(self, batch_output: BatchOutput, step: object = None) -> None:
        """Check the loss of a single batch immediately.

        Args:
            batch_output: What a step returned.
            step: What to call the step in the message.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite.
        """
        loss = float(batch_output["loss"])
        if not math.isfinite(loss):
            self.triggered = True
            raise NonFiniteLossError(describe_non_finite_loss(loss, "" if step is None else f" at step {step}"))

    def _check(self, trainer: Trainer) -> None:
        error = run_of(trainer).find_non_finite_loss()
        if error is not None:
            self.triggered = True
            raise error

    def _check_values(self, trainer: Trainer) -> None:
        model: object = trainer.model
        if not isinstance(model, nn.Module):  # a test double, which has no parameters
            return
        error = run_of(trainer).find_non_finite_value(model)
        if error is not None:
            raise error


class EarlyStoppingCallback(TrainerCallback):
    """Stops the run when a metric has not improved for a number of epochs, or is beyond hope.

    A metric of intermediate evaluations, such as ``intermediate_eval_loss_epoch``, is compared after each of these, and
    the patience counts them.

    Args:
        early_stopping_patience: Epochs, or evaluations, in a row without improvement after which the run stops; at
            least 1.
        early_stopping_threshold: Smallest change that counts as an improvement, in the unit of the metric or relative.
        watch_metric: Name of the metric in the run history.
        greater_is_better: Whether larger values are better.
        reset_on_train: Whether each run forgets the best value and the count of earlier runs.
        threshold_mode: ``"absolute"`` if the threshold is in the unit of the metric, ``"relative"`` if it is a fraction
            of the absolute value of the best so far: 0.01 for one percent.
        start_epoch: The epoch, counted from 1, from which on values count. Those before are not looked at.
        divergence_threshold: Value at which the run stops at once: when the metric is worse. ``None`` for none.
        check_finite: Whether the run stops at once when the metric is NaN or infinite.
        restore_best_weights: Whether the model, and what the optimizer trains besides, gets back the weights of its
            best value when the run ends, unless a signal ends it. They are kept in host memory, and are part of
            training states. The optimizer keeps its state; to save the best model to a file, use
            `SaveBestModelCallback`.

    Raises:
        ValueError: A number is out of range, or ``threshold_mode`` is not known.
        TypeError: ``early_stopping_patience`` or ``start_epoch`` is not an integer.
    """

    early_stopping_patience = WritableForwarded[int]("_counter.patience")
    early_stopping_threshold = WritableForwarded[float]("_counter.threshold")
    greater_is_better = WritableForwarded[bool]("_counter.greater_is_better")

    best_metric = WritableForwarded["float | None"]("_counter.best.value")
    """The best value so far; ``None`` before the first."""

    early_stopping_patience_counter = WritableForwarded[int]("_counter.num_without_improvement")
    """The number of epochs in a row without improvement."""

    operator = ComparisonOfMetric()
    """``operator.gt`` if larger values are better, ``operator.lt`` if smaller ones are."""

    @explains_arguments
    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float = 0.01,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        *,
        threshold_mode: Literal["absolute", "relative"] = "absolute",
        start_epoch: int = 1,
        divergence_threshold: float | None = None,
        check_finite: bool = False,
        restore_best_weights: bool = False,
    ) -> None:
        check_positive_integer("early_stopping_patience", early_stopping_patience, "epochs")
        check_positive_integer("start_epoch", start_epoch, "epochs")
        if threshold_mode not in ("absolute", "relative"):
            raise ValueError(f"`threshold_mode` is {threshold_mode!r}. Expected 'absolute' or 'relative'.")
        if divergence_threshold is not None and not math.isfinite(divergence_threshold):
            raise ValueError(
                f"`divergence_threshold` is {divergence_threshold!r}. Expected a finite number, or None. To stop at "
                "values that are not finite, pass `check_finite=True`."
            )
        self.watch_metric = watch_metric
        self.reset_on_train = reset_on_train
        self.start_epoch = start_epoch
        self.divergence_threshold = divergence_threshold
        self.check_finite = check_finite
        self.restore_best_weights = restore_best_weights
        self._counter = PatienceCounter(early_stopping_patience, greater_is_better, early_stopping_threshold)
        self._counter.is_relative = threshold_mode == "relative"
        self._best_weights: dict[str, torch.Tensor] | None = None
        self._best_outside: StateDict = {}
        """What the optimizer trains outside the model, such as parameters of the loss function."""

        self._new_values = NewValues()

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the name of the metric, and start counting.

        Raises:
            ValueError: The run will not record the metric.
            RuntimeError: The best weights cannot be kept, because the model is split over the processes.
        """
        check_watched_metric(trainer, self.watch_metric, type(self).__name__)
        if self.restore_best_weights and run_of(trainer).is_sharded:
            raise RuntimeError(
                "`EarlyStoppingCallback` cannot keep the best weights in memory, because the model is split over the "
                "processes. Pass `restore_best_weights=False`, and add a `SaveBestModelCallback`."
            )
        warn_about_direction(self.watch_metric, self.greater_is_better, type(self).__name__)
        self._new_values.start_run(num_values_of(trainer, self.watch_metric), run_of(trainer).is_resumed)
        if self.reset_on_train and not run_of(trainer).is_resumed:
            self._counter.reset()
            self._best_weights, self._best_outside = None, {}

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Compare the metric if it is one of this intermediate evaluation.

        Raises:
            StopTrainingError: The patience is used up.
        """
        prefix = trainer.run_history.metric_name_prefix
        if is_intermediate and prefix and self.watch_metric.startswith(prefix):
            self._compare(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Compare the metric with the best so far, unless it was not measured since the last comparison.

        Raises:
            StopTrainingError: The patience is used up.
        """
        self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        value = watched_value(trainer, self.watch_metric, type(self).__name__)
        if value is None or not self._new_values.look(num_values_of(trainer, self.watch_metric)):
            return
        if trainer.run_history.current_epoch < self.start_epoch:
            return
        self._check_value(value)
        previous, is_used_up = self.best_metric, self._counter.update(value)
        if self.restore_best_weights and self.early_stopping_patience_counter == 0:
            model = trainer.get_model(keep_torch_compile=False)
            self._best_weights = on_device(dict(model.state_dict()), torch.device("cpu"))
            self._best_outside = on_device(_companions_of(trainer).trained_state(), torch.device("cpu"))
        if is_used_up:
            raise StopTrainingError(
                f"{self.watch_metric} has not improved on {rounded(self.best_metric)} "
                f"for {counted(self.early_stopping_patience_counter, self._unit)}{self._note_on_threshold(value)}"
            )
        self._report(trainer, previous)

    @property
    def _unit(self) -> str:
        return "evaluation" if "intermediate_" in self.watch_metric else "epoch"

    def _check_value(self, value: float) -> None:
        """Stop the run if a value is beyond hope.

        Raises:
            StopTrainingError: It is.
        """
        if self.check_finite and not math.isfinite(value):
            raise StopTrainingError(f"{self.watch_metric} is {value}, which is not finite")
        threshold = self.divergence_threshold
        if threshold is not None and self.operator(threshold, value):
            raise StopTrainingError(f"{self.watch_metric} has diverged: {value} is worse than {threshold:g}")

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Give the model back the weights of its best value."""
        if self._best_weights is None or not self.restore_best_weights or run_of(trainer).is_interrupted:
            return
        trainer.print(f"Restoring the weights of the best value: {self.watch_metric} {self.best_metric}")
        trainer.get_model(keep_torch_compile=False).load_state_dict(self._best_weights)
        _companions_of(trainer).load_trained_state(self._best_outside)

    def _note_on_threshold(self, value: float) -> str:
        """Say so if the metric still improves, but by less than the threshold."""
        best, is_better = self.best_metric, self.operator
        if best is None or not is_better(value, best):
            return ""
        threshold = self._counter.absolute_threshold
        return f" by more than the threshold of {threshold:g}, although it still does, to {rounded(value)}"

    def _report(self, trainer: Trainer, previous: float | None) -> None:
        best, num_epochs = self.best_metric, self.early_stopping_patience_counter
        if num_epochs > 0:
            patience = counted(self.early_stopping_patience, self._unit)
            trainer.print(f"{self.watch_metric} has not improved for {num_epochs} of {patience}")
        elif best is not None and previous is not None and not self._is_marked(trainer):
            trainer.print(f"{self.watch_metric} has improved by {abs(best - previous):.4g} to {best:.4g}")

    def _is_marked(self, trainer: Trainer) -> bool:
        """Return whether a table marks the best value, and so tells of an improvement."""
        return is_greater_better(self.watch_metric) is not None and has_table(trainer.callback_handler)

    def state_dict(self) -> StateDict:
        """Return the best value, the number of epochs without improvement, and how many values were compared.

        With ``restore_best_weights``, the weights of the best value as well.
        """
        weights = {} if self._best_weights is None else {"best_weights": dict(self._best_weights), **self._best_outside}
        return {
            "best": self.best_metric,
            "num_without_improvement": self.early_stopping_patience_counter,
            **self._new_values.state_dict(),
            **weights,
        }

    def load_state_dict(self, state_dict: StateMapping) -> None:
        """Restore what `state_dict` returned."""
        check_entries(state_dict, OF_EARLY_STOPPING)
        self._counter.best.record(state_dict["best"])
        self._counter.num_without_improvement = state_dict["num_without_improvement"]
        self._new_values.load_state_dict(state_dict)
        weights = state_dict.get("best_weights")
        self._best_weights = None if weights is None else {name: weights[name].clone() for name in weights}
        self._best_outside = {name: copy.deepcopy(state_dict[name]) for name in (TRAINED,) if name in state_dict}


def _companions_of(trainer: Trainer) -> Companions:
    return trainer._loop_companions()  # noqa: SLF001 - only the library asks


def warn_about_direction(watch_metric: str, greater_is_better: bool, callback_name: str) -> None:
    """Warn if a callback looks for the smallest value of a metric whose name says that larger values are better."""
    if not greater_is_better and is_greater_better(watch_metric):
        warn(
            f"`{callback_name}` watches {watch_metric!r} with `greater_is_better=False`, so it takes the smallest "
            "value for the best. Pass `greater_is_better=True` if larger values are better.",
        )


def check_watched_metric(trainer: Trainer, watch_metric: str, callback_name: str) -> None:
    """Raise at the start of a run if a callback watches a metric that the run will not record, as far as is known.

    Raises:
        ValueError: It will not: for example, `train` was called without ``eval_dataset``, or with several datasets.
    """
    names = run_of(trainer).eval_dataloaders.keys()
    if watch_metric != "eval_loss_epoch" or "" in names:  # a single dataset has no name
        check_is_recorded(trainer, watch_metric, callback_name)
        return
    if names:
        known = sorted(f"{name}_eval_loss_epoch" for name in names)
        raise ValueError(
            f"`{callback_name}` watches 'eval_loss_epoch', but there are several evaluation datasets, and the loss of "
            f"each is recorded with its name in front. Watch one of {known}."
        )
    raise ValueError(
        f"`{callback_name}` watches 'eval_loss_epoch', but `train` was called without `eval_dataset`, so the run does "
        "not evaluate. Pass an `eval_dataset`, or watch another metric, such as 'train_loss_epoch'."
    )
