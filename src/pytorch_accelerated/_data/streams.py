"""Iterable data with a state: the position of a run in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from pytorch_accelerated._proxy import Proxy

_NUM_STATES_KEPT = 4  # loaders read ahead, so the newest state is not that of the current step


class TrackedStream(Proxy, IterableDataset[Any], wraps="source"):
    """An iterable with a state that remembers its position at each of the last steps.

    Args:
        source: An iterable with ``state_dict`` and ``load_state_dict``. Other attributes are passed through.
        num_items_per_step: Number of its items that one step takes.
    """

    def __init__(self, source: Any, num_items_per_step: int) -> None:
        self.source = source
        self.num_items_per_step = num_items_per_step
        self._states: dict[int, Any] = {}
        self._num_steps_done = 0

    @property
    def num_items_done(self) -> int:
        """The number of items that were yielded before a resume, from which the next iteration continues."""
        return self._num_steps_done * self.num_items_per_step

    def __iter__(self) -> Iterator[Any]:
        first_item, self._num_steps_done = self.num_items_done + 1, 0
        self._states = {}
        for number, item in enumerate(self.source, first_item):
            step, rest = divmod(number, self.num_items_per_step)
            if rest == 0:
                self._states[step] = copy.deepcopy(self.source.state_dict())
                self._states.pop(step - _NUM_STATES_KEPT, None)
            yield item

    def position(self, num_steps: int) -> dict[str, Any]:
        """Return the position after this number of steps of an epoch. 0 is between epochs: the current position."""
        return {"state": self._states.get(num_steps) if num_steps else copy.deepcopy(self.source.state_dict())}

    def resume(self, position: Mapping[str, Any], num_steps: int) -> None:
        """Let the next epoch continue at a `position`, which was taken after ``num_steps`` steps."""
        self._num_steps_done = num_steps
        if position["state"] is not None:  # a process that has not read the data has no state
            self.source.load_state_dict(position["state"])

    def __len__(self) -> int:
        return len(self.source)
