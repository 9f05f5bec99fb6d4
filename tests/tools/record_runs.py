"""Records hashes of everything that a grid of runs computes, and compares recordings bit by bit.

Use it to show that a refactoring changes no number. Record with the code before, compare with the code after::

    python tests/tools/record_runs.py > before.json
    python tests/tools/record_runs.py --compare before.json

Training states must stay usable too. Some runs of the grid save one mid-epoch. The changed code resumes them and has to
reach the same end::

    python tests/tools/record_runs.py --save-states states
    python tests/tools/record_runs.py --resume-states states

This file uses only the public API, so it runs unchanged with both versions. Hashes depend on the machine and on the
versions of PyTorch and Accelerate: record and compare in the same environment. Messages, times and paths are not
recorded. Accelerate keeps one precision per process, so runs are grouped by number of processes and precision, and each
group has its own processes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, AutocastKwargs, DataLoaderConfiguration
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pytorch_accelerated
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import (
    EVENTS,
    EarlyStoppingCallback,
    GradientNormCallback,
    GradualUnfreezingCallback,
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    ModelEmaCallback,
    PreemptionCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
    WSDCheckpointCallback,
    get_default_callbacks,
)
from pytorch_accelerated.exceptions import NonFiniteLossError, StopTrainingError
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.schedulers import CosineLrScheduler, StatefulSchedulerBase, WSDLrScheduler
from pytorch_accelerated.states import find_latest_state, list_states, verify_state
from pytorch_accelerated.trainer import TrainerWithTimmScheduler
from pytorch_accelerated.utils import LimitBatches, ModelEma, worker_init_fn
from pytorch_accelerated.verification import check_invariance, verify_resume

Parts = dict[str, str]
"""The hash of each part of a run: its weights, its losses, its history, ..."""

Mode = Literal["record", "save", "resume"]
Action = Callable[[Trainer], Any]

RANK = int(os.environ.get("RANK", "0"))
GROUP_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which processes find each other; a single process has none of them."""

SECONDS_WITHOUT_PROGRESS = 120
"""Processes are killed if none of them finishes a run for this long."""

mse = nn.functional.mse_loss


# --- hashes ------------------------------------------------------------------------------------------------------


def chunks_of(value: Any) -> Iterator[bytes]:
    """Yield the bytes that identify a value: every bit of its numbers, and how they are nested.

    Lists and tuples with the same items count as equal, and so do mappings with the same items.

    Raises:
        TypeError: There is no rule for this type.
    """
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"array {value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield from chunks_of(key)
            yield from chunks_of(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from chunks_of(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from chunks_of({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, float):
        yield f"float {value.hex()}".encode()
    elif value is None or isinstance(value, (bool, int, str)):
        yield f"{type(value).__name__} {value!r}".encode()
    else:
        raise TypeError(f"There is no rule for hashing a {type(value).__name__}. Add one to `chunks_of`.")


class Recorder:
    """Keeps one hash per part of a run; each value that is added to a part changes its hash."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = collections.defaultdict(partial(hashlib.blake2b, digest_size=16))

    def add(self, **parts: Any) -> None:
        """Add a value to each of the named parts."""
        for part, value in parts.items():
            for chunk in chunks_of(value):
                self._hashes[part].update(len(chunk).to_bytes(8, "big") + chunk)

    def add_end(self, trainer: Trainer) -> None:
        """Add everything that a trainer holds at the end of a run, and the states of the global generators."""
        model, history, callbacks = trainer.get_model(), trainer.run_history, trainer.callback_handler.callbacks
        config = trainer.run_config.to_dict()
        self.add(
            weights=model.state_dict(),
            modes=[(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()],
            optimizer=trainer.optimizer.state_dict(),
            scheduler=None if trainer.scheduler is None else trainer.scheduler.state_dict(),
            history={name: list(history.get_metric_values(name)) for name in history.get_metric_names()},
            progress=[history.current_epoch, trainer.progress.state_dict()],
            config={name: value for name, value in config.items() if isinstance(value, (bool, int, float))},
            callbacks=[callback.state_dict() for callback in callbacks if hasattr(callback, "state_dict")],
            averages=[average_of(callback) for callback in callbacks if isinstance(callback, ModelEmaCallback)],
            random=[torch.get_rng_state(), np.random.get_state(), random.getstate()],
        )

    def add_files(self, folder: Path) -> None:
        """Add the contents of all checkpoints and training states in a folder."""
        for path in sorted(folder.rglob("*.pt")):
            contents = torch.load(path, map_location="cpu", weights_only=True)
            contents.pop("timestamp", None)  # of a checkpoint of `WSDCheckpointCallback`
            if isinstance(contents.get("trainer"), dict):
                contents["trainer"].pop("stopped", None)  # a message
            leave_out_times(contents)
            self.add(files=[path.relative_to(folder).as_posix(), contents])
        for states in sorted({manifest.parents[1] for manifest in folder.rglob("manifest.json")}):
            newest = find_latest_state(states)
            self.add(manifests=None if newest is None else newest.name)
            for state in list_states(states):
                verify_state(state.path)
                manifest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
                files = sorted(state.files)  # their sizes depend on the lengths of paths and messages
                self.add(manifests={**manifest, "path": state.path.name, "files": files, "versions": None})

    def parts(self) -> Parts:
        """Return the hash of each part."""
        return {part: one.hexdigest() for part, one in sorted(self._hashes.items())}


def leave_out_times(contents: Any) -> None:
    """Delete the time of each record of a run history that is somewhere in a file."""
    for name, part in contents.items() if isinstance(contents, dict) else ():
        if name in ("moments", "step_records"):
            contents[name] = [record[:-1] for record in part]
        else:
            leave_out_times(part)


def average_of(callback: ModelEmaCallback) -> Any:
    average = callback.ema_model
    return None if average is None else [average.decay, average.module.state_dict(), callback.best_metric_epoch]


def seed_generators(seed: int) -> None:
    """Seed all global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


# --- data --------------------------------------------------------------------------------------------------------


def tensors(num_samples: int = 22, seed: int = 1) -> TensorDataset:
    """A linear problem in memory; by default five batches of 4 samples and one of 2."""
    inputs = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def eval_tensors() -> TensorDataset:
    return tensors(9, seed=2)


def two_eval_datasets() -> dict[str, Dataset]:
    return {"near": eval_tensors(), "far": Samples(5)}


def no_data() -> None:
    return None


def texts(num_samples: int = 22) -> TensorDataset:
    """The same problem with a mask of the items that count; some batches have none."""
    mask = torch.rand(num_samples, 1, generator=torch.Generator().manual_seed(101)) < 0.4
    return TensorDataset(*tensors(num_samples).tensors, mask.float())


def subset() -> Subset:
    return Subset(tensors(30), [*range(29, 9, -1), 3, 5])


def batches() -> list[list[torch.Tensor]]:
    """A list of batches of different sizes."""
    return [list(tensors()[start:end]) for start, end in itertools.pairwise((0, 4, 10, 13, 17, 22))]


class Samples(Dataset):
    """A map-style dataset; noisy samples are augmented with draws from all three global generators."""

    def __init__(self, num_samples: int = 22, *, is_noisy: bool = False) -> None:
        self.inputs, self.targets = tensors(num_samples).tensors
        self.is_noisy = is_noisy

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        noise = torch.randn(4) + np.random.rand() + random.random() if self.is_noisy else torch.zeros(4)
        return self.inputs[index] + 0.1 * noise, self.targets[index]


class DictSamples(Samples):
    """A map-style dataset of dictionaries."""

    def __getitem__(self, index: int) -> Any:
        return dict(zip(("inputs", "targets"), super().__getitem__(index), strict=True))


@dataclasses.dataclass
class Pair:
    """A batch that is a dataclass."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Stream(IterableDataset):
    """A dataset without indices or length."""

    def __init__(self, num_samples: int = 22, *, is_noisy: bool = False) -> None:
        self.samples = Samples(num_samples, is_noisy=is_noisy)

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[index] for index in range(len(self.samples)))


class PositionedStream(Stream):
    """A stream that can save and restore its position."""

    position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.samples):
            self.position += 1
            yield self.samples[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class Batches:
    """An iterable of batches without a length, rotated by the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        first = self.epoch % 3
        return iter(batches()[first:] + batches()[:first])


class UserSampler(Sampler):
    """Draws the order of 22 samples from all three global generators."""

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(22).tolist()
        order[:11] = np.random.permutation(order[:11]).tolist()
        random.shuffle(order)
        return iter(order)


class UserBatchSampler(Sampler):
    """Yields batches of 5, 4, 5, 4 and 4 indices."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(22).tolist()
        return (order[start:end] for start, end in itertools.pairwise((0, 5, 9, 14, 18, 22)))


def weighted_sampler(generator: torch.Generator | None = None) -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0 + index % 3 for index in range(22)], 20, generator=generator)


def seeded_generator() -> torch.Generator:
    return torch.Generator().manual_seed(21)


def collate_masked(samples: Sequence[Any]) -> list[torch.Tensor]:
    """Collate samples, and zero some inputs by draws from all three global generators."""
    inputs, targets = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return [inputs * (torch.rand_like(inputs) > 0.1 * (random.random() + np.random.rand())), targets]


def collate_pair(samples: Sequence[Any]) -> Pair:
    return Pair(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


# --- models, optimizers, accelerators ----------------------------------------------------------------------------


def initialized(create: Callable[[], nn.Module]) -> nn.Module:
    """Create a model with the same weights each time; the global generator keeps its state."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return create()


def net() -> nn.Module:
    """A model with batch statistics and dropout."""
    return initialized(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    )


def plain_net() -> nn.Module:
    """A model without batch statistics, so a batch may have a single sample."""
    return initialized(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)))


class ModelWithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.body(inputs)
        return {"loss": mse(outputs, targets), "outputs": outputs}


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def sgd_of_head(model: nn.Module) -> Optimizer:
    return SGD(list(model.children())[-1].parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.02)


def adam_with_two_groups(model: nn.Module) -> Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return Adam([{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.003}], lr=0.02)


def sgd_with_hooks(model: nn.Module) -> Optimizer:
    """An optimizer whose hooks halve the gradients before each step, and clamp the parameters after it."""
    optimizer = sgd(model)

    @torch.no_grad()
    def halve_gradients(*_: Any) -> None:
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)

    @torch.no_grad()
    def clamp_parameters(*_: Any) -> None:
        for parameter in model.parameters():
            parameter.clamp_(-0.6, 0.6)

    optimizer.register_step_pre_hook(halve_gradients)
    optimizer.register_step_post_hook(clamp_parameters)
    return optimizer


