"""Checks of the numbers that a program passes."""

from __future__ import annotations

import operator
from typing import SupportsIndex, TypeVar

import numpy as np

from pytorch_accelerated._messages import warn

Number = TypeVar("Number")


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


def check_positive_number(name: str, value: float | None) -> None:
    """Raise unless ``value`` is ``None`` or a number above 0.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0.
    """
    if value is None:
        return
    expected = "Expected a number above 0, or None."
    try:
        is_positive = None if isinstance(value, bool) else bool(value > 0)
    except TypeError:
        is_positive = None
    if is_positive is None:
        raise TypeError(f"`{name}` is {value!r}, of type {type(value).__name__}. {expected}")
    if not is_positive:
        raise ValueError(f"`{name}` is {value!r}. {expected}")


def as_whole_number(value: Number) -> Number | int:
    """Return a float of whole value, such as ``1e4``, as an integer; anything else is returned unchanged."""
    return int(value) if isinstance(value, (float, np.floating)) and float(value).is_integer() else value


def check_seed(seed: object) -> None:
    """Raise unless ``seed`` is ``None`` or a whole number.

    Raises:
        TypeError: It is not.
    """
    try:
        if seed is not None:
            operator.index(as_whole_number(seed))  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"`seed` is {seed!r}, of type {type(seed).__name__}. Expected a whole number, or None. "
            f"Pass {f'`seed=int({seed!r})`' if isinstance(seed, str) else 'a number'} to the Trainer."
        ) from error


def check_numbers_of_run(
    per_device_batch_size: int,
    num_epochs: int,
    gradient_accumulation_steps: int,
    max_num_train_steps: int | None,
    gradient_clip_value: float | None,
    gradient_clip_norm: float | None = None,
) -> None:
    """Raise unless all numbers that a run is started with are valid.

    Raises:
        TypeError: One of them has the wrong type.
        ValueError: One of them is out of range.
    """
    check_positive_integer("num_epochs", num_epochs, "epochs")
    check_positive_integer("per_device_batch_size", per_device_batch_size, "samples")
    check_positive_integer("gradient_accumulation_steps", gradient_accumulation_steps, "batches")
    if max_num_train_steps is not None:
        check_positive_integer("max_num_train_steps", max_num_train_steps, "updates")
    check_positive_number("gradient_clip_value", gradient_clip_value)
    check_positive_number("gradient_clip_norm", gradient_clip_norm)


def check_min_epochs(min_epochs: int | None, num_epochs: int) -> None:
    """Raise unless ``min_epochs`` is ``None`` or a number of epochs that the run has.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below 1, or above ``num_epochs``.
    """
    if min_epochs is None:
        return
    check_positive_integer("min_epochs", min_epochs, "epochs")
    if min_epochs > num_epochs:
        raise ValueError(
            f"`min_epochs` is {min_epochs!r}, but `num_epochs` is {num_epochs!r}. Expected at most the number of "
            "epochs after which the run ends anyway."
        )


def warn_about_long_accumulation(gradient_accumulation_steps: int, num_batches_per_epoch: int | None) -> None:
    """Warn if an epoch has fewer batches than one update is supposed to accumulate.

    Args:
        gradient_accumulation_steps: Batches per update and rank.
        num_batches_per_epoch: Batches per epoch and rank; ``None`` if that is not certain.
    """
    if num_batches_per_epoch is not None and num_batches_per_epoch < gradient_accumulation_steps:
        warn(
            f"`gradient_accumulation_steps` is {gradient_accumulation_steps} batches, but an epoch has only "
            f"{num_batches_per_epoch}. An update ends with its epoch, so each takes no more batches than that. Lower "
            "`gradient_accumulation_steps` or `per_device_batch_size`.",
        )
