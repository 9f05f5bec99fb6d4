"""One timeout rules every wait between processes; the error afterwards names the rank that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from _processes import launch

CASES = Path(__file__).with_name("_waits_cases.py")
slow = pytest.mark.slow


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_processes", "stopped", "where"),
    [
        (2, 1, "background save"),
        (2, 0, "background save"),
        (3, 1, "step"),
        pytest.param(3, 1, "background save", marks=slow),
        pytest.param(3, 0, "background save", marks=slow),
        pytest.param(2, 0, "step", marks=slow),
    ],
)
def test_a_stopped_process_ends_the_others_after_the_configured_timeout(num_processes, stopped, where, tmp_path):
    ended = launch(CASES, tmp_path, num_processes, str(stopped), where, timeout=40)
    outputs = "\n".join((tmp_path / f"output-{rank}.txt").read_text()[-2500:] for rank in range(num_processes))
    for rank in {*range(num_processes)} - {stopped}:
        assert ended[rank].returncode == 0, outputs
        seconds, _, error = (tmp_path / f"error-{rank}.txt").read_text().partition("\n")
        print(seconds, error)
        assert float(seconds) < 20
        assert f"Rank {stopped} does not answer" in error
        assert "Processes wait 1 s for each other" in error
        assert f"Rank {rank} waited in `" in error
    if where == "background save":
        assert "in its thread 'training state writer'" in error
    if stopped != 0:  # rank 0 keeps what the others tell each other
        for rank in {*range(num_processes)} - {stopped}:
            assert f"Rank {rank} waited in `" in error
