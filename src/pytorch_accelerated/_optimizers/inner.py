"""Optimizers within optimizers, whose state the outer one leaves out of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from pytorch_accelerated._distributed.fast_path import unwrap_optimizer
from pytorch_accelerated._optimizers.group import optimizers_in

if TYPE_CHECKING:
    from pytorch_accelerated._types import StateDict


def inner_optimizers(optimizer: Any) -> dict[str, InnerOptimizer]:
    """Return the optimizers in the attributes of an optimizer, or of those in a group, that need a state of their own.

    A published optimizer of the sharpness-aware kind, for example, makes its steps with another one, but its
    ``state_dict`` has nothing of that, such as the momentum. One that overrides ``state_dict``, or whose state is the
    same object, knows about it.

    Args:
        optimizer: The optimizer of the trainer; ``None`` has none.
    """
    return {
        f"{outer_name}.{name}".lstrip("."): InnerOptimizer(value, outer)
        for outer_name, outer in optimizers_in(unwrap_optimizer(optimizer)).items()
        if isinstance(outer, Optimizer) and type(outer).state_dict is Optimizer.state_dict
        for name, value in vars(outer).items()
        if isinstance(value, Optimizer) and value.state is not outer.state
    }


class InnerOptimizer:
    """The state of an optimizer that another one holds.

    Args:
        inner: The optimizer.
        outer: The one that holds it, and whose parameter groups it may share.
    """

    def __init__(self, inner: Optimizer, outer: Optimizer) -> None:
        self._inner = inner
        self._outer = outer

    def state_dict(self) -> StateDict:
        """Return the state of the inner optimizer."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what `state_dict` returned. Shared parameter groups stay shared."""
        is_shared = self._inner.param_groups is self._outer.param_groups
        self._inner.load_state_dict(state_dict)
        if is_shared:
            self._inner.param_groups = self._outer.param_groups
