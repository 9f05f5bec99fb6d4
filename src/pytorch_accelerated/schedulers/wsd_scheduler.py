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
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from pytorch_accelerated._messages import warn
from pytorch_accelerated.exceptions import SchedulerSettingsError
from pytorch_accelerated.schedulers._placeholders import NumberOrPlaceholder, TrainerPlaceholderValues
from pytorch_accelerated.schedulers.scheduler_base import (
    LOWEST_RATE,
    StatefulSchedulerBase,
    check_number,
    check_rate,
    interpolate,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from typing_extensions import Self

    from pytorch_accelerated._types import StateDict

_SETTINGS_OF_THE_CURVE = ("decay_phase_ratio", "lr_min", "use_inverse_sqrt_decay", "num_checkpoints")
"""What a continuation takes from the run that it continues."""


class DecayInfo(TypedDict):
    """The period up to a checkpoint, and the decay at its end. All but a length counts updates from the start.

    Attributes:
        period_start: Updates done at the checkpoint before, or 0.
        period_end: Updates done at the checkpoint.
        decay_steps: Length of the decay.
        pre_decay_step: Updates done when the decay starts.
    """

    period_start: int
    period_end: int
    decay_steps: int
    pre_decay_step: int


class PhaseInfo(DecayInfo):
    """The position of a run in the schedule: in which period it is, and in which phase of that period.

    Attributes:
        phase: Name of the current phase.
        start_step: Updates done at the start of the phase.
        end_step: Updates done at the end of the phase.
        progress: Fraction of the phase that is done, from 0 to 1.
        checkpoint_step: Same as ``period_end``: updates done at the next checkpoint, or at the current one.
        is_checkpoint: Whether the run is at that checkpoint.
    """

    phase: Literal["warmup", "stable", "decay"]
    start_step: float
    end_step: float
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


def plan_decays(checkpoint_steps: Sequence[int], decay_phase_ratio: float = 0.1) -> list[DecayInfo]:
    """Return the period up to each checkpoint, with the decay at its end.

    Of the :math:`L` updates since the checkpoint before, the decay takes the last ``decay_phase_ratio`` :math:`L`,
    rounded down.

    Args:
        checkpoint_steps: Updates done at each checkpoint, in ascending order.
        decay_phase_ratio: Length of a decay as a fraction of its period, from 0 to 1.

    Example:
        >>> for period in plan_decays([50, 100]):
        ...     print(period)
        {'period_start': 0, 'period_end': 50, 'decay_steps': 5, 'pre_decay_step': 45}
        {'period_start': 50, 'period_end': 100, 'decay_steps': 5, 'pre_decay_step': 95}
    """
    periods: list[DecayInfo] = []
    start = 0
    for end in checkpoint_steps:
        num_steps = math.floor(decay_phase_ratio * (end - start))
        periods.append(
            {"period_start": start, "period_end": end, "decay_steps": num_steps, "pre_decay_step": end - num_steps}
        )
        start = end
    return periods


def wsd_lr(
    update: float,
    *,
    decays: Sequence[DecayInfo],
    lr: float,
    lr_min: float = 0.0,
    num_warmup_steps: float = 0,
    warmup_starting_lr: float = 0.0,
    use_inverse_sqrt_decay: bool = True,
) -> float:
    r"""Return the learning rate of the update with the 0-based index ``update``.

    .. math::

        \eta(k) = \begin{cases}
            \eta_w + (\eta_0 - \eta_w) \, k / W & k < W \\
            \eta_0 \, f(t), \quad t = \frac{k - s}{c - s}
                & s \le k < c \text{ for a decay from } s \text{ to } c \\
            \eta_0 \, m & k \text{ at or after the last checkpoint} \\
            \eta_0 & \text{otherwise}
        \end{cases}

    where :math:`f(t) = m + (1 - m) (1 - \sqrt{t})`, the best shape according to Hägele et al., "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations" (2024), arXiv:2405.18392; or :math:`f(t) = 1 / (t / m + 1
    - t)`, with which the inverse of the rate grows linearly, as Wen et al. (2024), arXiv:2410.05192, recommend. For
    :math:`m = 0` the latter drops from 1 to 0 at once.

    Args:
        update: Index :math:`k` of the update, which is also the number of updates done before it.
        decays: The decays, from :math:`s` (``pre_decay_step``) to the checkpoint :math:`c` (``period_end``), as
            :func:`plan_decays` returns them.
        lr: Learning rate :math:`\eta_0` of the stable phase.
        lr_min: Learning rate at the end of the run as a fraction :math:`m` of ``lr``.
        num_warmup_steps: Length :math:`W` of the warm-up, in updates, possibly fractional.
        warmup_starting_lr: Learning rate :math:`\eta_w` of the first warm-up update.
        use_inverse_sqrt_decay: Whether :math:`f` is the first of the two functions.

    Example:
        >>> decays = plan_decays([8, 16], decay_phase_ratio=0.5)
        >>> [wsd_lr(update, decays=decays, lr=1.0) for update in (4, 5, 7, 8, 12, 13, 16)]
        [1.0, 0.5, 0.1339745962155614, 1.0, 1.0, 0.5, 0.0]
    """
    if update < num_warmup_steps:
        return interpolate(warmup_starting_lr, lr, update / num_warmup_steps)
    period = next((period for period in decays if update < period["period_end"]), None)
    if period is None:
        return lr * lr_min
    if update <= period["pre_decay_step"]:
        return lr
    progress = (update - period["pre_decay_step"]) / period["decay_steps"]  # above 0
    if use_inverse_sqrt_decay:
        return lr * interpolate(1.0, lr_min, math.sqrt(progress))
    return lr * lr_min / interpolate(lr_min, 1.0, progress)


class WSDLrScheduler(StatefulSchedulerBase):
    """Warms up, keeps the learning rate constant, and decays it before each checkpoint.

    The curve is :func:`wsd_lr`, applied to the base value of each parameter group. :func:`estimate_checkpoint_steps`
    places the checkpoints, and :func:`plan_decays` the decays. The last update before a checkpoint trains at the end of
    the decay, and the first one after it at the stable rate again, until the next decay. The last checkpoint is the end
    of the run, where the rate is the minimum. The constructor sets the rate of the first update, without counting a
    step. :class:`~pytorch_accelerated.callbacks.WSDCheckpointCallback` saves training before and after each decay.

    A run that continues from a state of the stable phase is a new run: its scheduler counts from 0 and plans its own
    checkpoints. With ``is_continuation_from_checkpoint`` it starts at the stable rate; see :meth:`load_state_dict`.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        num_epochs: Epochs of the run, possibly fractional. Together with ``num_update_steps_per_epoch`` it determines
            the length of the run.
        num_update_steps_per_epoch: Updates per epoch.
        total_steps: Updates of the run; replaces the two arguments above.
        num_warmup_steps: Updates of warm-up, possibly fractional; ``None`` for a hundredth of the run, rounded down.
        decay_phase_ratio: Length of a decay as a fraction of the updates since the checkpoint before, from 0 to 1. It
            is rounded down to whole updates; 0 for no decay.
        lr_min: Learning rate at the end of the run as a fraction of each group's base value, from 0 to 1.
        warmup_starting_lr: Learning rate of the first warm-up update. A group with a lower base value keeps that.
        use_inverse_sqrt_decay: Whether a decay follows one minus the square root of its progress. Otherwise the inverse
            of the rate grows linearly.
        num_checkpoints: Number of checkpoints in the run.
        is_continuation_from_checkpoint: Whether the run continues from a state of an earlier run's stable phase. There
            is then no warm-up, whatever ``num_warmup_steps`` is.

    Attributes:
        checkpoint_steps: Updates done at each checkpoint.
        checkpoint_decay_info: The period up to each checkpoint; see :class:`DecayInfo`.

    Raises:
        SchedulerSettingsError: The length of the run is missing, contradictory or too short for the checkpoints, a
            setting is out of range, or ``warmup_starting_lr`` is given and above the initial learning rate of the
            optimizer.
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

    _takes_partial_epochs: ClassVar[bool] = True  # of a run that ends within an epoch
    checkpoint_steps: list[int]
    checkpoint_decay_info: list[DecayInfo]

    def __init__(
        self,
        optimizer: Optimizer,
        num_epochs: float | None = None,
        num_update_steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        num_warmup_steps: float | None = 0,
        decay_phase_ratio: float = 0.1,
        lr_min: float = LOWEST_RATE,
        warmup_starting_lr: float = LOWEST_RATE,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.total_steps = _total_steps(num_epochs, num_update_steps_per_epoch, total_steps)
        self.num_warmup_steps = self.total_steps // 100 if num_warmup_steps is None else num_warmup_steps
        self.decay_phase_ratio = decay_phase_ratio
        self.lr_min = lr_min
        self.warmup_starting_lr = warmup_starting_lr
        self.use_inverse_sqrt_decay = use_inverse_sqrt_decay
        self.num_checkpoints = num_checkpoints
        self.is_continuation_from_checkpoint = is_continuation_from_checkpoint
        self._check_settings()
        self._set_checkpoints(estimate_checkpoint_steps(self.total_steps, num_checkpoints))
        # Not the method of a subclass, whose constructor has not finished.
        self._set_values(WSDLrScheduler.get_updated_values(self, 0))

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: NumberOrPlaceholder = TrainerPlaceholderValues.NUM_EPOCHS,
        num_update_steps_per_epoch: NumberOrPlaceholder = (
            TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH
        ),
        num_warmup_epochs: NumberOrPlaceholder | None = None,
        decay_phase_ratio: NumberOrPlaceholder = 0.1,
        lr_min: NumberOrPlaceholder = LOWEST_RATE,
        warmup_starting_lr: NumberOrPlaceholder = LOWEST_RATE,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> functools.partial[Self]:
        """Return a function that creates this scheduler from an optimizer; pass it to ``Trainer.train``.

        The arguments are those of the class, with two exceptions: ``total_num_epochs`` is the length of the run, and
        ``num_warmup_epochs`` is the length of the warm-up in epochs, possibly fractional (``None`` for a hundredth of
        the run). Each number may be a placeholder or an expression of placeholders, which the trainer replaces with the
        numbers of the run. By default the schedule is as long as the run.

        Example:
            >>> create = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5)
            >>> create.keywords["num_warmup_steps"]
            0.5 * TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH
        """
        settings: dict[str, Any] = {
            "num_epochs": total_num_epochs,
            "num_update_steps_per_epoch": num_update_steps_per_epoch,
            "num_warmup_steps": None if num_warmup_epochs is None else num_warmup_epochs * num_update_steps_per_epoch,
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
                decays=self.checkpoint_decay_info,
                lr=base_lr,
                lr_min=self.lr_min,
                num_warmup_steps=self._warmup_length,
                warmup_starting_lr=min(self.warmup_starting_lr, base_lr),
                use_inverse_sqrt_decay=self.use_inverse_sqrt_decay,
            )
            for base_lr in self.base_values
        ]

    def get_checkpoint_steps(self) -> list[int]:
        """Return the number of updates at each checkpoint, in ascending order."""
        return list(self.checkpoint_steps)

    def get_decay_info(self) -> list[DecayInfo]:
        """Return the period up to each checkpoint, with the decay at its end, in order."""
        return [period.copy() for period in self.checkpoint_decay_info]

    def get_phase_info(self, num_updates: int) -> PhaseInfo:
        """Return the period and the phase of the schedule after ``num_updates`` updates.

        A decay lasts from its ``pre_decay_step`` to its ``period_end``, both included. A negative number of updates
        counts as 0, and one beyond the end of the run as the end.

        Args:
            num_updates: Updates done.
        """
        step = min(max(num_updates, 0), self.total_steps)
        period = next(period for period in self.checkpoint_decay_info if step <= period["period_end"])
        phase: Literal["warmup", "stable", "decay"]
        start: float
        end: float
        if step < self._warmup_length:
            phase, start, end = "warmup", 0, self._warmup_length
        elif step < period["pre_decay_step"]:
            phase, start, end = "stable", max(self._warmup_length, period["period_start"]), period["pre_decay_step"]
        else:
            phase, start, end = "decay", period["pre_decay_step"], period["period_end"]
        return {
            **period,
            "phase": phase,
            "start_step": start,
            "end_step": end,
            "progress": (step - start) / (end - start) if start < end else 1.0,
            "checkpoint_step": period["period_end"],
            "is_checkpoint": step == period["period_end"],
        }

    def _get_checkpoint_info(self, num_updates: int) -> tuple[int, int]:
        """Return the length of the period after this number of updates, and how many of them are in it."""
        later = (info for info in self.checkpoint_decay_info if num_updates < info["period_end"])
        period = next(later, self.checkpoint_decay_info[-1])
        return period["period_end"] - period["period_start"], num_updates - period["period_start"]

    # In 0.1.61, the method had a cache, which programs clear.
    _get_checkpoint_info.cache_clear = lambda: None  # type: ignore[attr-defined]

    def get_current_phase_info(self) -> PhaseInfo:
        """Return the current period and phase of the schedule."""
        return self.get_phase_info(self.num_updates)

    def get_current_step(self) -> int:
        """Return the number of updates done, as counted by :meth:`step`; -1 before its first call."""
        return self.num_updates

    @property
    def previous_checkpoint_step(self) -> int | None:
        """Updates done at the last checkpoint that was reached; ``None`` before the first."""
        return max((step for step in self.checkpoint_steps if step <= self.num_updates), default=None)

    def state_dict(self) -> StateDict:
        """Return the position, base values, present values and, as 0.1.61 does, settings and plan."""
        names = (
            *_SETTINGS_OF_THE_CURVE,
            "total_steps",
            "num_warmup_steps",
            "warmup_starting_lr",
            "is_continuation_from_checkpoint",
            "previous_checkpoint_step",
        )
        return {
            **super().state_dict(),
            **{name: getattr(self, name) for name in names},
            "checkpoint_steps": self.get_checkpoint_steps(),
            "checkpoint_decay_info": self.get_decay_info(),
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the position and the base values, and set the learning rates for that position.

        A state that 0.1.61 saved has no position; the present one is kept. Everything else stays as this scheduler was
        configured, including the length of the run: a resumed run may be longer than originally planned.

        A continuation (``is_continuation_from_checkpoint``) starts a stable phase of its own: it takes the base values,
        ``decay_phase_ratio``, ``lr_min``, ``use_inverse_sqrt_decay`` and ``num_checkpoints`` from the state, but counts
        from the start again, and plans its checkpoints for its own length. It warns if a setting changes. When the
        trainer resumes a continuation (``resume_from``), it restores the position too; see :meth:`resume_from`.

        Args:
            state_dict: What :meth:`state_dict` returned, here or in 0.1.61.

        Raises:
            SchedulerSettingsError: The run is too short for the number of checkpoints in the state.
            ValueError: It is the state of a different scheduler.
        """
        position = state_dict.get("num_updates", self.num_updates if "checkpoint_decay_info" in state_dict else None)
        if self.is_continuation_from_checkpoint and position is not None:
            self._take_over_settings(state_dict)
            position = -1
        super().load_state_dict(state_dict if position is None else {**state_dict, "num_updates": position})
        self.step_update(max(self.num_updates, 0))

    def resume_from(self, state_dict: StateDict) -> None:
        """Restore the state of the very run that continues, a continuation included; called by the trainer.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        self.load_state_dict(state_dict)
        self.num_updates = state_dict.get("num_updates", self.num_updates)
        self.step_update(max(self.num_updates, 0))

    def _take_over_settings(self, state: StateDict) -> None:
        own = {name: getattr(self, name) for name in _SETTINGS_OF_THE_CURVE}
        settings = {name: state.get(name, value) for name, value in own.items()}
        replaced = [f"`{name}` is {settings[name]!r}, not {own[name]!r}" for name in own if settings[name] != own[name]]
        checkpoint_steps = estimate_checkpoint_steps(self.total_steps, settings["num_checkpoints"])  # may raise
        if replaced:
            warn(
                f"This run continues another one, and takes over its decay: {', '.join(replaced)}. Pass the same "
                "settings as before, or load the checkpoint without its scheduler (`load_scheduler=False`).",
            )
        vars(self).update(settings)
        self._set_checkpoints(checkpoint_steps)

    def _set_checkpoints(self, checkpoint_steps: list[int]) -> None:
        self.checkpoint_steps = checkpoint_steps
        self.checkpoint_decay_info = plan_decays(checkpoint_steps, self.decay_phase_ratio)

    @property
    def _warmup_length(self) -> float:
        return 0 if self.is_continuation_from_checkpoint else self.num_warmup_steps

    def _check_settings(self) -> None:
        check_number("num_warmup_steps", self.num_warmup_steps, "the length of the warm-up")
        check_number("decay_phase_ratio", self.decay_phase_ratio, "a fraction of the run", maximum=1)
        check_number("lr_min", self.lr_min, "a fraction of the initial learning rate", maximum=1)
        if self._warmup_length > 0:
            check_rate("warmup_starting_lr", self.warmup_starting_lr, self.base_values)


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