class LeakySGD(SGD):
    """Keeps a tenth of the gradients from one update to the next."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.1)


def leaky_sgd(model: nn.Module) -> Optimizer:
    return LeakySGD(model.parameters(), lr=0.05)


class UserAccelerator(Accelerator):
    """A subclass, which keeps the library from using its fast path."""


class ScalingAccelerator(Accelerator):
    """Scales the loss as fp16 does, which Accelerate refuses without a GPU; the model computes in float32."""

    def __init__(self) -> None:
        super().__init__(cpu=True)
        self.native_amp = True
        self.autocast_handler = AutocastKwargs(enabled=False)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    @property
    def mixed_precision(self) -> str:
        return "fp16"


def accelerator_with(**settings: bool) -> Callable[[], Accelerator]:
    return lambda: Accelerator(dataloader_config=DataLoaderConfiguration(**settings))


# --- trainers ----------------------------------------------------------------------------------------------------


class TokenTrainer(Trainer):
    """Its loss is the mean over the items that a mask selects: ``num_items_in_batch`` of them."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        inputs, targets, mask = batch
        outputs = self.model(inputs)
        num_items = mask.sum()
        loss = ((outputs - targets).square() * mask).sum() / num_items.clamp(min=1)
        return {"loss": loss, "batch_size": len(inputs), "num_items_in_batch": num_items, "model_outputs": outputs}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            return self.calculate_train_batch_loss(batch)


class CountingTokenTrainer(TokenTrainer):
    """Returns the number of items as an ``int``."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": int(output["num_items_in_batch"])}


class MetricTrainer(Trainer):
    """Its steps return metrics: tensors and a number."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        error = (output["model_outputs"].detach() - batch[1]).abs().mean()
        return {**output, "metrics": {"error": error, "size": float(len(batch[0]))}}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_eval_batch_loss(batch)
        return {**output, "metrics": {"largest": output["model_outputs"].max()}}


class LossTrainer(Trainer):
    """Overrides the loss of a step and the predictions."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.model(batch[0])
        return {"loss": nn.functional.l1_loss(outputs, batch[1]), "batch_size": len(batch[0])}

    def calculate_predictions(self, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            outputs = self.model(batch[0])
        return {"outputs": outputs, "more": [outputs.sign(), (batch[1],)]}


class UpdateTrainer(Trainer):
    """Overrides each method of an update."""

    def backward_step(self, loss: torch.Tensor) -> None:
        super().backward_step(2 * loss)

    def optimizer_step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad.add_(0.01)
        super().optimizer_step()

    def scheduler_step(self) -> None:
        super().scheduler_step()
        super().scheduler_step()

    def optimizer_zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)


class PlateauTrainer(Trainer):
    """Steps its scheduler by a metric, once per epoch."""

    def scheduler_step(self) -> None:
        pass

    def training_run_epoch_end(self) -> None:
        self.scheduler.step(self.run_history.get_latest_metric("eval_loss_epoch"))


class LoaderTrainer(Trainer):
    """Creates its training loader, and changes the defaults of the evaluation loader."""

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Any = None) -> DataLoader:
        return DataLoader(
            self.train_dataset, batch_size=batch_size, shuffle=True, generator=seeded_generator(), drop_last=True
        )

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        return {**super().get_default_eval_dl_kwargs(batch_size), "batch_size": 2 * batch_size}


class DataclassTrainer(Trainer):
    """Trains on batches that are dataclasses."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {"loss": mse(self.model(batch.inputs), batch.targets), "batch_size": len(batch.inputs)}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            return self.calculate_train_batch_loss(batch)


class NoisyEvaluationTrainer(Trainer):
    """Draws random numbers in evaluation, and leaves the model in training mode."""

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_eval_batch_loss(batch)
        return {**output, "loss": output["loss"] * (1 + torch.rand(()) + np.random.rand() + random.random())}

    def eval_epoch_end(self) -> None:
        self.model.train()


# --- schedulers --------------------------------------------------------------------------------------------------


