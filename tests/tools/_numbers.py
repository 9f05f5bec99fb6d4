"""Trainings and evaluations whose numbers must not depend on how the work is split over batches and processes."""

from __future__ import annotations

import functools
import itertools
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

from _runs import differences
from _support import IN_ORDER, Probe, Samples, draw_parameters, history_of, recorder_of, weights_of
from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated._distributed import accelerator as accelerator_module
from pytorch_accelerated._distributed.fast_path import FastPathLoader
from pytorch_accelerated.schedulers import CosineLrScheduler

Pair = namedtuple("Pair", ["left", "right"])


def make_net() -> nn.Sequential:
    """Create a small network with the same weights each time."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    draw_parameters(net, seed=3, scale=0.5)
    return net


def make_texts(num_samples: int) -> TensorDataset:
    """Create inputs, targets, and a mask that says which samples count, like a token mask; some batches have none."""
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 4, generator=generator)
    targets = torch.randn(num_samples, 1, generator=generator)
    mask = (torch.rand(num_samples, generator=generator) < 0.6).float()
    mask[0] = 1
    return TensorDataset(inputs, targets, mask)


def mean_loss(model: Any, batch: Any, is_weighted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of a batch over the samples that the mask keeps, or over all, and their number."""
    inputs, targets, mask = batch
    weights = mask if is_weighted else torch.ones_like(mask)
    losses = (model(inputs) - targets).square().squeeze(1)
    return (losses * weights).sum() / weights.sum().clamp(min=1), weights.sum()


class TextTrainer(Trainer):
    """Trains on `make_texts`; ``is_weighted`` says whether its steps return ``num_items_in_batch``."""

    is_weighted = False

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        loss, num_items = mean_loss(self.model, batch, self.is_weighted)
        weight = {"num_items_in_batch": num_items} if self.is_weighted else {}
        return {"loss": loss, "batch_size": len(batch[0]), **weight}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            return self.calculate_train_batch_loss(batch)


class WeightedTextTrainer(TextTrainer):
    is_weighted = True


class LossWithParameters(nn.Module):
    """A mean squared error with a scale, and an offset that gets no gradient from batches without a negative target."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1) + start)
        self.offset = nn.Parameter(torch.zeros(1))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        errors = (outputs - targets) ** 2
        if targets.min() < 0:
            errors = errors + (targets < 0) * (self.offset - 1) ** 2
        return (torch.exp(-self.log_scale) * errors + self.log_scale).mean()


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.detach().cpu().clone() for parameter in model.parameters()]


def big_batches(dataset: TensorDataset, num_samples: int) -> list[tuple[torch.Tensor, ...]]:
    return [dataset[start : start + num_samples] for start in range(0, len(dataset), num_samples)]


def big_batch_gradients(dataset: TensorDataset, num_samples: int, is_weighted: bool) -> list[list[torch.Tensor]]:
    """Return the gradients of all updates of an epoch with fixed weights, where each update is one big batch."""
    gradients = []
    for batch in big_batches(dataset, num_samples):
        net = make_net()
        mean_loss(net, batch, is_weighted)[0].backward()
        gradients.append(gradients_of(net))
    return gradients


def largest_difference(left: Any, right: Any) -> float:
    """Return the largest absolute difference of two lists of lists of tensors; infinite if their lengths differ."""
    if len(left) != len(right):
        return float("inf")
    pairs = [pair for lists in zip(left, right, strict=True) for pair in zip(*lists, strict=True)]
    return max((one.cpu() - other.cpu()).abs().max().item() for one, other in pairs)


# --- gradients and losses do not depend on how an update is split into batches -----------------------------------

LENGTHS = (1, 5, 24, 29, 50)
GRID = list(itertools.product((False, True), (1, 3, 8), (1, 2, 4), LENGTHS))
"""Whether steps are weighted, batch size per process, accumulation, length of the dataset."""


def grid_differences(num_processes: int) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Return the largest deviation of gradients and of the reported loss from big batches, by point of the grid."""
    found = {}
    for point in GRID:
        is_weighted, batch_size, accumulation, num_samples = point
        dataset, net = make_texts(num_samples), make_net()
        probe, gradients = recorder_of(lambda trainer: gradients_of(trainer.get_model()), "on_optimizer_step_start")
        trainer = (WeightedTextTrainer if is_weighted else TextTrainer)(
            net,
            None,
            torch.optim.SGD(net.parameters(), lr=0.0),
            callbacks=[probe],
        )
        trainer.train(
            dataset,
            num_epochs=1,
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_dataloader_kwargs=IN_ORDER,
        )
        expected = big_batch_gradients(dataset, batch_size * accumulation * num_processes, is_weighted)
        loss = trainer.run_history.get_latest_metric("train_loss_epoch")
        expected_loss = mean_loss(make_net(), dataset[:], is_weighted)[0].item()
        found[point] = (largest_difference(gradients, expected), abs(loss - expected_loss))
    return found


