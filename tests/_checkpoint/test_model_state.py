"""The state of a model fits, is adapted by the model itself, or is rejected with nothing changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from _adapting import ADAPTING, Former, Renaming, Resizing
from _support import assert_same_weights, make_dataset, mse, train, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated._checkpoint import model_state
from pytorch_accelerated.exceptions import CheckpointError


def test_model_state_that_is_not_a_tensor_is_loaded():
    class WithExtra(nn.Linear):
        extra = None

        def get_extra_state(self):
            return {"number": 4}

        def set_extra_state(self, state):
            self.extra = state

    model = WithExtra(2, 1)
    model_state.load_model_state(model, WithExtra(2, 1).state_dict(), "The file")
    assert model.extra == {"number": 4}


def test_loading_calls_state_dict_a_fixed_number_of_times():
    """Not once per parameter: that would be slow for models with thousands of parameters."""

    class Counting(nn.Sequential):
        num_calls = 0

        def state_dict(self, *args, **kwargs):
            Counting.num_calls += 1
            return super().state_dict(*args, **kwargs)

    model = Counting(*(nn.Linear(2, 2) for _ in range(20)))
    state = nn.Sequential(*model).state_dict()
    Counting.num_calls = 0
    model_state.load_model_state(model, state, "The file")
    assert Counting.num_calls <= 3


def test_a_model_that_adapts_nothing_is_not_copied():
    class NoCopy(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    model = nn.Sequential(NoCopy(2, 1), nn.BatchNorm1d(1), nn.LSTM(1, 1), nn.MultiheadAttention(2, 1))
    model_state.load_model_state(model, model.state_dict(), "The file")


def test_all_differences_of_models_are_listed():
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        model_state.check_model_state(model, {"a": torch.ones(3), "d": torch.ones(1)}, "The file")
    assert str(caught.value).startswith(
        "The file belongs to a different model. Parameters missing from it: b; unexpected in it: d; "
        "with a different shape: a (3,) instead of (2,). Nothing was loaded."
    )


# --- models that adapt a state -----------------------------------------------------------------------------------


def with_sgd(model):
    return Trainer(model, mse, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), callbacks=(), seed=0)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    with_sgd(Former()).save_checkpoint(tmp_path / "model.pt", save_optimizer=False)
    return tmp_path / "model.pt"


@pytest.mark.parametrize("kind", ADAPTING)
def test_what_pytorch_loads_is_loaded_with_the_same_values(checkpoint, kind):
    torch.manual_seed(2)
    plain = ADAPTING[kind]()
    torch.manual_seed(2)
    trainer = with_sgd(ADAPTING[kind]())
    plain.load_state_dict(torch.load(checkpoint, weights_only=True)["model_state_dict"])
    trainer.load_checkpoint(checkpoint)
    assert_same_weights(weights_of(trainer.model), weights_of(plain))


@pytest.mark.parametrize("kind", ["resizing", "replacing", "lazy"])
def test_the_optimizer_trains_what_was_loaded(checkpoint, kind):
    trainer = with_sgd(ADAPTING[kind]())
    trainer.load_checkpoint(checkpoint)
    before = weights_of(trainer.model)
    train(trainer)
    assert not torch.equal(trainer.model.old.weight, before["old.weight"])


def test_the_averages_of_a_replaced_parameter_belong_to_the_new_one(checkpoint):
    trainer = with_sgd(Resizing(is_in_place=False))
    former = trainer.model.old.weight
    trainer.optimizer.state[former] = {"momentum_buffer": None}
    trainer.load_checkpoint(checkpoint)
    assert former not in trainer.optimizer.state
    assert trainer.model.old.weight in trainer.optimizer.state


def test_a_weight_norm_of_the_older_kind_is_loaded(tmp_path):
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(3, 1))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))
    with_sgd(old).save_checkpoint(tmp_path / "model.pt", save_optimizer=False)
    with_sgd(new).load_checkpoint(tmp_path / "model.pt")
    torch.testing.assert_close(new.weight, old.weight)


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "part"])
def test_a_compiled_model_adapts_a_state_as_the_plain_one(checkpoint, is_whole):
    plain, model = Renaming(), Renaming()
    saved = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    plain.load_state_dict(dict(saved))
    if is_whole:
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = nn.Sequential(torch.compile(model, backend="eager"))
        saved = {f"0.{name}": value for name, value in saved.items()}
    model_state.load_model_state(compiled, saved, "The file")
    assert torch.equal(model.new.weight, plain.new.weight)


class Versioned(nn.Linear):
    """Reads states of version 1, whose weights were transposed."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].T
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_versions_of_modules_are_saved(tmp_path, is_compiled):
    """As `torch.save` of a `state_dict` saves them: otherwise a module takes its state for one of an old version."""

    def make():
        return with_sgd(nn.Sequential(Versioned(3, 3), nn.Linear(3, 1)))

    trainer = make()
    if is_compiled:
        trainer.model[0] = torch.compile(trainer.model[0], backend="eager")
    trainer.save_checkpoint(tmp_path / "model.pt")
    trainer.save_training_state(tmp_path / "state")
    trainer.save_training_state(tmp_path / "in_background", in_background=True)
    trainer.wait_for_training_state()
    for load in (
        lambda other: other.load_checkpoint(tmp_path / "model.pt"),
        lambda other: other.load_training_state(tmp_path / "state"),
        lambda other: other.load_training_state(tmp_path / "in_background"),
        lambda other: train(other, resume_from=tmp_path / "state", num_epochs=1, max_num_train_steps=1),
    ):
        torch.manual_seed(3)
        other = make()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "optimizer_step", lambda trainer: None)
            load(other)
        assert torch.equal(other.model[0].weight, trainer.model[0].weight)


