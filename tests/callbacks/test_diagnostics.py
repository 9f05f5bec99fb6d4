"""The callback that records the gradient norm."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import _support
from _support import Probe, make_trainer
from pytorch_accelerated.callbacks import GradientNormCallback, SaveTrainingStateCallback


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
