"""Callbacks that evaluate during an epoch, or limit the number of batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated._arguments.lengths import interval_within_epochs
from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._recording.cadence import Cadence
from pytorch_accelerated._views import library_of, run_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated._arguments.lengths import Length
    from pytorch_accelerated._types import Batch, BatchOutput, MaybeNone
    from pytorch_accelerated.progress import TrainingProgress
    from pytorch_accelerated.trainer import Trainer


class StepBasedEvaluationCallback(TrainerCallback):
    """Evaluates during the epochs too, after every so many steps or updates of the run.

    A step is one batch on each process; with gradient accumulation, an update takes several. Each metric of such an
    evaluation is recorded with the prefix ``intermediate_``. ``intermediate_update`` records the number of updates of
    the run at each of these evaluations.

    Args:
        eval_every_n_steps: Steps between two evaluations, counted across epochs; at least 1.
        eval_every_n_updates: Updates between two evaluations, instead of ``eval_every_n_steps``; at least 1.
        eval_every: How often to evaluate, instead of these, as a text: ``"500 updates"``, ``"0.25 epochs"``,
            ``"1e6 samples"`` or ``"10 min"``; see :class:`~pytorch_accelerated.utils.Length`. At the end of an epoch,
            the run evaluates anyway.

    Raises:
        ValueError: A number is below 1, a length is not understood, or not exactly one argument is given.
        TypeError: A number is not an integer.

    Example:
        >>> callback = StepBasedEvaluationCallback(eval_every_n_updates=500)
    """

    @explains_arguments
    def __init__(
        self,
        eval_every_n_steps: int | None = None,
        *,
        eval_every_n_updates: int | None = None,
        eval_every: str | Length | None = None,
    ) -> None:
        if (eval_every_n_steps, eval_every_n_updates, eval_every).count(None) != 2:
            raise ValueError(
                f"`eval_every_n_steps` is {eval_every_n_steps!r}, `eval_every_n_updates` is {eval_every_n_updates!r} "
                f"and `eval_every` is {eval_every!r}. Expected one of them: the number of steps or of updates between "
                "two evaluations, or a length such as '0.25 epochs'."
            )
        if eval_every_n_steps is not None:
            check_positive_integer("eval_every_n_steps", eval_every_n_steps, "steps")
        if eval_every_n_updates is not None:
            check_positive_integer("eval_every_n_updates", eval_every_n_updates, "updates")
        self.eval_every_n_steps = eval_every_n_steps
        self.eval_every_n_updates = eval_every_n_updates
        self.eval_every = interval_within_epochs("eval_every", eval_every, "a run evaluates")
        self._cadence = Cadence(self.eval_every)
        self._num_steps = self._num_updates = 0

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start counting, or continue where a resumed run was.

        Raises:
            ValueError: The run has no evaluation dataset.
        """
        progress = run_of(trainer).progress
        self._num_steps, self._num_updates = progress.num_batches, progress.num_updates
        self._cadence.start(run_of(trainer))
        if not run_of(trainer).eval_dataloaders:
            raise ValueError(
                "`StepBasedEvaluationCallback` has nothing to evaluate on: `train` was called without `eval_dataset`. "
                "Pass one, or remove the callback."
            )

    def on_train_step_end(
        self, trainer: Trainer, batch: Batch = None, batch_output: BatchOutput | MaybeNone = None, **kwargs: Any
    ) -> None:
        """Evaluate if it is due after this step."""
        run = run_of(trainer)
        if self._cadence.is_due(run) if self.eval_every is not None else self._is_due(run.progress):
            library_of(trainer).evaluate_now()
            self._cadence.restart(run)

    def _is_due(self, progress: TrainingProgress) -> bool:
        has_updated, self._num_updates = progress.num_updates != self._num_updates, progress.num_updates
        num_before, self._num_steps = (
            self._num_steps,
            max(self._num_steps + 1, progress.num_batches),
        )  # some are skipped
        if self.eval_every_n_updates is not None:
            return has_updated and progress.num_updates % self.eval_every_n_updates == 0
        num_steps = self.eval_every_n_steps
        return num_steps is not None and self._num_steps // num_steps > num_before // num_steps


class LimitEvalStepsCallback(TrainerCallback):
    """Uses only the first batches of each evaluation.

    Args:
        num_eval_steps: Batches in an evaluation, over all processes: each of them evaluates its share, rounded down,
            but at least one batch.
        limit_intermediate_only: Whether evaluations at the end of an epoch still use all batches.

    Raises:
        ValueError: ``num_eval_steps`` is below 1.
        TypeError: ``num_eval_steps`` is not an integer.
    """

    @explains_arguments
    def __init__(self, num_eval_steps: int, limit_intermediate_only: bool = True) -> None:
        check_positive_integer("num_eval_steps", num_eval_steps, "batches")
        self.num_eval_steps = num_eval_steps
        self.limit_intermediate_only = limit_intermediate_only

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Limit the evaluation that is about to start."""
        if is_intermediate or not self.limit_intermediate_only:
            num_eval_steps = max(1, self.num_eval_steps // trainer.run_config.num_processes)
            library_of(trainer).limit_eval_steps(num_eval_steps)


class LimitBatchesCallback(TrainerCallback):
    """Uses only the first batches of every epoch, to try out a script quickly.

    Learning-rate schedules keep the length they would have without the limit.

    Args:
        num_batches: Batches per process and epoch; at least 1.

    Raises:
        ValueError: ``num_batches`` is below 1.
        TypeError: ``num_batches`` is not an integer.
    """

    @explains_arguments
    def __init__(self, num_batches: int) -> None:
        check_positive_integer("num_batches", num_batches, "batches")
        self.num_batches = num_batches

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit the loaders for training and evaluation."""
        library_of(trainer).limit_batches(self.num_batches)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Limit the loaders of the evaluation."""
        library_of(trainer).limit_batches(self.num_batches)
