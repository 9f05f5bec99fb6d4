"""The example that kills itself and resumes when the same command is run again."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from _starting import run

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume.py"

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")


def run_example(folder: Path) -> CompletedProcess[str]:
    return run(EXAMPLE, "--epochs", "3", cwd=folder, CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(tmp_path):
    killed = run_example(tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "the run starts from scratch" in killed.stdout
    assert "Update 65, in epoch 3: killed." in killed.stdout
    resumed = run_example(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from 'step_60' in epoch" in resumed.stdout
    hashes = re.findall(r"^84 updates.*: +([0-9a-f]{16})$", resumed.stdout, flags=re.MULTILINE)
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]
    assert resumed.stdout.splitlines()[-1] == "The weights are bit-identical."
