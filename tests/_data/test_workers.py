"""How samples are loaded: what is drawn at random meanwhile, and what workers do with signals."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from _support import Samples, make_dataset
from pytorch_accelerated._data.determinism import SeededDataset, SeededLoader, uses_no_randomness
from pytorch_accelerated._data.in_memory import WholeBatchDataset, unchanged
from pytorch_accelerated._data.workers import WorkerSetup, defer_worker_errors

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Augmented(Dataset):
    """Each sample is its index and a draw from each global generator."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def mask(samples):
    """A collation that draws, as those of masked language models do."""
    batch = torch.stack(samples)
    return torch.cat([batch, torch.rand(len(batch), 1)], dim=1)


def batches_of(loader, epoch=0, seed=3):
    randomness = SeededLoader(loader, 0)
    randomness.set_epoch(epoch, seed)
    return list(randomness.loader)


def loader_of(num_workers=0, **kwargs):
    return DataLoader(Augmented(), **{"batch_size": 4, "shuffle": True, "num_workers": num_workers, **kwargs})


@pytest.mark.parametrize("collate_fn", [None, mask])
def test_what_is_drawn_depends_on_seed_and_epoch_and_not_on_workers(collate_fn):
    first = torch.cat(batches_of(loader_of(collate_fn=collate_fn)))
    assert len(set(first[:, 1:].flatten().tolist())) == first[:, 1:].numel(), "all draws differ"
    for num_workers in (1, 2):
        again = torch.cat(batches_of(loader_of(num_workers, collate_fn=collate_fn)))
        assert torch.equal(again, first)
    for other in ({"epoch": 1}, {"seed": 4}):
        rows = torch.cat(batches_of(loader_of(collate_fn=collate_fn), **other))
        assert not set(rows[:, 1:].flatten().tolist()) & set(first[:, 1:].flatten().tolist())


def test_persistent_workers_learn_of_a_new_epoch():
    randomness = SeededLoader(loader_of(2, persistent_workers=True), 0)
    for epoch in (0, 1, 0):
        randomness.set_epoch(epoch, 3)
        assert torch.equal(torch.cat(list(randomness.loader)), torch.cat(batches_of(loader_of(), epoch)))


@pytest.mark.parametrize("kwargs", [{}, {"batch_size": None}, {"batch_sampler": [[1, 2], [3]], "batch_size": 1}])
def test_the_global_generators_are_left_alone(kwargs):
    kwargs = {"shuffle": "batch_sampler" not in kwargs, **kwargs}

    def drawn(load):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(5)
        np.random.normal()  # leaves a second value behind
        load()
        return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]

    assert drawn(lambda: batches_of(loader_of(**kwargs))) == drawn(lambda: None)


def test_an_error_while_loading_leaves_them_alone_too():
    class Broken(Augmented):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise LookupError("no such sample")

    state = torch.get_rng_state(), random.getstate(), np.random.get_bit_generator()
    with pytest.raises(LookupError, match="no such sample"):
        batches_of(DataLoader(Broken(), batch_size=4))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_bit_generator() is state[2]


def test_a_dataset_that_loads_many_at_once_may_go_on_to_do_so():
    class ManyAtOnce(Augmented):
        def __getitems__(self, indices):
            return [torch.tensor([index, -1.0]) for index in indices]

    batches = batches_of(DataLoader(ManyAtOnce(), batch_size=4))
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (torch.cat(batches)[:, 1] == -1).all()


def test_what_the_dataset_offers_is_passed_through():
    dataset = Augmented()
    dataset.classes = ["a", "b"]
    samples = SeededDataset(dataset, unchanged, has_workers=False)
    assert (len(samples), samples.classes, samples[3][0]) == (12, ["a", "b"], 3)
    with pytest.raises(AttributeError):
        samples.nothing_like_it  # noqa: B018 - the error is what is tested


@pytest.mark.parametrize(
    ("dataset", "kwargs", "expected"),
    [
        (make_dataset(4), {}, True),
        (make_dataset(4), {"batch_size": None}, True),
        (WholeBatchDataset(make_dataset(4)), {"collate_fn": unchanged}, True),
        ([1, 2], {}, True),
        (make_dataset(4), {"collate_fn": mask}, False),
        (Samples(make_dataset(4)), {}, False),
        (type("Own", (TensorDataset,), {})(torch.zeros(4)), {}, False),
    ],
)
def test_data_in_memory_is_known_to_draw_nothing(dataset, kwargs, expected):
    loader = DataLoader(dataset, **kwargs)
    assert uses_no_randomness(loader) is expected
    assert isinstance(SeededLoader(loader, 0).loader.dataset, SeededDataset) is not expected


# --- workers -----------------------------------------------------------------------------------------------------


class Signalled(Augmented):
    """Its worker gets a signal before the second batch; the rest of the samples tell that it lived on."""

    def __init__(self, signal_number):
        self.signal_number = signal_number

    def __getitem__(self, index):
        if index == 4:
            os.kill(os.getpid(), self.signal_number)
        return torch.tensor([index, os.getpid()])


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


def test_a_worker_that_was_told_to_end_does_so_when_the_run_is_over():
    worker, connection = start_worker(setup := WorkerSetup(None))
    for _ in range(2):
        worker.terminate()
        connection.send("still there?")
        assert connection.recv() == "alive"
    setup.end_run()
    worker.join(20)
    assert worker.exitcode == -signal.SIGTERM


def test_a_worker_ends_at_once_after_the_run():
    """As `multiprocessing` ends those that are still there when the program ends."""
    worker, _ = start_worker(setup := WorkerSetup(None))
    setup.end_run()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == -signal.SIGTERM


def test_the_loader_of_a_run_that_is_over_has_told_its_workers():
    randomness = SeededLoader(loader_of(1), 0)
    assert not randomness.loader.worker_init_fn._is_run_over
    randomness.end_run()
    assert randomness.loader.worker_init_fn._is_run_over


def open_file(worker_id):
    get_worker_info().dataset.file = f"opened by worker {worker_id}"


class NeedsFile(Augmented):
    file = None

    def __getitem__(self, index):
        assert self.file is not None
        return len(self.file)


def test_the_users_own_start_of_a_worker_finds_the_dataset():
    batches = batches_of(DataLoader(NeedsFile(), batch_size=6, num_workers=2, worker_init_fn=open_file))
    assert torch.cat(batches).tolist() == [len("opened by worker 0")] * 12


# --- deaths of workers -------------------------------------------------------------------------------------------

needs_sigchld = pytest.mark.skipif(
    not hasattr(signal, "SIGCHLD"), reason="this system does not tell of ended processes"
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
def test_a_death_comes_after_what_it_would_interrupt(raise_if_dead):
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
def test_elsewhere_than_on_the_main_thread_and_without_a_handler_nothing_is_put_off(raise_if_dead):
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
