"""Weights of any origin: where they are in a file, which of them fit, and what is told of the rest."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from _adapting import Former, Lenient, Renaming, Resizing
from _support import assert_same_weights, make_dataset, mse, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.exceptions import CheckpointError


class Network(nn.Module):
    def __init__(self, num_classes=2, is_lazy=False):
        super().__init__()
        layer = (lambda _, width: nn.LazyLinear(width)) if is_lazy else nn.Linear
        self.body = nn.Sequential(layer(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = layer(4, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def make_network(seed=1, **kwargs):
    torch.manual_seed(seed)
    model = Network(**kwargs)
    if not kwargs.get("is_lazy"):
        model(torch.randn(8, 3))  # the statistics are no longer zeros and ones
    return model


def with_adam(model, trainer_class=Trainer, **kwargs):
    return trainer_class(model, lambda y, _: y.square().mean(), torch.optim.Adam(model.parameters()), (), **kwargs)


def prefixed(prefix, state):
    return OrderedDict((prefix + name, value) for name, value in state.items())


# --- where they are ----------------------------------------------------------------------------------------------

FORMS = {
    "bare": lambda state: state,
    "plain dictionary": dict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3},
    "model among states": lambda state: {"ema": state, "model": state, "rng": {"cpu": torch.get_rng_state()}},
    "some other name": lambda state: {"my_network": state, "epoch": torch.tensor(3)},
    "some other name among others": lambda state: {"mine": state, "other": {"some.weight": torch.ones(1)}},
    "our name and that of a wrapper": lambda state: {"model_state_dict": prefixed("module.", state)},
    "nested": lambda state: {"checkpoint": {"model": state, "epoch": 3}, "version": "1"},
    "DDP": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "DDP of compiled": lambda state: prefixed("module._orig_mod.", state),
    "compiled of DDP": lambda state: prefixed("_orig_mod.module.", state),
    "compiled part": lambda state: {k.replace("body.", "body._orig_mod."): v for k, v in state.items()},
    "Lightning": lambda state: {"state_dict": prefixed("model.", state), "pytorch-lightning_version": "2.5"},
    "Lightning with a metric": lambda state: {"state_dict": {**prefixed("model.", state), "f1.total": torch.ones(1)}},
    "any wrapper": lambda state: prefixed("encoder.inner.", state),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_another_program_are_loaded(tmp_path, form):
    saved = make_network()
    torch.save(FORMS[form](saved.state_dict()), tmp_path / "model.pt")
    trainer = with_adam(make_network(2))
    trainer.load_checkpoint(tmp_path / "model.pt", strict="metric" not in form)
    assert_same_weights(weights_of(trainer.model), weights_of(saved))


def test_all_entries_of_a_foreign_file_are_returned(tmp_path):
    contents = {"state_dict": make_network().state_dict(), "epoch": 3, "note": "a"}
    torch.save(contents, tmp_path / "model.pt")
    loaded = with_adam(make_network(2)).load_checkpoint(tmp_path / "model.pt")
    assert set(loaded) == set(contents)
    assert (loaded["epoch"], loaded["note"]) == (3, "a")
    assert not loaded.describe_rest()


@pytest.mark.parametrize("strict", [True, False])
def test_entries_that_are_none_are_passed_over(tmp_path, strict):
    saved = make_network()
    none = dict.fromkeys(("optimizer_state_dict", "scheduler_state_dict", "companions_state_dict"))
    torch.save({"model_state_dict": saved.state_dict(), **none}, tmp_path / "model.pt")
    trainer = with_adam(make_network(2))
    assert not trainer.load_checkpoint(tmp_path / "model.pt", strict=strict).describe_rest()
    assert_same_weights(weights_of(trainer.model), weights_of(saved))
    train(trainer, make_dataset(8))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"epoch": 3}, r"has no `model_state_dict`, only the entries \['epoch'\]. Expected a file written by"),
        ({"generator": "net", "discriminator": "net"}, r"several models, \['discriminator', 'generator'\]"),
        (
            {"state_dict": "other"},
            r"belongs to a different model. Parameters missing from it: body.0.bias.*strict=False",
        ),
        ({"model_state_dict": "other"}, r"belongs to a different model"),
    ],
)
def test_a_file_without_the_weights_of_the_model_is_refused_and_changes_nothing(tmp_path, contents, message):
    states = {"net": make_network().state_dict(), "other": {"weight": torch.ones(2)}}
    torch.save({name: states.get(value, value) for name, value in contents.items()}, tmp_path / "model.pt")
    trainer = with_adam(make_network(2))
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=message):
        trainer.load_checkpoint(tmp_path / "model.pt")
    assert_same_weights(weights_of(trainer.model), before)


def test_a_prefix_that_the_model_has_itself_is_kept(tmp_path):
    model = nn.ModuleDict({"model": make_network(), "module": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = nn.ModuleDict({"model": make_network(2), "module": nn.Linear(2, 2)})
    with_adam(other).load_checkpoint(tmp_path / "model.pt")
    assert_same_weights(weights_of(other), weights_of(model))


@pytest.mark.parametrize("form", ["bare", "DDP", "state_dict"])
@pytest.mark.parametrize("make", [Former, Renaming, Resizing, lambda: Resizing(is_in_place=False), Lenient])
def test_hooks_of_the_model_adapt_weights_of_another_program(tmp_path, make, form):
    saved = Former().state_dict()
    torch.save(FORMS[form](saved), tmp_path / "model.pt")
    plain, model = make(), make()
    plain.load_state_dict(copy.deepcopy(saved))
    model.load_state_dict(plain.state_dict()) if make is Lenient else None
    with_adam(model).load_checkpoint(tmp_path / "model.pt")
    assert_same_weights(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("form", ["bare", "DDP", "Lightning"])
@pytest.mark.parametrize("strict", [True, False])
def test_lazy_modules_take_the_shapes_of_weights_of_another_program(tmp_path, form, strict):
    saved = make_network()
    torch.save(FORMS[form](saved.state_dict()), tmp_path / "model.pt")
    model = make_network(2, is_lazy=True)
    trainer = with_adam(model)
    trainer.load_checkpoint(tmp_path / "model.pt", strict=strict)
    assert_same_weights(weights_of(model), weights_of(saved))
    trainer.train(make_dataset(8), 1)
    assert not torch.equal(model.head.weight, saved.head.weight)


def test_tied_weights_may_be_stored_once(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    saved, model = make(), make()
    state = saved.state_dict()
    del state["1.weight"]
    torch.save(state, tmp_path / "model.pt")
    with_adam(model).load_checkpoint(tmp_path / "model.pt")
    assert_same_weights(weights_of(model), weights_of(saved))
    assert model[1].weight is model[0].weight


# --- which of them fit -------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A trained network with two classes, in `model.pt` with its optimizer and scheduler."""
    trainer = with_adam(make_network(), seed=0)
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5)  # noqa: E731
    trainer.train(make_dataset(8), 1, create_scheduler_fn=schedule)
    trainer.save_checkpoint(tmp_path / "model.pt")
    return trainer


