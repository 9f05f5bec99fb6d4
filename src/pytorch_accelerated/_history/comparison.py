"""Two run histories next to each other: what differs, and since when; several as one table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._history.log_file import LogFile
from pytorch_accelerated._history.records import Moment, Record, records_in
from pytorch_accelerated._history.tables import csv_lines, data_frame, html_table, plain_value, text_table

if TYPE_CHECKING:
    import os

    from pytorch_accelerated._types import MetricValue
    from pytorch_accelerated.tracking import RunHistory


@dataclass(frozen=True)
class FirstDifference:
    """The first value in which two runs differ.

    Args:
        metric: The first metric that differs.
        moments: When its values were recorded.
        values: The values.
    """

    metric: str
    moments: tuple[Moment, Moment]
    values: tuple[MetricValue, MetricValue]

    def __str__(self) -> str:
        places = [f"update {moment.update} of epoch {moment.epoch}" for moment in self.moments]
        place = places[0] if places[0] == places[1] else " and ".join(places)
        one, other = map(plain_value, self.values)
        return f"`{self.metric}` after {place}: {one} and {other}"


@dataclass(frozen=True)
class HistoryDiff:
    """What differs between two runs; printed as a list.

    Args:
        settings: The settings that differ, each with both values; ``None`` where a run does not have it.
        versions: The versions that differ: of packages and, as ``code``, of the program.
        first: Where the values that both runs have recorded part; ``None`` if they are equal.
        metrics: The metrics that only one of the runs has recorded, for both runs.
    """

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    versions: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    first: FirstDifference | None = None
    metrics: tuple[list[str], list[str]] = ([], [])

    def __bool__(self) -> bool:
        return bool(self.settings or self.versions or self.first or any(self.metrics))

    def __repr__(self) -> str:
        pairs = {**self.settings, **{f"version of {name}": pair for name, pair in self.versions.items()}}
        lines = [f"{name}: {one} and {other}" for name, (one, other) in pairs.items()]
        only = [f"only the {which} run has {', '.join(names)}" for which, names in self._named_metrics() if names]
        first = "the values are equal" if self.first is None else f"the first value that differs is {self.first}"
        return "\n".join([*lines, *only, first])

    def _named_metrics(self) -> Iterable[tuple[str, list[str]]]:
        return zip(("first", "second"), self.metrics, strict=True)


def diff(one: RunHistory, other: RunHistory) -> HistoryDiff:
    """Return what differs between two run histories."""
    infos = one.run_info, other.run_info
    series = _series_of(one), _series_of(other)
    return HistoryDiff(
        settings=_differing(*(info.get("settings", {}) for info in infos)),
        versions=_differing(*({**info.get("versions", {}), "code": info.get("code")} for info in infos)),
        first=_first_difference(*series),
        metrics=(sorted(series[0].keys() - series[1].keys()), sorted(series[1].keys() - series[0].keys())),
    )


def _series_of(history: RunHistory) -> dict[str, list[Record]]:
    series: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records_in(history, of_steps=True):
        series[record.name].append(record)
    return dict(series)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*one, *other])
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def _first_difference(
    one: Mapping[str, Sequence[Record]], other: Mapping[str, Sequence[Record]]
) -> FirstDifference | None:
    found = []
    for name in one.keys() & other.keys():
        pairs = zip(one[name], other[name], strict=False)  # a run may have ended earlier
        found += [pair for pair in [next((pair for pair in pairs if _differ(*pair)), None)] if pair is not None]
    if not found:
        return None
    first, second = min(found, key=lambda pair: (_first_update(pair), pair[0].name))
    return FirstDifference(first.name, (first.moment, second.moment), (first.value, second.value))


def _differ(one: Record, other: Record) -> bool:
    values = [repr(plain_value(record.value)) for record in (one, other)]  # two NaN are equal
    return values[0] != values[1] or one.moment[:2] != other.moment[:2]


def _first_update(pair: tuple[Record, Record]) -> float:
    return min(math.inf if record.moment.update is None else record.moment.update for record in pair)


# --- several -----------------------------------------------------------------------------------------------------


class RunTable:
    """A table of runs, one per row, as which it is printed and shown in a notebook.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Sequence[Mapping[str, MetricValue]]) -> None:
        self._rows = [dict(row) for row in rows]

    def to_rows(self) -> list[dict[str, MetricValue]]:
        """Return the rows as dictionaries: ``run``, the settings that differ, and the newest value of each metric."""
        return [dict(row) for row in self._rows]

    def to_pandas(self) -> Any:
        """Return the table as a `pandas.DataFrame`.

        Raises:
            ModuleNotFoundError: ``pandas`` is not installed; it comes with the extra ``pandas``.
        """
        return data_frame(self._rows)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a CSV file, which is replaced as a whole; missing folders are created."""
        LogFile(path, identity=len).replace(csv_lines(self._rows))

    def __repr__(self) -> str:
        return text_table(self._rows)

    def _repr_html_(self) -> str:
        return html_table(self._rows, f"{len(self._rows)} runs")


def compare_named(histories: Mapping[str, RunHistory]) -> RunTable:
    """Return a table of several runs, by name."""
    settings = [history.run_info.get("settings", {}) for history in histories.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if len({repr(each.get(name)) for each in settings}) > 1]
    rows = []
    for (run, history), own in zip(histories.items(), settings, strict=True):
        records = list(records_in(history))
        newest = {record.name: record.value for record in records}
        row = {"run": run, **{name: own.get(name) for name in differing}, **_extent(records)}
        rows.append({**row, **{f"{name} (metric)" if name in row else name: newest[name] for name in sorted(newest)}})
    return RunTable(rows)


def _extent(records: Sequence[Record]) -> dict[str, MetricValue]:
    updates = [record.moment.update for record in records if record.moment.update is not None]
    times = [record.moment.time for record in records if record.moment.time is not None]
    return {"updates": max(updates, default=None), "seconds": max(times) - min(times) if times else None}
