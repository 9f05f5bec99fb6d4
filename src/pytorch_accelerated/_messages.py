"""How messages reach the user: warnings that point at a line of the program, and lines that are logged once."""

from __future__ import annotations

import logging
import sys
import warnings

PACKAGE = __name__.partition(".")[0]

_logged: set[str] = set()


def warn(message: str) -> None:
    """Warn about something that the program can change, at the line of the program that called the library."""
    depth, frame = 2, sys._getframe(1)  # noqa: SLF001 - `inspect.stack` reads the source of every frame
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)


def log_once(message: str) -> None:
    """Log a hint, once per process, where a warning would be too much: it may describe what the program wants.

    Without a configuration of its own, `logging` prints it to stderr.
    """
    if message not in _logged:
        _logged.add(message)
        logging.getLogger(PACKAGE).warning(message)
