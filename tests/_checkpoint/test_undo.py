"""What is changed before a state is refused is put back: objects, optimizers, gradients and random numbers."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn

from _saved import assert_equal
from _support import make_model
from pytorch_accelerated._checkpoint.undo import undone_on_error


class Inner:
    def __init__(self):
        self.number = 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Part(Inner):
    def __init__(self):
        super().__init__()
        self.values = defaultdict(list, a=[1], b=[2])
        self.list, self.set, self.deque = [1, [2]], {1}, deque([1], maxlen=2)
        self.ordered, self.counter = OrderedDict(a=1), Counter("aab")
        self.tensor, self.module = torch.ones(2), nn.BatchNorm1d(2)
        self.inner, self.inners = Inner(), {"a": [Inner()]}
        self.other, self.itself = object(), self


def content(part):
    return {
        "names": sorted(vars(part)),
        "values": copy.deepcopy([part.values, part.list, part.set, part.deque, part.ordered]),
        "numbers": [part.number, part.inner.number, part.inners["a"][0].number],
        "tensors": {name: value.clone() for name, value in part.module.state_dict().items()},
        "tensor": part.tensor.clone(),
        "identities": [id(value) for value in vars(part).values()],
    }


def change(part):
    part.number = part.inner.number = part.inners["a"][0].number = 9
    part.values.clear()
    part.values["c"] = [9]
    part.list[1].append(9)
    part.list.pop(0)
    part.set.add(9)
    part.deque.append(9)
    part.ordered.pop("a")
    part.counter.clear()
    part.tensor.zero_()
    part.module(torch.randn(4, 2))
    part.inner = Inner()
    part.added = 9


def refuse(act, model=None, optimizers=(), parts=(), others=(), error=ValueError):
    """Change something, and fail."""
    with undone_on_error(model, optimizers, parts, others):
        act()
        raise error("mine")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_attributes_of_a_part_are_put_back(error):
    part = Part()
    before = content(part)
    with pytest.raises(error, match="mine"):
        refuse(lambda: change(part), parts=[part], error=error)
    assert_equal(content(part), before)


def test_parts_in_containers_are_put_back():
    part = Part()
    before = content(part)
    with pytest.raises(ValueError, match="mine"):
        refuse(lambda: change(part), parts=[{"a": [part]}, None, 3])
    assert_equal(content(part), before)


def test_without_an_error_nothing_is_put_back():
    part = Part()
    with undone_on_error(None, (), [part]):
        change(part)
    assert part.number == part.added == 9


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("has_trained", [False, True])
def test_an_optimizer_is_put_back(make, has_trained):
    model = make_model()
    optimizer = make([{"params": [model.weight]}, {"params": [model.bias], "lr": torch.tensor(0.5)}], lr=0.1)
    if has_trained:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    before, attributes = copy.deepcopy(optimizer.state_dict()), set(vars(optimizer))
    other = make(make_model().parameters(), lr=0.3).state_dict()
    other["param_groups"] = [{**other["param_groups"][0], "params": [number]} for number in (0, 1)]

    def act():
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.7, total_steps=5, cycle_momentum=False)
        optimizer.load_state_dict(other)
        optimizer.mine = 1

    with pytest.raises(ValueError, match="mine"):
        refuse(act, model, [optimizer, None])
    assert_equal(str(optimizer.state_dict()), str(before))
    assert set(vars(optimizer)) == attributes


def test_gradients_and_random_numbers_are_put_back():
    model = make_model()
    model(torch.ones(1, 3)).sum().backward()
    gradient, state = model.weight.grad.clone(), torch.get_rng_state()
    with pytest.raises(ValueError, match="mine"):
        refuse(lambda: (model.zero_grad(), torch.rand(3)), model)
    assert torch.equal(model.weight.grad, gradient)
    assert torch.equal(torch.get_rng_state(), state)


class Adapter(Inner):
    """Its state is in a generator."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


class Broken(Inner):
    def state_dict(self):
        raise LookupError("not yet")


class RefusesItself(Inner):
    def load_state_dict(self, state):
        raise LookupError("never")


def test_state_that_is_elsewhere_is_loaded_again():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    others = [Broken(), RefusesItself(), Adapter(generator)]
    with pytest.raises(ValueError, match="mine"):
        refuse(lambda: torch.rand(3, generator=generator), others=others)
    assert torch.equal(generator.get_state(), before)
