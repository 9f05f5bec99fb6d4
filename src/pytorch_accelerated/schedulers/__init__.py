"""Learning-rate schedules in units of optimizer updates.

Each schedule has a module with two parts: the curve as a pure function, and a scheduler class that applies the curve to
an optimizer and has a ``create_scheduler_fn`` with placeholders for the length of the run. A new schedule follows the
same pattern, derives from `StatefulSchedulerBase`, and is exported here.
"""

from pytorch_accelerated.schedulers.cosine_scheduler import CosineLrScheduler, cosine_lr
from pytorch_accelerated.schedulers.scheduler_base import SchedulerBase, StatefulSchedulerBase
from pytorch_accelerated.schedulers.wsd_scheduler import WSDLrScheduler, estimate_checkpoint_steps, plan_decays, wsd_lr

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
