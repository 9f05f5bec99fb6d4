"""The numbers of a training epoch: losses and metrics, accumulated and clipped gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from _support import (
    IN_ORDER,
    Batches,
    Probe,
    gradients_of,
    losses,
    make_dataset,
    make_model,
    make_trainer,
    mse,
    recorder_of,
    train,
    weights_of,
)
from pytorch_accelerated import Trainer

# --- losses and metrics ------------------------------------------------------------------------------------------


def test_the_epoch_loss_is_the_mean_over_samples_not_over_batches():
    dataset = make_dataset(10)  # batches of 4, 4 and 2
    trainer = make_trainer(lr=0.0)
    train(trainer, dataset, eval_dataset=make_dataset(7, seed=3))
    model = trainer.model
    assert losses(trainer) == [pytest.approx(mse(model(dataset.tensors[0]), dataset.tensors[1]).item(), rel=1e-6)]
    inputs, targets = make_dataset(7, seed=3).tensors
    assert losses(trainer, "eval_loss_epoch") == [pytest.approx(mse(model(inputs), targets).item(), rel=1e-6)]


def test_metrics_of_a_step_are_weighted_like_the_loss():
    class WithMetrics(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {**super().calculate_train_batch_loss(batch), "metrics": self.metrics(batch)}

        def calculate_eval_batch_loss(self, batch):
            return {**super().calculate_eval_batch_loss(batch), "metrics": self.metrics(batch)}

        def metrics(self, batch):
            mean = batch[0].mean()
            return {"mean": mean, "as_number": mean.item(), "size": len(batch[0]), "hit": True}

    trainer = make_trainer(cls=WithMetrics, lr=0.0)
    dataset, evaluated = make_dataset(10), make_dataset(6, seed=3)
    train(trainer, dataset, eval_dataset=evaluated, gradient_accumulation_steps=2)
    trainer.evaluate(evaluated, per_device_batch_size=4)
    for stage, tensor, size in (
        ("train", dataset.tensors[0], (16 + 16 + 4) / 10),
        ("eval", evaluated.tensors[0], (16 + 4) / 6),
        ("evaluation", evaluated.tensors[0], (16 + 4) / 6),
    ):
        for name in ("mean", "as_number"):
            assert losses(trainer, f"{stage}_{name}") == [pytest.approx(tensor.mean().item(), abs=1e-6)]
        assert losses(trainer, f"{stage}_size") == [pytest.approx(size)]
        assert losses(trainer, f"{stage}_hit") == [1.0]


def test_a_metric_of_only_some_batches_is_averaged_over_those_batches():
    class Sometimes(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "metrics": {"size": 2.0} if len(batch[0]) == 2 else None}

    trainer = make_trainer(cls=Sometimes)
    train(trainer, make_dataset(10))
    assert losses(trainer, "train_size") == [2.0]


def test_callbacks_receive_the_unscaled_loss_and_the_unchanged_output():
    seen = []

    class Remembering(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            self.remembered = (output["loss"], output["loss"].item(), dict(output))
            return output

    def compare(trainer, batch_output, **kwargs):
        loss, value, entries = trainer.remembered
        seen.append(batch_output["loss"] is loss and loss.item() == value and dict(batch_output) == entries)

    probe = Probe(on_backward_start=compare, on_train_step_end=compare)
    train(make_trainer(cls=Remembering, callbacks=[probe]), gradient_accumulation_steps=4)
    assert seen == [True] * 8


def test_a_callback_may_replace_the_loss_before_the_backward_pass():
    def double(trainer, batch_output, **kwargs):
        batch_output["loss"] = batch_output["loss"] * 2

    results = []
    for callbacks in ((), [Probe(on_backward_start=double)]):
        probe, gradients = recorder_of(gradients_of, "on_optimizer_step_start")
        trainer = make_trainer(lr=0.0, callbacks=[*callbacks, probe])
        train(trainer, make_dataset(4))
        results.append((losses(trainer)[0], gradients[0]["weight"]))
    assert results[1][0] == pytest.approx(2 * results[0][0], rel=1e-6)
    torch.testing.assert_close(results[1][1], 2 * results[0][1])


def test_training_does_not_modify_the_users_tensors():
    dataset = make_dataset(10)
    before = [tensor.clone() for tensor in dataset.tensors]
    train(make_trainer(), dataset, eval_dataset=dataset, gradient_accumulation_steps=3, gradient_clip_value=0.1)
    assert all(torch.equal(old, new) for old, new in zip(before, dataset.tensors, strict=True))


# --- accumulation: an update equals that of one big batch --------------------------------------------------------


@pytest.mark.parametrize("num_samples", [16, 18, 21, 25])
def test_accumulation_does_not_change_the_epoch_loss(num_samples):
    """Four batches of two make an update; the last update and the last batch may be short."""
    results = []
    for num_steps in (1, 4):
        trainer = make_trainer(lr=0.0)
        dataset = make_dataset(num_samples)
        train(trainer, dataset, per_device_batch_size=2, gradient_accumulation_steps=num_steps)
        results.extend(losses(trainer))
    assert results[1] == pytest.approx(results[0], abs=1e-6)


@pytest.mark.parametrize("num_samples", [16, 18, 21, 25])
@pytest.mark.parametrize("is_sized", [True, False])
def test_an_accumulated_gradient_equals_that_of_one_big_batch(num_samples, is_sized):
    dataset = make_dataset(num_samples)
    probe, gradients = recorder_of(gradients_of, "on_optimizer_step_start")
    trainer = make_trainer(lr=0.0, callbacks=[probe])
    data = dataset if is_sized else Batches(dataset, 2)
    train(
        trainer,
        data,
        per_device_batch_size=2,
        gradient_accumulation_steps=4,
        train_dataloader_kwargs=IN_ORDER,
    )
    assert len(gradients) == math.ceil(num_samples / 8)
    for update, gradient in enumerate(gradients):
        model = make_model()
        inputs, targets = dataset[8 * update : 8 * update + 8]
        mse(model(inputs), targets).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=0, atol=1e-6)


def test_training_with_accumulation_ends_with_the_weights_of_training_with_big_batches():
    weights = []
    for batch_size, num_steps in ((8, 1), (2, 4)):
        trainer = make_trainer()
        train(
            trainer,
            make_dataset(21),
            num_epochs=3,
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=num_steps,
            train_dataloader_kwargs=IN_ORDER,
        )
        weights.append(weights_of(trainer.model))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_num_items_in_batch_weights_a_batch_in_loss_and_gradient(as_tensor):
    """As for tokens: the weight of a batch is `num_items_in_batch`, not its number of samples."""
    dataset = TensorDataset(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.zeros(4, 1))
    num_items = [1, 5, 2, 8]

    class Weighted(Trainer):
        def calculate_train_batch_loss(self, batch):
            number = num_items[int(batch[0].item()) - 1]
            loss = self.model(batch[0]).sum()
            number = torch.tensor(number) if as_tensor else number
            return {"loss": loss, "batch_size": 1, "num_items_in_batch": number}

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    probe, gradients = recorder_of(gradients_of, "on_optimizer_step_start")
    trainer = make_trainer(model, lr=0.0, cls=Weighted, callbacks=[probe])
    train(trainer, dataset, per_device_batch_size=1, gradient_accumulation_steps=4, train_dataloader_kwargs=IN_ORDER)
    expected = sum(number * value for number, value in zip(num_items, (1, 2, 3, 4), strict=True)) / sum(num_items)
    assert gradients[0]["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert losses(trainer) == [pytest.approx(expected, rel=1e-6)]


# --- clipping ----------------------------------------------------------------------------------------------------


def test_clipping_by_value_happens_once_per_update_on_the_complete_gradient():
    before, complete = recorder_of(gradients_of, "on_optimizer_step_start")
    after, clipped = recorder_of(gradients_of, "on_optimizer_step_end")
    trainer = make_trainer(lr=0.0, callbacks=[before, after])
    train(trainer, gradient_accumulation_steps=2, gradient_clip_value=0.05)
    assert len(complete) == len(clipped) == 2
    for unclipped, gradient in zip(complete, clipped, strict=True):
        assert unclipped["weight"].abs().max() > 0.05
        torch.testing.assert_close(gradient["weight"], unclipped["weight"].clamp(-0.05, 0.05))
