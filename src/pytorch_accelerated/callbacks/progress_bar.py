"""The progress bar."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from pytorch_accelerated._data import num_batches_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_SECONDS_BETWEEN_LOSSES = 0.5


class ProgressBarCallback(TrainerCallback):
    """Shows a bar over the batches of each epoch with the mean loss so far, on the main process of each node.

    Reading the loss makes the host wait for the device, so it is shown twice a second, not at each batch.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._time_of_loss = 0.0

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of the training epoch."""
        self._open(trainer, trainer._train_dataloader, trainer.progress.num_batches_in_epoch)

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Move it by one batch."""
        self._advance(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show the loss of the epoch and close it."""
        self._show_loss(trainer)
        self._close()

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Open the bar of the evaluation, unless it interrupts a training epoch, whose bar stays."""
        if not is_intermediate:
            self._open(trainer, trainer._current_eval_dataloader, 0)

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Move it by one batch."""
        if not trainer.is_intermediate_evaluation:
            self._advance(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Show the loss of the evaluation and close it."""
        if not is_intermediate:
            self._show_loss(trainer)
            self._close()

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close whatever is open."""
        self._close()

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Close whatever is open."""
        self._close()

    def _open(self, trainer: Trainer, loader: Any, num_done: int) -> None:
        self._close()
        self._time_of_loss = time.monotonic()
        self._bar = tqdm(
            total=num_batches_of(loader),
            initial=num_done,
            disable=not trainer.run_config.is_local_process_zero,
            dynamic_ncols=True,
        )

    def _advance(self, trainer: Trainer) -> None:
        now = time.monotonic()
        if now - self._time_of_loss >= _SECONDS_BETWEEN_LOSSES:
            self._show_loss(trainer)
            self._time_of_loss = now
        if self._bar is not None:
            self._bar.update(1)

    def _show_loss(self, trainer: Trainer) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix(loss=f"{trainer._loss_tracker.average:.4f}", refresh=False)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
