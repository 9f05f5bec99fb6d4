"""fastai: a Learner with its recorder and progress callbacks."""

from __future__ import annotations

from functools import partial

import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import ProgressCallback  # noqa: F401  # registers itself as a default callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

from _common import Job


class SkipValidation(Callback):
    """Skips validation, because the other frameworks only train."""

    def before_validate(self) -> None:
        """Skip the validation that fastai runs in each epoch."""
        raise CancelValidException


def make_learner(job: Job) -> Learner:
    if job.has_own_loader:
        loaders = DataLoaders.from_dsets(job.dataset, job.dataset, bs=job.batch_size)
    else:
        loaders = DataLoaders(job.loader(), job.eval_loader())
    optimizer = partial(OptimWrapper, opt=torch.optim.SGD)
    return Learner(loaders, job.model, job.loss_func, opt_func=optimizer, lr=0.01)


def train(job: Job) -> None:
    learner = make_learner(job)
    learner.add_cb(SkipValidation())
    if job.is_quiet:
        with learner.no_bar(), learner.no_logging():
            learner.fit(job.num_epochs)
    else:
        learner.fit(job.num_epochs)


def evaluate(job: Job) -> None:
    learner = make_learner(job)
    if job.is_quiet:
        with learner.no_bar(), learner.no_logging():
            learner.validate()
    else:
        learner.validate()
