"""The grammar of lengths, such as ``"500 updates"`` or ``"10 min"``."""

from __future__ import annotations

from datetime import timedelta
from fractions import Fraction

import pytest

from pytorch_accelerated.callbacks import SaveTrainingStateCallback, StepBasedEvaluationCallback
from pytorch_accelerated.utils import Length


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500 updates", 500, "updates"),
        ("1 update", 1, "updates"),
        ("2 epochs", 2, "epochs"),
        ("0.25 epochs", Fraction(1, 4), "epochs"),
        ("0.1 epochs", Fraction(1, 10), "epochs"),
        ("1e6 samples", 10**6, "samples"),
        ("1_000 samples", 1000, "samples"),
        ("30 s", 30, "seconds"),
        ("0.5 seconds", Fraction(1, 2), "seconds"),
        ("10 min", 600, "seconds"),
        ("10min", 600, "seconds"),
        ("  1.5 Hours ", 5400, "seconds"),
        ("+2 h", 7200, "seconds"),
    ],
)
def test_a_length_is_a_number_and_a_unit(text, amount, unit):
    length = Length.parse("every", text)
    assert (length.amount, length.unit) == (amount, unit)
    assert Length.parse("every", str(length)) == length
    assert Length.parse("every", length) is length


def test_a_time_may_be_a_timedelta():
    assert Length.parse("every", timedelta(minutes=1, milliseconds=500)).amount == Fraction(121, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood"),
        ("many epochs", "not understood"),
        ("two", "not understood"),
        ("1 000 updates", "not understood"),
        ("1.2.3 s", "not understood"),
        (".", "not understood"),
        ("10", "lacks a unit"),
        ("10 steps", "'steps' is no unit here: lengths count updates"),
        ("10 batches", "'batches' is no unit here"),
        ("10 m", "write 'min'"),
        ("3 days", "'days' is no unit"),
        ("0 epochs", "above 0"),
        ("-1 s", "above 0"),
        ("nan s", "finite"),
        ("inf s", "finite"),
        ("-inf h", "finite"),
        ("1e400 updates", "finite"),
        ("2.5 updates", "whole number of updates"),
        ("1e-1 samples", "whole number of samples"),
    ],
)
def test_what_is_not_understood_is_told_with_what_would_be(text, message):
    with pytest.raises(ValueError, match=rf"^`every` is {text!r}.*{message}") as raised:
        Length.parse("every", text)
    assert "Expected" in str(raised.value)


@pytest.mark.parametrize("value", [5, 2.0, True, float("nan"), ["2 epochs"], b"2 epochs"])
def test_a_value_without_a_unit_is_an_error(value):
    with pytest.raises(
        TypeError, match=r"^`every` is .*Expected a text with a number and a unit, such as '500 updates'"
    ):
        Length.parse("every", value)


def test_another_unit_than_the_argument_takes_is_an_error():
    with pytest.raises(ValueError, match=r"^`max_time` is '2 epochs', but takes no epochs\. .*'10 min'"):
        Length.parse("max_time", "2 epochs", ("seconds",))


@pytest.mark.parametrize(
    "create",
    [
        lambda text: SaveTrainingStateCallback(save_every=text),
        lambda text: StepBasedEvaluationCallback(eval_every=text),
    ],
)
@pytest.mark.parametrize("text", ["0 updates", "soon", "3 steps", "nan epochs"])
def test_callbacks_refuse_what_is_no_length(create, text):
    with pytest.raises(ValueError, match=f"`(save|eval)_every` is {text!r}"):
        create(text)
