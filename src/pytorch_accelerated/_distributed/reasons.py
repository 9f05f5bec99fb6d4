"""The exceptions that have a meaning for all ranks: if one rank has a reason to stop, all stop for that reason."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable
from typing import TypeAlias, TypeGuard

from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError, add_note


class RunInterruptedError(StopTrainingError):
    """A signal reached this process or another one. The run ends gracefully; then `to_exit_exception` is raised.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {name_of_signal(signal_number)}")
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[RunInterruptedError], tuple[int]]:
        return type(self), (self.signal_number,)

    def to_exit_exception(self) -> BaseException:
        """Return what to raise after the run, so that the process exits as it would on that signal."""
        if self.signal_number == signal.SIGINT:
            return KeyboardInterrupt(str(self))
        end = SystemExit(128 + self.signal_number)
        add_note(end, str(self))
        return end


def name_of_signal(signal_number: int) -> str:
    """Return what a signal is called in messages: ``Ctrl-C``, ``SIGTERM``."""
    if signal_number == signal.SIGINT:
        return "Ctrl-C"
    return next((known.name for known in signal.Signals if known == signal_number), f"signal {signal_number}")


class EpochEndedError(Exception):
    """Ends the training part of the epoch under way after an update; the loop catches it.

    Args:
        reason: Why, in a few words.
        ends_run: Whether no epoch follows.
    """

    def __init__(self, reason: str, ends_run: bool = False) -> None:
        super().__init__(reason)
        self.ends_run = ends_run


StopReason: TypeAlias = "NonFiniteLossError | StopTrainingError | EpochEndedError"
PackedReason: TypeAlias = "tuple[str, tuple[object, ...]]"

_KINDS: dict[str, type[NonFiniteLossError] | type[StopTrainingError] | type[EpochEndedError]] = {
    kind.__name__: kind for kind in (NonFiniteLossError, StopTrainingError, RunInterruptedError, EpochEndedError)
}
"""In order of precedence: if ranks have several, all raise the first kind."""


def is_reason(error: BaseException | None) -> TypeGuard[NonFiniteLossError | StopTrainingError]:
    """Tell whether an exception ends the run on all ranks, whichever of them raises it."""
    return isinstance(error, (NonFiniteLossError, StopTrainingError))


def packed(reason: Exception) -> PackedReason:
    """Return the kind of a reason and the arguments that create it again on another rank.

    A class of the program's own may not exist there, or may take other arguments, so it becomes one of the library.
    """
    kind = next(name for name, error in reversed(_KINDS.items()) if isinstance(reason, error))
    if isinstance(reason, RunInterruptedError):
        return kind, (reason.signal_number,)
    if isinstance(reason, EpochEndedError):
        return kind, (str(reason), reason.ends_run)
    return kind, (str(reason), reason.step) if isinstance(reason, NonFiniteLossError) else (str(reason),)


def unpacked(reason: PackedReason) -> StopReason:
    """Create a reason again."""
    kind, arguments = reason
    return _KINDS[kind](*arguments)  # type: ignore[arg-type]  # each has its own


def first_of(reasons: Iterable[StopReason]) -> StopReason:
    """Return the one of several reasons for which all ranks stop."""
    return min(reasons, key=_precedence)


def _precedence(reason: StopReason) -> tuple[int, float]:
    """Return the sort key of a reason: its kind, then the step of a non-finite loss, or whether it ends the run."""
    step = 0 if getattr(reason, "ends_run", False) else getattr(reason, "step", None)
    return list(_KINDS.values()).index(type(reason)), math.inf if step is None else step
