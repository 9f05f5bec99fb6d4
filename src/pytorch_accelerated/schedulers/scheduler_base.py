"""Base classes of schedulers: they keep the base values, count updates, and set new values on the optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated.exceptions import SchedulerSettingsError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pytorch_accelerated._types import ParameterGroup, StateDict


class SchedulerBase(ABC):
    """Sets one field of the optimizer's parameter groups as a function of the number of updates done.

    A subclass defines the values in :meth:`get_updated_values`. The caller passes the number of updates done to
    :meth:`step_update`. For a scheduler that counts updates itself, see :class:`StatefulSchedulerBase`.

    The base value of a parameter group is the value it has when the scheduler first sees it. The scheduler keeps it,
    and stores it in the group under ``initial_<field>``, as PyTorch's own schedulers do. If a group already has such an
    entry, from an earlier run with the same optimizer, that is its base value; to start from another value, change both
    the field and this entry. Groups added to the optimizer later are included from the next update on.

    A subclass with state of its own extends :meth:`state_dict` and :meth:`load_state_dict`. Settings do not belong in
    the state: they come from the constructor, so that a resumed run may be longer than the original one.

    Args:
        optimizer: The optimizer, or any object with ``param_groups``, such as an optimizer prepared by Accelerate.
        param_group_field: The field of the parameter groups to set.

    Raises:
        SchedulerSettingsError: A parameter group does not have that field.

    Example:
        >>> class Halving(SchedulerBase):
        ...     def get_updated_values(self, num_updates):
        ...         return [base / 2**num_updates for base in self.base_values]
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        >>> Halving(optimizer).step_update(3)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        self.optimizer = optimizer
        self.param_group_field = param_group_field
        self._initial_field = f"initial_{param_group_field}"
        self._base_values: list[float] = []
        self._add_new_groups()

    @property
    def base_values(self) -> list[float]:
        """The base value of each parameter group of the optimizer, in order."""
        self._add_new_groups()
        return self._base_values[: len(self.optimizer.param_groups)]

    @abstractmethod
    def get_updated_values(self, num_updates: int) -> Sequence[float] | float:
        """Return the values to use after ``num_updates`` updates.

        Args:
            num_updates: Updates done so far. The returned values apply to the update with this 0-based index.

        Returns:
            One value per parameter group, in order, or a single number for all groups.
        """

    def step_update(self, num_updates: int) -> None:
        """Set the values that apply after ``num_updates`` updates.

        Args:
            num_updates: Updates done so far.

        Raises:
            ValueError: The number of values from :meth:`get_updated_values` differs from the number of groups.
        """
        groups = self.optimizer.param_groups
        values = self.get_updated_values(num_updates)
        if isinstance(values, (int, float, Real)):  # `Real` includes numpy scalars
            values = [values] * len(groups)
        elif len(values) != len(groups):
            raise ValueError(
                f"`{type(self).__name__}.get_updated_values` returned {len(values)} values for {len(groups)} parameter "
                "groups. Expected one per group. Return a value for each entry of `self.base_values`, or a single "
                "number for all groups."
            )
        for group, value in zip(groups, values, strict=True):
            self._set_value(group, float(value))

    def state_dict(self) -> StateDict:
        """Return what changes during a run, as plain numbers, lists and strings."""
        return {"base_values": self.base_values}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the base values.

        Parameter groups beyond those in the state keep their own base values. Base values of groups that the optimizer
        does not have yet are kept for when those groups are added.

        Args:
            state_dict: What :meth:`state_dict` returned. Without base values in it, the current ones stay.
        """
        self._base_values = list(state_dict.get("base_values", self._base_values))
        for group, value in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group[self._initial_field] = value

    def _add_new_groups(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            if index < len(self._base_values):
                continue
            if self.param_group_field not in group:
                raise SchedulerSettingsError(
                    f"`param_group_field` is {self.param_group_field!r}, but parameter group {index} of the optimizer "
                    f"has no such field. Use one of its fields: {sorted(group.keys() - {'params'})}."
                )
            value = group.setdefault(self._initial_field, float(group[self.param_group_field]))
            self._base_values.append(float(value))

    def _set_value(self, group: ParameterGroup, value: float) -> None:
        present = group[self.param_group_field]
        if isinstance(present, torch.Tensor):
            present.fill_(value)  # a compiled or captured optimizer step reads this tensor object
        else:
            group[self.param_group_field] = value


class StatefulSchedulerBase(SchedulerBase):
    """A scheduler that counts updates itself, so that :meth:`step` needs no argument.

    The n-th call of :meth:`step` sets the values for ``n - 1`` updates done. Call it once before the first update, and
    again after each update; the trainer does both.

    Args:
        optimizer: The optimizer, or any object with ``param_groups``.
        param_group_field: The field of the parameter groups to set.

    Attributes:
        num_updates: The number of updates for which values were last set; -1 before the first step.
    """

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        super().__init__(optimizer, param_group_field)
        self.num_updates = -1

    def step(self) -> None:
        """Advance by one update, and set the values for it."""
        self.num_updates += 1
        self.step_update(self.num_updates)

    def state_dict(self) -> StateDict:
        """Return the position (``num_updates``) and the base values."""
        return {**super().state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, scheduler_state_dict: StateDict) -> None:
        """Restore the position and the base values, and set the values for that position.

        Args:
            scheduler_state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: The state contains no position.
        """
        if "num_updates" not in scheduler_state_dict:
            raise ValueError(
                f"The state passed to `{type(self).__name__}.load_state_dict` has no entry 'num_updates', only "
                f"{sorted(scheduler_state_dict)}. Expected a state saved by a scheduler of this library. Load such a "
                "state, or skip the scheduler with `load_scheduler=False`."
            )
        super().load_state_dict(scheduler_state_dict)
        self.num_updates = scheduler_state_dict["num_updates"]
        if self.num_updates >= 0:
            self.step_update(self.num_updates)


def interpolate(start: float, end: float, weight: float) -> float:
    """Interpolate linearly from ``start`` (``weight=0``) to ``end`` (``weight=1``); exact at both ends.

    Example:
        >>> interpolate(0.1, 0.5, 0.25)
        0.2
        >>> interpolate(1e-6, 0.1, 1.0)
        0.1
    """
    return (1 - weight) * start + weight * end


def check_number(
    name: str, value: object, meaning: str, *, is_zero_allowed: bool = True, maximum: float = math.inf
) -> None:
    """Raise unless a setting is a finite number from 0 to ``maximum``.

    Args:
        name: Name of the argument.
        value: Its value.
        meaning: What the setting is, with an article, for the message.
        is_zero_allowed: Whether 0 is allowed.
        maximum: Largest allowed number.

    Raises:
        TypeError: ``value`` is not a number, but a placeholder for example.
        SchedulerSettingsError: ``value`` is out of range.
    """
    if not isinstance(value, Real):
        raise TypeError(
            f"`{name}` is {value!r}, but {meaning} must be a number. Pass one. The trainer replaces placeholders only "
            "if it creates the scheduler itself, from a `create_scheduler_fn`."
        )
    number = float(value)
    is_large_enough = number >= 0 if is_zero_allowed else number > 0
    if not (math.isfinite(number) and is_large_enough and number <= maximum):
        lower = "of at least 0" if is_zero_allowed else "above 0"
        upper = "" if math.isinf(maximum) else f" and at most {maximum}"
        raise SchedulerSettingsError(
            f"`{name}` is {value!r}, but {meaning} must be a finite number {lower}{upper}. Change `{name}` where you "
            "create the scheduler."
        )


def check_rate(name: str, rate: float, base_values: Sequence[float]) -> None:
    """Raise unless the lower end of a schedule is a learning rate, and not above the base values of all groups.

    Args:
        name: Name of the argument.
        rate: Its value.
        base_values: The base values of the parameter groups, which are the upper ends of the schedule.

    Raises:
        TypeError: ``rate`` is not a number.
        SchedulerSettingsError: ``rate`` is negative, not finite, or above every base value.
    """
    check_number(name, rate, "a learning rate")
    if base_values and rate > max(base_values):
        raise SchedulerSettingsError(
            f"`{name}` is {rate!r}, but the initial learning rate of the optimizer, the upper end of the schedule, is "
            f"lower: {max(base_values)!r}. Lower `{name}`, or raise `lr` of the optimizer."
        )
