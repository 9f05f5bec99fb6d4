"""Whole batches, indexed from tensors in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from _support import Samples, make_dataset, make_indexed_dataset
from pytorch_accelerated._data import in_memory
from pytorch_accelerated._data.sharding import ShardedBatchSampler


class CustomTensorDataset(TensorDataset):
    """May do anything in `__getitem__`, so it cannot be sliced."""


@pytest.mark.parametrize(
    "dataset",
    [
        Samples(make_dataset(4)),
        CustomTensorDataset(torch.zeros(3)),
        TensorDataset(torch.zeros(3, requires_grad=True)),
        TensorDataset(torch.eye(3).to_sparse()),
        Subset(Samples(make_dataset(4)), [0]),
        [torch.zeros(3)],
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_only_plain_tensors_in_memory_can_be_sliced(dataset):
    assert in_memory.sliceable_tensors(dataset) is None


def test_a_whole_batch_dataset_returns_the_samples_and_batches_of_the_plain_one():
    dataset = make_indexed_dataset(10)
    whole = in_memory.WholeBatchDataset(Subset(Subset(dataset, range(2, 10)), [5, 0, 1]))
    assert len(whole) == 3
    assert whole[0][0].item() == 7
    assert whole.__getitems__([2, 0])[0].flatten().tolist() == [3, 7]
    assert in_memory.unchanged(whole) is whole


def loader_of(dataset, sampler=None, **settings):
    """A loader of whole batches as a run has it: created with a batch sampler, so `loader.sampler` is another one."""
    generator = torch.Generator().manual_seed(7)
    sampler = RandomSampler(dataset, generator=generator) if sampler is None else sampler(dataset)
    batches = BatchSampler(sampler, settings.pop("batch_size", 4), settings.pop("drop_last", False))
    whole = in_memory.WholeBatchDataset(dataset)
    return DataLoader(whole, batch_sampler=batches, collate_fn=in_memory.unchanged, **settings)


MIXED = TensorDataset(
    torch.arange(22.0).view(2, 11).T, torch.arange(11), torch.arange(11) % 2 == 0, torch.randn(11, 2, 3).half()
)
IN_MEMORY = {
    "plain, not contiguous": MIXED,
    "a part": Subset(MIXED, [3, 1, 7, 0, 10]),
    "a part of a part, with negative indices": Subset(Subset(MIXED, range(2, 9)), [-1, 5, 0, -2]),
    "a part by an array": Subset(MIXED, np.array([3, 1, 7])),
    "more batches than are split at once": TensorDataset(torch.arange(5000)),
    "several batches of a selection": TensorDataset(torch.randn(300, 16), torch.arange(300)),
}


@pytest.mark.parametrize("settings", [{}, {"drop_last": True}, {"sampler": SequentialSampler}, {"batch_size": 64}])
@pytest.mark.parametrize("dataset", IN_MEMORY.values(), ids=IN_MEMORY)
def test_whole_batches_are_bit_identical_to_those_of_the_loader(dataset, settings):
    batches = list(in_memory.whole_batches_of(loader_of(dataset, **settings)))
    expected = list(loader_of(dataset, **settings))
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for tensor, collated in zip(batch, other, strict=True):
            assert torch.equal(tensor, collated)
            assert (tensor.dtype, tensor.is_contiguous()) == (collated.dtype, True)


def test_writing_to_a_whole_batch_does_not_change_the_dataset():
    dataset = make_dataset(8)
    before = dataset.tensors[0].clone()
    for inputs, _ in in_memory.whole_batches_of(loader_of(dataset, SequentialSampler)):
        inputs.zero_()
    assert torch.equal(dataset.tensors[0], before)


def test_writing_to_a_whole_batch_does_not_invalidate_the_graph_of_another():
    weights = torch.ones(16, requires_grad=True)
    dataset = TensorDataset(torch.randn(64, 16))
    (first,), (second,), *_ = in_memory.whole_batches_of(loader_of(dataset, batch_size=8))
    loss = (first * weights).sum()
    second.zero_()
    loss.backward()
    assert torch.equal(weights.grad, first.sum(dim=0))
    assert not second.any()


@pytest.mark.parametrize("num_features", [1, 3, 5, 16])
def test_whole_batches_are_aligned_like_new_tensors(num_features):
    batches = list(in_memory.whole_batches_of(loader_of(TensorDataset(torch.randn(64, num_features)), batch_size=8)))
    assert len(batches) == 8
    assert {inputs.data_ptr() % 64 for (inputs,) in batches} == {0}


def test_a_batch_that_is_kept_keeps_at_most_half_a_megabyte_of_others():
    dataset = TensorDataset(torch.zeros(64, 4096))
    (inputs,), *_ = in_memory.whole_batches_of(loader_of(dataset, batch_size=8))
    assert inputs.untyped_storage().nbytes() == 2**19
    dataset = TensorDataset(torch.zeros(16, 2**17))
    (inputs,), *_ = in_memory.whole_batches_of(loader_of(dataset, batch_size=4))
    assert inputs.untyped_storage().nbytes() == inputs.nbytes


def test_tensors_that_the_program_replaces_between_epochs_are_used():
    dataset = TensorDataset(torch.zeros(8))
    loader = loader_of(dataset)
    dataset.tensors = (torch.ones(8),)
    assert all(bool(values.all()) for (values,) in in_memory.whole_batches_of(loader))
    assert all(bool(values.all()) for (values,) in loader)


def test_loaders_with_other_data_or_orders_have_no_whole_batches():
    def without_generator(dataset):
        return RandomSampler(dataset)

    def with_replacement(dataset):
        return RandomSampler(dataset, replacement=True, generator=torch.Generator())

    def fewer(dataset):
        return RandomSampler(dataset, num_samples=3, generator=torch.Generator())

    class Reversed(SequentialSampler):
        def __iter__(self):
            return reversed(range(len(self)))

    dataset = make_dataset(8)
    for sampler in (without_generator, with_replacement, fewer, Reversed):
        assert in_memory.whole_batches_of(loader_of(dataset, sampler)) is None
    assert in_memory.whole_batches_of(DataLoader(dataset)) is None
    assert in_memory.whole_batches_of(loader_of(dataset, num_workers=1)) is None
    batches = ShardedBatchSampler(BatchSampler(SequentialSampler(dataset), 2, drop_last=False), 2, 0)
    sharded = DataLoader(in_memory.WholeBatchDataset(dataset), batch_sampler=batches, collate_fn=in_memory.unchanged)
    assert in_memory.whole_batches_of(sharded) is None
