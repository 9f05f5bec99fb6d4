"""Names for the types that the library shares with the programs of its users, and for what has to stay open.

`Any` appears here where the type belongs to the user: nobody else knows it. Each alias says what it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch.optim import Optimizer
from torch.utils.data import Dataset

# --- a step --------------------------------------------------------------------------------------------------------

Batch: TypeAlias = Any
"""What a loader yields. Open: the user's dataset and collate function make it."""

ModelOutput: TypeAlias = Any
"""What the model returns. Open: only the loss function, or the user's step, looks into it."""

LossFunction: TypeAlias = Callable[..., Any]
"""Called with the model's outputs and the targets of a batch. Open: a step of the user's may call it in other ways."""

BatchOutput: TypeAlias = Mapping[str, Any]
"""What a step returns: ``loss`` and ``batch_size``. Open: further entries are passed on to the callbacks."""

Nested: TypeAlias = Any
"""Tensors in tuples, lists, mappings and dataclasses, at any depth. Open: the containers may be the user's classes."""

# --- data ----------------------------------------------------------------------------------------------------------

Loader: TypeAlias = Iterable[Batch]
"""Yields the batches of an epoch: a `DataLoader`, or any other iterable."""

EvalLoaders: TypeAlias = Loader | dict[str, Loader]
"""The loader of a single evaluation dataset, or the loaders of several by name."""


class Samples(Protocol):
    """A map-style dataset: any object with a length and access by index, such as a list of samples."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one sample."""


Data: TypeAlias = Dataset[Any] | Samples | Loader
"""A dataset of samples, from which a loader is created, or an iterable of batches."""

EvalData: TypeAlias = Data | dict[str, Data]
"""The data to evaluate on, or several by name."""

CollateFunction: TypeAlias = Callable[[Any], Batch]
"""Makes a batch from a list of samples. Open: the samples are the user's."""

DataLoaderKwargs: TypeAlias = Mapping[str, Any]
"""Keyword arguments of `torch.utils.data.DataLoader`. Open: they are passed on, whatever the version takes."""

# --- metrics -------------------------------------------------------------------------------------------------------

MetricValue: TypeAlias = Any
"""What is recorded under the name of a metric, usually a number. Open: a run history stores any value as it is."""

Metric: TypeAlias = Any
"""A metric of torchmetrics or of `pytorch_accelerated.metrics`, or a function. Open: torchmetrics is optional, and a
function takes whatever `get_metric_inputs` returns."""

Metrics: TypeAlias = Mapping[str, Metric] | Sequence[Metric] | Metric
"""Metrics by name, or some that have names of their own."""

WeightedSums: TypeAlias = Mapping[str, tuple[float | torch.Tensor, float | torch.Tensor]]
"""Of each mean, by name: the weighted sum so far, and the total weight."""

# --- states --------------------------------------------------------------------------------------------------------

StateDict: TypeAlias = dict[str, Any]
"""Tensors, numbers, strings and containers of these, by name. Open: each object decides what its state consists of."""

StateMapping: TypeAlias = Mapping[str, Any]
"""A `StateDict` that is only read."""

RunSettings: TypeAlias = Mapping[str, Any]
"""The settings that a resumed run should share with the original one. Open: those of an optimizer are its own."""

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object from a file. Open: until it has been checked, it may contain anything."""


class Stateful(Protocol):
    """Has a state that can be saved, and loaded again."""

    def state_dict(self) -> StateDict:
        """Return the state."""

    def load_state_dict(self, state_dict: StateDict, /) -> object:
        """Restore what `state_dict` returned."""


# --- optimization --------------------------------------------------------------------------------------------------


class Scheduler(Stateful, Protocol):
    """A learning-rate scheduler of PyTorch, of this library, or any other."""

    @property
    def step(self) -> Callable[..., object]:
        """Called after each update, or once per epoch; with a metric or the number of epochs if it takes these."""


class TimmScheduler(Scheduler, Protocol):
    """A scheduler of timm: `step_update` takes the number of updates, and `step` that of epochs, done so far."""

    def step_update(self, num_updates: int | None) -> object:
        """Set the values that apply after ``num_updates`` updates."""


ParameterGroup: TypeAlias = dict[str, Any]
"""An entry of ``optimizer.param_groups``: parameters and their settings. Open: each optimizer has its own settings."""

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]
"""An optimizer, or several that a run steps together."""

Schedulers: TypeAlias = Scheduler | Sequence[Scheduler] | Mapping[str, Scheduler]
"""One scheduler, or several, which the trainer steps one after the other."""

SchedulerFactory: TypeAlias = Callable[[Optimizer], Schedulers]
"""Creates the scheduler of an optimizer, or several."""

MaybeNone: TypeAlias = Any
"""In ``X | MaybeNone``: an X whenever it is used, and ``None`` in runs that do not use it."""
