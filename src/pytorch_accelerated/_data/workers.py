"""Worker processes of loaders: their signals, their failures and their end."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    get_worker_info,
)

from pytorch_accelerated._proxy import unwrap

if TYPE_CHECKING:
    from types import FrameType


def worker_init_fn(worker_id: int) -> None:
    """Seed NumPy and `random` in a worker process of a loader from the seed PyTorch gave it.

    PyTorch does this by itself now; the function remains for loaders that name it.
    """
    del worker_id  # PyTorch has put it into the worker's seed
    seed = torch.initial_seed()
    np.random.seed(seed % 2**32)
    random.seed(seed)


_GRACE_SECONDS = 30


_SECONDS_BETWEEN_LOOKS = 0.1


def is_worker_failure(error: BaseException) -> bool:
    """Tell whether an error says that a worker died, which PyTorch raises at any place of the program."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@contextmanager
def defer_worker_errors() -> Iterator[None]:
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


def shut_down_workers(loader: Any) -> None:
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
    # Such functions open files for the dataset they find; they should not see that it is wrapped.
    worker = get_worker_info()
    if worker is not None:
        object.__setattr__(worker, "dataset", unwrap(worker.dataset))
