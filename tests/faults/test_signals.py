"""Real signals to real processes: each ends in good order, and another process goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from _processes import launch
from _saved import names_in
from _support import SOURCE

SCRIPT = Path(__file__).with_name("_signalled_training.py")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STEPS = {signal.SIGINT: 5, signal.SIGTERM: 7, signal.SIGUSR1: 15}
"""At which step of 15 each signal comes: at the end of an epoch, within a window, in the last."""

SECONDS_TO_END = 10
TIMEOUT_SECONDS = 120


def exit_code_of(number):
    """Python itself ends by SIGINT after a `KeyboardInterrupt`, so that shells know of it."""
    return -number if number == signal.SIGINT else 128 + number


@contextmanager
def running(folder, **settings):
    """Start the training in a process of its own, which is killed if it is still there at the end of the block."""
    paths = [str(SOURCE.parent), str(Path(__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process, line):
    output = []
    for printed in process.stdout:
        output.append(printed)
        if printed.strip() == line:
            return
    pytest.fail(f"the process ended without saying {line!r}:\n{''.join(output)}")


def end(process):
    """Let it go on, and return its output and how many seconds it took to end."""
    start = time.monotonic()
    output, _ = process.communicate("go on\n", timeout=TIMEOUT_SECONDS)
    return output, time.monotonic() - start


def same(left, right):
    """Bit by bit, in nested dictionaries and lists too."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def read(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


# --- one process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What a run leaves that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with running(folder) as process:
        output, _ = end(process)
    assert process.returncode == 0, output
    return read(folder, "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_that_gets_a_signal_saves_and_ends_and_another_goes_on(tmp_path, whole_run, number):
    with running(tmp_path, tell_at=STEPS[number]) as process:
        wait_for_line(process, f"at step {STEPS[number]}")
        process.send_signal(number)
        output, seconds = end(process)
    assert process.returncode == exit_code_of(number), output
    assert seconds < SECONDS_TO_END
    states = tmp_path / "run" / "states"
    assert names_in(states) == [f"step_{STEPS[number]}"]  # no step was lost
    assert f"resume_from={str(states / f'step_{STEPS[number]}')!r}" in output
    assert "handlers are as before" in output
    with running(tmp_path, runs={"resumed": str(states / f"step_{STEPS[number]}")}) as process:
        output, _ = end(process)
    assert process.returncode == 0, output
    assert same(read(tmp_path, "resumed"), whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_does_not_take_the_workers_away(tmp_path, whole_run, number):
    """As a terminal or a scheduler sends it; on the resume the workers are others, and as many as before."""
    with running(tmp_path, tell_at=STEPS[number], num_workers=2) as process:
        wait_for_line(process, f"at step {STEPS[number]}")
        os.killpg(process.pid, number)
        output, seconds = end(process)
    assert process.returncode == exit_code_of(number), output
    assert seconds < SECONDS_TO_END
    state = tmp_path / "run" / "states" / f"step_{STEPS[number]}"
    with running(tmp_path, runs={"resumed": str(state)}, num_workers=2) as process:
        output, _ = end(process)
    assert process.returncode == 0, output
    assert same(read(tmp_path, "resumed"), whole_run)


@pytest.mark.slow
def test_sigterm_ends_a_process_at_once_if_no_callback_listens_to_it(tmp_path):
    with running(tmp_path, tell_at=3, saves=False) as process:
        wait_for_line(process, "at step 3")
        process.terminate()
        output, _ = end(process)
    assert process.returncode == -signal.SIGTERM
    assert output == ""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_slow_step_at_once(tmp_path):
    with running(tmp_path, is_slow=True) as process:
        wait_for_line(process, "a slow step")
        process.send_signal(signal.SIGINT)
        wait_for_line(process, "a signal has come")
        process.send_signal(signal.SIGINT)
        output, seconds = end(process)
    print(f"ended after {seconds:.2f} s")
    assert process.returncode == -signal.SIGINT, output
    assert seconds < SECONDS_TO_END  # the step takes a minute
    assert "handlers are as before" in output
    assert names_in(tmp_path / "run" / "states") == []


# --- two processes -----------------------------------------------------------------------------------------------


SIGNALLED_AT = {
    "training": ["on_backward_start", 6, signal.SIGTERM, 1],
    "evaluation": ["on_eval_step_start", 5, signal.SIGUSR1, 1],  # four were within the epoch
    "end": ["on_training_run_end", 1, signal.SIGTERM, 1],
}
"""By place: event, in which call of it, signal, rank."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Runs on two processes of which rank 1 alone got a signal; then a whole run, and those that are resumed."""
    folder = tmp_path_factory.mktemp("interrupted")
    codes, states = {}, {}
    for place, signal_at in SIGNALLED_AT.items():
        (folder / place).mkdir()
        settings = json.dumps({"signal_at": signal_at, "has_late_stop": place == "end"})
        ended = launch(SCRIPT, folder / place, 2, settings, timeout=TIMEOUT_SECONDS)
        codes[place] = [process.returncode for process in ended]
        states[place] = names_in(folder / place / "run" / "states")
    resumed = {place: str(folder / place / "run" / "states" / names[0]) for place, names in states.items()}
    launch(SCRIPT, folder, 2, json.dumps({"runs": {"whole": None, **resumed}}), timeout=TIMEOUT_SECONDS)
    return folder, codes, states


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("place", SIGNALLED_AT)
def test_a_signal_to_one_process_ends_all_alike_and_others_go_on(interrupted, place):
    folder, codes, states = interrupted
    outputs = "".join((folder / place / f"output-{rank}.txt").read_text() for rank in range(2))
    number = SIGNALLED_AT[place][2]
    assert codes[place] == [128 + number] * 2, outputs
    # Within a window the other process hears of it at the next update, and an evaluation is finished.
    assert states[place] == [{"training": "step_7", "evaluation": "step_5", "end": "final"}[place]], outputs
    assert outputs.count("The run is saved in ") == (0 if place == "end" else 1)
    assert outputs.count("handlers are as before") == 2
    for rank in range(2):
        assert same(read(folder, place, rank), read(folder, "whole", rank))
