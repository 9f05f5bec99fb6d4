"""Several optimizers in one trainer: used like what was given, and like one; each with its scheduler and its state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau

from _optimizing import Net
from _support import IN_ORDER, assert_same_weights, make_dataset, mse, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated._optimizers.group import OptimizerGroup
from pytorch_accelerated.exceptions import CheckpointError
from pytorch_accelerated.schedulers import CosineLrScheduler

DATASET = make_dataset(16, num_features=4)


def named(net):
    return {"matrices": SGD(net.matrices(), lr=0.1, momentum=0.9), "others": AdamW(net.others(), lr=0.01)}


def listed(net):
    return list(named(net).values())


def make(create=named, **kwargs):
    net = Net()
    return Trainer(net, mse, create(net), **{"callbacks": (), **kwargs})


def run(trainer, **kwargs):
    return train(trainer, DATASET, train_dataloader_kwargs=IN_ORDER, **kwargs)


# --- access ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_prepared", [False, True])
def test_it_is_used_like_the_dictionary_that_was_given(is_prepared):
    trainer = make()
    given = trainer.optimizer.optimizers
    optimizer = run(trainer).optimizer if is_prepared else trainer.optimizer
    assert list(optimizer) == list(optimizer.keys()) == ["matrices", "others"]
    assert list(optimizer.values()) == list(given.values())
    assert dict(optimizer.items()) == given
    assert optimizer["others"] is given["others"]
    assert len(optimizer) == 2
    with pytest.raises(KeyError, match="critic"):
        optimizer["critic"]


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("kind", [list, tuple])
def test_it_is_used_like_the_list_that_was_given(kind, is_prepared):
    trainer = make(lambda net: kind(listed(net)))
    optimizer = run(trainer).optimizer if is_prepared else trainer.optimizer
    assert [type(member) for member in optimizer] == [SGD, AdamW]
    assert optimizer[1] is optimizer[-1]
    with pytest.raises(IndexError):
        optimizer[2]


@pytest.mark.parametrize("is_prepared", [False, True])
def test_it_is_used_like_one_optimizer(is_prepared):
    trainer = run(make()) if is_prepared else make()
    optimizer, members = trainer.optimizer, list(trainer.optimizer.values())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert len(optimizer.param_groups) == 2
    assert all(group is member.param_groups[0] for group, member in zip(optimizer.param_groups, members, strict=True))
    assert len(optimizer.state) == (4 if is_prepared else 0)
    weight = trainer.model.head.weight
    optimizer.state[weight]["mine"] = 1
    assert members[0].state[weight]["mine"] == 1
    assert weight in optimizer.state
    del optimizer.state[weight]
    assert weight not in members[0].state
    weight.grad = torch.ones_like(weight)
    optimizer.zero_grad()
    assert weight.grad is None
    assert "OptimizerGroup" in repr(OptimizerGroup(members)) or is_prepared


def test_a_closure_that_is_passed_by_hand_is_called():
    net = Net()
    group = OptimizerGroup(named(net))

    def closure():
        group.zero_grad()
        loss = mse(net(DATASET[:][0]), DATASET[:][1])
        loss.backward()
        return loss

    closure()
    before = weights_of(net)
    assert group.step(closure) > 0
    assert not torch.equal(before["head.weight"], net.head.weight)


def test_a_group_of_parameters_is_added_to_one_of_them():
    trainer = run(make())
    more = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"names no optimizer, but there are several: \['matrices', 'others'\]"):
        trainer.optimizer.add_param_group({"params": [more]})
    with pytest.raises(ValueError, match="names the optimizer 'head', but"):
        trainer.optimizer.add_param_group({"params": [more], "optimizer": "head"})
    trainer.optimizer.add_param_group({"params": [more], "optimizer": "others"})
    assert [len(member.param_groups) for member in trainer.optimizer.values()] == [1, 2]
    assert "optimizer" not in trainer.optimizer["others"].param_groups[1]


def test_hooks_for_the_state_belong_to_the_members():
    with pytest.raises(TypeError, match="A group of optimizers has no hooks for its state"):
        make().optimizer.register_state_dict_post_hook(print)


def test_a_list_that_replaces_the_optimizer_before_a_run_is_taken_too():
    trainer = make(lambda net: SGD(net.parameters(), lr=0.1))
    trainer.optimizer = listed(trainer.model)
    run(trainer)
    assert len(trainer.optimizer) == 2


def test_optimizers_that_accelerate_has_wrapped_already_are_unwrapped():
    trainer = make(lambda net: [AcceleratedOptimizer(member) for member in listed(net)])
    assert_same_weights(weights_of(run(trainer).model), weights_of(run(make(listed)).model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_trainer_of_several_is_copied_before_and_after_a_run(copy_of):
    trainer = make()
    copied = copy_of(trainer)
    assert list(copied.optimizer) == ["matrices", "others"]
    for _ in range(2):
        torch.manual_seed(0)
        run(trainer)
        torch.manual_seed(0)
        run(copied)
        assert_same_weights(weights_of(trainer.model), weights_of(copied.model))
        copied = copy_of(trainer)


# --- schedulers --------------------------------------------------------------------------------------------------


def halve(optimizer):
    return LambdaLR(optimizer, lambda num_steps: 0.5**num_steps)


def each_its_own(optimizer):
    return {"a": halve(optimizer["matrices"]), "b": ExponentialLR(optimizer["others"], 0.9)}


def one_on_a_metric(optimizer):
    return [ReduceLROnPlateau(optimizer["matrices"]), halve(optimizer["others"])]


def cosine_of_one(optimizer):
    return CosineLrScheduler(optimizer["matrices"], total_num_epochs=1, num_update_steps_per_epoch=4)


SCHEDULES = {
    "one of all": (halve, (0.5**4, 0.5**4)),
    "each its own": (each_its_own, (0.5**4, 0.9**4)),
    "of one alone": (lambda optimizer: halve(optimizer["others"]), (1, 0.5**4)),
    "on a metric": (one_on_a_metric, (1, 0.5**4)),
    "of the library": (CosineLrScheduler.create_scheduler_fn(), (0, 0)),
    "of the library, of one": (cosine_of_one, (0, 1)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_optimizer_has_its_schedule(name):
    create_scheduler_fn, factors = SCHEDULES[name]
    trainer = run(make(), create_scheduler_fn=create_scheduler_fn, eval_dataset=DATASET)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.1 * factors[0], 0.01 * factors[1]], abs=2e-6)


# --- states ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_state_of_each_by_its_name_in_any_order(tmp_path):
    first = run(make())
    first.save_checkpoint(tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt")["optimizer_state_dict"]
    assert list(saved) == ["matrices", "others"]
    second = make(lambda net: dict(reversed(named(net).items())))
    second.load_checkpoint(tmp_path / "a.pt")
    momentum = second.optimizer["matrices"].state[second.model.head.weight]["momentum_buffer"]
    assert torch.equal(momentum, first.optimizer["matrices"].state[first.model.head.weight]["momentum_buffer"])


@pytest.mark.parametrize(
    ("create", "words"),
    [
        (listed, r"it has the states of \['matrices', 'others'\] instead of \[0, 1\]"),
        (lambda net: SGD(net.parameters(), lr=0.1), r"it has the states of several, \['matrices', 'others'\]"),
        (
            lambda net: {"matrices": AdamW(net.matrices()), "others": AdamW(net.others())},
            "for the optimizer 'matrices'",
        ),
        (lambda net: {"matrices": SGD(net.others()), "others": AdamW(net.matrices())}, "for the optimizer 'matrices'"),
    ],
    ids=["a list", "one", "another class", "exchanged"],
)
def test_the_states_of_other_optimizers_are_refused_and_change_nothing(create, words, tmp_path):
    run(make()).save_checkpoint(tmp_path / "a.pt")
    trainer = make(create)
    before, state = weights_of(trainer.model), copy.deepcopy(trainer.optimizer.state_dict())
    with pytest.raises(CheckpointError, match=words):
        trainer.load_checkpoint(tmp_path / "a.pt")
    assert_same_weights(before, weights_of(trainer.model))
    assert trainer.optimizer.state_dict() == state


def test_the_state_of_one_optimizer_is_refused_by_several(tmp_path):
    run(make(lambda net: SGD(net.parameters(), lr=0.1))).save_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="it has the state of a single one instead of those of"):
        make().load_checkpoint(tmp_path / "a.pt")


def test_a_state_dict_of_others_is_refused_by_the_group_itself():
    group = make().optimizer
    with pytest.raises(ValueError, match=r"The state has the entries \['a'\], but the optimizers are"):
        group.load_state_dict({"a": {}})
