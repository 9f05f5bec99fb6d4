"""Where a run is shown: on a terminal, in a notebook, or in a file, such as the log of a cluster."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_UPDATES = 0.5  # of what a notebook shows; each is a message to the browser
_MOVES_CURSOR = re.compile(r"\r|\x1b\[[\d;]*[A-HJKSTf]")
_WIPE_LINE = "\r\x1b[K"
_UNLIMITED = sys.maxsize  # characters; a line of a file is not wrapped


class Nowhere:
    """A file that keeps nothing: where a bar is drawn if there is no terminal."""

    def write(self, text: str) -> int:
        """Keep nothing."""
        return len(text)

    def flush(self) -> None:
        """Do nothing."""


def is_terminal(stream: object) -> bool:
    """Return whether a stream writes to a terminal that can draw over its last line."""
    isatty = getattr(stream, "isatty", None)
    return callable(isatty) and bool(isatty()) and os.environ.get("TERM") != "dumb"


def line_width() -> int:
    """Return how many characters fit into a line of the standard output."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else _UNLIMITED


def is_notebook() -> bool:
    """Return whether the program runs in a notebook, whose cells can show HTML.

    A process that was forked from that of the notebook cannot, but what it prints is shown.
    """
    ipython: Any = sys.modules.get("IPython")  # it is there already, or this is no notebook
    shell = ipython.get_ipython() if hasattr(ipython, "get_ipython") else None
    is_spyder = type(shell).__module__.startswith("spyder")  # its console has a kernel, but shows no HTML
    kernel = getattr(shell, "kernel", None)
    process = getattr(getattr(kernel, "session", None), "pid", os.getpid())
    return kernel is not None and not is_spyder and process == os.getpid()


def show_figures(figure_class: type) -> None:
    """Let a notebook show figures of matplotlib as pictures, unless something else does so already.

    Args:
        figure_class: The class of the figures.
    """
    ipython: Any = sys.modules.get("IPython")
    display = getattr(ipython.get_ipython(), "display_formatter", None) if is_notebook() else None
    if display is None:
        return
    formatter = display.formatters["image/png"]
    try:
        formatter.lookup_by_type(figure_class)
    except KeyError:
        formatter.for_type(figure_class, _png_of)


def _png_of(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def html_escaped(text: str) -> str:
    """Return a text as part of HTML."""
    from html import escape  # only notebooks need it

    return escape(text)


class LiveHtml:
    """A piece of HTML in the output of a notebook's cell, which is replaced while a run goes on, and saved with it.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from IPython.display import HTML, display  # there is one: see `is_notebook`

        self._html, self._clock = HTML, clock
        self._shown_at = clock()
        self._handle = display(HTML(""), display_id=True)

    def show(self, html: Callable[[], str], *, is_last: bool = False) -> None:
        """Show something else.

        Args:
            html: Returns it. It is not called a few times a second or more, unless it is the last.
            is_last: Whether this is to stay.
        """
        now = self._clock()
        if is_last or now - self._shown_at >= _SECONDS_BETWEEN_UPDATES:
            self._shown_at = now
            self._handle.update(self._html(html()))


@contextmanager
def lines_above_bars(*, are_elsewhere: bool = False) -> Iterator[None]:
    """While the body runs, put what the program prints on lines of its own above the open bars of tqdm.

    This holds for whatever is written to the standard streams, by `print`, `logging` or `warnings`, if they are
    terminals: the bars are wiped, and drawn again below the text. A line is shown when it is complete. Text that moves
    the cursor itself, such as another bar, is passed on as it is.

    Args:
        are_elsewhere: Whether another process on the same terminal has the bars. Then the line that the cursor is in is
            wiped, and the other process draws it again soon.
    """
    streams = {id(stream): stream for stream in (sys.stdout, sys.stderr) if is_terminal(stream)}
    guards = [_LineGuard(stream, _WIPE_LINE if are_elsewhere else "") for stream in streams.values()]
    try:
        yield
    finally:
        for guard in guards:
            guard.remove()


class _LineGuard:
    """Replaces the method ``write`` of a stream, so that all who hold the stream use it."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream, self._prefix = stream, prefix
        self._write, self._process = stream.write, os.getpid()
        self._own = vars(stream).get("write") if hasattr(stream, "__dict__") else None
        self._pending = ""
        self._is_active = True
        try:
            stream.write = self.write  # type: ignore[method-assign]
        except AttributeError:  # such a stream is used as it is
            self._is_active = False

    def write(self, text: str) -> int:
        """Write the lines that are complete."""
        is_of_bar = sys._getframe(1).f_globals.get("__name__", "").startswith("tqdm")  # noqa: SLF001 - of the caller
        if is_of_bar or _MOVES_CURSOR.search(text) or os.getpid() != self._process:
            return self._write(text)
        *lines, self._pending = (self._pending + text).split("\n")
        if lines:
            with tqdm.external_write_mode():
                self._write("\n".join([self._prefix + lines[0], *lines[1:], ""]))
        return len(text)

    def remove(self) -> None:
        if not self._is_active:
            return
        if self._own is None:
            del self._stream.write
        else:
            self._stream.write = self._own  # type: ignore[method-assign]
        if self._pending:
            self._write(self._pending)
