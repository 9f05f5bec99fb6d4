"""How samples are loaded: what is drawn at random meanwhile, and what workers do with signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    Subset,
    default_collate,
    default_convert,
    get_worker_info,
)

from pytorch_accelerated._data import WholeBatchDataset, sliceable_tensors, unchanged
from pytorch_accelerated._rng import derive_seed, host_generators_seeded, seed_host_generators

if TYPE_CHECKING:
    from types import FrameType

_GRACE_SECONDS = 30
_SECONDS_BETWEEN_LOOKS = 0.1


class SeededSamples(Dataset[Any]):
    """Gives a `DataLoader` whole batches, whose randomness is a function of (seed, epoch, first index).

    Whatever dataset and collation draw from the global generators, it is the same in any worker, and after a resume in
    the midst of the epoch. In the main process the generators are put back afterwards.

    Args:
        dataset: The dataset; what else it offers is passed through.
        collate_fn: Makes a batch of samples.
        has_workers: Whether other processes need to learn the seed of a new epoch.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], has_workers: bool) -> None:
        self.dataset = dataset
        self._collate = collate_fn
        self._seed = torch.zeros(1, dtype=torch.int64)
        if has_workers:
            self._seed.share_memory_()  # type: ignore[no-untyped-call]

    def set_seed(self, seed: int) -> None:
        """Begin an epoch, also in the workers."""
        self._seed.fill_(seed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._with_own_randomness(index, lambda: self._collate(self.dataset[index]))

    def __getitems__(self, indices: Iterable[Any]) -> Any:
        """Return the batch of the samples at ``indices``."""
        first = next(iter(indices), None)
        return self._with_own_randomness(first, lambda: self._collate(self._samples_at(indices)))

    def _samples_at(self, indices: Iterable[Any]) -> Any:
        get_many = getattr(self.dataset, "__getitems__", None)
        return get_many(indices) if callable(get_many) else [self.dataset[index] for index in indices]

    def _with_own_randomness(self, index: Any, load: Callable[[], Any]) -> Any:
        seed = derive_seed(int(self._seed), index)
        if get_worker_info() is not None:  # nothing else draws there
            seed_host_generators(seed)
            return load()
        with host_generators_seeded(seed):
            return load()

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # asked for by copy and pickle before it is set
            raise AttributeError(name)
        return getattr(self.dataset, name)


def draws_nothing(loader: DataLoader[Any]) -> bool:
    """Tell whether loading is known to draw nothing at random: data in memory, collated as PyTorch does it."""
    dataset: Any = loader.dataset
    is_in_memory = isinstance(dataset, (WholeBatchDataset, list, tuple)) or sliceable_tensors(dataset) is not None
    return is_in_memory and loader.collate_fn in (default_collate, default_convert, unchanged)


def keeps_all_samples(loader: DataLoader[Any]) -> bool:
    """Tell whether a batch is known to have as many rows as there are indices in it."""
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    is_whole = isinstance(dataset, WholeBatchDataset) and loader.collate_fn is unchanged
    is_collated = loader.collate_fn is default_collate and not hasattr(dataset, "__getitems__")
    return is_whole or is_collated


def is_death_of_worker(error: BaseException) -> bool:
    """Tell whether an error says that a worker died, which PyTorch raises at any place of the program."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@contextmanager
def deaths_put_off() -> Iterator[None]:
    """Let the error of a worker that died come after the body, not within it.

    The steps of `threading` and `multiprocessing` are written in Python. If an error strikes between the taking of a
    lock and the place that would give it back, all who want it wait for ever.
    """
    is_main = threading.current_thread() is threading.main_thread()  # elsewhere no handler of signals runs
    raise_if_dead = signal.getsignal(signal.SIGCHLD) if is_main and hasattr(signal, "SIGCHLD") else None
    if not callable(raise_if_dead):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, raise_if_dead)
    if came:
        raise_if_dead(*came[-1])


def end_workers(loader: Any) -> None:
    """Let the persistent workers of a loader end; if its batches are asked for again, it starts others.

    PyTorch lets them live, idle and with their memory, as long as the loader.
    """
    if isinstance(loader, DataLoader):
        getattr(loader, "base_dataloader", loader)._iterator = None  # Accelerate's are around the one that has them


class WorkerSetup:
    """Prepares a worker for signals that are meant for the run, then calls the user's ``worker_init_fn``.

    A terminal or a scheduler signals a whole group of processes. If the workers died of it at once, the run would fail
    before it can save its state. So they ignore what interrupts a run, and put off a demand to terminate until the run
    has ended.

    Args:
        init: The user's function, called with the number of the worker.
        has_workers: Whether there will be any.
    """

    def __init__(self, init: Callable[[int], None] | None, has_workers: bool = True) -> None:
        self.init = init
        self._is_run_over = torch.zeros(1, dtype=torch.bool)
        self._deadline: float | None = None
        if has_workers:
            self._is_run_over.share_memory_()  # type: ignore[no-untyped-call]

    def end_run(self) -> None:
        """Tell the workers that the run has ended."""
        self._is_run_over.fill_(True)

    def __call__(self, worker_id: int) -> None:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():  # not on Windows
            for ignored in (signal.SIGINT, signal.SIGUSR1):
                signal.signal(ignored, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, self._terminate_later)
        if self.init is not None:
            _show_plain_dataset()
            self.init(worker_id)

    def _terminate_later(self, signal_number: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + _GRACE_SECONDS
        if self._is_run_over or time.monotonic() > self._deadline:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGALRM, self._terminate_later)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_LOOKS)


def _show_plain_dataset() -> None:
    # Such functions open files for the dataset they find, and it is not for them to see that it is wrapped.
    worker = get_worker_info()
    if worker is not None and isinstance(worker.dataset, SeededSamples):
        object.__setattr__(worker, "dataset", worker.dataset.dataset)
