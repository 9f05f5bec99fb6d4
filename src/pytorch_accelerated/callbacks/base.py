"""The events of a run. `TrainerCallback` declares each event once; everything else derives from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytorch_accelerated._types import Batch, BatchOutput, MaybeNone
    from pytorch_accelerated.trainer import Trainer


class TrainerCallback:
    """Base class of callbacks: override the events you need.

    Every event receives the trainer, and further arguments by keyword. Accept ``**kwargs``, so that your callback keeps
    working when an event gains an argument. The trainer's own hook runs before the event of the same moment. Callbacks
    are called in list order. A callback may

    * raise :class:`~pytorch_accelerated.exceptions.StopTrainingError` in any event to end the run gracefully;
    * define ``state_dict()`` and ``load_state_dict(state)``, which makes its state part of the training state;
    * have any attributes: this class has no state, so you need not call ``super().__init__()``;
    * call the event of its base class with the trainer only: all other arguments have defaults.

    A callback with ``is_called_last = True`` receives each event after all other callbacks, wherever it is in the list.
    Callbacks that save use this, so that the state includes what the other callbacks did in the same event.

    An event that no callback overrides costs nothing. Unless noted otherwise, events fire on every process.

    Example:
        >>> class PrintLoss(TrainerCallback):
        ...     def on_train_epoch_end(self, trainer, **kwargs):
        ...         trainer.print(trainer.run_history.get_latest_metric("train_loss_epoch"))
    """

    is_called_last = False

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once, at the end of ``Trainer.__init__``, before any dataset is known."""

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once per training run, when the model, optimizer, loaders and scheduler are ready."""

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the start of each training epoch. The model is in training mode."""

    def on_train_step_start(self, trainer: Trainer, *, batch: Batch = None, step: int = 0, **kwargs: Any) -> None:
        """Called before each training batch is processed.

        Args:
            trainer: The trainer.
            batch: The batch from the loader, on the training device.
            step: Index of the batch within the epoch on this process, from 0.
            **kwargs: Reserved for later arguments.
        """

    def on_backward_start(
        self,
        trainer: Trainer,
        batch: Batch = None,
        batch_output: BatchOutput | MaybeNone = None,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        """Called between the forward and the backward pass.

        This is the last chance to read or replace ``batch_output["loss"]``.
        """

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once per update, before clipping. Gradients are complete, synchronized and unscaled."""

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once per update. Parameters and learning rate are updated; the gradients still exist."""

    def on_train_step_end(
        self,
        trainer: Trainer,
        batch: Batch = None,
        batch_output: BatchOutput | MaybeNone = None,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        """Called at the end of each training step, after the update if the step made one.

        Args:
            trainer: The trainer.
            batch: The batch that was processed.
            batch_output: What ``calculate_train_batch_loss`` returned: ``loss`` (not scaled for accumulation),
                ``batch_size`` and any further entries. All callbacks receive the same object.
            step: Index of the batch within the epoch on this process, from 0.
            **kwargs: Reserved for later arguments.
        """

    def on_step_values(self, trainer: Trainer, *, row: Mapping[str, float] | MaybeNone = None, **kwargs: Any) -> None:
        """Called every few updates if values of steps are recorded: by the run history, or for a tracker.

        With a GPU, they are known only some updates after they were taken.

        Args:
            trainer: The trainer.
            row: When they were taken, as ``epoch``, ``update``, ``samples`` and ``time``, and the values: the means of
                loss and metrics since the last time, such as ``train_loss_step``, the learning rate, and the gradient
                norm if the run clips by it.
            **kwargs: Reserved for later arguments.
        """

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called about ten times a second, at the end of a training or evaluation step: the place to report progress.

        Reading a loss or metric forces a device synchronization. Do it here rather than in every step, or use
        ``trainer.recent_loss`` and ``trainer.recent_metrics``, which never wait for the device. Log points are timed
        independently on each process.
        """

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the end of each training epoch. The run history contains ``train_loss_epoch``."""

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Called before each pass over an evaluation dataset. The model is in evaluation mode.

        Args:
            trainer: The trainer.
            is_intermediate: Whether the evaluation interrupts a training epoch.
            **kwargs: Reserved for later arguments.
        """

    def on_eval_step_start(self, trainer: Trainer, *, batch: Batch = None, step: int = 0, **kwargs: Any) -> None:
        """Called before each evaluation batch is processed."""

    def on_eval_step_end(
        self,
        trainer: Trainer,
        batch: Batch = None,
        batch_output: BatchOutput | MaybeNone = None,
        *,
        step: int = 0,
        **kwargs: Any,
    ) -> None:
        """Called after each evaluation batch, with what ``calculate_eval_batch_loss`` returned."""

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Called after each pass over an evaluation dataset. The run history contains its loss.

        Args:
            trainer: The trainer.
            is_intermediate: Whether the evaluation interrupts a training epoch.
            **kwargs: Reserved for later arguments.
        """

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called at the end of each epoch, after training and evaluation."""

    def on_training_state_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called on every process before a training state is collected. An exception prevents the save."""

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once at the end of a training run that finished or was stopped, but not after an exception."""

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once per ``Trainer.evaluate``, before the evaluation starts."""

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called once per ``Trainer.evaluate``, after the evaluation."""

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Called when a callback or a signal stops the run, before the end-of-run events.

        ``trainer.is_interrupted`` is true if it was a signal.
        """

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Called when any other exception ends a run, before clean-up. The exception is then re-raised."""


EVENTS: tuple[str, ...] = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
"""The names of all events, in the order of their declaration."""
