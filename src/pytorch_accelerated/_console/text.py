"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def format_size(size: float) -> str:
    """Return a number of bytes with three digits and a unit.

    Example:
        >>> format_size(4_936)
        '4.94 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def counted(number: int, what: str) -> str:
    """Return a number of things, of which there may be one.

    Example:
        >>> counted(1, "row"), counted(2, "row")
        ('1 row', '2 rows')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def all_done(number: int, what: str) -> str:
    """Return that a number of things is done.

    Example:
        >>> all_done(1, "epoch"), all_done(2, "epoch")
        ('1 epoch is done', '2 epochs are done')
    """
    return f"{counted(number, what)} {'is' if number == 1 else 'are'} done"


def align(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Return the lines of a table.

    Args:
        rows: The cells of each line.
        right: The indices of the columns that are aligned to the right.
        gap: What is between two columns.

    Example:
        >>> align([["layer", "size"], ["head", "8 B"]], right=[1])
        ['layer  size', 'head    8 B']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
