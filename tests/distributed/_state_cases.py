"""The part of `test_states.py` that runs on each of two processes, as a script.

Each function `case_<name>` returns plain values and tensors, which are stored for `test_<name>`.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import _runs
import _schedules
from _processes import run_cases
from _saved import assert_equal, bytes_in, everything_in, make_state_trainer, names_in, rewrite_manifest
from _support import Probe, make_dataset, make_indexed_dataset, make_model, make_trainer, weights_of
from _support import train as train_for_one_epoch
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated._checkpoint.manifest import read_manifest
from pytorch_accelerated._distributed import collectives
from pytorch_accelerated.callbacks import (
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)
from pytorch_accelerated.callbacks import saving as saving_module
from pytorch_accelerated.exceptions import CheckpointError

NUM_SAMPLES = 44
STATES_OF_ONE = "states_of_one"
"""The folder with states that one process saved before these processes were started."""


def message_of(act: Any, kind: type[Exception] = Exception) -> str:
    """Return class and message of the exception that a function raises on this process."""
    try:
        act()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# --- functions that run on one process or on all -----------------------------------------------------------------


def case_run_on_main_and_run_on_all_have_the_same_outcome_everywhere(rank: int, directory: Path) -> Any:
    def fail(error: Exception) -> None:
        raise error

    def fail_on_one(error: Exception) -> int:
        if rank == 1:
            raise error
        return 3

    is_main = rank == 0
    return {
        "main": collectives.run_on_main(lambda: {"by": rank}, is_main, 2),
        "main fails": message_of(lambda: collectives.run_on_main(lambda: fail(KeyError("mine")), is_main, 2)),
        "all": collectives.run_on_all(lambda: rank, 2),
        "one cannot save": message_of(lambda: collectives.run_on_all(lambda: fail_on_one(CheckpointError("full")), 2)),
        "one fails": message_of(lambda: collectives.run_on_all(lambda: fail_on_one(LookupError("mine")), 2)),
    }


def case_schedulers_have_the_rates_of_a_loop_by_hand(rank: int, directory: Path) -> Any:
    found = _schedules.compare_all(directory / "schedulers", every_nth=5)
    return {name: problems for name, problems in found.items() if problems}


# --- another number of processes ---------------------------------------------------------------------------------


def train_in_order(trainer: Any, **kwargs: Any) -> None:
    kwargs = {"num_epochs": 2, "per_device_batch_size": 4, "train_dataloader_kwargs": {"shuffle": False}, **kwargs}
    trainer.train(make_indexed_dataset(NUM_SAMPLES), **kwargs)


def make_order_trainer(seen: list[int], save_at: Any = (), folder: Path | None = None) -> Any:
    """Records the samples of the second epoch, which are their own indices, and saves states after steps of it."""

    def look(trainer: Any, batch: Any, **_: Any) -> None:
        if trainer.run_history.current_epoch == 2:
            seen.extend(batch[0].flatten().int().tolist())

    def save(trainer: Any, step: int, **_: Any) -> None:
        if trainer.run_history.current_epoch == 2 and step in save_at:
            assert folder is not None
            trainer.save_training_state(folder / f"step_{step}")

    return make_trainer(make_model(1), lr=0.0, callbacks=[Probe(on_train_step_start=look, on_train_step_end=save)])


def resume_in_order(path: Path, **kwargs: Any) -> dict[str, Any]:
    seen: list[int] = []
    trainer = make_order_trainer(seen)
    drawn: list[float] = []
    trainer.callback_handler.add_callback(
        Probe(on_train_epoch_start=lambda trainer, **_: drawn.append(torch.rand(1).item()))
    )
    train_in_order(trainer, resume_from=path, **kwargs)
    losses = trainer.run_history.get_metric_values("train_loss_epoch")
    return {"seen": seen, "drawn": drawn, "losses": losses, "progress": trainer.progress.state_dict()}


def case_fewer_processes_resume_at_the_same_sample(rank: int, directory: Path) -> Any:
    """Save states. The test resumes them with one process."""
    seen: list[int] = []
    trainer = make_order_trainer(seen, save_at=range(6), folder=directory)
    train_in_order(trainer)
    return {"seen": seen, "losses": trainer.run_history.get_metric_values("train_loss_epoch")}


def case_more_processes_resume_at_the_last_complete_step(rank: int, directory: Path) -> Any:
    folder = directory.parent / STATES_OF_ONE
    trainer = make_order_trainer([])
    before = weights_of(trainer.model)
    refused = message_of(lambda: train_in_order(trainer, resume_from=folder / "step_3"), CheckpointError)
    return {
        "refused": refused,
        "is unchanged": all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()),
        "resumed": {
            step: resume_in_order(folder / f"step_{step}", allow_other_num_processes=True) for step in (2, 3, 5, 10)
        },
        "again": resume_in_order(folder / "step_3", allow_other_num_processes=True)["drawn"],
    }


# --- states that do not fit --------------------------------------------------------------------------------------


class RefusingOnOne(TrainerCallback):
    """Refuses its state on the second process, after those before it have been restored."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None:
        if self.refuses:
            raise LookupError("not with me")


