"""The short way of a step: the same bits as Accelerate's, and taken only where that is sure."""

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
def accelerator():
    return Accelerator()


@pytest.fixture
def optimizer():
    return torch.optim.AdamW(make_model().parameters(), lr=0.1)


def test_both_ways_give_the_same_bits_over_the_whole_grid():
    assert _numbers.points_where_the_ways_differ() == []


def test_both_ways_give_the_same_bits_in_bf16():
    code = """
import _numbers
from pytorch_accelerated._distributed.accelerator import create_accelerator
create_accelerator(None, "bf16")
print(_numbers.points_where_the_ways_differ())
"""
    assert run_python(code, PYTHONPATH="tests") == "[]\n"


# --- where it is taken -------------------------------------------------------------------------------------------


def test_one_process_without_a_scaler_is_direct(accelerator):
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
def test_other_kinds_of_training_are_not(accelerator, monkeypatch, attribute, value):
    monkeypatch.setattr(Accelerator, attribute, property(lambda self: value))
    assert not can_use_fast_path(accelerator)


def test_neither_is_what_needs_more_than_pytorch_does(accelerator):
    class Own(Accelerator):
        pass

    assert not can_use_fast_path(Own())
    accelerator.scaler = object()
    assert not can_use_fast_path(accelerator)
    accelerator.scaler = None
    accelerator.backward = lambda loss: loss.backward()
    assert not can_use_fast_path(accelerator)


def test_a_run_with_an_accelerator_of_the_users_goes_the_general_way():
    calls = []

    class Own(Accelerator):
        def backward(self, loss, **kwargs):
            calls.append(loss)
            super().backward(loss, **kwargs)

    trainer = make_trainer(accelerator=Own())
    train(trainer)
    assert len(calls) == 4
    assert type(trainer.optimizer) is AcceleratedOptimizer


# --- the optimizer -----------------------------------------------------------------------------------------------


def test_an_optimizer_of_pytorch_is_made_direct_once(accelerator, optimizer):
    direct = wrap_optimizer(accelerator, optimizer)
    assert type(direct) is FastPathOptimizer
    assert isinstance(direct, AcceleratedOptimizer)
    assert direct.optimizer is optimizer
    assert wrap_optimizer(accelerator, direct) is direct


def test_other_optimizers_are_left_as_they_are(accelerator, optimizer):
    stand_in = object()
    assert wrap_optimizer(accelerator, None) is None
    assert wrap_optimizer(accelerator, stand_in) is stand_in
    prepared = accelerator.prepare(optimizer)
    assert wrap_optimizer(accelerator, prepared) is prepared
    no_step = type("Lomo", (torch.optim.SGD,), {"__module__": "lomo_optim.lomo"})(make_model().parameters(), lr=0.1)
    assert wrap_optimizer(accelerator, no_step) is no_step


def test_nothing_happens_while_batches_accumulate(accelerator, optimizer):
    direct = wrap_optimizer(accelerator, optimizer)
    parameter = direct.param_groups[0]["params"][0]
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    accelerator.gradient_state.sync_gradients = False
    try:
        direct.step()
        direct.zero_grad()
        assert torch.equal(parameter, before)
        assert parameter.grad is not None
    finally:
        accelerator.gradient_state.sync_gradients = True
    direct.step()
    direct.zero_grad()
    assert not torch.equal(parameter, before)
    assert parameter.grad is None


def test_gradients_are_zeroed_in_place_if_asked(accelerator, optimizer):
    direct = wrap_optimizer(accelerator, optimizer)
    parameter = direct.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    direct.zero_grad(set_to_none=False)
    assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_an_optimizer_with_a_way_of_its_own_to_discard_gradients_keeps_it(accelerator):
    calls = []

    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append(set_to_none)

    class Older(torch.optim.SGD):
        def zero_grad(self):
            calls.append("older")

    for kind in (Own, Older):
        wrap_optimizer(accelerator, kind(make_model().parameters(), lr=0.1)).zero_grad()
    patched = torch.optim.SGD(make_model().parameters(), lr=0.1)
    patched.zero_grad = lambda set_to_none=True: calls.append("patched")
    wrap_optimizer(accelerator, patched).zero_grad()
    assert calls == [True, "older", "patched"]


