"""Draws: what a loader fetches at once, numbered, so that random numbers belong to a place in the epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from pytorch_accelerated._proxy import Proxy


class Draw(Sequence[Any]):
    """What a `DataLoader` fetches at once: the indices of a batch, or a single index, and its number in the epoch.

    Args:
        number: Counts the fetches of an epoch, over all ranks, from 0. Accelerate may cut a batch into parts, which are
            numbered ``"number/start"``.
        what: What the user's sampler or batch sampler yields: an index, or any collection of indices.
    """

    __slots__ = ("number", "what")

    def __init__(self, number: int | str, what: Any) -> None:
        self.number = number
        self.what = what

    def __getitem__(self, index: Any) -> Any:
        part = self.what[index]
        return Draw(f"{self.number}/{index.start or 0}", part) if isinstance(index, slice) else part

    def __add__(self, other: Any) -> Draw:
        return Draw(self.number, [*self.what, *other])

    def __len__(self) -> int:
        return len(self.what)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.what)


class NumberedOrder(Proxy, wraps="sampler"):
    """A sampler, or batch sampler, whose items are numbered as `Draw`.

    Args:
        sampler: The sampler. Its other attributes are passed through.
        first: The number of its first item.
        step: The difference to the next number.
    """

    def __init__(self, sampler: Any, first: int = 0, step: int = 1) -> None:
        self.sampler = sampler
        self._first = first
        self._step = step

    def __iter__(self) -> Iterator[Draw]:
        return map(Draw, itertools.count(self._first, self._step), map(as_collection, self.sampler))

    def __len__(self) -> int:
        return len(self.sampler)


def as_collection(what: Any) -> Any:
    """Return the indices of a batch as a collection, even if they come as an iterator; an index as it is."""
    return list(what) if hasattr(what, "__iter__") and not hasattr(what, "__len__") else what


def number_of(fetched: Any) -> tuple[int | str, Any]:
    """Return the number of a draw, or else the first index, and what the user's sampler yielded."""
    if isinstance(fetched, Draw):
        return fetched.number, fetched.what
    is_batch = isinstance(fetched, Sequence) and len(fetched) > 0
    return f"index {fetched[0] if is_batch else fetched}", fetched
