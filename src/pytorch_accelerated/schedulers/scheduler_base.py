"""What every scheduler does: keep the initial values, count updates, and set new values on the optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from pytorch_accelerated.exceptions import SchedulerSettingsError

if TYPE_CHECKING:
    from torch.optim import Optimizer


class SchedulerBase(ABC):
    """Sets one field of the optimizer's parameter groups as a function of the number of updates done.

    A subclass says what the values are, in :meth:`get_updated_values`; the caller says how many updates have
    been done, in :meth:`step_update`. Where the scheduler should count by itself, see
    :class:`StatefulSchedulerBase`.

    The value that a parameter group has when the scheduler first sees it is its base value. It is kept here,
    and also in the group under ``initial_<field>``, as PyTorch's own schedulers do it. A group that already
    has such an entry (from an earlier run with the same optimizer) goes on with it; change both to start from
    another value. Groups added to the optimizer later are taken up at the next update.

    A subclass with memory of its own extends :meth:`state_dict` and :meth:`load_state_dict`. Settings do not
    belong there: they come from the constructor, so that a resumed run may be longer than the first one.

    Args:
        optimizer: The optimizer, or anything else with ``param_groups``, such as one prepared by Accelerate.
        param_group_field: The field of the parameter groups to set.

    Raises:
        SchedulerSettingsError: If a parameter group does not have that field.

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
        self._take_up_new_groups()

    @property
    def base_values(self) -> list[float]:
        """The base value of each parameter group that the optimizer has now, in the order of the groups."""
        self._take_up_new_groups()
        return self._base_values[: len(self.optimizer.param_groups)]

    @abstractmethod
    def get_updated_values(self, num_updates: int) -> Sequence[float] | float:
        """Return the values to use after ``num_updates`` updates.

        Args:
            num_updates: Updates done so far. The update with this 0-based index trains with the returned
                values.

        Returns:
            One value per parameter group, in the order of the groups, or one number for all of them.
        """

    def step_update(self, num_updates: int) -> None:
        """Set the values for ``num_updates`` updates done on the optimizer's parameter groups.

        Args:
            num_updates: Updates done so far.

        Raises:
            ValueError: If :meth:`get_updated_values` returns another number of values than there are groups.
        """
        groups = self.optimizer.param_groups
        values = self.get_updated_values(num_updates)
        if isinstance(values, (int, float, Real)):  # `Real` covers numpy's numbers.
            values = [values] * len(groups)
        elif len(values) != len(groups):
            raise ValueError(
                f"`{type(self).__name__}.get_updated_values` returned {len(values)} values for {len(groups)} "
                "parameter groups, but each group needs one. Return a value per entry of "
                "`self.base_values`, or a single number for all groups."
            )
        for group, value in zip(groups, values, strict=True):
            self._set_value(group, float(value))

    def state_dict(self) -> dict[str, Any]:
        """Return what changes during a run, made of plain numbers, lists and strings only."""
        return {"base_values": self.base_values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the base values of a saved state.

        Parameter groups beyond those of the saved state keep their own; base values of groups that the
        optimizer does not have yet wait for those groups.

        Args:
            state_dict: What :meth:`state_dict` returned. Without base values, the present ones stay.
        """
        self._base_values = list(state_dict.get("base_values", self._base_values))
        for group, value in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group[self._initial_field] = value

    def _take_up_new_groups(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            if index < len(self._base_values):
                continue
            if self.param_group_field not in group:
                raise SchedulerSettingsError(
                    f"`param_group_field` is {self.param_group_field!r}, but parameter group {index} of the "
                    f"optimizer has no such field. Use one that it has: {sorted(group.keys() - {'params'})}."
                )
            value = group.setdefault(self._initial_field, float(group[self.param_group_field]))
            self._base_values.append(float(value))

    def _set_value(self, group: dict[str, Any], value: float) -> None:
        present = group[self.param_group_field]
        if isinstance(present, torch.Tensor):
            present.fill_(value)  # A compiled or captured optimizer step reads this very tensor.
        else:
            group[self.param_group_field] = value


class StatefulSchedulerBase(SchedulerBase):
    """A scheduler that counts the updates by itself, and so can be stepped without an argument.

    The n-th call of :meth:`step` sets the values for ``n - 1`` updates done. The first call therefore belongs
    before the first update, and each further one after an update; the trainer does both.

    Args:
        optimizer: The optimizer, or anything else with ``param_groups``.
        param_group_field: The field of the parameter groups to set.

    Attributes:
        num_updates: Updates done at the values set last; -1 before the first step.
    """

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        super().__init__(optimizer, param_group_field)
        self.num_updates = -1

    def step(self) -> None:
        """Count one update more and set the values that follow from it."""
        self.num_updates += 1
        self.step_update(self.num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as ``num_updates``, and the base values."""
        return {**super().state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, scheduler_state_dict: dict[str, Any]) -> None:
        """Go to the position of a saved state, with its base values, and set the values of that position.

        Args:
            scheduler_state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the state holds no position.
        """
        if "num_updates" not in scheduler_state_dict:
            raise ValueError(
                f"The state given to `{type(self).__name__}.load_state_dict` has no entry 'num_updates', "
                f"only {sorted(scheduler_state_dict)}. A state that was saved by a scheduler of this library "
                "is expected. Load one, or leave the scheduler out (`load_scheduler=False`)."
            )
        super().load_state_dict(scheduler_state_dict)
        self.num_updates = scheduler_state_dict["num_updates"]
        if self.num_updates >= 0:
            self.step_update(self.num_updates)


def interpolate(start: float, end: float, weight: float) -> float:
    """Return the point that lies ``weight`` of the way from ``start`` to ``end``; exact at both ends.

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
    """Refuse a setting that is not a finite number from zero to ``maximum``.

    Args:
        name: What the user calls the setting.
        value: What the user gave.
        meaning: What the setting stands for.
        is_zero_allowed: Whether zero itself is fine.
        maximum: The largest number that is fine.

    Raises:
        TypeError: If it is not a number at all, but a placeholder for example.
        SchedulerSettingsError: If it is a number out of that range.
    """
    if not isinstance(value, Real):
        raise TypeError(
            f"`{name}` is {value!r}, but {meaning} has to be a number. Give one; placeholders become numbers "
            "only when the trainer makes the scheduler from a `create_scheduler_fn`."
        )
    number = float(value)
    is_large_enough = number >= 0 if is_zero_allowed else number > 0
    if not (math.isfinite(number) and is_large_enough and number <= maximum):
        lower = "of at least 0" if is_zero_allowed else "above 0"
        upper = "" if math.isinf(maximum) else f" and at most {maximum}"
        raise SchedulerSettingsError(
            f"`{name}` is {value!r}, but {meaning} has to be a finite number {lower}{upper}. "
            f"Change `{name}` where the scheduler is set up."
        )


def check_rate(name: str, rate: float, base_values: Sequence[float]) -> None:
    """Refuse a lower end of a schedule that is no rate, or that lies above the upper ends of all groups.

    Args:
        name: What the user calls the setting.
        rate: What the user gave.
        base_values: The base values of the parameter groups, the upper ends.

    Raises:
        TypeError: If it is not a number.
        SchedulerSettingsError: If it is negative, not finite, or above every base value.
    """
    check_number(name, rate, "a learning rate")
    if base_values and rate > max(base_values):
        raise SchedulerSettingsError(
            f"`{name}` is {rate!r}, but the schedule runs between it and the initial learning rate of the "
            f"optimizer, which is lower: {max(base_values)!r}. Lower `{name}`, or raise `lr` of the "
            "optimizer."
        )
