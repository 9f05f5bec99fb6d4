"""Limits on the number of batches per epoch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from pytorch_accelerated._data.loaders import num_batches_of
from pytorch_accelerated._proxy import Proxy

LIMIT_BATCHES_ENV_VAR = "PT_ACC_LIMIT_BATCHES"
"""Environment variable: when set to a number, every epoch uses at most so many batches."""


class DataLoaderSlice(Proxy, wraps="dl"):
    """The first batches of a loader; everything else is the loader's.

    Args:
        dl: Any loader.
        slice_size: How many batches an epoch has at the most.

    Example:
        >>> list(DataLoaderSlice([10, 20, 30], 2))
        [10, 20]
    """

    def __init__(self, dl: Any, slice_size: int) -> None:
        self.dl = dl
        self.slice_size = slice_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.dl, self.slice_size)

    def __len__(self) -> int:
        num_batches = num_batches_of(self.dl)
        return self.slice_size if num_batches is None else min(num_batches, self.slice_size)


def limit_from_environment() -> int | None:
    """Return the number of batches that the environment limits epochs to; ``None`` if it does not.

    Raises:
        ValueError: The variable holds something else than a whole number of at least 1.
    """
    text = os.environ.get(LIMIT_BATCHES_ENV_VAR)
    if not text:
        return None
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(
            f"The environment variable {LIMIT_BATCHES_ENV_VAR} is {text!r}. Expected a whole number of batches, at "
            "least 1, or no such variable."
        )
    return int(text)


class LimitBatches:
    """Limits every epoch to a number of batches: of one loader, or of all trainers made in a ``with`` block.

    Args:
        num_batches: How many batches an epoch has at the most.

    Example:
        >>> len(list(LimitBatches(2)(range(10))))
        2
        >>> with LimitBatches(2):
        ...     pass  # a Trainer made here uses two batches per epoch
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self._outer_limit: str | None = None

    def __call__(self, dl: Any) -> DataLoaderSlice:
        """Return the first batches of a loader."""
        return DataLoaderSlice(dl, self.num_batches)

    def __enter__(self) -> LimitBatches:
        self._outer_limit = os.environ.get(LIMIT_BATCHES_ENV_VAR)
        os.environ[LIMIT_BATCHES_ENV_VAR] = str(self.num_batches)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outer_limit is None:
            os.environ.pop(LIMIT_BATCHES_ENV_VAR, None)
        else:
            os.environ[LIMIT_BATCHES_ENV_VAR] = self._outer_limit
