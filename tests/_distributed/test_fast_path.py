"""The fast path: bit-identical to Accelerate's own path, and used only where that is certain."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import _numbers
from _support import Probe, Samples, Stream, make_dataset, make_model, make_trainer, run_python, train
from pytorch_accelerated._distributed import fast_path
from pytorch_accelerated._distributed.fast_path import (
    FastPathLoader,
    FastPathOptimizer,
    can_use_fast_path,
    wrap_optimizer,
)


@pytest.fixture
def optimizer():
    return torch.optim.AdamW(make_model().parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is")
def test_the_fast_path_gives_the_same_bits_over_the_whole_grid():
    assert _numbers.points_where_the_paths_differ() == []


def test_the_fast_path_gives_the_same_bits_in_bf16():
    code = """
import _numbers
from pytorch_accelerated._distributed.accelerator import create_accelerator
create_accelerator(None, "bf16")
print(_numbers.points_where_the_paths_differ())
"""
    assert run_python(code, PYTHONPATH="tests/tools") == "[]\n"


# --- where it is used --------------------------------------------------------------------------------------------


def test_one_process_without_a_gradient_scaler_uses_the_fast_path(accelerator):
    assert can_use_fast_path(accelerator)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("distributed_type", DistributedType.FSDP),
        ("distributed_type", DistributedType.DEEPSPEED),
        ("distributed_type", DistributedType.XLA),
        ("mixed_precision", "fp8"),
    ],
)
def test_sharded_xla_and_fp8_training_do_not_use_the_fast_path(accelerator, monkeypatch, attribute, value):
    monkeypatch.setattr(Accelerator, attribute, property(lambda self: value))
    assert not can_use_fast_path(accelerator)


def test_an_accelerator_with_another_backward_pass_does_not_use_the_fast_path(accelerator):
    class CustomAccelerator(Accelerator):
        pass

    assert not can_use_fast_path(CustomAccelerator())
    accelerator.scaler = object()
    assert not can_use_fast_path(accelerator)
    accelerator.scaler = None
    accelerator.backward = lambda loss: loss.backward()
    assert not can_use_fast_path(accelerator)


def test_a_run_with_a_custom_accelerator_calls_its_backward():
    calls = []

    class CustomAccelerator(Accelerator):
        def backward(self, loss, **kwargs):
            calls.append(loss)
            super().backward(loss, **kwargs)

    trainer = make_trainer(accelerator=CustomAccelerator())
    train(trainer)
    assert len(calls) == 4
    assert type(trainer.optimizer) is AcceleratedOptimizer


# --- the optimizer -----------------------------------------------------------------------------------------------


def step_with_gradients(accelerator, optimizer, closure=None):
    """Wrap an optimizer and make a step with it, which must change the parameters."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in parameters]
    wrapped = wrap_optimizer(accelerator, optimizer)
    assert type(wrapped) is FastPathOptimizer
    wrapped.step() if closure is None else wrapped.step(closure)
    assert not any(map(torch.equal, before, parameters))


def test_a_pytorch_optimizer_is_wrapped_once(accelerator, optimizer):
    wrapped = wrap_optimizer(accelerator, optimizer)
    assert type(wrapped) is FastPathOptimizer
    assert isinstance(wrapped, AcceleratedOptimizer)
    assert wrapped.optimizer is optimizer
    assert wrap_optimizer(accelerator, wrapped) is wrapped


def test_other_objects_and_prepared_optimizers_are_not_wrapped(accelerator, optimizer):
    other = object()
    assert wrap_optimizer(accelerator, None) is None
    assert wrap_optimizer(accelerator, other) is other
    prepared = accelerator.prepare(optimizer)
    assert wrap_optimizer(accelerator, prepared) is prepared
    lomo = type("Lomo", (torch.optim.SGD,), {"__module__": "lomo_optim.lomo"})(make_model().parameters(), lr=0.1)
    assert wrap_optimizer(accelerator, lomo) is lomo


def test_step_and_zero_grad_do_nothing_while_batches_accumulate(accelerator, optimizer):
    wrapped = wrap_optimizer(accelerator, optimizer)
    parameter = wrapped.param_groups[0]["params"][0]
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    accelerator.gradient_state.sync_gradients = False
    try:
        wrapped.step()
        wrapped.zero_grad()
        wrapped.zero_grad(set_to_none=True)
        assert torch.equal(parameter, before)
        assert parameter.grad is not None
    finally:
        accelerator.gradient_state.sync_gradients = True
    wrapped.step()
    wrapped.zero_grad()
    assert not torch.equal(parameter, before)
    assert parameter.grad is None


