"""Shared by all benchmarks: the job that a framework runs, and the probes that observe it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

NUM_FEATURES, NUM_CLASSES = 64, 10
NUM_TRIAL_STEPS = 2
"""Extra forward passes that a framework may make to infer shapes."""

# --- probes --------------------------------------------------------------------------------------------------------


class Probe(Protocol):
    """Observes a job: the model reports each forward pass to it, whichever framework calls the model."""

    num_steps_per_epoch: int
    num_forwards: int

    def tick(self) -> None:
        """Record the start of a forward pass."""

    def watching(self) -> AbstractContextManager[None]:
        """Return the context in which the job runs."""


class EpochClock:
    """Reads the clock at the first forward pass of each epoch and at the end of the job.

    Args:
        num_steps_per_epoch: Number of forward passes per epoch.
    """

    def __init__(self, num_steps_per_epoch: int) -> None:
        self.num_steps_per_epoch = num_steps_per_epoch
        self.num_forwards = 0
        self.call = 0.0
        self.stamps: list[float] = []

    def tick(self) -> None:
        """Record the start of a forward pass."""
        if self.num_forwards % self.num_steps_per_epoch == 0:
            self.stamps.append(time.perf_counter())
        self.num_forwards += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the complete job."""
        start = time.perf_counter()
        yield
        self.stamps.append(time.perf_counter())
        self.call = self.stamps[-1] - start

    @property
    def epochs(self) -> list[float]:
        """Seconds from the first step of each epoch to the first step of the next. The last epoch is not included."""
        return [after - before for before, after in zip(self.stamps[:-2], self.stamps[1:-1], strict=True)]

    @property
    def pass_over_data(self) -> float:
        """Seconds from the first step to the end of the job."""
        return self.stamps[-1] - self.stamps[0]

    @property
    def start(self) -> float:
        """Seconds from the call to the first step."""
        return self.call - self.pass_over_data


class _Counter:
    """Records a running count at each forward pass. The increase between two passes belongs to one step."""

    def __init__(self, num_steps_per_epoch: int) -> None:
        self.num_steps_per_epoch = num_steps_per_epoch
        self.count = 0
        self.counts: list[int] = []

    def tick(self) -> None:
        """Record the start of a forward pass."""
        self.counts.append(self.count)

    @property
    def num_forwards(self) -> int:
        """Number of forward passes."""
        return len(self.counts)

    @property
    def per_step(self) -> list[int]:
        """The count of each step, without the first, which includes the start of the run."""
        return [after - before for before, after in zip(self.counts[1:-1], self.counts[2:], strict=True)]


class PythonCallCounter(_Counter):
    """Counts the calls of functions written in Python, in the main thread."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count while the job runs."""

        def count(frame: object, event: str, argument: object) -> None:
            self.count += event == "call"

        sys.setprofile(count)
        try:
            yield
        finally:
            sys.setprofile(None)


class HostReadCounter(_Counter):
    """Counts how often the host reads the value of a tensor. On a GPU, each read waits for the device.

    Meanwhile, tensors do not say that they are in host memory, where a read is free.
    """

    READERS = ("__bool__", "__complex__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count while the job runs."""
        originals = {name: getattr(torch.Tensor, name) for name in self.READERS}
        for name, original in originals.items():
            setattr(torch.Tensor, name, self._counting(original))
        torch.Tensor.is_cpu = False
        try:
            yield
        finally:
            del torch.Tensor.is_cpu  # the attribute of its base class appears again
            for name, original in originals.items():
                setattr(torch.Tensor, name, original)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        return read


# --- models and data -----------------------------------------------------------------------------------------------


class ProbedModel(nn.Sequential):
    """A sequence of layers that reports each forward pass to a probe."""

    probe: Probe

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Report to the probe, then compute."""
        self.probe.tick()
        return super().forward(inputs)


def make_mlp(num_features: int = NUM_FEATURES, width: int = 64) -> ProbedModel:
    return ProbedModel(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


def make_wide_mlp() -> ProbedModel:
    """Return a model of 17 MB, large enough for a copy of it to be visible in the memory figures."""
    width = 2048
    return ProbedModel(
        nn.Linear(NUM_FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES)
    )


def make_conv_net() -> ProbedModel:
    """Return a model for images of 3 x 32 x 32. A step with 32 images takes about 30 ms on one core."""
    return ProbedModel(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(128, NUM_CLASSES)),
    )


def make_deep_mlp(num_layers: int) -> ProbedModel:
    """Return a model with ``2 * (num_layers + 1)`` parameter tensors."""
    hidden = [nn.Linear(NUM_FEATURES, NUM_FEATURES) for _ in range(num_layers)]
    return ProbedModel(*hidden, nn.Linear(NUM_FEATURES, NUM_CLASSES))


def make_dataset(num_samples: int, shape: tuple[int, ...] = (NUM_FEATURES,)) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, *shape, generator=generator)
    return TensorDataset(inputs, torch.randint(NUM_CLASSES, (num_samples,), generator=generator))


class SingleSamples(Dataset[Any]):
    """Returns its samples one by one, like a typical user-defined dataset."""

    def __init__(self, num_samples: int, num_features: int) -> None:
        self.tensors = make_dataset(num_samples, (num_features,)).tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)


# --- jobs ----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One training or evaluation, identical for every framework. The optimizer is plain SGD."""

    make_model: Callable[[], ProbedModel]
    dataset: Any
    num_epochs: int = 1
    batch_size: int = 32
    num_accumulated: int = 1
    """Number of batches per update."""
    is_bf16: bool = False
    is_quiet: bool = False
    """Whether the progress bar, logs and other default callbacks are disabled."""
    has_own_loader: bool = False
    """Whether the framework creates its default dataloader instead of using `loader`."""
    is_distributed: bool = False
    make_probe: Callable[[int], Probe] = EpochClock
    model: ProbedModel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    loss_func: nn.Module = field(init=False, default_factory=nn.CrossEntropyLoss)
    probe: Any = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.make_model()
        self.model.probe = self.probe = self.make_probe(self.num_steps_per_epoch)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    @property
    def num_steps_per_epoch(self) -> int:
        """Number of batches of this process per epoch. All of them are full."""
        num_processes = torch.distributed.get_world_size() if self.is_distributed else 1
        return len(self.dataset) // (self.batch_size * num_processes)

    def loader(self, **kwargs: Any) -> DataLoader[Any]:
        """Return the training dataloader that all frameworks use."""
        return DataLoader(self.dataset, self.batch_size, **({"shuffle": True} | kwargs))

    def eval_loader(self, **kwargs: Any) -> DataLoader[Any]:
        """Return the evaluation dataloader that all frameworks use."""
        return DataLoader(self.dataset, self.batch_size, shuffle=False, **kwargs)

    def do(self, action: Callable[[Job], None]) -> Any:
        """Run the job with a framework, and return the probe that observed it.

        Raises:
            RuntimeError: The framework made a different number of steps than the job has. Its figures would be
                meaningless.
        """
        with self.probe.watching():
            action(self)
        num_expected, num_made = self.num_epochs * self.num_steps_per_epoch, self.probe.num_forwards
        if not num_expected <= num_made <= num_expected + NUM_TRIAL_STEPS:
            raise RuntimeError(f"The framework made {num_made} steps, but the job has {num_expected}.")
        return self.probe
