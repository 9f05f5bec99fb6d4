"""The progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from pytorch_accelerated._data.loaders import num_batches_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class ProgressBarCallback(TrainerCallback):
    """Shows a bar over the batches of each epoch with the mean loss so far, on the main process of each node."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._num_shown = 0

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of the training epoch."""
        self._open(trainer, trainer._train_dataloader, trainer.progress.num_batches_in_epoch)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show the loss of the epoch and close it."""
        self._close(trainer, trainer._loss_tracker.average)

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Open the bar of the evaluation, unless it interrupts a training epoch, whose bar stays."""
        if not is_intermediate:
            self._open(trainer, trainer._current_eval_dataloader, 0)

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Show the loss of the evaluation and close it."""
        if not is_intermediate:
            self._close(trainer, trainer._loss_tracker.average)

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show how many batches are done, and their loss."""
        if not trainer.is_intermediate_evaluation:
            self._show(trainer, trainer.recent_loss)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close whatever is open."""
        self._close(trainer, None)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Close whatever is open."""
        self._close(trainer, None)

    def _open(self, trainer: Trainer, loader: Any, num_done: int) -> None:
        self._close(trainer, None)
        self._num_shown = num_done
        self._bar = tqdm(
            total=num_batches_of(loader),
            initial=num_done,
            disable=not trainer.run_config.is_local_process_zero,
            dynamic_ncols=True,
        )

    def _show(self, trainer: Trainer, loss: float | None) -> None:
        if self._bar is None or self._bar.disable:
            return
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        num_new, self._num_shown = trainer._num_batches_done - self._num_shown, trainer._num_batches_done
        self._bar.update(num_new)

    def _close(self, trainer: Trainer, loss: float | None) -> None:
        if self._bar is not None:
            self._show(trainer, loss)
            self._bar.close()
            self._bar = None