def table_of(deviations: dict[tuple[Any, ...], tuple[float, float]], num_processes: int) -> str:
    """Format the result of `grid_differences` as a table, with the largest values over the dataset lengths."""
    header = f"\nprocesses: {num_processes:<3}    batch   accumulation   gradients       loss"
    lines = []
    for is_weighted, batch_size, accumulation in dict.fromkeys(point[:3] for point in GRID):
        pairs = [deviations[is_weighted, batch_size, accumulation, length] for length in LENGTHS]
        gradients, loss = (max(numbers) for numbers in zip(*pairs, strict=True))
        kind = "token weights" if is_weighted else "samples"
        lines.append(f"{kind:15} {batch_size:7} {accumulation:14} {gradients:11.1e} {loss:10.1e}")
    return "\n".join([header, *lines])


# --- the fast path against Accelerate's code ---------------------------------------------------------------------


@contextmanager
def path_of_accelerate() -> Iterator[None]:
    """Use Accelerate's code, not the fast path, for optimizer steps, backward passes and loaders."""
    with (
        mock.patch.object(trainer_module, "can_use_fast_path", return_value=False),
        mock.patch.object(accelerator_module, "can_use_fast_path", return_value=False),
        mock.patch.object(FastPathLoader, "_iterate_on_device", DataLoaderShard.__iter__),
    ):
        yield


