"""The state of a learning-rate scheduler: does it fit, and what if the run has another length now?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pytorch_accelerated._checkpoint.files import as_plain
from pytorch_accelerated._checkpoint.optimizer_state import (
    CLASS,
    DifferentPartError,
    class_name,
    groups_in,
    origin_of,
    with_origin,
)
from pytorch_accelerated._checkpoint.schema import check_numbers
from pytorch_accelerated.exceptions import CheckpointError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pytorch_accelerated._types import ParameterGroup, RunSettings, StateDict, StateMapping
    from pytorch_accelerated.progress import TrainingProgress

LENGTHS = ("num_epochs", "num_update_steps_per_epoch", "max_num_train_steps")
"""The settings of a run that schedules are made for."""


_INNER = "inner"
_OWN_MODULES = ("torch.", f"{__name__.partition('.')[0]}._scheduling.")


def scheduler_state_of(scheduler: Any) -> StateDict:
    """Return the state of a scheduler, which knows its class and those of the schedulers in it."""
    state = scheduler.state_dict()
    return with_origin(state, {CLASS: describe_scheduler(scheduler), _INNER: _states_left_out(scheduler, state)})


def _states_left_out(scheduler: object, state: StateMapping) -> StateDict:
    """Return the states of schedulers in a scheduler that its own state lacks, as that of timm's plateau does."""
    parts = getattr(scheduler, "__dict__", {}).items()
    states = {name: part.state_dict() for name, part in parts if _is_scheduler(part) and name not in state}
    try:
        as_plain(states)
    except CheckpointError:  # nor is it known how to store them
        return {}
    return states


def load_states_left_out(scheduler: object, state: StateMapping) -> None:
    """Load the states of schedulers in a scheduler that its own state lacks, after that one."""
    for name, inner in origin_of(state).get(_INNER, {}).items():
        getattr(scheduler, name).load_state_dict(copy.deepcopy(dict(inner)))


def describe_scheduler(scheduler: object, max_nesting: int = 4) -> str:
    """Return the class of a scheduler, with those of the schedulers in it.

    Args:
        scheduler: The scheduler.
        max_nesting: How deep to look.

    Example:
        >>> from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> describe_scheduler(ChainedScheduler([ConstantLR(optimizer), ExponentialLR(optimizer, 0.9)]))
        'ChainedScheduler(ConstantLR, ExponentialLR)'
    """
    parts = schedulers_in(scheduler) if max_nesting > 0 else []
    inner = ", ".join(describe_scheduler(part, max_nesting - 1) for part in parts)
    return f"{class_name(scheduler)}({inner})" if inner else class_name(scheduler)


def schedulers_in(scheduler: object) -> list[object]:
    """Return the schedulers that are attributes of a scheduler, or in a list or tuple that is one."""
    values = list(getattr(scheduler, "__dict__", {}).values())
    items = [item for value in values for item in (value if isinstance(value, (list, tuple)) else (value,))]
    return [item for item in items if _is_scheduler(item)]


def _is_scheduler(value: object) -> bool:
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return True
    methods = all(callable(getattr(type(value), name, None)) for name in ("step", "state_dict", "load_state_dict"))
    return methods and not hasattr(value, "param_groups")


def check_scheduler_state(scheduler: object, state: StateMapping, source: str, saved_class: str | None = None) -> None:
    """Raise if a state belongs to another class of scheduler, or to one that has other schedulers in it.

    Args:
        scheduler: The scheduler.
        state: The state to load.
        source: How error messages refer to where the state comes from.
        saved_class: The class of the scheduler that saved it, if the state does not know; ``None`` if unknown.

    Raises:
        DifferentPartError: It does, or something else is in the place of a number.
    """
    now, described = describe_scheduler(scheduler), origin_of(state).get(CLASS)
    then = described or saved_class
    if then is not None and then != (now if described else class_name(scheduler)):
        raise _different_scheduler(source, f"its class is {then!r} instead of {now!r}.")
    if type(scheduler).__module__ == "torch.optim.lr_scheduler" and isinstance(scheduler, LRScheduler):
        try:
            check_numbers(state, scheduler.state_dict())
        except ValueError as error:
            raise _different_scheduler(source, f"{error}.") from error


def load_scheduler_state(state: StateDict, load: Callable[[StateDict], None], source: str) -> None:
    """Load the state of a scheduler.

    Args:
        state: The state.
        load: Loads it.
        source: How error messages refer to where the state comes from.

    Raises:
        DifferentPartError: The scheduler does not accept it.
    """
    try:
        load(state)
    except Exception as error:
        raise _different_scheduler(source, f"{error}") from error


def _different_scheduler(source: str, difference: str) -> DifferentPartError:
    """Return the error for a state that belongs to another scheduler."""
    return DifferentPartError(
        f"{source} belongs to a different scheduler: {difference} Nothing was loaded. Create the scheduler as it was, "
        "or load a checkpoint with `load_scheduler=False`."
    )


