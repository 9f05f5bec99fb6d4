"""The values in a history, and how far they have been looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytorch_accelerated._types import MetricValue
    from pytorch_accelerated.tracking import RunHistory


class Seen(NamedTuple):
    """How far a metric has been looked at."""

    num_values: int
    newest: MetricValue


def series_of(history: RunHistory) -> dict[str, list[MetricValue]]:
    """Return all values of each metric that has any, oldest first."""
    series = {name: list(history.get_metric_values(name)) for name in history.get_metric_names()}
    return {name: values for name, values in series.items() if values}


def newest_of(series: Mapping[str, list[MetricValue]]) -> dict[str, Seen]:
    """Return what has been seen by someone who has looked at all values."""
    return {name: Seen(len(values), values[-1]) for name, values in series.items()}


def was_reset(series: Mapping[str, list[MetricValue]], seen: Mapping[str, Seen]) -> bool:
    """Return whether a history has lost values that were seen: one is missing, or another value is in its place."""
    return any(
        len(series[name]) < num_values or _differ(series[name][num_values - 1], newest)
        for name, (num_values, newest) in seen.items()
        if name in series
    )


def _differ(value: MetricValue, other: MetricValue) -> bool:
    """Return whether two values differ; other objects than numbers do unless they are the same object."""
    if value is other:
        return False
    are_numbers = isinstance(value, (int, float)) and isinstance(other, (int, float))
    return not are_numbers or (value != other and not (value != value and other != other))  # NaN is not itself
