"""Runs with metrics of every kind, on one process or several, whose numbers must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, StepBasedEvaluationCallback
from pytorch_accelerated.metrics import Accuracy, FromLoss, MeanAbsoluteError, Perplexity, TopKAccuracy, WholeSet

NUM_CLASSES = 3


def make_classes(num_samples: int = 22, seed: int = 1) -> TensorDataset:
    """Create samples of three classes, of which no two have the same features."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, 4, generator=generator)
    return TensorDataset(inputs, inputs[:, :NUM_CLASSES].argmax(1))


def scores_and_positions(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a number that depends on the order of the samples."""
    return (outputs[:, 0] * torch.arange(len(outputs))).mean() + targets[0]


def output_of_class_1(outputs: torch.Tensor, targets: torch.Tensor) -> Any:
    """Return a mean over some of the samples, and their number; nothing if there are none."""
    chosen = outputs[targets == 1, 1]
    return (chosen.mean(), torch.tensor(len(chosen))) if len(chosen) else None


def make_metrics() -> dict[str, Any]:
    """Return at least one metric of each kind."""
    return {
        "accuracy": Accuracy(),
        "top2": TopKAccuracy(2),
        "perplexity": Perplexity(),
        "half": FromLoss(lambda loss: loss / 2),
        "error": lambda outputs, targets: (outputs.argmax(1) != targets).float().mean(),
        "of_class_1": output_of_class_1,
        "mean_output": lambda outputs, targets: outputs.mean(0),
        "named": lambda outputs, targets: {"first": outputs[:, 0].mean(), "second": outputs[:, 1].mean().item()},
        "largest": WholeSet(lambda outputs, targets: outputs.max()),
        "micro": MulticlassAccuracy(NUM_CLASSES, average="micro"),
        "f1": MulticlassF1Score(NUM_CLASSES, average=None),
        "auroc": MulticlassAUROC(NUM_CLASSES),
        "both": MetricCollection([MulticlassAccuracy(NUM_CLASSES), MulticlassF1Score(NUM_CLASSES)]),
    }


def make_trainer(metrics: Any = None, lr: float = 0.1, callbacks: Any = (), **kwargs: Any) -> Trainer:
    """Create a trainer of a small classifier."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    metrics = make_metrics() if metrics is None else metrics
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, metrics=metrics, **kwargs)


def train(trainer: Trainer, total_batch_size: int = 6, num_processes: int = 1, **kwargs: Any) -> dict[str, list[Any]]:
    """Train and evaluate, and return the history."""
    kwargs = {"num_epochs": 2, "eval_dataset": make_classes(13, seed=2), **kwargs}
    trainer.train(make_classes(), per_device_batch_size=total_batch_size // num_processes, **kwargs)
    return history_of(trainer)


def history_of(trainer: Trainer) -> dict[str, list[Any]]:
    """Return all values of all metrics."""
    history = trainer.run_history
    return {name: list(history.get_metric_values(name)) for name in sorted(history.get_metric_names())}


def whole_run(num_processes: int) -> dict[str, list[Any]]:
    """Train in batches of six in total, and evaluate a dataset by itself, with a metric that sees the order."""
    histories = train(make_trainer(), num_processes=num_processes)
    in_order = make_trainer({"order": WholeSet(scores_and_positions)})
    in_order.evaluate(make_classes(13), per_device_batch_size=6 // num_processes)
    return {**histories, **history_of(in_order), **regression(num_processes)}


def regression(num_processes: int) -> dict[str, list[Any]]:
    """Evaluate a regression: metrics whose states torchmetrics sums, and puts together in its own way."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(11, 2, generator=generator)
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 0.5)
    nn.init.zeros_(model.bias)
    metrics = {"mae": MeanAbsoluteError(), "mse": MeanSquaredError(), "pearson": PearsonCorrCoef()}
    trainer = Flat(model, nn.MSELoss(), None, (), metrics=metrics)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True) + inputs[:, :1] ** 2)
    trainer.evaluate(data, per_device_batch_size=6 // num_processes)
    return history_of(trainer)


def resumable(folder: Path, metrics: Any = None) -> Trainer:
    """Create a trainer that saves a state after every step."""
    saver = SaveTrainingStateCallback(folder, save_every_n_steps=1, max_checkpoints=None)
    return make_trainer(metrics, callbacks=[StepBasedEvaluationCallback(eval_every_n_steps=2), saver])


def states_in(folder: Path) -> list[Path]:
    """Return the states in a folder, the oldest first."""
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)


class Flat(Trainer):
    """Passes outputs and targets without their second dimension to the metrics."""

    def get_metric_inputs(self, batch: Any, batch_output: Any) -> Any:
        return tuple(value.flatten() for value in super().get_metric_inputs(batch, batch_output))
