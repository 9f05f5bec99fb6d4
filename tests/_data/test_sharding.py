"""How the ranks divide the samples of an epoch among them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from _support import Batches, make_dataset
from pytorch_accelerated._data.sharding import ShardedBatchSampler, TrimmedDispatcher, sharding_of, without_samples


def shards_of(batch_sampler, num_processes):
    return [ShardedBatchSampler(batch_sampler, num_processes, rank) for rank in range(num_processes)]


def steps_of(shards):
    """Return the batches of all ranks by step, without dummy batches."""
    batches = [list(shard) for shard in shards]
    assert len({len(local) for local in batches}) == 1, "the ranks make different numbers of steps"
    return [
        [local[step] for local, shard in zip(batches, shards, strict=True) if shard.dummy_step != step]
        for step in range(len(batches[0]))
    ]


def flat(nested):
    return list(itertools.chain.from_iterable(nested))


# --- batch samplers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_processes", [2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_each_sample_is_used_once_in_order_and_all_ranks_make_equally_many_steps(batch_size, num_processes, drop_last):
    for num_samples in range(1, 4 * batch_size * num_processes + 2):
        order = torch.randperm(num_samples).tolist()
        sampler = BatchSampler(order, batch_size, drop_last)
        shards = shards_of(sampler, num_processes)
        steps = steps_of(shards)
        total = batch_size * num_processes
        num_used = num_samples // total * total if drop_last else num_samples
        assert flat(flat(steps)) == order[:num_used]
        for shard in shards:
            assert len(shard) == len(steps) == (num_used // total if drop_last else -(-num_samples // total))
            assert all(batch for batch in shard)
        for step in steps[:-1]:
            assert [len(batch) for batch in step] == [batch_size] * num_processes
        num_left = num_used % total
        if num_left > 0:  # less than a full batch each
            sizes = [len(batch) for batch in steps[-1]]
            assert max(sizes) - min(sizes) <= 1, "the rest is not divided evenly"
            has_single_sample_on_one_rank = num_left % batch_size == 1  # where the same batch size leaves one sample
            assert min(sizes) > 1 or has_single_sample_on_one_rank or batch_size <= 2
            assert len(sizes) == min(num_processes, max(num_left // 2, math.ceil(num_left / batch_size)))


@pytest.mark.parametrize("num_processes", [2, 3, 5])
@pytest.mark.parametrize("num_batches", range(1, 12))
def test_batches_of_different_sizes_are_divided_in_order(num_batches, num_processes):
    """A user's batch sampler may yield them, without a batch size."""
    sizes = torch.randint(1, 9, (num_batches,)).tolist()
    indices = iter(range(sum(sizes)))
    batches = [list(itertools.islice(indices, size)) for size in sizes]
    shards = shards_of(batches, num_processes)
    steps = steps_of(shards)
    assert flat(flat(steps)) == list(range(sum(sizes)))
    assert steps[: num_batches // num_processes] == [
        batches[start : start + num_processes] for start in range(0, num_batches - num_processes + 1, num_processes)
    ]
    assert {len(shard) for shard in shards} == {len(steps)}
    assert {(shard.batch_size, shard.drop_last) for shard in shards} == {(None, False)}


def test_an_empty_sampler_yields_no_batch_on_any_rank():
    for shard in shards_of([], 3):
        assert list(shard) == []
        assert len(shard) == 0
        assert shard.dummy_step is None


@pytest.mark.parametrize(
    ("num_samples", "dummy_steps"),
    [
        (1, [None, 0, 0]),
        (2, [None, 0, 0]),
        (3, [None, 0, 0]),
        (4, [None, None, 0]),
        (5, [None, None, 0]),
        (6, [None] * 3),
    ],
)
def test_a_rank_without_samples_gets_a_dummy_batch(num_samples, dummy_steps):
    sampler = BatchSampler(range(num_samples), 8, drop_last=False)
    shards = shards_of(sampler, 3)
    batches = [list(shard) for shard in shards]
    assert sorted(dummy_steps, key=str) == sorted((shard.dummy_step for shard in shards), key=str)
    for local in batches:
        assert len(local) == 1
        assert set(local[0]) <= set(range(num_samples))
        assert local[0]


def test_a_dummy_batch_is_no_larger_than_a_batch():
    sampler = BatchSampler(range(5), 1, drop_last=False)
    assert {len(batch) for shard in shards_of(sampler, 8) for batch in shard} == {1}


def test_a_dummy_batch_is_the_previous_batch_of_the_rank():
    shards = shards_of(BatchSampler(range(13), 2, drop_last=False), 3)
    assert [list(shard)[-1] for shard in shards] == [[12], [8, 9], [10, 11]]
    assert [shard.dummy_step for shard in shards] == [None, 2, 2]


def test_a_dummy_step_is_forgotten_when_the_next_epoch_starts():
    batches = [[0], [1], [2]]
    shard = ShardedBatchSampler(batches, 2, 1)
    assert list(shard) == [[1], [1]]
    assert shard.dummy_step == 1
    epoch = iter(shard)
    assert next(epoch) == [1]
    assert shard.dummy_step is None
    batches.append([3])
    assert list(shard) == [[1], [3]]
    assert shard.dummy_step is None


