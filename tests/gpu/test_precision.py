"""Mixed precision on a GPU: bf16, and fp16 with a gradient scaler."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import _support
from _support import Probe, losses, recorder_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback

pytestmark = pytest.mark.usefixtures("_fresh_accelerate_state")

NUM_UPDATES = 12
"""Three epochs of eight batches, with two batches per update."""


def make_trainer(mixed_precision, callbacks=(), lr=0.05):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Trainer(model, nn.MSELoss(), optimizer, callbacks, mixed_precision=mixed_precision, seed=1)


train = functools.partial(
    _support.train,
    dataset=64,
    num_epochs=3,
    per_device_batch_size=8,
    gradient_accumulation_steps=2,
    create_scheduler_fn=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[name])), name


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_mixed_precision_lowers_the_loss_and_keeps_the_weights_in_fp32(mixed_precision):
    def weight_dtype(trainer):
        with torch.autocast(trainer.device.type, enabled=False):
            return trainer.model[0].weight.dtype

    probe, seen = recorder_of(weight_dtype, "on_train_step_end")
    trainer = make_trainer(mixed_precision, [probe])
    train(trainer, num_epochs=20, create_scheduler_fn=None)
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    assert set(seen) == {torch.float32}
    assert (trainer._accelerator.scaler is not None) == (mixed_precision == "fp16")


@pytest.mark.parametrize("limit", ["gradient_clip_norm", "gradient_clip_value"])
def test_gradients_are_unscaled_before_they_are_clipped_once_per_update(limit):
    norms, largest = [], []

    def look(trainer, **_):
        gradients = [parameter.grad for parameter in trainer.model.parameters()]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        largest.append(max(gradient.abs().max().item() for gradient in gradients))

    trainer = make_trainer("fp16", [Probe(on_optimizer_step_end=look)])
    train(trainer, **{limit: 0.01})
    assert len(norms) == NUM_UPDATES
    values = [value for value in (norms if limit.endswith("norm") else largest) if value == value]
    assert values
    assert max(values) == pytest.approx(0.01, rel=1e-2), "the bound is reached, so the gradients were unscaled first"


@pytest.mark.parametrize("skipped", [(3,), (0, 1)], ids=["mid-run", "the first two"])
def test_an_update_skipped_by_the_scaler_changes_no_weights_and_steps_no_scheduler(skipped):
    """The gradients overflow, as they do if the scale is too large."""
    weights, rates = [], []

    class Overflowing(Trainer):
        def backward_step(self, loss):
            super().backward_step(loss)
            if self.progress.num_updates in skipped:
                next(self.model.parameters()).grad.fill_(float("inf"))

    def look(trainer, **_):
        weights.append(trainer.model[0].weight.detach().clone())
        rates.append(trainer.optimizer.param_groups[0]["lr"])

    plain = make_trainer("fp16")
    trainer = Overflowing(
        plain.model, nn.MSELoss(), plain.optimizer, [Probe(on_optimizer_step_end=look)], mixed_precision="fp16", seed=1
    )
    before = trainer.model[0].weight.detach().clone()
    train(trainer)
    weights = [before.to(weights[0].device), *weights]
    unchanged = {update for update in range(NUM_UPDATES) if torch.equal(weights[update], weights[update + 1])}
    assert unchanged >= {*skipped}
    num_steps = 0
    for update, rate in enumerate(rates):
        num_steps += update not in unchanged
        assert rate == pytest.approx(0.05 * 0.5**num_steps)
    assert trainer._accelerator.scaler.get_scale() <= 2**16 / 2 ** len(skipped)


def test_a_resumed_fp16_run_ends_with_the_same_weights_and_scale(tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        uninterrupted = make_trainer(
            "fp16", [SaveTrainingStateCallback(tmp_path, save_every_n_steps=5, save_at_end=False)]
        )
        train(uninterrupted)
        for step in (5, 10, 20):  # step 5 is within an accumulation window
            resumed = make_trainer("fp16")
            train(resumed, resume_from=tmp_path / f"step_{step}")
            assert_same(uninterrupted.model.state_dict(), resumed.model.state_dict())
            assert_same(uninterrupted._accelerator.scaler.state_dict(), resumed._accelerator.scaler.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