def test_gradients_are_zeroed_in_place_on_request(accelerator, optimizer):
    wrapped = wrap_optimizer(accelerator, optimizer)
    parameter = wrapped.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    wrapped.zero_grad(set_to_none=False)
    assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_an_overridden_zero_grad_is_called_as_by_accelerate(accelerator):
    calls = []

    class Overridden(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append(set_to_none)

    class ZeroingByDefault(torch.optim.SGD):
        def zero_grad(self, set_to_none=False):
            calls.append(set_to_none)

    class WithoutOption(torch.optim.SGD):
        def zero_grad(self):
            calls.append("without option")

    def zero_grad_of_each(wrap):
        calls.clear()
        for kind in (Overridden, ZeroingByDefault, WithoutOption):
            wrap(kind(make_model().parameters(), lr=0.1)).zero_grad()
        patched = torch.optim.SGD(make_model().parameters(), lr=0.1)
        patched.zero_grad = lambda set_to_none=True: calls.append("patched")
        wrap(patched).zero_grad()
        return list(calls)

    expected = zero_grad_of_each(accelerator.prepare)
    assert expected == [True, True, "without option", "patched"]
    assert zero_grad_of_each(functools.partial(wrap_optimizer, accelerator)) == expected
    with pytest.raises(ValueError, match="set_to_none"):
        wrap_optimizer(accelerator, WithoutOption(make_model().parameters(), lr=0.1)).zero_grad(set_to_none=True)


def test_the_state_of_an_optimizer_is_not_copied_at_the_start_of_a_run(accelerator, optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    wrap_optimizer(accelerator, optimizer)
    assert {id(tensor) for state in optimizer.state.values() for tensor in state.values()} == tensors


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("meta", True)])
def test_the_state_of_an_optimizer_is_moved_if_it_is_on_another_device(optimizer, device, expected):
    assert not fast_path._has_state_elsewhere(optimizer, torch.device(device)), "there is none yet"
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}
    assert fast_path._has_state_elsewhere(optimizer, torch.device(device)) is expected


def test_step_hooks_of_an_optimizer_are_called_at_each_step(accelerator, optimizer):
    calls = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *arguments: calls.append("pre hook")),
        optimizer.register_step_post_hook(lambda *arguments: calls.append("post hook")),
        register_optimizer_step_pre_hook(lambda *arguments: calls.append("global pre hook")),
        register_optimizer_step_post_hook(lambda *arguments: calls.append("global post hook")),
    ]
    try:
        for _ in range(2):
            step_with_gradients(accelerator, optimizer)
            assert sorted(calls) == ["global post hook", "global pre hook", "post hook", "pre hook"]
            calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    step_with_gradients(accelerator, optimizer)
    assert calls == []


def test_step_hooks_of_an_optimizer_are_called_at_each_update_of_a_run():
    trainer, calls = make_trainer(), []
    trainer.optimizer.register_step_pre_hook(lambda *arguments: calls.append("pre hook"))
    trainer.optimizer.register_step_post_hook(lambda *arguments: calls.append("post hook"))
    train(trainer, gradient_accumulation_steps=2)
    assert type(trainer.optimizer) is FastPathOptimizer
    assert calls == ["pre hook", "post hook"] * 2


