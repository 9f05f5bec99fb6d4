"""Several schedulers that one run steps, and the state of schedulers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytorch_accelerated._checkpoint.scheduler_state import load_states_left_out, scheduler_state_of
from pytorch_accelerated.schedulers.scheduler_base import StatefulSchedulerBase

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict, StateMapping


class SchedulerGroup:
    """The schedulers that ``create_scheduler_fn`` returned in a list, tuple or dictionary.

    The trainer steps each by its own rule, in order. As ``trainer.scheduler``, the group is used like what was
    returned: by index or name, and in loops.

    Args:
        schedulers: The schedulers, or a mapping from their names to them.

    Example:
        >>> import torch
        >>> from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> group = SchedulerGroup({"warmup": LinearLR(optimizer), "plateau": ReduceLROnPlateau(optimizer)})
        >>> list(group)
        ['warmup', 'plateau']
        >>> type(group["plateau"]).__name__
        'ReduceLROnPlateau'
    """

    def __init__(self, schedulers: Iterable[Any] | Mapping[Any, Any]) -> None:
        self._names = list(schedulers) if isinstance(schedulers, Mapping) else None
        self.schedulers: list[Any] = list(schedulers.values() if isinstance(schedulers, Mapping) else schedulers)
        """The schedulers, in order."""

    def step(self) -> None:
        """Step each scheduler, without arguments; for a `scheduler_step` of a user's own."""
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> StateDict:
        """Return the states of the schedulers, in order; an empty one for each that has no ``state_dict``."""
        return {"schedulers": [scheduler_state_of(s) if hasattr(s, "state_dict") else {} for s in self.schedulers]}

    def load_state_dict(self, state_dict: StateMapping, *, is_resumed: bool = False) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict: The states.
            is_resumed: Whether the very run that saved them continues.
        """
        for scheduler, state in zip(self.schedulers, state_dict["schedulers"], strict=True):
            if state:
                load_state_of(scheduler, state, is_resumed)

    def __len__(self) -> int:
        return len(self.schedulers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.schedulers if self._names is None else self._names)

    def __getitem__(self, key: Any) -> Any:
        return self.schedulers[key if self._names is None else self._names.index(key)]


def as_group(returned: object, *, is_stepped_by_trainer: bool) -> Any:
    """Return a non-empty list, tuple or dictionary that ``create_scheduler_fn`` returned as a group; others unchanged.

    If a subclass steps what it holds itself, it may hold anything, so only a collection of schedulers is a group.
    """
    if not isinstance(returned, (list, tuple, dict)) or not returned:
        return returned
    group = SchedulerGroup(returned)
    is_group = is_stepped_by_trainer or all(hasattr(scheduler, "step") for scheduler in group.schedulers)
    return group if is_group else returned


def members_of(scheduler: object) -> list[Any]:
    """Return the schedulers that the trainer steps: those of a group, or the scheduler alone; none for ``None``."""
    if scheduler is None:
        return []
    return scheduler.schedulers if isinstance(scheduler, SchedulerGroup) else [scheduler]


def start_counting(scheduler: object) -> None:
    """Step the library's stateful schedulers once when they are new, so that update k trains at curve(k)."""
    for member in members_of(scheduler):
        if isinstance(member, StatefulSchedulerBase) and member.num_updates < 0:
            member.step()


def load_state_of(scheduler: Any, state: StateMapping, is_resumed: bool = False) -> None:
    """Load the state of a scheduler, which gets a copy, because some change what they load.

    Args:
        scheduler: The scheduler.
        state: Its state.
        is_resumed: Whether the very run that saved the state continues, with the same schedule.
    """
    own: StateDict = copy.deepcopy(dict(state))
    if isinstance(scheduler, SchedulerGroup):
        scheduler.load_state_dict(own, is_resumed=is_resumed)
    elif is_resumed and isinstance(scheduler, StatefulSchedulerBase):
        scheduler.resume_from(own)
    else:
        scheduler.load_state_dict(own)
    load_states_left_out(scheduler, state)
