"""Who is told of a signal, and when a process gives up waiting; real ranks are in `faults/test_dying_ranks.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from pytorch_accelerated._distributed import peers
from pytorch_accelerated._distributed.peers import EndOnSignals, Peer

pytestmark = pytest.mark.skipif(Peer.of_this_process() is None, reason="this system does not tell of its processes")

NUMBER = signal.SIGUSR2


class Flag:
    signals = frozenset({NUMBER})


@pytest.fixture
def other():
    """Another process, as a peer."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = Peer.of_this_process()
    yield process, Peer(own.system, process.pid, peers._state_of(process.pid)[1])
    process.kill()
    process.wait()


@pytest.fixture
def ended(monkeypatch, other):
    """What would have ended this process, which seems to wait in a collective with the other one."""
    calls, event = [], threading.Event()

    def end(number, gone, frame):
        calls.append((number, gone))
        event.set()

    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(peers, "_end", end)
    monkeypatch.setattr(peers.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(peers, "find_peers", lambda: {1: other[1]})
    frame = sys._getframe()
    monkeypatch.setattr(peers, "frames_in_collectives", lambda: {0: frame})
    previous = signal.signal(NUMBER, lambda *_: None)
    yield lambda seconds: calls if event.wait(seconds) else []
    signal.signal(NUMBER, previous)


def test_a_peer_is_gone_when_it_is_stopped_or_ends(other):
    process, peer = other
    assert not peer.is_gone()
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while not peer.is_gone():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGCONT)
    while peer.is_gone():
        assert time.monotonic() < deadline
    process.kill()
    process.wait()
    assert peer.is_gone()
    assert Peer(peer.system, os.getpid(), peer.start).is_gone(), "another process has got the number"


def test_a_signal_ends_a_process_that_waits_for_one_that_is_gone(ended, other):
    process, _ = other
    process.kill()
    process.wait()
    with EndOnSignals(Flag(), 2):
        assert ended(0.2) == [], "there was no signal"
        signal.raise_signal(signal.SIGCHLD)
        assert ended(0.2) == [], "the run does not listen to this one"
        signal.raise_signal(NUMBER)
        assert ended(5)[0] == (NUMBER, [1])


def test_a_signal_ends_no_process_whose_peers_live(ended):
    with EndOnSignals(Flag(), 2):
        signal.raise_signal(NUMBER)
        assert ended(0.3) == []


def test_a_signal_to_a_forked_process_is_not_one_to_its_parent(ended, other):
    process, _ = other
    process.kill()
    process.wait()
    with EndOnSignals(Flag(), 2):
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                signal.raise_signal(NUMBER)
            os._exit(0)
        os.waitpid(child, 0)
        assert ended(0.3) == []


def test_what_was_told_of_signals_before_is_told_meanwhile_and_afterwards(ended):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    with EndOnSignals(Flag(), 2):
        signal.raise_signal(NUMBER)
        assert os.read(reader, 1) == bytes([NUMBER])
    assert signal.set_wakeup_fd(before) == writer
    os.close(reader)
    os.close(writer)


def test_a_single_process_starts_no_thread():
    num_threads = threading.active_count()
    with EndOnSignals(Flag(), 1):
        assert threading.active_count() == num_threads
