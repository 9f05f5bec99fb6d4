"""Training states for tests: made-up ones, real ones of a tiny trainer, and what they look like on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _support import make_dataset
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint import manifest as manifest_module
from pytorch_accelerated._checkpoint.manifest import MANIFEST, TRAINER_STATE, process_file
from pytorch_accelerated.progress import TrainingProgress


def make_up_state(path: Path, *, epochs: int = 0, batches: int = 0, num_processes: int = 1, **entries: Any) -> Path:
    """Write a directory that is valid judging by its manifest, although its files contain only text."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for name in (TRAINER_STATE, *map(process_file, range(num_processes)), "model.pt"):
        (path / name).write_text(f"{name} of {path.name}")
    position = TrainingProgress(num_epochs_completed=epochs, num_batches_in_epoch=batches)
    defaults = {"metrics": {}, "settings": {}, "generation": 0, "number": 0}
    metadata = {"num_processes": num_processes, "position": asdict(position), **defaults, **entries}
    manifest_module.write_manifest(path, metadata)
    return path


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Write a state's manifest again so that it matches the current files, with some entries changed."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).unlink()
    kept = ("num_processes", "position", "metrics", "settings", "generation", "number", "versions")
    manifest_module.write_manifest(path, {**{name: manifest[name] for name in kept}, **changes})


def falsify_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a state, together with its checksum, as somebody with bad intentions would."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest.pop("checksum", None)
    change(manifest)
    (path / MANIFEST).write_text(manifest_module._serialize(manifest))


def names_in(folder: Path) -> list[str]:
    """The names in a folder, without that of the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def bytes_in(folder: Path) -> dict[str, bytes]:
    """The contents of all files in a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a tiny run with everything in its state ---------------------------------------------------------------------


def make_state_trainer(callbacks: Any = (), seed: int = 4, **kwargs: Any) -> Trainer:
    """A trainer whose model draws random numbers and whose optimizer has a state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, nn.functional.mse_loss, optimizer, callbacks=callbacks, **kwargs)


def train(trainer: Trainer, dataset: Any = None, **kwargs: Any) -> None:
    """Train with five batches and three updates per epoch; the last batch and the last update are short ones."""
    dataset = make_dataset(18) if dataset is None else dataset
    defaults: Mapping[str, Any] = {"num_epochs": 3, "per_device_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer.train(dataset, **{**defaults, **kwargs})


def everything_in(trainer: Trainer) -> dict[str, Any]:
    """Return everything in a trainer that a rejected state must not change."""
    optimizer_state = trainer.optimizer.state_dict()
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": {
            f"{index} {name}": torch.as_tensor(value).clone()
            for index, values in optimizer_state["state"].items()
            for name, value in values.items()
        },
        "groups": [{**group} for group in optimizer_state["param_groups"]],
        "history": {
            name: trainer.run_history.get_metric_values(name) for name in trainer.run_history.get_metric_names()
        },
        "epoch": trainer.run_history.current_epoch,
        "progress": trainer.progress.state_dict(),
        "random": torch.get_rng_state(),
    }


def assert_equal(left: Any, right: Any, place: str = "") -> None:
    """Compare nested structures bit by bit."""
    if isinstance(left, Mapping):
        assert left.keys() == right.keys(), place
        for name in left:
            assert_equal(left[name], right[name], f"{place} {name}")
    elif isinstance(left, (tuple, list)):
        assert len(left) == len(right), place
        for index, (left_item, right_item) in enumerate(zip(left, right, strict=True)):
            assert_equal(left_item, right_item, f"{place} {index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    else:
        assert left == right, place
