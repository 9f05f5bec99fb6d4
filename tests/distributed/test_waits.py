"""One timeout rules every wait between processes; the error afterwards names the rank that is missing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from _processes import launch

CASES = Path(__file__).with_name("_waits_cases.py")


def is_running(folder: Path, rank: int) -> bool:
    try:
        os.kill(int((folder / f"pid-{rank}").read_text()), 0)
    except (FileNotFoundError, ValueError):
        return True  # not started yet
    except ProcessLookupError:
        return False
    return True


def kill_after(folder: Path, stopped: int, others: Iterable[int]) -> None:
    """Kill the stopped process when the others have ended, or after a time in which they should have."""
    deadline = time.monotonic() + 30
    while any(is_running(folder, rank) for rank in others) and time.monotonic() < deadline:
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.kill(int((folder / f"pid-{stopped}").read_text()), signal.SIGKILL)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_processes", "stopped", "where"),
    [
        (2, 1, "background save"),
        (3, 0, "step"),
        (3, 1, "background save"),
        (2, 1, "new group"),
    ],
)
def test_a_stopped_process_ends_the_others_after_the_configured_timeout(num_processes, stopped, where, tmp_path):
    others = {*range(num_processes)} - {stopped}
    killer = threading.Thread(target=kill_after, args=(tmp_path, stopped, others))
    killer.start()
    ended = launch(CASES, tmp_path, num_processes, str(stopped), where, timeout=40)
    killer.join()
    outputs = "\n".join((tmp_path / f"output-{rank}.txt").read_text()[-2500:] for rank in range(num_processes))
    for rank in others:
        assert ended[rank].returncode == 0, outputs
        seconds, _, error = (tmp_path / f"error-{rank}.txt").read_text().partition("\n")
        print(seconds, error)
        assert float(seconds) < 20
        assert f"Rank {stopped} does not answer" in error
        assert f"Processes wait {60 if where == 'new group' else 1} s for each other" in error
        told = others if stopped != 0 else {rank}  # rank 0 keeps what the others tell each other
        assert all(f"Rank {other} waited in `" in error for other in told)
        if where == "background save":
            assert "in its thread 'training state writer'" in error
