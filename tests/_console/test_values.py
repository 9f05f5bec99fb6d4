"""Numbers, durations and time left, as text."""

from __future__ import annotations

import math

import pytest

from pytorch_accelerated._console.values import duration_text, number_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (-0.56149, "-0.5615"),
        (0.99996, "1.000"),
        (12345.6, "1.235e+04"),
        (1234.4, "1234"),
        (123456, "123456"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (1e-300, "1.000e-300"),
    ],
)
def test_numbers_have_four_significant_digits(value, text):
    if value == 0:
        assert float(number_text(value)) == 0
    else:
        assert number_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (59.94, "59.9s"), (59.96, "1:00"), (3599.4, "59:59"), (3599.6, "1:00:00"), (360000, "100:00:00")],
)
def test_durations_are_rounded_before_they_are_split(seconds, text):
    assert duration_text(seconds) == text
