"""The learning rates that a scheduler will set, found before training and without the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim import Optimizer

from pytorch_accelerated._arguments.numbers import check_positive_integer
from pytorch_accelerated._optimizers.checks import as_optimizer
from pytorch_accelerated._optimizers.group import OptimizerGroup, optimizers_in
from pytorch_accelerated._scheduling.group import members_of
from pytorch_accelerated._scheduling.start import create_checked_scheduler
from pytorch_accelerated._scheduling.stepping import StepRule, rule_of
from pytorch_accelerated.schedulers._placeholders import placeholders_of_lengths, resolve_placeholders

if TYPE_CHECKING:
    from pytorch_accelerated._scheduling.stepping import Interval
    from pytorch_accelerated._types import ParameterGroup, SchedulerFactory


class StandIn(Optimizer):
    """Has the settings of an optimizer, and no parameter of a model.

    Args:
        groups: The settings of each parameter group.
        defaults: The defaults of the optimizer, which some schedulers read.
    """

    def __init__(self, groups: Sequence[ParameterGroup], defaults: dict[str, Any]) -> None:
        super().__init__([{**group, "params": [torch.zeros(1)]} for group in groups], defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is called
        """Do nothing; schedulers of PyTorch expect that an optimizer is stepped before them."""


def learning_rates_of(
    create_scheduler_fn: SchedulerFactory,
    num_updates: int,
    num_epochs: int,
    optimizer: Any,
    lr: float,
    interval: Interval,
) -> np.ndarray:
    """Return the learning rate of each update and parameter group, shape ``(num_updates, num_groups)``.

    Args:
        create_scheduler_fn: Creates the scheduler, or several.
        num_updates: Updates in the run.
        num_epochs: Epochs in the run, over which the updates are divided evenly.
        optimizer: The optimizer, or several; ``None`` for one with a single parameter group.
        lr: The learning rate of that one.
        interval: When schedulers are stepped that take neither a metric nor an epoch.

    Raises:
        TypeError: A number is not an integer, or the function does not return a scheduler.
        ValueError: A number is below 1, or a scheduler is stepped with a metric.
    """
    check_positive_integer("num_updates", num_updates, "updates")
    check_positive_integer("num_epochs", num_epochs, "epochs")
    stand_in = stand_in_for(optimizer, lr)
    create: Any = resolve_placeholders(create_scheduler_fn, placeholders_of_lengths(num_epochs, num_updates))
    scheduler = create_checked_scheduler(
        lambda: create(stand_in), stand_in, is_of_function=True, is_stepped_by_trainer=True
    )
    rules = [rule_of(member) for member in members_of(scheduler)]
    _check_needs_no_metric(rules)
    per_epoch, rates = -(-num_updates // num_epochs), []
    for update in range(1, num_updates + 1):
        rates.append([float(group["lr"]) for group in stand_in.param_groups])
        for member in optimizers_in(stand_in).values():
            member.step()
        for rule in rules:
            _step(rule, update, interval, num_epochs_done=update // per_epoch if update % per_epoch == 0 else None)
    return np.array(rates)


def stand_in_for(optimizer: Any, lr: float) -> Any:
    """Return an optimizer without parameters of a model that has the settings of another one, or of several."""
    given = as_optimizer(optimizer)
    if given is None:
        settings = {"lr": lr, "momentum": 0.9, "weight_decay": 0.0}
        return StandIn([dict(settings)], settings)
    if isinstance(given, OptimizerGroup):
        members = {name: stand_in_for(member, lr) for name, member in given.items()}
        return OptimizerGroup(members if given.is_named else members.values())
    groups = [{key: value for key, value in group.items() if key != "params"} for group in given.param_groups]
    return StandIn(copy.deepcopy(groups), copy.deepcopy(given.defaults))


def _step(rule: StepRule, update: int, interval: Interval, num_epochs_done: int | None) -> None:
    if rule.counts_updates:
        rule.scheduler.step_update(num_updates=update)
    elif rule.is_plain and interval == "update":
        rule.scheduler.step()
    if num_epochs_done is None:
        return
    if not rule.is_plain:
        rule.step_epoch(num_epochs_done, None)
    elif interval == "epoch":
        rule.scheduler.step()


def _check_needs_no_metric(rules: Sequence[StepRule]) -> None:
    names = [type(rule.scheduler).__name__ for rule in rules if rule.needs_metric]
    if names:
        raise ValueError(
            f"The schedule of a {names[0]} depends on the values of a metric, so it is not known before training. Plot "
            "the other schedulers without it."
        )
