"""How objects enter and leave Accelerate, in one process; several real processes are in `tests/distributed/`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import DataLoader

from _support import Batches, Samples, SizedBatches, make_dataset, make_model, run_python
from pytorch_accelerated._data.build import Placement, rebuild_loader
from pytorch_accelerated._data.loaders import PlacedBatches
from pytorch_accelerated._distributed import accelerator as accelerator_module
from pytorch_accelerated._distributed import precision
from pytorch_accelerated._distributed.accelerator import (
    PreparedModel,
    check_clipping,
    choose_seed,
    create_accelerator,
    disable_loss_scaling,
    is_sharded,
    placement_of,
    prepare,
    release,
    skip_batches,
)
from pytorch_accelerated._distributed.fast_path import FastPathLoader

# --- the seed ----------------------------------------------------------------------------------------------------


def test_the_users_seed_is_chosen_or_else_that_of_the_program():
    torch.manual_seed(17)
    assert choose_seed(3, process_index=0, num_processes=1) == 3
    assert choose_seed(None, process_index=0, num_processes=1) == 17


def test_a_rank_that_was_seeded_like_the_main_process_is_seeded_again(monkeypatch):
    monkeypatch.setattr(accelerator_module, "broadcast_from_main", lambda value, num_processes: 17)

    def draw_on(process_index, local_seed):
        torch.manual_seed(local_seed)
        assert choose_seed(None, process_index, num_processes=3) == 17
        return torch.rand(1).item()

    drawn = [draw_on(0, 17), draw_on(1, 17), draw_on(2, 17)]
    assert len(set(drawn)) == 3
    assert draw_on(1, 99) == torch.rand(1, generator=torch.Generator().manual_seed(99)).item(), "the user's own seed"


# --- creating an accelerator -------------------------------------------------------------------------------------


def test_an_accelerator_is_created_unless_the_user_passes_one():
    ready = Accelerator()
    assert create_accelerator(ready, None) is ready
    assert create_accelerator(ready, "no") is ready
    assert create_accelerator({"project_dir": "here"}, "no").project_dir == "here"
    assert isinstance(create_accelerator(None, None), Accelerator)


def test_the_users_arguments_are_not_changed():
    arguments = {"cpu": True}
    create_accelerator(arguments, "no")
    assert arguments == {"cpu": True}


@pytest.mark.parametrize("source", ["cpu", 3, Accelerator, [("cpu", True)]])
def test_an_accelerator_of_another_type_is_refused(source):
    with pytest.raises(TypeError, match=rf"`accelerator` is .*{type(source).__name__}.*dictionary of keyword"):
        create_accelerator(source, None)


def test_two_different_precisions_are_refused():
    for source in (Accelerator(), {"mixed_precision": "no"}):
        with pytest.raises(ValueError, match=r"`mixed_precision` is 'fp16', but the `accelerator` has 'no'.*agree"):
            create_accelerator(source, "fp16")


REFUSED = """
from accelerate import Accelerator
from pytorch_accelerated._distributed.accelerator import create_accelerator

create = Accelerator.__init__

def fail(self, *args, **kwargs):
    create(self, *args, **kwargs)
    raise ImportError("a plugin is missing")

Accelerator.__init__ = fail
try:
    create_accelerator(None, "bf16")
except ImportError:
    Accelerator.__init__ = create
print(create_accelerator(None, "no").mixed_precision)
"""


def test_an_accelerator_that_cannot_be_created_sets_nothing_for_later_ones():
    assert run_python(REFUSED) == "no\n"


UNKNOWN_PRECISION = """
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


def test_a_precision_that_accelerate_does_not_know_raises_its_error():
    printed = run_python(UNKNOWN_PRECISION)
    assert "1: `mixed_precision` is 'fp17', but the `accelerator` has 'no'" in printed
    assert "2: " in printed
    assert "kernel" not in printed
    assert printed.endswith("bf16\n")


def test_an_error_that_is_not_about_precision_is_raised_unchanged(accelerator):
    with pytest.raises(ValueError, match="is not a valid DynamoBackend") as caught:
        create_accelerator({"dynamo_backend": "no such thing"}, "no")
    assert "kernel" not in str(caught.value)


