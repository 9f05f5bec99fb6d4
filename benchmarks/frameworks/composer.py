"""Composer: a model that computes its loss, and the Trainer with its progress bar.

Composer imports torchvision and the client of a cloud service, but training uses neither. Both pin the versions of
other packages, so they are replaced by empty modules.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from _common import Job


class EmptyModule(ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012  # required by the import system

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class EmptyModuleFinder(MetaPathFinder, Loader):
    """Provides empty modules for packages that are not installed."""

    PACKAGES = ("mcli", "torchvision")

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec for any module of these packages."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Create an empty module."""
        return EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""


sys.meta_path.append(EmptyModuleFinder())

from composer import Trainer  # noqa: E402
from composer.models import ComposerModel  # noqa: E402


class Model(ComposerModel):
    """Computes the outputs and the loss of a batch."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.loss_func = job.model, job.loss_func

    def forward(self, batch: Any) -> torch.Tensor:
        """Return the outputs."""
        return self.model(batch[0])

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return the loss."""
        return self.loss_func(outputs, batch[1])


def make_trainer(job: Job, **kwargs: Any) -> Trainer:
    return Trainer(model=Model(job), device="cpu", progress_bar=not job.is_quiet, **kwargs)


def train(job: Job) -> None:
    trainer = make_trainer(
        job, train_dataloader=job.loader(), optimizers=job.optimizer, max_duration=f"{job.num_epochs}ep"
    )
    trainer.fit()
    trainer.close()


def evaluate(job: Job) -> None:
    trainer = make_trainer(job)
    trainer.eval(job.eval_loader())
    trainer.close()
