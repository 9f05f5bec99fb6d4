"""Writing in the background: one thing at a time, from a copy, and no failure is lost."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict

import pytest
import torch

from pytorch_accelerated._checkpoint.host_memory import HostMemory
from pytorch_accelerated._checkpoint.writer import BackgroundWriter


def test_the_caller_goes_on_while_something_is_written():
    may_end, written = threading.Event(), []
    writer = BackgroundWriter()
    writer.start(lambda: (may_end.wait(20), written.append(1)))
    assert written == []
    may_end.set()
    writer.wait()
    assert written == [1]
    writer.wait()  # nothing is under way


def test_a_failure_is_raised_once_where_somebody_waits():
    def fail():
        raise OSError("no room")

    writer = BackgroundWriter()
    writer.start(fail)
    with pytest.raises(OSError, match="no room"):
        writer.wait()
    writer.wait()


def test_a_copy_is_not_changed_by_what_happens_to_the_original():
    weights = torch.arange(6.0).reshape(2, 3)
    state = {"model": OrderedDict(w=weights, t=weights.t()), "list": [weights[0], (1, "a", None)], 3: {"x": 2.5}}
    copied = HostMemory().copy_of(state)
    weights.zero_()
    assert type(copied["model"]) is OrderedDict
    assert torch.equal(copied["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(copied["model"]["t"], torch.arange(6.0).reshape(2, 3).t())
    assert torch.equal(copied["list"][0], torch.arange(3.0))
    assert copied["list"][1] == (1, "a", None)
    assert copied[3] == {"x": 2.5}


def test_memory_serves_again_where_it_fits():
    memory = HostMemory()
    first = memory.copy_of([torch.ones(3), torch.ones(2, dtype=torch.int64)])
    again = memory.copy_of([torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
    assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in first]
    other = memory.copy_of([torch.ones(4), torch.ones(2), torch.ones(())])
    assert [(tensor.shape, tensor.dtype) for tensor in other] == [
        ((4,), torch.float32),
        ((2,), torch.float32),
        ((), torch.float32),
    ]
    assert all(bool((tensor == 1).all()) for tensor in other)


@pytest.mark.parametrize("length", [2, 10_000])
def test_a_copy_needs_no_gradient(length):
    (copied,) = HostMemory().copy_of([torch.nn.Parameter(torch.ones(length))])
    assert torch.equal(copied, torch.ones(length))
    assert not copied.requires_grad


def odd_tensors():
    """Large enough to be placed in memory of ours, as far as their kind allows it."""
    numbers = torch.arange(20_000.0)
    return {
        "channels last": numbers.reshape(4, 50, 10, 10).to(memory_format=torch.channels_last),
        "transposed": numbers.reshape(100, 200).t(),
        "with gaps": numbers[::2],
        "expanded": torch.ones(1).expand(5000),
        "sparse": torch.eye(100).to_sparse(),
        "empty": torch.empty(0, 3),
        "bfloat16": numbers.to(torch.bfloat16),
        "complex": numbers.to(torch.complex64),
        "flags": numbers > 10,
        "odd number of bytes": (numbers % 100).to(torch.uint8)[:9999],
        "after it": numbers.to(torch.float64),
    }


@pytest.mark.parametrize("has_large_pages", [True, False])
def test_tensors_of_any_kind_are_copied(monkeypatch, has_large_pages):
    if not has_large_pages:
        monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    copied = HostMemory().copy_of(odd_tensors())
    for name, tensor in odd_tensors().items():
        assert copied[name].dtype == tensor.dtype, name
        assert torch.equal(copied[name].to_dense(), tensor.to_dense()), name
    assert all(tensor.data_ptr() % 64 == 0 for tensor in copied.values() if not tensor.is_sparse)
    assert copied["channels last"].is_contiguous(memory_format=torch.channels_last)


def test_a_system_may_be_without_large_pages(monkeypatch):
    class Memory(mmap.mmap):
        def madvise(self, option):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Memory)
    numbers = torch.arange(10_000.0)
    assert torch.equal(HostMemory().copy_of([numbers])[0], numbers)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory is ours on Linux only")
def test_memory_is_given_back_when_nothing_needs_it(monkeypatch):
    maps = []

    class Memory(mmap.mmap):
        pass

    def make(*args, **kwargs):
        memory = Memory(*args, **kwargs)
        maps.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(mmap, "mmap", make)
    memory = HostMemory()
    for length in (10_000, 10_000, 20_000):
        copied = memory.copy_of([torch.ones(length)])
    assert [ref() is not None for ref in maps] == [False, True], "of other tensors it is of no use"
    del memory
    assert maps[-1]() is not None, "it is still read"
    assert bool((copied[0] == 1).all())
    del copied
    assert maps[-1]() is None


def test_each_tensor_of_a_copy_has_a_storage_of_its_own():
    """Otherwise a file with one of them would have them all."""
    first, second = HostMemory().copy_of([torch.ones(10_000), torch.ones(20_000)])
    assert (first.untyped_storage().nbytes(), second.untyped_storage().nbytes()) == (40_000, 80_000)


def test_without_tensors_there_is_nothing_to_copy():
    assert HostMemory().copy_of({"a": [1, "b", None]}) == {"a": [1, "b", None]}
