"""Collectives in one process, where they exchange nothing; several real processes are in `tests/distributed/`."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from accelerate import Accelerator

from pytorch_accelerated._distributed import collectives

Pair = namedtuple("Pair", ["left", "right"])


@pytest.fixture(autouse=True)
def _accelerator():
    Accelerator()


def fail():
    raise LookupError("mine")


def test_num_local_processes_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert collectives.num_local_processes(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert collectives.num_local_processes(8) == 4


def test_run_on_main_returns_or_raises_what_the_function_does():
    assert collectives.run_on_main(lambda: 3, is_main=True, num_processes=1) == 3
    with pytest.raises(LookupError, match="mine"):
        collectives.run_on_main(fail, is_main=True, num_processes=1)


@pytest.mark.parametrize("num_processes", [1, 2], ids=["one process", "no process group of PyTorch"])
def test_run_on_all_returns_or_raises_what_the_function_does(num_processes):
    assert collectives.run_on_all(lambda: 3, num_processes) == 3
    with pytest.raises(LookupError, match="mine"):
        collectives.run_on_all(fail, num_processes)


def test_one_process_broadcasts_and_gathers_its_own_objects():
    value = object()
    assert collectives.broadcast_from_main(value, 1) is value
    assert collectives.all_gather_objects(value, 1) == [value]


def test_sums_over_one_process_are_its_pairs_in_alphabetical_order():
    sums = collectives.sum_over_processes({"b": (1, 2.5), "a": (torch.tensor(0.5), 3)}, torch.device("cpu"))
    assert list(sums) == ["a", "b"]
    assert {name: [float(number) for number in pair] for name, pair in sums.items()} == {"a": [0.5, 3], "b": [1, 2.5]}


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_gather_uneven_keeps_rows_that_equal_the_padding(rows):
    tensor = torch.full((rows, 2), -1.0)
    assert torch.equal(collectives.gather_uneven(tensor, -1), tensor)


def test_gather_uneven_keeps_the_structure():
    value = OrderedDict(a=[torch.ones(2), Pair(torch.ones(1), (torch.tensor(3),))])
    gathered = collectives.gather_uneven(value, 0)
    assert type(gathered) is OrderedDict
    assert type(gathered["a"]) is list
    assert type(gathered["a"][1]) is Pair
    assert type(gathered["a"][1].right) is tuple
    assert gathered["a"][1].right[0].item() == 3


@pytest.mark.parametrize("value", ["text", 3, {"a": [torch.ones(1), None]}])
def test_gather_uneven_refuses_what_is_not_a_tensor(value):
    with pytest.raises(TypeError, match=r"A (str|int|NoneType) cannot be gathered\. Expected a tensor.*gather_object"):
        collectives.gather_uneven(value)


def test_padding_is_removed_from_rows_and_vectors():
    assert collectives.remove_padding(torch.tensor([3, -1, 4, -1]), -1).tolist() == [3, 4]
    rows = torch.tensor([[1, -1], [-1, -1], [-1, 2]])
    assert collectives.remove_padding(rows, -1).tolist() == [[1, -1], [-1, 2]]
    assert collectives.remove_padding(torch.full((2, 2, 2), -1.0), -1).shape == (0, 2, 2)
