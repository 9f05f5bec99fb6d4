"""What a resumed run restores a second time, because the events at the start of a run and of an epoch fire again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pytorch_accelerated._checkpoint.companions import Companions
from pytorch_accelerated._checkpoint.manifest import name_state
from pytorch_accelerated._checkpoint.parts import StateContents
from pytorch_accelerated._checkpoint.restoring import restore_rng

_PACKAGE = __name__.partition(".")[0]


class Restart:
    """The part of a training state that the program may overwrite when a run, or an epoch, starts.

    Args:
        contents: What was restored.
        restored: The companions that there were then.
        find: Returns those that there are now.
        process_index: The rank of this process.
    """

    def __init__(
        self, contents: StateContents, restored: Companions, find: Callable[[], Companions], process_index: int
    ) -> None:
        small = {**contents.process_state, "gradients": {}}
        self._contents = replace(contents, process_state=small, weights=None, optimizer=None, scaler=None)
        self._restored = restored
        self._find = find
        self._process_index = process_index

    def complete_run(self) -> None:
        """Restore what the program has created or reset when the run started, and the generators it has drawn from."""
        companions = self._find()
        companions.since(self._restored).load(*self._contents.companions, self._source)
        companions.warn_about_mismatch(*self._contents.companions, self._source)
        restore_rng(self._contents, self._process_index)

    @contextmanager
    def of_epoch(self, optimizer: Any, stateful: Iterable[Any]) -> Iterator[None]:
        """Fire the events at the start of an epoch that continues in its middle, and put back what they change.

        They fired when the epoch was started, and the state has what they changed: metrics that were reset, a learning
        rate that was halved, random numbers that were drawn.

        Args:
            optimizer: The optimizer, whose settings are kept.
            stateful: What may have a state that is kept. What the library itself puts there takes care of this.
        """
        settings = [copy.deepcopy(_settings_of(group)) for group in optimizer.param_groups]
        states = [(item, copy.deepcopy(item.state_dict())) for item in stateful if _has_state_of_the_user(item)]
        yield
        for group, kept in zip(optimizer.param_groups, settings, strict=False):
            for name, value in kept.items():
                _set(group, name, value)
        for item, state in states:
            item.load_state_dict(state)
        self._find().load(*self._contents.companions, self._source)
        restore_rng(self._contents, self._process_index)

    @property
    def _source(self) -> str:
        return name_state(self._contents.saved.path)


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group.get(name), torch.Tensor) and isinstance(value, torch.Tensor):
        group[name].copy_(value)  # a compiled step reads this tensor
    else:
        group[name] = value


def _has_state_of_the_user(item: Any) -> bool:
    methods = ("state_dict", "load_state_dict")
    is_ours = type(item).__module__.startswith(f"{_PACKAGE}.callbacks")
    return not is_ours and all(callable(getattr(type(item), method, None)) for method in methods)
