"""Saving a state of 100 MB and going on from it, over `torch.save` with `os.fsync` and `torch.load` of the same."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from measures import Figure
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback

NUM_PARAMETERS = 50_000_000 // 4  # and as many numbers of the optimizer: 100 MB
NUM_PAIRS = 3


class Vector(nn.Module):
    """Many parameters that cost next to nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_PARAMETERS))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply by the first parameter."""
        return inputs * self.weight[0]


class SaveAfterFirstStep(TrainerCallback):
    """Saves a training state, and takes the time that the loop stands still for it."""

    def __init__(self, folder: Path, in_background: bool) -> None:
        self.folder, self.in_background = folder, in_background
        self.seconds = 0.0

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save, and take the time."""
        start = time.perf_counter()
        trainer.save_training_state(self.folder, in_background=self.in_background)
        self.seconds = time.perf_counter() - start


class ReadClock(TrainerCallback):
    """Notes when the first step is done."""

    def __init__(self) -> None:
        self.time = 0.0

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note the time."""
        self.time = time.perf_counter()


class Example:
    """A model with its optimizer, once for each way to save and to go on.

    Args:
        folder: Where the states go.
    """

    batch = (torch.ones(1), torch.zeros(1))

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Vector()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def save_by_hand(self) -> float:
        """Return the seconds that one file takes."""
        contents = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        start = time.perf_counter()
        with (self.folder / "by_hand.pt").open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - start

    def save(self, in_background: bool = False) -> float:
        """Return the seconds that the loop stands still for a training state."""
        callback = SaveAfterFirstStep(self.folder / "state", in_background)
        self.train([callback])
        return callback.seconds

    def resume_by_hand(self) -> float:
        """Return the seconds from the start to the end of the first step."""
        start = time.perf_counter()
        contents = torch.load(self.folder / "by_hand.pt")
        self.model.load_state_dict(contents["model"])
        self.optimizer.load_state_dict(contents["optimizer"])
        inputs, targets = self.batch
        nn.functional.mse_loss(self.model(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def resume(self) -> float:
        """Return the seconds from the call to the end of the first step."""
        clock = ReadClock()
        start = time.perf_counter()
        self.train([clock], num_epochs=2, resume_from=self.folder / "state")
        return clock.time - start

    def train(self, callbacks: list[TrainerCallback], num_epochs: int = 1, **kwargs: Any) -> None:
        """Run the trainer."""
        trainer = Trainer(self.model, nn.MSELoss(), self.optimizer, callbacks=callbacks)
        trainer.train([self.batch], num_epochs=num_epochs, per_device_batch_size=1, **kwargs)


def compare_calls(row: str, own: Callable[[], float], by_hand: Callable[[], float]) -> Figure:
    seconds, baselines = [], []
    for _ in range(NUM_PAIRS):
        baselines.append(by_hand())
        seconds.append(own())
    ratios = [taken / baseline for taken, baseline in zip(seconds, baselines, strict=True)]
    return Figure(row, statistics.median(ratios), statistics.median(seconds), statistics.median(baselines))


def measure(case: str, framework: str) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        example = Example(Path(folder))
        example.save()  # the optimizer has its momentum from now on
        return [
            compare_calls("F-save", example.save, example.save_by_hand),
            compare_calls("F-stall", lambda: example.save(in_background=True), example.save_by_hand),
            compare_calls("F-resume", example.resume, example.resume_by_hand),
        ]
