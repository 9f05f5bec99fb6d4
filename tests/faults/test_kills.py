"""Runs that are killed at random moments end as if they had not been; `make soak` does it 200 times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from _support import SOURCE

SCRIPT = Path(__file__).with_name("_kills.py")
NUM_KILLS = 6


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
def test_killed_runs_end_the_same():
    paths = [str(SOURCE.parent), str(Path(__file__).parents[1])]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", str(NUM_KILLS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{NUM_KILLS} kills in" in result.stdout
