"""The table of epochs, line by line: each row below a header that is printed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_GAP = 2  # characters between columns; the first of them is the place of the mark
_MIN_WIDTH = 5
_BEST = "*"


class Column(NamedTuple):
    """A column of the table, aligned to the right."""

    name: str
    width: int  # characters of its widest value


class Cell(NamedTuple):
    """A value in a row."""

    text: str
    is_best: bool = False
    width: int = 0  # characters to keep free for later values of the column


class _Placed(NamedTuple):
    """A column, and the lines of its header."""

    name: str
    header: tuple[str, ...]
    width: int


_Lines = list[list[_Placed]]
"""The columns of each line of a row."""


def table_lines(
    columns: Sequence[Column], row: Mapping[str, Cell], line_width: int
) -> tuple[tuple[Column, ...], list[str]]:
    r"""Return the lines to print for a row, with a header if that of the rows before does not fit it.

    Args:
        columns: The columns of the rows before; empty for the first row.
        row: The cells by the name of their column, in the order of the columns. A column that is not there stays empty.
        line_width: How many characters a line has. If the columns are too many, they go on in the next one, below
            the second column. The last word of their names goes below the others where this saves a line.

    Returns:
        The columns of this row, for the next one; and the lines.

    Example:
        >>> columns, lines = table_lines((), {"epoch": Cell("1/2"), "eval loss": Cell("2.179", is_best=True)}, 80)
        >>> print("\n".join(lines))
        epoch  eval loss
          1/2      2.179*
    """
    widths = {column.name: column.width for column in columns}
    for name, cell in row.items():
        widths[name] = max(widths.get(name, _MIN_WIDTH), len(cell.text), cell.width)
    fitted = tuple(Column(name, width) for name, width in widths.items())
    placed = _place(fitted, line_width)
    is_new = fitted != columns and (not columns or placed != _place(columns, line_width))
    return fitted, [*(_header_of(placed) if is_new else ()), *_row_of(placed, row)]


def _place(columns: Sequence[Column], line_width: int) -> _Lines:
    """Return the columns of each line."""
    plain = [_placed(column, (column.name,)) for column in columns]
    broken = [_placed(column, ("", *column.name.rsplit(" ", 1))[-2:]) for column in columns]
    return min(_wrap(plain, line_width), _wrap(broken, line_width), key=len)


def _placed(column: Column, header: tuple[str, ...]) -> _Placed:
    return _Placed(column.name, header, max(column.width, *map(len, header)))


def _wrap(columns: Sequence[_Placed], line_width: int) -> _Lines:
    """Spread columns over lines. Those after the first begin with an empty column, as wide as the first one."""
    groups: _Lines = [[]]
    for column in columns:
        if len(groups[-1]) > 1 and _length([*groups[-1], column]) > line_width:
            groups.append([columns[0]._replace(name="", header=("",) * len(column.header))])
        groups[-1].append(column)
    return groups


def _length(columns: Sequence[_Placed]) -> int:
    return sum(column.width + _GAP for column in columns) - 1  # the mark of the last one counts, the space does not


def _header_of(groups: _Lines) -> list[str]:
    num_lines = len(groups[0][0].header)
    titles = [[(Cell(each.header[number]), each) for each in group] for group in groups for number in range(num_lines)]
    return [line for line in map(_joined, titles) if line]


def _row_of(groups: _Lines, row: Mapping[str, Cell]) -> list[str]:
    lines = [_joined((row.get(each.name, Cell("")), each) for each in group) for group in groups]
    while not lines[-1]:
        lines.pop()
    return lines


def _joined(cells: Iterable[tuple[Cell, _Placed]]) -> str:
    texts = (cell.text.rjust(column.width) + (_BEST if cell.is_best else "").ljust(_GAP) for cell, column in cells)
    return "".join(texts).rstrip()
