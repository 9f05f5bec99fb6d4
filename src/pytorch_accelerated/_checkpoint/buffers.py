"""The buffers of the model on each process: DDP replaces them by those of the main process, but not at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from pytorch_accelerated._checkpoint.names import portable_name
from pytorch_accelerated._models.wrappers import without_compilation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from pytorch_accelerated._types import StateDict, StateMapping


def local_buffers_of(model: nn.Module, process_index: int) -> StateDict | None:
    """Return what this process has to restore; ``None`` if DDP has not wrapped the model.

    Within an accumulation window and after an evaluation, DDP sends no buffers before the next forward pass, and those
    of each process go on by themselves. Then, those of a process other than the main one are in the result.

    Args:
        model: The prepared model.
        process_index: The rank of this process.
    """
    ddp = without_compilation(model)
    if not isinstance(ddp, DistributedDataParallel):
        return None
    are_replaced = ddp.broadcast_buffers and ddp.require_forward_param_sync
    values = {} if are_replaced or process_index == 0 else dict(_named_buffers(ddp.module))
    return {"syncs_next": ddp.require_forward_param_sync, "values": values}


def load_local_buffers(model: nn.Module, state: StateMapping | None) -> None:
    """Restore what `local_buffers_of` returned, once the model has the buffers of the main process.

    Args:
        model: The prepared model.
        state: The state; ``None`` leaves everything to DDP.
    """
    ddp = without_compilation(model)
    if state is None or not isinstance(ddp, DistributedDataParallel):
        return
    ddp.require_forward_param_sync = state["syncs_next"]
    with torch.no_grad():
        for name, buffer in _named_buffers(ddp.module):
            if name in state["values"]:
                buffer.copy_(state["values"][name])


def _named_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the buffers that belong to the state of a module, by portable names."""
    saved = module.state_dict()
    return ((portable_name(module, name), buffer) for name, buffer in module.named_buffers() if name in saved)
