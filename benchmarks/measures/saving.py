"""Measure saving a training state and resuming from it, relative to hand-written code.

The model and the optimizer together hold 100 MB: 256 parameters with AdamW, or one parameter with momentum. The
hand-written code saves both with `torch.save` and `os.fsync`.

A background save pauses the loop, differently for the first save of a run and for later ones, and slows down the next
steps while the state is written. Resuming is timed from a new trainer to the end of its first step, relative to
`torch.load`, `load_state_dict` and one step.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from measures import Figure
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback

WIDTH, NUM_LAYERS = 256, 128
NUM_STEPS = 20  # between two background saves
NUM_ROUNDS = 3


# --- models of 100 MB --------------------------------------------------------------------------------------------


class Vector(nn.Module):
    """One large parameter, of which a step uses only the first elements."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100_000_000 // 4 // 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply by the first elements."""
        return inputs * self.weight[: inputs.shape[1]]


def make_vector() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Vector()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_layers() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


Make = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
DATA = TensorDataset(torch.ones(1, WIDTH), torch.zeros(1, WIDTH))


def train(trainer: Trainer, data: Any = DATA, **kwargs: Any) -> None:
    workers = {"num_workers": 0, "shuffle": False}
    trainer.train(data, **{"num_epochs": 1, "per_device_batch_size": 1, "train_dataloader_kwargs": workers, **kwargs})


def make_trainer(make: Make, *callbacks: TrainerCallback) -> Trainer:
    model, optimizer = make()
    return Trainer(model, nn.MSELoss(), optimizer, callbacks=callbacks)


def step_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.functional.mse_loss(model(DATA.tensors[0]), DATA.tensors[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def save_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> float:
    """Write a state without anything that this library adds, and return the duration in seconds."""
    start = time.perf_counter()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


class Folder:
    """Provides unused paths, after all pending writes have reached the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def free(self, name: str) -> Path:
        """Return the path for a name, after deleting what was there."""
        path = self.path / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        os.sync()
        return path


# --- the cases ---------------------------------------------------------------------------------------------------


Candidates = dict[str, Callable[[], float]]
"""The functions to time alternately, by row. The hand-written code comes first and has an empty key."""


def saving(make: Make, folder: Folder) -> Candidates:
    trainer = make_trainer(make)
    train(trainer)

    def ours() -> float:
        path = folder.free("state")
        start = time.perf_counter()
        trainer.save_training_state(path)
        return time.perf_counter() - start

    return {
        "": lambda: save_by_hand(trainer.model, trainer.optimizer, folder.free("by_hand.pt")),
        "F-save": ours,
    }


class TimedSaving(SaveTrainingStateCallback):
    """Records when each step ended, and when the run continued after it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, save_every_n_steps=NUM_STEPS, save_at_end=False, in_background=True)
        self.ended: list[float] = []
        self.continued: list[float] = []

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Save, and record the times before and after."""
        self.ended.append(time.perf_counter())
        super().on_train_step_end(trainer, batch, batch_output, **kwargs)
        self.continued.append(time.perf_counter())

    def stall(self, step: int) -> float:
        """Return how long the run was paused after a step, in seconds."""
        return self.continued[step - 1] - self.ended[step - 1]

    def seconds(self, start: int, stop: int) -> float:
        """Return the seconds from the end of one step to the end of another."""
        return self.ended[stop - 1] - self.ended[start - 1]


def stalling(make: Make, folder: Folder) -> Candidates:
    model, optimizer = make()
    step_by_hand(model, optimizer)
    last: list[TimedSaving] = []

    def first() -> float:
        last[:] = [TimedSaving(folder.free("states"))]
        num_samples = 3 * NUM_STEPS - 1
        data = TensorDataset(torch.ones(num_samples, WIDTH), torch.zeros(num_samples, WIDTH))
        train(make_trainer(make, *last), data)
        return last[0].stall(NUM_STEPS)

    def hold_up() -> float:
        saved, half = 2 * NUM_STEPS, NUM_STEPS // 2  # writing the state takes less than half of the steps
        with_saving = last[0].seconds(saved, saved + half - 1)
        return with_saving - last[0].seconds(saved + half, saved + 2 * half - 1)

    return {
        "": lambda: save_by_hand(model, optimizer, folder.free("by_hand.pt")),
        "F-stall": first,
        "F-later": lambda: last[0].stall(2 * NUM_STEPS),
        "F-held": hold_up,
    }


class FirstStep(TrainerCallback):
    """Records when the first step ended."""

    end = 0.0

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record the time."""
        self.end = self.end or time.perf_counter()


def resuming(make: Make, folder: Folder) -> Candidates:
    trainer = make_trainer(make)
    train(trainer)
    by_hand_path, path = folder.free("by_hand.pt"), folder.free("state")
    save_by_hand(trainer.model, trainer.optimizer, by_hand_path)
    trainer.save_training_state(path)

    def by_hand() -> float:
        model, optimizer = make()
        start = time.perf_counter()
        state = torch.load(by_hand_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step_by_hand(model, optimizer)
        return time.perf_counter() - start

    def ours() -> float:
        watch = FirstStep()
        trainer = make_trainer(make, watch)
        start = time.perf_counter()
        train(trainer, num_epochs=2, resume_from=path)
        return watch.end - start

    return {"": by_hand, "F-resume": ours}


# --- measuring ---------------------------------------------------------------------------------------------------


def interleaved(candidates: Candidates) -> dict[str, list[float]]:
    """Time each candidate once per round, after a warm-up round."""
    times: dict[str, list[float]] = {row: [] for row in candidates}
    for round_number in range(NUM_ROUNDS + 1):
        for row, run in candidates.items():
            seconds = run()
            if round_number > 0:
                times[row].append(seconds)
    return times


def figures_of(candidates: Candidates, suffix: str) -> list[Figure]:
    times = interleaved(candidates)
    by_hand = times.pop("")
    figures = []
    for row, seconds in times.items():
        ratio = statistics.median(ours / base for ours, base in zip(seconds, by_hand, strict=True))
        figures.append(Figure(row + suffix, ratio, statistics.median(seconds), statistics.median(by_hand)))
    return figures


def measure(case: str, framework: str) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory(prefix="benchmark_") as path:
        for make, suffix in ((make_layers, ""), (make_vector, "-vector")):
            for candidates_of in (saving, stalling, resuming):
                figures += figures_of(candidates_of(make, Folder(Path(path))), suffix)
    return figures
