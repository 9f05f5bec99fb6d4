"""Warmup-stable-decay (WSD): a constant learning rate that decays shortly before each checkpoint.

A schedule that decays over the whole run, such as the cosine, suits only one length of training. Here the rate stays
high, training can continue from any state of the stable phase, and a short decay yields a good model at any time: Hu et
al., "MiniCPM" (2024), arXiv:2404.06395. Wen et al., "Understanding Warmup-Stable-Decay Learning Rates: A River Valley
Loss Landscape Perspective" (2024), arXiv:2410.05192, return to the stable rate after each decay within one run (WSD-S).
This module does so if there is more than one checkpoint.
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

    from pytorch_accelerated._types import StateDict


class DecayInfo(TypedDict):
    """One decay phase, in updates from the start of the run.

    After ``start_step`` updates the rate is still the stable one. After ``end_step`` updates it is the minimum; the
    checkpoint is there.
    """

    start_step: int
    end_step: int
    num_decay_steps: int


class PhaseInfo(TypedDict):
    """The position of a run in the schedule.

    Attributes:
        phase: Name of the current phase.
        start_step: Updates done at the start of the phase.
        end_step: Updates done at the end of the phase.
        progress: Fraction of the phase that is done, from 0 to 1.
        checkpoint_step: Updates done at the next checkpoint, or at the current one.
        is_checkpoint: Whether the run is at that checkpoint.
    """

    phase: Literal["warmup", "stable", "decay"]
    start_step: int
    end_step: int
    progress: float
    checkpoint_step: int
    is_checkpoint: bool


def estimate_checkpoint_steps(total_steps: int, num_checkpoints: int = 3) -> list[int]:
    """Return the number of updates at each checkpoint: the last is at the end, and each is half as far as the next.

    Checkpoint :math:`i` of :math:`n` (from 1) is at ``total_steps`` divided by :math:`2^{n - i}`, rounded down.

    Args:
        total_steps: Updates of the run.
        num_checkpoints: Number of checkpoints.

    Raises:
        SchedulerSettingsError: An argument is not a whole number above 0, or the run is too short for the checkpoints.
        TypeError: An argument is not a number.

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
            f"`num_checkpoints` is {num_checkpoints}, but a run of {total_steps} updates is too short for that: each "
            f"checkpoint is twice as far as the previous one, which takes at least {num_needed_steps} updates. Use "
            "fewer checkpoints, or train longer."
        )
    return [total_steps // 2**exponent for exponent in reversed(range(num_checkpoints))]


def plan_decays(
    checkpoint_steps: Sequence[int], decay_phase_ratio: float = 0.1, num_warmup_steps: int = 0
) -> list[DecayInfo]:
    """Return the decay phase before each checkpoint.

    The decay before a checkpoint at update :math:`c` takes ``round(decay_phase_ratio * c)`` updates, but at least one.
    It never starts during the warm-up or before the previous checkpoint.

    Args:
        checkpoint_steps: Updates done at each checkpoint, in ascending order.
        decay_phase_ratio: Length of a decay as a fraction of the updates up to its checkpoint.
        num_warmup_steps: Length of the warm-up, in updates.

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
    r"""Return the learning rate of the update with the 0-based index ``update``.

    .. math::

        \eta(t) = \begin{cases}
            \eta_w + (\eta_0 - \eta_w) \, t / W & t < W \\
            \eta_e + (\eta_0 - \eta_e) \, (1 - f(p)), \quad
                p = \frac{t - s}{c - s} & s < t \le c \text{ for a decay from } s \text{ to } c \\
            \eta_e & t \text{ after the last decay} \\
            \eta_0 & \text{otherwise}
        \end{cases}

    where :math:`f(p) = \sqrt{p}`, the best shape according to Hägele et al., "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations" (2024), arXiv:2405.18392, or :math:`f(p) = p`.

    Args:
        update: Index :math:`t` of the update, which is also the number of updates done before it.
        decays: The decays, from :math:`s` (``start_step``) to :math:`c` (``end_step``), as :func:`plan_decays` returns
            them.
        lr: Learning rate :math:`\eta_0` of the stable phase.
        lr_min: Learning rate :math:`\eta_e` at the end of a decay.
        num_warmup_steps: Length :math:`W` of the warm-up, in updates.
        warmup_starting_lr: Learning rate :math:`\eta_w` of the first warm-up update.
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
    """Warms up, keeps the learning rate constant, and decays it before each checkpoint.

    The curve is :func:`wsd_lr`, applied to the base value of each parameter group. :func:`estimate_checkpoint_steps`
    places the checkpoints, and :func:`plan_decays` the decays. At a checkpoint the rate is the minimum; one update
    later it is the stable rate again, until the next decay. The last checkpoint is the end of the run.
    :class:`~pytorch_accelerated.callbacks.WSDCheckpointCallback` saves the model before and after each decay.

    A run that continues from a state of the stable phase is a new run: its scheduler counts from 0 and plans its own
    checkpoints. With ``is_continuation_from_checkpoint`` it starts at the stable rate.

    A group never exceeds its base value: a group whose base value is below ``lr_min`` or ``warmup_starting_lr`` keeps
    its base value in that phase.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        num_epochs: Epochs of the run, possibly fractional. Together with ``num_update_steps_per_epoch`` it determines
            the length of the run.
        num_update_steps_per_epoch: Updates per epoch.
        total_steps: Updates of the run; replaces the two arguments above.
        num_warmup_steps: Updates of warm-up; rounded if fractional.
        decay_phase_ratio: Length of a decay as a fraction of the updates up to its checkpoint, above 0 and at most 1. A
            decay takes at least one update.
        lr_min: Learning rate at the end of each decay.
        warmup_starting_lr: Learning rate of the first warm-up update.
        use_inverse_sqrt_decay: Whether a decay follows one minus the square root of its progress; otherwise it is
            linear.
        num_checkpoints: Number of checkpoints in the run.
        is_continuation_from_checkpoint: Whether the run continues from a state of an earlier run's stable phase. There
            is then no warm-up, whatever ``num_warmup_steps`` is.

    Raises:
        SchedulerSettingsError: The length of the run is missing or contradictory, a setting is out of range, the first
            checkpoint is within the warm-up, or ``lr_min`` or ``warmup_starting_lr`` is above the initial learning rate
            of the optimizer.
        TypeError: A setting is not a number.

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
        check_number("decay_phase_ratio", decay_phase_ratio, "a fraction of the run", is_zero_allowed=False, maximum=1)
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
        """Return a function that creates this scheduler from an optimizer; pass it to ``Trainer.train``.

        The arguments are those of the class, with two exceptions: ``total_num_epochs`` is the length of the run, and
        ``num_warmup_epochs`` is the length of the warm-up in epochs, possibly fractional (``None`` for no warm-up).
        Each number may be a placeholder or an expression of placeholders, which the trainer replaces with the numbers
        of the run. By default the schedule is as long as the run.

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
        """Return the number of updates at each checkpoint, in ascending order."""
        return [decay["end_step"] for decay in self._decays]

    def get_decay_info(self) -> list[DecayInfo]:
        """Return the decay phase before each checkpoint, in order."""
        return [decay.copy() for decay in self._decays]

    def get_phase_info(self, num_updates: int) -> PhaseInfo:
        """Return the phase of the schedule after ``num_updates`` updates.

        A decay lasts from its ``start_step`` to its ``end_step``, both included. A negative number of updates counts as
        0, and one beyond the end of the run as the end.

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
        """Return the current phase of the schedule."""
        return self.get_phase_info(self.num_updates)

    def get_current_step(self) -> int:
        """Return the number of updates done, as counted by :meth:`step`; -1 before its first call."""
        return self.num_updates

    def state_dict(self) -> StateDict:
        """Return the position and the base values; for information also the kind and length of the run."""
        return {
            **super().state_dict(),
            "is_continuation_from_checkpoint": self.is_continuation_from_checkpoint,
            "total_steps": self.total_steps,
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the position and the base values, and set the learning rates for that position.

        Everything else stays as this scheduler was configured, including the length of the run and whether it is a
        continuation: a resumed run may be longer than originally planned, and a run that continues from a checkpoint of
        another run does not become that run. The restored position counts from the start of this schedule. To start the
        schedule of a continuation from 0, pass ``initial_checkpoint`` to
        :class:`~pytorch_accelerated.callbacks.WSDCheckpointCallback`, or load the checkpoint without the scheduler
        (``load_scheduler=False``).

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        # Overridden for the name of the argument, which is public: the base class calls it `scheduler_state_dict`.
        super().load_state_dict(state_dict)

    def _place_checkpoints(self) -> list[int]:
        steps = estimate_checkpoint_steps(self.total_steps, self.num_checkpoints)
        if steps[0] <= self.num_warmup_steps:
            raise SchedulerSettingsError(
                f"The warm-up takes {self.num_warmup_steps} updates, but the first checkpoint is after {steps[0]} of "
                f"{self.total_steps} updates, and its decay needs at least one update after the warm-up. Shorten the "
                "warm-up, use fewer checkpoints, or train longer."
            )
        return steps


def _total_steps(num_epochs: float | None, num_update_steps_per_epoch: int | None, total_steps: int | None) -> int:
    if num_epochs is None or num_update_steps_per_epoch is None:
        if total_steps is None:
            raise SchedulerSettingsError(
                f"`num_epochs` is {num_epochs!r}, `num_update_steps_per_epoch` is {num_update_steps_per_epoch!r} and "
                "`total_steps` is None, but the scheduler needs the length of the run. Pass the first two, or the last."
            )
        return _as_count("total_steps", total_steps)
    check_number("num_epochs", num_epochs, "the length of the run", is_zero_allowed=False)
    check_number("num_update_steps_per_epoch", num_update_steps_per_epoch, "the length of an epoch")
    num_steps = round(num_epochs * num_update_steps_per_epoch)
    if total_steps is not None and total_steps != num_steps:
        raise SchedulerSettingsError(
            f"`total_steps` is {total_steps!r}, but `num_epochs` times `num_update_steps_per_epoch` is {num_steps}. "
            "Both are the length of the run, so they must be equal. Omit the wrong one."
        )
    return _as_count("num_epochs * num_update_steps_per_epoch", num_steps)


def _as_count(name: str, value: float) -> int:
    check_number(name, value, "a count", is_zero_allowed=False)
    if value != int(value):
        raise SchedulerSettingsError(f"`{name}` is {value!r}, but a count must be a whole number. Round it up or down.")
    return int(value)


def _next_decay(update: float, decays: Sequence[DecayInfo]) -> DecayInfo:
    """Return the first decay that has not ended, or the last one if all have."""
    return next((decay for decay in decays if update <= decay["end_step"]), decays[-1])
