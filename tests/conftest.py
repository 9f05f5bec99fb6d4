"""Fixtures for all tests: a fixed seed, a reset of Accelerate's state, and a check of the signal handlers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import coverage
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(
    0, str(Path(__file__).parent / "tools")
)  # for `_support`: pytest's import mode does not change the path


def pytest_configure(config):
    """Restore Ctrl-C, which a shell in the background ignores in everything it starts, and skip flushes to disk."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The tests write thousands of small files and lose no power. A test counts the calls instead of flushing for real.
    os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def _fresh_accelerate_state():
    """Reset Accelerate, which keeps the settings of the first accelerator for the rest of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Make an empty folder the current one, for what writes into the current one by default."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _not_measured():
    """Pause coverage while a worker of a loader is killed.

    PyTorch raises the error in the handler of a signal, at any place in the program. If coverage holds its own lock
    there, it never releases it, and the test hangs.
    """
    paused = []
    while (measurement := coverage.Coverage.current()) is not None:  # that of a process may be on top of another one
        measurement.stop()
        paused.append(measurement)
    yield
    for measurement in reversed(paused):
        measurement.start()


@pytest.fixture
def _handlers_are_restored():
    """Fail a test that leaves another handler of a signal behind, and put the old one back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before
