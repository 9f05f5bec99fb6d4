"""Mixed precision on the CPU, in processes whose first accelerator has it."""

from __future__ import annotations

from _support import run_python

BF16 = """
import copy, pickle
import torch
from _support import make_dataset, make_model, make_trainer, Probe

def forward_of(model):
    return {name: value for name, value in vars(model).items() if "forward" in name}

kinds = []
probe = Probe(on_train_step_end=lambda trainer, batch_output, **k: kinds.append(batch_output["model_outputs"].dtype),
              on_eval_step_end=lambda trainer, batch_output, **k: kinds.append(batch_output["model_outputs"].dtype))

class Linear(torch.nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        inner.append(y.dtype)
        return y

inner = []
model = Linear(3, 1)
attributes, before = set(vars(model)), forward_of(model)
trainer = make_trainer(model, mixed_precision="bf16", callbacks=[probe])
accelerator = trainer._accelerator
dataset = make_dataset(8)
trainer.evaluate(dataset)
for _ in range(2):
    weights = model.weight.clone()
    trainer.train(dataset, num_epochs=1, eval_dataset=dataset, per_device_batch_size=4)
    assert not torch.equal(model.weight, weights)
    assert model.weight.dtype == torch.float32
    assert trainer.model is model
    assert set(vars(model)) == attributes, set(vars(model)) - attributes
    assert forward_of(model) == before
    assert trainer.run_config.mixed_precision == "bf16"
    assert trainer._accelerator is accelerator
    assert "forward" not in vars(model)
assert set(inner) == {torch.bfloat16}, inner
assert set(kinds) == {torch.float32}, kinds      # what Accelerate passes to the loss function
inner.clear()
model(dataset.tensors[0])
assert inner == [torch.float32]
pickle.dumps(model.state_dict())
copy.deepcopy(model)

model = make_model()
forward = model.forward = lambda inputs: inputs.sum(dim=1, keepdim=True) * model.weight.sum()
make_trainer(model).train(dataset, num_epochs=1)
assert model.forward is forward

print("done")
"""


def test_a_bf16_run_restores_the_forward_method_and_can_be_repeated():
    assert run_python(BF16) == "done\n"


SCALED = """
import torch
from accelerate import AutocastKwargs
from _support import EventRecorder, Probe, make_dataset, make_trainer, weights_of, assert_same_weights
from torch.optim.lr_scheduler import StepLR

def use_scaler(accelerator):
    # Accelerate refuses fp16 without a GPU. Only the scaler is tested here; the model computes in fp32.
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

def run(has_scaler, num_steps=2, **kwargs):
    seen = []
    probe = Probe(on_optimizer_step_start=lambda trainer, **k: seen.append(trainer.model.weight.grad.clone()))
    trainer = make_trainer(callbacks=[probe])
    if has_scaler:
        use_scaler(trainer._accelerator)
    for _ in range(2):
        trainer.train(make_dataset(18), num_epochs=2, per_device_batch_size=4, gradient_clip_value=0.05,
                      gradient_accumulation_steps=num_steps, **kwargs)
        trainer.evaluate(make_dataset(4))
    return trainer, seen

plain, gradients = run(False)
scaled, unscaled = run(True)
assert_same_weights(weights_of(plain.model), weights_of(scaled.model))
assert all(torch.equal(one, other) for one, other in zip(gradients, unscaled, strict=True))
assert scaled._accelerator.scaler.get_scale() == 1024.0

recorder = EventRecorder()
trainer = make_trainer(callbacks=[recorder])
accelerator = trainer._accelerator
use_scaler(accelerator)
def overflow(trainer, batch_output, step, **kwargs):
    if step == 1:
        batch_output["loss"] = batch_output["loss"] * float("inf")
recorder.reactions["on_backward_start"] = overflow
rates = []
recorder.reactions["on_optimizer_step_end"] = lambda trainer, **k: rates.append(
    (trainer.optimizer.param_groups[0]["lr"], trainer.model.weight.isfinite().all().item()))
trainer.train(make_dataset(12), num_epochs=1, per_device_batch_size=4,
              create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
assert rates == [(0.05, True), (0.05, True), (0.025, True)], rates
assert accelerator.scaler.get_scale() == 512.0
print("done")
"""


def test_scaled_gradients_are_unscaled_once_and_a_skipped_update_steps_no_scheduler():
    """The gradient scaler of fp16 also works on the CPU. Its powers of two scale without rounding errors."""
    assert run_python(SCALED) == "done\n"