class Counting(TrainerCallback):
    """Has a state that is restored before the one that is refused."""

    def __init__(self) -> None:
        self.number = 0

    def on_train_step_end(self, trainer: Any, **kwargs: Any) -> None:
        self.number += 1

    def state_dict(self) -> Any:
        return {"number": self.number}

    def load_state_dict(self, state: Any) -> None:
        self.number = state["number"]


def make_fitting_trainer(make_optimizer: Any = torch.optim.Adam, order: int = 1, refuses: bool = False) -> Any:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
    optimizer = make_optimizer(list(model.parameters())[::order], lr=0.01)
    callbacks = [Counting(), RefusingOnOne(refuses)]
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=callbacks, seed=0)


def case_a_state_that_one_process_refuses_is_refused_on_all_with_nothing_changed(rank: int, directory: Path) -> Any:
    saved = make_fitting_trainer()
    train_in_order(saved, num_epochs=1)
    saved.save_training_state(directory / "state")
    outcomes = {}
    for name, kwargs in {
        "callback": {"refuses": rank == 1},
        "optimizer": {"make_optimizer": torch.optim.SGD},
        "optimizer on one": {"make_optimizer": torch.optim.SGD if rank == 1 else torch.optim.Adam},
    }.items():
        trainer = make_fitting_trainer(**kwargs)
        before = everything_in(trainer)
        said = message_of(functools.partial(train_in_order, trainer, resume_from=directory / "state"))
        assert_equal(everything_in(trainer), before, name)
        outcomes[name] = said, trainer.callback_handler.callbacks[0].number
    return outcomes


def case_averages_follow_the_names_of_their_parameters(rank: int, directory: Path) -> Any:
    whole = make_fitting_trainer()
    train_in_order(whole)
    saved = make_fitting_trainer()
    train_in_order(saved, num_epochs=1)
    saved.save_training_state(directory / "state")
    resumed = make_fitting_trainer(order=-1)
    train_in_order(resumed, resume_from=directory / "state")
    return {"resumed": weights_of(resumed.model), "whole": weights_of(whole.model)}


def case_a_schedule_follows_the_new_length_of_the_run(rank: int, directory: Path) -> Any:
    length = TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
    create = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=length)
    rates: dict[str, list[float]] = {"whole": [], "first": [], "resumed": []}
    for name, kwargs in {
        "whole": {"num_epochs": 3},
        "first": {"num_epochs": 1},
        "resumed": {"num_epochs": 3, "resume_from": directory / "state"},
    }.items():
        trainer = make_fitting_trainer()
        trainer.callback_handler.add_callback(
            Probe(
                on_optimizer_step_start=lambda trainer, seen=rates[name], **_: seen.append(
                    trainer.optimizer.param_groups[0]["lr"]
                )
            )
        )
        train_in_order(trainer, create_scheduler_fn=create, **kwargs)
        if name == "first":
            trainer.save_training_state(directory / "state")
    return rates


# --- the folder --------------------------------------------------------------------------------------------------


train = functools.partial(train_for_one_epoch, dataset=24, num_epochs=2)


def make_saving_trainer(folder: Path, callbacks: Any = (), **settings: Any) -> Any:
    """Its runs have three steps in an epoch."""
    save = SaveTrainingStateCallback(folder, **{"save_every_n_steps": 1, "save_at_end": False, **settings})
    return make_state_trainer([save, *callbacks])


def case_all_processes_see_the_same_states_after_each_step(rank: int, directory: Path) -> Any:
    """Record the folder after each step, as each process sees it."""
    seen = []
    look = Probe(on_train_step_start=lambda trainer, **_: seen.append(names_in(directory)))
    trainer = make_saving_trainer(directory, [look], max_checkpoints=2)
    train(trainer)
    return {"seen": seen, "left": names_in(directory), "weights": weights_of(trainer.model)}


def case_resuming_the_latest_state_skips_a_damaged_one(rank: int, directory: Path) -> Any:
    """The newest state is damaged. The run resumed from the one before ends with the same weights."""
    whole = make_saving_trainer(directory)
    train(whole)
    Accelerator().wait_for_everyone()
    if rank == 0:
        (directory / "step_6" / "process_1.pt").write_bytes(b"")
    printed: list[str] = []
    resumed = make_saving_trainer(directory)
    resumed.print = printed.append
    torch.manual_seed(50)
    train(resumed, resume_from="latest")
    return {
        "printed": printed,
        "is_resumed": resumed.is_resumed,
        "weights": weights_of(resumed.model),
        "expected": weights_of(whole.model),
        "generations": [read_manifest(path).generation for path in sorted(directory.iterdir()) if path.is_dir()],
    }


def case_resuming_without_a_state_starts_a_new_run(rank: int, directory: Path) -> Any:
    trainer = make_saving_trainer(directory / "new")
    train(trainer, resume_from=True)
    return {"is_resumed": trainer.is_resumed, "names": names_in(directory / "new")}


def case_a_folder_in_use_by_another_run_is_refused(rank: int, directory: Path) -> Any:
    """A third process holds the lock of the folder."""
    holder = None
    if rank == 0:
        code = (
            "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX);"
            "file.write('process 7 on mars'); file.flush(); print(flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", code, str(directory / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        holder.stdout.readline()
    Accelerator().wait_for_everyone()
    steps: list[int] = []
    count = Probe(on_train_step_start=lambda trainer, step, **_: steps.append(step))
    refused = [
        message_of(lambda: train(make_saving_trainer(directory, [count]))),
        message_of(lambda: train(make_saving_trainer(directory, [count]), resume_from="latest")),
    ]
    if holder is not None:
        holder.communicate()
    Accelerator().wait_for_everyone()
    train(make_saving_trainer(directory), num_epochs=1)
    return {"refused": refused, "steps": steps, "names": names_in(directory)}


def case_a_folder_that_cannot_be_created_is_refused(rank: int, directory: Path) -> Any:
    if rank == 0:
        (directory / "file").touch()
    Accelerator().wait_for_everyone()
    return message_of(lambda: train(make_saving_trainer(directory / "file" / "states")))


def case_states_are_saved_by_the_clock_of_the_main_process(rank: int, directory: Path) -> Any:
    """The clocks differ by rank. That of the main process decides, and is read only now and then."""
    seconds = [0.0]
    exchanges = []
    monotonic, run_on_main = time.monotonic, collectives.run_on_main

    def count(*arguments: Any) -> Any:
        exchanges.append(1)
        return run_on_main(*arguments)

    def tick(trainer: Any, **_: Any) -> None:
        seconds[0] += 1.0 if rank == 0 else 1000.0

    time.monotonic, saving_module.run_on_main = lambda: seconds[0], count
    try:
        settings = {"save_every_n_steps": None, "save_every_n_minutes": 1}
        trainer = make_saving_trainer(directory, [Probe(on_train_step_start=tick)], **settings)
        train(trainer, num_epochs=50)  # 150 seconds
    finally:
        time.monotonic, saving_module.run_on_main = monotonic, run_on_main
    return {"names": names_in(directory), "num_exchanges": len(exchanges), "weights": weights_of(trainer.model)}


# --- failures ----------------------------------------------------------------------------------------------------


def case_a_failed_save_of_one_process_fails_on_all(rank: int, directory: Path) -> Any:
    """The second process cannot write its file."""
    trainer = make_saving_trainer(directory / "states")
    train(trainer, num_epochs=1)
    before = bytes_in(directory / "states" / "step_3")
    save = torch.save
    failing: dict[str, Any] = {}

    def fail(contents: Any, path: Any, *arguments: Any, **kwargs: Any) -> None:
        if Path(path).name == "process_1.pt":
            raise OSError(28, "No space left on device")
        save(contents, path, *arguments, **kwargs)

    torch.save = fail
    try:
        failing["direct"] = message_of(lambda: trainer.save_training_state(directory / "states" / "step_3"))
        failing["raise"] = message_of(lambda: train(make_saving_trainer(directory / "states")))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            continuing = make_saving_trainer(directory / "states", on_save_error="warn")
            train(continuing)
    finally:
        torch.save = save
    Accelerator().wait_for_everyone()
    unsaved = make_state_trainer()
    train(unsaved)
    return {
        **failing,
        "warnings": [str(warning.message) for warning in caught],
        "weights": weights_of(continuing.model),
        "expected": weights_of(unsaved.model),
        "names": names_in(directory / "states"),
        "is intact": bytes_in(directory / "states" / "step_3") == before,
    }


def case_states_saved_in_the_background_resume_exactly(rank: int, directory: Path) -> Any:
    """Resume states that were written during the run; then let the second process fail to write its file."""
    run = _runs.make_trainer(directory / "states", in_background=True, max_checkpoints=9)
    whole = _runs.train(run, gradient_accumulation_steps=2)
    found = {}
    for state in [f"step_{number}" for number in (2, 3, 8)]:
        other = _runs.make_trainer(directory / "others", save_every_n_steps=None)
        resumed = _runs.train(other, gradient_accumulation_steps=2, resume_from=directory / "states" / state)
        found[state] = _runs.differences(whole, resumed)
    Accelerator().wait_for_everyone()
    save = torch.save

    def fail(contents: Any, path: Any, *arguments: Any, **kwargs: Any) -> None:
        if "step_4" in str(path) and Path(path).name == "process_1.pt":
            raise OSError(28, "No space left on device")
        save(contents, path, *arguments, **kwargs)

    torch.save = fail
    try:
        failing = _runs.make_trainer(directory / "failing", in_background=True)
        refused = message_of(lambda: _runs.train(failing))
    finally:
        torch.save = save
    return {"differences": found, "refused": refused, "update": failing.progress.num_updates}


def case_a_callback_that_cannot_be_saved_on_one_process_fails_on_all(rank: int, directory: Path) -> Any:
    """The state of the second process's callback contains an object that cannot be loaded safely."""
    callback = Probe()
    callback.state_dict = lambda: {"mine": object()} if rank == 1 else {}
    callback.load_state_dict = lambda state: None
    trainer = make_trainer(callbacks=[callback])
    return message_of(lambda: trainer.save_training_state(directory / "state")), names_in(directory)


def case_a_state_that_one_process_cannot_read_is_loaded_by_none(rank: int, directory: Path) -> Any:
    """A file that only the second process reads has unexpected contents."""
    trainer = make_state_trainer(seed=4)
    trainer.save_training_state(directory / "state")
    if rank == 0:
        torch.save({"something": "else"}, directory / "state" / "process_1.pt")
        rewrite_manifest(directory / "state")
    Accelerator().wait_for_everyone()
    other = make_state_trainer(seed=5)
    before = weights_of(other.model)
    refused = message_of(lambda: other.load_training_state(directory / "state"))
    is_unchanged = all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    return {"refused": refused, "is unchanged": is_unchanged}


def case_a_checkpoint_that_cannot_be_written_fails_on_all(rank: int, directory: Path) -> Any:
    """The main process cannot write the file."""
    if rank == 0:
        (directory / "file").touch()
    Accelerator().wait_for_everyone()
    return message_of(lambda: make_trainer().save_checkpoint(directory / "file" / "model.pt", save_per_node=False))


def case_the_best_model_of_an_abandoned_run_is_loaded_by_no_process(rank: int, directory: Path) -> Any:
    """The second process sees the file of the first one only."""

    def run(scores: list[float], **kwargs: Any) -> dict[str, Any]:
        score = Probe(on_train_epoch_end=lambda t, **_: t.run_history.update_metric("score", scores.pop(0)))
        best = SaveBestModelCallback(directory / "best.pt", watch_metric="score")
        states = SaveTrainingStateCallback(directory / "states", save_every_n_epochs=1)
        trained: dict[str, Any] = {}
        last = Probe(on_training_run_epoch_end=lambda t, **_: trained.update(weights_of(t.get_model())))
        trainer = make_trainer(callbacks=[score, best, states, last], seed=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_for_one_epoch(trainer, **{"num_epochs": 3, **kwargs})
        is_last = all(torch.equal(value, trained[name]) for name, value in weights_of(trainer.model).items())
        return {"is last": is_last, "warnings": [str(each.message) for each in caught], "best": best.state_dict()}

    run([2.0, 3.0, 1.0])
    worse = run([4.0, 5.0], num_epochs=4, resume_from=directory / "states" / "epoch_2")
    better = run([1.5, 4.0], num_epochs=4, resume_from=directory / "states" / "epoch_2")
    return {"worse": worse, "better": better, "names": names_in(directory)}


def case_the_buffers_of_each_process_resume_exactly_within_a_window(rank: int, directory: Path) -> Any:
    """DDP replaces them only at the start of a window. Those of spectral norms change what the model computes."""

    def run(folder: Path, **kwargs: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)]
        model = nn.Sequential(nn.utils.parametrizations.spectral_norm(layers[0]), *layers[1:])
        states = SaveTrainingStateCallback(folder, save_every_n_steps=1)
        trainer = make_trainer(model, callbacks=[StepBasedEvaluationCallback(1), states], seed=0)
        train_for_one_epoch(
            trainer, 48, num_epochs=2, gradient_accumulation_steps=3, eval_dataset=make_dataset(8), **kwargs
        )
        history = trainer.run_history
        names = history.get_metric_names()
        return {
            "history": {name: list(history.get_metric_values(name)) for name in names},
            "model": trainer.model.state_dict(),
        }

    whole = run(directory / "states")
    found = {}
    for step in (1, 2, 3, 5, 8):
        resumed = run(directory / f"after_{step}", resume_from=directory / "states" / f"step_{step}")
        found[step] = _runs.differences(whole, resumed)
    return found


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}

if __name__ == "__main__":
    run_cases(CASES)
