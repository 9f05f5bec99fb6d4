"""Numbers and tables as text."""

from __future__ import annotations

import pytest

from pytorch_accelerated._console.text import align, format_size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (35_900, "35.9 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")],
)
def test_sizes_are_printed_with_three_digits_and_a_unit(size, text):
    assert format_size(size) == text


def test_columns_are_aligned_to_the_left_or_to_the_right_without_spaces_at_the_end():
    assert align([["a", "1", "x"], ["abc", "100", ""]], right=[1]) == ["a      1  x", "abc  100"]