def test_without_strict_everything_that_fits_is_loaded_and_the_rest_is_listed(trained, tmp_path, capsys):
    trainer = with_adam(make_network(2, num_classes=5))
    trainer.model.added = nn.Linear(2, 2)
    del trainer.model.body[1]
    head = trainer.model.head.weight.detach().clone()
    loaded = trainer.load_checkpoint(tmp_path / "model.pt", strict=False)
    assert torch.equal(trainer.model.body[0].weight, trained.model.body[0].weight)
    assert torch.equal(trainer.model.head.weight, head)
    assert loaded.missing_keys == ["added.weight", "added.bias"]
    assert loaded.mismatched_keys == ["head.bias", "head.weight"]
    assert [name for name in loaded.unexpected_keys if "num_batches" not in name] == [
        f"body.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    ]
    assert set(loaded.left_out) == {"optimizer_state_dict", "scheduler_state_dict"}
    said = capsys.readouterr().out
    for text in (
        "Not everything was loaded. 2 not in the file: added.weight, added.bias.",
        "2 of another shape in the file: head.bias, head.weight. 5 not in the model: body.1.weight,",
        "`optimizer_state_dict` was left out: The checkpoint",
        "`scheduler_state_dict` was left out: It continues the learning rates of that optimizer.",
    ):
        assert text in said


def test_with_strict_another_head_is_refused_with_the_way_out_and_nothing_changes(trained, tmp_path):
    trainer = with_adam(make_network(2, num_classes=5))
    before = weights_of(trainer.model)
    with pytest.raises(
        CheckpointError, match=r"different shape: head.bias \(2,\) instead of \(5,\).*pass `strict=False`"
    ):
        trainer.load_checkpoint(tmp_path / "model.pt")
    assert_same_weights(weights_of(trainer.model), before)
    assert not trainer.optimizer.state


def test_without_strict_what_fits_completely_is_loaded_completely_and_nothing_is_said(trained, tmp_path, capsys):
    strict, other = (with_adam(make_network(2), seed=0) for _ in range(2))
    strict.load_checkpoint(tmp_path / "model.pt")
    capsys.readouterr()
    loaded = other.load_checkpoint(tmp_path / "model.pt", strict=False)
    assert not loaded.describe_rest()
    assert capsys.readouterr().out == ""
    for trainer in (strict, other):
        schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5)  # noqa: E731
        trainer.train(make_dataset(8), 1, create_scheduler_fn=schedule)
    assert_same_weights(weights_of(other.model), weights_of(strict.model))


