"""Checks of what a user gives as a scheduler, made before training starts, with messages that say what to do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from pytorch_accelerated._arguments.parts import describe
from pytorch_accelerated._checkpoint.scheduler_state import schedulers_in
from pytorch_accelerated._messages import warn
from pytorch_accelerated._scheduling.group import members_of
from pytorch_accelerated._scheduling.stepping import SchedulerStepping
from pytorch_accelerated.exceptions import add_note
from pytorch_accelerated.schedulers._placeholders import find_placeholder

_EXAMPLE = "Pass `functools.partial(StepLR, step_size=10)`, for example"

_FOREIGN_INTERVALS = {
    **dict.fromkeys(("epochs", "each_epoch", "per_epoch"), "epoch"),
    **dict.fromkeys(("updates", "step", "steps", "batch", "iteration", "optimizer_step", "per_update"), "update"),
}
_FOREIGN_METRICS = {
    **dict.fromkeys(("val_loss", "valid_loss", "validation_loss", "eval_loss"), "eval_loss_epoch"),
    **dict.fromkeys(("loss", "train_loss", "training_loss"), "train_loss_epoch"),
}


# --- arguments of `train` ----------------------------------------------------------------------------------------


def check_step_scheduler(step_scheduler: object, scheduler_metric: object) -> None:
    """Raise unless the arguments that say when a scheduler is stepped are valid.

    Raises:
        ValueError: ``step_scheduler`` is not one of the intervals.
        TypeError: ``scheduler_metric`` is not a name.
    """
    if step_scheduler not in (None, "update", "epoch"):
        meant = _FOREIGN_INTERVALS.get(step_scheduler) if isinstance(step_scheduler, str) else None
        remedy = "" if meant is None else f' Pass `step_scheduler="{meant}"`.'
        raise ValueError(
            f'`step_scheduler` is {step_scheduler!r}. Expected "update", to step the scheduler after each update, or '
            f'"epoch", to step it at the end of each epoch.{remedy}'
        )
    if scheduler_metric is not None and (not isinstance(scheduler_metric, str) or not scheduler_metric):
        raise TypeError(
            f"`scheduler_metric` is {scheduler_metric!r}. Expected the name of a metric in the run history, such as "
            '"eval_loss_epoch".'
        )


def check_create_scheduler_fn(create_scheduler_fn: object) -> None:
    """Raise unless ``create_scheduler_fn`` is ``None`` or a function that could create a scheduler.

    Raises:
        TypeError: It is a scheduler, not callable, or does not take the optimizer alone.
    """
    if create_scheduler_fn is None:
        return
    is_scheduler = not inspect.isclass(create_scheduler_fn) and hasattr(create_scheduler_fn, "optimizer")
    if callable(create_scheduler_fn) and not is_scheduler:
        _check_takes_optimizer(create_scheduler_fn)
        return
    name = type(create_scheduler_fn).__name__
    remedy = f"Pass `lambda optimizer: {name}(optimizer, ...)` or `functools.partial({name}, ...)`, for example."
    if not is_scheduler:
        remedy = f"{_EXAMPLE}, or `CosineLrScheduler.create_scheduler_fn()` of `pytorch_accelerated.schedulers`."
    shown = f"{create_scheduler_fn!r}, of type str" if isinstance(create_scheduler_fn, str) else f"of type {name}"
    raise TypeError(
        f"`create_scheduler_fn` is {'a scheduler ' if is_scheduler else ''}{shown}. Expected a function that takes the "
        f"optimizer and returns a scheduler, because the trainer prepares the optimizer first. {remedy}"
    )


def _check_takes_optimizer(create_scheduler_fn: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(create_scheduler_fn, follow_wrapped=False)
    except (TypeError, ValueError):  # it has none, as some functions written in C
        return
    try:
        signature.bind(None)
    except TypeError as error:
        function = getattr(create_scheduler_fn, "func", create_scheduler_fn)  # of a `functools.partial`
        name = getattr(function, "__name__", type(function).__name__)
        remedy = "Pass `lambda optimizer: ...`, or bind the other arguments with `functools.partial`."
        if hasattr(function, "create_scheduler_fn"):
            remedy = f"Pass `{name}.create_scheduler_fn()`, which fills in the lengths of the run, or bind the other "
            remedy += "arguments with `functools.partial`."
        raise TypeError(
            f"`create_scheduler_fn` is `{name}{signature}`, which cannot be called with the optimizer alone ({error}). "
            f"Expected a function that takes the optimizer and returns a scheduler. {remedy}"
        ) from error


# --- what the function returned ----------------------------------------------------------------------------------


@contextmanager
def explain_failure(is_of_function: bool) -> Iterator[None]:
    """If the body, which may call ``create_scheduler_fn``, raises an error, add a note that says so."""
    try:
        yield
    except Exception as error:
        if is_of_function:
            add_note(error, "This happened in `create_scheduler_fn`, which `train` calls with the optimizer.")
        raise


def check_scheduler(scheduler: object, optimizer: object, *, is_of_function: bool, is_stepped_by_trainer: bool) -> None:
    """Raise unless the trainer can step what was returned as a scheduler, or as a group; warn if nothing was returned.

    Args:
        scheduler: What `create_scheduler`, or the function given to `train`, returned.
        optimizer: The optimizer of the run.
        is_of_function: Whether the function given to `train` returned it.
        is_stepped_by_trainer: Whether `scheduler_step` is not overridden.

    Raises:
        TypeError: It is not a scheduler, or contains a placeholder that the trainer cannot replace.
        ValueError: It belongs to another optimizer.
    """
    if scheduler is None and is_of_function:
        warn(
            "`create_scheduler_fn` returned None, so the learning rate stays as it is. Expected a scheduler for the "
            "optimizer that it is called with. Add the missing `return`, or leave `create_scheduler_fn` out to train "
            "without a scheduler.",
        )
    members = members_of(scheduler)
    for member in members:
        _check_is_scheduler(member, is_stepped_by_trainer, returned=scheduler)
    _check_no_placeholder(members, optimizer)
    if is_of_function and members and not any(_belongs_to(member, optimizer) for member in members):
        raise ValueError(
            f"`create_scheduler_fn` returned a `{type(members[0]).__name__}` of another optimizer than that of the "
            "trainer, whose learning rates it would leave as they are. Create the scheduler for the optimizer that the "
            "function is called with: `lambda optimizer: StepLR(optimizer, step_size=10)`."
        )


def _check_is_scheduler(scheduler: object, is_stepped_by_trainer: bool, returned: Any) -> None:
    is_steppable = callable(getattr(scheduler, "step", None)) or callable(getattr(scheduler, "step_update", None))
    is_instance = not inspect.isclass(scheduler) and not isinstance(scheduler, Optimizer)
    if scheduler is not None and (is_steppable or not is_stepped_by_trainer) and is_instance:
        return
    where = "" if returned is scheduler else f" in a group of {len(members_of(returned))} schedulers"
    remedy = "Return, for example, `StepLR(optimizer, step_size=10)`, or a list of schedulers."
    if isinstance(scheduler, functools.partial):
        remedy = (
            "Call it with the optimizer first. The methods `create_scheduler_fn` are called where they are passed: "
        )
        remedy += f"`{getattr(scheduler.func, '__name__', 'CosineLrScheduler')}.create_scheduler_fn()`."
    elif where and "scheduler" in list(returned):  # as in Lightning
        remedy = "Return the scheduler alone, and pass `step_scheduler` and `scheduler_metric` to `train`."
    raise TypeError(
        f"`create_scheduler_fn`, or `create_scheduler`, returned {describe(scheduler)}{where}. Expected a scheduler "
        f"for the optimizer that it is called with. {remedy}"
    )


def _check_no_placeholder(schedulers: Collection[object], optimizer: object) -> None:
    for scheduler in schedulers:
        settings = [vars(part) for part in (scheduler, *schedulers_in(scheduler)) if hasattr(part, "__dict__")]
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in getattr(optimizer, "param_groups", ())
        ]
        found = find_placeholder([*settings, *groups])
        if found is not None:
            raise TypeError(
                f"`{type(scheduler).__name__}` was created with `{found!r}` instead of a number. The trainer replaces "
                "placeholders in the arguments of a `functools.partial` only. Pass "
                f"`functools.partial({type(scheduler).__name__}, ...)` as `create_scheduler_fn` instead of a function "
                "that contains them."
            )


def _belongs_to(scheduler: Any, optimizer: Any) -> bool:
    """Tell whether a scheduler sets the rates of an optimizer, as far as that can be known."""
    own = getattr(scheduler, "optimizer", None)
    if own is None or own is optimizer:
        return True
    own_groups, groups = (getattr(each, "param_groups", None) for each in (own, optimizer))
    if not own_groups or not groups:
        return True
    identities = {id(group) for group in groups}
    return any(id(group) in identities for group in own_groups)


# --- when it is stepped, and with what ---------------------------------------------------------------------------


def check_stepping(stepping: SchedulerStepping) -> None:
    """Raise unless the schedulers can be stepped at the interval that was asked for, with what the trainer knows.

    Raises:
        TypeError: The `step` of a scheduler requires arguments that nobody can supply.
        ValueError: A scheduler that takes a metric was asked to be stepped after each update, or a metric was named
            for one that takes none.
    """
    for rule in stepping.rules:
        name = type(rule.scheduler).__name__
        if rule.unknown:
            raise TypeError(
                f"`{name}.step` requires {_listed(rule.unknown)}, which the trainer does not know how to supply. It "
                "steps a scheduler without arguments, or passes a metric as `metric` and the number of epochs done as "
                "`epoch`. Rename the arguments, or override `scheduler_step` in a subclass of the Trainer."
            )
        if rule.needs_metric and rule.epoch is None and stepping.requested_interval == "update":
            raise ValueError(
                f'`step_scheduler` is "update", but `{name}` takes a metric, which is known at the end of an epoch. '
                "Leave `step_scheduler` out: the trainer steps such a scheduler after the evaluation of each epoch."
            )
    if stepping.rules and stepping.metric_name is not None and not any(rule.metric for rule in stepping.rules):
        names = _listed([type(rule.scheduler).__name__ for rule in stepping.rules])
        raise ValueError(
            f"`scheduler_metric` is {stepping.metric_name!r}, but {names} takes no metric. Leave `scheduler_metric` "
            "out, or use a scheduler such as `ReduceLROnPlateau`."
        )


def choose_metric(stepping: SchedulerStepping, eval_names: Collection[str]) -> str | None:
    """Return the name of the metric that the schedulers are stepped with; ``None`` for none.

    By default it is the evaluation loss, or the training loss if the run has no evaluation data.

    Args:
        stepping: How the schedulers are stepped.
        eval_names: The names of the evaluation datasets; ``""`` for a single one.

    Raises:
        ValueError: The run will not record the metric, or it is not clear which one is meant.
    """
    watching = [rule for rule in stepping.rules if rule.metric is not None]
    if not watching:
        return None
    scheduler_name = type(next((rule for rule in watching if rule.needs_metric), watching[0]).scheduler).__name__
    losses = [f"{name}_eval_loss_epoch" if name else "eval_loss_epoch" for name in eval_names]
    if stepping.metric_name is not None:
        _check_is_recorded(stepping.metric_name, losses, scheduler_name)
        return stepping.metric_name
    if len(losses) > 1 and stepping.needs_metric:
        raise ValueError(
            f"`{scheduler_name}` is stepped with a metric, but there are several evaluation datasets, and each has its "
            f"own loss. Pass `scheduler_metric`, as one of {sorted(losses)} for example."
        )
    return [*losses, "train_loss_epoch"][0] if len(losses) < 2 else None


def _check_is_recorded(metric_name: str, losses: list[str], scheduler_name: str) -> None:
    start = f"`scheduler_metric` is {metric_name!r}, but"
    if metric_name == "eval_loss_epoch" and losses and metric_name not in losses:
        raise ValueError(
            f"{start} there are several evaluation datasets, and the loss of each is recorded with its name in front. "
            f"Pass one of {sorted(losses)}."
        )
    if not losses and metric_name.startswith("eval_"):
        raise ValueError(
            f"{start} `train` was called without `eval_dataset`, so the run does not evaluate. Pass an `eval_dataset`, "
            f'or step `{scheduler_name}` with another metric: `scheduler_metric="train_loss_epoch"`.'
        )
    meant = _FOREIGN_METRICS.get(metric_name)
    if meant is not None:
        warn(
            f"{start} the library does not record a metric of this name. Unless a callback of yours does, pass "
            f'`scheduler_metric="{meant}"`.',
        )


def warn_about_mode(stepping: SchedulerStepping) -> None:
    """Warn if a scheduler looks for the largest value of a loss, or for the smallest one of an accuracy."""
    words = set((stepping.metric_name or "").lower().split("_"))
    for rule in stepping.rules if stepping.metric_name else ():
        modes = [getattr(part, "mode", None) for part in (rule.scheduler, *schedulers_in(rule.scheduler))]
        meant = "min" if "loss" in words else "max" if words & {"acc", "accuracy", "auc", "f1", "iou", "map"} else None
        mode = next((mode for mode in modes if mode in ("min", "max")), None)
        if rule.needs_metric and None not in (meant, mode) and mode != meant:
            warn(
                f"`{type(rule.scheduler).__name__}` has `mode={mode!r}`, so it waits for {stepping.metric_name!r} to "
                f"{'rise' if mode == 'max' else 'fall'}. Create it with `mode={meant!r}`, or pass another "
                "`scheduler_metric`.",
            )


def _listed(names: Collection[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
