"""The private names of Accelerate that the library depends on, checked against the installed version.

If a test here fails after an update of Accelerate, adapt `AcceleratorRegistry`, which alone uses these names.
"""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from _support import make_dataset, make_model, run_python
from pytorch_accelerated._distributed.registry import AcceleratorRegistry

REGISTRIES = {"_models", "_optimizers", "_dataloaders", "_schedulers", "_custom_objects"}


class Counter:
    """Something for `Accelerator.register_for_checkpointing`."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.fixture
def accelerator():
    accelerator = Accelerator()
    yield accelerator
    accelerator.free_memory()


def prepare_all(accelerator):
    """Prepare one object of each kind, and return them by the list that Accelerate should keep them in."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objects = model, optimizer, DataLoader(make_dataset(4)), StepLR(optimizer, 1)
    prepared = accelerator.prepare(*objects)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    names = ("_models", "_optimizers", "_dataloaders", "_schedulers", "_custom_objects")
    return dict(zip(names, (*prepared, counter), strict=True))


def registered_in(accelerator):
    """Return the contents of all non-empty lists of objects that an accelerator has."""
    lists = {name: value for name, value in vars(accelerator).items() if isinstance(value, list) and value}
    return {name: value for name, value in lists.items() if not all(isinstance(item, str) for item in value)}


# --- what Accelerate does ----------------------------------------------------------------------------------------


def test_prepare_fills_exactly_the_lists_that_the_registry_edits(accelerator):
    before = registered_in(accelerator)
    prepared = prepare_all(accelerator)
    assert prepared.keys() == REGISTRIES
    assert registered_in(accelerator) == before | {name: [item] for name, item in prepared.items()}


def test_free_memory_empties_the_lists_that_forget_edits(accelerator):
    prepared = prepare_all(accelerator)
    accelerator.free_memory()
    assert registered_in(accelerator) == {"_custom_objects": [prepared["_custom_objects"]]}


def test_prepare_marks_its_results_as_prepared(accelerator):
    prepared = prepare_all(accelerator)
    counter = prepared.pop("_custom_objects")
    assert all(map(AcceleratorRegistry.is_prepared, prepared.values()))
    assert not AcceleratorRegistry.is_prepared(counter)
    assert not AcceleratorRegistry.is_prepared(None)


def test_prepare_registers_a_marked_object_without_wrapping_it(accelerator):
    model = make_model()
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(make_dataset(4))
    for item in (model, optimizer, loader):
        AcceleratorRegistry.mark_as_prepared(item)
    prepared = accelerator.prepare(model, optimizer, loader)
    assert all(left is right for left, right in zip(prepared, (model, optimizer, loader), strict=True))
    assert registered_in(accelerator) == {"_models": [model], "_optimizers": [optimizer], "_dataloaders": [loader]}


# --- what the registry does --------------------------------------------------------------------------------------


def test_forget_drops_the_named_objects_only(accelerator):
    kept, forgotten = prepare_all(accelerator), prepare_all(accelerator)
    custom_objects = kept.pop("_custom_objects"), forgotten.pop("_custom_objects")
    AcceleratorRegistry(accelerator).forget(*forgotten.values(), None)
    expected = {name: [item] for name, item in kept.items()} | {"_custom_objects": list(custom_objects)}
    assert registered_in(accelerator) == expected


def test_a_forgotten_model_can_be_garbage_collected(accelerator):
    model = accelerator.prepare(make_model())
    reference = weakref.ref(model)
    AcceleratorRegistry(accelerator).forget(model)
    del model
    gc.collect()
    assert reference() is None


def test_save_state_sees_only_the_objects_that_it_is_restricted_to(accelerator, tmp_path):
    registered = prepare_all(accelerator)
    model = accelerator.prepare(make_model(seed=7))
    before = registered_in(accelerator)
    with AcceleratorRegistry(accelerator).restricted_to(model, registered["_optimizers"]):
        accelerator.save_state(str(tmp_path / "both"), safe_serialization=False)
    with AcceleratorRegistry(accelerator).restricted_to(model, None):
        accelerator.save_state(str(tmp_path / "model"), safe_serialization=False)
    assert registered_in(accelerator) == before
    names = {folder.name: {path.name for path in folder.iterdir()} for folder in tmp_path.iterdir()}
    random_states = {name for name in names["model"] if name.startswith("random_states")}
    assert names["model"] - random_states == {"pytorch_model.bin"}
    assert names["both"] - random_states == {"pytorch_model.bin", "optimizer.bin"}
    saved = torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(saved["weight"], model.weight)


def test_the_lists_are_restored_after_an_error(accelerator):
    prepare_all(accelerator)
    before = registered_in(accelerator)

    def fail():
        model = make_model()
        with AcceleratorRegistry(accelerator).restricted_to(model, None):
            assert registered_in(accelerator) == {"_models": [model]}
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert registered_in(accelerator) == before


# --- attributes of a model ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_fresh_accelerate_state")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_prepare_sets_no_other_attributes_of_a_model_than_those_that_are_restored(mixed_precision):
    accelerator, model = Accelerator(mixed_precision=mixed_precision), make_model()
    attributes, before = dict(vars(model)), AcceleratorRegistry.forward_attributes(model)
    assert before == {}
    assert accelerator.prepare(model) is model
    changed = {name for name, value in vars(model).items() if attributes.get(name) is not value}
    assert changed == set(AcceleratorRegistry.forward_attributes(model))
    assert ("forward" in changed) == (mixed_precision == "bf16")
    AcceleratorRegistry.restore_forward(model, before)
    assert vars(model) == attributes
    assert model.forward == type(model).forward.__get__(model)
    pickle.dumps(model)


def test_an_object_without_attributes_of_its_own_is_left_alone():
    assert AcceleratorRegistry.forward_attributes(None) == {}
    AcceleratorRegistry.restore_forward(None, {})


# --- settings of the process -------------------------------------------------------------------------------------

SETTINGS = """
from accelerate import Accelerator
from pytorch_accelerated._distributed.registry import AcceleratorRegistry
print(AcceleratorRegistry.has_process_state(), AcceleratorRegistry.process_precision())
Accelerator(cpu=True, mixed_precision="bf16")
print(AcceleratorRegistry.has_process_state(), AcceleratorRegistry.process_precision())
"""


def test_queries_tell_the_settings_of_the_process_without_initializing_them():
    assert run_python(SETTINGS).splitlines() == ["False None", "True bf16"]


def test_the_process_has_a_state_once_there_is_an_accelerator(accelerator, monkeypatch):
    assert AcceleratorRegistry.has_process_state()
    monkeypatch.setattr(PartialState, "_shared_state", {})
    assert not AcceleratorRegistry.has_process_state()