def test_without_strict_the_network_with_another_head_trains(trained, tmp_path):
    trainer = with_adam(make_network(2, num_classes=5))
    trainer.load_checkpoint(tmp_path / "model.pt", strict=False)
    before = weights_of(trainer.model)
    trainer.train(
        make_dataset(8), 1, create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    )
    assert not torch.equal(trainer.model.head.weight, before["head.weight"])


@pytest.mark.parametrize("kind", ["Adam", "Adagrad", "RMSprop", "Adafactor"])
def test_without_strict_averages_of_another_head_are_left_out(tmp_path, kind):
    if not hasattr(torch.optim, kind):
        pytest.skip("this version of PyTorch does not have it")

    def make(**kwargs):
        model = make_network(**kwargs)
        return Trainer(model, lambda y, _: y.square().mean(), getattr(torch.optim, kind)(model.parameters()), ())

    train(make(), make_dataset(8)).save_checkpoint(tmp_path / "model.pt")
    trainer = make(num_classes=5)
    loaded = trainer.load_checkpoint(tmp_path / "model.pt", strict=False)
    assert "had the shape" in loaded.left_out["optimizer_state_dict"]
    train(trainer, make_dataset(8))


def test_without_strict_only_the_optimizer_is_left_out_if_only_that_differs(trained, tmp_path):
    model = make_network(2)
    trainer = Trainer(model, mse, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), callbacks=())
    loaded = trainer.load_checkpoint(tmp_path / "model.pt", strict=False)
    assert_same_weights(weights_of(model), weights_of(trained.model))
    assert loaded.left_out["optimizer_state_dict"].endswith("its class is 'Adam' instead of 'SGD'.")
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


class Refusing(torch.optim.Adam):
    def load_state_dict(self, state_dict):
        self.param_groups[0]["lr"] = 9.0
        raise KeyError("mine")


