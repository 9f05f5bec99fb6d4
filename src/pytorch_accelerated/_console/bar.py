"""The text of a progress bar: everything where there is room for it, the most important where there is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pytorch_accelerated._console.values import speed_text, time_left_text

_BAR_WIDTH = 8  # characters; a line that has no room for this much of a bar is shortened first


@dataclass(frozen=True)
class BarState:
    """What a bar shows.

    Args:
        title: What is under way, such as ``"epoch 3/12"``.
        num_done: The number of batches done.
        num_total: The number of all batches; ``None`` if it is not known.
        values: Loss and metrics so far, and the learning rate, by name.
        speed: How many samples, or whatever ``unit`` says, are processed in a second; 0 if it is not known yet.
        unit: What is counted in a second.
        seconds_left: The time until the last batch.
        seconds_left_of_run: The time until the end of the run; ``None`` if it ends with this pass, or is not known.
    """

    title: str
    num_done: int = 0
    num_total: int | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    speed: float = 0.0
    unit: str = "samples"
    seconds_left: float | None = None
    seconds_left_of_run: float | None = None

    @property
    def percentage(self) -> str:
        """How much is done; nothing if the total is not known."""
        return f"{100 * min(1.0, self.num_done / self.num_total):3.0f}%" if self.num_total else ""

    def head(self) -> str:
        """Return what stands before the bar."""
        return _joined([self.title, self.percentage], " ")

    def count(self) -> str:
        """Return how many batches are done, of how many."""
        return f"{self.num_done}/{self.num_total}" if self.num_total else f"{self.num_done} batches"


class _Fact(NamedTuple):
    text: str
    rank: int  # what has the highest is left out first if a line is too long


def _facts_of(state: BarState, *, is_short: bool = False) -> list[_Fact]:
    """Return what stands after the bar, in the order in which it is shown."""
    speed = f"{speed_text(state.speed)}{'' if is_short else ' ' + state.unit}/s" if state.speed else ""
    values = [_Fact(f"{name} {value}", 1 + 2 * place) for place, (name, value) in enumerate(state.values.items())]
    facts = [_Fact(state.count(), 0), *values, _Fact(speed, 1000), _Fact(_time_left(state, is_short=is_short), 2)]
    return [fact for fact in facts if fact.text]


def _time_left(state: BarState, *, is_short: bool) -> str:
    of_pass, of_run = time_left_text(state.seconds_left), time_left_text(state.seconds_left_of_run)
    if is_short and of_pass and of_run:
        return f"eta {of_pass}, run {of_run}"
    return ", ".join([f"{of_pass} left"] * bool(of_pass) + [f"run {of_run} left"] * bool(of_run))


def line_of(state: BarState) -> str:
    """Return a line with everything, for a file.

    Example:
        >>> line_of(BarState("epoch 3/12", 50, 200, {"loss": "1.203"}, 640, "samples", 12.4, 108))
        'epoch 3/12  25%  50/200  loss 1.203  640 samples/s  12s left, run 1:48 left'
    """
    return _joined([state.head(), *(fact.text for fact in _facts_of(state))], "  ")


def bar_format(state: BarState, width: int | None) -> str:
    """Return the format of a bar of tqdm that fits into the width of the screen.

    Args:
        state: What is shown.
        width: Characters in a line; ``None`` if there is no limit.

    Returns:
        A text with the fields ``{bar}``, if there is a total, and ``{postfix}``, where subclasses show their own.

    Example:
        >>> bar_format(BarState("epoch 3/12", 50, 200, {"loss": "1.203"}, 640, "samples", 12.4, 108), 80)
        'epoch 3/12  25% |{bar}| 50/200 loss 1.203 640/s eta 12s, run 1:48{postfix}'
    """
    bar = "|{bar}|" if state.num_total else ""
    for separator, facts in _from_long_to_short(state):
        texts = separator.join(fact.text for fact in facts)
        line = _joined([state.head(), bar, texts], " ")
        if width is None or len(line.replace("{bar}", " " * _BAR_WIDTH)) <= width:
            break
    return _joined([_escaped(state.head()), bar, _escaped(texts)], " ") + "{postfix}"


def _from_long_to_short(state: BarState) -> Iterator[tuple[str, list[_Fact]]]:
    """Yield all facts, then shorter ones, then fewer; at least one."""
    yield "  ", _facts_of(state)
    facts = _facts_of(state, is_short=True)
    while facts:
        yield " ", facts
        facts.remove(max(facts, key=lambda fact: fact.rank))


def _joined(texts: list[str], separator: str) -> str:
    return separator.join(text for text in texts if text)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
