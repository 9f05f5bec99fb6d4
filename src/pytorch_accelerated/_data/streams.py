"""Data without indices: where in it a run stands."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from pytorch_accelerated._proxy import Proxy

_NUM_STATES_KEPT = 4  # loaders read ahead, so the newest state is not that of the step under way


class TrackedStream(Proxy, IterableDataset[Any], wraps="source"):
    """An iterable that can tell its position, and remembers which one each of the last steps had.

    Args:
        source: An iterable with ``state_dict`` and ``load_state_dict``; what else it offers is passed through.
        num_items_per_step: How many of its items one step takes.
    """

    def __init__(self, source: Any, num_items_per_step: int) -> None:
        self.source = source
        self.num_items_per_step = num_items_per_step
        self._states: dict[int, Any] = {}
        self._num_steps_done = 0

    def __iter__(self) -> Iterator[Any]:
        first_item, self._num_steps_done = self._num_steps_done * self.num_items_per_step + 1, 0
        self._states = {}
        for number, item in enumerate(self.source, first_item):
            step, rest = divmod(number, self.num_items_per_step)
            if rest == 0:
                self._states[step] = copy.deepcopy(self.source.state_dict())
                self._states.pop(step - _NUM_STATES_KEPT, None)
            yield item

    def position(self, num_steps: int) -> dict[str, Any]:
        """Return where the source stands after so many steps of an epoch; 0 also for after its end."""
        return {"state": self._states.get(num_steps) if num_steps else copy.deepcopy(self.source.state_dict())}

    def resume(self, position: Mapping[str, Any], num_steps: int) -> None:
        """Let the next epoch go on at the `position` after so many steps."""
        self._num_steps_done = num_steps
        if position["state"] is not None:  # only the main process has read
            self.source.load_state_dict(position["state"])

    def __len__(self) -> int:
        return len(self.source)
