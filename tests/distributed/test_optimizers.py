"""Closures, modes and several optimizers on two real processes, with the numbers of one.

The processes run this file as a script. The batches of the two processes have different sizes at the end of an epoch.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn.functional import softplus

from _optimizing import Averaging, Net, SharpnessAware
from _processes import launch, read_results, run_cases
from _runs import differences
from _support import IN_ORDER, Probe, make_dataset, mse, weights_of
from pytorch_accelerated import Trainer

pytestmark = pytest.mark.distributed

DATASET = make_dataset(21, num_features=4)

OPTIMIZERS = {
    "lbfgs": lambda net: optim.LBFGS(net.parameters(), lr=0.3, max_iter=3, line_search_fn="strong_wolfe"),
    "sharpness-aware": lambda net: SharpnessAware(optim.SGD(net.parameters(), lr=0.1)),
    "two": lambda net: [optim.SGD(net.matrices(), lr=0.1), optim.AdamW(net.others(), lr=0.01)],
    "modes": lambda net: Averaging(net.parameters(), lr=0.1),
}


class Adversarial(Trainer):
    """Trains two networks in turns."""

    def __init__(self, create: Any, **kwargs: Any) -> None:
        torch.manual_seed(1)
        generator, discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
        optimizers = [optim.Adam(generator.parameters(), 0.01), optim.SGD(discriminator.parameters(), 0.1)]
        super().__init__(generator, None, optimizers, **kwargs)
        self.discriminator = discriminator

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        real, generated = batch[0], self.model(batch[0].flip(1))
        loss = softplus(self.discriminator(generated.detach())).mean() + softplus(-self.discriminator(real)).mean()
        self.make_update(loss, 1, len(real))
        return {"loss": softplus(-self.discriminator(generated)).mean(), "batch_size": len(real)}


def make_trainer(create: Any, **kwargs: Any) -> Trainer:
    net = Net()
    net.dropout.p = 0.0
    return Trainer(net, mse, create(net), **kwargs)


KINDS = {
    **{name: partial(make_trainer, create) for name, create in OPTIMIZERS.items()},
    "turns": partial(Adversarial, None),
}


def run(name: str, batch_size: int, callbacks: Any = (), **kwargs: Any) -> Any:
    """Train one kind, and return its outcome."""
    trainer = KINDS[name](callbacks=callbacks)
    trainer.train(
        DATASET,
        num_epochs=2,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=1 if name == "turns" else 2,
        gradient_clip_norm=1.0,
        train_dataloader_kwargs=IN_ORDER,
        **kwargs,
    )
    discriminator = getattr(trainer, "discriminator", None)
    return {
        "model": weights_of(trainer.model),
        "discriminator": {} if discriminator is None else weights_of(discriminator),
        "optimizer": trainer.optimizer.state_dict(),
        "losses": trainer.run_history.get_metric_values("train_loss_epoch"),
    }


def case_all_kinds(rank: int, directory: Path) -> Any:
    """Train each kind, then resume it in the middle of an epoch."""
    results = {}
    for name in KINDS:

        def save(trainer: Any, step: int, name: str = name, **_: Any) -> None:
            if step == 2 and trainer.run_history.current_epoch == 2:
                trainer.save_training_state(directory / name)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = run(name, 2, [Probe(on_train_step_end=save)])
            resumed = run(name, 2, resume_from=directory / name)
        results[name] = {"whole": whole, "resumed": resumed}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    launch(Path(__file__), folder, 2)
    return read_results(folder, "all_kinds", 2)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_have_the_same_bits_and_those_of_a_resumed_run(results, name):
    for result in results:
        assert differences(result[name]["whole"], results[0][name]["whole"]) == []
        assert differences(result[name]["resumed"], result[name]["whole"]) == []


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_have_the_numbers_of_one(results, name):
    one, two = run(name, 4), results[0][name]["whole"]
    for part in ("model", "discriminator"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-4)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)


if __name__ == "__main__":
    run_cases({"all_kinds": case_all_kinds})
