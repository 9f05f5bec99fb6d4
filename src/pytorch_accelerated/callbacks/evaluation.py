"""Callbacks that decide how often and how long to evaluate, and how many batches to use at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._data.limits import LimitBatches
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class StepBasedEvaluationCallback(TrainerCallback):
    """Evaluates within the epochs too, after every so many updates.

    Its metrics are recorded under their name with ``intermediate_`` in front, and ``intermediate_update`` tells after
    how many updates of the run they were taken.

    Args:
        eval_every_n_steps: Updates between two evaluations.

    Raises:
        ValueError: It is below 1.
    """

    def __init__(self, eval_every_n_steps: int) -> None:
        if eval_every_n_steps < 1:
            raise ValueError(f"`eval_every_n_steps` is {eval_every_n_steps!r}. Expected at least 1 update.")
        self.eval_every_n_steps = eval_every_n_steps
        self._num_updates_seen = 0

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to count where the run begins."""
        self._num_updates_seen = trainer.progress.num_updates
        if trainer._eval_dataloader is None:
            raise ValueError(
                "`StepBasedEvaluationCallback` has nothing to evaluate on: `train` was called without `eval_dataset`. "
                "Pass one, or leave out the callback."
            )

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Evaluate if the step ended with an update that is due for it."""
        num_updates = trainer.progress.num_updates
        if num_updates == self._num_updates_seen:
            return
        self._num_updates_seen = num_updates
        if num_updates % self.eval_every_n_steps == 0:
            trainer._run_eval_epochs(is_intermediate=True)


class LimitEvalStepsCallback(TrainerCallback):
    """Uses only the first batches in an evaluation.

    Args:
        num_eval_steps: Batches per process in an evaluation.
        limit_intermediate_only: Whether evaluations at the end of an epoch see all batches nevertheless.

    Raises:
        ValueError: ``num_eval_steps`` is below 1.
    """

    def __init__(self, num_eval_steps: int, limit_intermediate_only: bool = True) -> None:
        if num_eval_steps < 1:
            raise ValueError(f"`num_eval_steps` is {num_eval_steps!r}. Expected at least 1 batch.")
        self.num_eval_steps = num_eval_steps
        self.limit_intermediate_only = limit_intermediate_only

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Limit the evaluation that begins."""
        if is_intermediate or not self.limit_intermediate_only:
            trainer.limit_eval_steps(self.num_eval_steps)


class LimitBatchesCallback(TrainerCallback):
    """Uses only the first batches of every epoch, to try a script out quickly.

    Learning-rate schedules keep the length that they have without the limit.

    Args:
        num_batches: Batches per process and epoch.

    Raises:
        ValueError: It is below 1.
    """

    def __init__(self, num_batches: int) -> None:
        if num_batches < 1:
            raise ValueError(f"`num_batches` is {num_batches!r}. Expected at least 1 batch.")
        self.num_batches = num_batches

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit both loaders."""
        self._limit(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit the evaluation loader."""
        self._limit(trainer)

    def _limit(self, trainer: Trainer) -> None:
        limit = LimitBatches(self.num_batches)
        if trainer._train_dataloader is not None:
            trainer._train_dataloader = limit(trainer._train_dataloader)
        if isinstance(trainer._eval_dataloader, dict):
            trainer._eval_dataloader = {name: limit(dl) for name, dl in trainer._eval_dataloader.items()}
        elif trainer._eval_dataloader is not None:
            trainer._eval_dataloader = limit(trainer._eval_dataloader)