class TimmScheduler:
    """A stub with the interface of timm's schedulers."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.calls: list[list[int]] = []

    def step_update(self, num_updates: int) -> None:
        self.calls.append([0, num_updates])
        self.optimizer.param_groups[0]["lr"] = 0.05 / (1 + num_updates)

    def step(self, epoch: int) -> None:
        self.calls.append([1, epoch])
        self.optimizer.param_groups[0]["lr"] *= 1 + epoch

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}


class UserScheduler(StatefulSchedulerBase):
    """Sets 1, 1/2, 1/3, ... of the initial learning rates."""

    def get_updated_values(self, num_updates: int) -> list[float]:
        return [value / (1 + num_updates) for value in self.base_values]


NUM_UPDATES = TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH

cosine = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5, lr_min=0.001)
cosine_with_cooldown = CosineLrScheduler.create_scheduler_fn(
    k_decay=1.5, min_lr_ratio=0.1, num_warmup_epochs=1, warmup_starting_lr_ratio=0.2, num_cooldown_epochs=0.5
)
wsd = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5, decay_phase_ratio=0.3, num_checkpoints=2)
wsd_continued = WSDLrScheduler.create_scheduler_fn(
    decay_phase_ratio=0.5, is_continuation_from_checkpoint=True, use_inverse_sqrt_decay=False
)
step_lr = partial(StepLR, step_size=3, gamma=0.5)
one_cycle = partial(OneCycleLR, max_lr=0.1, total_steps=NUM_UPDATES + 1)


def lambda_lr(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda update: 0.9**update)


def plateau(optimizer: Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


# --- callbacks ---------------------------------------------------------------------------------------------------


class Observer(TrainerCallback):
    """Records the events of a run, and batches, losses, gradients and learning rates in them.

    Args:
        recorder: Records them.
        num_skipped_steps: Number of training steps before the recording starts.
        has_order: Whether to record the order of the events.
    """

    def __init__(self, recorder: Recorder, num_skipped_steps: int = 0, has_order: bool = True) -> None:
        self.recorder = recorder
        self.num_steps_to_skip = num_skipped_steps
        self.has_order = has_order

    def observe(self, event: str, trainer: Trainer, arguments: Mapping[str, Any]) -> None:
        """Record one event."""
        if self.num_steps_to_skip > 0:
            self.num_steps_to_skip -= event == "on_train_step_end"
            return
        if self.has_order:
            self.recorder.add(events=[event, arguments.get("step"), arguments.get("is_intermediate")])
        if event == "on_optimizer_step_start":
            rates = [group["lr"] for group in trainer.optimizer.param_groups]
            self.recorder.add(rates=rates, gradients=[parameter.grad for parameter in trainer.model.parameters()])
        elif event == "on_optimizer_step_end":
            self.recorder.add(norms=trainer.gradient_norm, updates=trainer.progress.state_dict())
        elif event in ("on_train_step_start", "on_eval_step_start"):
            self.recorder.add(batches=arguments["batch"])
        elif event in ("on_train_step_end", "on_eval_step_end"):
            output = arguments["batch_output"]
            details = [output["batch_size"], output.get("metrics"), trainer.is_between_updates]
            self.recorder.add(losses=[output["loss"], *details])


def observation_of(event: str) -> Callable[..., None]:
    """Return the method of an `Observer` for an event."""

    def observe(self: Observer, trainer: Trainer, **arguments: Any) -> None:
        self.observe(event, trainer, arguments)

    return observe


for _event in EVENTS:
    if _event != "on_log_point":  # depends on the clock
        setattr(Observer, _event, observation_of(_event))


class AtStep(TrainerCallback):
    """Calls a function at the end of one training step, counted from 1 over all epochs."""

    def __init__(self, step: int, action: Action) -> None:
        self.num_steps_left = step
        self.action = action

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.num_steps_left -= 1
        if self.num_steps_left == 0:
            self.action(trainer)


class AtEpochEnd(TrainerCallback):
    """Calls a function after the training of each epoch."""

    def __init__(self, action: Action) -> None:
        self.action = action

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.action(trainer)


class ScaleLoss(TrainerCallback):
    """Multiplies the loss of one training step, counted from 1 over all epochs, before the backward pass."""

    def __init__(self, step: int, factor: float) -> None:
        self.num_steps_left = step
        self.factor = factor

    def on_backward_start(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        self.num_steps_left -= 1
        if self.num_steps_left == 0:
            batch_output["loss"] = batch_output["loss"] * self.factor


class CrashError(Exception):
    """Ends a run as a bug in the user's program does."""


def crash(trainer: Trainer) -> None:
    raise CrashError


def stop(trainer: Trainer) -> None:
    raise StopTrainingError


