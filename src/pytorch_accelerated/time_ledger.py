"""Where the time of a run goes, in parts that add up to its wall time."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_Item = TypeVar("_Item")

SETUP: Final = "setup"
DATA: Final = "data"
FORWARD: Final = "forward"
BACKWARD: Final = "backward"
OPTIMIZER: Final = "optimizer"
EVALUATION: Final = "evaluation"
EVALUATION_DATA: Final = "evaluation_data"
SAVING: Final = "saving"
OTHER: Final = "other"

CALLBACK_PREFIX: Final = "callback_"
"""In front of the name of a callback, which is a part of its own."""

_DESCRIPTIONS = {
    SETUP: "start of the run",
    DATA: "waiting for training data",
    FORWARD: "forward pass and loss",
    BACKWARD: "backward pass",
    OPTIMIZER: "clipping, optimizer, scheduler",
    EVALUATION: "evaluation",
    EVALUATION_DATA: "waiting for evaluation data",
    SAVING: "saving",
    OTHER: "other",
}

PARTS = tuple(_DESCRIPTIONS)
"""The parts of each run, in the order of a table; those of its callbacks come after them."""

_clock = time.perf_counter_ns

_MIN_SECONDS_OF_PART = 0.5  # nobody minds less
_LONG_RUN = 30  # seconds; in shorter ones, the start of worker processes and saving at the end weigh too much


class TimeLedger:
    """Where the time of one call of `train`, `evaluate` or `predict` goes, as the main thread of this process sees it.

    At each moment the time belongs to one part, so the parts add up to the wall time. What a callback does counts as
    ``callback_`` + the name of its class, without the evaluations and the saving that it calls for, which are parts
    themselves. ``trainer.time_ledger`` is the ledger of the run under way, or of the last one; `print` shows its table.

    On a GPU these are times of the host: ``forward`` and ``backward`` are the launch of their kernels, plus the wait
    for a device that is too far behind.

    Example:
        >>> ledger = TimeLedger()
        >>> ledger.start()
        >>> with ledger.during("saving"):
        ...     time.sleep(0.01)
        >>> ledger.stop()
        >>> ledger.seconds["saving"] >= 0.01
        True
        >>> round(sum(ledger.seconds.values()) / ledger.total, 9)
        1.0
    """

    def __init__(self) -> None:
        self.max_share: float | None = 0.4
        """The share of the total above which the run warns of data, saving or a callback; ``None`` for never."""

        self.is_running = False
        self._nanoseconds: defaultdict[str, int] = defaultdict(int, dict.fromkeys(PARTS, 0))
        self._first_waits: defaultdict[str, int] = defaultdict(int)
        """Of these, the wait for the first item of each pass, for which worker processes are started.

        And what callbacks do before the first item of all, such as importing a tracker.
        """

        self.part: str = SETUP
        """What the time belongs to at present."""

        self._since = 0
        self._thread = 0
        self._warned: set[str] = set()

    # --- keeping time, as the run does ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start with the part ``setup``."""
        self._since, self._thread, self.is_running = _clock(), threading.get_ident(), True

    def stop(self) -> None:
        """Stop for good."""
        self.switch(OTHER)
        self.is_running = False

    def switch(self, part: str) -> str:
        """Let the time belong to another part from now on, and return the one that it has belonged to."""
        now, outer = _clock(), self.part  # this takes some 0.2 us, five times a step
        self._nanoseconds[outer] += now - self._since
        self._since, self.part = now, part
        return outer

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Let the time of the body belong to a part, unless the ledger is not running or belongs to another thread."""
        if not self.is_running or threading.get_ident() != self._thread:
            yield
            return
        outer = self.switch(part)
        try:
            yield
        finally:
            self.switch(outer)

    def waiting_for(self, items: Iterable[_Item], part: str, then: str | None = None) -> Iterator[_Item]:
        """Yield items, none of them ``None``, and let the time that each takes to come belong to a part.

        Args:
            items: The items, such as the batches of a loader.
            part: The part.
            then: The part that begins when an item is there; ``None`` for the one of before.
        """
        iterator = iter(items)
        if not self._first_waits:
            of_callbacks = [name for name in self._nanoseconds if name.startswith(CALLBACK_PREFIX)]
            self._first_waits.update({name: self._nanoseconds[name] for name in of_callbacks})
        outer = self.switch(part)
        before = self._nanoseconds[part]
        item = next(iterator, None)
        self.switch(then or outer)
        self._first_waits[part] += self._nanoseconds[part] - before
        while item is not None:
            yield item
            outer = self.switch(part)
            item = next(iterator, None)
            self.switch(then or outer)
        self.switch(outer)

    # --- reading it ----------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each part so far: ``setup``, ``data``, ``forward``, ..., and then those of the callbacks."""
        if self.is_running and threading.get_ident() == self._thread:
            self.switch(self.part)
        return {part: nanoseconds / 1e9 for part, nanoseconds in self._nanoseconds.items()}

    @property
    def total(self) -> float:
        """The seconds of the run so far."""
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        """Return the share of a part in the total, from 0 to 1; 0 of one that has not occurred."""
        seconds = self.seconds
        return seconds.get(part, 0.0) / (sum(seconds.values()) or 1.0)

    def __repr__(self) -> str:
        """Return a table of the parts that took any time, with seconds and shares."""
        return format_seconds(self.seconds)

    # --- warnings ------------------------------------------------------------------------------------------------

    def find_excess(self, *, is_at_end: bool = False) -> list[str]:
        """Return the parts that take more than `max_share` of the total and could be made shorter; each only once.

        Args:
            is_at_end: Whether the run ends. Before, nothing is returned in its first 30 seconds.
        """
        seconds = self.seconds
        total = sum(seconds.values())
        is_long = total >= _LONG_RUN
        if self.max_share is None or not (is_long or is_at_end):
            return []
        found = [
            part
            for part, taken in seconds.items()
            if taken - self._start_of(part, total) > max(self.max_share * total, _MIN_SECONDS_OF_PART)
            and (part in (DATA, EVALUATION_DATA) or part.startswith(CALLBACK_PREFIX) or (part == SAVING and is_long))
            and part not in self._warned
        ]
        self._warned.update(found)
        return found

    def _start_of(self, part: str, total: float) -> float:
        """Return the seconds of a part that do not count for a warning: those of the start, in a short run."""
        return self._first_waits[part] / 1e9 if total < _LONG_RUN else 0.0

    def describe_excess(self, part: str, num_workers: int | None, dl_kwargs_name: str) -> str:
        """Return a sentence that says how much time a part takes, and what to do about it.

        Args:
            part: The part.
            num_workers: The number of worker processes that load its data; ``None`` if it has none to set.
            dl_kwargs_name: The argument that sets it.
        """
        name = part.removeprefix(CALLBACK_PREFIX)
        if part in (DATA, EVALUATION_DATA):
            who, remedy = _capitalized(_DESCRIPTIONS[part]), _remedy_for_data(num_workers, dl_kwargs_name)
        elif part == SAVING:
            who = "Saving"
            remedy = "Save less often, or in the background: `SaveTrainingStateCallback(in_background=True)`."
        else:
            who = f"The callback `{name}`"
            remedy = (
                "Let it do its work once in n steps, in `on_log_point`, which comes ten times a second, or at the end "
                "of the epoch. Reading a value from a GPU, as `.item()` does, makes it wait for the device."
            )
        return (
            f"{who} has taken {self.share(part):.0%} of the time so far ({self.seconds[part]:.1f} of {self.total:.1f} "
            f"s). {remedy} `TimeLedgerCallback(max_share=...)` sets from which share on this is said."
        )


