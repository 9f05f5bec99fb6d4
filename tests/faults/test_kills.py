"""Runs killed at random moments end with the same bits as uninterrupted ones; `make soak` tries many more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from _starting import run

PROGRAMS = Path(__file__).with_name("_programs.py")
NUM_PROGRAMS = 3
SCRIPT = Path(__file__).parents[1] / "tools" / "_kills.py"
NUM_KILLS = 6


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
def test_killed_runs_end_with_the_same_bits():
    result = run(SCRIPT, "--kills", str(NUM_KILLS), timeout=300, is_measured=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{NUM_KILLS} kills in" in result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
def test_programs_that_are_killed_and_resumed_end_with_the_same_bits():
    """The first few of the random programs of `make soak PROGRAMS=200`."""
    result = run(PROGRAMS, "--programs", str(NUM_PROGRAMS), "--seed", "1", timeout=120, is_measured=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{NUM_PROGRAMS} programs in" in result.stdout
