"""What the programs in `contract/programs` report about themselves.

Each program trains in the way that users of 0.1.61 do. It runs unchanged with that version and with this one, uses
names of 0.1.61 only, and prints its figures as JSON. With 0.1.61 in the place of this version, this records the figures
that the tests compare with:

    PYTHONPATH=tests/tools python tests/contract/programs/detection.py FOLDER > tests/contract/programs/detection.json

The program writes its files to the folder, which has to be empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytorch_accelerated.callbacks import TrainerCallback

EVENTS = (
    "on_init_end",
    "on_training_run_start",
    "on_train_epoch_start",
    "on_train_step_start",
    "on_train_step_end",
    "on_train_epoch_end",
    "on_eval_epoch_start",
    "on_eval_step_start",
    "on_eval_step_end",
    "on_eval_epoch_end",
    "on_training_run_epoch_end",
    "on_training_run_end",
    "on_evaluation_run_start",
    "on_evaluation_run_end",
    "on_stop_training_error",
)
"""The events of 0.1.61."""

IN_PROCESS = {"num_workers": 0}
"""Arguments of a loader that starts no workers."""

IN_ORDER = {"num_workers": 0, "shuffle": False}
"""Arguments of a training loader whose order is the same in both versions."""


class Observer(TrainerCallback):
    """Keeps the events of a trainer and the learning rates of its updates, until they are reported.

    Args:
        optimizer: The optimizer of the trainer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._forget()
        optimizer.register_step_pre_hook(self._before_update)

    def _forget(self) -> None:
        self.events: list[str] = []
        self.epochs: list[int] = []
        self.learning_rates: list[list[float]] = []

    def _before_update(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        self.learning_rates.append([group["lr"] for group in optimizer.param_groups])

    def _saw(self, event: str, trainer: Any) -> None:
        self.events.append(event.removeprefix("on_"))
        if event == "on_train_epoch_start":
            self.epochs.append(trainer.run_history.current_epoch)

    def figures(self, trainer: Any) -> dict[str, Any]:
        """Report what happened since the last report."""
        history = trainer.run_history
        names = sorted(history.get_metric_names())
        figures = {
            "metrics": {name: plain(history.get_metric_values(name)) for name in names},
            "latest_metrics": {name: plain(history.get_latest_metric(name)) for name in names},
            "epochs": self.epochs,
            "current_epoch": history.current_epoch,
            "num_events": dict(sorted(Counter(self.events).items())),
            "order_of_events": shorten(self.events),
            "learning_rates": plain(self.learning_rates),
            "run_config": plain(vars(trainer.run_config)),
            "weights": plain(weights_of(trainer.get_model())),
        }
        self._forget()
        return figures


def _observe(event: str) -> Callable[..., None]:
    return lambda self, trainer, **kwargs: self._saw(event, trainer)


for _event in EVENTS:
    setattr(Observer, _event, _observe(_event))


def shorten(events: list[str]) -> str:
    """Return the events in order, steps that follow each other as ``3*(train_step_start train_step_end)``."""
    steps = re.compile(r"(\w+_step_start \w+_step_end)(?: \1)*")
    return steps.sub(lambda match: f"{match[0].count(match[1])}*({match[1]})", " ".join(events))


def plain(value: Any) -> Any:
    """Return a value as JSON can represent it, functions and classes by their names."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy and PyTorch
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return getattr(value, "__name__", type(value).__name__)


def weights_of(model: nn.Module) -> dict[str, float]:
    """Return the sum of the squares of each entry in a model's state."""
    return {name: entry.double().square().sum().item() for name, entry in model.state_dict().items()}


def files_in(folder: Path) -> dict[str, Any]:
    """Return what a folder has: checkpoints with their keys and plain values, and the names of folders."""
    return {
        path.relative_to(folder).as_posix(): "folder" if path.is_dir() else contents_of(path)
        for path in sorted(folder.glob("*"))
        if not path.name.startswith(".")
    }


def contents_of(path: Path) -> dict[str, Any]:
    """Return the keys of a checkpoint: of states their names, of everything else the values."""
    contents = torch.load(path, weights_only=False)
    if "timestamp" in contents:
        contents["timestamp"] = type(contents["timestamp"]).__name__
    return {
        key: sorted(map(str, value)) if key.endswith("_state_dict") else plain(value)
        for key, value in sorted(contents.items())
    }


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Draw numbers from a normal distribution, the same ones whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def to_json(figures: dict[str, Any], depth: int = 2) -> str:
    """Return figures as JSON, with a line for each entry down to a depth."""
    if depth == 0 or not isinstance(figures, dict):
        return json.dumps(figures)
    return (
        "{\n" + ",\n".join(f"{json.dumps(key)}: {to_json(value, depth - 1)}" for key, value in figures.items()) + "\n}"
    )


def main(program: Callable[[Path], dict[str, Any]]) -> None:
    """Run a program in the folder that the command line names, and print its figures."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        figures = program(Path(sys.argv[1]))
    print(to_json(figures))