def press_ctrl_c(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def on_rank_1(action: Action) -> Action:
    return lambda trainer: action(trainer) if trainer.process_index == 1 else None


def evaluate(trainer: Trainer) -> None:
    trainer.evaluate(tensors(7, seed=4), per_device_batch_size=3)


# --- the calls of a run ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Session:
    """One run on this rank: creates its objects from scratch, calls them, and records what they compute.

    Args:
        recipe: What the run consists of.
        folder: Where its files go, the same on every rank.
        recorder: Records it.
        mode: Whether the run is recorded from start to end, saves a training state, or resumes one.
        save_step: Number of the step after which the state is saved; ``None`` for none.
        accelerator: The user's accelerator, once it is created.
    """

    recipe: Recipe
    folder: Path
    recorder: Recorder
    mode: Mode = "record"
    save_step: int | None = None
    accelerator: Accelerator | None = None

    def create_trainer(self, *more_callbacks: Any) -> Trainer:
        """Create model, optimizer, callbacks and trainer."""
        recipe = self.recipe
        if recipe.accelerator is not None:
            self.accelerator = recipe.accelerator()
        model = recipe.model()
        return recipe.trainer(
            model,
            recipe.loss_func,
            recipe.optimizer(model),
            callbacks=[*self._observers(), *recipe.callbacks(self), *more_callbacks, *self._savers()],
            seed=recipe.seed,
            mixed_precision=recipe.mixed_precision if self.accelerator is None else None,
            accelerator=self.accelerator,
        )

    def train(self, trainer: Trainer, **changes: Any) -> None:
        """Train with the arguments of the recipe, except for the changes."""
        arguments = {
            "train_dataset": self.recipe.data(),
            "num_epochs": 2,
            "eval_dataset": self.recipe.eval_data(),
            "per_device_batch_size": 4,
            "train_dataloader_kwargs": {"num_workers": 0, **self.recipe.loading()},
            "eval_dataloader_kwargs": {"num_workers": 0},
            **self.recipe.train,
            **changes,
        }
        trainer.train(**arguments)

    def record_end(self, trainer: Trainer) -> None:
        """Record what a trainer holds at the end of a run, and the scale of the loss."""
        self.recorder.add_end(trainer)
        if self.accelerator is not None and self.accelerator.scaler is not None:
            self.recorder.add(scaler=self.accelerator.scaler.state_dict())

    def _observers(self) -> list[TrainerCallback]:
        if not self.recipe.is_observed:
            return []
        num_skipped_steps = self.save_step or 0 if self.mode == "save" else 0
        return [Observer(self.recorder, num_skipped_steps, has_order=self.mode == "record")]

    def _savers(self) -> list[TrainerCallback]:
        if self.save_step is None:
            return []
        return [SaveTrainingStateCallback(self.folder, save_every_n_steps=self.save_step, save_at_end=False)]


Script = Callable[[Session], None]


def train_once(session: Session) -> None:
    trainer = session.create_trainer()
    session.train(trainer)
    session.record_end(trainer)


def train_twice(session: Session) -> None:
    """The second run of the trainer adds to the history of the first."""
    trainer = session.create_trainer()
    session.train(trainer)
    session.record_end(trainer)
    session.train(trainer, reset_run_history=False, num_epochs=1)
    session.record_end(trainer)


def train_after_crash(session: Session) -> None:
    """A run crashes in the middle of an accumulation window; the next run of the trainer starts cleanly."""
    trainer = session.create_trainer(AtStep(4, crash))
    with contextlib.suppress(CrashError):
        session.train(trainer)
    session.record_end(trainer)
    session.train(trainer)
    session.record_end(trainer)


def train_on_nan(session: Session) -> None:
    """The loss of the only update is NaN. The clock decides which event ends the run, so only weights are recorded."""
    trainer = session.create_trainer()
    try:
        session.train(trainer, max_num_train_steps=1)
    except NonFiniteLossError:
        session.recorder.add(weights=trainer.model.state_dict())


def train_few_batches(session: Session) -> None:
    with LimitBatches(3):
        trainer = session.create_trainer()
    session.train(trainer)
    session.record_end(trainer)


def train_frozen(session: Session) -> None:
    """The first run trains the last layer only, the second run trains all."""
    trainer = session.create_trainer()
    freezer = ModelFreezer(trainer.model)
    freezer.freeze(set_modules_as_eval=True)
    session.train(trainer)
    session.record_end(trainer)
    freezer.unfreeze()
    session.train(trainer)
    session.record_end(trainer)


def evaluate_and_predict(session: Session) -> None:
    """Before and after training, on datasets of many lengths."""
    trainer = session.create_trainer()
    evaluate(trainer)
    session.record_end(trainer)
    session.train(trainer)
    trainer.evaluate()
    for length, batch_size in ((1, 4), (2, 4), (7, 2), (9, 16), (16, 4)):
        dataset = tensors(length, seed=length)
        trainer.evaluate({"one": dataset, "other": Samples(length)}, per_device_batch_size=batch_size)
        for settings in ({}, {"on_every_process": False}, {"dataloader_kwargs": {"num_workers": 0}}):
            session.recorder.add(predictions=trainer.predict(dataset, per_device_batch_size=batch_size, **settings))
    session.recorder.add(predictions=trainer.predict(Stream(7), per_device_batch_size=2))
    session.record_end(trainer)


def save_and_load_checkpoint(session: Session) -> None:
    """A second trainer continues with everything in the checkpoint of the first, a third with the model only."""
    path = session.folder / "checkpoint.pt"
    first = session.create_trainer()
    session.train(first, num_epochs=1)
    first.save_checkpoint(path, {"note": "text", "numbers": [1, 2.5], "tensor": torch.arange(3)})
    session.record_end(first)
    for loads_all in (True, False):
        other = session.create_trainer()
        extras = other.load_checkpoint(path, load_optimizer=loads_all, load_scheduler=loads_all)
        session.recorder.add(extras=extras)
        session.train(other)
        session.record_end(other)


def save_and_load_state(session: Session) -> None:
    """A second trainer loads the training state that the first saves after its run."""
    path = session.folder / "states" / "state"
    first = session.create_trainer()
    session.train(first)
    first.save_training_state(path, {"note": "text", "number": 1.5})
    session.record_end(first)
    seed_generators(99)
    second = session.create_trainer()
    session.train(second, num_epochs=1)
    session.recorder.add(extras=second.load_training_state(path))
    session.record_end(second)


def continue_wsd(session: Session) -> None:
    """A second run continues from the stable phase of the first."""
    first = session.create_trainer(WSDCheckpointCallback(session.folder / "valley"))
    session.train(first, create_scheduler_fn=wsd)
    session.record_end(first)
    checkpoint = min((session.folder / "valley").glob("*_pre_decay*"))
    river = WSDCheckpointCallback(session.folder / "river", initial_checkpoint=checkpoint)
    second = session.create_trainer(river)
    session.train(second, create_scheduler_fn=wsd_continued)
    session.record_end(second)


def resume_after(step: int | None = None, action: Action = crash, **changes: Any) -> Script:
    """Return a script: one run ends, and a second trainer resumes it from its latest training state.

    Args:
        step: The step at whose end the action ends the first run; ``None`` if the run ends by itself.
        action: Ends the first run.
        changes: Arguments of the second run that differ.
    """

    def script(session: Session) -> None:
        first = session.create_trainer(*([] if step is None else [AtStep(step, action)]))
        with contextlib.suppress(CrashError, KeyboardInterrupt, SystemExit):
            session.train(first)
        session.record_end(first)
        seed_generators(99)
        second = session.create_trainer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the changes
            session.train(second, resume_from="latest", **changes)
        session.recorder.add(is_resumed=second.is_resumed)
        session.record_end(second)

    return script


def verify(session: Session) -> None:
    """The library's proofs, including the rounding errors that they report."""
    report = check_invariance(session.create_trainer, tensors(48), samples_per_update=12, splits=(3, 5))
    session.recorder.add(invariance=[report.is_invariant, report.tolerance, report.splits])
    resumed = verify_resume(session.create_trainer, tensors(), per_device_batch_size=4)
    session.recorder.add(resume=[resumed.is_exact, resumed.num_steps, resumed.stops])


# --- the callbacks of runs ---------------------------------------------------------------------------------------


def saving(*create_others: Callable[[Session], Any], **settings: Any) -> Callable[[Session], list[Any]]:
    """Return a function that creates callbacks, the last of which saves training states."""
    return lambda session: [
        *(create(session) for create in create_others),
        SaveTrainingStateCallback(session.folder / "states", **settings),
    ]


def average(session: Session, **settings: Any) -> ModelEmaCallback:
    return ModelEmaCallback(**{"decay": 0.8, "save_path": session.folder / "average.pt", **settings})


def two_averages(session: Session) -> list[Any]:
    """One of them follows every third update, and copies buffers."""
    sparse = {
        "save_path": session.folder / "sparse.pt",
        "evaluate_during_training": False,
        "update_every_n_updates": 3,
        "model_ema": partial(ModelEma, should_average_buffers=False),
    }
    return [average(session, **sparse), average(session)]


def best_model(session: Session) -> SaveBestModelCallback:
    return SaveBestModelCallback(session.folder / "best.pt")


def impatient(session: Session) -> EarlyStoppingCallback:
    return EarlyStoppingCallback(1, early_stopping_threshold=0.2)


def all_with_state(session: Session) -> list[Any]:
    return [average(session), EarlyStoppingCallback(4), best_model(session), GradientNormCallback()]


def gathering(session: Session) -> list[Any]:
    """Gather two rows of one column from rank 0, and no row of two columns from rank 1."""

    def gather(trainer: Trainer) -> None:
        rank = trainer.process_index
        rows = torch.full((2 - 2 * rank, 1 + rank), float(rank))
        gathered = trainer.gather({"rows": rows, "rank": torch.tensor([rank])}, padding_value=-1.0)
        session.recorder.add(gathered=[gathered, trainer.get_agreed_metric("train_loss_epoch")])

    return [AtEpochEnd(gather)]


def evaluating(session: Session) -> list[Any]:
    """Evaluate and predict in the middle of a training epoch, and after it."""

    def predict(trainer: Trainer) -> None:
        session.recorder.add(predictions=trainer.predict(tensors(5, seed=6), per_device_batch_size=2))

    return [AtStep(3, evaluate), AtEpochEnd(evaluate), AtStep(5, predict), AtEpochEnd(predict)]


# --- the grid ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run consists of. Every rank of every run creates its objects from scratch.

    Args:
        data: Creates the training data.
        eval_data: Creates the evaluation data.
        model: Creates the model.
        optimizer: Creates the optimizer of a model.
        loss_func: The loss function.
        trainer: The class of the trainer.
        callbacks: Creates the callbacks of a session.
        loading: Creates the keyword arguments of the training loader.
        accelerator: Creates the user's accelerator; ``None`` for none.
        mixed_precision: The precision, unless the user's accelerator has one.
        seed: The seed of the trainer.
        script: Creates and calls the trainers.
        is_observed: Whether a callback listens to all events. The library may skip work where none does.
        num_processes: How many processes share the run; there is one run per number.
        train: Arguments of `Trainer.train`.
    """

    data: Callable[[], Any] = tensors
    eval_data: Callable[[], Any] = eval_tensors
    model: Callable[[], nn.Module] = net
    optimizer: Callable[[nn.Module], Optimizer] = sgd
    loss_func: Callable[..., Any] | None = mse
    trainer: type[Trainer] = Trainer
    callbacks: Callable[[Session], Iterable[Any]] = lambda session: ()
    loading: Callable[[], dict[str, Any]] = dict
    accelerator: Callable[[], Accelerator] | None = None
    mixed_precision: str = "no"
    seed: int | None = 5
    script: Script = train_once
    is_observed: bool = True
    num_processes: tuple[int, ...] = (1,)
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def recipe(**settings: Any) -> Recipe:
    """Create a recipe. Settings that are not its fields become arguments of `Trainer.train`."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    train = {name: value for name, value in settings.items() if name not in names}
    return Recipe(**{name: value for name, value in settings.items() if name in names}, train=train)


BOTH = {"num_processes": (1, 2)}
TWO = {"num_processes": (2,)}
UNOBSERVED = {"is_observed": False, "eval_data": no_data}
TOKENS = {"data": texts, "eval_data": partial(texts, 9), "trainer": TokenTrainer}
NOISY = {"data": partial(Samples, is_noisy=True), "collate_fn": collate_masked}
DICTS = {"data": DictSamples, "eval_data": partial(DictSamples, 9), "model": ModelWithLoss, "loss_func": None}
EVERYTHING = {
    "optimizer": adamw,
    "callbacks": all_with_state,
    "create_scheduler_fn": cosine,
    "gradient_accumulation_steps": 4,
    "gradient_clip_norm": 1.0,
    "num_epochs": 3,
}


def accumulating(num_steps: int) -> dict[str, int]:
    return {"gradient_accumulation_steps": num_steps}


UPDATES = {
    "shuffled": recipe(**BOTH),
    "no callbacks": recipe(**UNOBSERVED, **BOTH),
    "no callbacks, accumulation 2": recipe(**UNOBSERVED, **accumulating(2), **BOTH),
    "accumulation 2, short last batch": recipe(**accumulating(2)),
    "accumulation 3": recipe(**accumulating(3), **BOTH),
    "accumulation 4, short last window": recipe(**accumulating(4), **BOTH),
    "accumulation 9, longer than an epoch": recipe(**accumulating(9), optimizer=adamw),
    "one batch": recipe(data=partial(tensors, 3), num_epochs=3),
    "one sample": recipe(data=partial(tensors, 1), model=plain_net, **BOTH),
    "5 samples, accumulation 2": recipe(data=partial(tensors, 5), model=plain_net, **accumulating(2), **BOTH),
    "9 samples, metrics": recipe(data=partial(tensors, 9), model=plain_net, trainer=MetricTrainer, **BOTH),
    "21 samples": recipe(data=partial(tensors, 21), model=plain_net, **BOTH),
    "token weights": recipe(**TOKENS),
    "token weights, accumulation 4": recipe(**TOKENS, **accumulating(4), **BOTH),
    "token weights as ints": recipe(**{**TOKENS, "trainer": CountingTokenTrainer}, **accumulating(2), **BOTH),
    "token weights, 9 samples": recipe(**{**TOKENS, "data": partial(texts, 9)}, model=plain_net, **BOTH),
    "clipped by value": recipe(gradient_clip_value=0.02),
    "clipped by norm": recipe(gradient_clip_norm=0.1, callbacks=lambda session: [GradientNormCallback()]),
    "clipped by both": recipe(gradient_clip_value=0.05, gradient_clip_norm=0.1, **accumulating(2), **BOTH),
    "norm measured": recipe(
        gradient_clip_norm=float("inf"), callbacks=lambda session: [GradientNormCallback("norm")], **BOTH
    ),
    "bf16": recipe(mixed_precision="bf16"),
    "bf16, everything": recipe(mixed_precision="bf16", **EVERYTHING),
    "bf16, train twice": recipe(mixed_precision="bf16", script=train_twice, **accumulating(2)),
    "scaled loss": recipe(accelerator=ScalingAccelerator, **accumulating(2), **BOTH),
    "scaled loss, skipped update": recipe(
        accelerator=ScalingAccelerator,
        gradient_clip_norm=0.2,
        create_scheduler_fn=step_lr,
        callbacks=lambda session: [ScaleLoss(4, float("inf"))],
    ),
    "user's accelerator": recipe(accelerator=UserAccelerator, **accumulating(4), **BOTH),
    "split batches": recipe(accelerator=accelerator_with(split_batches=True), data=partial(tensors, 24), **BOTH),
    "dispatched batches": recipe(
        accelerator=accelerator_with(dispatch_batches=True), data=partial(Samples, 21), model=plain_net, **TWO
    ),
    "AdamW": recipe(optimizer=adamw),
    "Adam with two groups": recipe(optimizer=adam_with_two_groups, **accumulating(2)),
    "optimizer with hooks": recipe(optimizer=sgd_with_hooks),
    "optimizer with its own zero_grad": recipe(optimizer=leaky_sgd, **accumulating(2)),
    "overridden update": recipe(trainer=UpdateTrainer, create_scheduler_fn=step_lr, **accumulating(2), **BOTH),
    "overridden loss": recipe(trainer=LossTrainer, script=evaluate_and_predict),
    "loss of the model": recipe(model=ModelWithLoss, loss_func=None, **BOTH),
    "loss changed in an event": recipe(callbacks=lambda session: [ScaleLoss(3, 2.0)]),
    "metrics": recipe(trainer=MetricTrainer, **accumulating(2), **BOTH),
}

DATA = {
    "subset": recipe(data=subset, **BOTH),
    "samples": recipe(data=Samples),
    "samples, default loaders": recipe(data=Samples, train_dataloader_kwargs=None, eval_dataloader_kwargs=None),
    "noisy samples": recipe(**NOISY, **BOTH),
    "noisy samples, 2 workers": recipe(
        **NOISY,
        loading=lambda: {"num_workers": 2, "persistent_workers": True},
        eval_dataloader_kwargs={"num_workers": 2},
    ),
    "noisy samples, 2 new workers per epoch": recipe(
        **NOISY, loading=lambda: {"num_workers": 2, "persistent_workers": False, "worker_init_fn": worker_init_fn}
    ),
    "noisy samples, 1 worker per rank": recipe(**NOISY, loading=lambda: {"num_workers": 1}, **TWO),
    "dict batches": recipe(**DICTS, **accumulating(3), **BOTH),
    "dataclass batches": recipe(data=Samples, eval_data=Samples, trainer=DataclassTrainer, collate_fn=collate_pair),
    "list of samples": recipe(data=lambda: [tensors()[index] for index in range(22)]),
    "list of batches": recipe(data=batches, loading=lambda: {"batch_size": None}, **accumulating(2)),
    "iterable of batches": recipe(data=Batches, num_epochs=3, **accumulating(2), **BOTH),
    "user's loader": recipe(
        data=lambda: DataLoader(tensors(), batch_size=6, shuffle=True, generator=seeded_generator())
    ),
    "overridden loaders": recipe(trainer=LoaderTrainer, data=Samples, **BOTH),
    "stream": recipe(data=Stream, eval_data=partial(Stream, 9), **accumulating(2), **BOTH),
    "noisy stream, drop_last": recipe(data=partial(Stream, is_noisy=True), loading=lambda: {"drop_last": True}),
    "stream with a position": recipe(data=PositionedStream, **accumulating(4), **BOTH),
    "in order": recipe(loading=lambda: {"shuffle": False}),
    "drop_last": recipe(loading=lambda: {"drop_last": True}, **accumulating(2), **BOTH),
    "no seed": recipe(seed=None, **BOTH),
    "SequentialSampler": recipe(loading=lambda: {"sampler": SequentialSampler(range(22))}),
    "RandomSampler with replacement": recipe(
        loading=lambda: {"sampler": RandomSampler(range(22), replacement=True, num_samples=14)}
    ),
    "WeightedRandomSampler": recipe(loading=lambda: {"sampler": weighted_sampler()}, **BOTH),
    "WeightedRandomSampler, generator": recipe(loading=lambda: {"sampler": weighted_sampler(seeded_generator())}),
    "SubsetRandomSampler": recipe(loading=lambda: {"sampler": SubsetRandomSampler(range(3, 21))}),
    "user's sampler": recipe(data=Samples, loading=lambda: {"sampler": UserSampler()}, **BOTH),
    "user's batch sampler": recipe(loading=lambda: {"batch_sampler": UserBatchSampler()}, **accumulating(2), **BOTH),
}

SCHEDULES_AND_ENDS = {
    "cosine": recipe(create_scheduler_fn=cosine, **accumulating(2), **BOTH),
    "cosine with cooldown": recipe(
        create_scheduler_fn=cosine_with_cooldown, optimizer=adam_with_two_groups, num_epochs=3
    ),
    "WSD": recipe(script=continue_wsd, num_epochs=3),
    "StepLR": recipe(create_scheduler_fn=step_lr),
    "OneCycleLR": recipe(create_scheduler_fn=one_cycle, **BOTH),
    "LambdaLR": recipe(create_scheduler_fn=lambda_lr),
    "ReduceLROnPlateau": recipe(trainer=PlateauTrainer, create_scheduler_fn=plateau, num_epochs=4),
    "user's scheduler": recipe(create_scheduler_fn=UserScheduler, script=train_twice),
    "timm scheduler": recipe(trainer=TrainerWithTimmScheduler, create_scheduler_fn=TimmScheduler),
    "at most 7 updates": recipe(max_num_train_steps=7, create_scheduler_fn=cosine, num_epochs=5, **BOTH),
    "at most 3 updates, accumulation 4": recipe(
        max_num_train_steps=3, num_epochs=5, eval_data=no_data, **accumulating(4)
    ),
    "stopped by a callback": recipe(callbacks=lambda session: [AtStep(8, stop)], **accumulating(4)),
    "stopped by a callback of rank 1": recipe(callbacks=lambda session: [AtStep(5, on_rank_1(stop))], **TWO),
    "stopped by a NaN": recipe(
        script=train_on_nan,
        callbacks=lambda session: [TerminateOnNaNCallback(), ScaleLoss(1, float("nan"))],
        is_observed=False,
    ),
    "train twice": recipe(script=train_twice, optimizer=adamw, create_scheduler_fn=cosine, **BOTH),
    "train after a crash": recipe(script=train_after_crash, **accumulating(3)),
}

CALLBACKS = {
    "default callbacks": recipe(callbacks=lambda session: get_default_callbacks(), **BOTH),
    "evaluation every 2 updates": recipe(
        callbacks=lambda session: [StepBasedEvaluationCallback(2), LimitEvalStepsCallback(2)], **BOTH
    ),
    "noisy evaluation every 3 updates": recipe(
        callbacks=lambda session: [StepBasedEvaluationCallback(3)],
        trainer=NoisyEvaluationTrainer,
        eval_data=two_eval_datasets,
        **accumulating(2),
    ),
    "1 batch per evaluation": recipe(
        callbacks=lambda session: [LimitEvalStepsCallback(1, limit_intermediate_only=False)]
    ),
    "4 batches per epoch": recipe(callbacks=lambda session: [LimitBatchesCallback(4)], **accumulating(3), **BOTH),
    "3 batches per epoch by the environment": recipe(script=train_few_batches),
    "EMA": recipe(callbacks=lambda session: [average(session)], **BOTH),
    "two EMAs": recipe(callbacks=two_averages, optimizer=adamw),
    "EMA, two evaluation datasets": recipe(
        callbacks=lambda session: [average(session, watch_metric="far_ema_model_eval_loss_epoch")],
        eval_data=two_eval_datasets,
    ),
    "early stopping": recipe(callbacks=lambda session: [impatient(session)], num_epochs=9, **BOTH),
    "best model": recipe(
        callbacks=lambda session: [best_model(session)], create_scheduler_fn=step_lr, num_epochs=4, **BOTH
    ),
    "gradual unfreezing": recipe(
        callbacks=lambda session: [GradualUnfreezingCallback()], num_epochs=4, **accumulating(2)
    ),
    "gradual unfreezing, optimizer of the head": recipe(
        callbacks=lambda session: [
            GradualUnfreezingCallback({1: -1, 2: -4, 3: 0}, lr_decay_factor=0.5, freeze_batch_norms=True)
        ],
        optimizer=sgd_of_head,
        create_scheduler_fn=cosine,
        num_epochs=4,
        **BOTH,
    ),
    "frozen, then not": recipe(script=train_frozen),
    "gathered": recipe(callbacks=gathering, **TWO),
    "everything": recipe(**EVERYTHING, **BOTH),
    "evaluate and predict": recipe(script=evaluate_and_predict, trainer=MetricTrainer, **BOTH),
    "evaluate in callbacks": recipe(callbacks=evaluating, **accumulating(2), **BOTH),
    "two evaluation datasets": recipe(eval_data=two_eval_datasets, **BOTH),
}

FILES = {
    "checkpoint": recipe(script=save_and_load_checkpoint, optimizer=adamw, create_scheduler_fn=cosine),
    "training state": recipe(script=save_and_load_state, callbacks=all_with_state, gradient_clip_norm=1.0),
    "resumed mid-epoch": recipe(
        callbacks=saving(average, save_every_n_steps=3),
        script=resume_after(5),
        optimizer=adamw,
        create_scheduler_fn=cosine,
        **BOTH,
    ),
    "resumed mid-window": recipe(
        **NOISY,
        callbacks=saving(best_model, save_every_n_steps=2, max_checkpoints=2, keep_best=1),
        script=resume_after(5),
        num_epochs=3,
        **accumulating(4),
        **BOTH,
    ),
    "resumed mid-window, 2 workers": recipe(
        **NOISY,
        loading=lambda: {"num_workers": 2},
        callbacks=saving(save_every_n_steps=4),
        script=resume_after(9),
        **accumulating(3),
    ),
    "resumed after an epoch": recipe(callbacks=saving(save_every_n_epochs=1), script=resume_after(8), **BOTH),
    "resumed after a run": recipe(callbacks=saving(), script=resume_after(num_epochs=3)),
    "resumed without a state": recipe(callbacks=saving(save_every_n_epochs=5), script=resume_after(8)),
    "resumed after early stopping": recipe(
        callbacks=saving(impatient, save_every_n_epochs=1), script=resume_after(num_epochs=12), num_epochs=9
    ),
    "resumed after the last update": recipe(
        callbacks=saving(save_every_n_updates=2),
        script=resume_after(max_num_train_steps=9, num_epochs=5),
        max_num_train_steps=4,
    ),
    "resumed with smaller batches": recipe(
        callbacks=saving(save_every_n_steps=1),
        script=resume_after(9, per_device_batch_size=2, gradient_accumulation_steps=4),
        num_epochs=3,
        **accumulating(2),
    ),
    "resumed with the user's sampler": recipe(
        data=Samples,
        loading=lambda: {"sampler": UserSampler()},
        callbacks=saving(save_every_n_steps=1),
        script=resume_after(9),
    ),
    "resumed within a stream": recipe(data=Stream, callbacks=saving(save_every_n_steps=1), script=resume_after(9)),
    "resumed within a stream with a position": recipe(
        data=PositionedStream,
        callbacks=saving(save_every_n_steps=1),
        script=resume_after(5),
        **accumulating(4),
        **BOTH,
    ),
    "resumed within an iterable of batches": recipe(
        data=Batches, callbacks=saving(save_every_n_steps=1), script=resume_after(8)
    ),
    "resumed between evaluations": recipe(
        eval_data=two_eval_datasets,
        callbacks=saving(lambda session: StepBasedEvaluationCallback(2), save_every_n_steps=1),
        script=resume_after(8),
    ),
    "resumed while unfreezing": recipe(
        callbacks=saving(lambda session: GradualUnfreezingCallback(), save_every_n_steps=4),
        script=resume_after(9),
        num_epochs=4,
    ),
    "resumed with WSD": recipe(
        callbacks=saving(lambda session: WSDCheckpointCallback(session.folder / "wsd"), save_every_n_steps=4),
        script=resume_after(9),
        create_scheduler_fn=wsd,
    ),
    "resumed with a scaled loss": recipe(
        accelerator=ScalingAccelerator,
        callbacks=saving(save_every_n_steps=3),
        script=resume_after(10),
        gradient_clip_value=0.05,
        **accumulating(2),
    ),
    "resumed after Ctrl-C": recipe(
        callbacks=saving(save_every_n_epochs=1), script=resume_after(4, press_ctrl_c), **accumulating(3), **BOTH
    ),
    "resumed after Ctrl-C on rank 1": recipe(
        callbacks=saving(save_every_n_epochs=1), script=resume_after(4, on_rank_1(press_ctrl_c)), **TWO
    ),
    "resumed after SIGTERM": recipe(
        callbacks=saving(lambda session: PreemptionCallback(), save_every_n_epochs=1),
        script=resume_after(9, terminate),
    ),
    "saved in the background": recipe(
        callbacks=saving(average, save_every_n_steps=1, max_checkpoints=2, in_background=True),
        script=resume_after(5, press_ctrl_c),
        **accumulating(2),
        **BOTH,
    ),
    "verification": recipe(script=verify, model=plain_net, optimizer=adamw, is_observed=False),
}

GRID: dict[str, Recipe] = {**UPDATES, **DATA, **SCHEDULES_AND_ENDS, **CALLBACKS, **FILES}
"""All runs."""

SAVE_STEPS: dict[str, dict[int, int]] = {
    "shuffled": {1: 7, 2: 4},
    "accumulation 4, short last window": {1: 8, 2: 4},
    "token weights, accumulation 4": {1: 9, 2: 5},
    "bf16, everything": {1: 9},
    "scaled loss": {1: 5, 2: 4},
    "noisy samples": {1: 4, 2: 5},
    "noisy samples, 2 workers": {1: 8},
    "dict batches": {1: 8, 2: 4},
    "stream with a position": {1: 4, 2: 4},
    "user's sampler": {1: 4, 2: 4},
    "user's batch sampler": {1: 7, 2: 4},
    "OneCycleLR": {1: 5},
    "evaluation every 2 updates": {1: 7, 2: 5},
    "EMA": {1: 4, 2: 5},
    "gradual unfreezing, optimizer of the head": {1: 8, 2: 7},
    "everything": {1: 9, 2: 5},
}
"""Runs that save a training state: after which step, by the number of processes. All are mid-epoch, most mid-window."""


class Job(NamedTuple):
    """A run of the grid on a number of processes.

    Args:
        run: Its name in the grid.
        num_processes: How many processes share it.
        saved_by: How many processes saved the training state that it saves or resumes; ``None`` without one.
    """

    run: str
    num_processes: int
    saved_by: int | None = None

    @property
    def is_regrouped(self) -> bool:
        """Whether another number of processes saved the state."""
        return self.saved_by not in (None, self.num_processes)

    @property
    def name(self) -> str:
        """Its name in recordings and tables."""
        num_processes = self.saved_by or self.num_processes
        name = self.run if num_processes == 1 else f"{self.run} / {num_processes} processes"
        return f"{name}, resumed by {self.num_processes}" if self.is_regrouped else name

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"\W+", "_", f"{self.run} {self.saved_by or self.num_processes}").lower()


