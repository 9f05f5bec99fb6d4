"""Learning-rate schedules that are counted in updates, each curve also as a plain function."""

from pytorch_accelerated.schedulers.cosine_scheduler import CosineLrScheduler, cosine_lr
from pytorch_accelerated.schedulers.scheduler_base import SchedulerBase, StatefulSchedulerBase
from pytorch_accelerated.schedulers.wsd_scheduler import (
    WSDLrScheduler,
    estimate_checkpoint_steps,
    plan_decays,
    wsd_lr,
)

__all__ = [
    "CosineLrScheduler",
    "SchedulerBase",
    "StatefulSchedulerBase",
    "WSDLrScheduler",
    "cosine_lr",
    "estimate_checkpoint_steps",
    "plan_decays",
    "wsd_lr",
]
