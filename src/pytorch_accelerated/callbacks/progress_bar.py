"""The progress bar."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._arguments.lengths import Length
from pytorch_accelerated._console.bar import BarState
from pytorch_accelerated._console.pace import Pace
from pytorch_accelerated._console.screen import LiveHtml, is_notebook
from pytorch_accelerated._console.shown_bar import SECONDS_BETWEEN_LINES, ShownBar
from pytorch_accelerated._console.values import learning_rate_text, number_text
from pytorch_accelerated._data.loaders import num_batches_of
from pytorch_accelerated._hints.arguments import explains_arguments
from pytorch_accelerated._means import weighted_mean
from pytorch_accelerated._views import run_of
from pytorch_accelerated.callbacks._epoch_table import learning_rate_of
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.reporting import has_table

if TYPE_CHECKING:
    from tqdm import tqdm

    from pytorch_accelerated._position import DataPass
    from pytorch_accelerated.trainer import Trainer

_SHORT_EPOCH = 0.5  # seconds; after such an epoch, the next bar is drawn once there is something to show
_NO_EMPTY_BAR = 1e-9  # seconds of delay, with which `tqdm` does not draw a new bar before its first update


class ProgressBarCallback(TrainerCallback):
    """Shows how far each epoch and evaluation is, on the main process: a bar, or lines where there is no terminal.

    It shows the epoch, loss and metrics so far, the learning rate, samples per second, and the time that is left of the
    epoch and of the run; fewer of these if the terminal is narrow. At the end of the epoch, the bar gives way to the
    line of `LogMetricsCallback`; without one, it stays. It is updated at log points, and has no total if the loader has
    no length. In a notebook, it is part of the cell's output.

    Args:
        seconds_between_lines: Where there is no terminal, such as in a log file, a line is printed each time an epoch
            or an evaluation has taken this long: a number, or a text such as ``"5 min"``; ``float("inf")`` for no
            lines.

    Raises:
        ValueError: The text is not understood.
    """

    pbar: tqdm | None = None
    """The bar of the training epoch under way, or of the last one; ``None`` before the first."""

    eval_pbar: tqdm | None = None
    """The same for evaluation. One that interrupts another pass has no bar of its own: this is that of that pass."""

    # Here and not in `__init__`, because a subclass may not call `super().__init__()`.
    seconds_between_lines: float = SECONDS_BETWEEN_LINES
    _open_bar: _OpenBar | None = None
    _run_pace: Pace | None = None
    _live: LiveHtml | None = None
    _is_epoch_short = False

    @explains_arguments
    def __init__(self, seconds_between_lines: float | str | Length = SECONDS_BETWEEN_LINES) -> None:
        if not isinstance(seconds_between_lines, (int, float)):
            length = Length.parse("seconds_between_lines", seconds_between_lines, ("seconds",))
            seconds_between_lines = float(length.amount)
        self.seconds_between_lines = seconds_between_lines

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the bars: a copy opens its own."""
        left_out = ("pbar", "eval_pbar", "_open_bar", "_live")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look at the clock."""
        self._run_pace, self._live = Pace(run_of(trainer).fraction_done(), window=None), None

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start another bar in a notebook."""
        if self._open_bar is None:
            self._live = None

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open the bar of the training epoch."""
        self.pbar = self._open(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar."""
        self._close(trainer)

    def on_eval_epoch_start(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Open the bar of the evaluation. One that interrupts another pass has none: the bar of that pass stays."""
        run, open_bar = run_of(trainer), self._open_bar
        is_nested_run = not run.is_training_run and open_bar is not None and open_bar.is_suspended(trainer)
        keeps_bar = is_intermediate or is_nested_run
        self.eval_pbar = open_bar.bar if keeps_bar and open_bar is not None else self._open(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, *, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Close the bar, unless it is that of a pass that goes on now."""
        if self._open_bar is not None and self._open_bar.is_current(trainer):
            self._close(trainer)

    def on_log_point(self, trainer: Trainer, **kwargs: Any) -> None:
        """Show the number of finished batches, and what is known of them."""
        if self._open_bar is not None and self._open_bar.is_current(trainer):
            self._open_bar.show_pass(trainer, self._seconds_left_of_run(trainer))

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar, if a subclass has left one open."""
        self._close(trainer)

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar, if a subclass has left one open."""
        open_bar = self._open_bar
        if open_bar is not None and not (open_bar.is_current(trainer) or open_bar.is_suspended(trainer)):
            self._close(trainer)

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Close the bar, if one is open; it stays on the screen."""
        self._close(trainer, is_complete=False)

    def on_exception(self, trainer: Trainer, *, exception: BaseException, **kwargs: Any) -> None:
        """Close the bar, if one is open; it stays on the screen."""
        self._close(trainer, is_complete=False)

    def _open(self, trainer: Trainer) -> tqdm:
        self._close(trainer)
        if self._live is None and is_shown(trainer) and is_notebook():
            self._live = LiveHtml()
        delay = _NO_EMPTY_BAR if self._is_epoch_short else 0.0
        self._open_bar = _OpenBar(trainer, delay, self._live, self.seconds_between_lines)
        return self._open_bar.bar

    def _close(self, trainer: Trainer, *, is_complete: bool = True) -> None:
        open_bar, self._open_bar = self._open_bar, None
        if open_bar is not None:
            self._is_epoch_short = open_bar.seconds() < _SHORT_EPOCH
            open_bar.close_pass(trainer, is_complete=is_complete)

    def _seconds_left_of_run(self, trainer: Trainer) -> float | None:
        run = run_of(trainer)
        if self._run_pace is None or not run.is_training_run:
            return None
        return run.seconds_left(self._run_pace)


def is_shown(trainer: Trainer) -> bool:
    """Return whether this process shows what a run does."""
    return bool(run_of(trainer).is_verbose and trainer.run_config.is_world_process_zero)


class _OpenBar(ShownBar):
    """The bar of the pass under way."""

    def __init__(self, trainer: Trainer, delay: float, live: LiveHtml | None, seconds_between_lines: float) -> None:
        self._pass: DataPass = run_of(trainer).training.current_pass
        self._title = _title_of(trainer)
        self._total = num_batches_of(self._pass.loader)
        self._values: dict[str, float] | None = None
        """The means of the whole pass; ``None`` for those as of the last log point."""

        self._pace = Pace(self._pass.num_batches_done)  # above 0 if a resumed run starts within the epoch
        super().__init__(
            BarState(self._title, self._pass.num_batches_done, self._total),
            trainer.print,
            is_shown=is_shown(trainer),
            is_elsewhere=bool(run_of(trainer).is_verbose and not trainer.run_config.is_world_process_zero),
            delay=delay,
            live=live,
            seconds_between_lines=seconds_between_lines,
        )

    def is_current(self, trainer: Trainer) -> bool:
        """Return whether the pass is under way, and not suspended by another one."""
        return self._pass is run_of(trainer).training.current_pass

    def is_suspended(self, trainer: Trainer) -> bool:
        """Return whether another pass suspends this one."""
        return any(self._pass is other for other in run_of(trainer).training.suspended_passes)

    def show_pass(self, trainer: Trainer, seconds_left_of_run: float | None) -> None:
        """Show what is known as of the last log point."""
        self._pace.mark(self._pass.num_batches_done)
        self.show(self._pass.num_batches_done, lambda: self._state(trainer, seconds_left_of_run))

    def close_pass(self, trainer: Trainer, *, is_complete: bool) -> None:
        """Close the bar. The trainer may have left the pass already, after an error."""

        def last_state() -> BarState:
            if is_complete:
                self._values = {name: weighted_mean(*sums) for name, sums in self._pass.sums().items()}
            return replace(self._state(trainer, None), seconds_left=None)

        has_line = has_table(trainer.callback_handler)
        self.close(self._pass.num_batches_done, last_state, is_complete=is_complete, has_line=has_line)

    def _state(self, trainer: Trainer, seconds_left_of_run: float | None) -> BarState:
        config, is_training = trainer.run_config, self._pass.stage == "training"
        size = config.train_per_device_batch_size if is_training else config.eval_per_device_batch_size
        means = self._pass.monitor.values if self._values is None else self._values
        values = {name: number_text(value) for name, value in means.items()}
        rate = learning_rate_of(trainer) if is_training else None
        return BarState(
            self._title,
            self._pass.num_batches_done,
            self._total,
            {**values, **({} if rate is None else {"lr": learning_rate_text(rate)})},
            self._pace.per_second() * (size * config.num_processes if size else 1),
            "samples" if size else "batches",
            self._pace.seconds_left(self._total),
            seconds_left_of_run,
        )


def _title_of(trainer: Trainer) -> str:
    """Return what is under way: the epoch, the evaluation, and on which of several datasets."""
    run = run_of(trainer)
    epoch = f"epoch {trainer.run_history.current_epoch}/{run.total_num_epochs}"
    if not run.is_evaluating:
        return epoch
    name = run.name_of_current_dataset
    if not run.is_training_run:
        return f"evaluation {name}".strip()
    return f"{epoch} {name or 'evaluation'}"