# --- in the processes of a group ---------------------------------------------------------------------------------


def execute(job: Job, mode: Mode, folder: Path) -> Parts:
    """Execute a run on this rank, and return the hashes of its parts."""
    recorder = Recorder()
    session = Session(GRID[job.run], folder / job.folder, recorder, mode)
    session.folder.mkdir(parents=True, exist_ok=True)
    seed_generators(17)
    if mode == "record":
        session.recipe.script(session)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if RANK == 0:
            recorder.add_files(session.folder)
        return recorder.parts()
    session.save_step = SAVE_STEPS[job.run][job.saved_by or job.num_processes]
    trainer = session.create_trainer()
    if mode == "save":
        session.train(trainer)
    else:
        seed_generators(99)
        state = session.folder / f"step_{session.save_step}"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a mismatch, where there is none
            session.train(trainer, resume_from=state, allow_other_num_processes=job.is_regrouped)
    session.record_end(trainer)
    return recorder.parts()


def work(plan: Path) -> None:
    """Execute the runs of a plan, and write the parts of each to this rank's file as soon as it ends."""
    torch.set_num_threads(1)
    contents = json.loads(plan.read_text())
    with plan.with_suffix(f".{RANK}.jsonl").open("w") as results:
        for job in itertools.starmap(Job, contents["jobs"]):
            print(f"--- {job.name}", flush=True)
            parts = None
            try:
                parts = execute(job, contents["mode"], Path(contents["folder"]))
            except Exception:
                traceback.print_exc()
            print(json.dumps({"job": job, "parts": parts}), file=results, flush=True)
            if parts is None and job.num_processes > 1:
                sys.stdout.flush()
                os._exit(1)  # the other rank may be waiting for this one


