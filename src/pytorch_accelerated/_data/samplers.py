"""What decides the order of the data: samplers, however they are nested, the epoch they are told, and their state."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from pytorch_accelerated._types import StateDict, StateMapping

_MAX_NESTING = 5
_MAX_ITEMS = 100_000
"""The largest number of items in a list for it to count as part of a sampler's state."""

_PARTS = ("batch_sampler", "sampler", "dataset", "datasets", "data_source", "source")
"""Attributes that hold a part of a loader, whatever its type."""

_WITHOUT_STATE = (SequentialSampler, BatchSampler)


def parts_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yield a loader, and the samplers and datasets in it at any depth, each with its path; each object once."""
    seen: set[int] = set()

    def walk(path: str, item: Any, depth: int) -> Iterator[tuple[str, Any]]:
        if id(item) in seen or depth > _MAX_NESTING:
            return
        seen.add(id(item))
        if isinstance(item, (list, tuple)):
            for number, part in enumerate(item[:_MAX_ITEMS]):
                if _is_part("", part):
                    yield from walk(f"{path}[{number}]", part, depth + 1)
            return
        yield path, item
        for name, part in [*getattr(item, "__dict__", {}).items()]:
            if _is_part(name, part):
                yield from walk(f"{path}.{name}" if path else name, part, depth + 1)

    yield from walk("", loader, 0)


def _is_part(name: str, value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str)):
        return False
    if isinstance(value, (Sampler, Dataset, DataLoader)):
        return True
    if isinstance(value, (list, tuple)):
        return name in _PARTS and len(value) > 0 and isinstance(value[0], (Sampler, Dataset))
    has_data = hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
    return has_data and not isinstance(value, type) and (name in _PARTS or hasattr(type(value), "set_epoch"))


def set_epoch_of(loader: Any, epoch: int) -> None:
    """Tell the number of the epoch, from 0, to whatever in a loader has ``set_epoch``."""
    for _, part in parts_of(loader):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


class OrderState:
    """The state of the user's samplers: what they keep from epoch to epoch, such as generators and counters.

    A run that is resumed within an epoch draws the order of this epoch again, from the state at its start.

    Args:
        loader: The user's loader.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._at_start: StateDict = {}

    def start_epoch(self) -> None:
        """Keep the state of the samplers as it is before an epoch is drawn."""
        self._at_start = self.now()

    def at_start(self) -> StateDict:
        """Return the state at the start of the epoch."""
        return self._at_start

    def now(self) -> StateDict:
        """Return the state of each sampler that has one, by its path."""
        states = {path: _state_of(sampler) for path, sampler in self._samplers()}
        return {path: state for path, state in states.items() if state}

    def uncovered(self) -> list[str]:
        """Return what the samplers keep that is not part of this state, as ``sampler.attribute``."""
        return [
            f"{type(sampler).__name__}.{name}"
            for _, sampler in self._samplers()
            if not callable(getattr(type(sampler), "state_dict", None))
            for name, value in getattr(sampler, "__dict__", {}).items()
            if _generator(value) is None and not _is_plain(value) and not _is_part(name, value) and not callable(value)
        ]

    def restore(self, states: StateMapping) -> None:
        """Restore what `now` or `at_start` returned."""
        for path, sampler in self._samplers():
            if path in states:
                _restore(sampler, states[path])

    def _samplers(self) -> Iterator[tuple[str, Any]]:
        for path, part in parts_of(self._loader):
            is_sampler = isinstance(part, Sampler) or path.rpartition(".")[2] in ("sampler", "batch_sampler")
            if is_sampler and not isinstance(part, DataLoader) and type(part).__module__ != "torch.utils.data.sampler":
                yield path, part


def _state_of(sampler: Any) -> StateDict:
    if callable(getattr(type(sampler), "state_dict", None)):
        return {"state_dict": copy.deepcopy(sampler.state_dict())}
    state = {}
    for name, value in getattr(sampler, "__dict__", {}).items():
        generator = _generator(value)
        if generator is not None:
            state[name] = generator[0]()
        elif _is_plain(value):
            state[name] = copy.deepcopy(value)
    return state


def _restore(sampler: Any, state: StateMapping) -> None:
    if "state_dict" in state:
        sampler.load_state_dict(copy.deepcopy(state["state_dict"]))
        return
    for name, value in state.items():
        generator = _generator(getattr(sampler, name, None))
        if generator is not None:
            generator[1](value)
        else:
            setattr(sampler, name, copy.deepcopy(value))


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.size < _MAX_ITEMS if isinstance(value, np.ndarray) else value.numel() < _MAX_ITEMS
    if isinstance(value, dict):
        return len(value) <= _MAX_ITEMS and all(_is_plain(item) for pair in value.items() for item in pair)
    return isinstance(value, (list, tuple, set)) and len(value) <= _MAX_ITEMS and all(map(_is_plain, value))


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """Return how to get and set the state of a generator of random numbers; ``None`` for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    return None
