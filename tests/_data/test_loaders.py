"""Datasets and loaders: defaults, merging, whole batches, batch sizes, placing, limits."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from _support import Batches, Samples, SizedBatches, Stream, make_dataset, make_indexed_dataset
from pytorch_accelerated import _nested
from pytorch_accelerated._data import defaults, in_memory
from pytorch_accelerated._data import loaders as loaders_module
from pytorch_accelerated._data.sharding import ShardedBatchSampler
from pytorch_accelerated.utils import (
    LIMIT_BATCHES_ENV_VAR,
    DataLoaderSlice,
    LimitBatches,
    remove_padding,
    worker_init_fn,
)

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Batch:
    values: torch.Tensor
    name: str


# --- what a loader is made of ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (make_dataset(4), True),
        (Stream(make_dataset(4)), True),
        ([1, 2], True),
        (Batches(make_dataset(4), 2), False),
        (iter([1]), False),
        (DataLoader(make_dataset(4)), False),
    ],
)
def test_datasets_of_samples_are_told_from_iterables_of_batches(data, expected):
    assert loaders_module.is_dataset(data) is expected


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        ([1, 2], 2),
        (DataLoader(make_dataset(5), batch_size=2), 3),
        (DataLoader(Stream(make_dataset(5)), batch_size=2), None),
        (Batches(make_dataset(4), 2), None),
        (None, None),
    ],
)
def test_the_number_of_batches_is_none_where_the_loader_cannot_tell(loader, expected):
    assert loaders_module.num_batches_of(loader) == expected


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize(
    "make_loader",
    [
        list,
        iter,
        lambda batches: DataLoader(batches, batch_size=None),
        lambda batches: DataLoader(Stream(batches), batch_size=None),
    ],
    ids=["list", "iterator", "loader", "stream"],
)
def test_batches_are_numbered_and_the_last_is_known(make_loader, first_step):
    loader = make_loader([10, 20, 30])
    batches = [
        (step, int(batch), is_last) for step, batch, is_last in loaders_module.enumerate_batches(loader, first_step)
    ]
    expected = [(0, 10, False), (1, 20, False), (2, 30, True)]
    assert batches == [(step + first_step, batch, is_last) for step, batch, is_last in expected]


def test_an_epoch_without_batches_is_an_error_where_the_length_did_not_tell():
    with pytest.raises(ValueError, match=r"gave no batch in this epoch"):
        list(loaders_module.enumerate_batches(iter(())))
    assert list(loaders_module.enumerate_batches([])) == []
    assert list(loaders_module.enumerate_batches(iter(()), first_step=2)) == []  # a resumed epoch that was done


def test_data_in_memory_and_streams_need_no_workers():
    for data in (make_dataset(4), Subset(make_dataset(4), [0]), Stream(make_dataset(4)), [1, 2]):
        assert defaults.default_num_workers(data, 1) == 0


@pytest.mark.parametrize(
    ("num_processors", "num_processes", "expected"), [(1, 1, 0), (2, 1, 1), (8, 2, 3), (64, 1, 8), (4, 8, 0), (4, 0, 3)]
)
def test_workers_share_the_processors_of_the_machine(monkeypatch, num_processors, num_processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_processors)), raising=False)
    assert defaults.default_num_workers(Samples(make_dataset(4)), num_processes) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: num_processors)
    assert defaults.default_num_workers(Samples(make_dataset(4)), num_processes) == expected
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert defaults.default_num_workers(Samples(make_dataset(4)), num_processes) == 0


def test_default_workers_are_persistent(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    kwargs = defaults.default_dl_kwargs(Samples(make_dataset(4)), 8, 1, pin_memory=True)
    assert kwargs == {"batch_size": 8, "pin_memory": True, "num_workers": 2, "persistent_workers": True}
    on_device = TensorDataset(torch.zeros(3, device="meta"))
    assert defaults.default_dl_kwargs(make_dataset(4), 8, 1, pin_memory=True)["pin_memory"] is True
    assert defaults.default_dl_kwargs(on_device, 8, 1, pin_memory=True)["pin_memory"] is False
    assert defaults.default_dl_kwargs(make_dataset(4), 8, 1, pin_memory=False) == {
        "batch_size": 8,
        "pin_memory": False,
        "num_workers": 0,
    }


DEFAULTS = {"shuffle": True, "batch_size": 8, "num_workers": 2, "persistent_workers": True}


@pytest.mark.parametrize(
    ("given", "dropped", "added"),
    [
        (None, (), {}),
        ({"batch_size": 3, "drop_last": True}, (), {"batch_size": 3, "drop_last": True}),
        ({"shuffle": False}, (), {"shuffle": False}),
        ({"sampler": [1]}, ("shuffle",), {"sampler": [1]}),
        ({"batch_sampler": [[1]]}, ("shuffle", "batch_size"), {"batch_sampler": [[1]]}),
        ({"sampler": None, "batch_sampler": None}, (), {}),
        ({"num_workers": 0}, ("persistent_workers",), {"num_workers": 0}),
        ({"collate_fn": None}, (), {"collate_fn": None}),
    ],
)
def test_what_the_user_gives_wins_and_drops_what_contradicts_it(given, dropped, added):
    defaults = dict(DEFAULTS)
    expected = {**{name: value for name, value in DEFAULTS.items() if name not in dropped}, **added}
    assert defaults.merge_dl_kwargs(defaults, given, make_dataset(4)) == expected
    assert defaults == DEFAULTS


def test_a_stream_is_not_shuffled():
    assert "shuffle" not in defaults.merge_dl_kwargs(DEFAULTS, {}, Stream(make_dataset(4)))


@pytest.mark.parametrize(
    ("dl_kwargs", "expected"),
    [
        ({}, 8),
        ({"batch_size": 3}, 3),
        ({"batch_sampler": BatchSampler(SequentialSampler([1]), 5, drop_last=False)}, 5),
        ({"batch_sampler": [[1], [2, 3]]}, None),
    ],
)
def test_the_batch_size_follows_from_the_arguments_of_the_loader(dl_kwargs, expected):
    assert loaders_module.batch_size_of(None, dl_kwargs, 8) == expected


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(make_dataset(4), batch_size=3), 3),
        (DataLoader(make_dataset(4), batch_sampler=BatchSampler(SequentialSampler([1]), 5, drop_last=False)), 5),
        (Batches(make_dataset(4), 2), 2),
        ([1, 2], 8),
        (None, 8),
    ],
)
def test_the_batch_size_of_a_loader_from_elsewhere_is_its_own(loader, expected):
    assert loaders_module.batch_size_of(loader, None, 8) == expected


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
def test_the_batch_size_is_the_length_of_the_first_tensor(batch):
    assert _nested.find_batch_size(batch) == 3


@pytest.mark.parametrize("batch", [None, "text", torch.tensor(1.0), [], {"a": [1, 2]}])
def test_a_batch_without_tensors_has_no_size(batch):
    with pytest.raises(ValueError, match=rf"No batch size was found: the batch, a {type(batch).__name__}.*Override"):
        _nested.find_batch_size(batch)


# --- whole batches -----------------------------------------------------------------------------------------------


class OwnTensorDataset(TensorDataset):
    """May do anything in `__getitem__`."""


@pytest.mark.parametrize(
    "dataset",
    [
        Samples(make_dataset(4)),
        OwnTensorDataset(torch.zeros(3)),
        TensorDataset(torch.zeros(3, requires_grad=True)),
        TensorDataset(torch.eye(3).to_sparse()),
        Subset(Samples(make_dataset(4)), [0]),
        [torch.zeros(3)],
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_only_plain_tensors_in_memory_are_sliced(dataset):
    assert in_memory.sliceable_tensors(dataset) is None


def test_a_whole_batch_dataset_gives_samples_and_batches_of_the_plain_one():
    dataset = make_indexed_dataset(10)
    whole = in_memory.WholeBatchDataset(Subset(Subset(dataset, range(2, 10)), [5, 0, 1]))
    assert len(whole) == 3
    assert whole[0][0].item() == 7
    assert whole.__getitems__([2, 0])[0].flatten().tolist() == [3, 7]
    assert in_memory.unchanged(whole) is whole


def loader_of(dataset, sampler=None, **settings):
    """A loader of whole batches as a run has it: made with a batch sampler, so that its own sampler is another."""
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
    "a part of a part, counted from the end": Subset(Subset(MIXED, range(2, 9)), [-1, 5, 0, -2]),
    "a part by an array": Subset(MIXED, np.array([3, 1, 7])),
    "more batches than are laid out at once": TensorDataset(torch.arange(5000)),
}


@pytest.mark.parametrize("settings", [{}, {"drop_last": True}, {"sampler": SequentialSampler}, {"batch_size": 64}])
@pytest.mark.parametrize("dataset", IN_MEMORY.values(), ids=IN_MEMORY)
def test_whole_batches_are_those_of_the_loader_bit_by_bit(dataset, settings):
    batches = list(in_memory.whole_batches_of(loader_of(dataset, **settings)))
    expected = list(loader_of(dataset, **settings))
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for tensor, collated in zip(batch, other, strict=True):
            assert torch.equal(tensor, collated)
            assert (tensor.dtype, tensor.is_contiguous()) == (collated.dtype, True)


def test_to_write_to_a_whole_batch_leaves_the_dataset_as_it_is():
    dataset = make_dataset(8)
    before = dataset.tensors[0].clone()
    for inputs, _ in in_memory.whole_batches_of(loader_of(dataset, SequentialSampler)):
        inputs.zero_()
    assert torch.equal(dataset.tensors[0], before)


def test_loaders_of_other_data_or_orders_are_left_to_pytorch():
    def own_generator(dataset):
        return RandomSampler(dataset)

    def with_replacement(dataset):
        return RandomSampler(dataset, replacement=True, generator=torch.Generator())

    def fewer(dataset):
        return RandomSampler(dataset, num_samples=3, generator=torch.Generator())

    class Reversed(SequentialSampler):
        def __iter__(self):
            return reversed(range(len(self)))

    dataset = make_dataset(8)
    for sampler in (own_generator, with_replacement, fewer, Reversed):
        assert in_memory.whole_batches_of(loader_of(dataset, sampler)) is None
    assert in_memory.whole_batches_of(DataLoader(dataset)) is None
    assert in_memory.whole_batches_of(loader_of(dataset, num_workers=1)) is None
    batches = ShardedBatchSampler(BatchSampler(SequentialSampler(dataset), 2, drop_last=False), 2, 0)
    share = DataLoader(in_memory.WholeBatchDataset(dataset), batch_sampler=batches, collate_fn=in_memory.unchanged)
    assert in_memory.whole_batches_of(share) is None


@pytest.mark.parametrize("name", ["collate_fn", "sampler", "batch_sampler"])
def test_whole_batches_are_not_used_where_the_user_makes_the_batches(name):
    dataset = make_dataset(4)
    arguments = defaults.loader_arguments(dataset, None, {name: [0]})
    assert arguments["dataset"] is dataset
    assert arguments[name] == [0]
    assert defaults.loader_arguments(dataset, len, {})["collate_fn"] is len
    assert defaults.loader_arguments(dataset, len, {"collate_fn": max})["collate_fn"] is max
    assert defaults.loader_arguments(dataset, None, {name: None})["dataset"].dataset is dataset


def test_without_automatic_batches_samples_are_those_of_the_plain_loader():
    dataset = make_dataset(3)
    loader = DataLoader(**defaults.loader_arguments(dataset, None, {"batch_size": None}))
    for sample, expected in zip(loader, DataLoader(dataset, batch_size=None), strict=True):
        assert type(sample) is type(expected)
        assert all(torch.equal(one, other) for one, other in zip(sample, expected, strict=True))


# --- iterables ---------------------------------------------------------------------------------------------------


def test_the_rest_of_an_epoch_leaves_out_the_first_batches():
    rest = loaders_module.RestOfEpoch([1, 2, 3], 2)
    assert list(rest) == [3]
    assert len(rest) == 1
    assert len(loaders_module.RestOfEpoch([1], 2)) == 0
    assert loaders_module.num_batches_of(loaders_module.RestOfEpoch(iter([1]), 1)) is None


META = torch.device("meta")


def test_placed_batches_are_on_the_device_and_hear_of_the_epoch():
    class Told(SizedBatches):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    told = Told(make_dataset(4), 2, length=2)
    placed = loaders_module.PlacedBatches(told, META)
    assert [tensor.device for batch in placed for tensor in batch] == [META] * 4
    assert len(placed) == 2
    placed.set_epoch(3)
    assert told.epoch == 3
    unsized = loaders_module.PlacedBatches(Batches(make_dataset(4), 2), META)
    unsized.set_epoch(1)
    assert loaders_module.num_batches_of(unsized) is None


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
def test_a_batch_keeps_its_structure_when_it_is_moved(batch):
    moved = _nested.move_to_device(batch, META)
    assert type(moved) is type(batch)
    assert [tensor.device for tensor in _nested.tensors_in(moved)] == [META]
    assert [tensor.device.type for tensor in _nested.tensors_in(batch)] == ["cpu"]


def test_what_holds_no_tensor_is_not_touched():
    for batch in ("text", None, 3, Batch):
        assert _nested.move_to_device(batch, META) is batch


# --- workers and limits ------------------------------------------------------------------------------------------


def test_worker_init_fn_seeds_numpy_and_python_from_the_seed_of_the_worker():
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        worker_init_fn(0)
        drawn.append((np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_a_slice_gives_the_first_batches_and_everything_else_of_the_loader():
    loader = DataLoader(make_dataset(10), batch_size=2)
    part = DataLoaderSlice(loader, 3)
    assert len(list(part)) == len(part) == 3
    assert part.batch_size == 2
    assert len(DataLoaderSlice(loader, 30)) == 5
    assert len(DataLoaderSlice(iter(()), 4)) == 4
    with pytest.raises(AttributeError, match="no_such_attribute"):
        part.no_such_attribute  # noqa: B018 - the error is what is tested


def test_a_slice_can_be_copied_and_pickled():
    part = DataLoaderSlice([1, 2, 3], 2)
    assert list(copy.deepcopy(part)) == list(pickle.loads(pickle.dumps(part))) == [1, 2]


def test_limits_nest_and_are_undone(monkeypatch):
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    with LimitBatches(5):
        with LimitBatches(2):
            assert os.environ[LIMIT_BATCHES_ENV_VAR] == "2"
        assert os.environ[LIMIT_BATCHES_ENV_VAR] == "5"
    assert LIMIT_BATCHES_ENV_VAR not in os.environ
    assert list(LimitBatches(1)([1, 2])) == [1]


def test_padding_is_removed_from_rows_and_vectors():
    assert remove_padding(torch.tensor([3, -1, 4, -1]), -1).tolist() == [3, 4]
    rows = torch.tensor([[1, -1], [-1, -1], [-1, 2]])
    assert remove_padding(rows, -1).tolist() == [[1, -1], [-1, 2]]
    assert remove_padding(torch.full((2, 2, 2), -1.0), -1).shape == (0, 2, 2)


@pytest.mark.parametrize("make_loader", [iter, list])
def test_a_lost_worker_is_named(make_loader, monkeypatch):
    monkeypatch.setattr(loaders_module, "_SECONDS_UNTIL_DEATH_IS_KNOWN", 0)

    def batches():
        yield 1
        yield 2
        raise ConnectionResetError(104, "Connection reset by peer")

    class Loader(list):
        def __iter__(self):
            return batches()

    loader = batches() if make_loader is iter else Loader([1, 2, 3])
    with pytest.raises(RuntimeError, match=r"a worker process of the loader was lost .*Connection reset by peer"):
        list(loaders_module.enumerate_batches(loader))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
def test_the_error_that_names_a_lost_worker_is_waited_for(monkeypatch):
    """It comes by a signal, shortly after the connection is lost, and must not strike while the run is tidied up."""

    def tell(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed")

    def batches():
        yield 1
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        raise ConnectionResetError(104, "Connection reset by peer")

    before = signal.signal(signal.SIGALRM, tell)
    try:
        with pytest.raises(RuntimeError, match="pid 7"):
            list(loaders_module.enumerate_batches(batches()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
