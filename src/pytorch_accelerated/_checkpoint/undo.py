"""Undo what a failed restore has changed: it leaves everything as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytorch_accelerated._data.rng import get_rng_state, set_rng_state
from pytorch_accelerated._distributed.fast_path import unwrap_optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pytorch_accelerated._types import StateDict, Stateful

_CONTAINERS = (dict, list, set, defaultdict, OrderedDict, deque)
_NUMBERS = (bool, int, float, str)
_MAX_NESTING = 6
_MAX_ITEMS = 10_000  # more are data

Undo = list[Callable[[], object]]


@contextmanager
def undone_on_error(
    model: nn.Module | None,
    optimizers: Iterable[Optimizer | None],
    parts: Iterable[object],
    others: Iterable[Stateful] = (),
) -> Iterator[None]:
    """Put everything back if the body raises.

    Args:
        model: Its gradients are put back. Its state is not: it has to be loaded last, and to be checked before.
        optimizers: Their states and the settings of their groups are put back.
        parts: Objects that are changed by `load_state_dict` or `reset`. Their attributes are put back, and those of
            the objects with a state in them.
        others: Objects whose state may be elsewhere. They load again what their `state_dict` returns now.
    """
    undo: Undo = []
    for other in others:
        with suppress(Exception):  # the method is the user's
            undo.append(partial(_load_again, other, copy.deepcopy(other.state_dict())))
    undo.append(partial(set_rng_state, get_rng_state()))
    if isinstance(model, nn.Module):
        undo += [partial(setattr, parameter, "grad", parameter.grad) for parameter in model.parameters()]
    seen: set[int] = {id(model)}
    for optimizer in optimizers:
        if optimizer is not None:
            seen |= {id(optimizer), id(unwrap_optimizer(optimizer))}
            _remember_optimizer(unwrap_optimizer(optimizer), undo)
    for part in parts:
        _remember(part, undo, seen, _MAX_NESTING)
        _remember_attributes(part, undo, seen, _MAX_NESTING)
    try:
        yield
    except BaseException:
        for put_back in undo:
            put_back()
        raise


@contextmanager
def attributes_kept_on_error(attributes: Iterable[tuple[object, str]]) -> Iterator[None]:
    """Set attributes back if the body raises.

    Args:
        attributes: Objects, each with the name of an attribute.
    """
    values = [(owner, name, getattr(owner, name)) for owner, name in attributes]
    try:
        yield
    except BaseException:
        for owner, name, value in values:
            setattr(owner, name, value)
        raise


def _load_again(part: Stateful, state: StateDict) -> None:
    with suppress(Exception):  # it refuses its own state
        part.load_state_dict(state)


def _remember_optimizer(optimizer: Any, undo: Undo) -> None:
    if hasattr(optimizer, "__dict__"):
        undo.append(partial(_put_back, vars(optimizer), dict(vars(optimizer))))
    for group in getattr(optimizer, "param_groups", ()):
        undo.append(partial(_put_back, group, dict(group)))
        settings = [value for value in group.values() if isinstance(value, torch.Tensor)]
        undo += [partial(_copy_into, value, value.detach().clone()) for value in settings]


def _remember(value: Any, undo: Undo, seen: set[int], nesting: int) -> None:
    """Remember a container, tensor, module or object with a state, and what is in it."""
    if nesting < 0 or value is None or type(value) in _NUMBERS or id(value) in seen:
        return
    if isinstance(value, torch.Tensor):
        undo.append(partial(_copy_into, value, value.detach().clone()))
    elif type(value) in _CONTAINERS or isinstance(value, list):  # such as one that tells of its changes
        seen.add(id(value))
        undo.append(partial(_put_back, value, value.copy()))
        items = value.values() if isinstance(value, dict) else value
        for item in items if len(value) <= _MAX_ITEMS else ():
            _remember(item, undo, seen, nesting - 1)
    elif isinstance(value, nn.Module):
        for tensor in (*value.parameters(), *value.buffers()):
            _remember(tensor, undo, seen, nesting)
    elif _has_state(value):
        _remember_attributes(value, undo, seen, nesting - 1)


def _remember_attributes(value: Any, undo: Undo, seen: set[int], nesting: int) -> None:
    attributes = getattr(value, "__dict__", None)
    if attributes is None or id(value) in seen:
        return
    seen.add(id(value))
    undo.append(partial(_put_back, attributes, dict(attributes)))
    for item in list(attributes.values()):
        _remember(item, undo, seen, nesting)


def _has_state(value: object) -> bool:
    return all(callable(getattr(type(value), name, None)) for name in ("state_dict", "load_state_dict"))


def _put_back(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)


def _copy_into(tensor: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)
