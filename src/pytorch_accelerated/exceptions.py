"""Exceptions of the library, each also a built-in so that general handlers keep working.

::

    Exception
    ├── StopTrainingError            raised by callbacks to end a run cleanly
    ├── CallbackMethodNotImplementedError   kept for programs written for 0.1.61; never raised here
    ├── RuntimeError
    │   └── CheckpointError          a checkpoint or training state cannot be written, read or used
    ├── ArithmeticError
    │   └── NonFiniteLossError       the loss became NaN or infinite
    └── ValueError, AssertionError
        └── SchedulerSettingsError   a schedule that contradicts itself
"""

from __future__ import annotations


class StopTrainingError(Exception):
    """Raise it inside a callback to end the training run after the current event.

    This is a request, not a failure: the later callbacks still receive the event, the run finishes with
    ``on_stop_training_error`` and the usual end-of-run events, and ``train`` returns normally. The message
    becomes part of ``trainer.stop_reason``.
    """


class CallbackMethodNotImplementedError(Exception):
    """Kept so that programs which import or catch it keep working; the library never raises it.

    Version 0.1.61 used it internally to mark events that a callback does not implement.
    """


class CheckpointError(RuntimeError):
    """A checkpoint or training state could not be written, read, or does not belong to this model."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names epoch, step and rank.

    Args:
        message: What happened, and what to do.
        step: Index of the batch in its epoch; ``None`` if it is not known.
    """

    def __init__(self, message: str = "", step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class SchedulerSettingsError(ValueError, AssertionError):
    """The settings of a learning-rate schedule contradict each other.

    It is an ``AssertionError`` too because version 0.1.61 checked its schedulers by assertion.
    """


def add_note(error: BaseException, note: str) -> None:
    """Attach ``note`` to ``error`` so that it is printed below the traceback (PEP 678).

    Python 3.10 does not print notes itself, but test runners and error reporters read them from the same place.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]
