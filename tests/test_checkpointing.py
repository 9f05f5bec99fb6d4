"""Files and directories that are whole or not there, and refuse what they do not fit."""

from __future__ import annotations

import argparse
import json
from collections import Counter, OrderedDict
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from _support import assert_same_weights, make_dataset, make_model, make_trainer, weights_of
from pytorch_accelerated import _checkpointing
from pytorch_accelerated.exceptions import CheckpointError


@pytest.fixture
def _full_disk(monkeypatch):
    """Writing starts well and then fails."""
    save = torch.save

    def fail(contents, file, *args, **kwargs):
        save({"half": 1}, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- files -------------------------------------------------------------------------------------------------------


def test_a_file_returns_what_was_written_as_plain_values(tmp_path):
    path = tmp_path / "a" / "b" / "file.pt"
    contents = {
        "float": np.float64(0.5),
        "int": np.int32(3),
        "flag": np.bool_(True),
        "array": np.arange(3),
        "nested": [(np.float32(1.5), {"deep": np.float16(2)}), {np.int64(4)}],
        np.int64(5): "key",
        "tensor": torch.ones(2),
        "none": None,
        "ordered": OrderedDict(a=1),
        "counter": Counter("aab"),
    }
    _checkpointing.save_file(contents, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["nested"] == [(1.5, {"deep": 2.0}), {4}]
    assert (loaded["float"], loaded["int"], loaded["flag"], loaded[5], loaded["none"]) == (0.5, 3, True, "key", None)
    assert torch.equal(loaded["array"], torch.arange(3))
    assert (loaded["ordered"], loaded["counter"]) == ({"a": 1}, {"a": 2, "b": 1})
    assert torch.equal(_checkpointing.load_file(path)["tensor"], torch.ones(2))
    assert names_in(path.parent) == ["file.pt"]


def test_an_array_in_a_file_is_not_the_users_own():
    array = np.zeros(2)
    plain = _checkpointing.as_plain({"array": array})
    array[0] = 1
    assert plain["array"].tolist() == [0, 0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file '.*nothing.pt'"):
        _checkpointing.load_file(tmp_path / "nothing.pt")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "file.pt"
    _checkpointing.save_file({"a": torch.ones(100)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"'.*file.pt' could not be read.*damaged"):
        _checkpointing.load_file(path)


def test_a_file_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"a": Harmful()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="not loaded because that could run code"):
        _checkpointing.load_file(tmp_path / "file.pt")
    assert not (tmp_path / "harm").exists()


def test_numpy_scalars_in_checkpoints_of_0_1_61_are_read(tmp_path):
    torch.save({"metric": np.float64(0.5), "epoch": np.int64(3)}, tmp_path / "file.pt")
    assert _checkpointing.load_file(tmp_path / "file.pt") == {"metric": 0.5, "epoch": 3}


@pytest.mark.parametrize(
    "value",
    [argparse.Namespace(a=1), Path("folder"), object, lambda: None, np.array([{}])],
    ids=["namespace", "path", "class", "function", "array of objects"],
)
def test_what_could_not_be_read_back_is_refused_before_anything_is_lost(tmp_path, value):
    path = tmp_path / "file.pt"
    _checkpointing.save_file({"a": 1}, path)
    with pytest.raises(CheckpointError):
        _checkpointing.save_file({"settings": {"mine": value}}, path)
    assert names_in(tmp_path) == ["file.pt"]
    assert _checkpointing.load_file(path) == {"a": 1}


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.pt"
    path.write_text("old")
    with pytest.raises(CheckpointError, match=r"'.*file.pt' could not be written.*No space.*untouched.*disk has room"):
        _checkpointing.save_file({"a": 1}, path)
    assert names_in(tmp_path) == ["file.pt"]
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model.pt' could not be written"):
        _checkpointing.save_file({"a": 1}, tmp_path / "file" / "model.pt")


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_one_flat_dictionary():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    checkpoint = _checkpointing.build_checkpoint({"_orig_mod.weight": 1}, optimizer, None, {"epoch": 3})
    assert checkpoint == {
        "model_state_dict": {"weight": 1},
        "optimizer_state_dict": optimizer.state_dict(),
        "epoch": 3,
    }


def test_a_file_without_a_model_is_refused():
    with pytest.raises(CheckpointError, match=r"The file holds no `model_state_dict`, only \['a', '3'\]|\['3', 'a'\]"):
        _checkpointing.take_model_state({"a": 1, 3: 2}, "The file")


def test_a_model_with_state_that_is_no_tensor_is_loaded():
    class WithExtra(nn.Linear):
        extra = None

        def get_extra_state(self):
            return {"number": 4}

        def set_extra_state(self, state):
            self.extra = state

    model = WithExtra(2, 1)
    _checkpointing.load_model_state(model, WithExtra(2, 1).state_dict(), "The file")
    assert model.extra == {"number": 4}


def test_the_state_of_a_model_is_asked_for_a_fixed_number_of_times():
    """Not once per parameter, which takes long for models with thousands of them."""

    class Counting(nn.Sequential):
        num_calls = 0

        def state_dict(self, *args, **kwargs):
            Counting.num_calls += 1
            return super().state_dict(*args, **kwargs)

    model = Counting(*(nn.Linear(2, 2) for _ in range(20)))
    state = nn.Sequential(*model).state_dict()
    Counting.num_calls = 0
    _checkpointing.load_model_state(model, state, "The file")
    assert Counting.num_calls <= 3


def test_all_differences_of_models_are_listed():
    own = {"a": torch.ones(2), "b": torch.ones(1), "c": 1}
    saved = {"a": torch.ones(3), "d": torch.ones(1), "c": 2}
    with pytest.raises(CheckpointError) as caught:
        _checkpointing.check_same_model(own, saved, "The file")
    assert str(caught.value).startswith(
        "The file belongs to another model. Parameters missing in it: b; unexpected in it: d; "
        "of another shape: a (3,) instead of (2,). Nothing was loaded."
    )
    _checkpointing.check_same_model(own, own, "The file")


def test_states_are_taken_of_the_parts_that_have_one():
    class Part:
        value = 1

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    part, other = Part(), Part()
    part.value = 5
    states = _checkpointing.states_of({"one": part, "none": None, "number": 3})
    assert states == {"one": {"value": 5}}
    _checkpointing.load_states({"one": other, "none": None, "absent": Part()}, {**states, "none": {}})
    assert other.value == 5


# --- training states ---------------------------------------------------------------------------------------------


def make_state(directory, model=None, optimizer=None, extra=None):
    """Write a training state of a model that has been trained."""
    model = make_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if optimizer is None else optimizer
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"current_epoch": 2, **(extra or {})}
    _checkpointing.save_state(directory, Accelerator(), model, optimizer, state, {"rank": 0})
    return model, optimizer


def load_state(directory, model, optimizer=None):
    return _checkpointing.load_state(directory, Accelerator(), model, optimizer)


def test_a_state_restores_model_optimizer_and_generators(tmp_path):
    torch.manual_seed(3)
    model, optimizer = make_state(tmp_path / "new" / "state", extra={"metric": np.float64(0.5)})
    expected = torch.rand(2)
    other = make_model(seed=9)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    trainer_state, process_state = load_state(tmp_path / "new" / "state", other, other_optimizer)
    assert torch.equal(torch.rand(2), expected)
    assert (trainer_state, process_state) == ({"current_epoch": 2, "metric": 0.5}, {"rank": 0})
    assert_same_weights(weights_of(model), weights_of(other))
    assert other_optimizer.param_groups[0]["lr"] == 0.1
    momentum = [state["momentum_buffer"] for state in other_optimizer.state.values()]
    assert all(
        torch.equal(one, state["momentum_buffer"])
        for one, state in zip(momentum, optimizer.state.values(), strict=True)
    )


def test_a_state_lists_its_files_and_versions(tmp_path):
    make_state(tmp_path / "state")
    manifest = _checkpointing.verify_state(tmp_path / "state")
    assert manifest["format_version"] == 1
    assert manifest["num_processes"] == 1
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert set(manifest["files"]) == set(names_in(tmp_path / "state")) - {"manifest.json"}
    assert names_in(tmp_path) == ["state"]


def test_a_new_state_takes_the_place_of_the_old_one(tmp_path):
    make_state(tmp_path / "state", extra={"number": 1})
    (tmp_path / "state" / "stray").touch()
    make_state(tmp_path / "state", extra={"number": 2})
    assert load_state(tmp_path / "state", make_model())[0]["number"] == 2
    assert names_in(tmp_path) == ["state"]
    assert "stray" not in names_in(tmp_path / "state")


def test_a_state_of_a_compiled_model_fits_the_plain_one(tmp_path):
    model = torch.compile(make_model(), backend="eager")
    make_state(tmp_path / "state", model)
    plain = make_model(seed=8)
    load_state(tmp_path / "state", plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert torch.equal(plain.weight, model.weight)


def test_a_model_with_shared_weights_is_recognised(tmp_path):
    def tied(seed):
        model = nn.Sequential(make_model(seed=seed), nn.Linear(1, 3), make_model(seed=seed + 1))
        model[2].weight = model[0].weight
        return model

    model, _ = make_state(tmp_path / "state", tied(1))
    other = tied(5)
    load_state(tmp_path / "state", other)
    assert_same_weights(weights_of(model), weights_of(other))


def test_a_missing_state_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no training state '.*nothing'.*`save_training_state`"):
        load_state(tmp_path / "nothing", make_model())


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"files": 3}', "{"])
def test_a_state_without_a_manifest_is_not_complete(tmp_path, text):
    make_state(tmp_path / "state")
    manifest = tmp_path / "state" / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(CheckpointError, match=r"no complete training state.*no readable manifest.json"):
        load_state(tmp_path / "state", make_model())


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, flip_a_byte, lambda path: path.write_bytes(b"x")])
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "process_0.pt", "optimizer.bin"])
def test_a_damaged_state_is_refused_and_nothing_is_changed(tmp_path, name, damage):
    make_state(tmp_path / "state")
    damage(tmp_path / "state" / name)
    model = make_model(seed=9)
    before, random_state = weights_of(model), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} is missing or altered"):
        load_state(tmp_path / "state", model)
    assert_same_weights(before, weights_of(model))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_state_of_another_model_is_refused_and_nothing_is_changed(tmp_path):
    make_state(tmp_path / "state")
    model = nn.Sequential(make_model(seed=9))
    before = weights_of(model)
    with pytest.raises(CheckpointError, match=r"missing in it: 0.bias, 0.weight; unexpected in it: bias, weight"):
        load_state(tmp_path / "state", model)
    assert_same_weights(before, weights_of(model))


