"""Reads the curves of metrics from a run history, from rows, or from a file that a run has written."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pytorch_accelerated._history.curves import Curve
from pytorch_accelerated._measuring.comparison import one_number
from pytorch_accelerated._types import MetricValue

if TYPE_CHECKING:
    from pytorch_accelerated.tracking import RunHistory

CurveSource: TypeAlias = (
    "RunHistory | str | os.PathLike[str] | Mapping[str, Sequence[MetricValue]] | Iterable[Mapping[str, Any]]"
)
"""What has the curves of a run.

A run history; a file of the format CSV or JSON Lines; a mapping from metrics to their values, one per epoch; or rows,
each a mapping with the columns ``epoch`` and ``update``, if known, and the metrics.
"""

_MOMENT = ("epoch", "update", "samples", "time")


def read_curves(source: CurveSource) -> dict[str, Curve]:
    """Return the curve of each metric that is recorded as single numbers, by the name it is recorded under.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has another format.
        TypeError: The source is of another type.
    """
    if isinstance(source, (str, os.PathLike)):
        return _curves_of_rows(_rows_of_file(Path(source)))
    to_rows = getattr(source, "to_rows", None)  # of a history that knows when each value was recorded
    if callable(to_rows):
        return _curves_of_rows(to_rows())
    if isinstance(source, Mapping):
        return _curves_of_series(source)
    if isinstance(source, Iterable):
        return _curves_of_rows(source)
    raise TypeError(
        f"The source of the curves is a {type(source).__name__}. Expected a run history, the path of a CSV or JSONL "
        "file, rows, or a mapping from metrics to their values."
    )


def _rows_of_file(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a file; a last line that is torn, because the run was killed, is left out."""
    read: dict[str, Callable[[str, Path], list[Mapping[str, Any]]]]
    read = {".csv": _rows_of_csv, ".jsonl": _rows_of_json_lines, ".ndjson": _rows_of_json_lines}
    if path.suffix.lower() not in read:
        raise ValueError(
            f"{os.fspath(path)!r} has the suffix {path.suffix!r}. Expected a file of the format CSV, with '.csv', or "
            "JSON Lines, with '.jsonl'. Rename the file, or pass its rows."
        )
    text = path.expanduser().read_text(encoding="utf-8", errors="replace")
    return read[path.suffix.lower()](text, path)


def _rows_of_csv(text: str, path: Path) -> list[Mapping[str, Any]]:
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


def _rows_of_json_lines(text: str, path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({row["metric"]: row["value"], **row} if "metric" in row and "value" in row else dict(row))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # without the end of a line, so the run was killed while it wrote
                break
            raise ValueError(
                f"Line {number} of {os.fspath(path)!r} is {line[:60]!r}. Expected an object of JSON, with the entries "
                "`metric` and `value`, or one for each metric."
            ) from error
    return rows


def _curves_of_series(series: Mapping[str, Sequence[MetricValue]]) -> dict[str, Curve]:
    """Return curves with a value per epoch. Evaluations within an epoch are left out."""
    curves: dict[str, Curve] = {}
    for name, values in series.items():
        numbers = [_as_float(value) for value in values]
        known = [number for number in numbers if number is not None]
        if known and len(known) == len(numbers) and name not in _MOMENT and "intermediate_" not in name:
            curves[name] = Curve([float(epoch) for epoch in range(1, len(known) + 1)], known)
    return curves


def _curves_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    rows = list(rows)
    per_epoch = _updates_per_epoch(rows)
    for index, row in enumerate(rows, start=1):
        epoch, update = _as_float(row.get("epoch")), _as_float(row.get("update"))
        for name, value in row.items():
            number = _as_float(value)
            if name in (None, *_MOMENT, "metric", "value") or number is None:
                continue
            curve = curves.setdefault(str(name), Curve([], []))
            is_within_epoch = "intermediate_" in str(name) or str(name).endswith("_step")
            if is_within_epoch and update is not None and per_epoch is not None:
                curve.epochs.append(update / per_epoch)
            else:
                curve.epochs.append(index if epoch is None else epoch)
            curve.values.append(number)
    return curves


def _updates_per_epoch(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the updates of an epoch, according to its last row of training; ``None`` if that is not known."""
    for row in reversed(rows):
        epoch, update = _as_float(row.get("epoch")), _as_float(row.get("update"))
        is_of_epoch = any(str(name).startswith("train_") and not str(name).endswith("_step") for name in row)
        if is_of_epoch and epoch and update:
            return update / epoch
    return None


def _as_float(value: MetricValue) -> float | None:
    """Return a single number as such, also if it is written as text; ``None`` for anything else."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    number = one_number(value)
    return None if number is None else float(number)
