"""The state of an optimizer goes to the parameters that it belongs to, or is refused with nothing changed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from _adapting import Former, Renaming, Resizing
from _saved import assert_equal, everything_in
from _support import make_dataset, mse, train
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint import portable
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.exceptions import CheckpointError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def make_trainer(make_optimizer, groups=lambda model: model.parameters(), model=None, seed=1):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)) if model is None else model
    return Trainer(model, mse, make_optimizer(groups(model)), callbacks=(), seed=0)


def save(folder, trainer):
    train(trainer, make_dataset(16))
    trainer.save_checkpoint(folder / "model.pt")
    trainer.save_training_state(folder / "state")
    return trainer


def averages_of(trainer):
    """The tensors that the optimizer has for each parameter, by the names of both."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        name: {entry: torch.as_tensor(value).clone() for entry, value in optimizer.state[parameter].items()}
        for name, parameter in trainer.model.named_parameters()
        if parameter in optimizer.state
    }


WAYS = {
    "load_checkpoint": lambda trainer, folder: trainer.load_checkpoint(folder / "model.pt"),
    "load_training_state": lambda trainer, folder: trainer.load_training_state(folder / "state"),
    "train": lambda trainer, folder: train(trainer, make_dataset(16), num_epochs=2, resume_from=folder / "state"),
}


def assert_refused(trainer, folder, message, ways=WAYS):
    """Assert that every way to load a state refuses it, and changes nothing."""
    trainer.run_history.update_metric("mine", 1.0)
    for way in ways:
        before = copy.deepcopy(everything_in(trainer))
        with pytest.raises(CheckpointError, match=message):
            WAYS[way](trainer, folder)
        assert_equal(everything_in(trainer), before, way)


# --- the class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "present"), list(itertools.permutations(["SGD", "Adam", "AdamW", "RMSprop"], 2)))
def test_the_state_of_another_class_is_refused(tmp_path, saved, present):
    save(tmp_path, make_trainer(OPTIMIZERS[saved]))
    trainer = make_trainer(OPTIMIZERS[present], seed=5)
    assert_refused(
        trainer, tmp_path, f"different optimizer: its class is '{saved}' instead of '{present}'.*Nothing was"
    )