@pytest.mark.usefixtures("_full_disk")
@pytest.mark.parametrize("is_replacing", [True, False])
def test_a_full_disk_leaves_the_old_state_and_no_rest(tmp_path, is_replacing):
    if is_replacing:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "old").touch()
    with pytest.raises(CheckpointError, match=r"'.*state' could not be written.*untouched"):
        make_state(tmp_path / "state")
    assert names_in(tmp_path) == (["state"] if is_replacing else [])


@pytest.mark.parametrize(
    "value", [lambda: None, argparse.Namespace(), np.array([{}])], ids=["function", "namespace", "array of objects"]
)
def test_a_state_that_could_not_be_read_back_is_refused_and_leaves_no_rest(tmp_path, value):
    make_state(tmp_path / "state", extra={"number": 1})
    with pytest.raises(CheckpointError):
        make_state(tmp_path / "state", extra={"mine": value})
    assert names_in(tmp_path) == ["state"]
    assert load_state(tmp_path / "state", make_model())[0]["number"] == 1


def test_a_failure_while_the_states_are_exchanged_keeps_the_old_one(tmp_path, monkeypatch):
    make_state(tmp_path / "state", extra={"number": 1})
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="untouched"):
        make_state(tmp_path / "state", extra={"number": 2})
    monkeypatch.undo()
    assert load_state(tmp_path / "state", make_model())[0]["number"] == 1


def test_what_an_interrupted_save_left_is_cleared_away(tmp_path):
    for name in (".state.tmp", ".state.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stray").touch()
    make_state(tmp_path / "state")
    assert names_in(tmp_path) == ["state"]
    assert "stray" not in names_in(tmp_path / "state")


def test_a_package_that_is_not_installed_has_no_version(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_checkpointing, "version", missing)
    make_state(tmp_path / "state")
    manifest = json.loads((tmp_path / "state" / "manifest.json").read_text())
    assert manifest["versions"] == {"pytorch-accelerated": None, "torch": None, "accelerate": None}


def test_saving_leaves_what_the_user_prepared_to_the_accelerator(tmp_path):
    accelerator = Accelerator()
    other = accelerator.prepare(make_model())
    trainer = make_trainer(accelerator=accelerator)
    trainer.train(make_dataset(4), num_epochs=1)
    trainer.save_training_state(tmp_path / "state")
    trainer.load_training_state(tmp_path / "state")
    assert accelerator._models == [other]
