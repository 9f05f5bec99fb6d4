"""The text of a progress bar."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from pytorch_accelerated._console.bar import BarState, bar_format, line_of

VALUES = {"loss": "1.203", "accuracy": "0.5610", "lr": "2.1e-03"}
STATE = BarState("epoch 3/12", 123, 274, VALUES, 1234.5, "samples", 12.4, 108.0)


def drawn(state, width):
    """Return what tqdm draws."""
    text = bar_format(state, width)
    return tqdm.format_meter(state.num_done, state.num_total, 1.0, ncols=width, bar_format=text, ascii=True, postfix="")


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (160, "123/274  loss 1.203  accuracy 0.5610  lr 2.1e-03  1,234 samples/s  12s left, run 1:48 left"),
        (110, "123/274 loss 1.203 accuracy 0.5610 lr 2.1e-03 1,234/s eta 12s, run 1:48"),
        (90, "123/274 loss 1.203 accuracy 0.5610 lr 2.1e-03 eta 12s, run 1:48"),
        (80, "123/274 loss 1.203 accuracy 0.5610 eta 12s, run 1:48"),
        (65, "123/274 loss 1.203 eta 12s, run 1:48"),
        (45, "123/274 loss 1.203"),
        (35, "123/274"),
        (5, "123/274"),
    ],
)
def test_the_least_important_is_left_out_where_a_line_is_narrow(width, shown):
    assert bar_format(STATE, width) == f"epoch 3/12  45% |{{bar}}| {shown}{{postfix}}"


@pytest.mark.parametrize("width", range(30, 170))
def test_what_is_drawn_fits_into_the_line(width):
    line = drawn(STATE, width)
    assert len(line) <= width
    assert line.startswith("epoch 3/12  45% |")
    assert "123/274" in line


def test_there_is_no_bar_without_a_total():
    state = BarState("epoch 1/2", 7, None, {"loss": "1.203"})
    assert drawn(state, 80).rstrip() == "epoch 1/2 7 batches  loss 1.203"
    assert line_of(state) == "epoch 1/2  7 batches  loss 1.203"


def test_names_with_braces_are_shown_as_they_are():
    assert "{x} 1.0" in drawn(BarState("{a}", 1, 2, {"{x}": "1.0"}), 80)


def test_more_batches_than_the_length_says_are_shown():
    assert line_of(BarState("epoch 1/2", 9, 8)) == "epoch 1/2 100%  9/8"