def test_the_state_of_an_optimizer_is_not_copied_at_the_start_of_a_run(accelerator, optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    wrap_optimizer(accelerator, optimizer)
    assert {id(tensor) for state in optimizer.state.values() for tensor in state.values()} == tensors


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("meta", True)])
def test_a_state_is_placed_if_it_lies_elsewhere(optimizer, device, expected):
    assert not fast_path._has_state_elsewhere(optimizer, torch.device(device)), "there is none yet"
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}
    assert fast_path._has_state_elsewhere(optimizer, torch.device(device)) is expected


def test_a_scheduler_knows_that_the_optimizer_has_stepped():
    """PyTorch puts a wrapper around the optimizer's `step`, and warns if that was not called: warnings are errors."""
    rates = []
    probe = Probe(on_optimizer_step_end=lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    train(make_trainer(callbacks=[probe]), create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert rates == pytest.approx([0.05, 0.025, 0.0125, 0.00625])


def stepped(accelerator, optimizer):
    """Make a step, and return whether it was the short one."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]
    is_short = fast_path._bare_step(optimizer) is not None
    wrap_optimizer(accelerator, optimizer).step()
    assert not any(map(torch.equal, before, optimizer.param_groups[0]["params"]))
    return is_short


def test_a_step_that_nobody_watches_is_short(accelerator, optimizer):
    assert stepped(accelerator, optimizer)
    scheduler = StepLR(optimizer, 1)
    assert stepped(accelerator, optimizer)
    scheduler.step()  # it has noticed the step, or it would warn


def test_a_profiler_sees_the_ranges_of_pytorch(accelerator, optimizer):
    with torch.profiler.profile() as profiler:
        assert not stepped(accelerator, optimizer)
        wrap_optimizer(accelerator, optimizer).zero_grad()
    names = {event.name for event in profiler.events()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_hooks_of_an_optimizer_are_called(accelerator, optimizer):
    calls = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *arguments: calls.append("before")),
        optimizer.register_step_post_hook(lambda *arguments: calls.append("after")),
        register_optimizer_step_pre_hook(lambda *arguments: calls.append("before any")),
        register_optimizer_step_post_hook(lambda *arguments: calls.append("after any")),
    ]
    for hook in hooks:
        calls.clear()
        assert not stepped(accelerator, optimizer)
        hook.remove()
        assert len(calls) >= 1
    assert calls == ["after any"]
    assert stepped(accelerator, optimizer)


def test_a_step_that_was_changed_is_called_as_it_is(accelerator):
    calls = []

    def noting(step):
        @functools.wraps(step)
        def noted(*args, **kwargs):
            calls.append(args[1:])
            return step(*args, **kwargs)

        return noted

    class Own(torch.optim.SGD):
        step = noting(torch.optim.SGD.step)

    class Patched(torch.optim.SGD):
        pass

    own, patched, both = (kind(make_model().parameters(), lr=0.1) for kind in (Own, Patched, torch.optim.SGD))
    Patched.step = noting(Patched.step)
    assert stepped(accelerator, patched) is False
    patched.step = noting(patched.step)
    assert stepped(accelerator, patched) is False
    StepLR(both, 1)
    both.step = noting(both.step)  # it looks like the scheduler's
    assert stepped(accelerator, both) is False
    assert len(calls) == 4
    stepped(accelerator, own)
    assert len(calls) == 5


def test_a_closure_is_called(accelerator, optimizer):
    calls = []
    wrap_optimizer(accelerator, optimizer).step(lambda: calls.append("closure"))
    assert calls == ["closure"]


def test_it_can_be_copied_and_pickled(accelerator, optimizer):
    direct = wrap_optimizer(accelerator, optimizer)
    for other in (copy.deepcopy(direct), pickle.loads(pickle.dumps(direct))):
        assert type(other) is FastPathOptimizer
        other.zero_grad()


# --- the loader --------------------------------------------------------------------------------------------------


def test_a_loader_tells_accelerate_where_it_stands(accelerator):
    loader = FastPathLoader(make_dataset(10), device=torch.device("cpu"), batch_size=4)
    assert isinstance(loader, DataLoader)
    seen = [
        (accelerator.gradient_state.active_dataloader is loader, accelerator.gradient_state.end_of_dataloader)
        for _ in loader
    ]
    assert seen == [(True, False), (True, False), (True, True)]
    assert accelerator.gradient_state.active_dataloader is None
    assert loader.iteration == 1
    next(iter(loader))  # left in the midst
    assert accelerator.gradient_state.active_dataloader is None


def test_batches_go_to_a_device_that_is_not_the_host():
    loader = FastPathLoader(make_dataset(6), device=torch.device("meta"), batch_size=4)
    assert [[tensor.device.type for tensor in batch] for batch in loader] == [["meta", "meta"]] * 2


def test_batches_stay_where_they_are_if_nothing_is_to_be_placed():
    dataset = TensorDataset(torch.ones(4, 1, device="meta"))
    loader = FastPathLoader(dataset, device=None, batch_size=2, collate_fn=lambda samples: samples)
    assert {sample[0].device.type for batch in loader for sample in batch} == {"meta"}


def test_one_batch_is_fetched_ahead():
    fetched = []

    class Watched(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            fetched.append(index)
            return index

    batches = iter(FastPathLoader(Watched(), device=None, batch_size=1))
    next(batches)
    assert fetched == [0, 1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kwargs", [{"batch_size": 4}, {"batch_size": 4, "drop_last": True}, {"batch_size": None}])
def test_batches_are_those_of_pytorch_and_counted_as_it_does(monkeypatch, num_workers, kwargs):
    iterators = []
    without_ranges = fast_path._without_ranges
    monkeypatch.setattr(
        fast_path, "_without_ranges", lambda iterator: without_ranges(iterators.append(iterator) or iterator)
    )
    plain = DataLoader(Samples(make_dataset(10)), num_workers=num_workers, **kwargs)
    expected = list(plain)
    batches = list(fast_path._batches_of(plain))
    assert [[tensor.tolist() for tensor in batch] for batch in batches] == [
        [tensor.tolist() for tensor in batch] for batch in expected
    ]
    assert iterators[0]._num_yielded == len(expected)


def test_a_profiler_sees_the_ranges_of_a_loader():
    loader = FastPathLoader(Samples(make_dataset(10)), device=torch.device("cpu"), batch_size=4)
    with torch.profiler.profile() as profiler:
        list(loader)
    ranges = [event.name for event in profiler.events() if event.name.startswith("enumerate(DataLoader)")]
    assert len(ranges) == 3 + 1


def test_a_loader_with_an_iterator_of_its_own_keeps_it():
    calls = []

    class OwnIterator(torch.utils.data.dataloader._SingleProcessDataLoaderIter):
        def __next__(self):
            calls.append("next")
            return super().__next__()

    class Own(DataLoader):
        def _get_iterator(self):
            return OwnIterator(self)

    assert len(list(fast_path._batches_of(Own(make_dataset(8), batch_size=4)))) == 2
    assert calls == ["next"] * 3


def test_a_stream_that_is_longer_than_it_said_is_reported():
    class Longer(Stream):
        def __len__(self):
            return 1

    loader = DataLoader(Longer(make_dataset(4)), batch_size=1)
    assert len(loader) == 1
    with pytest.warns(UserWarning, match="Length of IterableDataset"):
        list(fast_path._batches_of(loader))
