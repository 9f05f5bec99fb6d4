"""Signals, such as that of Ctrl-C, that end a run gracefully."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

from pytorch_accelerated._distributed.reasons import name_of_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import FrameType


PREEMPTION_SIGNALS: tuple[signal.Signals, ...] = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if name in signal.Signals.__members__
)
"""The signals by which cluster schedulers announce that a process must end; Windows has no SIGUSR1."""


class InterruptFlag:
    """Inside its ``with`` block a signal only raises a flag, so that a run can finish its step and end gracefully.

    It listens to Ctrl-C, and to the signals added by `listen_to`. A second Ctrl-C interrupts at once. Handlers are
    installed on the main thread only. They also call a handler that the program had installed. At the end of the block
    the previous handlers are restored.
    """

    def __init__(self) -> None:
        self.is_active = False
        """Whether the program is inside the block."""

        self.signal_number: int | None = None
        """The first signal since the start of the last block; ``None`` for none."""

        self._was_ctrl_c_pressed = False
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._process_id = 0

    def __enter__(self) -> InterruptFlag:
        self.is_active = True
        self.signal_number = None
        self._was_ctrl_c_pressed = False
        self._process_id = os.getpid()
        self.listen_to(signal.SIGINT)
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_active = False
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)

    @property
    def signals(self) -> Collection[int]:
        """The signals that raise the flag."""
        return self._previous.keys()

    def listen_to(self, *signals: int) -> None:
        """Raise the flag on more signals, until the end of the block.

        Raises:
            ValueError: The system does not let programs handle the signal.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signals:
            previous = signal.getsignal(number)
            # A handler installed from C could not be restored, and a program that ignores a signal means it.
            if number in self._previous or previous in (None, signal.SIG_IGN):
                continue
            self._previous[number] = previous
            try:
                signal.signal(number, self._handle)
            except OSError as error:
                del self._previous[number]
                raise ValueError(
                    f"No program can handle {name_of_signal(number)}, so a run cannot end gracefully on it. Expected a "
                    "signal that a handler can catch, such as SIGTERM."
                ) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and os.getpid() != self._process_id:
            # A forked process inherits the handlers, but its parent uses SIGTERM to end it.
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
            return
        if number == signal.SIGINT:
            if self._was_ctrl_c_pressed and self.is_active:
                raise KeyboardInterrupt
            self._was_ctrl_c_pressed = True
        if self.signal_number is None:
            self.signal_number = number
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)
