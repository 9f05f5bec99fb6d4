"""Under a launcher that restarts the processes, or is stopped and started again, a run ends with the same bits.

    LAUNCHERS=all python -m pytest tests/faults/test_launchers.py

starts torchrun and Accelerate's launcher too. By default, processes are only forked under the agent of torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from _processes import free_port
from _runs import differences
from _starting import CAN_FORK, environment_for_tests, start

SCRIPT = Path(__file__).with_name("_launched.py")
SECONDS = 240
NEEDS_ALL = pytest.mark.skipif(os.environ.get("LAUNCHERS") != "all", reason="takes a minute; set LAUNCHERS=all")
FORKED = pytest.mark.skipif(not CAN_FORK, reason="this system cannot fork")

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAUNCHERS = {
    "forked": (),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"),
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--max_restarts=2"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--monitor_interval=0.1"),
    ),
}


def launch(launcher, folder, happenings, output):
    """Start a launcher in a process group of its own."""
    arguments = (str(SCRIPT), str(folder), json.dumps(happenings))
    if launcher == "forked":
        return start(*arguments, "--forked", stdout=output.fileno(), has_own_group=True)
    options = LAUNCHERS[launcher]
    if launcher == "accelerate":
        options = (*options, f"--main_process_port={free_port()}")
    environment = environment_for_tests(ACCELERATE_USE_CPU="true")
    command = [sys.executable, "-m", *options, *arguments]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def run(launcher, folder, happenings=None, stop=None):
    """Run a launcher to its end, and return its exit code.

    Args:
        launcher: Its name.
        folder: The folder of the run.
        happenings: What happens in it.
        stop: Called with the launcher once a rank waits for a signal.
    """
    with (folder / "output.txt").open("a") as output:
        process = launch(launcher, folder, happenings or {}, output)
        try:
            if stop is not None:
                wait_for(folder / f"happened-{next(iter(happenings))}", process, folder)
                stop(process, folder)
            return process.wait(SECONDS)
        finally:
            for left in family_of(process.pid):
                with suppress(psutil.NoSuchProcess):
                    left.kill()


def wait_for(path, process, folder):
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, (folder / "output.txt").read_text()[-3000:]
        time.sleep(0.01)


def family_of(pid):
    """Return the launcher and the processes that it has started."""
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        return [launcher, *launcher.children(recursive=True)]
    return []


def stop_launcher(process, folder):
    """As Kubernetes does, and a user with `kill`."""
    process.terminate()


def stop_all_then_kill(process, folder):
    """As a cluster does whose grace period is over before the step is."""
    family = family_of(process.pid)
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal_number)
        wait_for(folder / "signal-arrived", process, folder)
    psutil.wait_procs(family[1:], SECONDS)  # not the launcher, whose exit code is asked for later


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run("forked" if CAN_FORK else "torchrun", folder) == 0, (folder / "output.txt").read_text()[-3000:]
    return outcomes_in(folder)


def outcomes_in(folder):
    """Return the outcome on each rank; of buffers, DDP keeps those of the main process."""
    outcomes = [torch.load(folder / f"outcome-{rank}.pt", weights_only=True) for rank in range(2)]
    del outcomes[1]["model"], outcomes[1]["average"]
    return outcomes


def assert_same(folder, uninterrupted_run):
    assert differences(outcomes_in(folder), uninterrupted_run) == []


@pytest.mark.parametrize(
    ("launcher", "deaths"),
    [
        pytest.param("forked", {"exit": [1, 4]}, marks=FORKED),
        pytest.param("forked", {"kill": [0, 4], "exit": [1, 8]}, marks=[FORKED, NEEDS_ALL]),
        pytest.param("torchrun", {"exit": [1, 4], "kill": [0, 8]}, marks=NEEDS_ALL),
        pytest.param("accelerate", {"kill": [1, 4], "exit": [0, 8]}, marks=NEEDS_ALL),
    ],
)
def test_ranks_that_die_are_restarted_and_the_run_goes_on_with_the_same_bits(
    tmp_path, uninterrupted_run, launcher, deaths
):
    code = run(launcher, tmp_path, deaths)
    output = (tmp_path / "output.txt").read_text()
    assert code == 0, output[-3000:]
    assert output.count("Resuming from") == len(deaths), output
    assert_same(tmp_path, uninterrupted_run)


@pytest.mark.parametrize(
    ("launcher", "happenings", "stop"),
    [
        pytest.param("forked", {"wait": [0, 5]}, stop_launcher, marks=[FORKED, NEEDS_ALL]),
        pytest.param("torchrun", {"wait": [0, 5]}, stop_launcher, marks=NEEDS_ALL),
        pytest.param("accelerate", {"wait": [1, 5]}, stop_launcher, marks=NEEDS_ALL),
        pytest.param("forked", {"hang": [1, 5]}, stop_all_then_kill, marks=[FORKED, NEEDS_ALL]),
        pytest.param("torchrun", {"hang": [0, 5]}, stop_all_then_kill, marks=NEEDS_ALL),
    ],
)
def test_the_same_command_goes_on_with_the_same_bits(tmp_path, uninterrupted_run, launcher, happenings, stop):
    code = run(launcher, tmp_path, happenings, stop)
    output = (tmp_path / "output.txt").read_text()
    assert code != 0, output[-3000:]
    assert run(launcher, tmp_path, happenings) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert (tmp_path / "output.txt").read_text().count("Resuming from") == 1
    assert_same(tmp_path, uninterrupted_run)