def test_a_profiler_sees_the_ranges_of_the_optimizer(accelerator, optimizer):
    with torch.profiler.profile() as profiler:
        step_with_gradients(accelerator, optimizer)
        wrap_optimizer(accelerator, optimizer).zero_grad()
    names = {event.name for event in profiler.events()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_a_scheduler_does_not_warn_about_missing_optimizer_steps(accelerator, optimizer):
    """A scheduler of PyTorch patches `optimizer.step` and warns if it was not called; in tests, warnings are errors."""
    scheduler = StepLR(optimizer, 1)
    step_with_gradients(accelerator, optimizer)
    scheduler.step()


def test_a_scheduler_steps_after_each_update_of_a_run():
    rates = []
    probe = Probe(on_optimizer_step_end=lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    train(make_trainer(callbacks=[probe]), create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert rates == pytest.approx([0.05, 0.025, 0.0125, 0.00625])


def test_an_overridden_or_patched_step_is_called(accelerator):
    calls = []

    def recording(step, name):
        @functools.wraps(step)
        def record(*args, **kwargs):
            calls.append(name)
            return step(*args, **kwargs)

        return record

    class Overridden(torch.optim.SGD):
        step = recording(torch.optim.SGD.step, "overridden")

    class Patched(torch.optim.SGD):
        pass

    optimizers = (kind(make_model().parameters(), lr=0.1) for kind in (Overridden, Patched, torch.optim.SGD))
    overridden, patched, scheduled = optimizers
    step_with_gradients(accelerator, overridden)
    Patched.step = recording(Patched.step, "patched class")
    step_with_gradients(accelerator, patched)
    patched.step = recording(patched.step, "patched instance")
    step_with_gradients(accelerator, patched)
    StepLR(scheduled, 1)
    scheduled.step = recording(scheduled.step, "patched after a scheduler")
    step_with_gradients(accelerator, scheduled)
    assert calls == [
        "overridden",
        "patched class",
        "patched instance",
        "patched class",
        "patched after a scheduler",
    ]


def test_a_closure_is_passed_to_the_optimizer(accelerator, optimizer):
    calls = []
    step_with_gradients(accelerator, optimizer, closure=lambda: calls.append("closure"))
    assert calls == ["closure"]


def test_a_wrapped_optimizer_can_be_copied_and_pickled(accelerator, optimizer):
    wrapped = wrap_optimizer(accelerator, optimizer)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert type(other) is FastPathOptimizer
        other.zero_grad()


# --- the loader --------------------------------------------------------------------------------------------------


def active_loader(dataset, device=None, **kwargs):
    loader = FastPathLoader(dataset, device=device, **kwargs)
    loader.activate()
    return loader


def as_lists(batches):
    return [[tensor.tolist() for tensor in batch] for batch in batches]


def test_a_loader_tells_accelerate_that_it_is_active_and_when_its_last_batch_comes(accelerator):
    loader = active_loader(make_dataset(10), batch_size=4)
    assert isinstance(loader, DataLoader)
    seen = [
        (accelerator.gradient_state.active_dataloader is loader, accelerator.gradient_state.end_of_dataloader)
        for _ in loader
    ]
    assert seen == [(True, False), (True, False), (True, True)]
    assert accelerator.gradient_state.active_dataloader is None
    assert loader.iteration == 1
    next(iter(loader))  # an iteration that is not finished
    assert accelerator.gradient_state.active_dataloader is None


def test_a_loader_that_is_not_active_yields_what_a_plain_one_does(accelerator):
    loader = FastPathLoader(make_dataset(10), device=torch.device("meta"), batch_size=4)
    assert as_lists(loader) == as_lists(DataLoader(make_dataset(10), batch_size=4))
    assert accelerator.gradient_state.active_dataloader is None


def test_batches_are_moved_to_a_device():
    loader = active_loader(make_dataset(6), device=torch.device("meta"), batch_size=4)
    assert [[tensor.device.type for tensor in batch] for batch in loader] == [["meta", "meta"]] * 2


def test_batches_stay_on_their_device_without_device_placement():
    dataset = TensorDataset(torch.ones(4, 1, device="meta"))
    loader = active_loader(dataset, batch_size=2, collate_fn=lambda samples: samples)
    assert {sample[0].device.type for batch in loader for sample in batch} == {"meta"}


def test_one_batch_is_fetched_ahead():
    fetched = []

    class Recorded(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            fetched.append(index)
            return index

    batches = iter(active_loader(Recorded(), batch_size=1))
    next(batches)
    assert fetched == [0, 1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kwargs", [{"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": None}])
def test_batches_are_those_of_a_plain_loader(num_workers, kwargs):
    dataset = Samples(make_dataset(10))
    batches = as_lists(active_loader(dataset, num_workers=num_workers, **kwargs))
    assert batches == as_lists(DataLoader(dataset, **kwargs))


@pytest.mark.parametrize("is_active", [False, True])
def test_the_first_batches_are_skipped_without_loading_them(is_active):
    loaded = []

    class Recorded(Samples):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    loader = FastPathLoader(Recorded(make_dataset(10)), device=torch.device("meta"), batch_size=4)
    if is_active:
        loader.activate()
    rest = loader.skip_first(2)
    assert [batch[0].device.type for batch in rest] == ["meta" if is_active else "cpu"]
    assert loaded == [8, 9]
    assert len(rest) == 1


def test_a_profiler_sees_the_ranges_of_a_loader():
    loader = active_loader(Samples(make_dataset(10)), batch_size=4)
    with torch.profiler.profile() as profiler:
        list(loader)
    ranges = [event.name for event in profiler.events() if event.name.startswith("enumerate(DataLoader)")]
    assert len(ranges) == 3 + 1


def test_the_iteration_of_a_custom_loader_is_used():
    calls = []

    class Custom(DataLoader):
        def __iter__(self):
            calls.append("iter")
            return super().__iter__()

    assert len(list(fast_path.batches_of(Custom(make_dataset(8), batch_size=4)))) == 2
    assert calls == ["iter"]


def test_a_stream_that_is_longer_than_its_length_is_reported():
    class Longer(Stream):
        def __len__(self):
            return 1

    loader = active_loader(Longer(make_dataset(4)), batch_size=1)
    assert len(loader) == 1
    with pytest.warns(UserWarning, match="Length of IterableDataset"):
        list(loader)
