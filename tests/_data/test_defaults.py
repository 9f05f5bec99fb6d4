"""The arguments of a `DataLoader`: defaults, and merging with the user's."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from _support import Samples, Stream, make_dataset
from pytorch_accelerated._data import defaults
from pytorch_accelerated._data.defaults import merge_dl_kwargs
from pytorch_accelerated._data.workers import worker_init_fn

# --- workers ---------------------------------------------------------------------------------------------------------


def test_data_in_memory_and_streams_get_no_workers():
    for data in (make_dataset(4), Subset(make_dataset(4), [0]), Stream(make_dataset(4)), [1, 2]):
        assert defaults.default_num_workers(data, 1) == 0


@pytest.mark.parametrize(
    ("num_cores", "num_processes", "expected"), [(1, 1, 0), (2, 1, 1), (8, 2, 3), (64, 1, 8), (4, 8, 0), (4, 0, 3)]
)
def test_default_workers_divide_the_cores_of_the_machine_among_its_processes(
    monkeypatch, num_cores, num_processes, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)), raising=False)
    assert defaults.default_num_workers(Samples(make_dataset(4)), num_processes) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    assert defaults.default_num_workers(Samples(make_dataset(4)), num_processes) == expected
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert defaults.default_num_workers(Samples(make_dataset(4)), num_processes) == 0


def test_default_workers_start_in_each_epoch_and_only_host_memory_is_pinned(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    kwargs = defaults.default_dl_kwargs(Samples(make_dataset(4)), 8, 1, pin_memory=True)
    assert kwargs == {"batch_size": 8, "pin_memory": True, "num_workers": 2, "worker_init_fn": worker_init_fn}
    on_device = TensorDataset(torch.zeros(3, device="meta"))
    assert defaults.default_dl_kwargs(make_dataset(4), 8, 1, pin_memory=True)["pin_memory"] is True
    assert defaults.default_dl_kwargs(on_device, 8, 1, pin_memory=True)["pin_memory"] is False
    assert defaults.default_dl_kwargs(make_dataset(4), 8, 1, pin_memory=False) == {
        "batch_size": 8,
        "pin_memory": False,
        "num_workers": 0,
        "worker_init_fn": worker_init_fn,
    }


# --- merging ---------------------------------------------------------------------------------------------------------


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
def test_the_users_arguments_win_and_remove_contradicting_defaults(given, dropped, added):
    given_defaults = dict(DEFAULTS)
    expected = {**{name: value for name, value in DEFAULTS.items() if name not in dropped}, **added}
    assert merge_dl_kwargs(given_defaults, given, make_dataset(4)) == expected
    assert given_defaults == DEFAULTS


FOR_WORKERS = {"persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": "fork"}


def test_arguments_for_workers_are_kept_unless_there_are_none_by_default():
    assert merge_dl_kwargs({"num_workers": 2}, FOR_WORKERS, make_dataset(4)) == {"num_workers": 2, **FOR_WORKERS}
    assert merge_dl_kwargs({"num_workers": 0}, FOR_WORKERS, make_dataset(4)) == {"num_workers": 0}
    asked_for = {"num_workers": 1, **FOR_WORKERS}
    assert merge_dl_kwargs({"num_workers": 0}, asked_for, make_dataset(4)) == asked_for
    refused_by_pytorch = {"num_workers": 0, **FOR_WORKERS}
    assert merge_dl_kwargs({"num_workers": 2}, refused_by_pytorch, make_dataset(4)) == refused_by_pytorch


def test_a_stream_is_not_shuffled():
    assert "shuffle" not in merge_dl_kwargs(DEFAULTS, {}, Stream(make_dataset(4)))
