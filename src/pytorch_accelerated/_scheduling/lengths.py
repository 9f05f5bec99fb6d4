"""Does the length of a schedule fit how often it is stepped? A schedule for 90 epochs is over after 90 updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from pytorch_accelerated._messages import warn
from pytorch_accelerated._scheduling.group import members_of
from pytorch_accelerated._scheduling.stepping import SchedulerStepping

if TYPE_CHECKING:
    from pytorch_accelerated.run_config import TrainerRunConfig

_VANISHED = 1e-6
"""A rate that falls to this fraction of itself was not meant to."""

_NOTICEABLE = 0.9
"""A rate that falls at least to this fraction of itself within the epochs of a run has a schedule for these."""


@dataclass(frozen=True)
class ScheduleLength:
    """The length of a schedule, in steps of its scheduler.

    Args:
        setting: How the user has set it, such as ``CosineAnnealingLR(T_max=90)``.
        num_steps: The length.
        decay: The factor by which the rate falls in this number of steps, and again and again; ``None`` if it ends.
        is_restarting: Whether the schedule starts over.
        is_bounded: Whether the scheduler raises an error when it is stepped more often.
    """

    setting: str
    num_steps: int
    decay: float | None = None
    is_restarting: bool = False
    is_bounded: bool = False

    def is_of_epochs(self, num_epochs: int, num_updates: int) -> bool:
        """Tell whether a schedule that is stepped after each update has evidently been made for epochs.

        Args:
            num_epochs: Epochs of the run.
            num_updates: Updates of the run.
        """
        if num_epochs < 2 or num_updates < 2 * num_epochs:
            return False
        if self.decay is not None:
            by_updates, by_epochs = (
                self.decay ** ((steps - 1) // self.num_steps) for steps in (num_updates, num_epochs)
            )
            return by_updates < _VANISHED and by_epochs <= _NOTICEABLE
        is_short = not self.is_restarting or self.num_steps * num_epochs < num_updates
        return self.num_steps <= num_epochs and is_short


def lengths_of(scheduler: Any) -> Iterator[ScheduleLength]:
    """Yield the lengths of a schedule of PyTorch or this library, and of those in it, as far as they are evident.

    A warm-up is short on purpose, and a user's function may do anything.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> [length] = lengths_of(lr_scheduler.StepLR(optimizer, step_size=30))
        >>> length.setting
        'StepLR(step_size=30)'
        >>> length.is_of_epochs(num_epochs=90, num_updates=4500), length.is_of_epochs(num_epochs=2, num_updates=90)
        (True, False)
    """
    for member in members_of(scheduler):
        if type(member) is lr_scheduler.SequentialLR:
            start = max(member._milestones, default=0)  # noqa: SLF001 - it has no public name
            for last in lengths_of(member._schedulers[-1]):  # noqa: SLF001
                setting = f"SequentialLR(milestones={member._milestones})"  # noqa: SLF001
                yield ScheduleLength(setting, start + last.num_steps, last.decay, last.is_restarting)
        elif type(member) is lr_scheduler.ChainedScheduler:
            for inner in member._schedulers:  # noqa: SLF001
                yield from lengths_of(inner)
        else:
            yield from _own_length(member, type(member).__name__)


def _own_length(scheduler: Any, name: str) -> Iterator[ScheduleLength]:
    kind = type(scheduler)
    if kind is lr_scheduler.StepLR:
        yield ScheduleLength(f"{name}(step_size={scheduler.step_size})", scheduler.step_size, scheduler.gamma)
    elif kind is lr_scheduler.ExponentialLR:
        yield ScheduleLength(f"{name}(gamma={scheduler.gamma})", 1, scheduler.gamma)
    elif kind is lr_scheduler.MultiStepLR and scheduler.milestones:
        milestones = sorted(scheduler.milestones.elements())
        yield ScheduleLength(f"{name}(milestones={milestones})", milestones[-1])
    elif kind is lr_scheduler.CosineAnnealingLR:
        yield ScheduleLength(f"{name}(T_max={scheduler.T_max})", scheduler.T_max)
    elif kind is lr_scheduler.CosineAnnealingWarmRestarts:
        yield ScheduleLength(f"{name}(T_0={scheduler.T_0})", scheduler.T_0, is_restarting=True)
    elif kind is lr_scheduler.OneCycleLR:
        length = scheduler.total_steps
        yield ScheduleLength(f"{name}(total_steps={length})", length, is_bounded=True)
    elif kind is lr_scheduler.PolynomialLR or (
        kind is lr_scheduler.LinearLR and scheduler.end_factor < scheduler.start_factor
    ):
        yield ScheduleLength(f"{name}(total_iters={scheduler.total_iters})", scheduler.total_iters)
    elif kind.__module__.startswith(f"{__name__.partition('.')[0]}.schedulers"):
        for attribute in ("total_steps", "total_iterations"):
            if hasattr(scheduler, attribute):
                yield ScheduleLength(name, int(getattr(scheduler, attribute)))


def warn_about_length(stepping: SchedulerStepping, config: TrainerRunConfig) -> None:
    """Warn the caller of `Trainer.train` if a schedule evidently has a length in another unit than it is stepped in.

    Args:
        stepping: How the schedulers are stepped.
        config: The configuration of the run. Nothing is known if its length is not.
    """
    if not config.num_epochs or not config.max_num_train_steps:
        return
    for rule in stepping.rules:
        for length in lengths_of(rule.scheduler) if rule.is_plain else ():
            advice = _advice(length, stepping, config, config.max_num_train_steps)
            if advice is not None:
                warn(advice)


def _advice(
    length: ScheduleLength, stepping: SchedulerStepping, config: TrainerRunConfig, num_updates: int
) -> str | None:
    num_epochs, interval = config.num_epochs, stepping.interval
    run = f"the run has {num_epochs} epochs and {num_updates} updates"
    num_steps = num_updates if interval == "update" else num_epochs
    is_asked_for = stepping.requested_interval == "update"
    if interval == "update" and not is_asked_for and length.is_of_epochs(num_epochs, num_updates):
        return (
            f"`{length.setting}` looks as if it counted epochs, but it is stepped after each update, and {run}. Pass "
            '`step_scheduler="epoch"` to step it once per epoch, or `step_scheduler="update"` if you mean updates.'
        )
    if interval == "epoch" and length.num_steps >= num_updates >= 2 * num_epochs and length.decay is None:
        return (
            f"`{length.setting}` is {length.num_steps} steps long, but it is stepped once per epoch, and {run}. Leave "
            '`step_scheduler="epoch"` out, or make the schedule as long as the run has epochs: '
            "`TrainerPlaceholderValues.NUM_EPOCHS`."
        )
    if length.is_bounded and length.num_steps < num_steps:
        return (
            f"`{length.setting}` raises an error when it is stepped more often than that, but it is stepped after each "
            f"{interval}, and {run}. Make it as long as the run: with "
            f"`functools.partial(OneCycleLR, total_steps={_LENGTH_OF_RUN[interval]}, ...)`."
        )
    if interval == "update" and num_updates < length.num_steps == num_epochs * (config.num_update_steps_per_epoch or 0):
        return (
            f"`{length.setting}` is as long as {num_epochs} whole epochs, but `max_num_train_steps` ends the run after "
            f"{num_updates} updates, before the schedule has reached its end. Pass that number as its length: "
            f"`{_LENGTH_OF_RUN[interval]}` in a `functools.partial`, or `run_config.max_num_train_steps`."
        )
    return None


_LENGTH_OF_RUN = {
    "update": "TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH",
    "epoch": "TrainerPlaceholderValues.NUM_EPOCHS",
}