# --- models that refuse a state ----------------------------------------------------------------------------------


class Refusing(nn.Linear):
    """Has code of its own that refuses every state, after it has loaded a part of it."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        raise ValueError("not with me")


def test_a_model_that_refuses_a_state_is_unchanged(tmp_path):
    with_sgd(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))).save_checkpoint(tmp_path / "model.pt")
    trainer = with_sgd(nn.Sequential(nn.Linear(3, 3), Refusing(3, 1)))
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=r"different model. The model says: not with me. Nothing was loaded"):
        trainer.load_checkpoint(tmp_path / "model.pt")
    assert_same_weights(weights_of(trainer.model), before)


@pytest.mark.parametrize("kind", ADAPTING)
def test_a_model_that_adapts_states_still_refuses_those_of_others(tmp_path, kind):
    other = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1, bias=False))
    with_sgd(other).save_checkpoint(tmp_path / "model.pt")
    trainer = with_sgd(ADAPTING[kind]())
    if kind == "lenient":  # takes everything, and finds nothing
        trainer.load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
        return
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=r"different model. Parameters missing from it: .*Nothing was loaded"):
        trainer.load_checkpoint(tmp_path / "model.pt")
    after = weights_of(trainer.model)
    assert [type(value) for value in after.values()] == [type(value) for value in before.values()]
    if kind != "lazy":
        assert_same_weights(after, before)


def test_a_model_that_cannot_be_copied_is_compared_by_names_and_shapes():
    class NoCopy(Renaming):
        def __deepcopy__(self, memo):
            raise TypeError("cannot copy")

    model = NoCopy()
    model_state.load_model_state(model, model.state_dict(), "The file")
    with pytest.raises(CheckpointError, match="missing from it: new"):
        model_state.load_model_state(model, Former().state_dict(), "The file")


def test_lazy_modules_are_resumed(tmp_path):
    def run(**kwargs):
        torch.manual_seed(1)
        model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(1))
        trainer = Trainer(model, mse, torch.optim.Adam(model.parameters(), lr=0.1), callbacks=(), seed=0)
        return train(trainer, make_dataset(16), **kwargs)

    whole = run(num_epochs=3)
    run(num_epochs=1).save_training_state(tmp_path / "state")
    resumed = run(num_epochs=3, resume_from=tmp_path / "state")
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
