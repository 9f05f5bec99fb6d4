"""Create the trainers that a check trains."""

from __future__ import annotations

from collections.abc import Callable

from pytorch_accelerated._data.rng import seed_generators
from pytorch_accelerated.trainer import Trainer


def check_make_trainer(make_trainer: object) -> None:
    """Raise unless the user's ``make_trainer`` can be called.

    Raises:
        TypeError: It is not callable.
    """
    if not callable(make_trainer):
        raise TypeError(
            f"`make_trainer` is of type {type(make_trainer).__name__}. Expected a function that creates a new trainer, "
            "with its own model and optimizer, on each call, because the check trains several. Put the code that "
            "creates the trainer into a function, and pass the function."
        )


def create_trainer(make_trainer: Callable[[], Trainer], seed: int) -> Trainer:
    """Seed all generators, then return a new trainer.

    Raises:
        TypeError: ``make_trainer`` returned something else.
    """
    seed_generators(seed)
    trainer = make_trainer()
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"`make_trainer` returned a value of type {type(trainer).__name__}. Expected a new `Trainer` on each call. "
            "Return the trainer that the function creates."
        )
    return trainer
