"""Accelerators, decorators and gathering, in one process; two true processes are in `distributed/`."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import PartialState
from torch.utils.data import DataLoader

from _support import Batches, Samples, SizedBatches, make_dataset, make_model, run_python
from pytorch_accelerated._data import loaders as loaders_module
from pytorch_accelerated._distributed import accelerator as accelerator_module
from pytorch_accelerated._distributed import collectives
from pytorch_accelerated.utils import local_process_zero_first, local_process_zero_only, world_process_zero_only

Pair = namedtuple("Pair", ["left", "right"])


@pytest.fixture
def accelerator():
    return Accelerator()


# --- decorators --------------------------------------------------------------------------------------------------

DECORATORS = {"RANK": world_process_zero_only, "LOCAL_RANK": local_process_zero_only}


@pytest.mark.parametrize("variable", DECORATORS)
@pytest.mark.parametrize(("rank", "expected"), [(None, "called"), ("0", "called"), ("1", None)])
def test_before_there_is_an_accelerator_the_rank_comes_from_the_environment(variable, rank, expected, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.delenv(variable, raising=False)
    if rank is not None:
        monkeypatch.setenv(variable, rank)
    assert DECORATORS[variable](lambda: "called")() == expected
    assert PartialState._shared_state == {}  # nobody's settings were decided by asking


@pytest.mark.parametrize("variable", DECORATORS)
def test_the_accelerators_rank_counts_once_there_is_one(variable, monkeypatch, accelerator):
    monkeypatch.setenv(variable, "1")
    assert DECORATORS[variable](lambda: "called")() == "called"


@pytest.mark.parametrize("decorate", [*DECORATORS.values(), local_process_zero_first])
def test_a_decorated_function_keeps_name_arguments_and_result(decorate, accelerator):
    @decorate
    def function(a, *, b=2):
        """Add."""
        return a + b

    assert function(1, b=4) == 5
    assert (function.__name__, function.__doc__) == ("function", "Add.")


def test_processes_of_this_node_are_told_by_the_environment(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert collectives.num_local_processes(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert collectives.num_local_processes(8) == 4


# --- exchange ----------------------------------------------------------------------------------------------------


def test_one_process_exchanges_nothing(accelerator):
    value = object()
    assert collectives.broadcast_from_main(value, 1) is value
    sums = collectives.sum_over_processes(accelerator, {"b": (1, 2.5), "a": (torch.tensor(0.5), 3)})
    assert {name: [float(number) for number in pair] for name, pair in sums.items()} == {"a": [0.5, 3], "b": [1, 2.5]}


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_uneven_gathering_keeps_rows_that_equal_the_padding(accelerator, rows):
    tensor = torch.full((rows, 2), -1.0)
    assert torch.equal(collectives.gather_uneven(accelerator, tensor, -1), tensor)


def test_uneven_gathering_keeps_the_structure(accelerator):
    value = OrderedDict(a=[torch.ones(2), Pair(torch.ones(1), (torch.tensor(3),))])
    gathered = collectives.gather_uneven(accelerator, value, 0)
    assert type(gathered) is OrderedDict
    assert type(gathered["a"]) is list
    assert type(gathered["a"][1]) is Pair
    assert type(gathered["a"][1].right) is tuple
    assert gathered["a"][1].right[0].item() == 3


def test_a_seed_that_is_given_is_taken_and_otherwise_that_of_the_program(accelerator):
    torch.manual_seed(17)
    assert accelerator_module.choose_seed(accelerator, 3) == 3
    assert accelerator_module.choose_seed(accelerator, None) == 17


def test_another_process_that_was_seeded_alike_is_seeded_anew(monkeypatch):
    def draw_on(process_index, own_seed):
        torch.manual_seed(own_seed)
        monkeypatch.setattr(accelerator_module, "broadcast_from_main", lambda value, num_processes: 17)
        stand_in = SimpleNamespace(process_index=process_index, num_processes=3)
        assert accelerator_module.choose_seed(stand_in, None) == 17
        return torch.rand(1).item()

    drawn = [draw_on(0, 17), draw_on(1, 17), draw_on(2, 17)]
    assert len(set(drawn)) == 3
    torch.manual_seed(99)
    assert draw_on(1, 99) == torch.rand(1, generator=torch.Generator().manual_seed(99)).item()


# --- accelerators ------------------------------------------------------------------------------------------------


def test_an_accelerator_is_made_or_taken():
    ready = Accelerator()
    assert accelerator_module.create_accelerator(ready, None) is ready
    assert accelerator_module.create_accelerator(ready, "no") is ready
    assert accelerator_module.create_accelerator({"project_dir": "here"}, "no").project_dir == "here"
    assert isinstance(accelerator_module.create_accelerator(None, None), Accelerator)


def test_the_users_arguments_are_not_changed():
    arguments = {"cpu": True}
    accelerator_module.create_accelerator(arguments, "no")
    assert arguments == {"cpu": True}


@pytest.mark.parametrize("source", ["cpu", 3, Accelerator, [("cpu", True)]])
def test_anything_else_is_no_accelerator(source):
    with pytest.raises(TypeError, match=rf"`accelerator` is .*{type(source).__name__}.*dictionary of keyword"):
        accelerator_module.create_accelerator(source, None)


def test_a_precision_is_given_in_one_place():
    for source in (Accelerator(), {"mixed_precision": "no"}):
        with pytest.raises(ValueError, match=r"`mixed_precision` is 'fp16', but the `accelerator` has 'no'"):
            accelerator_module.create_accelerator(source, "fp16")


def test_another_precision_than_that_of_the_process_is_explained(accelerator):
    with pytest.raises(ValueError, match=r"`mixed_precision` is 'bf16', but this process already uses 'no'.*kernel"):
        accelerator_module.create_accelerator(None, "bf16")
    with pytest.raises(ValueError, match=r"'bf16', but this process"):
        accelerator_module.create_accelerator({"mixed_precision": "bf16"}, None)
    with pytest.raises(ValueError, match=r"bfloat16.*'fp16', 'bf16'"):
        accelerator_module.create_accelerator(None, "bfloat16")


FIRST = """
from pytorch_accelerated._distributed.accelerator import create_accelerator
try:
    create_accelerator({"rng_types": ["torch"], "mixed_precision": "no", "project_dir": "a"}, "fp17")
