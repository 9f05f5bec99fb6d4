"""Warmup-stable-decay: a constant learning rate that is brought down for a while before each checkpoint.

A schedule that falls over the whole run, such as the cosine, fits one length of training only. Here the rate
stays high, the run can be continued from any state of that stable phase, and a short decay gives a good model
whenever one is wanted: Hu et al., "MiniCPM" (2024), arXiv:2404.06395. Wen et al., "Understanding
Warmup-Stable-Decay Learning Rates: A River Valley Loss Landscape Perspective" (2024), arXiv:2410.05192,
return to the stable rate after each decay within one run (WSD-S), which is what this module does when there
is more than one checkpoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers._placeholders import NumberOrPlaceholder, TrainerPlaceholderValues
from pytorch_accelerated.schedulers.scheduler_base import (
    StatefulSchedulerBase,
    check_number,
    check_rate,
    interpolate,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from typing_extensions import Self


class DecayInfo(TypedDict):
    """One decay phase, in updates from the start of the run.

    The rate is still the stable one after ``start_step`` updates, and is the minimum after ``end_step``
    updates, which is where the checkpoint is.
    """

    start_step: int
    end_step: int
    num_decay_steps: int


class PhaseInfo(TypedDict):
    """Where in the schedule a run is.

    Attributes:
        phase: The name of the phase.
        start_step: Updates done when the phase starts.
        end_step: Updates done when it ends.
        progress: How much of it is done, from 0 to 1.
        checkpoint_step: Updates done at the next checkpoint, or at this one.
        is_checkpoint: Whether the run is at that checkpoint.
    """

    phase: Literal["warmup", "stable", "decay"]
    start_step: int
    end_step: int
    progress: float
    checkpoint_step: int
    is_checkpoint: bool


def estimate_checkpoint_steps(total_steps: int, num_checkpoints: int = 3) -> list[int]:
    """Return after how many updates each checkpoint comes: the last at the end, each half as far as the next.

    Checkpoint :math:`i` of :math:`n` (from 1) is at ``total_steps`` divided by :math:`2^{n - i}`, rounded
    down.

    Args:
        total_steps: Updates of the whole run.
        num_checkpoints: How many checkpoints to place.

    Raises:
        SchedulerSettingsError: If an argument is no whole number above 0, or if the run is too short for that
            many.

    Example:
        >>> estimate_checkpoint_steps(1000)
        [250, 500, 1000]
        >>> estimate_checkpoint_steps(1000, num_checkpoints=2)
        [500, 1000]
    """
    total_steps = _as_count("total_steps", total_steps)
    num_checkpoints = _as_count("num_checkpoints", num_checkpoints)
    num_needed_steps = 2 ** (num_checkpoints - 1)
    if total_steps < num_needed_steps:
        raise SchedulerSettingsError(
            f"`num_checkpoints` is {num_checkpoints}, but a run of {total_steps} updates is too short for "
            f"that: each checkpoint is twice as far as the one before, so {num_needed_steps} updates are "
            "needed. Ask for fewer checkpoints, or train for longer."
        )
    return [total_steps // 2**exponent for exponent in reversed(range(num_checkpoints))]


def plan_decays(
    checkpoint_steps: Sequence[int], decay_phase_ratio: float = 0.1, num_warmup_steps: int = 0
) -> list[DecayInfo]:
    """Return the decay phase before each checkpoint.

    The decay towards a checkpoint at update :math:`c` takes ``round(decay_phase_ratio * c)`` updates, at
    least one, and not so many that it would begin within the warm-up or before the previous checkpoint.

    Args:
        checkpoint_steps: Updates done at each checkpoint, in ascending order.
        decay_phase_ratio: Share of the updates up to a checkpoint which are the decay towards it.
        num_warmup_steps: Length of the warm-up.

    Example:
        >>> for decay in plan_decays([50, 100]):
        ...     print(decay)
        {'start_step': 45, 'end_step': 50, 'num_decay_steps': 5}
        {'start_step': 90, 'end_step': 100, 'num_decay_steps': 10}
    """
    decays: list[DecayInfo] = []
    earliest_start = num_warmup_steps
    for step in checkpoint_steps:
        start = max(step - max(round(decay_phase_ratio * step), 1), earliest_start)
        decays.append({"start_step": start, "end_step": step, "num_decay_steps": step - start})
        earliest_start = step
    return decays


def wsd_lr(
    update: float,
    *,
    decays: Sequence[DecayInfo],
    lr: float,
    lr_min: float = 0.0,
    num_warmup_steps: int = 0,
    warmup_starting_lr: float = 0.0,
    use_inverse_sqrt_decay: bool = True,
) -> float:
    r"""Return the learning rate with which the update of 0-based index ``update`` trains.

    .. math::

        \eta(t) = \begin{cases}
            \eta_w + (\eta_0 - \eta_w) \, t / W & t < W \\
            \eta_e + (\eta_0 - \eta_e) \, (1 - f(p)), \quad
                p = \frac{t - s}{c - s} & s < t \le c \text{ for a decay from } s \text{ to } c \\
            \eta_e & t \text{ after the last decay} \\
            \eta_0 & \text{otherwise}
        \end{cases}

    where :math:`f(p) = \sqrt{p}`, the shape that Hägele et al., "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations" (2024), arXiv:2405.18392, found to be the best, or :math:`f(p) = p`.

    Args:
        update: Index :math:`t` of the update, that is, the number of updates done before it.
        decays: The decays, from :math:`s` (``start_step``) to :math:`c` (``end_step``), as of
            :func:`plan_decays`.
        lr: Learning rate :math:`\eta_0` of the stable phase.
        lr_min: Learning rate :math:`\eta_e` at the end of a decay.
        num_warmup_steps: Length :math:`W` of the warm-up.
        warmup_starting_lr: Learning rate :math:`\eta_w` of the first update of a warm-up.
        use_inverse_sqrt_decay: Whether :math:`f` is the square root; otherwise the decay is linear.

    Example:
        >>> decays = plan_decays([8, 16], decay_phase_ratio=0.25)
        >>> [wsd_lr(update, decays=decays, lr=1.0) for update in (6, 8, 9, 12, 13, 16)]
        [1.0, 0.0, 1.0, 1.0, 0.5, 0.0]
    """
    if update < num_warmup_steps:
        return interpolate(warmup_starting_lr, lr, update / num_warmup_steps)
    decay = _next_decay(update, decays)
    if update <= decay["start_step"]:
        return lr
    progress = min((update - decay["start_step"]) / decay["num_decay_steps"], 1.0)
    return interpolate(lr, lr_min, math.sqrt(progress) if use_inverse_sqrt_decay else progress)


class WSDLrScheduler(StatefulSchedulerBase):
    """Warms up, keeps the learning rate stable, and brings it down before each of one or more checkpoints.

    The curve is :func:`wsd_lr`, applied to the base value of each parameter group, with checkpoints placed by
    :func:`estimate_checkpoint_steps` and decays by :func:`plan_decays`. At a checkpoint the rate is the
    minimum; one update later it is the stable one again, until the next decay. The end of the run is the last
    checkpoint. :class:`~pytorch_accelerated.callbacks.WSDCheckpointCallback` saves the model before and after
    each decay.

    A run that continues from a state of the stable phase is a run of its own: its scheduler counts from 0,
    plans its own checkpoints, and with ``is_continuation_from_checkpoint`` starts at the stable rate.

    A group never goes above its base value: one that starts below ``lr_min`` or ``warmup_starting_lr`` stays
    where it is during that part.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        num_epochs: Epochs of the run, which may be a fraction; with ``num_update_steps_per_epoch`` it gives
            the length of the run.
        num_update_steps_per_epoch: Updates per epoch.
        total_steps: Updates of the run, instead of the two above.
        num_warmup_steps: Updates of warm-up; a fraction is rounded.
        decay_phase_ratio: Share of the updates up to a checkpoint which are the decay towards it, above 0 and
            at most 1. A decay takes at least one update.
        lr_min: Learning rate at the end of each decay.
        warmup_starting_lr: Learning rate of the first update of the warm-up.
        use_inverse_sqrt_decay: Whether a decay follows one minus the square root of its progress; otherwise
            it is linear.
        num_checkpoints: How many checkpoints the run has.
        is_continuation_from_checkpoint: Whether the run continues from a state of an earlier run's stable
            phase. If so, there is no warm-up, whatever ``num_warmup_steps`` says.

    Raises:
        SchedulerSettingsError: If the length of the run is missing or given twice with different results, if
            a setting is out of range, if the first checkpoint lies within the warm-up, or if ``lr_min`` or
            ``warmup_starting_lr`` is above the initial learning rate of the optimizer.
        TypeError: If a setting is not a number.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = WSDLrScheduler(
        ...     optimizer, total_steps=16, decay_phase_ratio=0.25, lr_min=0.0, num_warmup_steps=2
        ... )
        >>> for _ in range(14):
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.5
        >>> scheduler.get_current_phase_info()["phase"]
        'decay'
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_epochs: float | None = None,
        num_update_steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        num_warmup_steps: float = 0,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 1e-6,
        warmup_starting_lr: float = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> None:
        super().__init__(optimizer)
        check_number("num_warmup_steps", num_warmup_steps, "the length of the warm-up")
        check_number("decay_phase_ratio", decay_phase_ratio, "a share of the run", is_zero_allowed=False, maximum=1)
        check_rate("lr_min", lr_min, self.base_values)
        check_rate("warmup_starting_lr", warmup_starting_lr, self.base_values)
        self.total_steps = _total_steps(num_epochs, num_update_steps_per_epoch, total_steps)
        self.num_warmup_steps = 0 if is_continuation_from_checkpoint else round(num_warmup_steps)
        self.decay_phase_ratio = decay_phase_ratio
        self.lr_min = lr_min
        self.warmup_starting_lr = warmup_starting_lr
        self.use_inverse_sqrt_decay = use_inverse_sqrt_decay
        self.num_checkpoints = num_checkpoints
        self.is_continuation_from_checkpoint = is_continuation_from_checkpoint
        self._decays = plan_decays(self._place_checkpoints(), decay_phase_ratio, self.num_warmup_steps)

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: NumberOrPlaceholder = TrainerPlaceholderValues.NUM_EPOCHS,
        num_update_steps_per_epoch: NumberOrPlaceholder = (
            TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH
        ),
        num_warmup_epochs: NumberOrPlaceholder | None = None,
        decay_phase_ratio: NumberOrPlaceholder = 0.1,
        lr_min: NumberOrPlaceholder = 1e-6,
        warmup_starting_lr: NumberOrPlaceholder = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> functools.partial[Self]:
        """Return a function that makes this scheduler for an optimizer, to be given to ``Trainer.train``.

        The arguments are those of the class, but for two: ``total_num_epochs`` is the length of the run, and
        ``num_warmup_epochs`` the length of the warm-up in epochs, which may be a fraction (``None``: no
        warm-up). Each number may be a placeholder, or arithmetic with placeholders, which the trainer
        replaces by the numbers of the run; by default the schedule is as long as the run.

        Example:
            >>> create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5)
            >>> create.keywords["num_warmup_steps"]
            0.5 * TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH
        """
        settings: dict[str, Any] = {
            "num_epochs": total_num_epochs,
            "num_update_steps_per_epoch": num_update_steps_per_epoch,
            "num_warmup_steps": (num_warmup_epochs or 0) * num_update_steps_per_epoch,
            "decay_phase_ratio": decay_phase_ratio,
            "lr_min": lr_min,
            "warmup_starting_lr": warmup_starting_lr,
            "use_inverse_sqrt_decay": use_inverse_sqrt_decay,
            "num_checkpoints": num_checkpoints,
            "is_continuation_from_checkpoint": is_continuation_from_checkpoint,
        }
        return functools.partial(cls, **settings)

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the learning rate of each parameter group after ``num_updates`` updates."""
        return [
            wsd_lr(
                num_updates,
                decays=self._decays,
                lr=base_lr,
                lr_min=min(self.lr_min, base_lr),
                num_warmup_steps=self.num_warmup_steps,
                warmup_starting_lr=min(self.warmup_starting_lr, base_lr),
                use_inverse_sqrt_decay=self.use_inverse_sqrt_decay,
            )
            for base_lr in self.base_values
        ]

    def get_checkpoint_steps(self) -> list[int]:
        """Return the updates after which there is a checkpoint, in ascending order."""
        return [decay["end_step"] for decay in self._decays]

    def get_decay_info(self) -> list[DecayInfo]:
        """Return the decay phase before each checkpoint, in the order of the checkpoints."""
        return [decay.copy() for decay in self._decays]

    def get_phase_info(self, num_updates: int) -> PhaseInfo:
        """Return the phase of the schedule in which a run is after ``num_updates`` updates.

        A decay lasts from its ``start_step`` to its ``end_step``, both included; before the first update
        counts as the first update, and after the end of the run as its end.

        Args:
            num_updates: Updates done.
        """
        step = min(max(num_updates, 0), self.total_steps)
        decay = _next_decay(step, self._decays)
        phase: Literal["warmup", "stable", "decay"]
        if step < self.num_warmup_steps:
            phase, start, end = "warmup", 0, self.num_warmup_steps
        elif step < decay["start_step"]:
            previous_ends = [other["end_step"] for other in self._decays if other["end_step"] < step]
            phase, start, end = "stable", max([self.num_warmup_steps, *previous_ends]), decay["start_step"]
        else:
            phase, start, end = "decay", decay["start_step"], decay["end_step"]
        return {
            "phase": phase,
            "start_step": start,
            "end_step": end,
            "progress": (step - start) / (end - start),
            "checkpoint_step": decay["end_step"],
            "is_checkpoint": step == decay["end_step"],
        }

    def get_current_phase_info(self) -> PhaseInfo:
        """Return the phase of the schedule in which the run is now."""
        return self.get_phase_info(self.num_updates)

    def get_current_step(self) -> int:
        """Return the updates done, as counted by :meth:`step`; -1 before its first call."""
        return self.num_updates

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the base values, and for the record the kind and length of the run."""
        return {
            **super().state_dict(),
            "is_continuation_from_checkpoint": self.is_continuation_from_checkpoint,
            "total_steps": self.total_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position of a saved state, with its base values, and set the values of that position.

        All else stays as this scheduler was set up, the length of the run and whether it is a continuation
        included: a run that is resumed may be longer than planned at first, and a run that continues from the
        checkpoint of another does not become that other run. The loaded position counts from the start of
        this schedule; where a continuation should start its own, give ``initial_checkpoint`` to
        :class:`~pytorch_accelerated.callbacks.WSDCheckpointCallback`, or load the state without the scheduler
        (``load_scheduler=False``).

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state_dict)

    def _place_checkpoints(self) -> list[int]:
        steps = estimate_checkpoint_steps(self.total_steps, self.num_checkpoints)
        if steps[0] <= self.num_warmup_steps:
            raise SchedulerSettingsError(
                f"The warm-up takes {self.num_warmup_steps} updates, but the first checkpoint is after "
                f"{steps[0]} of {self.total_steps}, and the decay towards it needs at least one update after "
                "the warm-up. Shorten the warm-up, ask for fewer checkpoints, or train for longer."
            )
        return steps


