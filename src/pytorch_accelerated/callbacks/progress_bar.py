"""The progress bar."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from pytorch_accelerated._data.loaders import num_batches_of
from pytorch_accelerated._run import run_of
from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated._run import DataPass
    from pytorch_accelerated.trainer import Trainer

_SHORT_EPOCH = 0.5  # seconds; after such an epoch, the next bar is drawn once there is something to show
_NO_EMPTY_BAR = 1e-9  # seconds of delay, with which `tqdm` does not draw a new bar before its first update


class ProgressBarCallback(TrainerCallback):
    """Shows a progress bar over the batches of each epoch, with the mean loss so far, on the main process of each node.

    The bar is updated at log points, and has no total if the loader has no length.
    """

    pbar: tqdm | None = None
    """The bar of the training epoch under way, or of the last one; ``None`` before the first."""

    eval_pbar: tqdm | None = None
    """The same for evaluation. One that interrupts another pass has no bar of its own: this is that of that pass."""

    _bar: tqdm | None = None
    """The open one of the two."""

    _pass: DataPass | None = None
    _num_shown = 0
    _postfix: str | None = None
    _opened_at = 0.0
    _is_epoch_short = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bars: a copy opens its own."""
        return {name: value for name, value in vars(self).items() if name not in ("pbar", "eval_pbar", "_bar", "_pass")}

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of the training epoch."""
        self.pbar = self._open(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show the mean loss of the epoch, and close the bar."""
        self._close(run_of(trainer).mean_loss)

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Open the bar of the evaluation. One that interrupts another pass has none: the bar of that pass stays."""
        run = run_of(trainer)
        is_nested_run = not run.is_training_run and any(self._pass is other for other in run.training.suspended_passes)
        self.eval_pbar = self._bar if is_intermediate or is_nested_run else self._open(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Show the mean loss of the evaluation, and close the bar."""
        if not is_intermediate and self._is_of_current_pass(trainer):
            self._close(run_of(trainer).mean_loss)

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show the number of finished batches and their mean loss."""
        if self._is_of_current_pass(trainer):
            self._show(run_of(trainer).recent_loss)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar, if one is open."""
        self._close(None)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Close the bar, if one is open."""
        self._close(None)

    def _is_of_current_pass(self, trainer: Trainer) -> bool:
        return self._pass is run_of(trainer).training.current_pass

    def _open(self, trainer: Trainer) -> tqdm:
        self._close(None)
        self._pass = run_of(trainer).training.current_pass
        self._num_shown = self._pass.num_batches_done  # above 0 if a resumed run starts within the epoch
        self._postfix = None
        self._opened_at = time.perf_counter()
        self._bar = tqdm(
            total=num_batches_of(run_of(trainer).current_dataloader),
            initial=self._num_shown,
            disable=not trainer.run_config.is_local_process_zero,
            dynamic_ncols=True,
            delay=_NO_EMPTY_BAR if self._is_epoch_short else 0,
        )
        return self._bar

    def _show(self, loss: float | None) -> None:
        if self._bar is None or self._bar.disable or self._pass is None:
            return
        is_postfix_ours = getattr(self._bar, "postfix", None) == self._postfix  # a subclass may show something else
        if loss is not None and is_postfix_ours:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._postfix = getattr(self._bar, "postfix", None)
        num_done = self._pass.num_batches_done  # not that of the trainer, which has left the pass after an error
        num_new, self._num_shown = num_done - self._num_shown, num_done
        self._bar.update(num_new)

    def _close(self, loss: float | None) -> None:
        if self._bar is not None:
            self._show(loss)
            self._is_epoch_short = time.perf_counter() - self._opened_at < _SHORT_EPOCH
            self._bar.close()
            self._bar = self._pass = None
