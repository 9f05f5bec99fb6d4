"""Copies of nested tensors in host memory that is reused."""

from __future__ import annotations

import mmap
import weakref
from collections import OrderedDict

import pytest
import torch

from pytorch_accelerated._checkpoint.host_memory import HostMemory


def test_a_copy_does_not_change_with_the_original():
    weights = torch.arange(6.0).reshape(2, 3)
    state = {"model": OrderedDict(w=weights, t=weights.t()), "list": [weights[0], (1, "a", None)], 3: {"x": 2.5}}
    copied = HostMemory().copy(state)
    weights.zero_()
    assert type(copied["model"]) is OrderedDict
    assert torch.equal(copied["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(copied["model"]["t"], torch.arange(6.0).reshape(2, 3).t())
    assert torch.equal(copied["list"][0], torch.arange(3.0))
    assert copied["list"][1] == (1, "a", None)
    assert copied[3] == {"x": 2.5}


def test_memory_is_reused_if_the_tensors_match():
    memory = HostMemory()
    first = memory.copy([torch.ones(3), torch.ones(2, dtype=torch.int64)])
    again = memory.copy([torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
    assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in first]
    other = memory.copy([torch.ones(4), torch.ones(2), torch.ones(())])
    assert [(tensor.shape, tensor.dtype) for tensor in other] == [
        ((4,), torch.float32),
        ((2,), torch.float32),
        ((), torch.float32),
    ]
    assert all(bool((tensor == 1).all()) for tensor in other)


@pytest.mark.parametrize("length", [2, 10_000])
def test_a_copy_does_not_require_gradients(length):
    (copied,) = HostMemory().copy([torch.nn.Parameter(torch.ones(length))])
    assert torch.equal(copied, torch.ones(length))
    assert not copied.requires_grad


def odd_tensors():
    """Tensors of many kinds, all large enough for the shared memory if their kind allows it."""
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


@pytest.mark.parametrize("has_huge_pages", [True, False])
def test_tensors_of_any_kind_are_copied(monkeypatch, has_huge_pages):
    if not has_huge_pages:
        monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    copied = HostMemory().copy(odd_tensors())
    for name, tensor in odd_tensors().items():
        assert copied[name].dtype == tensor.dtype, name
        assert torch.equal(copied[name].to_dense(), tensor.to_dense()), name
    assert all(tensor.data_ptr() % 64 == 0 for tensor in copied.values() if not tensor.is_sparse)
    assert copied["channels last"].is_contiguous(memory_format=torch.channels_last)


def test_a_system_without_huge_pages_is_tolerated(monkeypatch):
    class Memory(mmap.mmap):
        def madvise(self, option):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Memory)
    numbers = torch.arange(10_000.0)
    assert torch.equal(HostMemory().copy([numbers])[0], numbers)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory is mapped on Linux only")
def test_memory_is_freed_when_nothing_uses_it(monkeypatch):
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
        copied = memory.copy([torch.ones(length)])
    assert [ref() is not None for ref in maps] == [False, True], "memory that no longer matches must be freed"
    del memory
    assert maps[-1]() is not None, "the copy still uses it"
    assert bool((copied[0] == 1).all())
    del copied
    assert maps[-1]() is None


def test_each_tensor_of_a_copy_has_its_own_storage():
    """Otherwise a file with one of them would contain all of them."""
    first, second = HostMemory().copy([torch.ones(10_000), torch.ones(20_000)])
    assert (first.untyped_storage().nbytes(), second.untyped_storage().nbytes()) == (40_000, 80_000)


def test_a_structure_without_tensors_can_be_copied():
    assert HostMemory().copy({"a": [1, "b", None]}) == {"a": [1, "b", None]}
