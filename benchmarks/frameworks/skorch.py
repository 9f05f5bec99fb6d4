"""skorch: a net that logs the loss of each epoch, with its progress bar."""

from __future__ import annotations

from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import ProgressBar

from _common import Job


def make_net(job: Job) -> NeuralNet:
    callbacks: list[Any] = [] if job.is_quiet else [ProgressBar()]
    net = NeuralNet(
        job.model,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=0.01,
        max_epochs=job.num_epochs,
        batch_size=job.batch_size,
        train_split=None,
        iterator_train__shuffle=True,
        callbacks=callbacks,
    )
    if job.is_quiet:
        net.set_params(callbacks__print_log=None)
    return net


def train(job: Job) -> None:
    make_net(job).fit(job.dataset, y=None)


def evaluate(job: Job) -> None:
    net = make_net(job).initialize()
    net.notify("on_train_begin", X=job.dataset, y=None)
    net.history.new_epoch()
    net.notify("on_epoch_begin", dataset_train=None, dataset_valid=job.dataset)
    net.run_single_epoch(job.eval_loader(), training=False, prefix="valid", step_fn=net.validation_step)
