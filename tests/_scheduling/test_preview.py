"""The learning rates that a scheduler will set, found before training: those of a real run, without its optimizer."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

from _support import IMPOSSIBLE_COUNTS, Probe, make_trainer, train
from pytorch_accelerated import TrainerPlaceholderValues
from pytorch_accelerated._scheduling.preview import learning_rates_of, stand_in_for
from pytorch_accelerated.schedulers import CosineLrScheduler, WSDLrScheduler

EPOCHS, PER_EPOCH = TrainerPlaceholderValues.NUM_EPOCHS, TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH

FACTORIES = {
    "cosine": CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=EPOCHS / 4),
    "wsd": WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
    "one cycle": partial(OneCycleLR, max_lr=0.4, epochs=EPOCHS, steps_per_epoch=PER_EPOCH),
    "torch cosine": partial(CosineAnnealingLR, T_max=EPOCHS * PER_EPOCH),
    "two": lambda optimizer: [LinearLR(optimizer, total_iters=3), StepLR(optimizer, step_size=4)],
}


def preview(factory, num_updates=16, num_epochs=4, optimizer=None, lr=0.1, interval="update"):
    return learning_rates_of(factory, num_updates, num_epochs, optimizer, lr, interval)


@pytest.mark.filterwarnings("ignore:.*is stepped once per epoch")  # the tested schedules are made for updates
@pytest.mark.parametrize(
    ("name", "interval"),
    [*((name, "update") for name in FACTORIES), *((name, "epoch") for name in ("one cycle", "torch cosine", "two"))],
)
def test_the_rates_are_those_of_a_run(name, interval):
    rates = []
    probe = Probe(on_optimizer_step_start=lambda trainer, **_: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer = make_trainer(callbacks=[probe])
    expected = preview(FACTORIES[name], interval=interval)
    train(trainer, num_epochs=4, create_scheduler_fn=FACTORIES[name], step_scheduler=interval)
    assert expected[:, 0].tolist() == rates
    assert len(set(rates)) > 1


def test_each_parameter_group_has_its_rate_and_the_optimizer_is_not_touched():
    parameters = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = torch.optim.AdamW([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.2}])
    before, step = copy.deepcopy(optimizer.state_dict()), optimizer.step
    rates = preview(FACTORIES["one cycle"], optimizer=optimizer)
    assert rates.shape == (16, 2)
    rates = preview(FACTORIES["torch cosine"], optimizer=optimizer)
    np.testing.assert_allclose(rates[:, 1], 2 * rates[:, 0])
    assert optimizer.state_dict() == before
    assert optimizer.step == step
    assert all("initial_lr" not in group for group in optimizer.param_groups)
    assert [parameter.tolist() for parameter in parameters] == [[1, 1], [1, 1]]


def test_several_optimizers_have_stand_ins_by_name():
    optimizers = {name: torch.optim.SGD([torch.ones(1)], lr=lr) for name, lr in (("a", 0.1), ("b", 0.3))}
    assert [group["lr"] for group in stand_in_for(optimizers, 1.0)["b"].param_groups] == [0.3]
    factory = lambda group: {name: StepLR(group[name], 8) for name in group}  # noqa: E731
    assert preview(factory, optimizer=optimizers)[-1].tolist() == pytest.approx([0.01, 0.03])


def test_a_run_that_ends_within_an_epoch_ends_the_schedule():
    rates = preview(FACTORIES["torch cosine"], num_updates=10, num_epochs=4)
    np.testing.assert_allclose(rates, preview(partial(CosineAnnealingLR, T_max=10), num_updates=10))


def test_a_schedule_that_depends_on_a_metric_is_refused():
    with pytest.raises(ValueError, match="schedule of a ReduceLROnPlateau depends on the values of a metric"):
        preview(ReduceLROnPlateau)


@pytest.mark.parametrize("name", ["num_updates", "num_epochs"])
@pytest.mark.parametrize(("number", "error"), IMPOSSIBLE_COUNTS)
def test_impossible_lengths_are_refused(name, number, error):
    with pytest.raises(error, match=name):
        preview(FACTORIES["cosine"], **{name: number})
