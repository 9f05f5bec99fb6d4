"""Writing in the background: one thing at a time, from a copy, and no failure is lost."""

from __future__ import annotations

import threading
from collections import OrderedDict

import pytest
import torch

from pytorch_accelerated._background import BackgroundWriter, HostMemory


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


def test_a_copy_needs_no_gradient():
    (copied,) = HostMemory().copy_of([torch.nn.Parameter(torch.ones(2))])
    assert not copied.requires_grad
