"""Checkpoints in the format of safetensors: other programs read the weights, and theirs are read here."""

from __future__ import annotations

import builtins
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from _support import Probe, assert_same_weights, make_dataset, weights_of
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveBestModelCallback
from pytorch_accelerated.exceptions import CheckpointError


class Network(nn.Module):
    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.register_buffer("number", torch.tensor(seed))
        self.register_buffer("empty", torch.empty(0, 2))
        self.register_buffer("transposed", torch.rand(2, 3).T)
        self.register_buffer("bfloat", torch.rand(2).bfloat16())
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def make_trainer(seed=1, model=None, callbacks=()):
    model = Network(seed) if model is None else model
    return Trainer(
        model, lambda y, _: y.square().mean(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks, seed=0
    )


def test_a_checkpoint_in_this_format_is_loaded_exactly(tmp_path):
    trainer, other = make_trainer(), make_trainer(2)
    for model in (trainer.model, other.model):
        memory = torch.rand(6)
        model.register_buffer("shared", memory)
        model.register_buffer("part_of_it", memory[2:4])
        model.register_buffer("part", torch.rand(4)[1:3])
    path = tmp_path / "folder" / "model.safetensors"
    trainer.save_checkpoint(path, {"epoch": 3, "score": 0.1, "names": ["a", None], "nan": float("nan")}, False)
    loaded = other.load_checkpoint(path)
    assert_same_weights(weights_of(other.model), weights_of(trainer.model))
    assert other.model.second.weight is other.model.first.weight
    assert {name: loaded[name] for name in ("epoch", "score", "names")} == {
        "epoch": 3,
        "score": 0.1,
        "names": ["a", None],
    }
    assert loaded["nan"] != loaded["nan"]
    assert [item.name for item in path.parent.iterdir()] == ["model.safetensors"]


def test_other_programs_read_the_weights(tmp_path):
    trainer, path = make_trainer(), tmp_path / "model.safetensors"
    trainer.save_checkpoint(path, save_optimizer=False)
    state = load_file(path)
    assert set(trainer.model.state_dict()) - set(state) == {"second.weight"}
    for name, value in state.items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    other = Network(2)
    load_model(other, path)
    assert_same_weights(weights_of(other), weights_of(trainer.model))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("write", ["save_file", "save_model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_other_programs_are_read(tmp_path, write, suffix, prefix):
    trainer, other = make_trainer(), make_trainer(2)
    path = tmp_path / f"model{suffix}"
    if write == "save_file":
        state = trainer.model.state_dict()
        save_file({prefix + name: value.clone().contiguous() for name, value in state.items()}, path)
    else:
        save_model(nn.ModuleDict({"module": trainer.model}) if prefix else trainer.model, str(path))
    other.load_checkpoint(path)
    assert_same_weights(weights_of(other.model), weights_of(trainer.model))


def test_what_the_format_cannot_hold_is_left_out_and_named(tmp_path):
    trainer, path = make_trainer(), tmp_path / "model.safetensors"
    with pytest.warns(UserWarning, match=r"not these entries: optimizer_state_dict, table. A file with the suffix"):
        trainer.save_checkpoint(path, {"table": torch.ones(2), "epoch": 3})
    assert set(trainer.load_checkpoint(path)) == {"model_state_dict", "epoch"}


def test_a_state_that_is_more_than_tensors_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    trainer = make_trainer(model=Extra(3, 3))
    with pytest.raises(
        CheckpointError,
        match=r"'_extra_state' of the model is a dict, and files with the suffix '.safetensors' contain dense",
    ):
        trainer.save_checkpoint(tmp_path / "model.safetensors", save_optimizer=False)
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_tensor_is_refused_and_an_earlier_file_is_unchanged(tmp_path):
    trainer, path = make_trainer(), tmp_path / "model.safetensors"
    trainer.save_checkpoint(path, save_optimizer=False)
    before = path.read_bytes()
    trainer.model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match=r"is a torch\.sparse_coo tensor"):
        trainer.save_checkpoint(path, save_optimizer=False)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]


class Versioned(nn.Linear):
    """Reads states of version 1, whose weights were transposed."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].T
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_the_versions_of_modules_are_saved(tmp_path):
    trainer, other = make_trainer(model=Versioned(3, 3)), make_trainer(model=Versioned(3, 3))
    trainer.save_checkpoint(tmp_path / "model.safetensors", save_optimizer=False)
    other.load_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(other.model.weight, trainer.model.weight)


def test_what_was_loaded_does_not_depend_on_the_file(tmp_path):
    trainer, path = make_trainer(), tmp_path / "model.safetensors"
    trainer.save_checkpoint(path, save_optimizer=False)
    loaded = trainer.load_checkpoint(path)["model_state_dict"]
    expected = {name: value.clone() for name, value in loaded.items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_weights(dict(loaded), expected)


def test_others_can_read_the_file(tmp_path):
    """With the permissions that new files have."""
    trainer = make_trainer()
    trainer.save_checkpoint(tmp_path / "model.pt")
    trainer.save_checkpoint(tmp_path / "model.safetensors", save_optimizer=False)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "model.pt").stat().st_mode


def test_the_best_model_may_be_saved_in_this_format(tmp_path):
    weights = []

    def score(trainer, **_):
        trainer.run_history.update_metric("score", len(weights))
        weights.append(weights_of(trainer.model))

    best = SaveBestModelCallback(tmp_path / "best.safetensors", watch_metric="score", save_optimizer=False)
    trainer = make_trainer(callbacks=[Probe(on_train_epoch_end=score), best])
    trainer.train(make_dataset(8), 3)
    assert_same_weights(weights_of(trainer.model), weights[0])


@pytest.mark.parametrize(
    "use",
    [
        lambda trainer, path: trainer.save_checkpoint(path),
        lambda trainer, path: trainer.load_checkpoint(path),
        lambda trainer, path: trainer.train(make_dataset(8), 1),
    ],
    ids=["saving", "loading", "the start of a run"],
)
def test_without_the_package_the_error_names_what_to_install(tmp_path, monkeypatch, use):
    path = tmp_path / "model.safetensors"
    trainer = make_trainer(callbacks=[SaveBestModelCallback(path, watch_metric="train_loss_epoch")])
    trainer.save_checkpoint(path, save_optimizer=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "safetensors":
            raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pytorch-accelerated\[safetensors\]'"):
        use(trainer, path)


def test_a_damaged_header_is_a_clear_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:8] + data[8:].replace(b"F32", b"F99"))
    with pytest.raises(CheckpointError, match="could not be read"):
        make_trainer().load_checkpoint(path)


def test_no_warning_is_given_where_nothing_is_left_out(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer().save_checkpoint(tmp_path / "model.safetensors", {"epoch": 1}, save_optimizer=False)
