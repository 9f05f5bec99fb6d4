"""The start of a run: its scheduler is created and checked, and it is known how it will be stepped."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._messages import warn
from pytorch_accelerated._scheduling.checks import (
    check_scheduler,
    check_step_scheduler,
    check_stepping,
    choose_metric,
    explain_failure,
    warn_about_mode,
)
from pytorch_accelerated._scheduling.group import as_group, start_counting
from pytorch_accelerated._scheduling.lengths import warn_about_length
from pytorch_accelerated._scheduling.stepping import Interval, SchedulerStepping, read_metric

if TYPE_CHECKING:
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.tracking import RunHistory


def choose_stepping(step_scheduler: Interval | None, scheduler_metric: str | None) -> SchedulerStepping:
    """Return how the schedulers of a run are stepped, according to the arguments of `train`.

    Raises:
        ValueError: ``step_scheduler`` is not one of the intervals.
        TypeError: ``scheduler_metric`` is not a name.
    """
    check_step_scheduler(step_scheduler, scheduler_metric)
    return SchedulerStepping(step_scheduler, scheduler_metric)


def create_checked_scheduler(
    create: Callable[[], object], optimizer: object, *, is_of_function: bool, is_stepped_by_trainer: bool
) -> Any:
    """Create the scheduler of a run, or a group of several; ``None`` if there is none.

    Args:
        create: The trainer's `create_scheduler`.
        optimizer: The optimizer of the run.
        is_of_function: Whether it calls the function that was given to `train`.
        is_stepped_by_trainer: Whether `scheduler_step` is not overridden.

    Raises:
        TypeError: The result is not a scheduler, or contains a placeholder.
        ValueError: It belongs to another optimizer.
    """
    with explain_failure(is_of_function):
        scheduler = as_group(create(), is_stepped_by_trainer=is_stepped_by_trainer)
    check_scheduler(scheduler, optimizer, is_of_function=is_of_function, is_stepped_by_trainer=is_stepped_by_trainer)
    start_counting(scheduler)
    return scheduler


def start_stepping(
    stepping: SchedulerStepping, config: TrainerRunConfig, history: RunHistory, eval_names: Collection[str]
) -> None:
    """Check that the planned steps are possible, and choose their metric. Must be called on every process.

    Args:
        stepping: How the schedulers of the run are stepped.
        config: The configuration of the run.
        history: Its history, which may have metrics of earlier runs.
        eval_names: The names of the evaluation datasets; ``""`` for a single one.

    Raises:
        TypeError: The `step` of a scheduler requires arguments that nobody can supply.
        ValueError: The interval or the metric does not fit the scheduler, or the run does not record the metric.
    """
    check_stepping(stepping)
    stepping.metric_name = choose_metric(stepping, eval_names)
    warn_about_mode(stepping)
    warn_about_length(stepping, config)
    if stepping.metric_name is not None:
        stepping.num_values_before, _ = read_metric(history, config, stepping.metric_name)


def warn_about_no_scheduler(stepping: SchedulerStepping) -> None:
    """Warn about arguments of `train` that say how the scheduler is stepped, in a run that has none."""
    given = {"step_scheduler": stepping.requested_interval is not None, "scheduler_metric": stepping.is_metric_given}
    names = [f"`{name}`" for name, is_given in given.items() if is_given]
    if names:
        has = "has" if len(names) == 1 else "have"
        warn(f"{' and '.join(names)} {has} no effect, because the run has no scheduler. Pass `create_scheduler_fn`.")
