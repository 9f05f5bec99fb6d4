"""Worker processes of loaders: signals, failures and shutdown."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from _support import Samples, make_dataset
from pytorch_accelerated._data.build import Placement, rebuild_loader
from pytorch_accelerated._data.workers import (
    WorkerSetup,
    defer_worker_errors,
    is_worker_failure,
    iterate,
    shut_down_workers,
)
from pytorch_accelerated.utils import worker_init_fn

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SECONDS_TO_END = 20


class Indices(Dataset):
    """Samples that are their own index, and the number of the process that loaded them."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, os.getpid()])


def batches_of(loader):
    return list(rebuild_loader(loader, Placement()).loader)


def test_worker_init_fn_seeds_numpy_and_python_from_the_seed_of_the_worker():
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        worker_init_fn(0)
        drawn.append((np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


# --- signals ---------------------------------------------------------------------------------------------------------


class Signalled(Indices):
    """Its worker gets a signal before the second batch. The other samples show whether it survived."""

    def __init__(self, signal_number):
        self.signal_number = signal_number

    def __getitem__(self, index):
        if index == 4:
            os.kill(os.getpid(), self.signal_number)
        return super().__getitem__(index)


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGTERM"])
def test_a_worker_survives_a_signal_that_is_meant_for_the_run(name):
    batches = batches_of(DataLoader(Signalled(getattr(signal, name)), batch_size=2, num_workers=1))
    assert [batch[:, 0].tolist() for batch in batches] == [[2 * k, 2 * k + 1] for k in range(6)]
    assert len({int(pid) for batch in batches for pid in batch[:, 1]} - {os.getpid()}) == 1


def answer(setup, connection):
    setup(0)
    while True:
        connection.send("alive")
        connection.recv()


def start_worker(setup):
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=answer, args=(setup, theirs), daemon=True)
    worker.start()
    assert ours.recv() == "alive"
    return worker, ours


def test_a_worker_that_was_told_to_terminate_exits_when_the_run_is_over():
    worker, connection = start_worker(setup := WorkerSetup(None))
    for _ in range(2):
        worker.terminate()
        connection.send("still there?")
        assert connection.recv() == "alive"
    setup.end_run()
    worker.join(SECONDS_TO_END)
    assert worker.exitcode == -signal.SIGTERM


def test_a_worker_that_is_told_to_terminate_after_the_run_exits_at_once():
    """`multiprocessing` terminates the remaining ones when the program exits."""
    worker, _ = start_worker(setup := WorkerSetup(None))
    setup.end_run()
    worker.terminate()
    worker.join(SECONDS_TO_END)
    assert worker.exitcode == -signal.SIGTERM


def kill_parent(worker_id):
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        pass


def start_worker_that_kills(connection):
    worker = multiprocessing.get_context("fork").Process(target=answer, args=(WorkerSetup(kill_parent), connection))
    worker.start()
    worker.join()


def test_a_worker_whose_parent_is_killed_before_it_is_ready_exits():
    """PyTorch compares its parent with the one that it has at the end of its start."""
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=start_worker_that_kills, args=(theirs,))
    parent.start()
    theirs.close()
    with pytest.raises(EOFError):
        ours.recv()
    parent.join()


# --- the user's `worker_init_fn` -------------------------------------------------------------------------------------


def open_file(worker_id):
    get_worker_info().dataset.file = f"opened by worker {worker_id}"


class NeedsFile(Indices):
    file = None

    def __getitem__(self, index):
        assert self.file is not None
        return len(self.file)


def test_the_users_worker_init_fn_finds_the_users_dataset_in_the_worker():
    batches = batches_of(DataLoader(NeedsFile(), batch_size=6, num_workers=2, worker_init_fn=open_file))
    assert torch.cat(batches).tolist() == [len("opened by worker 0")] * 12


# --- failures --------------------------------------------------------------------------------------------------------


needs_sigchld = pytest.mark.skipif(
    not hasattr(signal, "SIGCHLD"), reason="this system does not report the exit of a process"
)


