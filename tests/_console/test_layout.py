"""The table of epochs, line by line."""

from __future__ import annotations

import pytest

from pytorch_accelerated._console.layout import Cell, table_lines

ROW = {
    "epoch": Cell("3/12"),
    "time": Cell("12.4s"),
    "eta": Cell("1:48"),
    "lr": Cell("2.1e-03"),
    "train loss": Cell("1.203", is_best=True),
    "train accuracy": Cell("0.5610"),
    "eval loss": Cell("2.179"),
    "eval accuracy": Cell("0.1660"),
}


def printed(*rows, line_width=120):
    columns, lines = (), []
    for row in rows:
        columns, new_lines = table_lines(columns, row, line_width)
        lines += new_lines
    return lines


def test_rows_are_aligned_below_a_header_that_is_printed_once():
    second = {**ROW, "epoch": Cell("4/12"), "train loss": Cell("10.31"), "eval loss": Cell("1.979", is_best=True)}
    assert printed(ROW, second) == [
        "epoch   time    eta       lr  train loss  train accuracy  eval loss  eval accuracy",
        " 3/12  12.4s   1:48  2.1e-03       1.203*         0.5610      2.179         0.1660",
        " 4/12  12.4s   1:48  2.1e-03       10.31          0.5610      1.979*        0.1660",
    ]


def test_a_column_that_appears_late_brings_a_new_header():
    first, late = {"epoch": Cell("1/2")}, {"epoch": Cell("2/2"), "f1": Cell("0.5000")}
    assert printed(first, late, first) == ["epoch", "  1/2", "epoch      f1", "  2/2  0.5000", "  1/2"]


def test_a_value_wider_than_its_column_brings_a_new_header():
    lines = printed({"loss": Cell("1.203")}, {"loss": Cell("1.203e-05")}, {"loss": Cell("1.203")})
    assert lines == [" loss", "1.203", "     loss", "1.203e-05", "    1.203"]


def test_names_are_broken_first_where_the_screen_is_narrow():
    assert printed(ROW, ROW, line_width=80) == [
        "                              train     train   eval      eval",
        "epoch   time    eta       lr   loss  accuracy   loss  accuracy",
        *[" 3/12  12.4s   1:48  2.1e-03  1.203*   0.5610  2.179    0.1660"] * 2,
    ]


@pytest.mark.parametrize("line_width", range(25, 100))
def test_columns_that_are_too_many_wrap_within_the_width_and_lose_nothing(line_width):
    header, rows = printed(ROW, line_width=line_width), printed(ROW, ROW, line_width=line_width)
    num_lines = len(rows) - len(header)
    values, header = rows[-num_lines:], header[:-num_lines]
    assert max(map(len, rows)) <= line_width
    assert sorted(" ".join(header).split()) == sorted(" ".join(ROW).split())
    assert " ".join(values).replace("*", "").split() == [cell.text for cell in ROW.values()]
    assert all(line.startswith(" " * 5) for line in values[1:])


def test_a_column_wider_than_the_line_has_a_line_of_its_own():
    assert printed({"epoch": Cell("1"), "x" * 30: Cell("2"), "y": Cell("3")}, line_width=20) == [
        "epoch  " + "x" * 30,
        " " * 5 + "  " + "    y",
        "    1  " + "2".rjust(30),
        " " * 5 + "  " + "    3",
    ]
