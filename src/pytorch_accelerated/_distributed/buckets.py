"""The order in which DDP adds up gradients: the same from the first step of every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pytorch_accelerated._models.wrappers import without_compilation

_MIN_PROCESSES = 3
"""Fewer processes add up two numbers, whose order makes no difference."""


def fix_bucket_order(model: nn.Module, num_processes: int, has_comm_hook: bool) -> str | None:
    """Let DDP form its final gradient buckets before the first step, not after it.

    DDP collects gradients in buckets, at first in the reverse order of the parameters, and from its second step on in
    the order in which they arrived. With three or more processes, the place of a gradient in its bucket decides in
    which order the ranks are added up, and so the last bit of the sum. A resumed process would make its first step with
    other buckets than the uninterrupted run, which has long formed its final ones.

    Here, gradients of 0 arrive once in the reverse order of the parameters, from a model that calls none of the user's
    code. DDP forms its buckets by them, and keeps these. Must be called on every process.

    Args:
        model: The model as it was prepared for the run. Only DDP models are changed.
        num_processes: The number of processes.
        has_comm_hook: Whether DDP calls a communication hook instead of adding up the gradients.

    Returns:
        A sentence for the user of a resumed run, if the order could not be fixed; ``None`` if it is the same from the
        first step.
    """
    ddp = without_compilation(model)
    if num_processes < _MIN_PROCESSES or not isinstance(ddp, DistributedDataParallel) or ddp.find_unused_parameters:
        return None  # with `find_unused_parameters`, DDP never forms new buckets
    parameters = [parameter for parameter in ddp.module.parameters() if parameter.requires_grad]
    obstacle = _find_obstacle(ddp, parameters, has_comm_hook)
    if obstacle is None:
        _let_gradients_arrive(ddp, parameters)
        return None
    return (
        f"With {num_processes} processes, the sums of gradients may differ in the last bit from those of an "
        f"uninterrupted run, because {obstacle}."
    )


def _find_obstacle(ddp: DistributedDataParallel, parameters: Sequence[nn.Parameter], has_comm_hook: bool) -> str | None:
    if ddp.static_graph:
        return "DDP has a static graph"
    if has_comm_hook:
        return "DDP has a communication hook"
    if any(_calls_hooks(parameter) for parameter in parameters):
        return "parameters have hooks of their own"
    modules: list[Any] = [part for part in ddp.module.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))]
    return "embeddings have sparse gradients" if any(part.sparse for part in modules) else None


def _calls_hooks(parameter: Any) -> bool:
    hooks = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)  # noqa: SLF001 - no public names
    return any(hooks)


def _let_gradients_arrive(ddp: DistributedDataParallel, parameters: Sequence[nn.Parameter]) -> None:
    module, gradients = ddp.module, [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    ddp.module = _SumOfParameters(parameters)
    syncs_buffers, ddp.require_forward_param_sync = ddp.require_forward_param_sync, False  # there are none meanwhile
    forward: Callable[[], torch.Tensor] = ddp.forward  # not `ddp` itself, which also calls the user's hooks
    try:
        with torch.enable_grad():
            torch.autograd.backward(forward())
    finally:
        ddp.module = module
        ddp.require_forward_param_sync = syncs_buffers
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


class _SumOfParameters(nn.Module):
    """A model whose output is 0, and whose gradients arrive in the reverse order of its parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._given = parameters  # a list, so that none becomes a parameter of this module

    def forward(self) -> torch.Tensor:
        """Add up all parameters, one after the other, times 0."""
        total = torch.zeros((), requires_grad=True)
        for parameter in self._given:
            values = parameter.real if parameter.is_complex() else parameter
            total = total.to(values.device) + values.sum() * 0
        return total
