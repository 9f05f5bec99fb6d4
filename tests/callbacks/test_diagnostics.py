"""The callbacks that record gradient norms, sizes of updates and learning rates."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import _support
from _support import Probe, make_trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    GradientNormCallback,
    LayerStatisticsCallback,
    LearningRateCallback,
    SaveTrainingStateCallback,
    UpdateRatioCallback,
)


def norms_by_hand(seen):
    return [torch.cat([gradient.flatten() for gradient in gradients]).norm().item() for gradients in seen]


# five steps and three updates per epoch
train = partial(_support.train, dataset=10, num_epochs=2, per_device_batch_size=2, gradient_accumulation_steps=2)


@pytest.mark.parametrize("limit", [0.01, float("inf")])
def test_the_mean_gradient_norm_before_clipping_is_recorded_each_epoch(limit):
    seen = []
    probe = Probe(
        on_optimizer_step_start=lambda trainer, **_: seen.append([p.grad.clone() for p in trainer.model.parameters()])
    )
    trainer = make_trainer(callbacks=[probe, GradientNormCallback()])
    train(trainer, gradient_clip_norm=limit)
    norms = norms_by_hand(seen)
    assert len(norms) == 6
    expected = [sum(norms[:3]) / 3, sum(norms[3:]) / 3]
    assert trainer.run_history.get_metric_values("train_gradient_norm") == pytest.approx(expected, rel=1e-5)


def test_a_new_run_ignores_norms_of_an_earlier_one_and_records_under_the_given_name():
    trainer = make_trainer(callbacks=[callback := GradientNormCallback("norm")])
    callback.load_state_dict({"total_loss": torch.tensor(1e9), "running_count": torch.tensor(1.0)})
    train(trainer, gradient_clip_norm=1.0)
    assert all(value < 1e6 for value in trainer.run_history.get_metric_values("norm"))


def test_a_run_resumed_mid_epoch_records_the_same_mean_norms(tmp_path):
    def run(**kwargs):
        states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=3, save_at_end=False)
        trainer = make_trainer(callbacks=[GradientNormCallback(), states])
        train(trainer, gradient_clip_norm=0.1, **kwargs)
        return trainer.run_history.get_metric_values("train_gradient_norm")

    expected = run()
    assert run(resume_from=tmp_path / "step_3") == expected


def norm_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def make_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))


def values_of(trainer, name):
    return trainer.run_history.get_metric_values(name)


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_norm": 0.01}])
def test_norms_of_layers_are_those_of_complete_gradients_of_the_sampled_updates(clipping):
    seen = []
    probe = Probe(
        on_optimizer_step_start=lambda trainer, **_: seen.append(
            {
                name: norm_of([p.grad for p in layer.parameters()])
                for name, layer in trainer.model.named_children()
                if name != "2"
            }
        )
    )
    callback = GradientNormCallback(every_n_updates=2, per_layer=True)
    trainer = train(make_trainer(make_network(), callbacks=[probe, callback]), **clipping)
    sampled = seen[0::2]  # the updates 1, 3, 5 of 6, of which the first epoch has two
    for epoch, norms in enumerate((sampled[:2], sampled[2:])):
        for layer in ("0", "1", "3"):
            mean = sum(each[layer] for each in norms) / len(norms)
            assert values_of(trainer, f"train_gradient_norm_{layer}")[epoch] == pytest.approx(mean, rel=1e-5)
        totals = [sum(norm**2 for norm in each.values()) ** 0.5 for each in norms]
        assert values_of(trainer, "train_gradient_norm")[epoch] == pytest.approx(sum(totals) / len(totals), rel=1e-5)


def test_without_clipping_the_norm_is_that_which_clipping_would_compute():
    def run(**kwargs):
        trainer = make_trainer(make_network(), callbacks=[GradientNormCallback()])
        return values_of(train(trainer, **kwargs), "train_gradient_norm")

    assert run() == pytest.approx(run(gradient_clip_norm=float("inf")), rel=1e-6)


def test_an_epoch_in_which_no_update_was_looked_at_records_nothing():
    trainer = make_trainer(
        callbacks=[GradientNormCallback(every_n_updates=100), UpdateRatioCallback(every_n_updates=100)]
    )
    train(trainer)
    assert len(values_of(trainer, "train_gradient_norm")) == len(values_of(trainer, "train_update_ratio")) == 1


def test_sparse_gradients_and_parameters_outside_the_model_have_norms_too():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, outputs, targets):
            return (self.scale * outputs.mean(dim=1) - targets).square().mean()

    loss = Loss()
    model = nn.Embedding(4, 3, sparse=True)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    callbacks = [GradientNormCallback(per_layer=True), UpdateRatioCallback(every_n_updates=1)]
    trainer = Trainer(model, loss, optimizer, callbacks=callbacks)
    data = TensorDataset(torch.tensor([0, 1, 1, 2]), torch.ones(4, 3).mean(dim=1))
    trainer.train(data, num_epochs=1, per_device_batch_size=4)
    layers = {"model", "outside_the_model"}
    for metric in ("train_gradient_norm", "train_update_ratio"):
        assert {f"{metric}_{layer}" for layer in layers} <= trainer.run_history.get_metric_names()
    of_layers = [values_of(trainer, f"train_gradient_norm_{layer}")[0] for layer in layers]
    assert values_of(trainer, "train_gradient_norm")[0] == pytest.approx(sum(norm**2 for norm in of_layers) ** 0.5)


@pytest.mark.parametrize("is_single", [True, False])
def test_the_update_ratio_is_that_of_the_weights_before_and_after(is_single):
    weights = []
    record = lambda trainer, **_: weights.append([p.detach().clone() for p in trainer.model.parameters()])  # noqa: E731
    probe = Probe(on_optimizer_step_start=record, on_optimizer_step_end=record)
    model = make_network()
    with torch.no_grad():
        model[1].bias.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if not is_single:
        optimizer = [
            torch.optim.SGD(model[0].parameters(), lr=0.1),
            torch.optim.AdamW([*model[1:].parameters()], lr=0.01),
        ]
    callback = UpdateRatioCallback(every_n_updates=3)
    trainer = Trainer(model, nn.functional.mse_loss, optimizer, callbacks=[probe, callback])
    train(trainer)
    ratios, ratios_of_first = [], []
    for before, after in zip(weights[0::6], weights[1::6], strict=True):  # every third update
        changes = [new - old for new, old in zip(after, before, strict=True)]
        ratios.append(norm_of(changes) / norm_of(before))
        ratios_of_first.append(norm_of(changes[:2]) / norm_of(before[:2]))
    assert values_of(trainer, "train_update_ratio") == pytest.approx(ratios, rel=1e-4)  # one in each epoch
    assert values_of(trainer, "train_update_ratio_0") == pytest.approx(ratios_of_first, rel=1e-4)


def test_layers_without_weight_have_no_update_ratio():
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    trainer = train(make_trainer(model, callbacks=[UpdateRatioCallback(every_n_updates=100)]))
    assert "train_update_ratio" not in trainer.run_history.get_metric_names()


@pytest.mark.parametrize("step", [3, 4])  # after an update, and within a window
def test_a_resumed_run_records_the_same_norms_ratios_and_rates(tmp_path, step):
    def run(**kwargs):
        callbacks = [
            GradientNormCallback(every_n_updates=2, per_layer=True),
            UpdateRatioCallback(every_n_updates=2),
            LearningRateCallback(every_n_updates=2),
            LayerStatisticsCallback(every_n_updates=2),
            SaveTrainingStateCallback(tmp_path, save_every_n_steps=1, save_at_end=False),
        ]
        trainer = make_trainer(make_network(), callbacks=callbacks)
        train(trainer, create_scheduler_fn=lambda each: torch.optim.lr_scheduler.StepLR(each, 1, 0.9), **kwargs)
        names = trainer.run_history.get_metric_names()
        statistics = callbacks[3]
        arrays = [
            look(name) for look in (statistics.activations, statistics.gradients) for name in ("mean", "std", "zeros")
        ]
        return (
            {name: values_of(trainer, name) for name in names},
            statistics.updates,
            [each.tolist() for each in arrays],
        )

    expected = run()
    assert len(expected[1]) == 3
    assert run(resume_from=tmp_path / f"step_{step}") == expected


# --- learning rates ----------------------------------------------------------------------------------------------


def record_rates(make_optimizer, callback, **kwargs):
    model = make_network()
    trainer = Trainer(model, nn.functional.mse_loss, make_optimizer(model), callbacks=[callback])
    train(trainer, **kwargs)
    names = trainer.run_history.get_metric_names() - {"train_loss_epoch"}
    return {name: pytest.approx(values_of(trainer, name)) for name in names}


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_the_rate_of_an_epoch_is_that_of_its_last_update():
    recorded = record_rates(
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0), LearningRateCallback(), create_scheduler_fn=halving
    )
    assert recorded == {"lr": [0.5**2, 0.5**5], "momentum": [0, 0]}


def test_rates_are_recorded_within_the_epoch_with_the_number_of_updates():
    callback = LearningRateCallback(2, momentum=False)
    recorded = record_rates(
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0), callback, create_scheduler_fn=halving
    )
    assert recorded == {"lr_update": [2, 3, 4, 6], "lr": [0.5, 0.25, 0.125, 0.5**5]}


def test_each_group_and_each_optimizer_has_a_rate_of_its_own():
    def groups(model):
        return torch.optim.AdamW(
            [{"params": model[:3].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "name": "head"}],
            lr=0.2,
            betas=(0.8, 0.9),
        )

    recorded = record_rates(groups, LearningRateCallback())
    assert recorded == {
        "lr_0": [0.1, 0.1],
        "lr_head": [0.2, 0.2],
        "momentum_0": [0.8, 0.8],
        "momentum_head": [0.8, 0.8],
    }

    def several(model):
        return {
            "body": torch.optim.SGD(model[:3].parameters(), lr=0.1, momentum=0.9),
            "head": torch.optim.Adagrad(model[3].parameters(), lr=0.2),
        }

    recorded = record_rates(several, LearningRateCallback())
    assert recorded == {"lr_body": [0.1, 0.1], "momentum_body": [0.9, 0.9], "lr_head": [0.2, 0.2]}


def test_a_rate_that_is_a_tensor_is_recorded_as_it_was():
    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), lr=torch.tensor(1.0), foreach=False)

    recorded = record_rates(optimizer, LearningRateCallback(1, momentum=False), create_scheduler_fn=halving)
    assert recorded["lr"] == [0.5**index for index in range(6)]
