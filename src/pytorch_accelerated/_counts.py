"""The check of a count that a program has passed."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import numpy as np


def check_positive_integer(name: str, value: SupportsIndex, unit: str) -> None:
    """Raise unless ``value`` is an integer of at least 1.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below 1.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError  # noqa: TRY301 - one message serves both cases
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` is {value!r}, of type {type(value).__name__}. Expected a whole number of {unit}, at least 1."
        ) from error
    if number < 1:
        raise ValueError(f"`{name}` is {value!r}. Expected a whole number of {unit}, at least 1.")