# --- starting the processes of groups ----------------------------------------------------------------------------


def execute_all(jobs: Sequence[Job], mode: Mode, folder: Path) -> dict[Job, Parts | None]:
    """Execute runs in processes of their groups, and return their parts; ``None`` for runs that failed."""
    groups: dict[Any, list[Job]] = collections.defaultdict(list)
    for job in jobs:
        groups[job.num_processes, GRID[job.run].mixed_precision].append(job)
    with ThreadPoolExecutor(max_workers=len(groups) or 1) as pool:
        results = pool.map(lambda group: execute_group(group, mode, folder), groups.values())
        found = dict(item for result in results for item in result.items())
    return {job: found[job] for job in jobs}


def execute_group(jobs: Sequence[Job], mode: Mode, folder: Path) -> dict[Job, Parts | None]:
    """Execute the runs of one group. After a run that ends its processes, new ones execute the rest.

    Raises:
        RuntimeError: The processes end before they start a run.
    """
    found: dict[Job, Parts | None] = {}
    while len(found) < len(jobs):
        remaining = [job for job in jobs if job not in found]
        with tempfile.TemporaryDirectory() as plans:
            plan = Path(plans) / "plan.json"
            plan.write_text(json.dumps({"mode": mode, "jobs": remaining, "folder": str(folder)}))
            launch(plan, remaining[0].num_processes)
            results = read_results(plan, remaining[0].num_processes)
            if len(results) < len(remaining):
                results[remaining[len(results)]] = None
            for job in [job for job, parts in results.items() if parts is None]:
                report_failure(plan, job)
            found |= results
    return found