@pytest.mark.parametrize(
    ("world_size", "has_device", "given", "expected"),
    [
        ("2", False, {}, {"cpu": True}),
        ("2", False, {"cpu": False}, {"cpu": False}),
        ("2", True, {}, {}),
        ("1", False, {}, {}),
    ],
)
def test_several_processes_without_a_device_train_together_on_the_cpu(
    monkeypatch, world_size, has_device, given, expected
):
    """Started by torchrun without `cpu=True`, Accelerate would let each process train separately."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_device)
    monkeypatch.setattr(precision, "Accelerator", type("Recording", (dict,), {}))
    settings = create_accelerator(given, None)
    assert {name: settings[name] for name in settings if name == "cpu"} == expected


# --- settings of an accelerator ----------------------------------------------------------------------------------


def make_accumulating(num_steps, distributed_type=DistributedType.NO):
    return SimpleNamespace(gradient_accumulation_steps=num_steps, distributed_type=distributed_type)


@pytest.mark.parametrize("configured", [1, 4, "auto"])
def test_accelerate_does_not_scale_losses(configured):
    accelerator = make_accumulating(configured)
    disable_loss_scaling(accelerator, 4)
    assert accelerator.gradient_accumulation_steps == 1


def test_other_accumulation_steps_than_those_of_the_accelerator_are_refused():
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps=3, but `train` was called with 2\. The two must agree"
    ):
        disable_loss_scaling(make_accumulating(3), 2)


def test_deepspeed_keeps_its_accumulation_steps():
    accelerator = make_accumulating(3, DistributedType.DEEPSPEED)
    disable_loss_scaling(accelerator, 2)
    assert accelerator.gradient_accumulation_steps == 3


def make_clipping(distributed_type, configured=None):
    plugin = SimpleNamespace(deepspeed_config={} if configured is None else {"gradient_clipping": configured})
    return SimpleNamespace(distributed_type=distributed_type, deepspeed_plugin=plugin)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_clipping_by_value_is_refused_where_it_is_not_done(kind):
    with pytest.raises(ValueError, match=r"`gradient_clip_value` is 0.5, but FSDP and DeepSpeed cannot"):
        check_clipping(make_clipping(kind), 0.5, None)
    check_clipping(make_clipping(kind), None, None)


def test_clipping_by_norm_is_refused_where_deepspeed_does_something_else():
    for configured in (None, 2.0, "auto"):
        with pytest.raises(ValueError, match=r"`gradient_clip_norm` is 1.0, but DeepSpeed.*`gradient_clipping` is"):
            check_clipping(make_clipping(DistributedType.DEEPSPEED, configured), None, 1.0)
    check_clipping(make_clipping(DistributedType.DEEPSPEED, 1.0), None, 1.0)
    check_clipping(make_clipping(DistributedType.FSDP), None, 1.0)
    check_clipping(make_clipping(DistributedType.MULTI_GPU), 0.5, 1.0)


@pytest.mark.parametrize(
    ("distributed_type", "expected"),
    [
        (DistributedType.NO, False),
        (DistributedType.MULTI_GPU, False),
        (DistributedType.FSDP, True),
        (DistributedType.DEEPSPEED, True),
    ],
)
def test_fsdp_and_deepspeed_shard_the_model(distributed_type, expected):
    assert is_sharded(SimpleNamespace(distributed_type=distributed_type)) is expected


# --- preparing ---------------------------------------------------------------------------------------------------


def test_prepare_returns_each_object_in_its_place(accelerator):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Samples(make_dataset(4)))
    eval_dls = {"a": DataLoader(Samples(make_dataset(2))), "b": [1]}
    model, optimizer, train_dl, prepared = prepare(accelerator, model, optimizer, loader, eval_dls)
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert type(train_dl).__mro__[1] is DataLoaderShard
    assert isinstance(train_dl, DataLoader)
    assert list(prepared) == ["a", "b"]
    assert (len(prepared["a"]), prepared["b"]) == (2, [1])
    assert len(accelerator._dataloaders) == 2


@pytest.mark.parametrize("eval_dls", [{}, {"": [1, 2]}])
def test_prepare_returns_none_for_a_missing_object(accelerator, eval_dls):
    model = make_model()
    assert prepare(accelerator, model, None, None, eval_dls) == (model, None, None, eval_dls)


def test_a_rebuilt_loader_is_prepared_as_it_is_also_a_second_time(accelerator):
    loader = rebuild_loader(DataLoader(Samples(make_dataset(4))), placement_of(accelerator)).loader
    assert type(loader) is FastPathLoader
    for _ in range(2):
        _, _, train_dl, eval_dls = prepare(accelerator, make_model(), None, loader, {"": loader})
        assert train_dl is loader
        assert eval_dls[""] is loader
    assert accelerator._dataloaders == [loader]


def test_a_loader_that_replaces_the_rebuilt_one_is_sharded_on_activation():
    """A subclass of the trainer may put it there before it lets the trainer prepare."""
    placement = Placement(1, 2, create_loader=FastPathLoader)
    loader = accelerator_module._activate(DataLoader(make_dataset(12), batch_size=4), placement)
    assert type(loader) is FastPathLoader
    assert list(loader.batch_sampler) == [[4, 5, 6, 7], [10, 11]]
    assert accelerator_module._activate(loader, placement) is loader, "it would be sharded twice"


def make_placed(**changes):
    settings = {
        "distributed_type": DistributedType.MULTI_CPU,
        "process_index": 1,
        "num_processes": 2,
        "device": torch.device("meta"),
        "device_placement": True,
        "split_batches": False,
        "dispatch_batches": None,
        "use_stateful_dataloader": False,
    }
    return SimpleNamespace(**settings | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"distributed_type": DistributedType.DEEPSPEED},
        {"distributed_type": DistributedType.MEGATRON_LM},
        {"distributed_type": DistributedType.XLA},
        {"parallelism_config": object()},
        {"split_batches": True},
        {"dispatch_batches": True},
        {"use_stateful_dataloader": True},
    ],
    ids=lambda changes: "-".join(str(part) for part in next(iter(changes.items())) if type(part) is not object),
)
def test_sharding_is_left_to_accelerate_if_its_settings_demand_another_one(changes):
    assert placement_of(make_placed()).create_loader is not None
    assert placement_of(make_placed(**changes)).create_loader is None


def test_the_placement_has_the_ranks_and_the_device_of_the_accelerator():
    placement = placement_of(make_placed())
    assert (placement.process_index, placement.num_processes, placement.num_batches_per_step) == (1, 2, 2)
    assert placement_of(make_placed(split_batches=True)).num_batches_per_step == 1
    assert placement.create_loader(make_dataset(4)).device == torch.device("meta")
    assert placement_of(make_placed(device_placement=False)).create_loader(make_dataset(4)).device is None


def test_batches_of_an_iterable_are_moved_to_a_device():
    on_device = SimpleNamespace(device=torch.device("meta"))
    assert isinstance(accelerator_module._place(on_device, Batches(make_dataset(4), 2)), PlacedBatches)
    loader = DataLoader(make_dataset(4))
    assert accelerator_module._place(on_device, loader) is loader
    assert accelerator_module._place(on_device, None) is None


# --- skipping batches --------------------------------------------------------------------------------------------


def test_skipping_no_batch_returns_the_loader_itself(accelerator):
    loader = object()
    assert skip_batches(accelerator, loader, 0) is loader


def test_skipped_samples_are_not_loaded(accelerator):
    loaded = []

    class Counted(Samples):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    loader = accelerator.prepare(DataLoader(Counted(make_dataset(12)), batch_size=4))
    rest = skip_batches(accelerator, loader, 2)
    assert len(list(rest)) == len(rest) == 1
    assert loaded == [8, 9, 10, 11]


def test_batches_of_an_iterable_are_skipped_by_reading_them(accelerator):
    rest = skip_batches(accelerator, SizedBatches(make_dataset(12), 4, 3), 2)
    assert len(list(rest)) == len(rest) == 1


# --- after the run -----------------------------------------------------------------------------------------------


def test_release_forgets_the_given_objects_only(accelerator):
    kept, released = accelerator.prepare(make_model()), accelerator.prepare(make_model())
    release(accelerator, released, None)
    assert accelerator._models == [kept]


def test_a_restored_model_has_its_original_attributes(accelerator):
    model = make_model()
    attributes = dict(vars(model))
    prepared = PreparedModel(model)
    prepared.prepared = accelerator.prepare(model)
    model._original_forward = model.forward
    model.forward = lambda inputs: inputs
    assert prepared.restore(accelerator, prepared.prepared) is model
    assert vars(model).keys() == attributes.keys()
    assert type(model).forward.__get__(model) == model.forward


def test_a_forward_that_the_user_has_set_is_restored(accelerator):
    model = make_model()
    model.forward = users_forward = lambda inputs: inputs
    prepared = PreparedModel(model)
    prepared.prepared = model
    model.forward = lambda inputs: None
    prepared.restore(accelerator, model)
    assert model.forward is users_forward


def test_a_model_set_by_a_callback_is_kept(accelerator):
    prepared = PreparedModel(make_model())
    other = make_model()
    assert prepared.restore(accelerator, other) is other


def test_a_missing_model_stays_missing(accelerator):
    assert PreparedModel(None).restore(accelerator, None) is None


@pytest.mark.parametrize(("backend", "leaves"), [("gloo", True), ("nccl", False)])
def test_a_process_leaves_a_gloo_group_when_it_exits(backend, leaves, monkeypatch):
    at_exit, left = [], []
    monkeypatch.setattr(accelerator_module.atexit, "register", at_exit.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    accelerator_module._leave_group_at_exit()
    for function in at_exit:
        function()
    assert left == [True] * leaves
