"""Rows of a run history as text, HTML, CSV and a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._history.records import columns_of
from pytorch_accelerated._measuring.comparison import one_number

if TYPE_CHECKING:
    from pytorch_accelerated._types import MetricValue, StateDict

    Row = Mapping[str, MetricValue]

_MAX_ROWS_SHOWN = 30
_MAX_TEXT_LENGTH = 200


def plain_value(value: MetricValue) -> int | float | str:
    """Return a single number as such, anything else as a short text of one line."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = one_number(value)
    return " ".join(str(value).split())[:_MAX_TEXT_LENGTH] if number is None else float(number)


def text_table(rows: Sequence[Row]) -> str:
    """Return an aligned table with four significant digits. The time is in seconds since the first row.

    Example:
        >>> print(text_table([{"epoch": 1, "update": 10, "samples": 80, "time": 7.0, "loss": 0.123456}]))
        epoch  update  samples  time    loss
            1      10       80  0.0s  0.1235
    """
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def html_table(rows: Sequence[Row], title: str) -> str:
    """Return the same table as HTML, under a title."""
    import html  # imported here, because importing the package loads nothing that is not needed

    header, *body = [[html.escape(cell) for cell in line] for line in _cells(rows)]
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in body)
    caption = f"<caption>{html.escape(title)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def csv_lines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a CSV file: a header, then the rows. A cell is empty where nothing was recorded.

    Numbers have all their digits.
    """
    columns = columns_of(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_csv_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue().splitlines()


def data_frame(rows: Sequence[Row]) -> Any:
    """Return the rows as a `pandas.DataFrame`.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`to_pandas` needs the package `pandas`. Install it with `pip install 'pytorch-accelerated[pandas]'`, or "
            "use `to_rows` or `to_csv`.",
            name=error.name,
        ) from error
    values: list[StateDict] = [{name: _frame_cell(value) for name, value in row.items()} for row in rows]
    return pd.DataFrame(values, columns=columns_of(rows))


def _csv_cell(value: MetricValue) -> int | float | str:
    return "" if value is None else plain_value(value)


def _frame_cell(value: MetricValue) -> MetricValue:
    number = one_number(value)
    return value if number is None or isinstance(value, int) else float(number)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the texts of header and rows; of many rows, the first and the last ones."""
    columns = columns_of(rows)
    times = [row["time"] for row in rows if row.get("time") is not None]
    start = times[0] if times else 0.0
    shown = [[_cell(column, row.get(column), start) for column in columns] for row in rows]
    if len(shown) > _MAX_ROWS_SHOWN:
        half = _MAX_ROWS_SHOWN // 2
        shown[half:-half] = [["..."] * len(columns)]
    return [columns, *shown]


def _cell(column: str, value: MetricValue, start: float) -> str:
    if value is None:
        return ""
    if column == "time":
        return f"{value - start:.1f}s"
    plain = plain_value(value)
    return f"{plain:.4g}" if isinstance(plain, float) else str(plain)
