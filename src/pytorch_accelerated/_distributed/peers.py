"""After a signal, a process does not wait for another rank that has ended or is stopped, but ends like that rank."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import distributed

from pytorch_accelerated._distributed.collectives import all_gather_objects
from pytorch_accelerated._distributed.reasons import name_of_signal

GRACE_SECONDS = 5.0
"""How long another rank must have been gone, and this one must have waited in one place, before it ends."""

_LOOKS_PER_GRACE = 10
_ENDED_OR_STOPPED = frozenset("ZXxTt")
_TORCH = Path(str(torch.__file__)).parent
_PLACES_OF_WAITS = (
    f"{_TORCH / 'distributed'}{os.sep}",
    str(_TORCH / "nn" / "parallel" / "distributed.py"),
    str(_TORCH / "autograd" / "graph.py"),  # a backward pass, in which DDP waits
    str(Path(__file__).with_name("consensus.py")),  # what it has sent without waiting
)

_peers_of_world: list[Any] = []
"""A reference to the default process group, and the processes of its ranks."""

_WAKEUP_OF_PARENT: list[bool] = []
"""Not empty while this process is told of signals through a pipe, which a forked process must leave alone."""


@dataclass(frozen=True)
class Peer:
    """The process of a rank.

    Args:
        system: The running system, and within it the container, that the number of the process belongs to.
        pid: The number of the process.
        start: When it started, as the system counts.
    """

    system: str
    pid: int
    start: str

    @staticmethod
    def of_this_process() -> Peer | None:
        """Return this process; ``None`` where the system does not tell, which is anywhere but on Linux."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = Path("/proc/self/ns/pid").readlink()
            return Peer(f"{boot} {space}", os.getpid(), _state_of(os.getpid())[1])
        except (OSError, IndexError):
            return None

    def is_gone(self) -> bool:
        """Tell whether the process has ended or is stopped."""
        try:
            state, start = _state_of(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except (OSError, IndexError):
            return False
        return start != self.start or state in _ENDED_OR_STOPPED


def _state_of(pid: int) -> tuple[str, str]:
    """Return the state of a process, as one letter, and when it started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def find_peers() -> dict[int, Peer]:
    """Return the processes of the other ranks on this system. Must be called on every process.

    The first call for a process group lets all processes exchange what they are.
    """
    world = distributed.group.WORLD
    if not _peers_of_world or _peers_of_world[0]() is not world:
        own = Peer.of_this_process()
        everyone = all_gather_objects(own, distributed.get_world_size())
        peers = {
            rank: peer
            for rank, peer in enumerate(everyone)
            if peer is not None and own is not None and peer.system == own.system and peer != own
        }
        _peers_of_world[:] = weakref.ref(world), peers  # a process that lets go of its group closes its connections
    found: dict[int, Peer] = _peers_of_world[1]
    return found


class Listening(Protocol):
    """What listens to signals, such as an `InterruptFlag`."""

    @property
    def signals(self) -> Collection[int]:
        """The signals that it listens to."""


class EndOnSignals:
    """Inside its ``with`` block, a signal that the run listens to ends a process that would wait for nobody.

    A handler of Python has no effect while its process waits for the others in a collective. If another rank has died,
    that wait usually fails at once. But a rank that only sends, as the main process does in a broadcast, may miss it
    and wait for the whole timeout; and a rank that is stopped closes no connection. Here a thread, which sleeps until a
    signal comes, looks for ranks on the same machine that have ended or are stopped. If this process then stays at one
    place in a collective, it ends with the exit code of the signal. What is on the disk stays as it is.

    Does nothing with a single process, where the system does not tell of processes, and in a thread other than the main
    one, where Python allows no handlers.

    Args:
        flag: Knows the signals that the run listens to.
        num_processes: The world size. With several processes, every one of them must enter the block.
    """

    def __init__(self, flag: Listening, num_processes: int) -> None:
        self._flag = flag
        self._peers: Mapping[int, Peer] = {}
        self._is_distributed = num_processes > 1
        self._reader, self._writer, self._previous = -1, -1, -1

    def __enter__(self) -> None:
        """Start to listen."""
        if self._is_distributed and distributed.is_initialized():
            self._peers = find_peers()
        if not self._peers or threading.current_thread() is not threading.main_thread():
            return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _leave_wakeup_to_parents()
        _WAKEUP_OF_PARENT.append(True)
        threading.Thread(target=self._watch, args=(self._reader,), name="watch for signals", daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        """Stop listening."""
        if self._writer == -1:
            return
        _WAKEUP_OF_PARENT.pop()
        signal.set_wakeup_fd(self._previous, warn_on_full_buffer=False)
        os.write(self._writer, b"\0")  # no signal has this number; forked processes may keep the pipe open
        os.close(self._writer)
        self._writer = -1

    def _watch(self, reader: int) -> None:
        number: int | None = None
        waits = _Waits(self._peers)
        with open(reader, "rb", buffering=0):
            while True:
                seconds = None if number is None else GRACE_SECONDS / _LOOKS_PER_GRACE
                if select.select([reader], [], [], seconds)[0]:
                    received = os.read(reader, 4096)
                    if 0 in received:
                        return
                    self._pass_on(received)
                    number = next((each for each in received if each in self._flag.signals), number)
                frame = None if number is None else waits.find_vain_one()
                if number is not None and frame is not None:
                    _end(number, sorted(waits.gone_since), frame)

    def _pass_on(self, received: bytes) -> None:
        if self._previous != -1:  # that of an event loop
            with suppress(OSError):
                os.write(self._previous, received)


class _Waits:
    """Remembers since when ranks are gone, and threads are where processes wait for each other."""

    def __init__(self, peers: Mapping[int, Peer]) -> None:
        self._peers = peers
        self.gone_since: dict[int, float] = {}
        self._places: dict[int, tuple[object, float]] = {}

    def find_vain_one(self) -> FrameType | None:
        """Look again, and return where a thread has waited too long for a rank that is gone; ``None`` if none has."""
        now, frames = time.monotonic(), frames_in_collectives()
        self.gone_since = {rank: self.gone_since.get(rank, now) for rank, peer in self._peers.items() if peer.is_gone()}
        before, self._places = self._places, {}
        for thread, frame in frames.items():
            place = id(frame), frame.f_lasti
            former, since = before.get(thread, (None, now))
            self._places[thread] = place, since if former == place else now
        if self.gone_since:
            first = min(self.gone_since.values())
            for thread, (_, since) in self._places.items():
                if now - max(since, first) >= GRACE_SECONDS:
                    return frames[thread]
        return None


def frames_in_collectives() -> dict[int, FrameType]:
    """Return the innermost frame of each thread that is where processes wait for each other."""
    frames = sys._current_frames()  # noqa: SLF001 - the documented way to get them
    return {thread: frame for thread, frame in frames.items() if frame.f_code.co_filename.startswith(_PLACES_OF_WAITS)}


def _end(number: int, gone: list[int], frame: FrameType) -> None:
    ranks = f"rank {gone[0]}, which has" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))}, which have"
    text = (
        f"{name_of_signal(number)} ends this process, rank {distributed.get_rank()}, at once: it waits in "
        f"`{frame.f_code.co_name}` for {ranks} ended or been stopped. The states on the disk are complete.\n"
    )
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(Exception):
        sys.stderr.write(text)
        sys.stderr.flush()
    os._exit(128 + number)


@cache
def _leave_wakeup_to_parents() -> None:
    """Keep signals to processes that are forked, such as a loader's workers, from looking like signals to this one."""

    def leave() -> None:
        if _WAKEUP_OF_PARENT:
            _WAKEUP_OF_PARENT.clear()
            with suppress(ValueError):  # not in the main thread
                signal.set_wakeup_fd(-1)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=leave)
