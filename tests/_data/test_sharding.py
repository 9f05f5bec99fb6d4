"""How processes share the samples of an epoch."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from _support import Batches, Samples, Stream, make_dataset
from pytorch_accelerated._data.loaders import has_indices, loader_settings
from pytorch_accelerated._data.sharding import ShardedBatchSampler, TrimmedDispatcher, sharding_of, without_samples
from pytorch_accelerated._nested import first_rows

Pair = namedtuple("Pair", ["left", "right"])


def shares_of(batch_sampler, num_processes):
    return [ShardedBatchSampler(batch_sampler, num_processes, rank) for rank in range(num_processes)]


def steps_of(shares):
    """Return by step the batches of all processes, stand-ins left out."""
    batches = [list(share) for share in shares]
    assert len({len(own) for own in batches}) == 1, "the processes make different numbers of steps"
    return [
        [own[step] for own, share in zip(batches, shares, strict=True) if share.dummy_step != step]
        for step in range(len(batches[0]))
    ]


def flat(nested):
    return list(itertools.chain.from_iterable(nested))


# --- shares ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_processes", [2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_each_sample_once_in_order_in_equal_numbers_of_steps(batch_size, num_processes, drop_last):
    for num_samples in range(1, 4 * batch_size * num_processes + 2):
        order = torch.randperm(num_samples).tolist()
        sampler = BatchSampler(order, batch_size, drop_last)
        shares = shares_of(sampler, num_processes)
        steps = steps_of(shares)
        total = batch_size * num_processes
        num_used = num_samples // total * total if drop_last else num_samples
        assert flat(flat(steps)) == order[:num_used]
        for share in shares:
            assert len(share) == len(steps) == (num_used // total if drop_last else -(-num_samples // total))
            assert all(batch for batch in share)
        for step in steps[:-1]:
            assert [len(batch) for batch in step] == [batch_size] * num_processes
        num_left = num_used % total
        if 0 < num_left <= batch_size * (num_processes - 1):  # less than a batch each
            sizes = [len(batch) for batch in steps[-1]]
            assert len(sizes) == min(num_left, num_processes)
            assert max(sizes) - min(sizes) <= 1, "what is left is not divided evenly"


@pytest.mark.parametrize("num_processes", [2, 3, 5])
@pytest.mark.parametrize("num_batches", range(1, 12))
def test_batches_of_any_sizes(num_batches, num_processes):
    """As a batch sampler of the user's gives them; it need not know its batch size."""
    sizes = torch.randint(1, 9, (num_batches,)).tolist()
    indices = iter(range(sum(sizes)))
    batches = [list(itertools.islice(indices, size)) for size in sizes]
    shares = shares_of(batches, num_processes)
    steps = steps_of(shares)
    assert flat(flat(steps)) == list(range(sum(sizes)))
    assert steps[: num_batches // num_processes] == [
        batches[start : start + num_processes] for start in range(0, num_batches - num_processes + 1, num_processes)
    ]
    assert {len(share) for share in shares} == {len(steps)}
    assert {(share.batch_size, share.drop_last) for share in shares} == {(None, False)}


def test_a_sampler_without_batches_gives_none():
    for share in shares_of([], 3):
        assert list(share) == []
        assert len(share) == 0
        assert share.dummy_step is None


@pytest.mark.parametrize(("num_samples", "stand_ins"), [(1, [None, 0, 0]), (2, [None, None, 0]), (3, [None] * 3)])
def test_who_has_no_sample_gets_a_stand_in(num_samples, stand_ins):
    sampler = BatchSampler(range(num_samples), 8, drop_last=False)
    shares = shares_of(sampler, 3)
    batches = [list(share) for share in shares]
    assert sorted(stand_ins, key=str) == sorted((share.dummy_step for share in shares), key=str)
    for own in batches:
        assert len(own) == 1
        assert set(own[0]) <= set(range(num_samples))
        assert own[0]


def test_a_stand_in_takes_no_more_memory_than_a_batch():
    sampler = BatchSampler(range(5), 1, drop_last=False)
    assert {len(batch) for share in shares_of(sampler, 8) for batch in share} == {1}


def test_a_stand_in_is_what_the_process_had_before():
    shares = shares_of(BatchSampler(range(13), 2, drop_last=False), 3)
    assert [list(share)[-1] for share in shares] == [[12], [8, 9], [10, 11]]
    assert [share.dummy_step for share in shares] == [None, 2, 2]


def test_an_epoch_knows_nothing_of_the_stand_in_of_the_one_before():
    batches = [[0], [1], [2]]
    share = ShardedBatchSampler(batches, 2, 1)
    assert list(share) == [[1], [1]]
    assert share.dummy_step == 1
    epoch = iter(share)
    assert next(epoch) == [1]
    assert share.dummy_step is None
    batches.append([3])
    assert list(share) == [[1], [3]]
    assert share.dummy_step is None


