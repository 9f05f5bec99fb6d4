"""A small run with everything that a resume could get wrong, and the outcome of it that must be bit-identical."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import EarlyStoppingCallback, ModelEmaCallback, SaveTrainingStateCallback

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS = 22, 4, 3
NUM_STEPS_PER_EPOCH = 6
NUM_STEPS = NUM_EPOCHS * NUM_STEPS_PER_EPOCH


class NoisySamples(Dataset):
    """Adds noise to its samples, drawn from all three global generators."""

    def __init__(self, is_noisy: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(NUM_SAMPLES, 4, generator=generator)
        self.targets = self.inputs.sum(dim=1, keepdim=True)
        self.is_noisy = is_noisy

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.inputs[index]
        if self.is_noisy:
            inputs = inputs + 0.1 * (torch.randn(4) + np.random.rand() + random.random())
        return inputs, self.targets[index]


def masked(samples: Sequence[Any]) -> list[torch.Tensor]:
    """Make a batch in which random inputs are set to zero."""
    inputs, targets = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return [inputs * (torch.rand_like(inputs) > 0.1), targets]


class Net(nn.Module):
    """A network with running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def make_trainer(folder: Path, *, callbacks: Sequence[Any] = (), **state_kwargs: Any) -> Trainer:
    """Create a trainer that saves states to ``folder``, just as a restarted script would create it."""
    model = Net()
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    state_kwargs = {"save_every_n_steps": 1, "save_at_end": False, **state_kwargs}
    return Trainer(
        model,
        nn.functional.mse_loss,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        callbacks=[
            ModelEmaCallback(save_path=folder / "average.pt"),
            EarlyStoppingCallback(early_stopping_patience=20),
            SaveTrainingStateCallback(folder, **state_kwargs),
            *callbacks,
        ],
    )


def train(
    trainer: Trainer,
    *,
    num_workers: int = 0,
    is_noisy: bool = True,
    has_scheduler: bool = True,
    num_epochs: int = NUM_EPOCHS,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train, and return what must be bit-identical."""
    scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7)
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    dataset = NoisySamples(is_noisy)
    trainer.train(
        dataset,
        num_epochs=num_epochs,
        eval_dataset=dataset,
        per_device_batch_size=BATCH_SIZE,
        create_scheduler_fn=scheduler if has_scheduler else None,
        train_dataloader_kwargs=workers,
        eval_dataloader_kwargs={"num_workers": 0},
        collate_fn=masked if is_noisy else None,
        **kwargs,
    )
    return outcome_of(trainer)


def outcome_of(trainer: Trainer) -> dict[str, Any]:
    """Return weights, optimizer, schedule, history, averaged model, and the state of all generators."""
    history = trainer.run_history
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "history": {name: list(history.get_metric_values(name)) for name in sorted(history.get_metric_names())},
        "epoch": history.current_epoch,
        "progress": trainer.progress.state_dict(),
        "average": trainer.callback_handler.callbacks[0].state_dict()["ema_model"],
        "generators": [torch.get_rng_state(), str(np.random.get_state()[1:]), str(random.getstate())],
    }


def differences(left: Any, right: Any, place: str = "") -> list[str]:
    """Describe every place where two nested values are not bit-identical; an empty list if there is none."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{place}: {sorted(map(str, left))} and {sorted(map(str, right))}"]
        return [found for key in left for found in differences(left[key], right[key], f"{place}/{key}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return [f"{place}: {len(left)} and {len(right)} items"]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for key, pair in pairs for found in differences(*pair, f"{place}/{key}")]
    if isinstance(left, torch.Tensor):
        is_same = left.dtype == right.dtype and left.shape == right.shape and left.equal(right)
    else:
        is_same = repr(left) == repr(right)
    return [] if is_same else [f"{place}: {left!r} and {right!r}"]
