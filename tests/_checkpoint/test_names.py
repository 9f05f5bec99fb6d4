"""Saved and live names are mapped one to one, whatever is compiled and however the modules are called."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn

from _support import Probe, assert_same_weights, make_dataset, make_trainer, weights_of
from pytorch_accelerated._checkpoint import names
from pytorch_accelerated._checkpoint.model_state import load_model_state
from pytorch_accelerated._models.wrappers import is_compiled
from pytorch_accelerated.callbacks import ModelEmaCallback
from pytorch_accelerated.exceptions import CheckpointError

compiled = partial(torch.compile, backend="eager")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)

    def forward(self, inputs):
        hidden = self.body(inputs)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return self.head(hidden)


def whole(model):
    return compiled(model)


def part(model):
    model.head = compiled(model.head)
    return model


def nested(model):
    model.body[2][0] = compiled(model.body[2][0])
    model.body = compiled(model.body)
    return model


def listed(model):
    model.layers = nn.ModuleList([compiled(layer) for layer in model.layers])
    return model


def shared(model):
    model.head.weight = nn.Parameter(model.head.weight[:, :1].repeat(1, 4).detach())
    model.layers[1] = model.layers[0]
    model.layers = nn.ModuleList([compiled(model.layers[0])] * 2)
    return model


def tied(model):
    model.layers[1].weight = model.layers[0].weight
    model.layers[1] = compiled(model.layers[1])
    return model


class Named(nn.Module):
    """Calls a module by an attribute that looks compiled."""

    def __init__(self, name, module):
        super().__init__()
        self.name = name
        self.add_module(name, module)

    def forward(self, inputs):
        return self.get_submodule(self.name)(inputs)


def named(name):
    def change(model):
        model.head = Named(name, model.head)
        return model

    change.__name__ = name
    return change


def both(model):
    model.head = compiled(Named("_orig_mod", model.head))
    return model


COMPILED = [whole, part, nested, listed, tied]
CASES = [*COMPILED, shared, named("my_orig_mod"), named("_orig_mod"), named("_orig_mod_2"), both]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_of(change):
    """Return the same model as ``change`` makes, without a compiled part."""
    model = Net()
    if change is tied:
        model.layers[1].weight = model.layers[0].weight
    return model


@pytest.mark.parametrize("change", CASES)
def test_portable_names_are_one_to_one_and_lead_back(change):
    model = change(Net())
    state = model.state_dict()
    portable = names.portable_state_dict(model)
    assert len(portable) == len(state)
    assert list(names.live_state_dict(model, portable)) == list(state)


@pytest.mark.parametrize("change", COMPILED)
def test_names_are_those_of_the_model_that_is_not_compiled(change):
    plain = plain_of(change)
    model = change(Net())
    assert list(names.portable_state_dict(model)) == list(plain.state_dict())
    assert list(names.portable_parameters(model)) == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("change", COMPILED)
def test_what_is_saved_compiled_loads_plain_and_back(change, tmp_path):
    plain, model = plain_of(change), change(Net())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    make_trainer(model).save_checkpoint(tmp_path / "compiled.pt", save_optimizer=False)
    make_trainer(plain).load_checkpoint(tmp_path / "compiled.pt", load_optimizer=False)
    assert_same_weights(weights_of(plain), names.portable_state_dict(model))
    other = change(Net())
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    make_trainer(other).load_checkpoint(tmp_path / "plain.pt", load_optimizer=False)
    assert_same_weights(weights_of(other), weights_of(model))


@pytest.mark.parametrize("change", CASES)
def test_what_pytorch_saved_is_loaded(change, tmp_path):
    """With the names that the model has while it is compiled."""
    model, other = change(Net()), change(Net())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    make_trainer(other).load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
    assert_same_weights(weights_of(other), weights_of(model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of PyTorch
@pytest.mark.parametrize("change", CASES)
def test_a_run_resumed_within_an_accumulation_window_is_exact(change, tmp_path):
    def run(save_at=None, **kwargs):
        steps = itertools.count(1)

        def save(trainer):
            if next(steps) == save_at:
                trainer.save_training_state(tmp_path / "state")

        average = ModelEmaCallback(save_path=tmp_path / "ema.pt", evaluate_during_training=False)
        trainer = make_trainer(change(Net()), callbacks=[average, Probe(on_train_step_end=save)])
        trainer.train(make_dataset(20), num_epochs=2, per_device_batch_size=2, gradient_accumulation_steps=4, **kwargs)
        return {**weights_of(trainer.get_model()), **weights_of(average.ema_model)}

    expected = run(save_at=6)
    assert_same_weights(run(resume_from=tmp_path / "state"), expected)


@pytest.mark.parametrize("state", [("weight", "_orig_mod.weight"), ("a._orig_mod.weight", "a.weight")])
def test_names_that_collide_are_refused(state):
    model = nn.Linear(2, 1, bias=False) if state[0] == "weight" else nn.Sequential()
    if not list(model.parameters()):
        model.add_module("a", nn.Linear(2, 1, bias=False))
    before = copy.deepcopy(weights_of(model))
    with pytest.raises(CheckpointError, match="two entries with the same name"):
        load_model_state(model, {name: torch.ones(1, 2) for name in state}, "The file")
    assert_same_weights(weights_of(model), before)


def test_names_that_collide_in_a_checkpoint_are_refused(tmp_path):
    torch.save({"a.weight": torch.ones(1, 2), "a._orig_mod.weight": torch.zeros(1, 2)}, tmp_path / "model.pt")
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False)})
    with pytest.raises(CheckpointError, match="two entries with the same name"):
        make_trainer(model).load_checkpoint(tmp_path / "model.pt", load_optimizer=False)


def test_two_modules_whose_names_differ_by_the_segment_only_are_both_kept(tmp_path):
    def make():
        model = Named("_orig_mod", nn.Linear(2, 1, bias=False))
        model.register_parameter("weight", nn.Parameter(torch.rand(1, 2)))
        return model

    model, other = make(), make()
    make_trainer(model).save_checkpoint(tmp_path / "model.pt", save_optimizer=False)
    make_trainer(other).load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
    assert_same_weights(weights_of(other), weights_of(model))


def test_earlier_versions_removed_the_segment_from_names_of_the_user():
    model = Named("_orig_mod", nn.Linear(2, 1, bias=False))
    load_model_state(model, {"weight": torch.ones(1, 2)}, "The file")
    assert model.state_dict()["_orig_mod.weight"].eq(1).all()


def test_a_module_of_the_user_is_no_compiled_one():
    model = Named("_orig_mod", nn.Linear(2, 1))
    assert not is_compiled(model)
    assert is_compiled(compiled(model))
