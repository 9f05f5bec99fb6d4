"""A terminal that remembers what is on its screen."""

from __future__ import annotations

import io
import re
import sys

import pytest

_PARTS = re.compile(r"\r|\n|\x1b\[A|[^\r\n\x1b]+")


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps all that was written to it."""

    def isatty(self) -> bool:
        """Return that it is one."""
        return True

    def screen(self) -> list[str]:
        """Return the lines that one sees, without blanks at their ends and without empty lines at the bottom."""
        return screen_of(self.getvalue())


def screen_of(written: str) -> list[str]:
    """Return what one sees after this was written to a terminal."""
    lines, row, column = [""], 0, 0
    for part in _PARTS.findall(written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row = max(0, row - 1)
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    shown = [line.rstrip() for line in lines]
    while shown and not shown[-1]:
        shown.pop()
    return shown


def use_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Terminal:
    """Let the standard streams write to one terminal.

    Call it in the test itself: pytest sets the streams again when the fixtures are done.
    """
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal
