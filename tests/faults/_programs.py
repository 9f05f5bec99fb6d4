"""Makes up training programs, kills each of them, resumes it, and compares it with an uninterrupted run.

    python tests/faults/_programs.py --programs 200 --seed 7

All runs are forked from this process, so that a program takes about a second. What a program consists of, and when it
is killed, follows from the seed and its number; ``--only 17`` repeats a single program of a soak.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step, which would take seconds in each process
from torch import nn, optim
from torch.utils.data import WeightedRandomSampler

from _kills import start, wait
from _processes import free_port
from _runs import NoisySamples, differences, masked
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)
from pytorch_accelerated.states import list_states

RUN_SECONDS = 90
"""How long a run may take."""

END_SECONDS = 30
"""How long the other ranks may take to end after one was killed and they got a SIGTERM."""

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": functools.partial(optim.SGD, lr=0.02),
    "SGD with momentum": functools.partial(optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": functools.partial(optim.Adam, lr=0.01, amsgrad=True),
    "AdamW": functools.partial(optim.AdamW, lr=0.01),
    "NAdam": functools.partial(optim.NAdam, lr=0.01),
    "RAdam": functools.partial(optim.RAdam, lr=0.01),
    "Adamax": functools.partial(optim.Adamax, lr=0.01),
    "Adadelta": optim.Adadelta,
    "Adagrad": functools.partial(optim.Adagrad, lr=0.02),
    "RMSprop": functools.partial(optim.RMSprop, lr=0.005, momentum=0.5, centered=True),
    "Rprop": functools.partial(optim.Rprop, lr=0.005),
    "ASGD": functools.partial(optim.ASGD, lr=0.01),
}
SCHEDULERS: dict[str, tuple[Callable[..., Any] | None, dict[str, Any]]] = {
    "none": (None, {}),
    "StepLR": (functools.partial(optim.lr_scheduler.StepLR, step_size=3, gamma=0.7), {}),
    "CosineAnnealingLR": (functools.partial(optim.lr_scheduler.CosineAnnealingLR, T_max=7), {}),
    "CyclicLR": (
        functools.partial(
            optim.lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.02, step_size_up=3, cycle_momentum=False
        ),
        {},
    ),
    "ExponentialLR after epochs": (
        functools.partial(optim.lr_scheduler.ExponentialLR, gamma=0.8),
        {"step_scheduler": "epoch"},
    ),
    "ReduceLROnPlateau": (
        functools.partial(optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.3),
        {"step_scheduler": "epoch", "scheduler_metric": "train_loss_epoch"},
    ),
}


@dataclass(frozen=True)
class Program:
    """What a training program consists of, and how it is killed: after an update, and some time of the next ones."""

    num_processes: int
    num_epochs: int
    num_samples: int
    batch_size: int
    accumulation: int
    num_workers: int
    optimizer: str
    scheduler: str
    normalization: str
    dropout: float
    clipping: str
    evaluation: str
    averages: bool
    patience: int | None
    sampler: str
    is_noisy: bool
    save_every: str
    save_interval: int
    in_background: bool
    num_kills: int
    kill_update: int
    kill_delay: float
    killed: str
    compiled: str

    @staticmethod
    def make_up(generator: random.Random) -> Program:
        """Return a random program."""
        pick = generator.choice
        num_samples, batch_size = generator.randint(9, 34), generator.randint(2, 5)
        num_processes = pick([1, 1, 2, 2, 3])
        num_epochs, accumulation = generator.randint(1, 4), pick([1, 1, 2, 3])
        num_batches = max(1, num_samples // (batch_size * num_processes))
        num_updates = num_epochs * -(-num_batches // accumulation)
        return Program(
            num_processes=num_processes,
            num_epochs=num_epochs,
            num_samples=num_samples,
            batch_size=batch_size,
            accumulation=accumulation,
            num_workers=pick([0, 0, 0, 1, 2]),
            optimizer=pick(list(OPTIMIZERS)),
            scheduler=pick(list(SCHEDULERS)),
            normalization=pick(["none", "layer", "batch"]),
            dropout=pick([0.0, 0.3]),
            clipping=pick(["none", "value", "norm"]),
            evaluation=pick(["none", "after epochs", "two datasets", "during epochs"]),
            averages=pick([False, True]),
            patience=pick([None, 1, 3]),
            sampler=pick(["default", "default", "weighted"]),
            is_noisy=pick([False, True]),
            save_every=pick(["steps", "updates", "epochs"]),
            save_interval=pick([1, 1, 2, 3]),
            in_background=pick([False, True]),
            num_kills=pick([1, 1, 2]),
            kill_update=generator.randint(1, num_updates),
            kill_delay=pick([0.0, 0.0, generator.uniform(0, 0.03)]),
            killed=pick(["all ranks", "the main process", "the last rank"]),
            compiled=pick(["nothing", "nothing", "the first layer", "the head", "a block", "the model"]),
        )


class Samples(NoisySamples):
    """Any number of the samples."""

    def __init__(self, num_samples: int, is_noisy: bool) -> None:
        super().__init__(is_noisy)
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().__getitem__(index % len(self.inputs))


class Kill(TrainerCallback):
    """Kills its process some time after an update."""

    def __init__(self, update: int, delay: float) -> None:
        self.update, self.delay = update, delay

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.progress.num_updates == self.update:
            self.update = -1
            kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
            kill() if not self.delay else threading.Timer(self.delay, kill).start()


# --- in the processes of a program -------------------------------------------------------------------------------


def make_model(program: Program) -> nn.Module:
    """Create the model: the same weights in every process."""
    torch.manual_seed(3)
    size = 8
    normalizations = {"none": nn.Identity(), "layer": nn.LayerNorm(size), "batch": nn.BatchNorm1d(size)}
    normalization = normalizations[program.normalization]
    block = nn.Sequential(normalization, nn.Tanh(), nn.Dropout(program.dropout))
    model = nn.Sequential(nn.Linear(4, size), block, nn.Linear(size, 1))
    if program.compiled == "the model":
        return compile_module(model)
    part = {"the first layer": 0, "a block": 1, "the head": 2}.get(program.compiled)
    if part is not None:
        model[part] = compile_module(model[part])
    return model


def compile_module(module: nn.Module) -> nn.Module:
    """Compile a module, without generated code, which would take long to create."""
    compiled: nn.Module = torch.compile(module, backend="eager")
    return compiled


def make_trainer(program: Program, folder: Path, kill: TrainerCallback | None) -> Trainer:
    """Create the trainer of a program."""
    model = make_model(program)
    callbacks: list[TrainerCallback] = [
        SaveTrainingStateCallback(
            folder / "states",
            in_background=program.in_background,
            max_checkpoints=2,
            **{f"save_every_n_{program.save_every}": program.save_interval},
        )
    ]
    if program.averages:
        metric = "train_loss_epoch" if program.evaluation in ("none", "two datasets") else "ema_model_eval_loss_epoch"
        callbacks.append(ModelEmaCallback(save_path=folder / "average.pt", decay=0.9, watch_metric=metric))
    if program.patience is not None:
        callbacks.append(EarlyStoppingCallback(program.patience, watch_metric="train_loss_epoch"))
    if program.evaluation == "during epochs":
        callbacks.append(StepBasedEvaluationCallback(eval_every_n_steps=2))
    if kill is not None:
        callbacks.append(kill)
    return Trainer(model, nn.functional.mse_loss, OPTIMIZERS[program.optimizer](model.parameters()), callbacks)


def train(trainer: Trainer, program: Program) -> None:
    """Train from the newest state if there is one."""
    train_data, eval_data = Samples(program.num_samples, program.is_noisy), Samples(7, is_noisy=False)
    loader: dict[str, Any] = {"num_workers": program.num_workers}
    if program.normalization == "batch":
        loader["drop_last"] = True  # no batch of one sample
    if program.sampler == "weighted":
        weights = [1.0 + index % 3 for index in range(program.num_samples)]
        loader["sampler"] = WeightedRandomSampler(weights, program.num_samples)
    scheduler, scheduling = SCHEDULERS[program.scheduler]
    evaluation = {"none": None, "two datasets": {"left": eval_data, "right": eval_data}}
    trainer.train(
        train_data,
        program.num_epochs,
        evaluation.get(program.evaluation, eval_data),
        program.batch_size,
        gradient_accumulation_steps=program.accumulation,
        gradient_clip_value=0.05 if program.clipping == "value" else None,
        gradient_clip_norm=0.3 if program.clipping == "norm" else None,
        create_scheduler_fn=scheduler,
        train_dataloader_kwargs=loader,
        eval_dataloader_kwargs={"num_workers": 0},
        collate_fn=masked if program.is_noisy else None,
        resume_from="latest",
        **scheduling,
    )


def outcome_of(trainer: Trainer) -> dict[str, Any]:
    """Return what must be bit-identical."""
    history = trainer.run_history
    states = {
        type(callback).__name__: callback.state_dict()
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, (ModelEmaCallback, EarlyStoppingCallback))
    }
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "history": {name: list(history.get_metric_values(name)) for name in sorted(history.get_metric_names())},
        "progress": trainer.progress.state_dict(),
        "callbacks": states,
        "generator": torch.get_rng_state(),
    }


def run_rank(program: Program, folder: Path, rank: int, port: int, kill: TrainerCallback | None) -> None:
    """Train as one of the processes, and save the outcome."""
    if program.num_processes > 1:
        size = str(program.num_processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    trainer = make_trainer(program, folder, kill)
    train(trainer, program)
    torch.save(outcome_of(trainer), folder / f"outcome-{rank}.pt")


# --- in the process that forks them ------------------------------------------------------------------------------


class FailedError(Exception):
    """A program did not do what it should."""


def run(program: Program, folder: Path, *, is_killed: bool = False) -> bool:
    """Run a program, and return whether it came to its end.

    Args:
        program: The program.
        folder: The folder for its states, outcome and output.
        is_killed: Whether to kill it after some update. The ranks that are not killed get a SIGTERM.
    """
    port, last = free_port(), program.num_processes - 1
    kill = Kill(program.kill_update, program.kill_delay) if is_killed else None
    killed = {"all ranks": set(range(last + 1)), "the main process": {0}, "the last rank": {last}}[program.killed]
    running: dict[int, int] = {}
    for rank in range(last + 1):
        own_kill = kill if rank in killed else None
        rank_program = functools.partial(run_rank, program, folder, rank, port, own_kill)
        running[rank] = start(folder / f"output-{rank}.txt", rank_program)
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + RUN_SECONDS
    try:
        while running:
            for rank, child in list(running.items()):
                status = wait(child, 0)
                if status is not None:
                    statuses[rank] = status
                    del running[rank]
                    if is_killed and os.WIFSIGNALED(status) and deadline > time.monotonic() + END_SECONDS:
                        deadline = time.monotonic() + END_SECONDS
                        for other in running.values():
                            os.kill(other, signal.SIGTERM)
            if time.monotonic() > deadline:
                raise FailedError(f"ranks {sorted(running)} still run, killed: {is_killed}; folder {folder}")
            time.sleep(0.002)
    finally:
        for child in running.values():
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not is_killed and any(statuses.values()):
        raise FailedError(f"the statuses of the ranks are {statuses}")
    return not any(statuses.values())


def check(program: Program, folder: Path) -> None:
    """Compare a killed and resumed program with an uninterrupted run.

    Raises:
        FailedError: It ends with other numbers, or does not end.
    """
    whole, resumed = folder / "whole", folder / "resumed"
    for each in (whole, resumed):
        each.mkdir(parents=True)
    run(program, whole)
    for _ in range(program.num_kills):  # the second one, at the same update, loses little or nothing
        if run(program, resumed, is_killed=True):
            break
    run(program, resumed)
    for rank in range(program.num_processes):
        outcomes = [torch.load(each / f"outcome-{rank}.pt", weights_only=True) for each in (whole, resumed)]
        if rank > 0:  # DDP replaces them by those of the main process, before each forward pass
            outcomes = [without_statistics(outcome) for outcome in outcomes]
        found = differences(*outcomes)
        if found:
            raise FailedError(f"rank {rank} ends with other numbers: {found[:3]}")
    names = [[state.path.name for state in list_states(each / "states")] for each in (whole, resumed)]
    if "final" not in names[1]:
        raise FailedError(f"the states at the end are {names[1]}; without a kill, {names[0]}")


def without_statistics(outcome: Any) -> Any:
    """Return an outcome without the statistics of batch norms, of the model and of the average."""
    if not isinstance(outcome, dict):
        return outcome
    names = [name for name in outcome if not str(name).endswith(("running_mean", "running_var"))]
    return {name: without_statistics(outcome[name]) for name in names}


def output_of(folder: Path) -> str:
    """Return the ends of what the processes of a program printed."""
    paths = sorted(folder.glob("*/output-*.txt"))
    return "\n".join(f"--- {path.parent.name}/{path.name}\n{path.read_text()[-1500:]}" for path in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the number of the first program (default: 0)")
    parser.add_argument("--seed", type=int, default=None, help="decides what the programs are (default: the time)")
    parser.add_argument("--only", type=int, default=None, help="run only the program of this number")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="programs_"))
    numbers = (
        range(arguments.first, arguments.first + arguments.programs) if arguments.only is None else [arguments.only]
    )
    begin, num_failed = time.monotonic(), 0
    for number in numbers:
        program, folder = Program.make_up(random.Random(f"{seed}/{number}")), root / str(number)
        try:
            check(program, folder)
        except FailedError as failure:
            num_failed += 1
            print(f"program {number} of seed {seed}: {failure}\n{program}\n{output_of(folder)}", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"{len(numbers)} programs in {time.monotonic() - begin:.0f} s, {num_failed} failures")
    if not num_failed:
        shutil.rmtree(root)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