def test_all_ranks_draw_the_same_order_and_another_one_in_each_epoch():
    def make_sampler():
        sampler = RandomSampler(range(23), generator=torch.Generator().manual_seed(3))
        return BatchSampler(sampler, 4, drop_last=False)

    shards = [ShardedBatchSampler(make_sampler(), 3, rank) for rank in range(3)]
    first, second = (flat(flat(steps_of(shards))) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


def test_an_inactive_shard_yields_all_batches_until_it_is_activated():
    shard = ShardedBatchSampler([[0], [1], [2]], 2, 1, is_active=False)
    assert list(shard) == [[0], [1], [2]]
    assert (len(shard), shard.dummy_step) == (3, None)
    shard.activate()
    assert list(shard) == [[1], [1]]
    assert (len(shard), shard.dummy_step) == (2, 1)


def test_the_attributes_of_the_batch_sampler_are_passed_through():
    sampler = BatchSampler(SequentialSampler(range(4)), 3, drop_last=True)
    shard = ShardedBatchSampler(sampler, 2, 0)
    assert shard.sampler is sampler.sampler
    assert (shard.batch_size, shard.drop_last) == (3, True)
    with pytest.raises(AttributeError, match="'BatchSampler' object has no attribute 'nonsense'"):
        _ = shard.nonsense


def test_a_shard_can_be_copied_and_pickled():
    shard = ShardedBatchSampler(BatchSampler(SequentialSampler(range(5)), 2, drop_last=False), 2, 1)
    for twin in (copy.copy(shard), copy.deepcopy(shard), pickle.loads(pickle.dumps(shard))):
        assert list(twin) == list(shard) == [[2, 3], [2, 3]]


def test_the_sharding_of_a_loader_is_found_unless_the_attribute_is_the_users():
    shard = ShardedBatchSampler([[0], [1], [2]], 2, 1)
    list(shard)
    assert shard.dummy_step == 1
    assert sharding_of(SimpleNamespace(sharding=shard)) is shard
    assert sharding_of(SimpleNamespace(sharding="a user's own")) is None
    assert sharding_of(Batches(make_dataset(4), 2)) is None


# --- dispatched batches ----------------------------------------------------------------------------------------------


class Dispatcher:
    """Divides steps as Accelerate does: evenly, with rows of the first step added to the last."""

    def __init__(self, steps, num_processes, process_index):
        self.steps = steps
        self.num_processes = num_processes
        self.process_index = process_index
        self.end_of_dataloader = False
        self.remainder = -1

    def slice_fn(self, batch, rows):
        return {"row": batch["row"][rows]}

    def __iter__(self):
        first = self.slice_fn({"row": self.steps[0]}, slice(0, self.num_processes))["row"]
        for step, rows in enumerate(self.steps):
            self.end_of_dataloader = step == len(self.steps) - 1
            self.remainder = len(rows) if self.end_of_dataloader else -1
            num_local = -(-len(rows) // self.num_processes)
            filled = torch.cat([rows, first])
            yield {"row": filled[self.process_index * num_local :][:num_local]}

    def __len__(self):
        return len(self.steps)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 12, 13, 14, 16])
def test_rows_that_fill_the_last_step_are_removed(num_samples, num_processes):
    steps = list(torch.arange(num_samples).split(4 * num_processes))
    loaders = [TrimmedDispatcher(Dispatcher(steps, num_processes, rank), rank) for rank in range(num_processes)]
    batches = [list(loader) for loader in loaders]
    rows = [
        local[step]["row"].tolist()
        for step in range(len(steps))
        for local, loader in zip(batches, loaders, strict=True)
        if sharding_of(loader).dummy_step != step
    ]
    assert flat(rows) == list(range(num_samples))
    assert {len(loader) for loader in loaders} == {len(steps)}
    assert all(len(batch["row"]) > 0 for local in batches for batch in local)


def test_a_trimmed_dispatcher_can_be_copied_and_passes_attributes_through():
    loader = TrimmedDispatcher(Dispatcher([torch.arange(4)], 2, 1), 1)
    assert copy.copy(loader).num_processes == 2
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loader.nonsense


# --- dummy batches ---------------------------------------------------------------------------------------------------


def test_callbacks_see_a_dummy_batch_without_samples():
    loss = torch.tensor(0.5)
    batch_output = {"loss": loss, "batch_size": 3, "num_items_in_batch": torch.tensor(7), "outputs": torch.ones(3, 2)}
    batch, emptied = without_samples((torch.ones(3, 2), "text"), batch_output)
    assert batch[0].shape == (0, 2)
    assert emptied["outputs"].shape == (0, 2)
    assert (emptied["loss"], emptied["batch_size"], emptied["num_items_in_batch"]) == (loss, 0, torch.tensor(0))
    assert batch_output["batch_size"] == 3
    assert "num_items_in_batch" not in without_samples((), {"loss": loss, "batch_size": 3})[1]
