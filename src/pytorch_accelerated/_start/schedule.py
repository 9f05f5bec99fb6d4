"""Takes over the scheduler of a run: checks it, and finds out how it is stepped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_accelerated._distributed.consensus import overrides_any, replaces_any
from pytorch_accelerated._scheduling.start import create_checked_scheduler, start_stepping
from pytorch_accelerated._views import run_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytorch_accelerated._types import Scheduler, Schedulers
    from pytorch_accelerated.trainer import Trainer


def take_over_scheduler(trainer: Trainer, create: Callable[[], Schedulers | None], is_timm: bool) -> Scheduler | None:
    """Return the checked scheduler of a run, or the group of several. Must be called on every process.

    Args:
        trainer: The trainer, whose subclass may step its schedulers itself.
        create: Returns the scheduler, or several of them.
        is_timm: Whether the trainer is one for the schedulers of timm.
    """
    run, is_overridden = run_of(trainer), overrides_any(trainer, ["scheduler_step"])
    scheduler: Scheduler | None = create_checked_scheduler(
        create,
        trainer.optimizer,
        is_of_function=trainer.create_scheduler_fn is not None and not overrides_any(trainer, ["create_scheduler"]),
        is_stepped_by_trainer=not is_overridden,
    )
    run.stepping.plan(scheduler, is_timm=is_timm)
    run.stepping.plan_hook(is_overridden=is_overridden, is_replaced=replaces_any(trainer, ["scheduler_step"]))
    if not replaces_any(trainer, ["scheduler_step", *(["training_run_epoch_end"] if is_timm else [])]):
        start_stepping(run.stepping, run.config, trainer.run_history, run.eval_dataloaders)
    return scheduler
