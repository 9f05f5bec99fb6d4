"""The part of `test_reasons.py` that runs on each of two processes, as a script.

In each case, one process has a reason to stop, somewhere, and the other has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _support import HOOKS, make_dataset, make_trainer, train
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EVENTS,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    StopTrainingError,
    TerminateOnNaNCallback,
)
from pytorch_accelerated.exceptions import NonFiniteLossError


class OwnStopError(StopTrainingError):
    """Cannot be created again from its arguments."""

    def __init__(self, first: str, second: object) -> None:
        super().__init__(first)
        self.second = second, lambda: None


REASONS = {
    "stop": lambda: StopTrainingError("mine"),
    "own stop": lambda: OwnStopError("mine", 2),
    "non-finite": lambda: NonFiniteLossError("mine", 3),
}
EVENTS_OF_TRAINING = [
    event
    for event in EVENTS
    if event not in ("on_init_end", "on_exception", "on_log_point") and "_evaluation_" not in event
]
HOOKS_WITHOUT_RESULT = [hook for hook in HOOKS if hook.endswith(("_start", "_end")) and "evaluation" not in hook]


class Raises:
    """Raises a reason, once, on one of the processes."""

    def __init__(self, reason: str, rank: int, on_rank: int) -> None:
        self.reason, self.is_due = reason, rank == on_rank

    def __call__(self, *_: Any, **__: Any) -> None:
        if self.is_due:
            self.is_due = False
            raise REASONS[self.reason]()


class RaisesLater(Raises):
    """The same, in the second epoch."""

    def __call__(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.run_history.current_epoch == 2:
            super().__call__()


def end_of(place: str, folder: Path, callbacks: Any = (), cls: type[Trainer] = Trainer, **settings: Any) -> Any:
    """Train, and return how this process ended."""
    first, last = callbacks if isinstance(callbacks, tuple) and len(callbacks) == 2 else (callbacks, [])
    states = {"save_every_n_epochs": 1, "save_every_n_steps": 2, **settings}
    own = [
        TerminateOnNaNCallback(),
        ModelEmaCallback(save_path=folder / "average.pt"),
        SaveBestModelCallback(folder / "best.pt"),
        StepBasedEvaluationCallback(3),
        SaveTrainingStateCallback(folder / place / "states", **states),
    ]
    trainer = make_trainer(callbacks=[*first, *own, *last], cls=cls, seed=0)
    try:
        train(trainer, 24, num_epochs=3, eval_dataset=make_dataset(8))
        end = "returned"
    except Exception as error:
        end = f"{type(error).__name__}: {str(error)[:80]}"
    progress = trainer.progress
    return end, trainer.stop_reason, progress.num_updates, progress.num_epochs_completed