def settings_of_groups(optimizer: Optimizer | None) -> list[ParameterGroup]:
    """Return the settings of each parameter group of an optimizer, such as its learning rate."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [{name: _value(value) for name, value in group.items() if name != "params"} for group in groups]


def restore_settings_of_groups(optimizer: Optimizer, settings: Iterable[ParameterGroup]) -> None:
    """Set what `settings_of_groups` returned. Groups that have been added since keep theirs."""
    for group, values in zip(optimizer.param_groups, settings, strict=False):
        for name, value in values.items():
            _set(group, name, value)


# --- another length ----------------------------------------------------------------------------------------------


def describe_new_length(saved: RunSettings, current: RunSettings) -> str | None:
    """Return how the length of a run has changed, as far as it is known; ``None`` if it has not."""
    changes = [
        f"{name} {saved[name]} -> {current[name]}"
        for name in LENGTHS
        if name in saved and name in current and saved[name] != current[name]
    ]
    return ", ".join(changes) or None


def return_to_initial_rates(optimizer: Optimizer, optimizer_state: StateMapping) -> None:
    """Give an optimizer the rates that the saved run started with, so that a new schedule starts there, too."""
    for group, saved in zip(optimizer.param_groups, groups_in(optimizer_state), strict=False):
        if "initial_lr" in saved:
            group.pop("initial_lr", None)
            _set(group, "lr", _value(saved["initial_lr"]))


class Replay:
    """A new scheduler, taken to where a saved one was.

    A schedule that was made for a run of another length has other learning rates everywhere, so its state is of no use.
    Stepped as often as the saved one, a scheduler of the new length is where a run of that length would be.

    Args:
        scheduler: The new scheduler.
        optimizer: Its optimizer.
        num_steps: How often to step it.
    """

    def __init__(self, scheduler: Any, optimizer: Optimizer, num_steps: int) -> None:
        before = [dict(group) for group in optimizer.param_groups]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer makes no steps meanwhile
            for _ in range(num_steps):
                scheduler.step()
        self._values = [
            {name: _value(group[name]) for name in group if _is_of_schedule(name, group, old, optimizer)}
            for group, old in zip(optimizer.param_groups, before, strict=True)
        ]

    def apply(self, optimizer: Optimizer) -> None:
        """Put the values of the schedule into the groups, after the optimizer's state has been loaded."""
        for group, values in zip(optimizer.param_groups, self._values, strict=True):
            for name, value in values.items():
                _set(group, name, value)


def replay(
    scheduler: object,
    optimizer: Optimizer | None,
    state: StateMapping,
    position: TrainingProgress,
    saved: RunSettings,
    current: RunSettings,
) -> Replay | None:
    """Take a new scheduler to where a saved one was, if that is possible and gives another schedule.

    Args:
        scheduler: The scheduler.
        optimizer: Its optimizer, before its state is loaded.
        state: The state of the saved one.
        position: Where the run is.
        saved: The settings of the run that saved the state.
        current: Those of this run.

    Returns:
        What to apply when the optimizer's state has been loaded; ``None`` if the scheduler has to load its state.
    """
    num_steps = _num_steps(state)
    if optimizer is None or not num_steps or not _can_replay(scheduler):
        return None
    new: Any = scheduler
    if _num_steps(new.state_dict()) != 0:
        return None  # it is not a new one
    if num_steps == position.num_updates and current.get("step_scheduler") != "epoch":
        num_steps = _num_updates_of_new_length(position, saved, current)
    with suppress(ValueError):  # the schedule ends before that, so no update is left
        result = Replay(new, optimizer, num_steps)
        return None if _are_equal(new.state_dict(), state) else result
    return None


def _num_updates_of_new_length(position: TrainingProgress, saved: RunSettings, current: RunSettings) -> int:
    """Return how many updates a run would have made at this place if its epochs had always been as long as now."""
    num_epochs, per_epoch, total = (current.get(name) or 0 for name in LENGTHS)
    is_limited = total < num_epochs * per_epoch  # a number of updates ends the run, and those made before count
    if is_limited or saved.get("num_update_steps_per_epoch") == current.get("num_update_steps_per_epoch"):
        return position.num_updates
    in_epoch = position.num_batches_in_epoch // current["gradient_accumulation_steps"]
    return int(position.num_epochs_completed * per_epoch + min(in_epoch, per_epoch))


def _are_equal(left: StateMapping, right: StateMapping) -> bool:
    try:
        return bool(dict(left) == dict(right))
    except RuntimeError:  # there are tensors in them
        return False


def _can_replay(scheduler: object) -> bool:
    """Tell whether a scheduler, and those in it, depend on the number of steps only; a user's class may not."""
    is_known = type(scheduler).__module__.startswith(_OWN_MODULES) and not isinstance(scheduler, ReduceLROnPlateau)
    return is_known and all(map(_can_replay, schedulers_in(scheduler)))


def _num_steps(state: StateMapping) -> int | None:
    """Return how often a scheduler of PyTorch has been stepped."""
    if "last_epoch" in state:
        return int(state["last_epoch"])
    inner = state.get("_schedulers") or state.get("schedulers") or [{}]
    return _num_steps(inner[0]) if inner[0] else None


def _is_of_schedule(name: str, group: ParameterGroup, before: ParameterGroup, optimizer: Optimizer) -> bool:
    """Tell whether an entry of a group is set by the schedule, rather than a setting of the optimizer."""
    if name == "params":
        return False
    return "lr" in name or name not in optimizer.defaults or group[name] is not before.get(name)


def _set(group: ParameterGroup, name: str, value: Any) -> None:
    if isinstance(group.get(name), torch.Tensor):
        group[name].fill_(value)  # a compiled step reads this tensor
    else:
        group[name] = value


def _value(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
