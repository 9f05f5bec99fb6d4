"""Lengths of training, such as ``"500 updates"`` or ``"10 min"``: one grammar for all arguments that take one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fractions import Fraction

Unit = Literal["updates", "epochs", "samples", "seconds"]

_UNITS: dict[str, tuple[Unit, int]] = {
    **dict.fromkeys(("update", "updates"), ("updates", 1)),
    **dict.fromkeys(("epoch", "epochs"), ("epochs", 1)),
    **dict.fromkeys(("sample", "samples"), ("samples", 1)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600)),
}

_EXAMPLES: dict[Unit, str] = {
    "updates": "'500 updates'",
    "epochs": "'2 epochs', '0.25 epochs'",
    "samples": "'1e6 samples'",
    "seconds": "'30 s', '10 min', '1.5 h'",
}

_NUMBER_AND_UNIT = re.compile(r"([+-]?[\d_.]+(?:e[+-]?\d+)?|[+-]?inf|nan)\s*([a-z]*)")


@dataclass(frozen=True)
class Length:
    """A length of training: a number of updates, epochs or samples, or a time.

    Arguments such as ``eval_every`` take one as text: a number, then a unit.

    =========  ==========================  ==================================================================
    unit       example                     meaning
    =========  ==========================  ==================================================================
    updates    ``"500 updates"``           optimizer steps of the run; all processes together make one
    epochs     ``"2 epochs"``,             passes over the training data; a part of one counts its batches
               ``"0.25 epochs"``
    samples    ``"1e6 samples"``           samples that have entered an update, over all processes
    time       ``"30 s"``, ``"10 min"``,   wall time, measured on the main process; ``sec``, ``second``,
               ``"1.5 h"``                 ``minute`` and ``hour`` are understood too
    =========  ==========================  ==================================================================

    Args:
        amount: How many; above 0. An exact fraction, so that 10 times ``"0.1 epochs"`` is one epoch.
        unit: ``"updates"``, ``"epochs"``, ``"samples"`` or ``"seconds"``.

    Example:
        >>> Length.parse("save_every", "1.5 h")
        Length(amount=Fraction(5400, 1), unit='seconds')
        >>> str(Length.parse("eval_every", "0.25 epochs"))
        '0.25 epochs'
    """

    amount: Fraction
    unit: Unit

    def __str__(self) -> str:
        factor, unit = 1, str(self.unit)
        if self.unit == "seconds":
            factor, unit = next((size, name) for size, name in ((3600, "h"), (60, "min"), (1, "s")) if self.fits(size))
        number = self.amount / factor
        text = str(number.numerator) if number.denominator == 1 else f"{float(number):g}"
        return f"{text} {unit.removesuffix('s') if number == 1 and unit != 's' else unit}"

    @property
    def is_whole(self) -> bool:
        """Whether the amount is a whole number."""
        return self.amount.denominator == 1

    def fits(self, size: int) -> bool:
        """Return whether it is at least ``size``, or cannot be told in a larger unit than seconds."""
        return self.amount >= size or size == 1

    @classmethod
    def parse(
        cls, name: str, value: object, units: tuple[Unit, ...] = ("updates", "epochs", "samples", "seconds")
    ) -> Length:
        """Return a length that was given as an argument.

        Args:
            name: The argument, for the message.
            value: A text, such as ``"10 min"``; a `datetime.timedelta` for a time; or a `Length`.
            units: What the argument can be given in.

        Raises:
            TypeError: It is none of these, such as a number without a unit.
            ValueError: The text is not understood, or the length is not above 0 and finite, or in another unit.
        """
        if isinstance(value, Length):
            length = value
        elif isinstance(value, timedelta):
            length = cls(_exactly(value / timedelta(microseconds=1)) / 1_000_000, "seconds")
        elif isinstance(value, str):
            length = _read(name, value, units)
        else:
            raise TypeError(
                f"`{name}` is {value!r}, of type {type(value).__name__}. Expected a text with a number and a unit, "
                f"such as {_examples(units)}."
            )
        if length.amount <= 0:
            raise ValueError(f"`{name}` is {value!r}. Expected a length above 0, such as {_examples(units)}.")
        if length.unit not in units:
            raise ValueError(
                f"`{name}` is {value!r}, but takes no {length.unit}. Expected a length such as {_examples(units)}."
            )
        if length.unit in ("updates", "samples") and length.amount.denominator != 1:
            raise ValueError(f"`{name}` is {value!r}. Expected a whole number of {length.unit}.")
        return length


def interval_within_epochs(name: str, value: object, what: str) -> Length | None:
    """Return how often something is done that is done at the end of each epoch anyway; ``None`` for ``None``.

    Args:
        name: The argument, for the message.
        value: The length, as for `Length.parse`.
        what: What is done, for the message.

    Raises:
        TypeError: It is no length.
        ValueError: It is not understood, or a number of whole epochs.
    """
    length = None if value is None else Length.parse(name, value)
    if length is not None and length.unit == "epochs" and length.is_whole:
        raise ValueError(
            f"`{name}` is {value!r}, but {what} at the end of each epoch anyway. Expected a part of an epoch, such as "
            "'0.25 epochs', or another length, such as '500 updates'."
        )
    return length


def _read(name: str, text: str, units: tuple[Unit, ...]) -> Length:
    match = _NUMBER_AND_UNIT.fullmatch(text.strip().lower())
    try:
        number = math.nan if match is None else float(match[1])
    except ValueError:
        match = None
    if match is None:
        raise ValueError(
            f"`{name}` is {text!r}, which is not understood. Expected a number and a unit, such as {_examples(units)}."
        )
    if not math.isfinite(number):
        raise ValueError(f"`{name}` is {text!r}. Expected a finite length, such as {_examples(units)}.")
    if match[2] not in _UNITS:
        raise ValueError(
            f"`{name}` is {text!r}, {_problem_of_unit(match[2])}. Expected a number and a unit, such as "
            f"{_examples(units)}."
        )
    unit, factor = _UNITS[match[2]]
    return Length(_exactly(match[1].replace("_", "")) * factor, unit)


def _exactly(number: str | float) -> Fraction:
    from fractions import Fraction  # imported here, because it takes some milliseconds

    return Fraction(number)


def _problem_of_unit(unit: str) -> str:
    if unit in ("step", "steps", "batch", "batches", "it", "iterations", "ba"):
        return (
            f"but {unit!r} is no unit here: lengths count updates, each of which takes the batches of one accumulation"
        )
    if unit == "m":
        return "but 'm' could be minutes or months: write 'min'"
    return f"but {unit!r} is no unit" if unit else "which lacks a unit"


def _examples(units: tuple[Unit, ...]) -> str:
    return ", ".join(_EXAMPLES[unit] for unit in units)
