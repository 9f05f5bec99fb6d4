"""The part of `test_reasons.py` that runs on each of two processes, as a script.

In each case one process has a reason to stop, somewhere, and the other has none.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from _processes import NUM_REPEATS, run_cases
from _support import Probe, make_dataset, make_trainer, train
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
from pytorch_accelerated.tracking import InMemoryRunHistory


class OwnStopError(StopTrainingError):
    """Cannot be created again from its arguments, nor be pickled."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.function = lambda: number


REASONS = {
    "stop": lambda: StopTrainingError("mine"),
    "own stop": lambda: OwnStopError("mine", 2),
    "non-finite": lambda: NonFiniteLossError("mine", 3),
}
EVENTS_OF_TRAINING = [
    "on_training_run_start",
    "on_train_epoch_end",
    "on_eval_epoch_end",
    "on_training_run_epoch_end",
    "on_training_run_end",
    "on_training_state_save",
]
if NUM_REPEATS > 1:
    EVENTS_OF_TRAINING = [
        event
        for event in EVENTS
        if event not in ("on_init_end", "on_exception", "on_log_point", "on_stop_training_error")
        and "evaluation_run" not in event
    ]
HOOKS = [
    "training_run_start",
    "train_epoch_start",
    "train_epoch_end",
    "eval_epoch_start",
    "calculate_eval_batch_loss",
    "eval_epoch_end",
    "training_run_epoch_end",
    "training_run_end",
]


class Raiser:
    """Raises a reason, once, on one of the processes; in the second epoch, if it is not the start of a run."""

    def __init__(self, reason: str, is_here: bool) -> None:
        self.reason, self.is_due = reason, is_here

    def __call__(self, *_: Any, **__: Any) -> None:
        if self.is_due:
            self.is_due = False
            raise REASONS[self.reason]()

    def late(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.run_history.current_epoch != 1:
            self()


def end_of_run(folder: Path, callbacks: Any = (), last: Any = (), cls: Any = Trainer, **kwargs: Any) -> Any:
    """Train with callbacks that do something together in many events, and return how this process ended."""
    in_background = kwargs.pop("in_background", False)
    trainer = make_trainer(
        callbacks=[
            *callbacks,
            TerminateOnNaNCallback(),
            ModelEmaCallback(save_path=folder / "average.pt"),
            SaveBestModelCallback(folder / "best.pt"),
            StepBasedEvaluationCallback(3),
            SaveTrainingStateCallback(folder, save_every_n_epochs=1, save_every_n_steps=4, in_background=in_background),
            *last,
        ],
        cls=cls,
        seed=0,
        **kwargs,
    )
    try:
        train(trainer, 16, num_epochs=2, eval_dataset=make_dataset(8))
        end = "returned"
    except Exception as error:
        end = f"{type(error).__name__}: {error}".partition("\n")[0]
    return end, trainer.stop_reason, trainer.progress.num_updates, trainer.progress.num_epochs_completed


def ends(rank: int, folder: Path, run: Any) -> dict[str, Any]:
    """Return how this process ends for each reason, on the first process and on the second; by default, for some."""
    tried = [("own stop", 1), ("non-finite", 1)]
    if NUM_REPEATS > 1:
        tried = [(reason, where) for reason in REASONS for where in (0, 1)]
    return {
        f"{reason} on {where}": run(folder / f"{reason}{where}", Raiser(reason, rank == where))
        for reason, where in tried
    }


def case_in_an_event_before_those_that_do_something_together(rank: int, directory: Path) -> Any:
    def run(event: str, folder: Path, raiser: Raiser) -> Any:
        is_start = event == "on_training_run_start"
        return end_of_run(folder, [Probe(**{event: raiser if is_start else raiser.late})])

    return {event: ends(rank, directory / event, partial(run, event)) for event in EVENTS_OF_TRAINING}


def case_in_an_event_after_them_with_saves_in_the_background(rank: int, directory: Path) -> Any:
    def run(event: str, folder: Path, raiser: Raiser) -> Any:
        return end_of_run(folder, last=[Probe(**{event: raiser.late})], in_background=True)

    events = ["on_eval_epoch_end", "on_training_run_end", "on_training_state_save"]
    return {event: ends(rank, directory / event, partial(run, event)) for event in events}


def case_in_a_hook(rank: int, directory: Path) -> Any:
    def run(name: str, folder: Path, raiser: Raiser) -> Any:
        def hook(self: Any, *arguments: Any) -> Any:
            (raiser if name == "training_run_start" else raiser.late)(self)
            return getattr(Trainer, name)(self, *arguments)

        return end_of_run(folder, cls=type("Hooked", (Trainer,), {name: hook}))

    return {name: ends(rank, directory / name, partial(run, name)) for name in HOOKS}


def case_in_what_is_saved_and_recorded(rank: int, directory: Path) -> Any:
    def state(in_background: bool, folder: Path, raiser: Raiser) -> Any:
        probe = Probe()
        probe.state_dict = lambda: raiser() or {}
        probe.load_state_dict = lambda state: None
        return end_of_run(folder, [probe], in_background=in_background)

    def history(folder: Path, raiser: Raiser) -> Any:
        class History(InMemoryRunHistory):
            def update_metric(self, metric_name: str, metric_value: Any) -> None:
                raiser()
                super().update_metric(metric_name, metric_value)

        return end_of_run(folder, run_history=History())

    return {
        "state": ends(rank, directory / "state", partial(state, False)),
        "state in the background": ends(rank, directory / "background", partial(state, True)),
        "history": ends(rank, directory / "history", history),
    }


def case_an_error_of_the_program_is_no_failed_save_that_the_others_go_on_without(rank: int, directory: Path) -> Any:
    """The callback of the second process fails while all save a state."""

    def fail() -> Any:
        if rank == 1:
            raise LookupError("mine")
        return {}

    probe = Probe()
    probe.state_dict, probe.load_state_dict = fail, lambda state: None
    save = SaveTrainingStateCallback(directory / "states", save_every_n_epochs=1, on_save_error="warn")
    trainer = make_trainer(callbacks=[probe, save])
    try:
        train(trainer, 16, num_epochs=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}", trainer.progress.num_updates
    return "returned"


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}

if __name__ == "__main__":
    chosen = sys.argv[2:]
    run_cases({name: case for name, case in CASES.items() if not chosen or name in chosen})
