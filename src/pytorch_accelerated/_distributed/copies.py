"""Copies of a trainer: what `pickle` and `copy.deepcopy` would lose, or share with the original, by themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from torch.optim import Optimizer

from pytorch_accelerated._distributed.accelerator import create_accelerator
from pytorch_accelerated._distributed.precision import precision_of, take_state
from pytorch_accelerated._distributed.registry import AcceleratorRegistry

_ACCELERATOR, _ATTRIBUTES_OF_OPTIMIZERS = "_accelerator", "_loop_attributes_of_optimizers"


def state_to_copy(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a copy of a trainer is made from, in the memory of this process or as a pickle.

    Args:
        attributes: The attributes of the trainer.
    """
    state = dict(attributes)
    optimizers = [(item, _attributes_left_out(item)) for item in _optimizers_in(list(state.values()), set())]
    # First, because other attributes may refer to the accelerator: these get the copy then.
    return {
        _ACCELERATOR: _AcceleratorToCopy(state.pop(_ACCELERATOR)),
        **state,
        _ATTRIBUTES_OF_OPTIMIZERS: [pair for pair in optimizers if pair[1]],
    }


def attributes_of_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a copied trainer, which belongs to this process from now on.

    Args:
        state: A copy of what `state_to_copy` returned.

    Raises:
        ValueError: This process cannot use the precision of the accelerator.
    """
    attributes = dict(state)
    attributes[_ACCELERATOR] = attributes[_ACCELERATOR].accelerator
    for optimizer, left_out in attributes.pop(_ATTRIBUTES_OF_OPTIMIZERS):
        vars(optimizer).update(left_out)
    _rejoin_process(attributes[_ACCELERATOR], attributes.get("optimizer"))
    return attributes


class _AcceleratorToCopy:
    """An accelerator whose deep copy is one of its own; Accelerate would return the same one.

    Args:
        accelerator: The accelerator, or a test double.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def __deepcopy__(self, memo: dict[int, Any]) -> _AcceleratorToCopy:
        """Return one with the copy, which is used wherever else the original is referred to."""
        original = self.accelerator
        is_double = not isinstance(original, Accelerator)
        copied = copy.deepcopy(original, memo) if is_double else AcceleratorRegistry(original).copy(memo)
        memo[id(original)] = copied
        return _AcceleratorToCopy(copied)


def _rejoin_process(accelerator: Accelerator, optimizer: Optimizer | None) -> None:
    """Let a copied accelerator, and the optimizer it has prepared, know the ranks and the device of this process.

    The copied state would not follow the process, and would name those of another one after unpickling.
    """
    if not isinstance(accelerator, Accelerator):
        return
    if not AcceleratorRegistry(accelerator).shares_state_of_process():
        is_on_cpu = accelerator.device.type == "cpu"
        take_state(accelerator, create_accelerator({"cpu": is_on_cpu}, precision_of(accelerator)))
    accelerator.gradient_state = GradientState()
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer.accelerator_state, optimizer.gradient_state = accelerator.state, accelerator.gradient_state


# --- optimizers --------------------------------------------------------------------------------------------------


def _optimizers_in(value: object, seen: set[int]) -> Iterator[Optimizer]:
    """Yield the optimizers in a value, in containers, and in the attributes of other optimizers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: list[object] = []
    if isinstance(value, Optimizer):
        yield value
        inner = list(vars(value).values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif isinstance(value, dict):
        inner = list(value.values())
    for item in inner:
        if isinstance(item, (Optimizer, list, tuple, dict)):
            yield from _optimizers_in(item, seen)


def _attributes_left_out(optimizer: Optimizer) -> dict[str, Any]:
    """Return the attributes of an optimizer that PyTorch does not copy: those that its subclass has added."""
    if getattr(type(optimizer), "__getstate__", None) is not Optimizer.__getstate__:
        return {}
    of_pytorch = vars(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    return {
        name: value
        for name, value in vars(optimizer).items()
        # A method on the instance belongs to the original: the scheduler of that counts the steps in it.
        if name not in of_pytorch and not callable(getattr(type(optimizer), name, None))
    }
