"""Measure what PyTorch settings gain in a training with this library, relative to the default.

The gains depend on the model and the machine. On a GPU, this measures the gains on the GPU. `make bench-settings` runs
it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from _common import NUM_CLASSES, make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback

IMAGE = (3, 32, 32)


class LastEpoch(TrainerCallback):
    """Times the last epoch. Compiling and kernel selection happen in the epochs before it."""

    seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the clock."""
        synchronize(trainer.device)
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop the clock."""
        synchronize(trainer.device)
        self.seconds = time.perf_counter() - self._start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_deep_mlp() -> nn.Module:
    """Return a model with 130 parameter tensors."""
    layers = [layer for _ in range(64) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, NUM_CLASSES))


def make_conv_net() -> nn.Module:
    """Return a model with three blocks of convolution, batch norm and ReLU."""
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
        for before, after in pairwise((3, 32, 64, 128))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, NUM_CLASSES))


def in_channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class Setting(NamedTuple):
    """A setting to compare with the default."""

    name: str
    make_model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    change_model: Callable[[nn.Module], Any] = lambda model: model
    optimizer: dict[str, Any] = {}  # noqa: RUF012 - never mutated
    needs_cuda: bool = False


SETTINGS = (
    Setting("AdamW(foreach=False), 130 tensors", make_deep_mlp, (64,), optimizer={"foreach": False}),
    Setting("AdamW(foreach=True), 130 tensors", make_deep_mlp, (64,), optimizer={"foreach": True}),
    Setting("AdamW(fused=True), 130 tensors", make_deep_mlp, (64,), optimizer={"fused": True}),
    Setting("torch.compile, 64 linear layers", make_deep_mlp, (64,), torch.compile),
    Setting("channels last, convolutional network", make_conv_net, IMAGE, in_channels_last),
    Setting("torch.compile, convolutional network", make_conv_net, IMAGE, torch.compile),
    Setting(
        "torch.compile and channels last, convolutional network",
        make_conv_net,
        IMAGE,
        lambda model: torch.compile(in_channels_last(model)),
    ),
    Setting("TF32, convolutional network", make_conv_net, IMAGE, needs_cuda=True),
)


def seconds_of(setting: Setting, is_on: bool, num_steps: int) -> float:
    """Return the seconds of an epoch with or without the setting."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if is_on and setting.needs_cuda else "highest")
    torch.backends.cudnn.allow_tf32 = is_on and setting.needs_cuda
    clock, model = LastEpoch(), setting.make_model()
    if is_on:
        model = setting.change_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **(setting.optimizer if is_on else {}))
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[clock])
    trainer.train(make_dataset(64 * num_steps, setting.shape), num_epochs=2, per_device_batch_size=64)
    return clock.seconds


def gain_of(setting: Setting, num_pairs: int, num_steps: int) -> float:
    """Return the ratio of the epoch time with the setting to that without it.

    The two alternate: each time with the setting is divided by the mean of the times right before and after it.
    """
    measure = partial(seconds_of, setting, num_steps=num_steps)
    measure(True)
    without, ratios = [measure(False)], []
    for _ in range(num_pairs):
        seconds = measure(True)
        without.append(measure(False))
        ratios.append(2 * seconds / (without[-2] + without[-1]))
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="measurements per setting, alternating with the default")
    parser.add_argument("--steps", type=int, default=30, help="steps per epoch")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    print(f"{device}, torch {torch.__version__}; step time relative to the default; below 1 is faster\n")
    print("| setting | time relative to the default |\n| --- | --- |")
    for setting in SETTINGS:
        if setting.needs_cuda and not torch.cuda.is_available():
            print(f"| {setting.name} | needs a GPU |", flush=True)
        else:
            print(f"| {setting.name} | {gain_of(setting, arguments.pairs, arguments.steps):.2f} |", flush=True)


if __name__ == "__main__":
    main()
