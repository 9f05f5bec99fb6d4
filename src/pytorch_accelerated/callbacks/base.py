"""The events of a run. `TrainerCallback` is their one declaration; everything else derives from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytorch_accelerated.trainer import Trainer


class TrainerCallback:
    """Base class of callbacks: override the events you need, ignore the others.

    Every event receives the trainer, and further facts by keyword. Accept ``**kwargs`` so that your callback keeps
    working when an event gains another argument. Events of one moment reach the callbacks in list order, after the
    trainer's own hook of that moment. A callback may

    * raise :class:`~pytorch_accelerated.exceptions.StopTrainingError` in any event to end the run cleanly;
    * carry ``state_dict()`` and ``load_state_dict(state)``: what they hold is then part of the training state;
    * keep whatever attributes it likes: this class has no state and needs no ``super().__init__()``.

    A callback whose ``is_called_last`` is true gets each event after the others, wherever it stands in the list: it
    saves what they have made of the event.

    An event that a callback does not override costs nothing. Unless noted otherwise an event fires on every process.

    Example:
        >>> class PrintLoss(TrainerCallback):
        ...     def on_train_epoch_end(self, trainer, **kwargs):
        ...         trainer.print(trainer.run_history.get_latest_metric("train_loss_epoch"))
    """

    is_called_last = False

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run once, at the end of ``Trainer.__init__``, before any dataset or device is known."""

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run once per training run, when model, optimizer, loaders and scheduler are ready."""

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run at the start of each training epoch; the model is in training mode."""

    def on_train_step_start(self, trainer: Trainer, *, batch: Any = None, step: int = 0, **kwargs: Any) -> None:
        """Run before each batch is processed.

        Args:
            trainer: The trainer.
            batch: What the loader gave, on the training device.
            step: Index of the batch in its epoch on this process, from 0.
            **kwargs: Room for later arguments.
        """

    def on_backward_start(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any], *, step: int = 0, **kwargs: Any
    ) -> None:
        """Run between forward and backward pass: the last chance to read or replace ``batch_output["loss"]``."""

    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run once per update, before clipping: gradients are complete, synchronised and unscaled."""

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run once per update: parameters and learning rate are new, the gradients are still there."""

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any], *, step: int = 0, **kwargs: Any
    ) -> None:
        """Run after each batch, when everything that belongs to its step, the update included, is done.

        Args:
            trainer: The trainer.
            batch: The batch that was processed.
            batch_output: What ``calculate_train_batch_loss`` returned: ``loss`` (not scaled for accumulation),
                ``batch_size`` and whatever else it holds; one object, shared by all callbacks.
            step: Index of the batch in its epoch on this process, from 0.
            **kwargs: Room for later arguments.
        """

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run about ten times a second, behind a step of training or evaluation: the time to show how the run goes.

        To read a loss or a metric makes the host wait for the device; do it here, not at each step, or use
        ``trainer.recent_loss``, for which nothing waits. Each process goes by its own clock.
        """

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run at the end of each training epoch; ``train_loss_epoch`` is in the run history."""

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Run before each pass over the evaluation data; the model is in evaluation mode.

        Args:
            trainer: The trainer.
            is_intermediate: Whether the evaluation interrupts a training epoch.
            **kwargs: Room for later arguments.
        """

    def on_eval_step_start(self, trainer: Trainer, *, batch: Any = None, step: int = 0, **kwargs: Any) -> None:
        """Run before each evaluation batch."""

    def on_eval_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any], *, step: int = 0, **kwargs: Any
    ) -> None:
        """Run after each evaluation batch with what ``calculate_eval_batch_loss`` returned."""

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Run after each pass over the evaluation data; its loss is in the run history.

        Args:
            trainer: The trainer.
            is_intermediate: Whether the evaluation interrupts a training epoch.
            **kwargs: Room for later arguments.
        """

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run at the end of each epoch, after training and evaluation."""

    def on_training_state_save(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run before a training state is collected, on every process; an exception keeps it from being saved."""

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run once at the end of a training run that finished or was stopped, not after an exception."""

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run once per ``Trainer.evaluate``, before its evaluation epoch."""

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run once per ``Trainer.evaluate``, after its evaluation epoch."""

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Run when a callback asked to stop, or a signal ends the run, before the end-of-run events.

        ``trainer.is_interrupted`` tells which of them.
        """

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Run when a run ends by any other exception, before clean-up; the exception then goes on to the caller."""


EVENTS: tuple[str, ...] = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
"""The names of all events, in the order of their declaration."""