except ValueError as error:
    print("1:", error)
try:
    create_accelerator(None, "fp17")
except ValueError as error:
    print("2:", error)
print(create_accelerator({"mixed_precision": None}, "bf16").mixed_precision)
"""


def test_a_precision_that_accelerate_does_not_know_is_its_own_error():
    printed = run_python(FIRST)
    assert "1: `mixed_precision` is 'fp17', but the `accelerator` has 'no'" in printed
    assert "2: " in printed
    assert "kernel" not in printed
    assert printed.endswith("bf16\n")


def test_an_error_that_is_not_about_precision_stays_as_it_is(accelerator):
    with pytest.raises(ValueError, match="is not a valid DynamoBackend") as caught:
        accelerator_module.create_accelerator({"dynamo_backend": "no such thing"}, "no")
    assert "kernel" not in str(caught.value)


def accumulating(num_steps, kind=DistributedType.NO):
    return SimpleNamespace(gradient_accumulation_steps=num_steps, distributed_type=kind)


@pytest.mark.parametrize("own_number", [1, 4, "auto"])
def test_accelerate_is_kept_from_scaling_losses(own_number):
    accelerator = accumulating(own_number)
    accelerator_module.take_over_accumulation(accelerator, 4)
    assert accelerator.gradient_accumulation_steps == 1


def test_another_accumulation_than_that_of_the_accelerator_is_refused():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=3, but `train` was called with 2"):
        accelerator_module.take_over_accumulation(accumulating(3), 2)


def test_deepspeed_counts_its_own_window():
    accelerator = accumulating(3, DistributedType.DEEPSPEED)
    accelerator_module.take_over_accumulation(accelerator, 2)
    assert accelerator.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (DistributedType.NO, False),
        (DistributedType.MULTI_GPU, False),
        (DistributedType.FSDP, True),
        (DistributedType.DEEPSPEED, True),
    ],
)
def test_sharded_models_are_told_from_whole_ones(kind, expected):
    assert accelerator_module.is_sharded(SimpleNamespace(distributed_type=kind)) is expected


# --- entering and leaving ----------------------------------------------------------------------------------------


def test_everything_is_prepared_at_once_and_returned_in_its_place(accelerator):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Samples(make_dataset(4)))
    eval_dls = {"a": DataLoader(Samples(make_dataset(2))), "b": [1]}
    model, optimizer, train_dl, prepared = accelerator_module.prepare(accelerator, model, optimizer, loader, eval_dls)
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert type(train_dl).__mro__[1] is DataLoaderShard
    assert isinstance(train_dl, DataLoader)
    assert list(prepared) == ["a", "b"]
    assert (len(prepared["a"]), prepared["b"]) == (2, [1])
    assert len(accelerator._dataloaders) == 2


@pytest.mark.parametrize("eval_dl", [None, {}, [1, 2]])
def test_what_is_missing_stays_so(accelerator, eval_dl):
    model = make_model()
    assert accelerator_module.prepare(accelerator, model, None, None, eval_dl) == (model, None, None, eval_dl)


def test_iterables_of_batches_are_placed_on_a_device_that_is_not_the_host():
    stand_in = SimpleNamespace(device=torch.device("meta"))
    placed = accelerator_module._place(stand_in, Batches(make_dataset(4), 2))
    assert isinstance(placed, loaders_module.PlacedBatches)
    loader = DataLoader(make_dataset(4))
    assert accelerator_module._place(stand_in, loader) is loader
    assert accelerator_module._place(stand_in, None) is None


def test_a_loader_without_anything_to_skip_is_used_as_it_is(accelerator):
    loader = object()
    assert accelerator_module.skip_batches(accelerator, loader, 0) is loader


def test_skipped_samples_are_not_loaded(accelerator):
    loaded = []

    class Counted(Samples):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    loader = accelerator_module.prepare(DataLoader(Counted(make_dataset(12)), batch_size=4))
    rest = accelerator_module.skip_batches(accelerator, loader, 2)
    assert len(list(rest)) == len(rest) == 1
    assert loaded == [8, 9, 10, 11]


def test_batches_of_an_iterable_are_skipped_by_walking_through(accelerator):
    rest = accelerator_module.skip_batches(accelerator, SizedBatches(make_dataset(12), 4, 3), 2)
    assert len(list(rest)) == len(rest) == 1


def test_only_what_is_named_is_released(accelerator):
    kept, released = accelerator_module.prepare(make_model()), accelerator_module.prepare(make_model())
    accelerator_module.release(accelerator, released, None)
    assert accelerator._models == [kept]


def test_saving_sees_one_model_and_one_optimizer_and_the_rest_comes_back(accelerator):
    other = accelerator_module.prepare(make_model())
    model = make_model()

    def fail():
        with accelerator_module.registered(accelerator, model, None):
            assert accelerator._models == [model]
            assert accelerator._optimizers == accelerator._dataloaders == accelerator._custom_objects == []
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert accelerator._models == [other]


def test_a_model_leaves_as_it_came(accelerator):
    model = make_model()
    attributes = dict(vars(model))
    prepared = accelerator_module.PreparedModel(model)
    prepared.prepared = accelerator_module.prepare(model)
    model._original_forward = model.forward
    model.forward = lambda inputs: inputs
    assert prepared.restore(accelerator, prepared.prepared) is model
    assert vars(model).keys() == attributes.keys()
    assert type(model).forward.__get__(model) == model.forward


def test_a_forward_of_the_users_own_stays(accelerator):
    model = make_model()
    model.forward = own = lambda inputs: inputs
    prepared = accelerator_module.PreparedModel(model)
    prepared.prepared = model
    model.forward = lambda inputs: None
    prepared.restore(accelerator, model)
    assert model.forward is own


def test_a_model_that_a_callback_put_there_is_kept(accelerator):
    prepared = accelerator_module.PreparedModel(make_model())
    other = make_model()
    assert prepared.restore(accelerator, other) is other


def test_a_model_that_is_none_leaves_as_it_came(accelerator):
    assert accelerator_module.PreparedModel(None).restore(accelerator, None) is None


@pytest.mark.parametrize(
    ("world_size", "has_device", "given", "expected"),
    [
        ("2", False, {}, {"cpu": True}),
        ("2", False, {"cpu": False}, {"cpu": False}),
        ("2", True, {}, {}),
        ("1", False, {}, {}),
    ],
)
def test_processes_without_a_device_are_one_training_not_many(monkeypatch, world_size, has_device, given, expected):
    """Started by torchrun, Accelerate would take each process for the only one."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_device)
    monkeypatch.setattr(accelerator_module, "Accelerator", type("Recording", (dict,), {}))
    settings = accelerator_module.create_accelerator(given, None)
    assert {name: settings[name] for name in settings if name == "cpu"} == expected
