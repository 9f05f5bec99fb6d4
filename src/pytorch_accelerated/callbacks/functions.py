"""A callback made of functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_accelerated._hints.hooks import event_meant
from pytorch_accelerated.callbacks.base import EVENTS, TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable


class LambdaCallback(TrainerCallback):
    """Calls functions in events, for what is too short for a class.

    Args:
        functions: A function for each event, which gets the trainer and of the other arguments of the event those that
            it accepts, by name.

    Raises:
        TypeError: There is no event of this name, or what was given for it cannot be called.

    Example:
        >>> callback = LambdaCallback(on_train_epoch_end=lambda trainer: trainer.print("epoch done"))
    """

    def __init__(self, **functions: Callable[..., object]) -> None:
        for event, function in functions.items():
            if event not in EVENTS:
                remedy = event_meant(event, EVENTS) or f"Choose one of {list(EVENTS)}."
                raise TypeError(f"`LambdaCallback` got {event!r}, which is not an event. {remedy}")
            if not callable(function):
                raise TypeError(
                    f"`LambdaCallback` got {function!r}, of type {type(function).__name__}, for {event!r}. Expected a "
                    "function, which is called with the trainer."
                )
            setattr(self, event, function)
