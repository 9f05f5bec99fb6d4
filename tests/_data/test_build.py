"""The loaders of a run are built once: seeded, sharded, with the user's settings."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from _support import Batches, Samples, Stream, make_dataset
from pytorch_accelerated._data.build import Placement, rebuild_loader, shard_loader
from pytorch_accelerated._data.determinism import SeededDataset, SeededSampler
from pytorch_accelerated._data.in_memory import WholeBatchDataset
from pytorch_accelerated._data.sharding import ShardedBatchSampler
from pytorch_accelerated._data.streams import TrackedStream

DATASET = make_dataset(12)
RANK_1_OF_2 = Placement(process_index=1, num_processes=2, num_batches_per_step=2, create_loader=DataLoader)


class GlobalSampler(Sampler):
    """Draws from a global generator."""

    def __len__(self):
        return 12

    def __iter__(self):
        return iter(torch.randperm(12).tolist())


class GroupedSampler(BatchSampler):
    """May group samples in any way."""


class CountingLoader(DataLoader):
    """Counts how many loaders are created."""

    num_created = 0

    def __init__(self, *args, **kwargs):
        type(self).num_created += 1
        super().__init__(*args, **kwargs)


# --- the user's loader and its settings ------------------------------------------------------------------------------


def test_the_users_loader_stays_unchanged():
    samples = Samples(DATASET)
    loader = DataLoader(samples, batch_sampler=BatchSampler(GlobalSampler(), 4, drop_last=False), collate_fn=list)
    before = dict(vars(loader))
    rebuild_loader(loader, Placement()).set_epoch(1, 2)
    assert vars(loader) == before


def test_the_loader_of_a_run_has_the_settings_of_the_users():
    given = {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": True, "timeout": 5}
    loader = rebuild_loader(DataLoader(Samples(DATASET), batch_size=5, drop_last=True, **given), Placement()).loader
    assert {name: getattr(loader, name) for name in given} == given
    assert (loader.batch_sampler.batch_size, loader.batch_sampler.drop_last, len(loader)) == (5, True, 2)
    stream = rebuild_loader(DataLoader(Stream(DATASET), batch_size=5, drop_last=True, **given), Placement()).loader
    assert {name: getattr(stream, name) for name in given} == given
    assert (stream.batch_size, stream.drop_last) == (5, True)


@pytest.mark.parametrize(
    "loader", [None, [1, 2], DataLoader(Stream(DATASET), batch_size=4)], ids=["none", "list", "stream"]
)
def test_loaders_without_an_order_can_be_rebuilt_and_seeded(loader):
    rebuild_loader(loader, Placement()).set_epoch(1, 2)


@pytest.mark.parametrize("loader", [None, [1, 2], Batches(DATASET, 4)], ids=["none", "list", "iterable"])
def test_an_iterable_without_a_state_is_used_itself(loader):
    seeded = rebuild_loader(loader, RANK_1_OF_2)
    assert seeded.loader is loader
    assert seeded.stream is None
    assert not seeded.yields_full_batches


def test_the_seeds_of_workers_differ_between_epochs_and_ranks_but_not_between_runs():
    seeds = {}
    for process in (0, 1):
        for run in (0, 1):
            loader = DataLoader(DATASET, batch_size=4)
            seeded = rebuild_loader(loader, Placement(process))
            for epoch in (0, 1):
                seeded.set_epoch(epoch, 3)
                seeds[process, run, epoch] = seeded.loader.generator.initial_seed()
    assert len(set(seeds.values())) == 4
    assert all(seeds[process, 0, epoch] == seeds[process, 1, epoch] for process in (0, 1) for epoch in (0, 1))


def test_the_workers_of_a_run_are_told_when_it_is_over():
    seeded = rebuild_loader(DataLoader(Samples(DATASET), num_workers=1), Placement())
    setup = seeded.loader.worker_init_fn
    assert not setup._is_run_over
    seeded.end_run()
    assert setup._is_run_over
    rebuild_loader([1, 2], Placement()).end_run()  # without workers: nothing to tell


@pytest.mark.parametrize(
    ("make_loader", "expected"),
    [
        (lambda: DataLoader(DATASET, batch_size=4, shuffle=True), True),
        (lambda: DataLoader(Samples(DATASET), batch_size=4), True),
        (lambda: DataLoader(Samples(DATASET), batch_size=4, collate_fn=list), False),
        (lambda: DataLoader(DATASET, batch_sampler=[[0, 1], [2]]), False),
        (lambda: DataLoader(Stream(DATASET), batch_size=4), False),
    ],
    ids=["in memory", "samples", "user's collation", "user's batches", "stream"],
)
def test_full_batches_are_promised_only_if_order_and_collation_are_pytorchs(make_loader, expected):
    assert rebuild_loader(make_loader(), Placement()).yields_full_batches is expected


# --- sharding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_dataset_of", [lambda: DATASET, lambda: Samples(DATASET)], ids=["in memory", "samples"])
def test_a_loader_is_created_once_and_yields_all_batches_until_its_sharding_is_activated(make_dataset_of):
    CountingLoader.num_created = 0
    placement = Placement(1, 2, 2, CountingLoader)
    loader = rebuild_loader(DataLoader(make_dataset_of(), batch_size=4), placement).loader
    assert CountingLoader.num_created == 1
    assert type(loader) is CountingLoader
    sampler = loader.batch_sampler
    assert (type(sampler), sampler.num_processes, sampler.process_index) == (ShardedBatchSampler, 2, 1)
    assert list(map(list, sampler)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    sampler.activate()
    assert list(map(list, sampler)) == [[4, 5, 6, 7], [10, 11]]
    assert len(loader) == len(list(loader)) == 2


@pytest.mark.parametrize(
    "placement", [Placement(0, 1, 1, DataLoader), Placement(1, 2, 2)], ids=["one process", "left to Accelerate"]
)
def test_batches_are_not_sharded_by_one_process_or_if_accelerate_does_it(placement):
    loader = rebuild_loader(DataLoader(DATASET, batch_size=4), placement).loader
    assert type(loader) is DataLoader
    assert type(loader.batch_sampler) is BatchSampler


def test_if_drop_last_leaves_no_step_every_rank_takes_every_batch():
    loader = rebuild_loader(DataLoader(DATASET, batch_size=8, drop_last=True), RANK_1_OF_2).loader
    assert type(loader.batch_sampler) is BatchSampler
    assert list(loader.batch_sampler) == [list(range(8))]


def test_batches_without_a_number_can_be_sharded():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield [0, 1]

    loader = rebuild_loader(DataLoader(DATASET, batch_sampler=Endless()), RANK_1_OF_2).loader
    assert type(loader.batch_sampler) is ShardedBatchSampler


def test_a_loader_without_batches_is_left_to_accelerate():
    loader = rebuild_loader(DataLoader(Samples(DATASET), batch_size=None, sampler=GlobalSampler()), RANK_1_OF_2).loader
    assert type(loader) is DataLoader
    assert loader.batch_sampler is None
    assert type(loader.sampler.sampler) is SeededSampler


# --- a loader that a subclass puts in the place of the rebuilt one ---------------------------------------------------


def test_a_replaced_loader_is_sharded_but_keeps_its_order_and_draws():
    generator = torch.Generator().manual_seed(3)
    given = DataLoader(Samples(DATASET), 4, sampler=RandomSampler(DATASET, generator=generator), drop_last=True)
    created = []
    placement = Placement(1, 2, 2, lambda *args, **kwargs: created.append((args, kwargs)) or "created")
    assert shard_loader(given, placement) == "created"
    ((dataset,), kwargs) = created[0]
    assert dataset is given.dataset
    assert type(kwargs["batch_sampler"]) is ShardedBatchSampler
    assert kwargs["batch_sampler"].batch_sampler is given.batch_sampler
    assert kwargs["_drop_last"] is True
    assert kwargs["generator"] is given.generator
    assert given.sampler.generator is generator


@pytest.mark.parametrize(
    ("loader", "placement"),
    [
        (DataLoader(DATASET), Placement(1, 2, 2)),
        (DataLoader(Stream(DATASET)), RANK_1_OF_2),
        (DataLoader(DATASET, batch_size=None), RANK_1_OF_2),
        ([1, 2], RANK_1_OF_2),
        (None, RANK_1_OF_2),
    ],
    ids=["left to Accelerate", "stream", "no batches", "list", "none"],
)
def test_a_replaced_loader_that_cannot_be_sharded_is_returned_itself(loader, placement):
    assert shard_loader(loader, placement) is loader


# --- streams ---------------------------------------------------------------------------------------------------------


class Numbers:
    """An iterable with a state."""

    def __iter__(self):
        return iter(range(10))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_the_position_in_an_iterable_with_a_state_is_tracked():
    source = Numbers()
    seeded = rebuild_loader(source, RANK_1_OF_2)
    assert type(seeded.loader) is TrackedStream
    assert seeded.loader is seeded.stream
    assert (seeded.stream.source, seeded.stream.num_items_per_step) == (source, 1)


@pytest.mark.parametrize(
    ("num_workers", "batch_size", "num_per_step", "expected"),
    [(0, 4, 1, 4), (0, 4, 3, 12), (0, None, 2, 2), (1, 4, 1, None)],
)
def test_the_position_in_an_iterable_dataset_is_tracked_if_this_process_reads_it(
    num_workers, batch_size, num_per_step, expected
):
    source = type("NumberDataset", (Numbers, IterableDataset), {})()
    loader = DataLoader(source, batch_size=batch_size, num_workers=num_workers)
    seeded = rebuild_loader(loader, Placement(num_batches_per_step=num_per_step))
    assert (None if seeded.stream is None else seeded.stream.num_items_per_step) == expected
    assert seeded.loader.dataset is (source if seeded.stream is None else seeded.stream)


def test_a_stream_is_not_wrapped_as_samples_and_its_workers_are_seeded():
    seeded = rebuild_loader(DataLoader(Stream(DATASET), batch_size=4, num_workers=1), RANK_1_OF_2)
    assert type(seeded.loader) is DataLoader
    assert not isinstance(seeded.loader.dataset, SeededDataset)
    seeds = []
    for epoch in (0, 1):
        seeded.set_epoch(epoch, seed=3)
        seeds.append(seeded.loader.generator.initial_seed())
    assert seeds[0] != seeds[1]


# --- data in memory --------------------------------------------------------------------------------------------------


def slices(dataset, **settings):
    return isinstance(rebuild_loader(DataLoader(dataset, **settings), Placement()).loader.dataset, WholeBatchDataset)


def test_a_loader_of_tensors_in_memory_is_rebuilt_to_slice_whole_batches():
    assert slices(DATASET)
    assert slices(DATASET, batch_size=4, shuffle=True, drop_last=True)
    assert slices(DATASET, sampler=RandomSampler(DATASET, replacement=True))
    assert slices(DATASET, num_workers=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"collate_fn": list},
        {"sampler": [3, 1]},
        {"sampler": GlobalSampler()},
        {"batch_sampler": [[0, 1], [2]]},
        {"batch_sampler": GroupedSampler(SequentialSampler(DATASET), 2, drop_last=False)},
        {"batch_size": None},
    ],
    ids=["collate_fn", "indices", "sampler", "batches", "batch_sampler", "samples"],
)
def test_a_loader_whose_batches_the_user_determines_is_not_rebuilt_to_slice_them(settings):
    assert not slices(DATASET, **settings)


def test_a_loader_of_samples_is_not_rebuilt_to_slice_batches():
    assert not slices(Samples(DATASET))
    assert not slices(list(DATASET))


def test_a_batch_size_of_none_keeps_the_samples_of_the_plain_loader():
    loader = rebuild_loader(DataLoader(DATASET, batch_size=None), Placement()).loader
    for sample, expected in zip(loader, DataLoader(DATASET, batch_size=None), strict=True):
        assert type(sample) is type(expected)
        assert all(torch.equal(one, other) for one, other in zip(sample, expected, strict=True))
