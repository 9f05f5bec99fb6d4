"""Compare the throughput on a GPU with hand-written loops, and check whether a step waits for the device.

    python benchmarks/gpu.py

Without a GPU, it prints a message and exits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from pytorch_accelerated import Trainer

NUM_WARM_UP_EPOCHS = 2
"""Epochs that are not timed, so that compiling and kernel selection do not count."""


# --- models --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with a skip connection.

    Args:
        num_in: Number of input channels.
        num_out: Number of output channels. If it differs from ``num_in``, height and width are halved.
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        stride = 1 if num_in == num_out else 2
        self.body = nn.Sequential(
            *(nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()),
            *(nn.Conv2d(num_out, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out)),
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Add the convolutions and the skip connection."""
        return functional.relu(self.body(images) + self.shortcut(images))


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_resnet() -> nn.Module:
    """Return a network with the depth and widths of ResNet-18."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Residual(before, after) for before, after in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        width: Embedding dimension.
        num_heads: Number of attention heads that split it.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Let each token attend to itself and the tokens before it."""
        batch, length, width = tokens.shape
        split = self.projections(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width of a head)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.output(attended.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer block: attention and a feed-forward network, each with a residual connection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, num_heads))
        hidden = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.network = nn.Sequential(nn.LayerNorm(width), *hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply both, and add each to its input."""
        tokens = tokens + self.attention(tokens)
        return tokens + self.network(tokens)


class Gpt(nn.Module):
    """A language model the size of GPT-2 small, with 124 million parameters."""

    num_tokens, length, width = 50_304, 1024, 768

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(self.num_tokens, self.width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.length, self.width))
        self.blocks = nn.Sequential(*(Block(self.width, num_heads=12) for _ in range(12)), nn.LayerNorm(self.width))
        self.head = nn.Linear(self.width, self.num_tokens, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next token in the layout that cross-entropy expects: (batch, vocabulary, length)."""
        states = self.blocks(self.tokens(tokens) + self.positions)
        return self.head(states).transpose(1, 2)


# --- cases ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A model and its data."""

    title: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    """Creates the given number of samples."""
    batch_size: int
    num_steps: int
    is_fast: bool = False
    """Whether the model is compiled and trained in bf16."""


def vectors(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_samples, 64), torch.randint(10, (num_samples,))


def images(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_samples, 3, 224, 224), torch.randint(1000, (num_samples,))


def texts(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(Gpt.num_tokens, (num_samples, Gpt.length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


CASES = {
    "A": Case("tiny MLP, float32", make_mlp, vectors, batch_size=32, num_steps=1000),
    "D": Case("ResNet-18, float32", make_resnet, images, batch_size=64, num_steps=20),
    "ResNet": Case("ResNet-18, bf16, compiled", make_resnet, images, batch_size=128, num_steps=20, is_fast=True),
    "GPT": Case("GPT-2 small, bf16, compiled", Gpt, texts, batch_size=8, num_steps=40, is_fast=True),
}


class EpochTrainer(Trainer):
    """Uses the dataloader of the hand-written loop, and times each training epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Mapping[str, Any] | None = None) -> Any:
        """Return the dataloader of the hand-written loop."""
        return make_loader(self.train_dataset, batch_size)

    def _run_train_epoch(self, train_dl: Any) -> bool:
        with Timer(self.seconds):
            return super()._run_train_epoch(train_dl)


class Timer:
    """Appends the duration of its block in seconds to a list, including pending work on the device.

    Args:
        seconds: The list.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def make_loader(dataset: TensorDataset, batch_size: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, shuffle=True, pin_memory=True)


def make_parts(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = case.make_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return (torch.compile(model) if case.is_fast else model), optimizer


def train_by_hand(case: Case, dataset: TensorDataset, num_epochs: int) -> list[float]:
    model, optimizer = make_parts(case)
    loader = make_loader(dataset, case.batch_size)
    seconds: list[float] = []
    model.train()
    for _ in range(num_epochs):
        with Timer(seconds):
            total = torch.zeros((), device="cuda")
            for inputs, targets in loader:
                inputs, targets = inputs.cuda(non_blocking=True), targets.cuda(non_blocking=True)
                with torch.autocast("cuda", torch.bfloat16, enabled=case.is_fast):
                    loss = functional.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
            total.item()
    return seconds


def train(case: Case, dataset: TensorDataset, num_epochs: int) -> list[float]:
    model, optimizer = make_parts(case)
    precision = "bf16" if case.is_fast else "no"
    trainer = EpochTrainer(model, nn.CrossEntropyLoss(), optimizer, mixed_precision=precision)
    trainer.train(dataset, num_epochs, per_device_batch_size=case.batch_size)
    return trainer.seconds


def compare(name: str, num_rounds: int) -> str:
    """Return the table row of a case."""
    case = CASES[name]
    num_samples = case.batch_size * case.num_steps
    dataset = TensorDataset(*case.make_batch(num_samples))
    times: dict[Callable[..., list[float]], list[float]] = {train_by_hand: [], train: []}
    for _ in range(num_rounds):
        for run, seconds in times.items():
            seconds.append(statistics.median(run(case, dataset, NUM_WARM_UP_EPOCHS + 3)[NUM_WARM_UP_EPOCHS:]))
    by_hand, ours = times.values()
    ratios = [before / after for before, after in zip(by_hand, ours, strict=True)]
    rates = [num_samples / statistics.median(seconds) for seconds in (by_hand, ours)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return f"| {name} | {case.title} | {rates[0]:,.0f} | {rates[1]:,.0f} | {spread} |"


def check_synchronizations() -> str:
    """Report whether a step waits for the device.

    PyTorch is told to raise an error when the host synchronizes. The ends of epochs are not checked.
    """
    case = CASES["A"]
    dataset = TensorDataset(*vectors(case.batch_size * 20))
    model, optimizer = make_parts(case)

    class Watched(EpochTrainer):
        def _perform_forward_and_backward_passes(self, batch: Any, step: int) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                super()._perform_forward_and_backward_passes(batch, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    try:
        Watched(model, nn.CrossEntropyLoss(), optimizer).train(dataset, 2, per_device_batch_size=case.batch_size)
    except RuntimeError as error:
        return f"S: a step waits for the device: {error}"
    return "S: no step waits for the device."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated cases (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU that PyTorch can use on this machine. Nothing was measured.")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.rounds} rounds\n")
    print("| case | model | by hand, samples/s | pytorch-accelerated, samples/s | ratio to by hand |")
    print("| --- | --- | --- | --- | --- |")
    for name in arguments.cases.split(","):
        print(compare(name, arguments.rounds), flush=True)
    print(f"\n{check_synchronizations()}")


if __name__ == "__main__":
    main()