@pytest.fixture
def raise_if_dead():
    """PyTorch's handler, or one like it."""

    def handle(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed")

    outer = signal.signal(signal.SIGCHLD, handle)
    yield handle
    signal.signal(signal.SIGCHLD, outer)


@needs_sigchld
def test_the_error_of_a_dead_worker_is_raised_after_the_body_it_would_interrupt(raise_if_dead):
    done = []

    def be_interrupted():
        with defer_worker_errors():
            signal.raise_signal(signal.SIGCHLD)
            done.append("all")

    with pytest.raises(RuntimeError, match="is killed"):
        be_interrupted()
    assert done == ["all"]
    assert signal.getsignal(signal.SIGCHLD) is raise_if_dead
    with defer_worker_errors():
        pass
    with pytest.raises(LookupError), defer_worker_errors():
        raise LookupError
    assert signal.getsignal(signal.SIGCHLD) is raise_if_dead


@needs_sigchld
def test_nothing_is_deferred_without_a_handler_or_on_another_thread(raise_if_dead):
    seen = []

    def look():
        with defer_worker_errors():
            seen.append(signal.getsignal(signal.SIGCHLD))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [raise_if_dead]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    look()
    assert seen[1] == signal.SIG_DFL


class KillsItsWorker(Indices):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Failing(Indices):
    def __getitem__(self, index):
        if index == 4:
            raise LookupError("no such sample")
        return super().__getitem__(index)


@needs_sigchld
@pytest.mark.usefixtures("_not_measured")
def test_the_error_of_pytorch_for_a_killed_worker_is_recognized():
    """It is recognized by its text, which PyTorch may change."""
    with pytest.raises(RuntimeError) as caught:
        list(iterate(DataLoader(KillsItsWorker(), num_workers=1)))
    assert is_worker_failure(caught.value)
    assert not is_worker_failure(RuntimeError("CUDA out of memory"))
    assert not is_worker_failure(LookupError("DataLoader worker"))


# --- iterating and shutdown ------------------------------------------------------------------------------------------


def assert_no_workers():
    for worker in multiprocessing.active_children():
        worker.join(SECONDS_TO_END)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kwargs", [{"batch_size": 4}, {"batch_size": 5, "drop_last": True}, {"batch_size": None}])
def test_iterating_yields_the_batches_of_pytorch(num_workers, kwargs):
    loader = DataLoader(Samples(make_dataset(10)), num_workers=num_workers, **kwargs)
    expected = [[tensor.tolist() for tensor in batch] for batch in loader]
    assert [[tensor.tolist() for tensor in batch] for batch in iterate(loader)] == expected


@pytest.mark.parametrize("is_persistent", [False, True])
def test_after_an_error_no_worker_is_left_while_the_error_is_handled(is_persistent):
    """Its traceback refers to the iterator of PyTorch, which keeps the workers."""
    loader = DataLoader(Failing(), num_workers=2, persistent_workers=is_persistent)
    with pytest.raises(LookupError, match="no such sample") as caught:
        list(iterate(loader))
    shut_down_workers(loader)
    assert multiprocessing.active_children() == []
    assert caught.traceback


def test_an_epoch_that_is_left_early_ends_its_workers():
    batches = iterate(DataLoader(Indices(), num_workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@needs_sigchld
def test_errors_of_workers_are_deferred_while_the_workers_are_shut_down(monkeypatch):
    """Each worker that exits makes PyTorch's handler raise the error of one that was killed before."""
    handler = signal.getsignal(signal.SIGCHLD)
    seen = []

    class Watched(DataLoader):
        def __iter__(self):
            iterator = super().__iter__()
            ended = type(iterator).__del__

            def note(iterator):
                seen.append(signal.getsignal(signal.SIGCHLD))
                ended(iterator)

            monkeypatch.setattr(type(iterator), "__del__", note)
            return iterator

    batches = iterate(Watched(Indices(), num_workers=1))
    next(batches)
    of_pytorch = signal.getsignal(signal.SIGCHLD)
    batches.close()
    assert len(seen) == 1
    assert seen[0] not in (of_pytorch, handler)
    assert signal.getsignal(signal.SIGCHLD) is of_pytorch


def test_an_error_without_workers_keeps_the_variables_of_its_frames():
    """For a debugger: they are those of the user's dataset."""
    with pytest.raises(LookupError) as caught:
        list(iterate(DataLoader(Failing(), num_workers=0)))
    assert caught.traceback[-1].locals["index"] == 4


def test_persistent_workers_are_shut_down_and_start_again_on_demand():
    loader = DataLoader(Indices(), num_workers=1, persistent_workers=True)
    first = {int(batch[0, 1]) for batch in iterate(loader)}
    assert {int(batch[0, 1]) for batch in iterate(loader)} == first, "the worker did not persist"
    shut_down_workers(loader)
    assert_no_workers()
    assert {int(batch[0, 1]) for batch in iterate(loader)}.isdisjoint(first)
    shut_down_workers(loader)
    shut_down_workers([1, 2])  # has none
    assert_no_workers()