def launch(plan: Path, num_processes: int) -> None:
    """Start the processes of a plan, and wait for them. If one fails or nothing happens for long, kill all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        group = (num_processes, num_processes, "127.0.0.1", listener.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name not in GROUP_VARIABLES}
    environment |= {
        "PYTHONPATH": str(Path(pytorch_accelerated.__file__).parents[1]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(num_processes):
        if num_processes > 1:
            environment |= dict(zip(GROUP_VARIABLES, map(str, (rank, rank, *group)), strict=True))
        with plan.with_suffix(f".{rank}.log").open("w") as log:
            command = [sys.executable, __file__, "--work", str(plan)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        wait_for(processes, plan)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(processes: Sequence[subprocess.Popen[bytes]], plan: Path) -> None:
    """Return when all processes have ended, when one has failed, or when none has made progress for long."""
    size, last_progress = 0, time.monotonic()
    while None in [process.poll() for process in processes] and not any(process.returncode for process in processes):
        time.sleep(0.05)
        new_size = sum(path.stat().st_size for path in plan.parent.glob("*.jsonl"))
        if new_size != size:
            size, last_progress = new_size, time.monotonic()
        if time.monotonic() - last_progress > SECONDS_WITHOUT_PROGRESS:
            return


def read_results(plan: Path, num_processes: int) -> dict[Job, Parts | None]:
    """Return the parts of the runs that have ended on every rank, each part with the number of its rank."""
    found: list[dict[Job, Parts | None]] = []
    for rank in range(num_processes):
        path = plan.with_suffix(f".{rank}.jsonl")
        results = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        found.append({Job(*result["job"]): result["parts"] for result in results})
    if num_processes == 1:
        return found[0]
    merged: dict[Job, Parts | None] = {}
    for job in found[0]:
        parts_of_ranks = [results.get(job) for results in found]
        if None in parts_of_ranks:
            break
        ranks = enumerate(parts_of_ranks)
        merged[job] = {f"rank {rank}: {part}": one for rank, parts in ranks for part, one in (parts or {}).items()}
    return merged


def report_failure(plan: Path, job: Job) -> None:
    """Print the ends of the outputs of a run that failed.

    Raises:
        RuntimeError: The run did not even start.
    """
    logs = [path.read_text(errors="replace") for path in sorted(plan.parent.glob("*.log"))]
    outputs = [log.partition(f"--- {job.name}\n")[2].partition("\n--- ")[0] for log in logs]
    if not any(outputs) and not any("--- " in log for log in logs):
        raise RuntimeError("The processes ended before their first run:\n" + "\n".join(log[-2000:] for log in logs))
    for rank, output in enumerate(outputs):
        print(f"{job.name} failed on rank {rank}:\n{output[-2000:]}", file=sys.stderr)


# --- the command line --------------------------------------------------------------------------------------------


def record(jobs: Sequence[Job]) -> dict[str, Parts | None]:
    """Execute runs of the grid, and return their parts by name."""
    with tempfile.TemporaryDirectory() as folder:
        return {job.name: parts for job, parts in execute_all(jobs, "record", Path(folder)).items()}


def save_states(jobs: Sequence[Job], folder: Path) -> dict[str, Parts | None]:
    """Save training states in a folder, and return the ends of the uninterrupted runs by name.

    For runs that another number of processes resumes, the end is that of the run resumed by the present code.
    """
    uninterrupted = [job for job in jobs if not job.is_regrouped]
    ends = {job.name: parts for job, parts in execute_all(uninterrupted, "save", folder).items()}
    for job in uninterrupted:
        for path in (folder / job.folder).glob("step_*"):
            if path.name != f"step_{SAVE_STEPS[job.run][job.num_processes]}":
                shutil.rmtree(path)
    return {**ends, **resume_states([job for job in jobs if job.is_regrouped], folder)}


def resume_states(jobs: Sequence[Job], folder: Path) -> dict[str, Parts | None]:
    """Resume the training states in a folder, which stays unchanged, and return the ends of the runs by name."""
    found: dict[Job, Parts | None] = {}
    for is_regrouped in (False, True):  # two jobs that resume the same state need separate copies
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            chosen = [job for job in jobs if job.is_regrouped is is_regrouped]
            found |= execute_all(chosen, "resume", Path(copy))
    return {job.name: found[job] for job in jobs}


def short_hash(parts: Parts) -> str:
    """Return one hash of all parts, of 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def verdict_on(before: Parts | None, after: Parts | None) -> str:
    """Say which parts of a run differ."""
    if after is None:
        return "FAILED or missing"
    if before is None:
        return "NOT RECORDED before"
    different = [part for part in sorted({*before, *after}) if before.get(part) != after.get(part)]
    return f"DIFFERENT: {', '.join(different)}" if different else "same"


