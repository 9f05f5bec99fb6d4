"""Limits on the number of batches per epoch."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Iterator
from typing import Any, SupportsIndex

from pytorch_accelerated._data.loaders import num_batches_of
from pytorch_accelerated._proxy import lookup_in_wrapped

LIMIT_BATCHES_ENV_VAR = "PT_ACC_LIMIT_BATCHES"
"""Environment variable that limits every epoch to this number of batches."""


class DataLoaderSlice:
    """The first batches of a loader. All other attributes are those of the loader.

    Args:
        dl: Any loader.
        slice_size: The maximum number of batches per epoch.

    Raises:
        ValueError: It is not a whole number of at least 1.

    Example:
        >>> list(DataLoaderSlice([10, 20, 30], 2))
        [10, 20]
    """

    def __init__(self, dl: Any, slice_size: int) -> None:
        _check_limit("slice_size", slice_size)
        self.dl = dl
        self.slice_size = slice_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.dl, self.slice_size)

    def __len__(self) -> int:
        num_batches = num_batches_of(self.dl)
        return self.slice_size if num_batches is None else min(num_batches, self.slice_size)

    def __getattr__(self, name: str) -> Any:  # not a `Proxy`: a private base class would be part of the public surface
        return lookup_in_wrapped(self, "dl", name)


def _check_limit(name: str, value: SupportsIndex) -> None:
    try:
        is_valid = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"`{name}` is {value!r}. Expected a whole number of batches, at least 1.")


def limit_from_environment() -> int | None:
    """Return the number of batches to which the environment limits epochs; ``None`` without a limit, or for "none".

    Raises:
        ValueError: The variable is not a whole number of at least 1.
    """
    text = os.environ.get(LIMIT_BATCHES_ENV_VAR, "").strip()
    if text.lower() in ("", "none"):
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"The environment variable {LIMIT_BATCHES_ENV_VAR} is {text!r}. Expected a whole number of batches per "
            "epoch, at least 1. Set it to such a number, or unset it to use all batches."
        )
    return int(text)


class LimitBatches:
    """Limits every epoch to a number of batches: of one loader, or of all trainers created in a ``with`` block.

    Args:
        num_batches: The maximum number of batches per epoch.

    Raises:
        ValueError: It is not a whole number of at least 1.

    Example:
        >>> len(list(LimitBatches(2)(range(10))))
        2
        >>> with LimitBatches(2):
        ...     pass  # a Trainer created here uses two batches per epoch
    """

    def __init__(self, num_batches: int) -> None:
        _check_limit("num_batches", num_batches)
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
