"""Worker processes of loaders: signals, failures and shutdown."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from pytorch_accelerated._proxy import unwrap

if TYPE_CHECKING:
    from types import FrameType


def worker_init_fn(worker_id: int) -> None:
    """Seed NumPy and `random` in a worker process of a loader from the seed that PyTorch assigned to it.

    PyTorch does this itself now. The function remains for loaders that name it.
    """
    del worker_id  # already part of the worker's seed
    seed = torch.initial_seed()
    np.random.seed(seed % 2**32)
    random.seed(seed)


_GRACE_SECONDS = 30
_SECONDS_BETWEEN_CHECKS = 0.1


def is_worker_failure(error: BaseException) -> bool:
    """Tell whether an error reports that a worker died. PyTorch may raise it at any point of the program."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@contextmanager
def defer_worker_errors() -> Iterator[None]:
    """Raise the error of a worker that dies during the body after the body, not inside it.

    `threading` and `multiprocessing` are written in Python. An error raised between acquiring a lock and entering the
    block that releases it leaves the lock held forever.
    """
    is_main = threading.current_thread() is threading.main_thread()  # signal handlers run only there
    raise_if_dead = signal.getsignal(signal.SIGCHLD) if is_main and hasattr(signal, "SIGCHLD") else None
    if not callable(raise_if_dead):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, raise_if_dead)
    if received:
        raise_if_dead(*received[-1])


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader, and shut its workers down when this ends or fails, unless they persist.

    PyTorch's iterator shuts the workers down when the last reference to it is dropped. Whenever a worker exits, PyTorch
    raises the error of a worker that was killed before, once more. The last reference is therefore dropped here, where
    that error can be deferred.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except BaseException as error:
        if loader.num_workers > 0:  # without workers, the frames are the dataset's, and a debugger wants them
            traceback.clear_frames(error.__traceback__)  # those of the iterator refer to it
        raise
    finally:
        with defer_worker_errors():
            del iterator


def shut_down_workers(loader: Any) -> None:
    """Shut the persistent workers of a loader down. If the loader is used again, it starts new ones.

    PyTorch keeps them, idle and with their memory, as long as the loader exists.
    """
    if isinstance(loader, DataLoader):
        base = getattr(loader, "base_dataloader", loader)  # the one inside a loader of Accelerate has the workers
        base._iterator = None  # noqa: SLF001 - PyTorch has no public way to let go of persistent workers


class WorkerSetup:
    """Prepares a worker for signals that are meant for the run, then calls the user's ``worker_init_fn``.

    A terminal or a job scheduler signals a whole group of processes. If the workers exited at once, the run would fail
    before it can save its state. They therefore ignore the signals that interrupt a run, and delay their termination
    until the run has ended.

    Args:
        init: The user's function, called with the number of the worker.
        has_workers: Whether the loader has workers.
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
        _show_user_dataset()
        if self.init is not None:
            self.init(worker_id)
        if _has_lost_parent():
            os._exit(1)  # PyTorch notices the loss of the parent only from now on

    def _terminate_later(self, signal_number: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + _GRACE_SECONDS
        if self._is_run_over or time.monotonic() > self._deadline:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGALRM, self._terminate_later)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_CHECKS)


def _has_lost_parent() -> bool:
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    # Other workers may keep the connection open by which `is_alive` notices the loss; process 1 adopts orphans.
    return not parent.is_alive() or os.getppid() == 1 != parent.pid


def _show_user_dataset() -> None:
    # A `worker_init_fn` opens files for the dataset it finds, which must be the user's and not the wrapper.
    worker = get_worker_info()
    if worker is not None:
        object.__setattr__(worker, "dataset", unwrap(worker.dataset))  # PyTorch forbids assignment
