"""Small datasets, models, trainers and recording callbacks that all tests share."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
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
"""The folder of the package."""

mse = torch.nn.functional.mse_loss

IN_ORDER = {"shuffle": False}
"""Keyword arguments of a training loader that does not shuffle."""

IMPOSSIBLE_COUNTS = [(0, ValueError), (-1, ValueError), (1.5, TypeError), (float("nan"), TypeError), (True, TypeError)]
"""Values that are not a count, each with the type of the error that reports it."""

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
"""The methods of the trainer that a run calls and a subclass may override."""

EVENTS_OF_A_RUN = tuple(
    event
    for event in EVENTS
    if not event.startswith("on_evaluation_run_")
    and event not in ("on_init_end", "on_step_values", "on_log_point", "on_exception", "on_stop_training_error")
    and event != "on_training_state_save"
)
"""The events that occur in every training run with an evaluation, whatever happens in it."""


# --- data --------------------------------------------------------------------------------------------------------


def make_dataset(num_samples: int = 16, num_features: int = 3, seed: int = 1) -> TensorDataset:
    """Create samples of a linear problem with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, num_features, generator=generator)
    targets = inputs.sum(dim=1, keepdim=True) + 0.1 * torch.randn(num_samples, 1, generator=generator)
    return TensorDataset(inputs, targets)


def make_indexed_dataset(num_samples: int = 16) -> TensorDataset:
    """Create samples whose input is their index."""
    return TensorDataset(torch.arange(num_samples, dtype=torch.float32).reshape(-1, 1), torch.zeros(num_samples, 1))


class Samples(Dataset):
    """A map-style dataset that is not a `TensorDataset`, so its batches are collated from samples."""

    def __init__(self, dataset: Any) -> None:
        self.samples = [dataset[index] for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Stream(IterableDataset):
    """An iterable dataset without a length."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        for index in range(len(self.dataset)):
            yield self.dataset[index]


class Batches:
    """A plain iterable of batches, without a length."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __iter__(self) -> Any:
        for start in range(0, len(self.dataset), self.batch_size):
            yield self.dataset[start : start + self.batch_size]


class SizedBatches(Batches):
    """An iterable of batches that reports any length it is given, even a wrong one."""

    def __init__(self, dataset: Any, batch_size: int, length: int) -> None:
        super().__init__(dataset, batch_size)
        self.length = length

    def __len__(self) -> int:
        return self.length


# --- trainers ----------------------------------------------------------------------------------------------------


def draw_parameters(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Draw all parameters from a normal distribution, without use of the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def make_model(num_features: int = 3, seed: int = 2) -> nn.Linear:
    """Create a linear model with the same weights each time."""
    model = nn.Linear(num_features, 1)
    draw_parameters(model, seed)
    return model


def make_trainer(
    model: nn.Module | None = None,
    *,
    lr: float = 0.1,
    callbacks: Any = (),
    cls: type[Trainer] = Trainer,
    loss_func: Any = mse,
    **kwargs: Any,
) -> Any:
    """Create a trainer of a linear model with SGD, by default without callbacks."""
    model = make_model() if model is None else model
    return cls(model, loss_func, torch.optim.SGD(model.parameters(), lr=lr), callbacks=callbacks, **kwargs)


def train(trainer: Any, dataset: Any = 16, **kwargs: Any) -> Any:
    """Train for one epoch in batches of four samples, and return the trainer.

    Args:
        trainer: The trainer.
        dataset: A dataset, or the number of samples to create.
        kwargs: Arguments of `Trainer.train` that differ.
    """
    dataset = make_dataset(dataset) if isinstance(dataset, int) else dataset
    trainer.train(dataset, **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})
    return trainer


def losses(trainer: Any, name: str = "train_loss_epoch") -> list[Any]:
    """Return all values of a metric in the run history."""
    return trainer.run_history.get_metric_values(name)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's state."""
    return copy.deepcopy(model.state_dict())


def history_of(trainer: Any) -> dict[str, Any]:
    """Return the state of a trainer's run history without the times, which differ from run to run."""
    state = trainer.run_history.state_dict()
    return {**state, "moments": [moment[:-1] for moment in state["moments"]]}


def gradients_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the gradients of a trainer's model, by parameter name."""
    return {name: parameter.grad.clone() for name, parameter in trainer.get_model().named_parameters()}


def assert_same_weights(left: Any, right: Any) -> None:
    """Assert that two states of a model are bit-identical."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# --- schedulers --------------------------------------------------------------------------------------------------


def make_optimizer(*lrs: float) -> torch.optim.Optimizer:
    """Create an optimizer with one parameter group per learning rate."""
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
    """Appends the name of each event to ``log``, then calls the reaction to the event, if there is one.

    Log points are not recorded, because they depend on the clock.

    Args:
        log: The list, which several recorders may share.
        reactions: Functions by event, called with the arguments of the event.
        name: Prefix of each recorded name, to tell recorders apart.
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
    """A trainer that appends the name of each hook to ``log`` when it is called."""

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
    """Calls a function in each of some events: ``Probe(on_train_step_end=lambda trainer, **kwargs: ...)``."""

    def __init__(self, **functions: Any) -> None:
        for event, function in functions.items():
            assert event in EVENTS, event
            setattr(self, event, function)


def recorder_of(function: Any, *events: str) -> tuple[Probe, list[Any]]:
    """Return a callback that appends ``function(trainer)`` to a list in each of the events, and the list."""
    values: list[Any] = []

    def record(trainer: Any, **kwargs: Any) -> None:
        values.append(function(trainer))

    return Probe(**dict.fromkeys(events, record)), values


def raiser(error: BaseException) -> Any:
    """Return a reaction to an event that raises an error."""

    def react(trainer: Any, **kwargs: Any) -> None:
        raise error

    return react


# --- modules and processes ---------------------------------------------------------------------------------------


def load_module(path: Path) -> ModuleType:
    """Import a file that is not on the import path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(
    code: str,
    *arguments: str,
    timeout: float = 120,
    cwd: Path | None = None,
    has_imported_nothing: bool = False,
    **environment: str,
) -> str:
    """Run code in a separate process, which can import the helpers of the tests, and return what it printed.

    Args:
        code: The code of a script.
        arguments: The command-line arguments of the script.
        timeout: Seconds after which the process is killed.
        cwd: The working directory.
        has_imported_nothing: Whether to start a new interpreter, which takes seconds, instead of a forked process.
        environment: Changes to the environment of the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code)
        run = _starting.run_from_scratch if has_imported_nothing else _starting.run
        result = run(script, *arguments, timeout=timeout, cwd=cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
