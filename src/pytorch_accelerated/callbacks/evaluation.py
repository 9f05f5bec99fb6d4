"""Callbacks that evaluate during an epoch, or limit the number of batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._run import library_of, run_of
from pytorch_accelerated._validation import check_positive_integer
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated._types import Batch, BatchOutput
    from pytorch_accelerated.trainer import Trainer


class StepBasedEvaluationCallback(TrainerCallback):
    """Evaluates during the epochs too, every ``eval_every_n_steps`` updates.

    Each of its metrics is recorded with the prefix ``intermediate_``. ``intermediate_update`` records the number of
    updates of the run at each of these evaluations.

    Args:
        eval_every_n_steps: Updates between two evaluations; at least 1.

    Raises:
        ValueError: ``eval_every_n_steps`` is below 1.
        TypeError: ``eval_every_n_steps`` is not an integer.
    """

    def __init__(self, eval_every_n_steps: int) -> None:
        check_positive_integer("eval_every_n_steps", eval_every_n_steps, "updates")
        self.eval_every_n_steps = eval_every_n_steps
        self._num_updates_seen = 0

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start counting at the first update of this run.

        Raises:
            ValueError: The run has no evaluation dataset.
        """
        self._num_updates_seen = run_of(trainer).progress.num_updates
        if not run_of(trainer).eval_dataloaders:
            raise ValueError(
                "`StepBasedEvaluationCallback` has nothing to evaluate on: `train` was called without `eval_dataset`. "
                "Pass one, or remove the callback."
            )

    def on_train_step_end(self, trainer: Trainer, batch: Batch, batch_output: BatchOutput, **kwargs: Any) -> None:
        """Evaluate if this step made an update after which an evaluation is due."""
        num_updates = run_of(trainer).progress.num_updates
        if num_updates == self._num_updates_seen:
            return
        self._num_updates_seen = num_updates
        if num_updates % self.eval_every_n_steps == 0:
            library_of(trainer).evaluate_now()


class LimitEvalStepsCallback(TrainerCallback):
    """Uses only the first batches of each evaluation.

    Args:
        num_eval_steps: Batches per process in an evaluation; at least 1.
        limit_intermediate_only: Whether evaluations at the end of an epoch still use all batches.

    Raises:
        ValueError: ``num_eval_steps`` is below 1.
        TypeError: ``num_eval_steps`` is not an integer.
    """

    def __init__(self, num_eval_steps: int, limit_intermediate_only: bool = True) -> None:
        check_positive_integer("num_eval_steps", num_eval_steps, "batches")
        self.num_eval_steps = num_eval_steps
        self.limit_intermediate_only = limit_intermediate_only

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Limit the evaluation that is about to start."""
        if is_intermediate or not self.limit_intermediate_only:
            library_of(trainer).limit_eval_steps(self.num_eval_steps)


class LimitBatchesCallback(TrainerCallback):
    """Uses only the first batches of every epoch, to try out a script quickly.

    Learning-rate schedules keep the length they would have without the limit.

    Args:
        num_batches: Batches per process and epoch; at least 1.

    Raises:
        ValueError: ``num_batches`` is below 1.
        TypeError: ``num_batches`` is not an integer.
    """

    def __init__(self, num_batches: int) -> None:
        check_positive_integer("num_batches", num_batches, "batches")
        self.num_batches = num_batches

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit the loaders for training and evaluation."""
        library_of(trainer).limit_batches(self.num_batches)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit the loaders of the evaluation."""
        library_of(trainer).limit_batches(self.num_batches)
