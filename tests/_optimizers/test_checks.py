"""What is refused, or warned of, before the first update."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from _support import make_dataset, make_model, mse, run_python, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._optimizers.checks import check_closure, check_group
from pytorch_accelerated._optimizers.group import OptimizerGroup
from pytorch_accelerated.callbacks import TrainerCallback


class Adds(TrainerCallback):
    """Gives the optimizer what it lacks when the run starts."""

    def on_training_run_start(self, trainer, **kwargs):
        trainer.optimizer.add_param_group({"params": [trainer.model[1].weight, trainer.model[1].bias]})


def make_net():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


# --- parameters that no optimizer holds --------------------------------------------------------------------------


def test_a_head_that_the_optimizer_does_not_hold_is_named_before_the_first_update():
    model = make_net()
    optimizer = sgd(model.parameters())
    model[1] = nn.Linear(3, 1)
    with pytest.warns(UserWarning, match=r"does not hold 2 of the 4 parameters.*not trained: '1.weight', '1.bias'. If"):
        train(Trainer(model, mse, optimizer, callbacks=()))


def test_of_many_parameters_some_are_named():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 1))
    with pytest.warns(UserWarning, match="'0.weight', '0.bias', '1.weight', '1.bias' and 4 more. If"):
        train(Trainer(model, mse, sgd(model[4].parameters()), callbacks=()))


class Turning(Trainer):
    """Has an optimizer of its own, or several."""

    def __init__(self, model, others, **kwargs):
        super().__init__(model, mse, sgd(model[0].parameters()), callbacks=(), **kwargs)
        self.others = others


@pytest.mark.parametrize(
    "others", [lambda it: it, lambda it: [it], lambda it: {"head": it}], ids=["optimizer", "list", "dictionary"]
)
def test_what_another_optimizer_of_the_trainer_holds_is_not_missing(others):
    model = make_net()
    train(Turning(model, others(sgd(model[1].parameters()))))


def test_frozen_parameters_and_those_that_a_callback_adds_are_not_missing():
    model = make_net()
    train(Trainer(model, mse, sgd(model[0].parameters()), callbacks=[Adds()]))
    model = make_net()
    model[1].requires_grad_(False)
    train(Trainer(model, mse, sgd(model[0].parameters()), callbacks=()))
    model = make_net()
    train(Trainer(model, mse, [sgd(model[0].parameters()), sgd(model[1].parameters())], callbacks=()))


# --- what the trainer cannot do ----------------------------------------------------------------------------------


class NeedsLoss(torch.optim.SGD):
    def step(self, loss, *, scale):
        return super().step()


def test_a_step_that_requires_unknown_arguments_is_refused_with_their_names():
    model, steps = make_model(), []

    class Counting(Trainer):
        def calculate_train_batch_loss(self, batch):
            steps.append(1)
            return super().calculate_train_batch_loss(batch)

    words = r"The `step` of `optimizer`, a NeedsLoss, requires `loss`, `scale`, .* Override `optimizer_step` to pass"
    for optimizer in (NeedsLoss(model.parameters()), [NeedsLoss([model.weight]), sgd([model.bias])]):
        with pytest.raises(TypeError, match=words):
            train(Counting(model, mse, optimizer, callbacks=()))
    assert steps == []


def test_a_subclass_passes_the_arguments_itself():
    class Passing(Trainer):
        def optimizer_step(self):
            self.optimizer.optimizer.step(0.0, scale=1)

    model = make_model()
    train(Passing(model, mse, NeedsLoss(model.parameters()), callbacks=()))


def test_a_parameter_in_two_optimizers_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"shape \(1, 3\) is held by two of the optimizers, 'a' and 'b'"):
        train(Trainer(model, mse, {"a": sgd(model.parameters()), "b": sgd([model.weight])}, callbacks=()))


def test_several_optimizers_are_refused_for_a_sharded_model():
    model = make_model()
    group = OptimizerGroup([sgd([model.weight]), sgd([model.bias])])
    with pytest.raises(ValueError, match="has 2 optimizers, but FSDP and DeepSpeed prepare a single one"):
        check_group(group, is_sharded=True)
    check_group(group, is_sharded=False)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"has_scaler": True, "is_sharded": False}, 'fp16, whose gradient scaler.*mixed_precision="bf16"` or none'),
        ({"has_scaler": False, "is_sharded": True}, "FSDP or DeepSpeed.*DDP or one process"),
    ],
)
def test_a_closure_is_refused_where_it_would_not_work(kwargs, words):
    model = make_model()
    for optimizer in (torch.optim.LBFGS(model.parameters()), [sgd([model.weight]), torch.optim.LBFGS([model.bias])]):
        with pytest.raises(ValueError, match=f"`optimizer` is a LBFGS, which computes loss and gradients.*{words}"):
            check_closure(Trainer(model, mse, optimizer, callbacks=()).optimizer, **kwargs)
    assert not check_closure(sgd(model.parameters()), **kwargs)


SCALED = """
import torch
from torch import nn
from accelerate import AutocastKwargs
from _support import Probe, make_dataset, mse, train, weights_of, assert_same_weights
from _optimizing import Net
from pytorch_accelerated import Trainer

def use_scaler(accelerator):
    # Accelerate refuses fp16 without a GPU. Only the scaler is tested here; the model computes in fp32.
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

def run(has_scaler, *callbacks):
    net = Net()
    optimizers = {"a": torch.optim.SGD(net.matrices(), lr=0.1), "b": torch.optim.AdamW(net.others(), lr=0.1)}
    trainer = Trainer(net, mse, optimizers, callbacks=callbacks)
    if has_scaler:
        use_scaler(trainer._accelerator)
    train(trainer, make_dataset(16, 4), gradient_clip_norm=0.05, gradient_accumulation_steps=2, num_epochs=2,
          train_dataloader_kwargs={"shuffle": False})
    return trainer

torch.manual_seed(1)
plain = run(False)
torch.manual_seed(1)
scaled = run(True)
assert_same_weights(weights_of(plain.model), weights_of(scaled.model))

def overflow(trainer, batch_output, **kwargs):
    if trainer.progress.num_updates == 1:
        batch_output["loss"] = batch_output["loss"] + 0 * trainer.model.head.bias.sum() * float("inf")
weights = []
def remember(trainer, **kwargs):
    weights.append(weights_of(trainer.model))
note = Probe(on_backward_start=overflow, on_optimizer_step_end=remember)
trainer = run(True, note)
assert_same_weights(weights[0], weights[1])  # both optimizers have left out the update, though only one overflowed
assert not torch.equal(weights[1]["body.weight"], weights[2]["body.weight"])
assert trainer._accelerator.scaler.get_scale() == 512.0

net = Net()
trainer = Trainer(net, mse, torch.optim.LBFGS(net.parameters()), callbacks=())
use_scaler(trainer._accelerator)
try:
    train(trainer, make_dataset(16, 4))
except ValueError as error:
    assert "`optimizer` is a LBFGS" in str(error)
    print("done")
"""


def test_a_gradient_scaler_serves_several_optimizers_together_and_no_closure():
    assert run_python(SCALED) == "done\n"


def test_a_plain_optimizer_is_neither_warned_of_nor_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Trainer(model := make_model(), mse, sgd(model.parameters()), callbacks=()), make_dataset(8))
