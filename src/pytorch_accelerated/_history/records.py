"""Records: the values of metrics, each with the moment it was recorded at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from typing import TYPE_CHECKING, NamedTuple

from pytorch_accelerated._types import MetricValue, StateDict

if TYPE_CHECKING:
    from pytorch_accelerated.tracking import RunHistory


class Moment(NamedTuple):
    """When a value was recorded; each part is ``None`` if it is not known."""

    epoch: int | None = None
    """The number of the epoch, from 1; 0 before training."""

    update: int | None = None
    """Updates since the start of training."""

    samples: int | None = None
    """Samples that entered an update since the start of training, over all processes."""

    time: float | None = None
    """Seconds since 1970-01-01, UTC."""


UNKNOWN = Moment()


class Record(NamedTuple):
    """One value of a metric."""

    name: str
    value: MetricValue
    moment: Moment = UNKNOWN
    is_of_step: bool = False
    """Whether it is a value of steps, recorded every few updates, and not one of a whole pass over the data."""


def records_of(
    series: Mapping[str, Sequence[MetricValue]], moments: Sequence[tuple[str, Moment]] = ()
) -> Iterator[Record]:
    """Yield all values in the order in which they were recorded, those without a moment first.

    Args:
        series: The values of each metric, oldest first.
        moments: Name and moment of each record, in order. A metric may have more values than moments: the first ones
            have none.

    Example:
        >>> moment = Moment(epoch=1, update=10)
        >>> records = records_of({"a": [1, 2], "b": [3]}, [("b", moment), ("a", moment)])
        >>> [(record.name, record.value) for record in records]
        [('a', 1), ('b', 3), ('a', 2)]
    """
    num_moments = Counter(name for name, _ in moments)
    next_index = {name: len(values) - num_moments[name] for name, values in series.items()}
    for index in range(max(next_index.values(), default=0)):
        yield from (Record(name, series[name][index]) for name, num in sorted(next_index.items()) if index < num)
    for name, moment in moments:
        index = next_index.get(name, -1)
        if name in series and index >= 0:
            yield Record(name, series[name][index], moment)
        next_index[name] = index + 1


def rows_of(records: Iterable[Record]) -> list[StateDict]:
    """Return one row for each moment at which something was recorded: the parts of the moment, then the metrics.

    Records of the same epoch and update share a row, unless one of them would take the place of another. The time is
    that of the first one.

    Example:
        >>> moment = Moment(epoch=1, update=10, samples=80, time=0.5)
        >>> rows_of([Record("train_loss_epoch", 0.7, moment), Record("eval_loss_epoch", 0.9, moment)])
        [{'epoch': 1, 'update': 10, 'samples': 80, 'time': 0.5, 'train_loss_epoch': 0.7, 'eval_loss_epoch': 0.9}]
    """
    rows: list[StateDict] = []
    for name, value, moment, _ in records:
        column = f"{name} (metric)" if name in Moment._fields else name
        row = rows[-1] if rows else None
        if row is None or column in row or (row["epoch"], row["update"]) != moment[:2]:
            row = moment._asdict()
            rows.append(row)
        row[column] = value
    return rows


def columns_of(rows: Iterable[Mapping[str, MetricValue]]) -> list[str]:
    """Return the columns of rows in the order of their first appearance; without rows, the parts of a moment."""
    return list(dict.fromkeys(column for row in rows for column in row)) or list(Moment._fields)


def with_steps(records: Iterable[Record], of_steps: Iterable[Record]) -> Iterator[Record]:
    """Yield the records of passes and of steps, in the order of time."""
    return merge(records, of_steps, key=lambda record: record.moment.time or 0.0)


def records_in(history: RunHistory, *, of_steps: bool = False) -> Iterator[Record]:
    """Yield all values in a history, oldest first, with their moments if they are known.

    Args:
        history: The history.
        of_steps: Whether to include those of steps.
    """
    return history._iter_records(of_steps=of_steps)  # noqa: SLF001 - a subclass of the user's may have any public name


def num_recorded(history: RunHistory) -> dict[str, int]:
    """Return how many values of each metric there are in a history."""
    return dict(Counter(record.name for record in records_in(history)))


def records_since(history: RunHistory, num_before: Mapping[str, int]) -> Iterator[Record]:
    """Yield what was recorded since `num_recorded` returned ``num_before``, oldest first."""
    num_values = Counter[str]()
    for record in records_in(history):
        num_values[record.name] += 1
        if num_values[record.name] > num_before.get(record.name, 0):
            yield record


def metrics_of_evaluation(records: Iterable[Record], prefix: str, dataset_names: Iterable[str]) -> StateDict:
    """Return what an evaluation recorded, by plain names.

    Args:
        records: The records.
        prefix: What is in front of the names that are recorded in an evaluation.
        dataset_names: The names of the datasets, if there are several. Each gets a dictionary of its own.

    Example:
        >>> records = [Record("easy_evaluation_loss", 0.5), Record("hard_evaluation_loss", 2.0)]
        >>> metrics_of_evaluation(records, "evaluation_", ["easy", "hard"])
        {'easy': {'loss': 0.5}, 'hard': {'loss': 2.0}}
        >>> metrics_of_evaluation([Record("evaluation_accuracy", 0.75)], "evaluation_", [])
        {'accuracy': 0.75}
    """
    longest_first = sorted(dataset_names, key=len, reverse=True)
    metrics: dict[str, MetricValue] = {name: {} for name in dataset_names}
    for record in records:
        dataset_name = next((name for name in longest_first if record.name.startswith(f"{name}_")), None)
        own = metrics if dataset_name is None else metrics[dataset_name]
        name = record.name if dataset_name is None else record.name[len(dataset_name) + 1 :]
        own[name.replace(prefix, "", 1)] = record.value
    return metrics
