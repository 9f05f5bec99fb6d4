"""A progress bar, wherever a run is shown: on a terminal, in a notebook, or as lines of a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from tqdm import tqdm

from pytorch_accelerated._console.bar import BarState, bar_format, line_of
from pytorch_accelerated._console.pace import Pace
from pytorch_accelerated._console.screen import (
    LiveHtml,
    Nowhere,
    html_escaped,
    is_notebook,
    is_terminal,
    lines_above_bars,
)

SECONDS_BETWEEN_LINES = 30.0
"""Of a file, for something that takes that long."""

_SECONDS_BETWEEN_MARKS = 0.1


class ShownBar:
    """A bar of tqdm that is drawn on a terminal only, and replaced elsewhere.

    Args:
        state: What it shows at first.
        print_fn: Prints a line.
        is_shown: Whether anything is shown at all.
        delay: Seconds before which the bar is not drawn on a terminal.
        live: Where a notebook shows it; by default in an output of its own.
        seconds_between_lines: Between two lines where there is neither a terminal nor a notebook.
        is_elsewhere: Whether another process shows such a bar, maybe on the same terminal.
    """

    def __init__(
        self,
        state: BarState,
        print_fn: Callable[[str], object],
        *,
        is_shown: bool,
        delay: float = 0.0,
        live: LiveHtml | None = None,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        is_elsewhere: bool = False,
    ) -> None:
        self._is_shown, self._print = is_shown, print_fn
        self._live = LiveHtml() if live is None and is_shown and is_notebook() else live
        self._is_on_terminal = is_shown and self._live is None and is_terminal(sys.stderr)
        self._seconds_between_lines = seconds_between_lines
        self._opened_at = self._told_at = time.perf_counter()
        self.bar = tqdm(
            total=state.num_total,
            initial=state.num_done,
            disable=not is_shown,
            file=sys.stderr if self._is_on_terminal else Nowhere(),
            leave=False,
            dynamic_ncols=self._is_on_terminal,
            bar_format=bar_format(state, None),
            delay=delay,
        )
        self._guard = ExitStack()
        if self._is_on_terminal or is_elsewhere:
            self._guard.enter_context(lines_above_bars(are_elsewhere=is_elsewhere))

    def seconds(self) -> float:
        """Return how long the bar has been open."""
        return time.perf_counter() - self._opened_at

    def show(self, num_done: int, state: Callable[[], BarState]) -> None:
        """Show how far it is.

        Args:
            num_done: The number of batches done.
            state: Returns what is shown; not called where nothing is.
        """
        self.bar.n = num_done
        if not self._is_shown:
            return
        if self._live is not None:
            self._live.show(lambda: _html_of(state()))
        elif self._is_on_terminal:
            self.bar.bar_format = bar_format(state(), self.bar.format_dict["ncols"])
            self.bar.refresh()
        elif time.perf_counter() - self._told_at >= self._seconds_between_lines:
            self._told_at = time.perf_counter()
            self._print(line_of(state()))

    def close(self, num_done: int, state: Callable[[], BarState], *, is_complete: bool, has_line: bool = True) -> None:
        """Close the bar. It gives way to the line that follows it; without one, it stays where it is.

        So does the bar of a pass that is not complete, and where there is no bar, a line on the error stream says how
        far the pass came. A notebook keeps the bar in any case.

        Args:
            num_done: The number of batches done.
            state: Returns what is shown at last.
            is_complete: Whether the pass has come to its end.
            has_line: Whether something else tells of a complete pass.
        """
        stays = not (is_complete and has_line)
        self.bar.n, self.bar.leave = num_done, stays
        try:
            if self._live is not None:
                self._live.show(lambda: _html_of(state()), is_last=True)
            elif self._is_on_terminal and stays:
                self.bar.delay = 0.0
                self.bar.bar_format = bar_format(state(), self.bar.format_dict["ncols"])
            elif self._is_shown and not self._is_on_terminal and not is_complete:
                print(line_of(state()), file=sys.stderr)
        finally:
            self.bar.close()
            self._guard.close()


@contextmanager
def progress_bar(
    title: str, num_batches: int | None, print_fn: Callable[[str], object], *, is_shown: bool
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the body runs, which calls a function with the number of batches, and of samples, done so far.

    It may do so after each batch: the bar is drawn ten times a second.
    """
    batches, samples, next_mark = Pace(), Pace(), 0.0
    done = 0

    def state() -> BarState:
        left = batches.seconds_left(num_batches)
        return BarState(title, done, num_batches, speed=samples.per_second(), seconds_left=left)

    def show(num_batches_done: int, num_samples_done: int) -> None:
        nonlocal done, next_mark
        done = num_batches_done
        if time.perf_counter() >= next_mark:
            next_mark = time.perf_counter() + _SECONDS_BETWEEN_MARKS
            batches.mark(num_batches_done)
            samples.mark(num_samples_done)
            bar.show(done, state)

    bar, is_complete = ShownBar(state(), print_fn, is_shown=is_shown), False
    try:
        yield show
        is_complete = True
    finally:
        bar.close(done, lambda: replace(state(), seconds_left=None), is_complete=is_complete)


def _html_of(state: BarState) -> str:
    total = f' max="{state.num_total}"' if state.num_total else ""
    text = html_escaped(line_of(state))
    return f'<div><progress value="{state.num_done}"{total}></progress> <code>{text}</code></div>'