def _remedy_for_data(num_workers: int | None, dl_kwargs_name: str) -> str:
    if num_workers is None:
        return "Let what you passed prepare its batches ahead of time, or pass a dataset, which workers can load."
    if num_workers == 0:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return (
            "The main process loads the samples. Let worker processes do it while the model computes: pass "
            f'`{dl_kwargs_name}={{"num_workers": {max(2, num_cores - 1)}}}`.'
        )
    return (
        f"The samples are loaded by {num_workers} worker processes. Pass a larger `num_workers` in `{dl_kwargs_name}`, "
        'with `"persistent_workers": True` if the epochs are short, or prepare the files beforehand, so that a sample '
        "takes less work."
    )


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def format_seconds(seconds: Mapping[str, float]) -> str:
    """Return a table of the parts that took any time, with seconds and shares, such as those of a ledger."""
    total = sum(seconds.values())
    rows = [(_describe(part), taken) for part, taken in seconds.items() if taken > 0]
    width = max(len(name) for name, _ in [*rows, ("total", total)])
    lines = [f"{name:<{width}}  {taken:10.3f} s  {taken / (total or 1):6.1%}" for name, taken in rows]
    return "\n".join([*lines, f"{'total':<{width}}  {total:10.3f} s  {1:6.1%}"])


def _describe(part: str) -> str:
    return _DESCRIPTIONS.get(part) or f"callback {part.removeprefix(CALLBACK_PREFIX)}"
