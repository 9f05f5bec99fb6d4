"""Ends a run, or the training part of its epoch, on all ranks, because the program asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_accelerated._arguments.moments import check_run
from pytorch_accelerated._distributed.reasons import EpochEndedError
from pytorch_accelerated.exceptions import StopTrainingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pytorch_accelerated._run import Run
    from pytorch_accelerated.tracking import RunHistory


def request_stop(run: Run, reason: str, print_fn: Callable[[str], None]) -> None:
    """End a run on all ranks, after the step or the evaluation under way.

    Raises:
        RuntimeError: No run is under way, or one that only predicts.
    """
    check_run(run.is_active and not run.is_predicting, "stop", "on_train_step_end")
    stop = StopTrainingError(reason or "`stop` was called")
    if not is_ignored(run, stop, print_fn):
        run.consensus.request_stop(stop)


def is_ignored(run: Run, reason: Exception, print_fn: Callable[[str], None]) -> bool:
    """Return whether a request to stop comes before `min_epochs`, and is therefore ignored; print that it is."""
    progress = run.training.progress
    num_done = progress.num_epochs_completed + (progress.phase == "end")
    if type(reason) is not StopTrainingError or not run.is_training_run or num_done >= run.first_end:
        return False
    print_fn(f"Training continues until epoch {run.first_end} (`min_epochs`), although a stop was requested: {reason}")
    return True


def request_end_of_epoch(run: Run, reason: str) -> None:
    """End the training part of the epoch on all ranks, once what was trained has entered an update.

    Raises:
        RuntimeError: No training epoch is under way, or a subclass makes its updates.
    """
    is_training = run.is_taking_steps and not run.is_evaluating
    check_run(is_training, "end_epoch", "on_train_step_end", "with steps that the library takes ")
    window = run.training.window
    if window.end_of_epoch is None:
        window.end_of_epoch = [reason or "`end_epoch` was called", False]
        run.consensus.request_stop(EpochEndedError(window.end_of_epoch[0]))


class EndOfEpoch:
    """The context of the steps of an epoch: a request ends them early, which is printed and recorded.

    Args:
        run: The run.
        history: Where the number of batches is recorded if a request ended the epoch.
        print_fn: Prints on the main process.
    """

    def __init__(self, run: Run, history: RunHistory, print_fn: Callable[[str], None]) -> None:
        self._run, self._history, self._print = run, history, print_fn

    def __enter__(self) -> None:
        """Repeat a request from before the run was resumed."""
        run, window = self._run, self._run.training.window
        run.is_taking_steps = True
        if window.end_of_epoch is None:
            return
        num_done = run.training.progress.num_batches_in_epoch
        if not run.consensus.is_needed and num_done > 0 and num_done % run.config.gradient_accumulation_steps == 0:
            window.end_of_epoch[1] = True
        if not window.end_of_epoch[1]:
            run.consensus.request_stop(EpochEndedError(window.end_of_epoch[0]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        is_ended, run = isinstance(error, EpochEndedError), self._run
        run.is_taking_steps = False
        if error is not None and not is_ended:
            return False
        window, progress = run.training.window, run.training.progress
        if isinstance(error, EpochEndedError):
            reason = str(error)
            run.is_time_over = error.ends_run
        else:
            reason, is_ended = window.end_of_epoch or ("", False)
        if is_ended:
            epoch, num_batches = progress.num_epochs_completed + 1, progress.num_batches_in_epoch
            self._print(f"Epoch {epoch} ends after {num_batches} batches per process: {reason}")
            self._history.update_metric("train_num_batches", num_batches)
        if progress.num_skipped_in_epoch:
            self._history.update_metric("train_num_skipped_batches", progress.num_skipped_in_epoch)
        progress.phase, window.end_of_epoch = "evaluation", None
        run.consensus.forget_end_of_epoch()
        return True
