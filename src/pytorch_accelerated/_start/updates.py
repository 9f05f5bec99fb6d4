"""Sets up what makes the updates of a run: accumulation window, closure, parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pytorch_accelerated._accumulation import AccumulationWindow, OutsideParameters
from pytorch_accelerated._distributed.accelerator import is_sharded
from pytorch_accelerated._distributed.buckets import fix_bucket_order
from pytorch_accelerated._distributed.collectives import broadcast_values
from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._optimizers.closure import create_closure
from pytorch_accelerated._optimizers.group import OptimizerGroup

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from pytorch_accelerated._run import Run


def set_up_window(
    run: Run, optimizer: Optimizer, accelerator: Accelerator, is_stepped_by_user: bool
) -> AccumulationWindow:
    """Return an empty accumulation window, and give it and the run the closure that the optimizer needs, if any.

    Args:
        run: The run, which has its configuration and knows whether other processes take part.
        optimizer: The prepared optimizer.
        accelerator: Of the trainer.
        is_stepped_by_user: Whether the program has an `optimizer_step` of its own.
    """
    config, group = run.config, unwrap_optimizer(optimizer)
    nominal_weight = float(config.train_per_device_batch_size or 1) if run.consensus.is_needed else None
    window = AccumulationWindow(
        config.gradient_accumulation_steps, nominal_weight, group.updated if isinstance(group, OptimizerGroup) else None
    )
    window.reset()  # what was updated before the run
    run.closure = window.closure = create_closure(
        optimizer,
        accelerator.device,
        has_scaler=accelerator.scaler is not None,
        is_sharded=is_sharded(accelerator),
        is_stepped_by_user=is_stepped_by_user,
    )
    return window


def set_up_parameters(run: Run, model: nn.Module, optimizer: Optimizer, has_comm_hook: bool) -> None:
    """Find the parameters that the optimizer holds and the model does not, and discard gradients from before the run.

    Gradients of parameters that the optimizer does not hold are discarded too. From here on, gradients are added up
    over all processes in a fixed order.
    """
    if isinstance(model, nn.Module):
        model.zero_grad()
    optimizer.zero_grad()
    if not run.is_sharded:  # otherwise the optimizer has other parameters than the model, which stand for the same
        run.outside_parameters = OutsideParameters(model, optimizer)
    if run.config.is_distributed:
        broadcast_values(run.outside_parameters)
        run.limit_of_exactness = fix_bucket_order(model, run.config.num_processes, has_comm_hook)