def test_a_trainer_that_has_trained_before_is_unchanged_too(tmp_path):
    save(tmp_path, make_trainer(OPTIMIZERS["SGD"]))
    trainer = make_trainer(OPTIMIZERS["Adam"], seed=5)
    train(trainer)
    assert_refused(trainer, tmp_path, "its class is 'SGD' instead of 'Adam'")
    train(trainer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_of_the_same_class_is_resumed_exactly(tmp_path, kind):
    whole = train(make_trainer(OPTIMIZERS[kind]), make_dataset(16), num_epochs=2)
    save(tmp_path, make_trainer(OPTIMIZERS[kind]))
    resumed = make_trainer(OPTIMIZERS[kind], seed=5)
    WAYS["train"](resumed, tmp_path)
    assert_equal(everything_in(resumed), everything_in(whole))


class Mine(torch.optim.Adam):
    """An optimizer of the user's."""


def test_a_class_of_the_users_is_told_by_its_name(tmp_path):
    save(tmp_path, make_trainer(lambda p: Mine(p, lr=0.01)))
    assert_refused(make_trainer(OPTIMIZERS["Adam"]), tmp_path, "its class is 'Mine' instead of 'Adam'")
    WAYS["train"](make_trainer(lambda p: Mine(p, lr=0.01)), tmp_path)


# --- states that do not know their class, such as those of other programs ----------------------------------------


def save_plain(folder, trainer):
    """Write a checkpoint as other programs do."""
    train(trainer, make_dataset(16))
    states = {"model_state_dict": trainer.model.state_dict(), "optimizer_state_dict": trainer.optimizer.state_dict()}
    torch.save(states, folder / "model.pt")


@pytest.mark.parametrize(
    ("saved", "present", "lacking"),
    [("Adam", "SGD", "dampening"), ("SGD", "Adam", "betas"), ("Adam", "RMSprop", "alpha"), ("SGD", "Rprop", "etas")],
)
def test_a_plain_state_that_lacks_settings_of_the_class_is_refused(tmp_path, saved, present, lacking):
    save_plain(tmp_path, make_trainer(OPTIMIZERS[saved]))
    message = rf"its groups lack the settings \[.*'{lacking}'.*\] of a '{present}'"
    assert_refused(make_trainer(OPTIMIZERS[present], seed=5), tmp_path, message, ways=["load_checkpoint"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_plain_state_of_the_same_class_is_loaded(tmp_path, kind):
    saved = make_trainer(OPTIMIZERS[kind])
    save_plain(tmp_path, saved)
    trainer = make_trainer(OPTIMIZERS[kind], seed=5)
    trainer.load_checkpoint(tmp_path / "model.pt")
    assert_equal(averages_of(trainer), averages_of(saved))


def test_a_setting_that_an_older_pytorch_did_not_have_is_not_missed(tmp_path):
    saved = make_trainer(OPTIMIZERS["Adam"])
    save_plain(tmp_path, saved)
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    for name in ("fused", "foreach", "maximize", "differentiable", "capturable"):
        del checkpoint["optimizer_state_dict"]["param_groups"][0][name]
    torch.save(checkpoint, tmp_path / "model.pt")
    train(make_trainer(OPTIMIZERS["Adam"]))
    make_trainer(OPTIMIZERS["Adam"]).load_checkpoint(tmp_path / "model.pt")


def test_a_plain_state_whose_shapes_are_in_another_order_is_refused(tmp_path):
    save_plain(tmp_path, make_trainer(OPTIMIZERS["Adam"]))
    trainer = make_trainer(OPTIMIZERS["Adam"], lambda model: list(model.parameters())[::-1], seed=5)
    assert_refused(trainer, tmp_path, "its parameters are in another order", ways=["load_checkpoint"])


class Wrapper:
    """An optimizer that is not one of PyTorch, with a state of another form."""

    def __init__(self, inner, *, has_groups):
        self.inner, self.num_steps = inner, 0
        if has_groups:
            self.param_groups = inner.param_groups

    def step(self, closure=None):
        self.num_steps += 1
        self.inner.step(closure)

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return {"inner": self.inner.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state):
        self.num_steps = state["num_steps"]
        self.inner.load_state_dict(state["inner"])


@pytest.mark.parametrize("has_groups", [False, True])
def test_a_state_of_another_form_is_left_to_the_optimizer(tmp_path, has_groups):
    model = nn.Linear(3, 1)
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1), has_groups=has_groups)
    wrapper.num_steps = 3
    states = {"model_state_dict": model.state_dict(), "optimizer_state_dict": wrapper.state_dict()}
    torch.save(states, tmp_path / "model.pt")
    wrapper.num_steps = 0
    portable.load_checkpoint(tmp_path / "model.pt", model, wrapper)
    assert wrapper.num_steps == 3


class Averaging(torch.optim.Optimizer):
    """One of PyTorch by its class, around another: every second step goes halfway back to slow weights."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.num_steps, self.param_groups = inner, 0, inner.param_groups
        self.slow = [parameter.detach().clone() for parameter in self.param_groups[0]["params"]]

    def step(self, closure=None):
        self.inner.step(closure)
        self.num_steps += 1
        if self.num_steps % 2 == 0:
            for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow += 0.5 * (parameter.detach() - slow)
                parameter.data.copy_(slow)

    def state_dict(self):
        return {"inner": self.inner.state_dict(), "slow": self.slow, "num_steps": self.num_steps}

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups
        self.slow, self.num_steps = state_dict["slow"], state_dict["num_steps"]


@pytest.mark.parametrize("schedule", [None, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)])
def test_an_optimizer_around_another_is_resumed_exactly(schedule, tmp_path):
    def run(*callbacks, **kwargs):
        trainer = make_trainer(lambda parameters: Averaging(torch.optim.Adam(parameters, lr=0.01)))
        trainer.callback_handler.add_callbacks(callbacks)
        return train(trainer, make_dataset(16), num_epochs=2, create_scheduler_fn=schedule, **kwargs)

    complete = run(SaveTrainingStateCallback(tmp_path, save_every_n_steps=3))
    resumed = run(resume_from=tmp_path / "step_3")
    assert_equal(resumed.model.state_dict(), complete.model.state_dict())
    assert_equal(resumed.optimizer.state_dict(), complete.optimizer.state_dict())


# --- the order of the parameters ---------------------------------------------------------------------------------


def by_kind(model):
    """Two groups: weights, and biases without weight decay."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return [{"params": weights}, {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]


def reversed_groups(model):
    return [{**group, "params": group["params"][::-1]} for group in by_kind(model)]


ORDERS = {
    "one group": (lambda model: list(model.parameters()), lambda model: list(model.parameters())[::-1]),
    "two groups": (by_kind, reversed_groups),
    "names": (lambda model: list(model.named_parameters()), lambda model: list(model.named_parameters())[::-1]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adagrad"])
def test_averages_follow_the_names_of_their_parameters(tmp_path, way, order, kind):
    first, then = ORDERS[order]
    saved = save(tmp_path, make_trainer(OPTIMIZERS[kind], first))
    trainer = make_trainer(OPTIMIZERS[kind], then, seed=5)
    if way == "train":
        WAYS[way](trainer, tmp_path)
        saved = train(make_trainer(OPTIMIZERS[kind], first), make_dataset(16), num_epochs=2)
    else:
        WAYS[way](trainer, tmp_path)
    assert_equal(averages_of(trainer), averages_of(saved))
    names = trainer.optimizer.param_groups[0].get("param_names")
    assert names is None or names == [name for name, _ in then(trainer.model)]


def test_frozen_parameters_have_no_averages_and_change_no_order(tmp_path):
    def groups(model):
        model[1].requires_grad_(False)
        return model.parameters()

    saved = save(tmp_path, make_trainer(OPTIMIZERS["Adam"], groups))
    trainer = make_trainer(OPTIMIZERS["Adam"], lambda model: list(groups(model))[::-1], seed=5)
    trainer.load_training_state(tmp_path / "state")
    assert_equal(averages_of(trainer), averages_of(saved))
    assert len(averages_of(saved)) == 4


OTHER_GROUPS = {
    "grouped differently": (
        by_kind,
        lambda model: [{"params": part.parameters()} for part in (model[:2], model[2])],
        r"its groups have \[3, 3\] parameters instead of \[4, 2\]",
    ),
    "exchanged groups": (by_kind, lambda model: by_kind(model)[::-1], "its parameter group 0 has the parameters"),
    "other parameters": (
        lambda model: [*model[0].parameters(), model[1].bias],
        lambda model: [*model[0].parameters(), model[2].bias],
        r"its parameter group 0 has the parameters \['1.bias'\] in place of \['2.bias'\]",
    ),
    "more": (
        lambda model: model[0].parameters(),
        lambda model: model.parameters(),
        r"\[2\] parameters instead of \[6\]",
    ),
}


@pytest.mark.parametrize("kind", OTHER_GROUPS)
def test_other_groups_are_refused(tmp_path, kind):
    first, then, message = OTHER_GROUPS[kind]
    save(tmp_path, make_trainer(OPTIMIZERS["Adam"], first))
    assert_refused(make_trainer(OPTIMIZERS["Adam"], then, seed=5), tmp_path, message)


class Joint(torch.optim.Optimizer):
    """Keeps its state as LBFGS does: one of all parameters, at the first one."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        self.state[parameters[0]] = {"direction": flat, "former": [flat]}


def test_state_of_all_parameters_together_cannot_follow_another_order(tmp_path):
    save(tmp_path, make_trainer(Joint))
    trainer = make_trainer(Joint, lambda model: list(model.parameters())[::-1], seed=5)
    assert_refused(trainer, tmp_path, "in another order, and not all of its state belongs to single parameters")
    trainer = make_trainer(Joint, seed=5)
    trainer.load_training_state(tmp_path / "state")


def test_parameters_outside_the_model_are_told_by_the_module_that_has_them(tmp_path):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

        def forward(self, outputs, targets):
            return mse(outputs * self.scale + self.shift, targets)

    def make(order, seed=1):
        torch.manual_seed(seed)
        model, loss = nn.Linear(3, 1), Loss()
        parameters = [*model.parameters(), *loss.parameters()][::order]
        return Trainer(model, loss, OPTIMIZERS["Adam"](parameters), callbacks=(), seed=0)

    saved, trainer = save(tmp_path, make(1)), make(-1, seed=5)
    trainer.load_training_state(tmp_path / "state")
    for name in ("scale", "shift"):
        then, now = (one.optimizer.state[getattr(one.loss_func, name)] for one in (saved, trainer))
        assert_equal(dict(now), dict(then))


# --- models that adapt a state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_averages_follow_parameters_that_a_load_hook_renames(tmp_path, order):
    saved = save(tmp_path, make_trainer(OPTIMIZERS["Adam"], model=Former()))
    trainer = make_trainer(OPTIMIZERS["Adam"], lambda model: list(model.parameters())[::order], Renaming())
    trainer.load_training_state(tmp_path / "state")
    expected = {name.replace("old", "new"): state for name, state in averages_of(saved).items()}
    assert_equal(averages_of(trainer), expected)


@pytest.mark.parametrize("is_in_place", [True, False])
def test_averages_of_the_former_shape_are_refused(tmp_path, is_in_place):
    class Padding(Resizing):
        """Keeps its own size: what it loads is filled up with zeros."""

        def _load_from_state_dict(self, state_dict, prefix, *args):
            missing = 5 - state_dict[f"{prefix}old.weight"].shape[1]
            state_dict[f"{prefix}old.weight"] = nn.functional.pad(state_dict[f"{prefix}old.weight"], (0, missing))
            super()._load_from_state_dict(state_dict, prefix, *args)

    save(tmp_path, make_trainer(OPTIMIZERS["Adam"], model=Former()))
    trainer = make_trainer(OPTIMIZERS["Adam"], model=Padding(is_in_place))
    assert_refused(trainer, tmp_path, r"'old.weight' had the shape \(1, 3\) instead of \(1, 5\)")
    trainer.load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
    assert trainer.model.old.weight[0, 3:].tolist() == [0, 0]


def test_a_second_optimizer_is_compared_in_the_same_way(tmp_path):
    class TwoNetworks(Trainer):
        def __init__(self, make_second, order):
            torch.manual_seed(1)
            model = nn.Linear(3, 1)
            super().__init__(model, mse, OPTIMIZERS["SGD"](model.parameters()), callbacks=(), seed=0)
            self.critic = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            self.second = make_second(list(self.critic.parameters())[::order])

    saved = TwoNetworks(OPTIMIZERS["Adam"], 1)
    saved.critic(torch.ones(1, 3)).sum().backward()
    saved.second.step()
    saved.save_training_state(tmp_path / "state")
    reordered = TwoNetworks(OPTIMIZERS["Adam"], -1)
    reordered.load_training_state(tmp_path / "state")
    for then, now in zip(saved.critic.parameters(), reordered.critic.parameters(), strict=True):
        assert_equal(dict(reordered.second.state[now]), dict(saved.second.state[then]))
    with pytest.raises(
        CheckpointError, match=r"in its `second`\) belongs to a different optimizer: its class is 'Adam'"
    ):
        TwoNetworks(OPTIMIZERS["SGD"], 1).load_training_state(tmp_path / "state")