def _total_steps(num_epochs: float | None, num_update_steps_per_epoch: int | None, total_steps: int | None) -> int:
    if num_epochs is None or num_update_steps_per_epoch is None:
        if total_steps is None:
            raise SchedulerSettingsError(
                f"`num_epochs` is {num_epochs!r}, `num_update_steps_per_epoch` is "
                f"{num_update_steps_per_epoch!r} and `total_steps` is None, but the length of the run has to "
                "be known. Give the first two, or the last."
            )
        return _as_count("total_steps", total_steps)
    check_number("num_epochs", num_epochs, "the length of the run", is_zero_allowed=False)
    check_number("num_update_steps_per_epoch", num_update_steps_per_epoch, "the length of an epoch")
    num_steps = round(num_epochs * num_update_steps_per_epoch)
    if total_steps is not None and total_steps != num_steps:
        raise SchedulerSettingsError(
            f"`total_steps` is {total_steps!r}, but `num_epochs` times `num_update_steps_per_epoch` is "
            f"{num_steps}, and both are the length of the run. Leave out the one that is wrong."
        )
    return _as_count("num_epochs * num_update_steps_per_epoch", num_steps)


def _as_count(name: str, value: float) -> int:
    check_number(name, value, "a count", is_zero_allowed=False)
    if value != int(value):
        raise SchedulerSettingsError(
            f"`{name}` is {value!r}, but a count has to be a whole number. Round it as you see fit."
        )
    return int(value)


def _next_decay(update: float, decays: Sequence[DecayInfo]) -> DecayInfo:
    """Return the first decay that is not over yet, or the last one when all are."""
    return next((decay for decay in decays if update <= decay["end_step"]), decays[-1])
