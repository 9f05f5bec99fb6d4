"""Base classes of schedulers: they keep the base values, count updates, and set new values on the optimizer."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch

from pytorch_accelerated._checkpoint.files import as_plain
from pytorch_accelerated.exceptions import CheckpointError, SchedulerSettingsError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pytorch_accelerated._types import ParameterGroup, StateDict

LOWEST_RATE = 1e-6
"""The default of rates at which a warm-up starts or a decay ends. In a group with a lower base value, that counts."""


class _MissingFieldError(SchedulerSettingsError, KeyError):
    """A parameter group lacks the field to set; also a ``KeyError``, which 0.1.61 raised."""

    __str__ = Exception.__str__  # that of `KeyError` shows the message in quotes


class SchedulerBase(ABC):
    """Sets one field of the optimizer's parameter groups as a function of the number of updates done.

    A subclass defines the values in :meth:`get_updated_values`. The caller passes the number of updates done to
    :meth:`step_update`. For a scheduler that counts updates itself, see :class:`StatefulSchedulerBase`.

    The base value of a parameter group is the value it has when the scheduler first sees it. The scheduler keeps it,
    and stores it in the group under ``initial_<field>``, as PyTorch's own schedulers do. If a group already has such an
    entry, from an earlier run with the same optimizer, that is its base value, and the new scheduler starts there; to
    start from another value, change both the field and this entry. Groups added to the optimizer later are included
    from the next update on.

    What a subclass keeps in attributes of its own is part of the state, as far as it can be stored: tensors, numbers,
    strings and containers of these. The settings of the library's own schedulers are not: they come from the
    constructor, so that a resumed run may be longer than the original one.

    Args:
        optimizer: The optimizer, or any object with ``param_groups``, such as an optimizer prepared by Accelerate.
        param_group_field: The field of the parameter groups to set.

    Raises:
        SchedulerSettingsError: A parameter group does not have that field; it is also a ``KeyError``.

    Example:
        >>> class Halving(SchedulerBase):
        ...     def get_updated_values(self, num_updates):
        ...         return [base / 2**num_updates for base in self.base_values]
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        >>> Halving(optimizer).step_update(3)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    # Programs written for 0.1.61 save and restore the `__dict__` of their schedulers, so these names are its names.
    base_lr_values: list[float]
    """Same as `base_values`, whatever the field is."""

    _initial_param_group_field: str
    _later_base_values: list[float]

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        self.optimizer = optimizer
        self.param_group_field = param_group_field
        self._initial_param_group_field = f"initial_{param_group_field}"
        self.base_lr_values = []
        self._later_base_values = []
        self._set_values(self.base_values)

    @property
    def base_values(self) -> list[float]:
        """The base value of each parameter group of the optimizer, in order."""
        self._match_groups()
        return self.base_lr_values

    @abstractmethod
    def get_updated_values(self, num_updates: int) -> Sequence[float] | float | None:
        """Return the values to use after ``num_updates`` updates.

        Args:
            num_updates: Updates done so far. The returned values apply to the update with this 0-based index.

        Returns:
            One value per parameter group, in order; a single number for all groups; or ``None`` to change nothing.
        """

    def step_update(self, num_updates: int) -> None:
        """Set the values that apply after ``num_updates`` updates.

        Args:
            num_updates: Updates done so far.

        Raises:
            ValueError: The number of values from :meth:`get_updated_values` differs from the number of groups.
        """
        self._match_groups()
        values = self.get_updated_values(num_updates)
        if values is None:
            return
        num_groups = len(self.optimizer.param_groups)
        if isinstance(values, (int, float, Real)):  # `Real` includes numpy scalars
            values = [values] * num_groups
        elif len(values) != num_groups:
            raise ValueError(
                f"`{type(self).__name__}.get_updated_values` returned {len(values)} values for {num_groups} parameter "
                "groups. Expected one per group. Return a value for each entry of `self.base_values`, a single number "
                "for all groups, or `None` to change nothing."
            )
        self._set_values(values)

    def state_dict(self) -> StateDict:
        """Return the base values, and the attributes that a subclass outside the library has added."""
        library_names = _library_names(type(self))
        return {
            **{name: value for name, value in vars(self).items() if name not in library_names and _can_store(value)},
            "param_group_field": self.param_group_field,
            "base_lr_values": [*self.base_values, *self._later_base_values],
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the base values and the attributes of a subclass.

        Parameter groups beyond those in the state keep their own base values. Base values of groups that the optimizer
        does not have yet are kept for when those groups are added.

        Args:
            state_dict: What :meth:`state_dict` returned. Without base values in it, the current ones stay.
        """
        base_values = state_dict.get("base_lr_values", state_dict.get("base_values"))  # the first versions' name
        if base_values is not None:
            self.base_lr_values, self._later_base_values = list(base_values), []
            for group, value in zip(self.optimizer.param_groups, self.base_values, strict=True):
                group[self._initial_param_group_field] = value
        for name in state_dict.keys() - _library_names(type(self)):
            setattr(self, name, state_dict[name])

    def _match_groups(self) -> None:
        """Add the base values of new groups, and set those of groups aside that the optimizer does not have."""
        groups, known, later = self.optimizer.param_groups, self.base_lr_values, self._later_base_values
        if len(known) == len(groups):  # as nearly always
            return
        while len(known) > len(groups):
            later.insert(0, known.pop())
        for index in range(len(known), len(groups)):
            value = self._own_base_value(index, groups[index])
            if later:
                value = groups[index][self._initial_param_group_field] = later.pop(0)
            known.append(value)

    def _own_base_value(self, index: int, group: ParameterGroup) -> float:
        if self.param_group_field not in group:
            raise _MissingFieldError(
                f"`param_group_field` is {self.param_group_field!r}, but parameter group {index} of the optimizer "
                f"has no such field. Use one of its fields: {sorted(group.keys() - {'params'})}."
            )
        return float(group.setdefault(self._initial_param_group_field, float(group[self.param_group_field])))

    def _set_values(self, values: Sequence[float]) -> None:
        for group, value in zip(self.optimizer.param_groups, values, strict=False):
            present = group[self.param_group_field]
            if isinstance(present, torch.Tensor):
                present.fill_(float(value))  # a compiled or captured optimizer step reads this tensor object
            else:
                group[self.param_group_field] = float(value)


class StatefulSchedulerBase(SchedulerBase):
    """A scheduler that counts updates itself, so that :meth:`step` needs no argument.

    The n-th call of :meth:`step` sets the values for ``n - 1`` updates done. Call it once before the first update, and
    again after each update; the trainer does both.

    Args:
        optimizer: The optimizer, or any object with ``param_groups``.
        param_group_field: The field of the parameter groups to set.
    """

    _num_updates: int

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        super().__init__(optimizer, param_group_field)
        self._num_updates = -1

    @property
    def num_updates(self) -> int:
        """The number of updates for which values were last set; -1 before the first step. It can be set."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._num_updates = value

    @property
    def param_group_values(self) -> list[float]:
        """The value that each parameter group has now."""
        return [float(group[self.param_group_field]) for group in self.optimizer.param_groups]

    def step(self) -> None:
        """Advance by one update, and set the values for it."""
        self._num_updates += 1
        self.step_update(self._num_updates)

    def state_dict(self) -> StateDict:
        """Return the position (``num_updates``), the base values, the present values and the attributes added."""
        return {**super().state_dict(), "num_updates": self.num_updates, "param_group_values": self.param_group_values}

    def load_state_dict(self, scheduler_state_dict: StateDict) -> None:
        """Restore what :meth:`state_dict` returned.

        The present values are restored, not computed: a subclass may compute them from those before.

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
        if self.num_updates < 0:
            return
        if "param_group_values" in scheduler_state_dict:
            self._set_values(scheduler_state_dict["param_group_values"])
        else:  # a state of the first versions
            self.step_update(self.num_updates)

    def resume_from(self, state_dict: StateDict) -> None:
        """Restore the state of the very run that continues; called by the trainer when a run is resumed.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        self.load_state_dict(state_dict)


def _library_names(scheduler_class: type) -> set[str]:
    """Return the names of everything that the library's classes define, among the bases of a class or the class itself.

    These are members, attributes, and settings, which are the arguments of constructors.
    """
    package = __name__.partition(".")[0]
    names: set[str] = set()
    for base in scheduler_class.__mro__:
        if base.__module__.partition(".")[0] == package:
            names |= {*vars(base), *inspect.get_annotations(base), *inspect.signature(base).parameters}
    return names


def _can_store(value: object) -> bool:
    try:
        as_plain(value)
    except CheckpointError:
        return False
    return True


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

    The default is never too high: where it is above the base value, the base value counts.

    Args:
        name: Name of the argument.
        rate: Its value.
        base_values: The base values of the parameter groups, which are the upper ends of the schedule.

    Raises:
        TypeError: ``rate`` is not a number.
        SchedulerSettingsError: ``rate`` is negative, not finite, or above every base value.
    """
    check_number(name, rate, "a learning rate")
    if base_values and rate > max(base_values) and rate != LOWEST_RATE:
        raise SchedulerSettingsError(
            f"`{name}` is {rate!r}, but the initial learning rate of the optimizer, the upper end of the schedule, is "
            f"lower: {max(base_values)!r}. Lower `{name}`, or raise `lr` of the optimizer."
        )
