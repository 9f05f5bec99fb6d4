"""A cosine schedule with k-decay, after a linear warm-up and before a cooldown at the minimum."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

from pytorch_accelerated._messages import warn
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


def cosine_lr(
    update: float,
    *,
    total_updates: float,
    lr: float,
    lr_min: float = 0.0,
    k_decay: float = 1.0,
    num_warmup_updates: float = 0.0,
    warmup_starting_lr: float = 0.0,
    num_cooldown_updates: float = 0.0,
) -> float:
    r"""Return the learning rate of the update with the 0-based index ``update``.

    .. math::

        \eta(t) = \begin{cases}
            \eta_w + (\eta_0 - \eta_w) \, t / W & t < W \\
            \eta_e + \frac{1}{2} (\eta_0 - \eta_e) \left(1 + \cos(\pi \, p^k)\right), \quad
                p = \frac{t - W}{T - C - W} & W \le t < T - C \\
            \eta_e & t \ge T - C
        \end{cases}

    The curve is continuous: the warm-up ends where the cosine starts, at ``lr``, and the cosine ends where the cooldown
    starts, at ``lr_min``; but if warm-up and cooldown together exceed the run, the warm-up is followed by the cooldown.
    Without warm-up and cooldown this is the cosine with k-decay of Zhang and Li, "k-decay: A New
    Method For Learning Rate Schedule" (2020), arXiv:2004.05909. With ``k_decay=1`` it is the cosine of Loshchilov and
    Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (2017), arXiv:1608.03983.

    Args:
        update: Index :math:`t` of the update, which is also the number of updates done before it.
        total_updates: Number :math:`T` of updates in the run.
        lr: Learning rate :math:`\eta_0` at the end of the warm-up.
        lr_min: Learning rate :math:`\eta_e` at the end of the run.
        k_decay: Exponent :math:`k`. If above 1, the rate stays high for longer and then falls faster.
        num_warmup_updates: Length :math:`W` of the warm-up, in updates.
        warmup_starting_lr: Learning rate :math:`\eta_w` of the first warm-up update.
        num_cooldown_updates: Length :math:`C` of the cooldown, in updates.

    Example:
        >>> [cosine_lr(update, total_updates=4, lr=1.0) for update in (0, 2, 4)]
        [1.0, 0.5, 0.0]
        >>> [cosine_lr(update, total_updates=8, lr=1.0, num_warmup_updates=4) for update in (0, 1, 4, 6)]
        [0.0, 0.25, 1.0, 0.5]
    """
    decay_end = total_updates - num_cooldown_updates
    if update < num_warmup_updates:
        return interpolate(warmup_starting_lr, lr, update / num_warmup_updates)
    if update >= decay_end:
        return lr_min
    progress = (update - num_warmup_updates) / (decay_end - num_warmup_updates)
    return interpolate(lr_min, lr, (1 + math.cos(math.pi * progress**k_decay)) / 2)


class CosineLrScheduler(StatefulSchedulerBase):
    """Decays the learning rate along a cosine, after a linear warm-up and before a cooldown at the minimum.

    The curve is :func:`cosine_lr`, applied to the base value of each parameter group. A group never exceeds its base
    value: a group whose base value is below ``lr_min`` or ``warmup_starting_lr`` keeps its base value in that phase.
    The constructor sets the rate of the first update, without counting a step.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        total_num_epochs: Epochs of the run, including warm-up and cooldown.
        num_update_steps_per_epoch: Updates per epoch.
        k_decay: Exponent of the k-decay; 1 gives the plain cosine.
        lr_min: Learning rate at the end of the run.
        min_lr_ratio: Learning rate at the end of the run as a fraction of each group's base value, from 0 to 1.
            Replaces ``lr_min`` if given.
        num_warmup_epochs: Epochs of warm-up, possibly fractional; 0 for no warm-up.
        warmup_starting_lr: Learning rate of the first warm-up update.
        warmup_starting_lr_ratio: Learning rate of the first warm-up update as a fraction of each group's base value,
            from 0 to 1. Replaces ``warmup_starting_lr`` if given.
        num_cooldown_epochs: Epochs at the minimum at the end of the run, possibly fractional.

    Raises:
        SchedulerSettingsError: A setting is out of range, or ``lr_min`` or the start of the warm-up is given, and is
            above the initial learning rate of the optimizer.
        TypeError: A setting is not a number.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        >>> scheduler = CosineLrScheduler(optimizer, total_num_epochs=2, num_update_steps_per_epoch=4, min_lr_ratio=0.0)
        >>> for _ in range(5):
        ...     scheduler.step()
        >>> round(optimizer.param_groups[0]["lr"], 6)
        0.4
    """

    _takes_partial_epochs: ClassVar[bool] = True  # of a run that ends within an epoch

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_epochs: float,
        num_update_steps_per_epoch: int,
        k_decay: float = 1.0,
        lr_min: float = LOWEST_RATE,
        min_lr_ratio: float | None = None,
        num_warmup_epochs: float = 0,
        warmup_starting_lr: float = LOWEST_RATE,
        warmup_starting_lr_ratio: float | None = None,
        num_cooldown_epochs: float = 0,
    ) -> None:
        super().__init__(optimizer)
        self.total_num_epochs = total_num_epochs
        self.num_update_steps_per_epoch = num_update_steps_per_epoch
        self.k_decay = k_decay
        self.lr_min = lr_min
        self.min_lr_ratio = min_lr_ratio
        self.num_warmup_epochs = num_warmup_epochs
        self.warmup_starting_lr = warmup_starting_lr
        self.warmup_starting_lr_ratio = warmup_starting_lr_ratio
        self.num_cooldown_epochs = num_cooldown_epochs
        self._check_settings()
        # Not the method of a subclass, whose constructor has not finished.
        self._set_values(CosineLrScheduler.get_updated_values(self, 0))

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: NumberOrPlaceholder = TrainerPlaceholderValues.NUM_EPOCHS,
        num_update_steps_per_epoch: NumberOrPlaceholder = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        k_decay: NumberOrPlaceholder = 1.0,
        lr_min: NumberOrPlaceholder = LOWEST_RATE,
        min_lr_ratio: NumberOrPlaceholder | None = None,
        num_warmup_epochs: NumberOrPlaceholder = 0,
        warmup_starting_lr: NumberOrPlaceholder = LOWEST_RATE,
        warmup_starting_lr_ratio: NumberOrPlaceholder | None = None,
        num_cooldown_epochs: NumberOrPlaceholder = 0,
    ) -> functools.partial[Self]:
        """Return a function that creates this scheduler from an optimizer; pass it to ``Trainer.train``.

        The arguments are those of the class. Each may be a placeholder or an expression of placeholders, which the
        trainer replaces with the numbers of the run. By default the schedule is as long as the run.

        Example:
            >>> create = CosineLrScheduler.create_scheduler_fn(
            ...     num_warmup_epochs=TrainerPlaceholderValues.NUM_EPOCHS / 10
            ... )
            >>> create.keywords["num_warmup_epochs"]
            TrainerPlaceholderValues.NUM_EPOCHS / 10
        """
        settings: dict[str, Any] = {
            "total_num_epochs": total_num_epochs,
            "num_update_steps_per_epoch": num_update_steps_per_epoch,
            "k_decay": k_decay,
            "lr_min": lr_min,
            "min_lr_ratio": min_lr_ratio,
            "num_warmup_epochs": num_warmup_epochs,
            "warmup_starting_lr": warmup_starting_lr,
            "warmup_starting_lr_ratio": warmup_starting_lr_ratio,
            "num_cooldown_epochs": num_cooldown_epochs,
        }
        return functools.partial(cls, **settings)

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the learning rate of each parameter group after ``num_updates`` updates."""
        lengths = {
            "total_updates": self.total_iterations,
            "num_warmup_updates": self.warmup_iterations,
            "num_cooldown_updates": self.num_cooldown_iterations,
        }
        return [
            cosine_lr(
                num_updates,
                lr=base_lr,
                lr_min=_lower_end(self.lr_min, self.min_lr_ratio, base_lr),
                k_decay=self.k_decay,
                warmup_starting_lr=_lower_end(self.warmup_starting_lr, self.warmup_starting_lr_ratio, base_lr),
                **lengths,
            )
            for base_lr in self.base_values
        ]

    def state_dict(self) -> StateDict:
        """Return position, base values and present values; also the curve, as 0.1.61 needs it to load the state."""
        curve = {
            "total_iterations": self.total_iterations,
            "warmup_iterations": self.warmup_iterations,
            "num_cooldown_iterations": self.num_cooldown_iterations,
            "warmup_lr_init": self.warmup_lr_init,
            "warmup_lr_ratio": self.warmup_lr_ratio,
            "lr_min": self.lr_min,
            "lr_min_ratio": self.lr_min_ratio,
            "k_decay": self.k_decay,
        }
        return {**super().state_dict(), **curve}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the position and the base values, and set the learning rates for that position.

        Settings are not restored, so a resumed run may be longer than originally planned.

        Args:
            state_dict: What :meth:`state_dict` returned, here or in 0.1.61.
        """
        super().load_state_dict(state_dict)
        self.step_update(max(self.num_updates, 0))

    # What 0.1.61 calls the settings.

    @property
    def total_iterations(self) -> float:
        """Updates of the run."""
        return self.total_num_epochs * self.num_update_steps_per_epoch

    @property
    def warmup_iterations(self) -> float:
        """Updates of the warm-up."""
        return self.num_warmup_epochs * self.num_update_steps_per_epoch

    @property
    def num_cooldown_iterations(self) -> float:
        """Updates of the cooldown."""
        return self.num_cooldown_epochs * self.num_update_steps_per_epoch

    @property
    def warmup_lr_init(self) -> float:
        """Same as ``warmup_starting_lr``."""
        return self.warmup_starting_lr

    @property
    def warmup_lr_ratio(self) -> float | None:
        """Same as ``warmup_starting_lr_ratio``."""
        return self.warmup_starting_lr_ratio

    @property
    def lr_min_ratio(self) -> float | None:
        """Same as ``min_lr_ratio``."""
        return self.min_lr_ratio

    def _check_settings(self) -> None:
        num_updates = self.num_update_steps_per_epoch
        check_number("total_num_epochs", self.total_num_epochs, "the length of the run", is_zero_allowed=False)
        check_number("num_update_steps_per_epoch", num_updates, "the length of an epoch", is_zero_allowed=False)
        check_number("k_decay", self.k_decay, "the exponent of the decay", is_zero_allowed=False)
        check_number("num_warmup_epochs", self.num_warmup_epochs, "the length of the warm-up")
        check_number("num_cooldown_epochs", self.num_cooldown_epochs, "the length of the cooldown")
        self._check_lower_end("lr_min", self.lr_min, "min_lr_ratio", self.min_lr_ratio)
        if self.num_warmup_epochs > 0:
            self._check_lower_end(
                "warmup_starting_lr",
                self.warmup_starting_lr,
                "warmup_starting_lr_ratio",
                self.warmup_starting_lr_ratio,
            )
        if self.num_warmup_epochs + self.num_cooldown_epochs > self.total_num_epochs:
            warn(
                f"`num_warmup_epochs` is {self.num_warmup_epochs!r} and `num_cooldown_epochs` is "
                f"{self.num_cooldown_epochs!r}, but both are part of the run, which has only "
                f"{self.total_num_epochs!r} epochs. The rate drops to the minimum after the warm-up, or the warm-up "
                "does not end. Shorten them, or train longer.",
            )

    def _check_lower_end(self, rate_name: str, rate: float, ratio_name: str, ratio: float | None) -> None:
        if ratio is None:
            check_rate(rate_name, rate, self.base_values)
        else:
            check_number(ratio_name, ratio, "a fraction of the initial learning rate", maximum=1)


def _lower_end(rate: float, ratio: float | None, base_lr: float) -> float:
    return min(rate, base_lr) if ratio is None else ratio * base_lr
