"""Small models, data and recorders that the tests share."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import _starting
import pytorch_accelerated
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import EVENTS, TrainerCallback

SOURCE = Path(pytorch_accelerated.__file__).parent

HOOKS = (
    "training_run_start",
    "train_epoch_start",
    "calculate_train_batch_loss",
    "backward_step",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
    "train_epoch_end",
    "eval_epoch_start",
    "calculate_eval_batch_loss",
    "eval_epoch_end",
    "training_run_epoch_end",
    "training_run_end",
    "evaluation_run_start",
    "evaluation_run_end",
)


# --- data --------------------------------------------------------------------------------------------------------


def make_dataset(num_samples: int = 16, num_features: int = 3, seed: int = 1) -> TensorDataset:
    """A linear problem with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, num_features, generator=generator)
    targets = inputs.sum(dim=1, keepdim=True) + 0.1 * torch.randn(num_samples, 1, generator=generator)
    return TensorDataset(inputs, targets)


def make_indexed_dataset(num_samples: int = 16) -> TensorDataset:
    """Samples whose input is their own index."""
    return TensorDataset(torch.arange(num_samples, dtype=torch.float32).reshape(-1, 1), torch.zeros(num_samples, 1))


class Samples(Dataset):
    """A map-style dataset that is no `TensorDataset`."""

    def __init__(self, dataset: Any) -> None:
        self.samples = [dataset[index] for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Stream(IterableDataset):
    """An iterable dataset; ``length`` is what it says, true or not; ``None`` for no length."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        for index in range(len(self.dataset)):
            yield self.dataset[index]


class Batches:
    """A plain iterable of batches, without length."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __iter__(self) -> Any:
        for start in range(0, len(self.dataset), self.batch_size):
            yield self.dataset[start : start + self.batch_size]


class SizedBatches(Batches):
    """The same with a length, which may be given wrongly."""

    def __init__(self, dataset: Any, batch_size: int, length: int) -> None:
        super().__init__(dataset, batch_size)
        self.length = length

    def __len__(self) -> int:
        return self.length


# --- trainers ----------------------------------------------------------------------------------------------------


def make_model(num_features: int = 3, seed: int = 2) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(num_features, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def make_trainer(
    model: nn.Module | None = None,
    *,
    lr: float = 0.1,
    callbacks: Any = (),
    cls: type[Trainer] = Trainer,
    loss_func: Any = torch.nn.functional.mse_loss,
    **kwargs: Any,
) -> Any:
    """A quiet trainer of a linear model with SGD."""
    model = make_model() if model is None else model
    return cls(model, loss_func, torch.optim.SGD(model.parameters(), lr=lr), callbacks=callbacks, **kwargs)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's state."""
    return copy.deepcopy(model.state_dict())


def assert_same_weights(left: Any, right: Any) -> None:
    """Bit by bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# --- schedulers --------------------------------------------------------------------------------------------------


def make_optimizer(*lrs: float) -> torch.optim.Optimizer:
    """An optimizer with one parameter group per learning rate."""
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=1.0)


def step_through(scheduler: Any, num_steps: int) -> np.ndarray:
    """Return the learning rates set by each step, of shape (num_steps, num_groups)."""
    rates = []
    for _ in range(num_steps):
        scheduler.step()
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
    return np.array(rates)


# --- recorders ---------------------------------------------------------------------------------------------------


class EventRecorder(TrainerCallback):
    """Appends the name of each event to ``log``; raises what ``reactions`` holds for an event.

    Log points are left out, because they come by the clock.

    Args:
        log: The list, which may be shared.
        reactions: By event, what to call with the trainer after the event was recorded.
        name: Put before each name, to tell recorders apart.
    """

    def __init__(self, log: list[str] | None = None, reactions: Any = None, name: str = "") -> None:
        self.log: list[str] = [] if log is None else log
        self.reactions = reactions or {}
        self.name = name


def _recording_event(event: str) -> Any:
    def record(self: EventRecorder, trainer: Any, **kwargs: Any) -> None:
        self.log.append(self.name + event)
        if event in self.reactions:
            self.reactions[event](trainer, **kwargs)

    return record


for _event in set(EVENTS) - {"on_log_point"}:
    setattr(EventRecorder, _event, _recording_event(_event))


class HookRecorder(Trainer):
    """Appends the name of each hook to ``log`` when it is called."""

    def __init__(self, *args: Any, log: list[str], **kwargs: Any) -> None:
        self.log = log
        super().__init__(*args, **kwargs)


def _recording_hook(hook: str) -> Any:
    def record(self: HookRecorder, *args: Any, **kwargs: Any) -> Any:
        self.log.append(hook)
        return getattr(Trainer, hook)(self, *args, **kwargs)

    return record


for _hook in HOOKS:
    setattr(HookRecorder, _hook, _recording_hook(_hook))


class Probe(TrainerCallback):
    """Calls functions in events: ``Probe(on_train_step_end=lambda trainer, **kwargs: ...)``."""

    def __init__(self, **functions: Any) -> None:
        for event, function in functions.items():
            assert event in EVENTS, event
            setattr(self, event, function)


def raiser(error: BaseException) -> Any:
    """A reaction that raises."""

    def react(trainer: Any, **kwargs: Any) -> None:
        raise error

    return react


# --- processes ---------------------------------------------------------------------------------------------------


def run_python(
    code: str,
    *arguments: str,
    timeout: float = 120,
    cwd: Path | None = None,
    has_imported_nothing: bool = False,
    **environment: str,
) -> str:
    """Run code in a process of its own, with the tests' helpers at hand, and return what it printed.

    Args:
        code: The code.
        arguments: Of the script that it is.
        timeout: Seconds after which it is killed.
        cwd: Its working directory.
        has_imported_nothing: Whether it must be an interpreter that starts from scratch, which takes seconds.
        environment: Changes to the environment of the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code)
        run = _starting.run_from_scratch if has_imported_nothing else _starting.run
        result = run(script, *arguments, timeout=timeout, cwd=cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


mse = torch.nn.functional.mse_loss
IN_ORDER = {"shuffle": False}


def train(trainer, dataset=16, **kwargs):
    """Train for one epoch in batches of four samples, and return the trainer.

    Args:
        trainer: The trainer.
        dataset: A dataset, or the number of samples of one.
        kwargs: Arguments of `Trainer.train` that differ.
    """
    dataset = make_dataset(dataset) if isinstance(dataset, int) else dataset
    trainer.train(dataset, **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})
    return trainer


IMPOSSIBLE_COUNTS = [(0, ValueError), (-1, ValueError), (1.5, TypeError), (float("nan"), TypeError), (True, TypeError)]
"""Values that are not a count, each with the type of the error that reports it."""


def losses(trainer, name="train_loss_epoch"):
    return trainer.run_history.get_metric_values(name)
