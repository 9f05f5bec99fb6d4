"""The number of samples in a batch: told by the targets, else by what all tensors have in common."""

from __future__ import annotations

import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from pytorch_accelerated._tensors.batch_size import size_of_batch, size_of_pair

Pair = namedtuple("Pair", ["scale", "target"])


@dataclass
class Labelled:
    scale: torch.Tensor
    labels: torch.Tensor


def rows(*lengths):
    """A list of tensors of so many rows."""
    return [torch.zeros(length, 2) for length in lengths]


PACKED = pack_sequence(rows(5, 4, 1))


# --- inputs and targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(5, 3, 2),
        rows(3, 4, 5),
        rows(7, 7, 7),
        {"scale": torch.ones(1), "x": torch.zeros(3, 2)},
        PACKED,
        "text",
        None,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("targets", [torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 5, 7)], ids=str)
def test_targets_that_are_a_tensor_decide(inputs, targets):
    assert size_of_pair(inputs, targets) == 3


@pytest.mark.parametrize("targets", [None, torch.tensor(1.0), [1, 2], "text", {}, []], ids=str)
@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (torch.zeros(5, 3, 2), 5),
        ((torch.zeros(4), torch.zeros(4, 2)), 4),
        (rows(3, 4, 5), 3),
        (rows(4, 4, 5), 3),
        (PACKED, 3),
        ({"ids": torch.zeros(6, 2), "mask": torch.zeros(6)}, 6),
    ],
    ids=str,
)
def test_the_inputs_decide_where_targets_have_no_dimension(inputs, targets, expected):
    assert size_of_pair(inputs, targets) == expected


@pytest.mark.parametrize(
    ("inputs", "targets", "expected"),
    [
        (torch.zeros(2, 3, 8, 8), rows(4, 4), 2),  # as many boxes in each of two images
        (torch.zeros(2, 3, 8, 8), rows(4, 1), 2),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 6, 6)], [{"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(3, 4)}], 2),
        ([torch.zeros(3, 8, 8)] * 4, [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)}] * 4, 4),
        (torch.zeros(4, 3), (torch.zeros(4), torch.zeros(4, 2)), 4),  # two heads
        (torch.zeros(4, 3), {"class": torch.zeros(4), "box": torch.zeros(4, 2)}, 4),
        (torch.zeros(4, 3), {"boxes": torch.zeros(9, 4), "mask": torch.zeros(4, 8)}, 4),
        (torch.zeros(9, 3), [(torch.zeros(5, 4), torch.zeros(5)), (torch.zeros(2, 4), torch.zeros(2))], 2),
    ],
)
def test_targets_in_a_container_are_read_together_with_the_inputs(inputs, targets, expected):
    assert size_of_pair(inputs, targets) == expected


# --- batches as a whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target", "y"])
@pytest.mark.parametrize("make", [dict, UserDict])
def test_labels_or_targets_in_a_mapping_decide_wherever_they_stand(name, make):
    for batch in ({"x": torch.zeros(5, 8), name: torch.zeros(8)}, {name: torch.zeros(8, 2), "x": torch.zeros(5, 8)}):
        assert size_of_batch(make(batch)) == 8


def test_labels_of_a_dataclass_and_of_a_named_tuple_decide():
    assert size_of_batch(Labelled(torch.ones(1), torch.zeros(8))) == 8
    assert size_of_batch(Pair(torch.ones(1), torch.zeros(8))) == 8


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 2),
        (torch.zeros(3), torch.zeros(3, 9)),
        ["text", [torch.tensor(1.0), torch.zeros(3, 1)]],
        {"id": ["a", "b"], "inputs": {"deep": (None, torch.zeros(3))}},
        {"labels": torch.tensor(1.0), "x": torch.zeros(3)},
        {"x": rows(9, 2, 1), "z": torch.zeros(3)},
        [rows(9, 2, 1), torch.zeros(3)],
        PACKED,
        {"packed": PACKED, "lengths": torch.zeros(3)},
    ],
    ids=str,
)
def test_what_all_tensors_have_in_common_decides_without_a_warning(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert size_of_batch(batch) == 3


@pytest.mark.parametrize(
    ("batch", "expected", "lengths"),
    [
        ({"scale": torch.ones(1), "x": torch.zeros(8, 4), "z": torch.zeros(8)}, 8, "scale: 1, x: 8, z: 8"),
        ({"x": torch.zeros(8, 4), "z": torch.zeros(8), "scale": torch.ones(1)}, 8, "x: 8, z: 8, scale: 1"),
        ([torch.zeros(5, 3, 2), torch.zeros(3, 1)], 3, r"\[0\]: 5, \[1\]: 3"),  # targets come last
    ],
)
def test_tensors_of_different_lengths_are_warned_about(batch, expected, lengths):
    with pytest.warns(
        UserWarning, match=rf"different lengths \({lengths}\).*{expected} is used.*`batch_size` yourself"
    ):
        assert size_of_batch(batch) == expected


@pytest.mark.parametrize("batch", [None, "text", torch.tensor(1.0), [], {"a": [1, 2]}])
def test_a_batch_without_a_sized_tensor_is_refused_with_its_type(batch):
    with pytest.raises(ValueError, match=rf"No batch size was found: the batch, a {type(batch).__name__}.*Override"):
        size_of_batch(batch)
    with pytest.raises(ValueError, match=r"No batch size was found: the batch, a tuple.*Override"):
        size_of_pair(batch, None)
