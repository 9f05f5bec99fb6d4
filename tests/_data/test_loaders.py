"""Facts about loaders, and iterating over their batches."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from _support import Batches, Samples, SizedBatches, Stream, make_dataset
from pytorch_accelerated._data import loaders as loaders_module
from pytorch_accelerated._data.loaders import (
    has_state,
    is_map_style,
    is_shardable,
    loader_settings,
    show_arguments_of,
    showing_inner_arguments,
)

# --- facts about loaders ---------------------------------------------------------------------------------------------


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
def test_a_dataset_of_samples_is_distinguished_from_an_iterable_of_batches(data, expected):
    assert loaders_module.is_dataset(data) is expected


@pytest.mark.parametrize(
    ("loader", "has_indices", "can_be_sharded"),
    [
        (DataLoader(make_dataset(8), batch_size=4), True, True),
        (DataLoader(make_dataset(8), batch_sampler=[[0, 1], [2]]), True, True),
        (DataLoader(make_dataset(8), batch_size=None), True, False),
        (DataLoader(Stream(make_dataset(8)), batch_size=4), False, False),
        (Batches(make_dataset(8), 4), False, False),
        (None, False, False),
    ],
    ids=["batch size", "batch sampler", "no batches", "stream", "iterable", "none"],
)
def test_only_batches_of_indices_can_be_sharded(loader, has_indices, can_be_sharded):
    assert is_map_style(loader) is has_indices
    assert is_shardable(loader) is can_be_sharded


def test_data_have_a_state_if_they_can_store_and_restore_it():
    saves = {"state_dict": lambda self: {}}
    assert has_state(type("Both", (), {**saves, "load_state_dict": lambda self, state: None})())
    assert not has_state(type("Saves", (), saves)())
    assert not has_state([1])


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
def test_the_number_of_batches_is_none_if_the_loader_does_not_report_it(loader, expected):
    assert loaders_module.num_batches_of(loader) == expected


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        ([1, 2], 2),
        (DataLoader(make_dataset(5), batch_size=2), 3),
        (DataLoader([1, 2, 3], batch_size=None), 3),
        (SizedBatches(make_dataset(4), 2, length=7), None),
        (DataLoader(type("Estimate", (Stream,), {"__len__": lambda self: 9})(make_dataset(4))), None),
    ],
    ids=["list", "batches", "samples", "estimate of an iterable", "estimate of a stream"],
)
def test_a_number_of_batches_that_may_be_an_estimate_is_not_relied_on(loader, expected):
    assert loaders_module.reliable_num_batches_of(loader) == expected


@pytest.mark.parametrize(
    ("dl_kwargs", "expected"),
    [
        ({}, 8),
        ({"batch_size": 3}, 3),
        ({"batch_sampler": BatchSampler(SequentialSampler([1]), 5, drop_last=False)}, 5),
        ({"batch_sampler": [[1], [2, 3]]}, None),
    ],
)
def test_the_batch_size_of_a_loader_of_the_trainer_follows_from_its_arguments(dl_kwargs, expected):
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
def test_the_batch_size_of_another_loader_is_the_one_it_reports(loader, expected):
    assert loaders_module.batch_size_of(loader, None, 8) == expected


def test_a_loader_created_from_the_settings_of_another_has_the_same_settings():
    def collate(samples):
        return samples

    given = {"num_workers": 1, "collate_fn": collate, "timeout": 3, "prefetch_factor": 5, "persistent_workers": True}
    loader = DataLoader(Samples(make_dataset(8)), batch_size=4, generator=torch.Generator(), **given)
    settings = loader_settings(loader)
    twin = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, **settings)
    assert {name: getattr(twin, name) for name in given} == given
    assert twin.generator is loader.generator


def shown_by(loader):
    return loader.dataset, loader.collate_fn, loader.worker_init_fn


def test_a_prepared_loader_shows_the_arguments_of_the_users_and_reads_from_its_own():
    inner = DataLoader(Samples(make_dataset(8)), batch_size=4)
    prepared = DataLoaderShard(inner.dataset, batch_size=4)
    given = DataLoader([1, 2], collate_fn=list, worker_init_fn=print)
    show_arguments_of(given, prepared)
    assert shown_by(prepared) == shown_by(given)
    assert [len(inputs) for inputs, _ in prepared] == [4, 4]
    with showing_inner_arguments(prepared):
        assert shown_by(prepared) == shown_by(inner)
    assert shown_by(prepared) == shown_by(given)


def test_a_loader_that_reads_what_it_shows_is_left_alone():
    loader, batches = DataLoader(Samples(make_dataset(8))), Batches(make_dataset(4), 2)
    before = shown_by(loader)
    for prepared in (loader, batches, None):
        show_arguments_of(DataLoader([1, 2], collate_fn=list), prepared)
    assert shown_by(loader) == before
    with showing_inner_arguments(loader):
        assert shown_by(loader) == before
    assert loader_settings(SimpleNamespace(num_workers=2, sampler=None)) == {"num_workers": 2}


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(make_dataset(4)), "exactly"),
        ([1, 2], "exactly"),
        (DataLoader(Stream(make_dataset(4))), "read again"),
        (Batches(make_dataset(4), 2), "read again"),
        (iter([1, 2]), "cannot be restarted"),
    ],
    ids=["indices", "list", "stream", "iterable", "iterator"],
)
def test_the_guarantee_of_skipping_depends_on_how_batches_can_be_reached(loader, expected):
    assert expected in loaders_module.guarantee_of_skipping(loader)


# --- iterating over batches ------------------------------------------------------------------------------------------


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
def test_batches_are_enumerated_and_the_last_is_marked(make_loader, first_step):
    loader = make_loader([10, 20, 30])
    batches = [
        (step, int(batch), is_last) for step, batch, is_last in loaders_module.enumerate_batches(loader, first_step)
    ]
    expected = [(0, 10, False), (1, 20, False), (2, 30, True)]
    assert batches == [(step + first_step, batch, is_last) for step, batch, is_last in expected]


def test_an_epoch_without_batches_is_an_error_unless_the_length_was_0():
    with pytest.raises(ValueError, match=r"yielded no batch in this epoch"):
        list(loaders_module.enumerate_batches(iter(())))
    assert list(loaders_module.enumerate_batches([])) == []
    assert list(loaders_module.enumerate_batches(iter(()), first_step=2)) == []  # a resumed epoch that was done


def test_the_rest_of_an_epoch_skips_the_first_batches():
    rest = loaders_module.RestOfEpoch([1, 2, 3], 2)
    assert list(rest) == [3]
    assert len(rest) == 1
    assert len(loaders_module.RestOfEpoch([1], 2)) == 0
    assert loaders_module.num_batches_of(loaders_module.RestOfEpoch(iter([1]), 1)) is None


META = torch.device("meta")


def test_placed_batches_are_on_the_device_and_the_epoch_is_passed_on():
    class WithEpoch(SizedBatches):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    batches = WithEpoch(make_dataset(4), 2, length=2)
    placed = loaders_module.PlacedBatches(batches, META)
    assert [tensor.device for batch in placed for tensor in batch] == [META] * 4
    assert len(placed) == 2
    placed.set_epoch(3)
    assert batches.epoch == 3
    unsized = loaders_module.PlacedBatches(Batches(make_dataset(4), 2), META)
    unsized.set_epoch(1)
    assert loaders_module.num_batches_of(unsized) is None


class WithWorkers:
    """Yields batches as a loader with a worker does; the connection to it gets lost."""

    num_workers = 1

    def __init__(self, before_loss=lambda: None):
        self.before_loss = before_loss

    def __iter__(self):
        yield 1
        self.before_loss()
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_lost_connection_is_reported_as_it_is_if_no_worker_has_died(monkeypatch):
    monkeypatch.setattr(loaders_module, "_SECONDS_UNTIL_FAILURE_IS_KNOWN", 0.0)
    with pytest.raises(ConnectionResetError, match="reset by peer"):
        list(loaders_module.enumerate_batches(WithWorkers()))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
def test_after_a_lost_connection_the_error_that_names_the_worker_is_raised_if_it_follows(monkeypatch):
    """A signal handler raises it shortly afterwards. It must not interrupt the cleanup of the run."""

    def name_worker(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed")

    loader = WithWorkers(lambda: signal.setitimer(signal.ITIMER_REAL, 0.05))
    before = signal.signal(signal.SIGALRM, name_worker)
    try:
        with pytest.raises(RuntimeError, match="pid 7"):
            list(loaders_module.enumerate_batches(loader))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