def run_of(point: tuple[Any, ...], make_optimizer: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Train at a point of the grid; return weights, history, RNG state and the class name of the optimizer."""
    is_weighted, batch_size, accumulation, num_samples = point
    net = make_net()
    trainer_class = WeightedTextTrainer if is_weighted else TextTrainer
    trainer = trainer_class(net, None, make_optimizer(net), callbacks=(), seed=4)
    trainer.train(
        make_texts(num_samples),
        num_epochs=2,
        eval_dataset=make_texts(7),
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        create_scheduler_fn=make_scheduler_fn("cosine"),
        **kwargs,
    )
    return weights_of(net), history_of(trainer), torch.get_rng_state(), type(trainer.optimizer).__name__


OPTIMIZERS = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, amsgrad=True),
}


def points_where_the_paths_differ(every_nth: int = 1) -> list[Any]:
    """Return the points of the grid at which the results of the two paths are not bit-identical.

    Points alternate between the optimizers, and pairs of points between clipping and no clipping.

    Args:
        every_nth: Which points are tried. It has no divisor in common with the number of lengths, so that all occur.
    """
    different = []
    for number, point in enumerate(GRID[::every_nth]):
        name, make_optimizer = list(OPTIMIZERS.items())[number % 2]
        kwargs = {"gradient_clip_norm": 0.3} if number % 4 < 2 else {}
        *fast, optimizer = run_of(point, make_optimizer, **kwargs)
        with path_of_accelerate():
            *expected, expected_optimizer = run_of(point, make_optimizer, **kwargs)
        assert (optimizer, expected_optimizer) == ("FastPathOptimizer", "AcceleratedOptimizer")
        if differences(fast, expected):
            different.append((name, *point))
    return different


# --- complete runs -----------------------------------------------------------------------------------------------


def make_scheduler_fn(name: str) -> Any:
    if name == "cosine":
        return CosineLrScheduler.create_scheduler_fn(lr_min=0.001, num_warmup_epochs=1)
    total = TrainerPlaceholderValues.NUM_EPOCHS * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
    return functools.partial(OneCycleLR, max_lr=0.1, total_steps=total)


def whole_run(batch_size: int, accumulation: int, scheduler: str = "cosine", num_samples: int = 61) -> dict[str, Any]:
    """Train for 3 epochs, with data shuffled in each, momentum and a schedule; return everything of interest."""
    net = make_net()
    probe, rates = recorder_of(lambda trainer: trainer.optimizer.param_groups[0]["lr"], "on_optimizer_step_start")
    trainer = TextTrainer(
        net,
        None,
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        seed=5,
        callbacks=[probe],
    )
    trainer.train(
        make_texts(num_samples),
        num_epochs=3,
        eval_dataset=make_texts(19),
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        create_scheduler_fn=make_scheduler_fn(scheduler),
    )
    history = trainer.run_history
    return {
        "history": {name: history.get_metric_values(name) for name in sorted(history.get_metric_names())},
        "weights": weights_of(net),
        "rates": rates,
        "num_updates": trainer.progress.num_updates,
        "num_scheduler_steps": trainer.scheduler.state_dict().get("last_epoch"),
    }


def one_cycle_rates(num_updates: int) -> list[float]:
    """Return the learning rates of a schedule that ends with the last update, computed by PyTorch alone."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=num_updates)
    rates = []
    for _ in range(num_updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# --- evaluation --------------------------------------------------------------------------------------------------

EVALUATED_LENGTHS = (1, 2, 7, 64, 65)


def make_classes(num_samples: int) -> TensorDataset:
    """Create inputs, one of three classes, and the index of each sample."""
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 4, generator=generator)
    return TensorDataset(
        inputs, torch.randint(3, (num_samples,), generator=generator), torch.arange(num_samples, dtype=torch.int64)
    )


class Classifier(Trainer):
    """Evaluates and predicts on `make_classes`, with the accuracy as a metric."""

    def __init__(self, callbacks: Any = ()) -> None:
        net = nn.Linear(4, 3)
        draw_parameters(net, seed=6)
        super().__init__(net, None, torch.optim.SGD(net.parameters(), lr=0.0), callbacks=callbacks)

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        inputs, classes, _ = batch
        outputs = self.model(inputs)
        return {
            "loss": nn.functional.cross_entropy(outputs, classes),
            "batch_size": len(inputs),
            "model_outputs": outputs,
            "metrics": {"accuracy": (outputs.argmax(1) == classes).float().mean()},
        }

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            return self.calculate_train_batch_loss(batch)

    def calculate_predictions(self, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            return {"index": batch[2], "parts": [self.model(batch[0]), (batch[1],)]}


def evaluations(num_samples: int, is_in_memory: bool = True, wrap: Any = Samples) -> dict[str, Any]:
    """Evaluate and predict with batches of 8; return the results, and what a callback gathers over all processes."""
    dataset = make_classes(num_samples)
    gathered: list[Any] = []
    probe = Probe(
        on_eval_step_end=lambda t, batch, batch_output, **k: gathered.append(
            t.gather({"index": batch[2], "is_right": batch_output["model_outputs"].argmax(1) == batch[1]})
        )
    )
    trainer = Classifier([probe])
    data = dataset if is_in_memory else wrap(dataset)
    loader = {} if is_in_memory else {"dataloader_kwargs": {"num_workers": 0}}
    trainer.evaluate(data, per_device_batch_size=8, **loader)
    seen = torch.cat([rows["index"] for rows in gathered]).tolist()
    is_right = torch.cat([rows["is_right"] for rows in gathered]).cpu()
    return {
        "loss": trainer.run_history.get_latest_metric("evaluation_loss"),
        "accuracy": trainer.run_history.get_latest_metric("evaluation_accuracy"),
        "seen": seen,
        "accuracy of callback": is_right.double().mean().item(),
        "predictions": trainer.predict(data, per_device_batch_size=8, **loader),
    }


def expected_evaluations(num_samples: int) -> dict[str, Any]:
    """Return the same numbers, computed by PyTorch alone."""
    inputs, classes, index = make_classes(num_samples)[:]
    with torch.no_grad():
        outputs = Classifier().model.cpu()(inputs)
    accuracy = (outputs.argmax(1) == classes).double().mean().item()
    return {
        "loss": nn.functional.cross_entropy(outputs, classes).item(),
        "accuracy": accuracy,
        "seen": index.tolist(),
        "accuracy of callback": accuracy,
        "predictions": {"index": index, "parts": [outputs, (classes,)]},
    }
