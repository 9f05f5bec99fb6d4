"""What a program asks of a run under way: stop, end the epoch, leave out a batch; and when its time is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._distributed.collectives import run_on_main
from pytorch_accelerated._distributed.reasons import EpochEndedError
from pytorch_accelerated._lengths import Length
from pytorch_accelerated._validation import check_min_epochs, check_run
from pytorch_accelerated.exceptions import StopTrainingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta
    from types import TracebackType

    from torch import nn

    from pytorch_accelerated._run import Run
    from pytorch_accelerated._types import BatchOutput
    from pytorch_accelerated.tracking import RunHistory


# --- stop --------------------------------------------------------------------------------------------------------


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
    """Return, and tell, whether a request to stop comes before the smallest number of epochs."""
    progress = run.training.progress
    num_done = progress.num_epochs_completed + (progress.phase == "end")
    if type(reason) is not StopTrainingError or not run.is_training_run or num_done >= run.first_end:
        return False
    print_fn(f"Training continues until epoch {run.first_end} (`min_epochs`), although a stop was requested: {reason}")
    return True


# --- end the epoch -----------------------------------------------------------------------------------------------


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
    """Around the steps of an epoch: lets a request end them, tells of it, and records it; then evaluation follows.

    Args:
        run: The run.
        history: Where an epoch with fewer batches than there are is recorded.
        print_fn: Prints on the main process.
    """

    def __init__(self, run: Run, history: RunHistory, print_fn: Callable[[str], None]) -> None:
        self._run, self._history, self._print = run, history, print_fn

    def __enter__(self) -> None:
        """Ask again for what was asked for before the run was resumed."""
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


# --- leave out a batch -------------------------------------------------------------------------------------------


def skip_batch(run: Run) -> None:
    """Leave the batch of the step out of the update.

    Raises:
        RuntimeError: No batch is under way, or its gradients are computed already.
    """
    is_open = run.is_taking_steps and run.is_batch_open and not run.is_evaluating
    check_run(is_open, "skip_batch", "on_train_step_start", "with a batch whose gradients are still to come ")
    if run.closure is not None and run.consensus.is_needed:
        raise RuntimeError(
            "`skip_batch` was called in a run with several processes, whose optimizer evaluates its batches again. "
            "There, return a `batch_size` of 0 with the loss instead."
        )
    run.is_batch_skipped = True


def leaves_out(run: Run) -> bool:
    """Return whether a batch that was skipped before its step needs no forward pass.

    Other ranks wait for the gradients of this one if an update is due, which take a forward pass; shards in any case.
    """
    return not run.consensus.is_needed or not (run.is_update_due or run.is_sharded)


def complete_skipped_step(
    run: Run, model: nn.Module, batch_output: BatchOutput, backward: Callable[[torch.Tensor], None], step: int
) -> None:
    """End the step of a batch that is left out, and take part in the update of the other ranks.

    Args:
        run: The run.
        model: The prepared model.
        batch_output: What the step returned, if there was a forward pass.
        backward: Computes the gradients.
        step: Index of the batch in its epoch.
    """
    run.is_batch_open = run.is_batch_skipped = False
    run.training.window.skip(step)
    if not run.consensus.is_needed:
        run.training.progress.num_skipped_in_epoch += 1
        return
    if run.is_update_due:
        run.start_exchange(step)
    if run.is_sharded or (run.is_update_due and getattr(model, "find_unused_parameters", False)):
        backward(batch_output["loss"] * 0)
    elif run.is_update_due:  # gradients of 0 whatever the loss is, which could be NaN
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        zeros: list[torch.Tensor] = [parameter.flatten()[:1].float().sum() * 0 for parameter in trained]
        backward(torch.stack(zeros).sum())


def has_skipped_all(run: Run) -> bool:
    """Return whether all batches of a window without samples were skipped, on all ranks; then forget the window."""
    window = run.training.window
    num_skipped = run.consensus.num_skipped if run.consensus.is_needed else window.num_skipped
    if num_skipped == 0:
        return False
    window.reset()
    return True


# --- the time of a run -------------------------------------------------------------------------------------------


def read_limits(
    max_time: str | timedelta | None, min_epochs: int | None, num_epochs: int
) -> tuple[TimeLimit | None, int]:
    """Check the arguments of `train` that limit a run, and return the limit of its time, and the least of its epochs.

    Raises:
        TypeError: One of them has the wrong type.
        ValueError: One of them is out of range.
    """
    check_min_epochs(min_epochs, num_epochs)
    limit = None if max_time is None else TimeLimit(Length.parse("max_time", max_time, ("seconds",)))
    return limit, min_epochs or 0


class TimeLimit:
    """Ends a run when its time is over, measured on the main process from the start of the call of `train`.

    Args:
        length: The time; in seconds.
    """

    def __init__(self, length: Length) -> None:
        self.reason = f"{length} are over (`max_time`)"
        self._end = time.monotonic() + float(length.amount)

    def check(self, run: Run) -> None:
        """Ask for the end of the epoch, on the main process, if the time is over; called at log points."""
        training = run.training
        is_training = run.is_taking_steps and training.current_pass is training.epoch
        is_enough = training.progress.num_epochs_completed >= run.first_end
        if run.process_index == 0 and is_training and is_enough and self._is_over():
            run.consensus.request_stop(EpochEndedError(self.reason, ends_run=True))

    def ends_before_epoch(self, run: Run) -> bool:
        """Return whether the time is over when an epoch is about to start. Must be called on every process."""
        if run.training.progress.num_epochs_completed < run.first_end:
            return False
        return run_on_main(self._is_over, run.process_index == 0, run.config.num_processes)

    def seconds_left(self) -> float:
        """Return how long it takes until the time is over, on this process."""
        return max(0.0, self._end - time.monotonic())

    def _is_over(self) -> bool:
        return time.monotonic() >= self._end
