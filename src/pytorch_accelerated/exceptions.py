"""Exceptions of the library. Each also derives from a built-in exception, so that general handlers keep working.

::

    Exception
    ├── StopTrainingError            raised by callbacks to end a run gracefully
    ├── CallbackMethodNotImplementedError   kept for programs written for 0.1.61; never raised here
    ├── RuntimeError
    │   └── CheckpointError          a checkpoint or training state cannot be written, read or used
    ├── ArithmeticError
    │   └── NonFiniteLossError       the loss became NaN or infinite
    ├── ValueError, KeyError
    │   └── UnknownMetricError       a metric that the run history does not have
    └── ValueError, AssertionError
        └── SchedulerSettingsError   a schedule that contradicts itself
"""

from __future__ import annotations


class StopTrainingError(Exception):
    """Raise this in a callback to end the training run after the current event.

    It is a request, not a failure: the remaining callbacks still receive the event, the run ends with
    ``on_stop_training_error`` and the usual end-of-run events, and ``train`` returns normally. The message becomes
    ``trainer.stop_reason``.
    """


class CallbackMethodNotImplementedError(Exception):
    """Kept for programs that import or catch it. The library never raises it.

    Version 0.1.61 used it internally for events that a callback does not implement.
    """


class CheckpointError(RuntimeError):
    """A checkpoint or training state could not be written or read, or does not belong to this model."""

    is_of_program: bool = False
    """Whether an error of the program, on another process, is the cause: that process ends, and so does this one."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite. The message names the epoch, step and rank.

    Args:
        message: What happened, and what to do.
        step: Index of the batch within its epoch; ``None`` if unknown.
    """

    def __init__(self, message: str = "", step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class UnknownMetricError(ValueError, KeyError):
    """Nothing was recorded under the name of a metric.

    It is also a ``KeyError``, because version 0.1.61 looked up the metric to delete in a dictionary.
    """

    def __str__(self) -> str:
        return ValueError.__str__(self)  # that of `KeyError` would quote the message


class SchedulerSettingsError(ValueError, AssertionError):
    """The settings of a learning-rate schedule contradict each other.

    It is also an ``AssertionError``, because version 0.1.61 used assertions in its schedulers.
    """


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, which is printed below the traceback (PEP 678).

    Python 3.10 does not print notes itself, but test runners and error reporters read them from the same attribute.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]
