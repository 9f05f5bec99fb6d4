"""Checks that a method of the trainer is called at the right time."""

from __future__ import annotations

from pytorch_accelerated._hints.classes import describe_forgotten_init


def check_initialized(trainer: object, needed: str) -> None:
    """Raise if the ``__init__`` of the Trainer has not been called.

    Args:
        trainer: The trainer.
        needed: An attribute that it sets.

    Raises:
        RuntimeError: It has not.
    """
    if needed not in vars(trainer):
        forgotten = describe_forgotten_init(type(trainer)) or "Call `super().__init__(...)` in its `__init__`."
        raise RuntimeError(f"This `{type(trainer).__name__}` was not initialized as a Trainer. {forgotten}")


def check_no_run(is_running: bool) -> None:
    """Raise if a run is under way.

    Raises:
        RuntimeError: `train` was called during a run.
    """
    if is_running:
        raise RuntimeError(
            "`train` was called during a run of this trainer, probably from a callback or a hook. Call it after the "
            "run, or use another trainer. `evaluate` may be called during a run."
        )


def check_run(is_under_way: bool, method: str, event: str, more: str = "") -> None:
    """Raise unless the run or pass that a method of the trainer acts on is under way.

    Args:
        is_under_way: Whether it is.
        method: The method.
        event: Where to call it: an event of a callback.
        more: What else the run needs, such as ``"with `eval_dataset` "``.

    Raises:
        RuntimeError: It is not.
    """
    if not is_under_way:
        kind = "evaluation" if "eval_epoch" in event else "training run"
        raise RuntimeError(
            f"`{method}` was called while no {kind} {more}is under way. Call it in a callback's `{event}`."
        )