def compare(before: Mapping[str, Parts | None], after: Mapping[str, Parts | None]) -> bool:
    """Print a table of all runs, and return whether every one of them is the same."""
    names = list(dict.fromkeys([*after, *before]))
    width = max(map(len, names), default=0)
    num_different = 0
    for name in names:
        parts = after.get(name)
        verdict = verdict_on(before.get(name), parts)
        num_different += verdict != "same"
        print(f"{name:{width}}  {short_hash(parts) if parts else '-' * 16}  {verdict}")
    print(f"{len(names)} runs, {num_different} different")
    return num_different == 0


def choose_jobs(only: str, with_states: bool) -> list[Job]:
    """Return the jobs whose names contain a text: those with training states, or those of the grid."""
    if with_states:
        pairs = [(run, *pair) for run, steps in SAVE_STEPS.items() for pair in itertools.product(steps, steps)]
        jobs = [Job(run, num_processes, saved_by) for run, saved_by, num_processes in pairs]
    else:
        jobs = [Job(run, num_processes) for run, one in GRID.items() for num_processes in one.num_processes]
    return [job for job in jobs if only in job.name]


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="SUBSTRING", default="", help="execute only runs with this in their names")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="print the names of the runs")
    action.add_argument("--compare", metavar="FILE", type=Path, help="compare with a recording")
    action.add_argument("--save-states", metavar="FOLDER", type=Path, help="save training states")
    action.add_argument("--resume-states", metavar="FOLDER", type=Path, help="resume training states, and compare")
    action.add_argument("--work", metavar="PLAN", type=Path, help=argparse.SUPPRESS)  # in the processes of a group
    arguments = parser.parse_args()

    if arguments.work:
        work(arguments.work)
        return 0
    folder = arguments.save_states or arguments.resume_states
    jobs = choose_jobs(arguments.only, with_states=folder is not None)
    if arguments.list:
        print("\n".join(job.name for job in jobs))
        return 0
    print(f"pytorch_accelerated is {pytorch_accelerated.__file__}", file=sys.stderr)
    if arguments.compare or arguments.resume_states:
        path = arguments.compare or folder / "ends.json"
        before = {name: parts for name, parts in json.loads(path.read_text()).items() if arguments.only in name}
        return 0 if compare(before, resume_states(jobs, folder) if folder else record(jobs)) else 1
    recording = save_states(jobs, folder) if folder else record(jobs)
    text = json.dumps({name: parts for name, parts in recording.items() if parts is not None}, indent=1)
    if folder:
        (folder / "ends.json").write_text(text + "\n")
    else:
        print(text)
    return 1 if None in recording.values() else 0


if __name__ == "__main__":
    sys.exit(main())