def test_all_ranks_draw_the_same_order_anew_each_epoch():
    def make_sampler():
        sampler = RandomSampler(range(23), generator=torch.Generator().manual_seed(3))
        return BatchSampler(sampler, 4, drop_last=False)

    shares = [ShardedBatchSampler(make_sampler(), 3, rank) for rank in range(3)]
    first, second = (flat(flat(steps_of(shares))) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


def test_what_a_sampler_offers_is_passed_through():
    sampler = BatchSampler(SequentialSampler(range(4)), 3, drop_last=True)
    share = ShardedBatchSampler(sampler, 2, 0)
    assert share.sampler is sampler.sampler
    assert (share.batch_size, share.drop_last) == (3, True)
    with pytest.raises(AttributeError, match="'BatchSampler' object has no attribute 'nonsense'"):
        _ = share.nonsense


def test_a_share_can_be_copied_and_pickled():
    share = ShardedBatchSampler(BatchSampler(SequentialSampler(range(5)), 2, drop_last=False), 2, 1)
    for twin in (copy.copy(share), copy.deepcopy(share), pickle.loads(pickle.dumps(share))):
        assert list(twin) == list(share) == [[2, 3], [2, 3]]


# --- loaders -----------------------------------------------------------------------------------------------------


def test_a_loader_made_from_the_settings_of_another_has_them():
    def collate(samples):
        return samples

    given = {"num_workers": 1, "collate_fn": collate, "timeout": 3, "prefetch_factor": 5, "persistent_workers": True}
    loader = DataLoader(Samples(make_dataset(8)), batch_size=4, generator=torch.Generator(), **given)
    settings = loader_settings(loader)
    twin = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, **settings)
    assert {name: getattr(twin, name) for name in given} == given
    assert twin.generator is loader.generator
    assert loader_settings(SimpleNamespace(num_workers=2, sampler=None)) == {"num_workers": 2}


def test_which_loaders_choose_samples_by_index():
    dataset = make_dataset(8)
    assert has_indices(DataLoader(dataset, batch_size=4))
    assert has_indices(DataLoader(dataset, batch_sampler=[[0, 1], [2]]))
    assert not has_indices(DataLoader(dataset, batch_size=None))
    assert not has_indices(DataLoader(Stream(dataset), batch_size=4))
    assert not has_indices(Batches(dataset, 4))
    assert not has_indices(None)


def test_which_step_is_a_stand_in():
    share = ShardedBatchSampler([[0], [1], [2]], 2, 1)
    list(share)
    assert share.dummy_step == 1
    assert sharding_of(SimpleNamespace(share=share)) is share
    assert sharding_of(SimpleNamespace(share="a user's own")) is None
    assert sharding_of(Batches(make_dataset(4), 2)) is None


# --- what the main process deals out --------------------------------------------------------------------------------


class Dealt:
    """Deals out steps as Accelerate does: evenly, the last filled up with rows of the first."""

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
            num_own = -(-len(rows) // self.num_processes)
            filled = torch.cat([rows, first])
            yield {"row": filled[self.process_index * num_own :][:num_own]}

    def __len__(self):
        return len(self.steps)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 12, 13, 14, 16])
def test_what_fills_up_the_last_step_is_cut_off(num_samples, num_processes):
    steps = list(torch.arange(num_samples).split(4 * num_processes))
    loaders = [TrimmedDispatcher(Dealt(steps, num_processes, rank), rank) for rank in range(num_processes)]
    batches = [list(loader) for loader in loaders]
    rows = [
        own[step]["row"].tolist()
        for step in range(len(steps))
        for own, loader in zip(batches, loaders, strict=True)
        if sharding_of(loader).dummy_step != step
    ]
    assert flat(rows) == list(range(num_samples))
    assert {len(loader) for loader in loaders} == {len(steps)}
    assert all(len(batch["row"]) > 0 for own in batches for batch in own)


def test_a_dispatcher_can_be_copied_and_asked_as_before():
    loader = TrimmedDispatcher(Dealt([torch.arange(4)], 2, 1), 1)
    assert copy.copy(loader).num_processes == 2
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loader.nonsense


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    rows: torch.Tensor
    name: str = "a"
    derived: list = field(init=False, default_factory=list)


def test_rows_are_cut_off_wherever_they_are():
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
def test_rows_of_mappings_of_other_kinds(make):
    cut = first_rows(make(a=torch.ones(4)), 4, 0)
    assert type(cut) is make
    assert cut["a"].shape == (0,)


def test_a_stand_in_holds_no_sample():
    loss = torch.tensor(0.5)
    batch_output = {"loss": loss, "batch_size": 3, "num_items_in_batch": torch.tensor(7), "outputs": torch.ones(3, 2)}
    batch, emptied = without_samples((torch.ones(3, 2), "text"), batch_output)
    assert batch[0].shape == (0, 2)
    assert emptied["outputs"].shape == (0, 2)
    assert (emptied["loss"], emptied["batch_size"], emptied["num_items_in_batch"]) == (loss, 0, torch.tensor(0))
    assert batch_output["batch_size"] == 3
    assert "num_items_in_batch" not in without_samples((), {"loss": loss, "batch_size": 3})[1]
