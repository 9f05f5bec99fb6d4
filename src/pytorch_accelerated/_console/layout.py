"""The table of epochs, line by line: each row below a header that is printed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_GAP = 2  # characters between columns; the first of them is the place of the mark
_BEST = "*"


class Column(NamedTuple):
    """A column of the table, aligned to the right."""

    name: str
    width: int  # characters


class Cell(NamedTuple):
    """A value in a row."""

    text: str
    is_best: bool = False


def fit_columns(columns: Sequence[Column], row: Mapping[str, Cell], min_width: int = 5) -> tuple[Column, ...]:
    """Return the columns with those that a row adds at the end, each as wide as the row needs, and never narrower."""
    widths = {column.name: column.width for column in columns}
    for name, cell in row.items():
        widths[name] = max(widths.get(name, max(min_width, len(name))), len(cell.text))
    return tuple(Column(name, width) for name, width in widths.items())


def table_lines(
    columns: Sequence[Column], row: Mapping[str, Cell], line_width: int
) -> tuple[tuple[Column, ...], list[str]]:
    r"""Return the lines to print for a row, with a header if that of the rows before does not fit it.

    Args:
        columns: The columns of the rows before; empty for the first row.
        row: The cells by the name of their column, in the order of the columns. A column that is not there stays empty.
        line_width: How many characters a line has. Columns that are too many go on in the next one, below the second
            column.

    Returns:
        The columns of this row, for the next one; and the lines.

    Example:
        >>> columns, lines = table_lines((), {"epoch": Cell("1/2"), "eval loss": Cell("2.179", is_best=True)}, 80)
        >>> print("\n".join(lines))
        epoch  eval loss
          1/2      2.179*
    """
    fitted = fit_columns(columns, row)
    groups = _wrap(fitted, line_width)
    lines = [] if fitted == tuple(columns) else _lines({column.name: Cell(column.name) for column in fitted}, groups)
    return fitted, [*lines, *_lines(row, groups)]


def _wrap(columns: Iterable[Column], line_width: int) -> list[list[Column]]:
    """Return the columns of each line. Lines after the first begin with an empty column, as wide as the first one."""
    groups: list[list[Column]] = [[]]
    for column in columns:
        if len(groups[-1]) > 1 and _length([*groups[-1], column]) > line_width:
            groups.append([Column("", groups[0][0].width)])
        groups[-1].append(column)
    return groups


def _length(columns: Sequence[Column]) -> int:
    return sum(column.width + _GAP for column in columns) - 1  # the mark of the last one counts, the space does not


def _lines(row: Mapping[str, Cell], groups: Iterable[Iterable[Column]]) -> list[str]:
    return ["".join(_padded(row.get(column.name, Cell("")), column) for column in group).rstrip() for group in groups]


def _padded(cell: Cell, column: Column) -> str:
    return cell.text.rjust(column.width) + (_BEST if cell.is_best else "").ljust(_GAP)
