"""Fixtures for all tests: a fixed seed before each of them, and a way out of Accelerate's settings per process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).parent))  # for `_support`: pytest's import mode leaves the path alone


def pytest_configure(config):
    """Let Ctrl-C have its effect, also in the processes that are started: a shell in the background takes it away."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Thousands of small files are written, and no power is lost. That all is flushed is tested by counting the calls.
    os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def _fresh_accelerate_state():
    """For tests that make an accelerator with settings of its own, which Accelerate would keep for the others."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