@pytest.mark.parametrize("strict", [True, False])
def test_an_optimizer_whose_own_code_refuses_its_state_is_put_back(tmp_path, strict):
    model = make_network(2)
    trainer = Trainer(model, mse, Refusing(model.parameters(), lr=0.5), callbacks=())
    trainer.save_checkpoint(tmp_path / "model.pt")
    nn.init.zeros_(model.head.weight)
    if strict:
        with pytest.raises(CheckpointError, match="different optimizer: it says KeyError"):
            trainer.load_checkpoint(tmp_path / "model.pt")
    else:
        loaded = trainer.load_checkpoint(tmp_path / "model.pt", strict=False)
        assert "KeyError" in loaded.left_out["optimizer_state_dict"]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert (model.head.weight.abs().sum() == 0) == strict


def test_without_strict_a_file_of_which_nothing_fits_is_still_refused(tmp_path):
    torch.save({"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, tmp_path / "model.pt")
    trainer = with_adam(make_network(2))
    before = weights_of(trainer.model)
    with pytest.raises(
        CheckpointError, match=r"nothing of it fits.*a.weight, b.weight, those of the model body.0.weight"
    ):
        trainer.load_checkpoint(tmp_path / "model.pt", strict=False)
    assert_same_weights(weights_of(trainer.model), before)


@pytest.mark.parametrize("make", [Renaming, Resizing, lambda: Resizing(is_in_place=False)])
def test_without_strict_hooks_of_the_model_still_adapt_what_fits(tmp_path, make):
    torch.save({"inner." + k: v for k, v in Former().state_dict().items()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt")

    def wrapped():
        return nn.ModuleDict({"inner": make(), "added": nn.Linear(2, 2)})

    plain, model = wrapped(), wrapped()
    model.load_state_dict(plain.state_dict()) if make is Renaming else model.added.load_state_dict(
        plain.added.state_dict()
    )
    plain.load_state_dict(copy.deepcopy(saved), strict=False)
    loaded = with_adam(model).load_checkpoint(tmp_path / "model.pt", strict=False)
    assert_same_weights(weights_of(model), weights_of(plain))
    assert loaded.missing_keys == ["added.weight", "added.bias"]
    assert loaded.unexpected_keys == []


def test_without_strict_a_model_that_cannot_be_copied_is_compared_by_names_and_shapes(trained, tmp_path):
    class NoCopy(Network):
        def __deepcopy__(self, memo):
            raise TypeError("cannot copy")

    model = NoCopy(num_classes=5)
    loaded = with_adam(model).load_checkpoint(tmp_path / "model.pt", strict=False)
    assert loaded.mismatched_keys == ["head.bias", "head.weight"]
    assert torch.equal(model.body[0].weight, trained.model.body[0].weight)


def test_without_strict_a_lazy_part_that_is_not_in_the_file_stays_lazy(trained, tmp_path):
    model = make_network(2, is_lazy=True)
    model.added = nn.LazyLinear(2)
    loaded = with_adam(model).load_checkpoint(tmp_path / "model.pt", strict=False)
    assert loaded.missing_keys == ["added.weight", "added.bias"]
    assert torch.equal(model.head.weight, trained.model.head.weight)
    assert nn.parameter.is_lazy(model.added.weight)


def test_what_was_loaded_is_a_dictionary_that_can_be_copied(trained, tmp_path):
    loaded = with_adam(make_network(num_classes=5)).load_checkpoint(tmp_path / "model.pt", strict=False)
    other = copy.deepcopy(loaded)
    assert set(other) == set(loaded)
    assert other.mismatched_keys == loaded.mismatched_keys


# --- trainable parameters only -----------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen network with a small trainable part, and a statistic."""

    def __init__(self, is_frozen=True):
        super().__init__()
        torch.manual_seed(7)
        self.frozen = nn.Sequential(nn.Linear(3, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 4)).requires_grad_(
            not is_frozen
        )
        self.norm = nn.BatchNorm1d(4)
        torch.manual_seed(torch.initial_seed() + 1)
        self.adapter = nn.Linear(4, 1)

    def forward(self, x):
        return self.adapter(self.norm(self.frozen(x)))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen again", "not frozen yet"])
def test_a_checkpoint_of_trainable_parameters_is_small_and_completes_a_pretrained_network(tmp_path, suffix, is_frozen):
    trainer = with_adam(Adapted())
    trainer.train(make_dataset(8), 1)
    path = tmp_path / f"model{suffix}"
    trainer.save_checkpoint(path, save_optimizer=suffix == ".pt", trainable_only=True)
    assert path.stat().st_size < 20_000
    other = with_adam(Adapted(is_frozen))
    nn.init.zeros_(other.model.adapter.weight)
    loaded = other.load_checkpoint(path)
    assert_same_weights(weights_of(other.model), weights_of(trainer.model))
    assert "frozen.0.weight" in loaded["frozen_parameters"]
    assert "frozen.0.weight" not in loaded["model_state_dict"]
    x = torch.randn(5, 3)
    assert torch.equal(other.model(x), trainer.model(x))


def test_training_goes_on_from_a_checkpoint_of_trainable_parameters(tmp_path):
    trainer = with_adam(Adapted(), seed=0)
    trainer.train(make_dataset(8), 1)
    trainer.save_checkpoint(tmp_path / "model.pt", trainable_only=True)
    other = with_adam(Adapted(), seed=0)
    other.load_checkpoint(tmp_path / "model.pt")
    for each in (trainer, other):
        each._loop_run.training.run_number = 1
        train(each, make_dataset(8))
    assert_same_weights(weights_of(other.model), weights_of(trainer.model))


def test_by_default_frozen_parameters_are_saved_and_nothing_is_added(tmp_path):
    trainer = with_adam(Adapted())
    trainer.save_checkpoint(tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(saved) == {"model_state_dict", "optimizer_state_dict"}
    assert set(saved["model_state_dict"]) == set(trainer.model.state_dict())


def test_a_trainable_parameter_that_is_missing_is_still_refused(tmp_path):
    trainer = with_adam(Adapted())
    trainer.save_checkpoint(tmp_path / "model.pt", trainable_only=True)
    trainer.model.added = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"missing from it: added.bias, added.weight\. Nothing"):
        trainer.load_checkpoint(tmp_path / "model.pt", load_optimizer=False)


def test_an_entry_of_the_users_that_has_the_name_of_ours_does_no_harm(tmp_path):
    trainer = with_adam(make_network())
    for entry in (3, ["head.weight", 4], None):
        trainer.save_checkpoint(tmp_path / "model.pt", {"frozen_parameters": entry})
        assert trainer.load_checkpoint(tmp_path / "model.pt")["frozen_parameters"] == entry


# --- what else is in a checkpoint --------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A loss function with parameters."""

    def __init__(self, num_scales):
        super().__init__()
        self.scales = nn.Parameter(torch.ones(num_scales))

    def forward(self, outputs, targets):
        return (outputs.square() * self.scales.sum()).mean()


def test_without_strict_parameters_outside_the_model_that_differ_are_left_out(tmp_path):
    def make(num_scales):
        model, loss_func = make_network(num_scales), Scaled(num_scales)
        return Trainer(model, loss_func, torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1), ())

    trainer, other = make(2), make(3)
    train(trainer, make_dataset(8)).save_checkpoint(tmp_path / "model.pt", save_optimizer=False)
    with pytest.raises(CheckpointError, match="loss_func"):
        other.load_checkpoint(tmp_path / "model.pt")
    loaded = other.load_checkpoint(tmp_path / "model.pt", strict=False)
    assert "scales (2,) instead of (3,)" in loaded.left_out["companions_state_dict"]
    assert torch.equal(other.loss_func.scales, torch.ones(3))
    assert_same_weights(weights_of(other.model), weights_of(trainer.model))
