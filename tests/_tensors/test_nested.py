"""Nested structures: their rows, their tensors, and changes to every item."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch

from pytorch_accelerated._tensors import nested
from pytorch_accelerated._tensors.nested import first_rows

META = torch.device("meta")

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Batch:
    values: torch.Tensor
    name: str


@dataclass
class Record:
    rows: torch.Tensor
    name: str = "a"
    derived: list = field(init=False, default_factory=list)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        (torch.zeros(3), torch.zeros(9)),
        ["text", [torch.tensor(1.0), torch.zeros(3, 1)]],
        {"id": 7, "inputs": {"deep": (None, torch.zeros(3))}},
        Pair(torch.zeros(3), None),
        Batch(torch.zeros(3), "name"),
        {"wrapped": Batch(torch.zeros(3), "name")},
    ],
    ids=str,
)
def test_rows_are_counted_in_the_first_tensor_at_any_depth(batch):
    assert nested.count_rows(batch) == 3


@pytest.mark.parametrize("value", [None, "text", torch.tensor(1.0), [], {"a": [1, 2]}])
def test_a_value_without_rows_is_refused_with_its_type(value):
    with pytest.raises(ValueError, match=rf"no rows to count: a {type(value).__name__} contains no tensor"):
        nested.count_rows(value)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        {"a": torch.zeros(1)},
        [torch.zeros(1), "text"],
        (torch.zeros(1), 3),
        Pair(torch.zeros(1), None),
        Batch(torch.zeros(1), "name"),
        {"deep": [Pair(Batch(torch.zeros(1), "name"), ())]},
    ],
    ids=str,
)
def test_a_batch_keeps_its_types_and_nesting_when_it_is_moved(batch):
    moved = nested.move_to_device(batch, META)
    assert type(moved) is type(batch)
    assert [tensor.device for tensor in nested.tensors_in(moved)] == [META]
    assert [tensor.device.type for tensor in nested.tensors_in(batch)] == ["cpu"]


def test_a_value_without_tensors_is_returned_itself_when_it_is_moved():
    for batch in ("text", None, 3, Batch):
        assert nested.move_to_device(batch, META) is batch


@pytest.mark.parametrize(("accepts_option", "expected"), [(True, [True]), (False, ["plain"])])
def test_a_batch_with_its_own_to_method_is_moved_by_it(accepts_option, expected):
    calls = []

    class WithOption:
        def to(self, device, non_blocking=False):
            calls.append(non_blocking)
            return device

    class Without:
        def to(self, device):
            calls.append("plain")
            return device

    batch = WithOption() if accepts_option else Without()
    assert nested.move_to_device([batch], META, non_blocking=True) == [META]
    assert calls == expected


# --- mappings --------------------------------------------------------------------------------------------------------


def test_a_mapping_is_rebuilt_as_its_own_type_and_a_defaultdict_as_a_dictionary():
    assert type(nested.like_mapping(OrderedDict(), {"a": 1})) is OrderedDict
    assert type(nested.like_mapping(defaultdict(list), {"a": 1})) is dict


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_cut_at_any_depth_and_the_original_stays():
    rows, loss, other = torch.ones(3, 2), torch.tensor(1.0), torch.ones(2, 3)
    record = Record(rows)
    record.derived = [rows]
    value = {"a": rows, "b": [rows, (other, "text")], "c": Pair(rows, loss), "d": None, "e": record}
    cut = first_rows(value, 3, 1)
    assert cut["a"].shape == (1, 2)
    assert cut["b"][0].shape == cut["c"].left.shape == cut["e"].rows.shape == cut["e"].derived[0].shape == (1, 2)
    assert cut["b"][1][0] is other
    assert cut["b"][1][1] == "text"
    assert cut["c"].right is loss
    assert cut["d"] is None
    assert cut["e"].name == "a"
    assert (type(cut["b"]), type(cut["b"][1]), type(cut["c"]), type(cut["e"])) == (list, tuple, Pair, Record)
    assert rows.shape == record.rows.shape == record.derived[0].shape == (3, 2)


@pytest.mark.parametrize("make", [OrderedDict, UserDict])
def test_rows_are_cut_in_any_type_of_mapping(make):
    cut = first_rows(make(a=torch.ones(4)), 4, 0)
    assert type(cut) is make
    assert cut["a"].shape == (0,)


def test_rows_are_repeated_until_there_are_enough():
    value = {"rows": torch.tensor([[1], [2]]), "loss": torch.tensor(0.5), "other": torch.ones(3)}
    repeated = nested.repeat_rows(value, num_rows=2, num_wanted=5)
    assert repeated["rows"].flatten().tolist() == [1, 2, 1, 2, 1]
    assert repeated["loss"] is value["loss"]
    assert repeated["other"] is value["other"]


# --- outputs of several batches --------------------------------------------------------------------------------------


def test_on_host_moves_the_tensors_and_keeps_the_structure():
    outputs = {"a": torch.ones(2), "b": [Pair(torch.zeros(1), "text")]}
    moved = nested.on_host(outputs)
    assert type(moved["b"][0]) is Pair
    assert torch.equal(moved["a"], outputs["a"])
    assert {moved["a"].device.type, moved["b"][0].left.device.type} == {"cpu"}
